"""One process on a laptop: in a few minutes a small OPT learns English from Python's manual, byte by byte.

python launch.py --config configs/opt_tiny_laptop.py
"""

model = dict(name="opt-tiny", hidden_size=192, ffn_dim=768, dropout=0.1)
data = dict(sequence_length=128)
train = dict(steps=600, global_batch_size=16, micro_batch_size=16)
optimizer = dict(lr=2e-3)
lr_scheduler = dict(warmup_steps=30)
output = dict(log_every=10, eval_every=100, checkpoint_every=200)
