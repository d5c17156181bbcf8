"""Eight processes train a small OPT in fp64 and with dropout: the README compares them with a single process.

python launch.py --nprocs 8 --config configs/opt_tiny_equal.py
"""

model = dict(name="opt-tiny", dropout=0.1)
data = dict(sequence_length=128, validation_fraction=0)
parallel = dict(pipeline=2, tensor=dict(mode="2.5d", size=4, depth=1))
train = dict(steps=3, global_batch_size=16, micro_batch_size=8, precision="fp64")
optimizer = dict(lr=2e-3)
output = dict(export=False)
