"""One process on a laptop: in about two minutes a small Llama learns English from Python's manual, byte by byte.

python launch.py --config configs/llama_tiny_laptop.py
"""

model = dict(name="llama-tiny", hidden_size=192, intermediate_size=512)  # 8 q heads, 4 k, v heads
data = dict(sequence_length=128)
train = dict(steps=400, global_batch_size=16, micro_batch_size=16)
optimizer = dict(lr=2e-3)
lr_scheduler = dict(warmup_steps=30)
output = dict(log_every=10, eval_every=100, checkpoint_every=200)
