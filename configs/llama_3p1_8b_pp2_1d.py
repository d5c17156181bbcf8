"""A host of eight GPUs of 80 GB: a pipeline of two stages, each layer split over four GPUs (1d).

A GPU has at most 19 GiB of weights, gradients and optimizer states, and in this pipeline about 19 GiB of activations:
0.5 GiB for each of 18 layers and each of two microbatches. So nothing is computed again in backward. With more hosts
there are more replicas, and zero=dict(stage=1) divides the optimizer states over them.

torchrun --nproc-per-node 8 launch.py --config configs/llama_3p1_8b_pp2_1d.py
"""

model = dict(name="llama-3.1-8b")  # or path="DIR": published weights, with a lower learning rate
data = dict(sequence_length=8192)  # set path and tokenizer to your text; the default is Python's manual, in bytes
parallel = dict(pipeline=dict(size=2, schedule="1f1b"), tensor=dict(mode="1d", size=4))
train = dict(steps=100_000, global_batch_size=128, micro_batch_size=1, precision="bf16")
optimizer = dict(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
lr_scheduler = dict(kind="cosine", warmup_steps=8000)
output = dict(log_every=10, eval_every=1000, checkpoint_every=1000)
