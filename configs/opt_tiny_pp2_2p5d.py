"""The demo: eight processes train a small OPT on Python's manual, in a pipeline of 2 stages × 2.5d over 4 ranks.

python launch.py --nprocs 8 --config configs/opt_tiny_pp2_2p5d.py
"""

model = dict(name="opt-tiny")
data = dict(sequence_length=128)
parallel = dict(pipeline=2, tensor=dict(mode="2.5d", size=4, depth=1))
train = dict(steps=140, global_batch_size=16, micro_batch_size=8)
optimizer = dict(lr=2e-3)
output = dict(eval_every=40, checkpoint_every=70)
