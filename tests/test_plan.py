"""plan.py and train.py --dry_run: what is printed, and what is refused."""

import re
import sys

import pytest
from running import TINY

import plan as plan_script
from model_config import get_preset_config
from training.flops import flops_per_token

GPT2 = ['--arch_preset=gpt2', '--vocab_size=50304', '--dataset=./nowhere',
        '--dtype=bfloat16', '--compile=False', '--max_iters=1000',
        '--gradient_accumulation_steps=4']


@pytest.fixture
def plan(monkeypatch, capsys):
    def plan(*arguments, status=0):
        monkeypatch.setattr(sys, 'argv', ['plan.py', *arguments])
        if status == 0:
            plan_script.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as end:
            plan_script.main()
        assert end.value.code == status
        return capsys.readouterr().err
    return plan


def own_row(output):
    """(total in GB, whether it fits, the largest batch) as configured."""
    row, = re.findall(r'^\*.* ([\d.]+)(!?) +(\d+)$', output, re.MULTILINE)
    return float(row[0]), not row[1], int(row[2])


def test_a_plan(plan):
    """The largest batch fits, and one more does not."""
    given = [*GPT2, '--gpu=a6000', '--n_gpus=2', '--mfu=0.5']
    output = plan(*given, '--batch_size=500')
    # 124,439,808 are published, for 47 rows less
    assert '124,475,904 (' in output
    assert '500 x 1024 tokens x 2 micro-steps x 2 processes' in output
    assert '2 x RTX A6000, 51 GB, 154.8 TFLOP/s bfloat16' in output
    per_token, _ = flops_per_token(get_preset_config('gpt2'))
    rate = 0.5 * 2 * 154.8e12 / per_token
    assert f'{rate:,.0f} tokens/s at 50% MFU: ' in output
    hours = 500 * 1024 * 4 * 1000 / rate / 3600
    assert f': {hours:,.1f} hours, {2 * hours:,.0f} of one device' in output
    assert re.findall(r'^[* ](\w+) +none ', output, re.MULTILINE) == [
        'ddp', 'zero1', 'fsdp']
    total, fits, largest = own_row(output)
    assert total > 51 and not fits and 1 < largest < 500
    for batch in largest, largest + 1:
        total, fits, same = own_row(plan(*given, f'--batch_size={batch}'))
        assert fits == (total <= 51.0) == (batch == largest)
        assert same == largest


@pytest.mark.parametrize('given, says', [
    (['--n_gpus=0'], ['n_gpus=0']),
    (['--mfu=0'], ['mfu=0.0']),
    (['--mfu=1.1'], ['mfu=1.1']),
    (['--n_lyer=3', '--dtype=int4', '--seed=x'],
     ['3 problem(s)', 'n_layer', 'int4', 'bfloat16', '--seed=x']),
    (['--n_gpus=3'], ['gradient_accumulation_steps=4', '3']),
], ids=['no GPU', 'MFU 0', 'MFU above 1', 'options', 'indivisible batch'])
def test_refused(plan, given, says):
    error = plan(*GPT2, *given, status=2)
    assert error.count('error:') == 1
    assert [part for part in says if part not in error] == [], error


def test_dry_run(warm, data, tmp_path):
    """The plan on this device, of the dataset that is there; nothing more."""
    result = warm.run('train.py', cwd=tmp_path, dry_run=True, **TINY | {
        'dataset': data / 'small', 'max_iters': 10})
    assert result.returncode == 0, result.stderr
    # two embeddings, a layer of 12 x 16 x 16 and its biases, three norms
    total = (384 + 16) * 16 + 12 * 16**2 + (3 + 1 + 4 + 1) * 16 + 3 * 2 * 16
    for part in (f'{total:,} (', '1 x cpu', '4 x 16 tokens x 1 micro-steps',
                 '10 updates = 640 tokens', '*single'):
        assert part in result.stdout
    assert list(tmp_path.iterdir()) == []
