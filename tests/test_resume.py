"""A run that was stopped or killed goes on as if it never had been."""

import copy
import hashlib
import random
import shutil
import signal

import pytest
import torch
from running import (
    TINY,
    assert_same_course,
    course,
    finish,
    newest,
    read_json,
    read_lines,
    run,
    runs,
    snapshot,
    start,
    train,
    wait_for,
    wait_for_step,
    weights,
)
from safetensors.torch import load

from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from training.data_loader import sample_window
from training.dataset import open_dataset
from training.run_log import read_record


def stop(process, out_dir, step, *signals):
    """Send `signals` at the update `step`; the step of the end record."""
    wait_for_step(process, out_dir, step)
    for number in signals:
        process.send_signal(number)
    result = finish(process)
    assert result.returncode == 128 + signals[0], result.stderr
    assert 'Traceback' not in result.stderr
    end = read_lines(newest(out_dir))[-1]
    assert (end['kind'], end['status']) == ('end', 'stopped'), step
    return end['step']


def assert_intact(checkpoint):
    """Every file has the size and the hash that state.json records."""
    for name, due in read_json(checkpoint / 'state.json')['files'].items():
        content = (checkpoint / name).read_bytes()
        assert len(content) == due['bytes']
        assert hashlib.sha256(content).hexdigest() == due['sha256']


@pytest.mark.slow
def test_stopped_twice_and_resumed(tmp_path, small, gpt2_run):
    """SIGTERM, then Ctrl-C in a later epoch, with dropout."""
    first, second = random.randrange(1, 60), random.randrange(120, 160)
    process = start('train.py', out_dir=tmp_path, **small)
    first = stop(process, tmp_path, first, signal.SIGTERM)
    process = start('train.py', init_from='resume', out_dir=tmp_path)
    second = stop(process, tmp_path, second, signal.SIGINT)
    assert 0 < first < second < 190
    assert set(course(newest(tmp_path))) == {
        at for at in course(gpt2_run) if at[1] <= second}

    # the run folder does for --out_dir as well
    folder = newest(tmp_path)
    result = run('train.py', init_from='resume', out_dir=folder)
    assert result.returncode == 0, result.stderr
    assert runs(tmp_path) == [folder]
    assert_same_course(course(folder), course(gpt2_run))
    assert weights(folder) == weights(gpt2_run)
    lines = read_lines(folder)
    assert [(r['kind'], r['step']) for r in lines
            if r['kind'] in ('resume', 'end')] == [
        ('end', first), ('resume', first), ('end', second),
        ('resume', second), ('end', 190)]
    tokens = open_dataset(small['dataset']).split('train').tokens
    assert first * 64 < tokens < second * 64  # so an epoch's end was crossed


