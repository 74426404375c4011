"""Two million tokens for 0.8 million non-embedding parameters, on a CPU.

8 x 128 tokens x 1,954 updates = 2.0 million tokens, 0.63 of an epoch of
Python's standard library. What config/study_presets.py and study_walk.py
share.

    python train.py config/study.py --arch_preset=qwen3 --d_ff=500
"""

# architecture
n_layer = 2               # wide and shallow: large matmuls suit a CPU
n_head = 4
n_embd = 192
head_dim = 48
block_size = 128

# training
dataset = 'python_stdlib'
batch_size = 8
max_iters = 1954
min_lr = 0.0
warmup_iters = 195        # 10 %

# output
out_dir = 'out-study'
eval_interval = 200
eval_bytes = 150_000
log_interval = 20
keep_checkpoints = 1

# system
dtype = 'float32'         # many CPUs have no bf16 arithmetic
compile = False           # takes longer than it saves in a run this short
