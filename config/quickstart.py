"""Small models on Python's own standard library: two CPU cores, a minute each.

2 x 4 x 128 tokens x 900 updates = 921,600 tokens, 0.29 of an epoch. `make
quickstart` trains all four presets, each with a `d_ff` that makes it 1.17
million parameters large.

    python train.py config/quickstart.py --arch_preset=qwen3 --d_ff=480
"""

# architecture
arch_preset = 'llama3'
n_layer = 2               # wide and shallow: large matmuls suit a CPU
n_head = 4
n_embd = 192
head_dim = 48
block_size = 128
weight_tying = True       # equal parameters, whatever the preset's default

# training
dataset = 'python_stdlib'
batch_size = 4
gradient_accumulation_steps = 2    # so that it also runs on two processes
max_iters = 900
learning_rate = 3e-3
min_lr = 0.0
warmup_iters = 100        # 10 %; what 2 % did: RESULTS.md, "Quickstart"

# output
out_dir = 'out-quickstart'
eval_interval = 150
eval_bytes = 150_000
log_interval = 50

# system
dtype = 'float32'         # many CPUs have no bf16 arithmetic
compile = False           # takes longer than it saves in a run this short
