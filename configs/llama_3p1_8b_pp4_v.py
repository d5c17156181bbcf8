"""A host of eight GPUs of 80 GB: a V-shaped zero-bubble pipeline of four ranks, each layer split over two GPUs (1d).

A GPU has at most 18 GiB of weights, gradients and optimizer states, and 19 GiB of activations: those of four
microbatches on its two stages. The first rank has both the embedding and the head. With sequence parallelism, stages
send half of each sequence. Beside it, llama_3p1_8b_pp2_1d.py has fewer messages between stages, and more within layers.

torchrun --nproc-per-node 8 launch.py --config configs/llama_3p1_8b_pp4_v.py
"""

model = dict(name="llama-3.1-8b")  # or path="DIR": published weights, with a lower learning rate
data = dict(sequence_length=8192)  # set path and tokenizer to your text; the default is Python's manual, in bytes
parallel = dict(
    pipeline=dict(size=4, schedule="zero_bubble_v"),
    tensor=dict(mode="1d", size=2, sequence_parallel=True),
)
train = dict(steps=100_000, global_batch_size=128, micro_batch_size=1, precision="bf16")
optimizer = dict(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
lr_scheduler = dict(kind="cosine", warmup_steps=8000)
output = dict(log_every=10, eval_every=1000, checkpoint_every=1000)
