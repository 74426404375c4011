"""Qwen3's architecture at width 2304: 2,084,281,600 parameters.

1,734,221,056 of them non-embedding.

    torchrun --standalone --nproc_per_node=2 train.py \
        config/full_qwen3_2.0b.py
"""

# architecture
arch_preset = 'qwen3'
n_layer = 28
n_head = 16               # of head_dim 128, the preset's: q is 2048 wide
n_embd = 2304
num_key_value_heads = 8
d_ff = 6912               # 3 x n_embd
block_size = 2048
vocab_size = 151936
rope_theta = 1_000_000
dropout = 0.0
bias = False
weight_tying = True       # untied it has 2.43 billion

# training: 4 x 32 x 2048 = 262,144 tokens an update,
# x 25,000 updates = 6.55 billion tokens
dataset = 'slimpajama_6b_qwen3'
batch_size = 4
gradient_accumulation_steps = 32
max_iters = 25000
learning_rate = 3e-4
weight_decay = 1e-1

# system
dtype = 'bfloat16'
compile = True
activation_memory_budget = 0.9  # the cheap activations again
use_zero1 = True
use_fsdp = False

# output
out_dir = 'out-qwen3-2.0b'
eval_interval = 1000
log_interval = 10
always_save_checkpoint = False
checkpoint_interval = 250  # a kill costs at most so many updates
