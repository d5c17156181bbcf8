"""Eight GPUs for long sequences: each sample of 16,384 tokens split over a ring of four, two replicas with ZeRO 2.

torchrun --nproc-per-node 8 launch.py --config configs/opt_1p3b_ring.py
"""

model = dict(name="opt-1.3b", max_position_embeddings=16384)
data = dict(sequence_length=16384)  # set path and tokenizer to your text; the default is Python's manual, in bytes
parallel = dict(context=dict(size=4, kind="ring"))
zero = dict(stage=2)
train = dict(steps=20_000, global_batch_size=32, micro_batch_size=1, precision="bf16", activation_checkpointing="full")
optimizer = dict(lr=2e-4)
lr_scheduler = dict(kind="linear", warmup_steps=500)
output = dict(log_every=10, eval_every=1000, checkpoint_every=1000)
