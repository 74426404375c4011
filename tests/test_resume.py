"""A run that was stopped or killed goes on as if it never had been.

Signals come at exact instants (planted.py), in forks of one process; the runs
that nothing disturbs are started anew, with another seed for hashes.
"""

import copy
import hashlib
import shutil
import signal

import pytest
import torch
from running import (
    TINY,
    assert_same_course,
    course,
    newest,
    read_json,
    read_lines,
    runs,
    snapshot,
    weights,
)
from safetensors.torch import load

from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from training.data_loader import sample_window
from training.dataset import open_dataset
from training.run_log import read_record


def train(warm_ranks, out_dir, plant='', status=0, **options):
    """The newest run of `out_dir` after one rank of train.py that must end
    with `status`, and without a traceback."""
    result = warm_ranks.run(
        1, 'train.py', out_dir=out_dir, before=f'import planted; {plant}',
        **options)
    assert result.statuses == [status], result.err
    assert 'Traceback' not in result.err[0]
    return newest(out_dir)


def train_until(warm_ranks, out_dir, step, name, plant, **options):
    """As `train`, stopped in good order by the signal `name` at `step`."""
    number = getattr(signal, name)
    folder = train(warm_ranks, out_dir, plant, 128 + number, **options)
    end = read_lines(folder)[-1]
    assert (end['kind'], end['status'], end['reason'], end['step']) == (
        'end', 'stopped', f'signal {number.value}', step)
    return folder


def assert_intact(checkpoint):
    """Every file has the size and the hash that state.json records."""
    for name, due in read_json(checkpoint / 'state.json')['files'].items():
        content = (checkpoint / name).read_bytes()
        assert len(content) == due['bytes']
        assert hashlib.sha256(content).hexdigest() == due['sha256']


def test_stopped_twice_and_resumed(tmp_path, small, gpt2_run, warm_ranks):
    """SIGTERM, then Ctrl-C in a later epoch, with dropout."""
    first, second = 31, 140
    train_until(warm_ranks, tmp_path, first, 'SIGTERM',
                f'planted.signal_at_update(0, {{0: ({first}, "SIGTERM")}})',
                **small)
    folder = train_until(
        warm_ranks, tmp_path, second, 'SIGINT', 'planted.signal_at_update('
        f'0, {{0: ({second - first}, "SIGINT")}})', init_from='resume')
    assert set(course(folder)) == {
        at for at in course(gpt2_run) if at[1] <= second}

    # the run folder does for --out_dir as well
    train(warm_ranks, folder, init_from='resume')
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


@pytest.mark.parametrize('step', [0, 40, 120])
def test_stopped_in_an_evaluation(tmp_path, small_qwen, qwen_run, warm_ranks,
                                  step):
    """Of no update yet, of some, of all: it is made after the resume, and
    only a run that lacks nothing is called finished."""
    tokens = read_json(qwen_run / 'run.json')['dataset']['eval_tokens']
    batch = -(-tokens // (4 * 16)) * step // 40 + 2  # all before and one
    folder = train_until(
        warm_ranks, tmp_path, step, 'SIGINT',
        f'planted.signal_at_evaluation(0, {{0: ({batch}, "SIGINT")}})',
        **small_qwen)
    assert set(course(folder)) == {
        at for at in course(qwen_run)
        if at[1] <= step and at != ('eval', step)}
    train(warm_ranks, tmp_path, init_from='resume')
    assert runs(tmp_path) == [folder]
    assert_same_course(course(folder), course(qwen_run))
    assert weights(folder) == weights(qwen_run) == weights(folder, 120)
    assert read_lines(folder)[-1]['status'] == 'finished'


@pytest.fixture(scope='module')
def killed(tmp_path_factory, small_qwen, warm_ranks):
    """An out_dir after one command, ended twice and started three times.

    SIGKILL in the save of update 22, then the two Ctrl-C of an impatient user
    in that of update 82.
    """
    out_dir = tmp_path_factory.mktemp('killed')
    options = small_qwen | {
        'init_from': 'auto', 'checkpoint_interval': 2,
        'keep_checkpoints': 1000}
    # a save writes two files of tensors: the first one of save n is 2n - 1
    for plant, status, step in (
        ('signal_in_save(0, {0: (21, "SIGKILL")})', -signal.SIGKILL, 20),
        ('impatient_in_save(0, {0: (61, "SIGINT")})', -signal.SIGINT, 80),
    ):
        folder = train(warm_ranks, out_dir, f'planted.{plant}', status,
                       **options)
        checkpoint = folder / 'checkpoints' / 'latest'
        assert_intact(checkpoint)
        assert read_json(checkpoint / 'state.json')['step'] == step
        assert (checkpoint.parent / f'.step_{step + 2:08d}.part').exists()
    train(warm_ranks, out_dir, **options)
    return out_dir


def test_killed_and_resumed(killed, qwen_run):
    assert len(runs(killed)) == 1
    folder = newest(killed)
    end = read_lines(folder)[-1]
    assert (end['kind'], end['step'], end['status']) == (
        'end', 120, 'finished')
    assert [r['step'] for r in read_lines(folder)
            if r['kind'] == 'resume'] == [20, 80]
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


def test_auto_starts_anew_for_other_options(killed, small_qwen, warm_ranks):
    """A finished run, and one of other options, are not continued, and no
    file of theirs changes."""
    before, content = runs(killed), snapshot(newest(killed))
    folder = train(warm_ranks, killed, **small_qwen | {
        'init_from': 'auto', 'max_iters': 3, 'warmup_iters': 1,
        'wsd_decay_iters': 1})
    assert runs(killed) == [*before, folder]
    assert snapshot(before[-1]) == content
    assert 'resume' not in {r['kind'] for r in read_lines(folder)}


def test_resuming_a_finished_run_adds_no_step(tmp_path, gpt2_run, warm_ranks):
    shutil.copytree(gpt2_run.parent, tmp_path / 'out', symlinks=True)
    folder = train(warm_ranks, tmp_path / 'out', init_from='resume')
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
