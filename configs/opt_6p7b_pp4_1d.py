"""Eight hosts of eight GPUs: each layer split over the GPUs of a host (1d), a pipeline of four hosts, two replicas.

On each host: torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_HOST:29500
launch.py --config configs/opt_6p7b_pp4_1d.py
"""

model = dict(name="opt-6.7b")
data = dict(sequence_length=2048)  # set path and tokenizer to your text; the default is Python's manual, in bytes
parallel = dict(pipeline=dict(size=4, schedule="1f1b"), tensor=dict(mode="1d", size=8))
train = dict(steps=140_000, global_batch_size=1024, micro_batch_size=2, precision="bf16")
optimizer = dict(lr=1.2e-4, betas=(0.9, 0.95), weight_decay=0.1)
lr_scheduler = dict(kind="linear", warmup_steps=2000)
output = dict(log_every=10, eval_every=1000, checkpoint_every=1000)
