"""The demo: eight processes train a small OPT on Python's manual, in a pipeline of 2 stages × 2.5d over 4 ranks.

python launch.py --nprocs 8 --config configs/opt_tiny_pp2_2p5d.py

What it generates reads like words after 250 steps, because a token is a word or a part of one, and because weights
drawn with a larger deviation than OPT's 0.02 learn sooner at this width.
"""

model = dict(
    name="opt-tiny",
    vocab_size=4096,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    init_std=0.08,
)
data = dict(tokenizer="bpe", sequence_length=128)
parallel = dict(pipeline=dict(size=2, layers=(1, 1)), tensor=dict(mode="2.5d", size=4, depth=1))
train = dict(steps=250, global_batch_size=16, micro_batch_size=8)
optimizer = dict(lr=8e-3)
lr_scheduler = dict(kind="linear", warmup_steps=20, min_ratio=0.02)
output = dict(eval_every=50, checkpoint_every=125)
