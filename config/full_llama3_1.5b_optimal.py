"""Llama 3's architecture at width 2048: 1,544,628,224 parameters.

1,019,291,648 of them non-embedding.

    torchrun --standalone --nproc_per_node=2 train.py \
        config/full_llama3_1.5b_optimal.py
"""

# architecture
arch_preset = 'llama3'
n_layer = 18
n_head = 16
n_embd = 2048
num_key_value_heads = 8   # 2:1, where the 8B has 4:1
d_ff = 7168               # 3.5 x n_embd
block_size = 2048
vocab_size = 128256
rope_theta = 500_000
dropout = 0.0
bias = False

# training: 6 x 32 x 2048 = 393,216 tokens an update,
# x 25,000 updates = 9.83 billion tokens
dataset = 'slimpajama_6b_llama3'
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
out_dir = 'out-llama3-1.5b'
eval_interval = 1000
log_interval = 10
always_save_checkpoint = False
checkpoint_interval = 250  # a kill costs at most so many updates
