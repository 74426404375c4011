"""Qwen3's architecture, as wide as the 1.7B: 1,720,574,976 parameters.

1,409,410,048 of them non-embedding.

    torchrun --standalone --nproc_per_node=2 train.py \
        config/full_qwen3_1.5b.py
"""

# architecture
arch_preset = 'qwen3'
n_layer = 28
n_head = 16
n_embd = 2048             # twice the 0.6B
num_key_value_heads = 8
d_ff = 6144               # 3 x n_embd
block_size = 2048
vocab_size = 151936
rope_theta = 1_000_000
dropout = 0.0
bias = False
weight_tying = True       # as the official 1.7B; untied it has 2.03 billion

# training: 6 x 32 x 2048 = 393,216 tokens an update,
# x 25,000 updates = 9.83 billion tokens
dataset = 'slimpajama_6b_qwen3'
batch_size = 6
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
out_dir = 'out-qwen3-1.5b'
eval_interval = 1000
log_interval = 10
always_save_checkpoint = False
checkpoint_interval = 250  # a kill costs at most so many updates
