"""Eight GPUs: two replicas of Qwen3, each layer split over four as in Megatron-LM (1d), two of its 8 k, v heads a GPU.

torchrun --nproc-per-node 8 launch.py --config configs/qwen3_0p6b_1d.py
"""

model = dict(name="qwen3-0.6b")  # or path="DIR": published weights
data = dict(sequence_length=4096)  # set path and tokenizer to your text; the default is Python's manual, in bytes
parallel = dict(tensor=dict(mode="1d", size=4))
zero = dict(stage=1)
train = dict(steps=100_000, global_batch_size=256, micro_batch_size=4, precision="bf16")
optimizer = dict(lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
lr_scheduler = dict(kind="cosine", warmup_steps=2000)
output = dict(log_every=10, eval_every=1000, checkpoint_every=1000)
