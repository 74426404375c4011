"""The memory plan against processes that train, and against arithmetic."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model_config import get_preset_config
from training.flops import GPUS
from training.memory import Setting, block_memory, memory_plan
from training.planning import largest_batch, total_gb

STEP = Path(__file__).parent / 'step_memory.py'
SMALL = dict(n_layer=6, n_embd=256, n_head=4, d_ff=768, vocab_size=4096,
             block_size=256, weight_tying=True)
QWEN3 = SMALL | dict(name='qwen3', num_key_value_heads=2, head_dim=64)
LARGE_VOCABULARY = QWEN3 | dict(n_layer=2, vocab_size=60000)
slow = pytest.mark.slow


@pytest.mark.parametrize('architecture, setting', [
    (QWEN3, dict(compile=False)),
    pytest.param(QWEN3, dict(compile=False,
                             activation_checkpointing='full'), marks=slow),
    pytest.param(SMALL | dict(name='gpt2'), dict(compile=False), marks=slow),
    pytest.param(SMALL | dict(name='gpt2'), {}, marks=slow),
    pytest.param(QWEN3, dict(accumulation=2), marks=slow),
    pytest.param(QWEN3, dict(activation_memory_budget=0.5), marks=slow),
    pytest.param(LARGE_VOCABULARY, dict(batch_size=4, accumulation=2),
                 marks=slow)])
def test_a_process_takes_what_was_planned(architecture, setting):
    """Peak resident memory of a step on a CPU, to 10 %."""
    output = subprocess.run(
        [sys.executable, STEP, json.dumps(architecture),
         json.dumps(dict(batch_size=8) | setting)],
        check=True, capture_output=True, text=True, timeout=300).stdout
    found = json.loads(output)
    state = found['weights'] + found['optimizer']
    assert state + found['planned'] == pytest.approx(
        state + found['measured'], rel=0.1)
    # what was measured is no small part of it
    assert found['measured'] > 0.5 * state


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_the_peak_is_of_this_process():
    """And not of the one that started it, as ru_maxrss is."""
    here = np.ones(10**8)  # 0.8 GB, while the other starts
    output = subprocess.run(
        [sys.executable, '-c', 'import torch, training.device as device\n'
         'print(device.peak_memory_gb(torch.device("cpu")))'],
        cwd=STEP.parent.parent, check=True, capture_output=True, text=True,
        timeout=60).stdout
    assert 0.05 < float(output) < here.nbytes / 1e9


def test_by_hand():
    """Qwen3 1.7B in two processes: what every rank holds, to the byte."""
    config = get_preset_config('qwen3', n_embd=2048, d_ff=6144,
                               block_size=2048, weight_tying=True)
    P = 1_720_574_976
    setting = Setting(batch_size=6, accumulation=16, world_size=2,
                      activation_checkpointing='full')
    for strategy, weights, optimizer in (
            ('ddp', 4, 8), ('zero1', 4, 4), ('fsdp', 2, 4)):
        plan = memory_plan(config, dataclasses.replace(
            setting, strategy=strategy))
        assert plan['weights'] == weights * P
        assert plan['optimizer'] == optimizer * P
        assert plan['gradients'] == 4 * P  # FSDP sums them at the end only
    # one residual stream in bf16 a layer, the final norm's two, the tokens
    N = 6 * 2048
    assert plan['activations'] == (28 + 2) * N * 2048 * 2 + 3 * 8 * N


def test_what_a_block_keeps():
    """Compiled less than not, at full width less again on a budget; the
    copies of the weights in bf16 are 2 bytes each."""
    config = get_preset_config('llama3', n_layer=1, n_embd=256, n_head=4,
                               d_ff=768, vocab_size=64, block_size=128)
    eager, copies = block_memory(config, 'bfloat16', False)
    compiled, same = block_memory(config, 'bfloat16', True)
    assert compiled < 0.9 * eager
    wide = get_preset_config('qwen3', n_layer=1, block_size=2048)
    full, budget = (block_memory(wide, 'bfloat16', True, share)[0]
                    for share in (1.0, 0.9))
    assert budget < 0.9 * full
    weights = (256 * (256 + 2 * 64) + 256 * 256 + 3 * 256 * 768)
    assert copies == same == 2 * weights
    assert block_memory(config, 'float32', True)[1] == 0


@pytest.mark.parametrize('name', [
    'qwen3_0.6b', 'qwen3_1.5b', 'qwen3_2.0b', 'gpt2_1.36b', 'llama2_1.36b',
    'llama3_1.5b_optimal'])
def test_every_configuration_fits(name):
    """Two RTX A6000 as it stands; with compile=False too, as it is tried."""
    from plan import planned_setting
    gpu = {gpu.key: gpu for gpu in GPUS}
    for extra in [], ['--compile=False']:
        config, _, setting = planned_setting(
            [f'config/full_{name}.py', *extra], 2)
        assert total_gb(config, setting) < gpu['a6000'].memory_gb
        batch = largest_batch(config, setting, gpu['a6000'].memory_gb)
        assert batch >= setting.batch_size
        assert total_gb(config, dataclasses.replace(
            setting, batch_size=batch)) <= gpu['a6000'].memory_gb
        assert total_gb(config, dataclasses.replace(
            setting, batch_size=batch + 1)) > gpu['a6000'].memory_gb
    was = setting.batch_size * setting.accumulation * 2
    config, _, setting = planned_setting(
        [f'config/full_{name}.py', 'config/hardware_dgx_b200.py'], 8)
    assert setting.batch_size * setting.accumulation * 8 == was
    assert setting.activation_memory_budget == 1.0
    assert total_gb(config, setting) < gpu['b200'].memory_gb


def test_a_configuration_with_scaled_positions():
    """Its fields hold a dict, which has no hash."""
    scaling = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
               'high_freq_factor': 4.0,
               'original_max_position_embeddings': 64}
    sizes = dict(n_layer=1, n_embd=64, n_head=4, d_ff=128, vocab_size=64,
                 block_size=128)
    plain, scaled = (memory_plan(get_preset_config('llama3', **sizes, **kw),
                                 Setting(batch_size=2, compile=False))
                     for kw in ({}, {'rope_scaling': scaling}))
    assert plain == scaled


def test_one_process_does_not_fit_what_two_share():
    """The plan must be able to say no."""
    from plan import planned_setting
    config, _, setting = planned_setting(
        ['config/full_qwen3_1.5b.py', '--batch_size=12'], 1)
    assert total_gb(config, setting) > 51
