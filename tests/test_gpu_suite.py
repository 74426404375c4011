"""The GPU suite and bench.py, on a CPU with tiny models.

Run as on a machine that has torch and transformers and little else: what must
not be needed cannot be imported.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from running import ROOT

from benchmarks import gpu_suite

ABSENT = ('datasets', 'wandb', 'flash_attn', 'gigatoken', 'msgspec', 'pyarrow',
          'psutil')
BLOCK = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split('.')[0] not in {ABSENT}:
            return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    """An environment in which ABSENT cannot be imported."""
    folder = tmp_path_factory.mktemp('bare')
    (folder / 'sitecustomize.py').write_text(BLOCK)
    env = os.environ | {'PYTHONPATH': str(folder), 'OMP_NUM_THREADS': '1',
                        'PYTHON': sys.executable}
    tried = subprocess.run([sys.executable, '-c', 'import psutil'], env=env,
                           capture_output=True, text=True)
    assert 'ModuleNotFoundError' in tried.stderr
    return env


@pytest.fixture(scope='module')
def smoke(bare, tmp_path_factory):
    """(numbers of each part, the entry's file, seconds) of a whole run."""
    folder = tmp_path_factory.mktemp('suite')
    out = folder / 'RESULTS.md'
    out.write_text('# Results\n\nHead.\n\n## 2026-01-01: older\n\nOld.\n')
    begin = os.times().children_user
    done = subprocess.run(
        ['bash', ROOT / 'benchmarks' / 'gpu_suite.sh', '--smoke', '--out', out,
         '--json', folder / 'all.json'],
        env=bare, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    seconds = os.times().children_user - begin
    return json.loads((folder / 'all.json').read_text()), out, seconds


@pytest.mark.slow
def test_every_part_has_numbers(smoke):
    found, _, processor_s = smoke
    assert processor_s < 60
    assert set(found) == set(gpu_suite.PARTS)
    assert not any(part['problems'] for part in found.values())
    numbers = {name: part['numbers'] for name, part in found.items()}
    assert set(numbers['parity']) == {'gpt2', 'llama2', 'llama3', 'qwen3'}
    for errors in numbers['parity'].values():
        assert 0 < errors['fp32'] < 1e-5 < errors['bf16'] < 1e-2
    assert numbers['attention']['sdpa']['ms'] > 0
    assert numbers['training']['val_after'] < 4 < numbers['training'][
        'val_before']
    assert numbers['strategies']['FSDP2, float32'] < 1e-5
    fits, does_not = numbers['sweep']
    assert fits['tokens_per_s'] > 0 and fits['planned_gb'] > 0
    assert does_not['error'] == 'out of memory'


@pytest.mark.slow
def test_parts_of_the_time(smoke):
    """The shares of bench.py add up, and each part of a step takes time."""
    split = smoke[0]['sweep']['numbers'][0]['split']
    assert sum(split.values()) == pytest.approx(1)
    assert min(split[part] for part in ('forward', 'backward', 'optimizer',
                                        'loader')) > 0


@pytest.mark.slow
def test_the_entry_is_the_newest(smoke):
    _, out, _ = smoke
    head, new, old = out.read_text().split('\n## ')
    assert head == '# Results\n\nHead.\n'
    assert old == '2026-01-01: older\n\nOld.\n'
    assert 'torch ' in new and 'commit ' in new
    for title in gpu_suite.TITLES.values():
        assert f'### {title}\n' in new
    assert '| out of memory |' in new
    assert os.listdir(out.parent).count('RESULTS.md') == 1
    assert not (out.parent / '.RESULTS.md.part').exists()


def test_a_wrong_model_is_called_out(monkeypatch):
    """Another epsilon in the norms, which no shape or count tells."""
    import model_components
    plain = model_components.F.rms_norm
    monkeypatch.setattr(
        model_components.F, 'rms_norm',
        lambda x, shape, weight, eps: plain(x, shape, weight, eps + 1e-2))
    _, problems, _ = gpu_suite.parity(smoke=True)
    assert any('llama2: fp32' in problem for problem in problems)
    assert not any('gpt2' in problem for problem in problems)


def test_a_wrong_attention_is_called_out(monkeypatch):
    import model_components
    sdpa = model_components.sdpa_attention
    monkeypatch.setitem(model_components.ATTENTION_BACKENDS, 'sdpa',
                        lambda q, k, v, *rest: sdpa(1.01 * q, k, v, *rest))
    _, problems, _ = gpu_suite.attention(smoke=True)
    assert any(p.startswith('attention sdpa is off') for p in problems)


@pytest.mark.parametrize('problems, status', [([], 0), (['wrong'], 1)])
def test_the_status_tells(monkeypatch, tmp_path, problems, status):
    monkeypatch.setattr(gpu_suite, 'run_part', lambda name, smoke, limit: (
        ['| a |'], problems if name == 'strategies' else [], {}))
    out = tmp_path / 'entry.md'
    assert gpu_suite.main(['--smoke', '--parts', 'parity', 'strategies',
                           '--out', str(out)]) == status
    assert ('- wrong: wrong' in out.read_text()) == bool(status)


def test_no_time_left(capsys):
    found = gpu_suite.run_parts(['parity', 'sweep'], True, time.monotonic())
    assert all(lines == ['left out: no time'] for lines, _, _ in
               found.values())


def test_a_part_that_hangs_is_stopped():
    begin = time.monotonic()
    status, _ = gpu_suite.run_limited(
        [sys.executable, '-c', 'import time; time.sleep(60)'], 1)
    assert status is None and time.monotonic() - begin < 30


def test_without_a_gpu_it_says_what_to_do(capsys):
    if torch.cuda.is_available():
        pytest.skip('this machine has a GPU')
    with pytest.raises(SystemExit) as end:
        gpu_suite.main([])
    assert end.value.code == 2 and '--smoke' in capsys.readouterr().err


def test_bench_refuses_what_train_would(capsys):
    from benchmarks.bench import measure
    with pytest.raises(ValueError, match='n_layers'):
        measure(['--n_layers=2', '--vocab_size=64'])
    with pytest.raises(ValueError, match='at least 1'):
        measure(['--vocab_size=64'], updates=0)
