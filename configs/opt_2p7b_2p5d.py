"""Eight GPUs: each matrix split over a square of 2 × 2, at two depths that share the batch (2.5d).

torchrun --nproc-per-node 8 launch.py --config configs/opt_2p7b_2p5d.py
"""

model = dict(name="opt-2.7b")
data = dict(sequence_length=2048)  # set path and tokenizer to your text; the default is Python's manual, in bytes
parallel = dict(tensor=dict(mode="2.5d", size=8, depth=2))
train = dict(steps=100_000, global_batch_size=512, micro_batch_size=8, precision="bf16")
optimizer = dict(lr=1.6e-4, betas=(0.9, 0.95), weight_decay=0.1)
lr_scheduler = dict(kind="linear", warmup_steps=2000)
output = dict(log_every=10, eval_every=1000, checkpoint_every=1000)