def test_stopped_before_the_first_update(tmp_path, small_qwen, qwen_run):
    process = start('train.py', out_dir=tmp_path, **small_qwen)
    wait_for(lambda: (tmp_path / 'latest' / 'run.json').exists(), process)
    process.send_signal(signal.SIGINT)
    assert finish(process).returncode == 128 + signal.SIGINT
    assert 0 <= read_lines(newest(tmp_path))[-1]['step'] < 30
    result = run('train.py', init_from='resume', out_dir=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_course(course(newest(tmp_path)), course(qwen_run))
    assert weights(newest(tmp_path)) == weights(qwen_run)


@pytest.mark.parametrize('step', [3, 6], ids=['middle', 'end'])
def test_stopped_in_an_evaluation(tmp_path, data, step):
    """It is made before the end or after the resume, but made; only a run
    that lacks nothing is called finished."""
    process = start('train.py', out_dir=tmp_path, **TINY | {
        'dataset': data / 'small', 'max_iters': 6, 'eval_interval': 3,
        'n_layer': 4, 'batch_size': 1, 'eval_bytes': 10**6})
    wait_for_step(process, tmp_path, step)
    process.send_signal(signal.SIGTERM)
    status = finish(process).returncode
    ended = ('eval', 6) in course(newest(tmp_path))
    assert status == (0 if ended else 128 + signal.SIGTERM)
    folder = train(tmp_path, init_from='resume')
    assert [i for kind, i in course(folder) if kind == 'eval'] == [0, 3, 6]
    assert read_lines(folder)[-1]['status'] == 'finished'
    assert weights(folder) == weights(folder, 6)


@pytest.fixture(scope='module')
def killed(tmp_path_factory, small_qwen):
    """An out_dir after one command, ended twice and started three times.

    SIGKILL, then the two Ctrl-C of an impatient user. With a checkpoint every
    second update, this often happens while one is being written.
    """
    out_dir = tmp_path_factory.mktemp('killed')
    options = small_qwen | {
        'out_dir': out_dir, 'init_from': 'auto', 'checkpoint_interval': 2,
        'keep_checkpoints': 1000}
    for step, signals in (
        (random.randrange(4, 40), [signal.SIGKILL]),
        (random.randrange(75, 105), [signal.SIGINT, signal.SIGINT]),
    ):
        process = start('train.py', **options)
        wait_for_step(process, out_dir, step)
        for number in signals:
            process.send_signal(number)
        assert finish(process).returncode in (-signals[0], 128 + signals[0])
        assert_intact(newest(out_dir) / 'checkpoints' / 'latest')
    result = run('train.py', **options)
    assert result.returncode == 0, result.stderr
    return out_dir


def test_killed_and_resumed(killed, qwen_run):
    assert len(runs(killed)) == 1
    folder = newest(killed)
    end = read_lines(folder)[-1]
    assert (end['kind'], end['step'], end['status']) == (
        'end', 120, 'finished')
    assert sum(r['kind'] == 'resume' for r in read_lines(folder)) == 2
    assert_same_course(course(folder), course(qwen_run))
    assert weights(folder) == weights(qwen_run)
    names = {path.name for path in (folder / 'checkpoints').glob('*')}
    assert names == {'latest', *(f'step_{i:08d}' for i in range(2, 121, 2))}


def test_losses_are_those_of_the_windows_in_order(killed, small_qwen):
    """Each next loss, computed anew from a checkpoint, across epochs."""
    folder, split = newest(killed), open_dataset(
        small_qwen['dataset']).split('train')
    config = read_json(folder / 'run.json')['architecture']
    model = ConfigurableGPT(ModelArchitectureConfig.from_dict(config)).eval()
    n_windows = (split.tokens - 1) // 16
    losses = course(folder)
    worst = 0.0
    for step in range(2, 119, 2):
        model.load_state_dict(load(weights(folder, step)), strict=False)
        samples = torch.arange(4 * step, 4 * step + 4).numpy()
        rows = torch.tensor([
            split.read(int(w) * 16, 17).tolist()
            for w in sample_window(samples, n_windows, seed=1337)])
        with torch.no_grad():
            loss = model(rows[:, :-1], rows[:, 1:], return_logits=False)[1]
        logged = losses['train', step + 1]['loss']
        worst = max(worst, abs(loss.item() - logged))
    assert 118 * 4 > n_windows and worst < 2e-5


def test_auto_starts_anew_for_other_options(killed, small_qwen):
    """A finished run, and one of other options, are not continued, and no
    file of theirs changes."""
    before, content = runs(killed), snapshot(newest(killed))
    folder = train(killed, **small_qwen | {
        'init_from': 'auto', 'max_iters': 3, 'warmup_iters': 1,
        'wsd_decay_iters': 1})
    assert runs(killed) == [*before, folder]
    assert snapshot(before[-1]) == content
    assert 'resume' not in {r['kind'] for r in read_lines(folder)}


def test_resuming_a_finished_run_adds_no_step(tmp_path, gpt2_run):
    shutil.copytree(gpt2_run.parent, tmp_path / 'out', symlinks=True)
    folder = train(tmp_path / 'out', init_from='resume')
    assert folder == tmp_path / 'out' / gpt2_run.name
    assert course(folder) == course(gpt2_run)
    assert weights(folder) == weights(gpt2_run)
    assert max(r['step'] for r in read_lines(folder)) == 190


def test_what_a_resume_changes_holds_for_the_next(tmp_path, data, warm):
    """More updates and another rate are of the run from then on; fewer
    updates than it has made are refused, and nothing is written."""
    def resume(**options):
        return warm.run('train.py', cwd=tmp_path, init_from='resume',
                        out_dir=tmp_path / 'out', **options)

    tiny = TINY | {'dataset': data / 'small', 'max_iters': 4}
    first = warm.run('train.py', cwd=tmp_path, out_dir=tmp_path / 'out',
                     **tiny)
    assert first.returncode == 0, first.stderr
    longer = resume(max_iters=8, learning_rate=1e-3)
    assert longer.returncode == 0, longer.stderr
    folder = newest(tmp_path / 'out')
    assert read_json(folder / 'run.json')['max_iters'] == 4
    record = read_record(folder)
    assert record['max_iters'] == 8
    assert record['schedule']['learning_rate'] == 1e-3
    assert record['options']['learning_rate'] == 1e-3
    assert record['options']['out_dir'] == str(tmp_path / 'out')
    assert resume().returncode == 0
    assert read_record(folder)['options'] == record['options']
    assert read_lines(folder)[-1] | {'unix_s': 0} == {
        'kind': 'end', 'step': 8, 'status': 'finished', 'reason': None,
        'unix_s': 0}
    before = snapshot(folder)
    refused = resume(max_iters=6)
    assert refused.returncode == 2
    assert 'max_iters=6' in refused.stderr and '8 updates' in refused.stderr
    assert snapshot(folder) == before
    said = warm.run('compare_architectures.py', folder, cwd=tmp_path)
    assert 'resumed with max_iters=8 from update 4 on' in (
        said.stdout.replace('\n  ', ' '))


@pytest.mark.parametrize('change', [
    lambda c: c['train', 70].update(loss=c['train', 70]['loss'] + 1e-6),
    lambda c: c['eval', 100].update(val_loss=c['eval', 100]['val_loss'] - 1e-6),
    lambda c: c.pop(('train', 189)),
    lambda c: c.update({('train', 191): c['train', 190]}),
], ids=['loss', 'val_loss', 'step missing', 'step too many'])
def test_the_comparison_can_fail(gpt2_run, change):
    expected = course(gpt2_run)
    found = copy.deepcopy(expected)
    assert_same_course(found, expected)
    change(found)
    with pytest.raises(AssertionError, match='first difference at'):
        assert_same_course(found, expected)
