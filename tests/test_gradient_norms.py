"""Gradient norms by groups of layers, in the log and under every strategy."""

import math

import pytest
from running import TINY, newest, read_lines

from training.layer_groups import layer_group

OPTIONS = TINY | {
    'arch_preset': 'qwen3', 'n_layer': 2, 'n_embd': 32, 'n_head': 4,
    'num_key_value_heads': 2, 'head_dim': 8, 'max_iters': 6, 'batch_size': 2,
    'gradient_accumulation_steps': 2, 'learning_rate': 1e-2,
    'gradient_log_interval': 3}


def norms_of(out_dir):
    """{step: {group: norm}} of a run, and {step: the whole norm}."""
    lines = read_lines(newest(out_dir))
    groups = {line['step']: {k: v for k, v in line.items() if k not in
                             ('kind', 'step', 'unix_s')}
              for line in lines if line['kind'] == 'gradients'}
    whole = {line['step']: line['grad_norm'] for line in lines
             if line['kind'] == 'train'}
    return groups, whole


def test_they_make_up_the_whole(tmp_path, warm, data):
    """At the interval only; before clipping, as the whole norm is."""
    result = warm.run('train.py', cwd=tmp_path, out_dir='out', grad_clip=0.01,
                      dataset=data / 'small', **OPTIONS)
    assert result.returncode == 0, result.stderr
    groups, whole = norms_of(tmp_path / 'out')
    assert sorted(groups) == [3, 6]
    for step, norms in groups.items():
        assert set(norms) == {'embedding', 'head', 'norms.final'} | {
            f'{part}.{block}' for part in ('attention', 'ffn', 'norms')
            for block in (0, 1)}
        assert all(norm > 0 for norm in norms.values())
        assert math.sqrt(sum(n * n for n in norms.values())) == pytest.approx(
            whole[step], rel=1e-6)
        assert whole[step] > 0.1  # and so was clipped


def test_deep_models_are_told_apart_by_thirds():
    names = [layer_group(f'h.{i}.ffn.up.weight', 28) for i in range(28)]
    assert [names.count(f'ffn.{third}')
            for third in ('early', 'middle', 'late')] == [10, 9, 9]
    assert names == sorted(names, key=['ffn.early', 'ffn.middle',
                                       'ffn.late'].index)
    assert layer_group('h.3.attn.q_norm.weight', 6) == 'norms.3'
    assert layer_group('h.3.attn_norm.weight', 6) == 'norms.3'
    assert layer_group('wpe.weight', 6) == 'positions'


@pytest.mark.slow
def test_equal_under_every_strategy(tmp_path, warm_ranks, data):
    options = OPTIONS | {'dataset': data / 'small'}
    strategies = {'one': (1, {}), 'ddp': (2, {}),
                  'zero1': (2, {'use_zero1': True}),
                  'fsdp': (2, {'use_fsdp': True})}
    found = {}
    for name, (ranks, more) in strategies.items():
        result = warm_ranks.run(ranks, 'train.py', out_dir=tmp_path / name,
                                **options, **more)
        assert result.statuses == [0] * ranks, result.err
        found[name] = norms_of(tmp_path / name)[0]
    for name in strategies:
        for step, norms in found['one'].items():
            assert found[name][step] == pytest.approx(norms, rel=1e-5), name
