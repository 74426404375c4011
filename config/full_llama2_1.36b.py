"""LLaMA 2's architecture at width 2304: 1,294,159,104 parameters.

1,146,703,104 of them non-embedding.

    torchrun --standalone --nproc_per_node=2 train.py \
        config/full_llama2_1.36b.py
"""

# architecture
arch_preset = 'llama2'
n_layer = 18
n_head = 18
n_embd = 2304
num_key_value_heads = 18
d_ff = 6144               # 8/3 x n_embd
block_size = 2048
vocab_size = 32000
rope_theta = 10_000
dropout = 0.0
bias = False

# training: 6 x 32 x 2048 = 393,216 tokens an update,
# x 25,000 updates = 9.83 billion tokens
dataset = 'slimpajama_6b_llama2'
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
out_dir = 'out-llama2-1.36b'
eval_interval = 1000
log_interval = 10
always_save_checkpoint = False
checkpoint_interval = 250  # a kill costs at most so many updates
