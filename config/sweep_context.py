"""Contexts of 2K to 16K tokens, at 16,384 tokens an update each.

More context helps where documents are long and the model can use it, and costs
FLOPs of attention: read it by FLOPs as well. Hours on a CPU, minutes on a GPU.

    python sweep.py config/sweep_context.py
"""

base = 'config/quickstart.py'
arch_preset = 'qwen3'
# together: one does not go without the other
grid = {'block_size,batch_size': [[2048, 8], [4096, 4], [8192, 2], [16384, 1]]}
gradient_accumulation_steps = 1
max_tokens = 4_000_000
warmup_iters = 24         # 10 %
eval_interval = 40
tune = {'learning_rate': [1.5e-3, 3e-3, 6e-3]}
tune_iters = 60
