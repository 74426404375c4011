"""GPT-2's architecture at width 2304: 1,267,322,112 parameters.

1,146,703,104 of them non-embedding.

    torchrun --standalone --nproc_per_node=2 train.py \
        config/full_gpt2_1.36b.py
"""

# architecture
arch_preset = 'gpt2'
n_layer = 18
n_head = 18
n_embd = 2304
d_ff = 9216               # 4 x n_embd
block_size = 2048
vocab_size = 50304        # 50,257 ids, padded to a multiple of 64
dropout = 0.0
bias = False              # as the models that it is compared with

# training: 6 x 32 x 2048 = 393,216 tokens an update,
# x 25,000 updates = 9.83 billion tokens
dataset = 'slimpajama_6b_gpt2'
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
out_dir = 'out-gpt2-1.36b'
eval_interval = 1000
log_interval = 10
always_save_checkpoint = False
checkpoint_interval = 250  # a kill costs at most so many updates
