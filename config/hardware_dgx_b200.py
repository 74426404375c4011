"""For a DGX B200, 8 GPUs of 180 GB: after the file of a run. The same global
batch, in one micro-step of each GPU; nothing is computed twice.

    torchrun --standalone --nproc_per_node=8 train.py \
        config/full_qwen3_1.5b.py config/hardware_dgx_b200.py
"""

batch_size = batch_size * gradient_accumulation_steps // 8  # noqa: F821
gradient_accumulation_steps = 8

activation_checkpointing = 'none'
activation_memory_budget = 1.0
compile = True
use_zero1 = True
use_fsdp = False
checkpoint_interval = 1000  # 3 to 11 minutes
