"""Eight GPUs: two replicas, each matrix split over a square of 2 × 2 (2d).

torchrun --nproc-per-node 8 launch.py --config configs/opt_350m_2d.py
"""

model = dict(name="opt-350m")
data = dict(sequence_length=2048)  # set path and tokenizer to your text; the default is Python's manual, in bytes
parallel = dict(tensor=dict(mode="2d", size=4))
train = dict(steps=100_000, global_batch_size=256, micro_batch_size=8, precision="bf16")
optimizer = dict(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
lr_scheduler = dict(kind="linear", warmup_steps=2000)
output = dict(log_every=10, eval_every=1000, checkpoint_every=1000)
