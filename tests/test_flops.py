"""FLOPs per token against a count of what really runs, and device peaks."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from model_builder import ConfigurableGPT
from model_config import PRESET_CONFIGS, get_preset_config
from training.flops import flops_per_token, matmul_weights, peak_tflops_of


def counted_flops_per_token(config, T, B=1, return_logits=True):
    """Matmul FLOPs of forward and backward, counted by PyTorch; the tensors
    are fake ones, so that nothing is computed or held."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = ConfigurableGPT(config)
        x = torch.zeros(B, T, dtype=torch.long)
        _, loss = model(x, x, return_logits=return_logits)
        loss.backward()
    total = counter.get_total_flops()
    assert total % (B * T) == 0
    return total // (B * T)


@pytest.mark.parametrize('weight_tying', [True, False])
@pytest.mark.parametrize('name', PRESET_CONFIGS)
def test_equals_what_runs(name, weight_tying):
    """Two layers of each preset at its full width, vocabulary and context:
    every matmul, to the unit."""
    config = get_preset_config(name, n_layer=2, weight_tying=weight_tying,
                               attention_backend='eager')
    full, causal = flops_per_token(config)
    assert full == counted_flops_per_token(config, config.block_size)
    # half of the scores are masked; the weights' part stays
    attention = (12 * config.n_layer * config.n_head * config.head_dim
                 * config.block_size)
    assert full - causal == attention // 2


@pytest.mark.parametrize('kw, T, return_logits', [
    (dict(), 48, True), (dict(), 48, False), (dict(), 16, True),
    (dict(num_key_value_heads=1), 48, True), (dict(head_dim=24), 48, True),
    (dict(position_encoding='learned_absolute'), 48, True),
    (dict(norm_position='post'), 48, True), (dict(bias=True), 48, True),
    (dict(ffn_type='standard', qk_norm=True), 16, False)])
def test_equals_what_runs_for_variants(kw, T, return_logits):
    config = get_preset_config('llama3', **dict(
        n_layer=3, n_head=4, n_embd=64, d_ff=160, block_size=48,
        vocab_size=300, attention_backend='eager') | kw)
    assert flops_per_token(config, T)[0] == counted_flops_per_token(
        config, T, B=2, return_logits=return_logits)
    assert flops_per_token(config) == flops_per_token(config, 48)


def test_by_hand():
    # GPT-2 124M: 12 x 768^2 weights a block, the head counts, wte and wpe
    # do not
    config = get_preset_config('gpt2')
    weights = 12 * 12 * 768**2 + 50304 * 768
    assert matmul_weights(config) == weights
    attention = 12 * 12 * 768 * 1024
    assert flops_per_token(config) == (
        6 * weights + attention, 6 * weights + attention // 2)
    # Qwen3: q is 2048 wide, k and v 1024, of a width of 1024
    config = get_preset_config('qwen3', block_size=2048)
    weights = 28 * (1024 * (2048 + 2 * 1024) + 2048 * 1024
                    + 3 * 1024 * 3072) + 151936 * 1024
    assert matmul_weights(config) == weights
    assert flops_per_token(config)[0] == (
        6 * weights + 12 * 28 * 16 * 128 * 2048)


@pytest.mark.parametrize('name, bf16, fp32', [
    ('NVIDIA RTX A6000', 154.8, 38.7),
    ('NVIDIA A100-SXM4-80GB', 312, 19.5),
    ('NVIDIA A100-SXM4-40GB', 312, 19.5),
    ('NVIDIA A100 80GB PCIe', 312, 19.5),
    ('NVIDIA A100-PCIE-40GB', 312, 19.5),
    ('NVIDIA H100 80GB HBM3', 989.4, 67),
    ('NVIDIA H100 PCIe', 756, 51),
    ('NVIDIA H100 NVL', 835, 60),
    ('NVIDIA H200', 989.4, 67),
    ('NVIDIA H200 NVL', 835, 60),
    ('NVIDIA B200', 2250, 75),
    ('NVIDIA L40S', 362, 91.6),
    ('NVIDIA L4', 121, 30.3),
    ('NVIDIA GeForce RTX 4090', 165.2, 82.6),
    ('NVIDIA GeForce RTX 3090', 71, 35.6),
    # other devices, whose names resemble those
    ('NVIDIA GH200 480GB', None, None),
    ('NVIDIA GB200', 2500, 80),
    ('NVIDIA H20', 148, 44),
    ('NVIDIA H800', None, None),
    ('NVIDIA A10', None, None),
    ('NVIDIA A10G', None, None),
    ('NVIDIA A40', None, None),
    ('NVIDIA L40', None, None),
    ('NVIDIA RTX A1000', None, None),
    ('NVIDIA RTX A4000', None, None),
    ('NVIDIA RTX 6000 Ada Generation', None, None),
    ('Quadro RTX 6000', None, None),
    ('Tesla V100-SXM2-16GB', None, 15.7),
    ('Tesla T4', None, 8.1),
    ('NVIDIA GeForce RTX 4080', None, None),
    ('AMD Instinct MI300X', 1307.4, 163.4),
    ('NVIDIA GeForce RTX 5090', 209.5, 104.8),
    ('NVIDIA RTX A5000', 111.1, 27.8),
    ('NVIDIA B100', 1750, 60),
    ('NVIDIA GB300', 2500, 80),
    ('NVIDIA B300', 2250, 75),
    ('cpu (2 threads)', None, None),
    ('mps (8 threads)', None, None),
    ('', None, None),
    # slower or faster chips, or a part of one, behind a known name
    ('NVIDIA GeForce RTX 4090 Laptop GPU', None, None),
    ('NVIDIA GeForce RTX 4090 D', None, None),
    ('NVIDIA GeForce RTX 3090 Ti', None, None),
    ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', None, None),
    ('NVIDIA H100 80GB HBM3 MIG 3g.40gb', None, None),
])
def test_peak(name, bf16, fp32):
    assert peak_tflops_of(name, 'bfloat16') == bf16
    assert peak_tflops_of(name, 'float32') == fp32
