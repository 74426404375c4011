"""Whatever happens to a process of a job, nothing is lost but the steps since
the last checkpoint, and nobody waits for a process that has gone.

The runs with torchrun are real jobs with real signals. Those of `warm_ranks`
have the same ranks without an agent beside them: what one does about another
is its own doing, and a fault comes at an exact instant (planted.py).
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from one_save import build
from planted import read_batches
from running import (
    TINY,
    assert_same_course,
    command,
    course,
    newest,
    read_json,
    read_lines,
    runs,
    snapshot,
    spoil_a_number,
    wait_for_step,
    whole_tensors,
)
from safetensors.torch import load_file

from training.checkpoint import (
    CheckpointError,
    find_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from training.distributed import Ranks
from training.strategies import MOMENTS

LIMIT_S = 60  # no job may take longer to end after a fault
UPDATES = 24
EXACT = TINY | {
    'arch_preset': 'qwen3', 'n_layer': 2, 'n_embd': 18, 'n_head': 3,
    'head_dim': 6, 'num_key_value_heads': 3, 'd_ff': 31, 'batch_size': 1,
    'gradient_accumulation_steps': 4, 'max_iters': UPDATES, 'dropout': 0.1,
    'eval_interval': 6, 'learning_rate': 1e-2, 'warmup_iters': 2,
    'deterministic': True, 'use_zero1': True, 'dist_timeout_s': 5}


@pytest.fixture(scope='module')
def options(data):
    return EXACT | {'dataset': data / 'small'}


def start_job(warm_ranks, ranks, out_dir, before='', **options):
    return warm_ranks.run(ranks, 'train.py', out_dir=out_dir,
                          before='import planted\n' + before, **options)


@pytest.fixture(scope='module')
def undisturbed(warm_ranks, options, tmp_path_factory):
    """The out_dir of two ranks that nothing disturbed."""
    out_dir = tmp_path_factory.mktemp('undisturbed')
    result = start_job(
        warm_ranks, 2, out_dir, **options, before='planted.witness_batches('
        f'rank, {str(out_dir / "batches")!r})')
    assert result.statuses == [0, 0], result.err
    return out_dir


def tensors(run_folder, name='latest'):
    """The bytes of a checkpoint's files of tensors."""
    folder = run_folder / 'checkpoints' / name
    return {path.name: path.read_bytes()
            for path in folder.glob('*.safetensors')}


def assert_as_undisturbed(out_dir, undisturbed):
    """One run, with every number and all weights and moments to the bit."""
    assert len(runs(out_dir)) == 1
    folder, expected = newest(out_dir), newest(undisturbed)
    assert_same_course(course(folder), course(expected))
    assert len(tensors(expected)) == 4
    assert tensors(folder) == tensors(expected)
    last = read_lines(folder)[-1]
    assert (last['kind'], last['status']) == ('end', 'finished')


def one_error(result):
    """The only error that the ranks print, without a traceback."""
    text = ''.join(result.err)
    assert 'Traceback' not in text, text
    assert len(re.findall('^error: ', text, re.M)) == 1, text
    return ' '.join(re.split('^error: ', text, flags=re.M)[1].split())


# --- jobs of torchrun: signals, kills, restarts ------------------------------


class Job:
    """train.py under torchrun on two ranks, in a process group of its own."""

    def __init__(self, out_dir, *torchrun_options, **options):
        self.out_dir = out_dir
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'torch.distributed.run', '--standalone',
             '--nproc_per_node=2', *torchrun_options,
             *command('train.py', out_dir=out_dir, **options)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {'OMP_NUM_THREADS': '1'})

        self.poll, self.communicate = (self.process.poll,
                                       self.process.communicate)

    def wait_for_step(self, step):
        wait_for_step(self, self.out_dir, step)

    def kill(self):
        """With the ranks: they would outlive torchrun."""
        with contextlib.suppress(psutil.NoSuchProcess):
            torchrun = psutil.Process(self.process.pid)
            for process in [*torchrun.children(True), torchrun]:
                process.kill()

    def workers(self):
        """The process ids, by rank."""
        found = {}
        for process in psutil.Process(self.process.pid).children(True):
            rank = process.environ().get('RANK')
            if rank is not None:
                found[int(rank)] = process.pid
        return [found[rank] for rank in sorted(found)]

    def finish(self):
        """(exit status, stderr), within the limit and with no process left."""
        begin = time.monotonic()
        family = [self.process.pid] + [
            p.pid for p in psutil.Process(self.process.pid).children(True)]
        try:
            err = self.process.communicate(timeout=LIMIT_S)[1]
        finally:
            for pid in family:  # of a test that has failed
                if psutil.pid_exists(pid) and self.process.poll() is None:
                    os.kill(pid, signal.SIGKILL)
        assert time.monotonic() - begin < LIMIT_S
        left = [p.pid for p in psutil.process_iter(['cmdline'])
                if any(str(self.out_dir) in part
                       for part in p.info['cmdline'] or [])]
        assert left == []
        return self.process.returncode, err


LONG = {'max_iters': 160, 'eval_interval': 40, 'dist_timeout_s': 20,
        'checkpoint_interval': 7}


@pytest.fixture(scope='module')
def long_run(warm_ranks, options, tmp_path_factory):
    """As `undisturbed`, and long enough to be hit from outside."""
    out_dir = tmp_path_factory.mktemp('long_run')
    result = start_job(warm_ranks, 2, out_dir, **options | LONG)
    assert result.statuses == [0, 0], result.err
    return out_dir


def go_on(warm_ranks, out_dir, **options):
    """The same command again, to the end."""
    result = start_job(warm_ranks, 2, out_dir,
                       **options | {'init_from': 'auto'})
    assert result.statuses == [0, 0], result.err


def to_the_launcher(job):
    os.kill(job.process.pid, signal.SIGTERM)


def to_one_rank(job):
    os.kill(job.workers()[1], signal.SIGUSR1)


def ctrl_c(job):
    os.killpg(job.process.pid, signal.SIGINT)


def test_stopped_by_each_signal_and_resumed(warm_ranks, tmp_path, options,
                                            long_run):
    begin = 0
    for send, number in ((to_the_launcher, signal.SIGTERM),
                         (to_one_rank, signal.SIGUSR1),
                         (ctrl_c, signal.SIGINT)):
        job = Job(tmp_path, **options | LONG | {'init_from': 'auto'})
        job.wait_for_step(begin + 10)
        send(job)
        status, err = job.finish()
        assert status != 0
        end = read_lines(newest(tmp_path))[-1]
        assert end['kind'] == 'end', (send.__name__, err[-3000:])
        assert (end['status'], end['reason']) == (
            'stopped', f'signal {number.value}'), send.__name__
        state = read_json(newest(tmp_path) / 'checkpoints/latest/state.json')
        assert begin + 10 <= state['step'] == end['step'] < 160
        begin = end['step']
    go_on(warm_ranks, tmp_path, **options | LONG)
    assert_as_undisturbed(tmp_path, long_run)
    steps = {kind: [r['step'] for r in read_lines(newest(tmp_path))
                    if r['kind'] == kind] for kind in ('resume', 'end')}
    assert steps['end'] == [*steps['resume'], 160] and len(steps['end']) == 4


def test_a_killed_rank_ends_the_job(warm_ranks, tmp_path, options, long_run):
    job = Job(tmp_path, **options | LONG)
    job.wait_for_step(30)
    os.kill(job.workers()[1], signal.SIGKILL)
    assert job.finish()[0] != 0
    go_on(warm_ranks, tmp_path, **options | LONG)
    assert_as_undisturbed(tmp_path, long_run)


@pytest.mark.parametrize('rank', [0, 1])
def test_a_killed_rank_restarts_the_job(tmp_path, options, long_run, rank):
    """torchrun --max_restarts=1 with init_from=auto needs nobody."""
    job = Job(tmp_path, '--max_restarts=1',
              **options | LONG | {'init_from': 'auto'})
    job.wait_for_step(30)
    os.kill(job.workers()[rank], signal.SIGKILL)
    status, err = job.finish()
    assert status == 0, err[-3000:]
    assert sum(r['kind'] == 'resume'
               for r in read_lines(newest(tmp_path))) == 1
    assert_as_undisturbed(tmp_path, long_run)


# --- the same ranks without an agent -----------------------------------------


@pytest.mark.parametrize('strategy', ['use_zero1', 'use_fsdp'])
def test_a_frozen_rank_ends_the_others(warm_ranks, tmp_path, options,
                                       strategy):
    """After step_timeout_s; torchrun then kills it, 30 s later."""
    warm_ranks.start(2, 'train.py', out_dir=tmp_path,
                     **options | LONG | {'use_zero1': False, strategy: True,
                                         'step_timeout_s': 3})
    wait_for_step(warm_ranks, tmp_path, 10)
    os.kill(warm_ranks.pids[1], signal.SIGSTOP)
    begin = time.monotonic()
    while read_lines(newest(tmp_path))[-1]['kind'] != 'end':
        time.sleep(0.01)
        assert time.monotonic() - begin < LIMIT_S
    assert 2.5 < time.monotonic() - begin < 15
    os.kill(warm_ranks.pids[1], signal.SIGKILL)
    result = warm_ranks.finish()
    assert result.statuses[0] > 0 and result.statuses[1] == -signal.SIGKILL
    end = read_lines(newest(tmp_path))[-1]
    assert end['status'] == 'failed' and 'LostContact' in end['reason']
    assert one_error(result).startswith('lost contact')
    assert verify_checkpoint(find_checkpoints(newest(tmp_path))[0])['step'] > 0


def test_a_slow_save_and_evaluation_are_waited_for(warm_ranks, tmp_path,
                                                   options):
    """step_timeout_s is for updates alone."""
    result = start_job(
        warm_ranks, 2, tmp_path, **options | {
            'max_iters': 4, 'eval_interval': 2, 'checkpoint_interval': 3,
            'step_timeout_s': 2, 'dist_timeout_s': 20},
        before='planted.slow_once(rank, {1: 4.0})')
    assert result.statuses == [0, 0], result.err


STOPS = {
    'in the first update': ('signal_at_update', {1: (1, 'SIGTERM')}, 1),
    'before the first update': (
        'signal_at_evaluation', {0: (2, 'SIGINT')}, 0),
    'in an evaluation': ('signal_at_evaluation', None, 12),
    'in the last evaluation': ('signal_at_evaluation', None, UPDATES),
    'in a save': ('signal_in_save', {1: (3, 'SIGTERM')}, 12),
    'on all ranks': ('signal_at_update', {
        0: (9, 'SIGTERM'), 1: (9, 'SIGTERM')}, 9),
    'with one signal here and another there': ('signal_at_update', {
        0: (9, 'SIGUSR1'), 1: (9, 'SIGTERM')}, 9),
    'in the last update': ('signal_at_update', {
        1: (UPDATES, 'SIGUSR1')}, UPDATES),
}


@pytest.mark.parametrize('stop', STOPS.values(), ids=STOPS)
def test_stopped_anywhere_and_resumed(warm_ranks, tmp_path, options,
                                      undisturbed, stop):
    plant, at, step = stop
    if at is None:
        # autocast is entered by micro-steps and batches of an evaluation
        # alike, in each module on its own account
        batches = eval_batches(undisturbed)
        at = {1: (batches * step // 6 + 2, 'SIGUSR1')}
    how = options | {'always_save_checkpoint': True, 'keep_checkpoints': 1}
    result = start_job(warm_ranks, 2, tmp_path, **how,
                       before=f'planted.{plant}(rank, {at})')
    number = max(getattr(signal, name) for _, name in at.values())
    assert result.statuses == [128 + number] * 2, result.err
    assert 'Traceback' not in ''.join(result.err)
    end = read_lines(newest(tmp_path))[-1]
    assert (end['kind'], end['status'], end['step']) == (
        'end', 'stopped', step)
    checkpoint = newest(tmp_path) / 'checkpoints' / 'latest'
    assert verify_checkpoint(checkpoint)['step'] == step
    if plant == 'signal_in_save':  # it is not written again without its loss
        assert read_json(checkpoint / 'state.json')['val_loss'] == course(
            newest(undisturbed))['eval', step]['val_loss']
    go_on(warm_ranks, tmp_path, **how)
    assert_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_told_by_all_at_once(warm_ranks, tmp_path, options, name):
    """A batch system tells the ranks and torchrun, and torchrun the ranks
    once more: that is one request, not an impatient second."""
    number = getattr(signal, name)
    warm_ranks.start(
        2, 'train.py', out_dir=tmp_path, **options,
        before='import planted; planted.slow_updates(0.3)')
    wait_for_step(warm_ranks, tmp_path, 3)
    for _ in range(2):
        for pid in warm_ranks.pids:
            os.kill(pid, number)
        time.sleep(0.1)
    result = warm_ranks.finish()
    assert result.statuses == [128 + number] * 2, result.err
    end = read_lines(newest(tmp_path))[-1]
    assert (end['kind'], end['status']) == ('end', 'stopped')
    checkpoint = newest(tmp_path) / 'checkpoints' / 'latest'
    assert verify_checkpoint(checkpoint)['step'] == end['step'] >= 3


def test_a_second_signal_ends_a_save_at_once(warm_ranks, tmp_path, options,
                                             undisturbed):
    """As SIGKILL would: the checkpoint before is whole, and the run goes on
    from it."""
    how = options | {'keep_checkpoints': 1}
    result = start_job(
        warm_ranks, 2, tmp_path, **how,
        before='planted.impatient_in_save(rank, {1: (3, "SIGTERM")})')
    assert result.statuses == [1, -signal.SIGTERM], result.err
    assert verify_checkpoint(find_checkpoints(newest(tmp_path))[0])[
        'step'] == 6
    go_on(warm_ranks, tmp_path, **how)
    assert_as_undisturbed(tmp_path, undisturbed)


@pytest.mark.parametrize('given, due', [({}, 5), ({'dist_timeout_s': 7}, 7)])
def test_a_resume_has_the_recorded_timeout(warm_ranks, half_done, tmp_path,
                                           given, due):
    """Already where the ranks meet, before they agree on a run."""
    out_dir = tmp_path / 'out'
    shutil.copytree(half_done, out_dir, symlinks=True)
    result = start_job(
        warm_ranks, 2, out_dir, init_from='resume', **given,
        before=f'planted.witness_timeout(rank, {str(tmp_path / "t")!r})\n'
               'planted.signal_while_starting(rank, {0: "SIGINT"}, '
               '"building")')
    assert result.statuses == [130, 130], result.err
    for rank in 0, 1:
        assert float((tmp_path / f't_{rank}').read_text()) == due


@pytest.mark.parametrize('ranks, where', [
    (1, 'building'), (2, 'building'), (2, 'verifying'), (1, 'loading'),
    (2, 'loading')])
def test_stopped_while_starting(warm_ranks, half_done, tmp_path, ranks,
                                where):
    """At once, by all ranks though one is told, and with nothing written."""
    out_dir = tmp_path / 'out'
    shutil.copytree(half_done, out_dir, symlinks=True)
    before = snapshot(out_dir)
    result = start_job(
        warm_ranks, ranks, out_dir, init_from='resume',
        before='planted.signal_while_starting('
               f'rank, {{{ranks - 1}: "SIGTERM"}}, {where!r})')
    assert result.statuses == [143] * ranks, result.err
    text = ''.join(result.err)
    assert 'Traceback' not in text, text
    assert text.count('nothing was written') == ranks
    after = snapshot(out_dir)
    assert [path for path in before | after
            if before.get(path) != after.get(path)] == []


def eval_batches(out_dir):
    """Batches of an evaluation on each of two ranks, of one window."""
    data = read_json(newest(out_dir) / 'run.json')['dataset']
    return -(-data['eval_tokens'] // (16 * 2))


@pytest.mark.parametrize('strategy, fails', [
    ('use_zero1', False), ('use_fsdp', True)])
def test_the_process_group_ends_with_the_job(warm_ranks, tmp_path, options,
                                             strategy, fails):
    """A group that something still holds is destroyed at the interpreter's
    end, where gloo's threads can wait for ever."""
    before = ('planted.witness_leaving(rank, '
              f'{str(tmp_path / "group")!r})')
    if fails:
        before += '\nplanted.full_disk_in_save(rank, {0: 1, 1: 1})'
    result = start_job(
        warm_ranks, 2, tmp_path / 'out', before=before,
        **options | {'max_iters': 2, 'use_zero1': False, strategy: True})
    assert result.statuses == [int(fails)] * 2, result.err
    for rank in 0, 1:
        assert (tmp_path / f'group_{rank}').read_text() == 'gone'


# --- a save that is killed ---------------------------------------------------


def state_of(step):
    """{key: values} of the checkpoint that one_save.py makes at `step`."""
    strategy = build(step, Ranks())
    found = {('model', p.name): p.weight for p in strategy.weights()}
    for p in strategy.pieces():
        for kind in MOMENTS:
            found['optimizer', f'{kind}/{p.name}'] = strategy.moment(p, kind)
    return found


def assert_whole(checkpoint):
    state = verify_checkpoint(checkpoint)
    found, expected = whole_tensors(checkpoint), state_of(state['step'])
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    return state['step']


@pytest.fixture(scope='module')
def saved_once(warm_ranks, tmp_path_factory):
    """{ranks: a run folder with one checkpoint, of step 2}."""
    found = {}
    for ranks in 1, 2:
        folder = found[ranks] = tmp_path_factory.mktemp(f'saved_{ranks}')
        result = warm_ranks.run(ranks, 'tests/one_save.py', folder, 2, 1)
        assert result.statuses == [0] * ranks, result.err
        assert assert_whole(folder / 'checkpoints' / 'latest') == 2
    return found


@pytest.mark.parametrize('ranks, killed, damaged', [
    (1, 0, False), (1, 0, True), (2, 0, False), (2, 1, False)],
    ids=['one process', 'in place of a damaged one', 'rank 0 of 2',
         'rank 1 of 2'])
def test_killed_at_each_moment_of_a_save(warm_ranks, saved_once, tmp_path,
                                         ranks, killed, damaged):
    """One checkpoint is whole at every instant, though only one is kept; the
    newest is; the next save leaves nothing of the killed one."""
    step = 4
    failures, moment, ended = [], 0, False
    while not ended:
        moment += 1
        folder = tmp_path / str(moment)
        shutil.copytree(saved_once[ranks], folder, symlinks=True)
        if damaged:
            save_checkpoint(folder, build(step, Ranks()), step=step, keep=2)
            flip_a_byte(folder / 'checkpoints/step_00000004/model.safetensors')
        result = warm_ranks.run(
            ranks, 'tests/one_save.py', folder, step, 1,
            before=f'import planted; planted.kill_in_save(rank, '
                   f'{{{killed}: {moment}}})')
        assert result.seconds < LIMIT_S
        ended = result.statuses == [0] * ranks
        if not ended:
            assert result.statuses[killed] == -signal.SIGKILL, result.err
            assert 0 not in result.statuses
        if damaged:
            if not whole_steps(folder):
                failures.append(f'moment {moment}: none is whole')
        else:
            try:
                assert assert_whole(find_checkpoints(folder)[0]) in (2, step)
                assert assert_whole(
                    folder / 'checkpoints' / 'latest') in (2, step)
            except (CheckpointError, AssertionError) as error:
                failures.append(f'moment {moment}: {error}')
        try:
            save_checkpoint(folder, build(6, Ranks()), step=6, keep=1)
        except OSError as error:
            failures.append(f'moment {moment}: no further save: {error}')
            continue
        assert assert_whole(folder / 'checkpoints' / 'latest') == 6
        names = {p.name for p in (folder / 'checkpoints').iterdir()}
        if names != {'step_00000006', 'latest'}:
            failures.append(f'moment {moment}: left {sorted(names)}')
    assert failures == []
    assert moment > (6 if killed else 15)


def whole_steps(folder):
    found = []
    for checkpoint in find_checkpoints(folder):
        try:
            found.append(assert_whole(checkpoint))
        except CheckpointError:
            continue
    return found


@pytest.mark.parametrize('ranks', [1, 2])
def test_a_disk_that_is_full(warm_ranks, tmp_path, options, undisturbed,
                             ranks):
    """After a second try the checkpoint before stays, and nothing of the new
    one; the job says what happened, and ends."""
    how = options | {'checkpoint_interval': 5}
    result = start_job(
        warm_ranks, ranks, tmp_path, **how,
        before=f'planted.full_disk_in_save(rank, {{{ranks - 1}: 2}})')
    assert result.statuses == [1] * ranks, result.err
    error = one_error(result)
    assert re.search('[Ff]ile too large|No space|full', error), error
    assert 'step_' in error or 'safetensors' in error, error  # which file
    assert f'--init_from=resume --out_dir={newest(tmp_path)}' in error
    assert ''.join(result.err).count('trying once more') == 1
    folder = newest(tmp_path)
    assert verify_checkpoint(find_checkpoints(folder)[0])['step'] == 5
    assert list((folder / 'checkpoints').glob('.*')) == []
    assert read_lines(folder)[-1]['kind'] == 'end'
    if ranks == 2:
        go_on(warm_ranks, tmp_path, **how)
        assert_as_undisturbed(tmp_path, undisturbed)


def test_a_disk_that_was_full_for_a_moment(warm_ranks, tmp_path, options,
                                           undisturbed):
    """The second try writes the checkpoint, and training goes on as if
    nothing had been."""
    result = start_job(
        warm_ranks, 2, tmp_path, **options | {'checkpoint_interval': 5},
        before='planted.full_disk_in_save(rank, {1: 2}, tries=1)')
    assert result.statuses == [0, 0], result.err
    assert result.err[1].count('trying once more') == 1
    assert result.err[0] == ''
    assert_as_undisturbed(tmp_path, undisturbed)


def test_what_cannot_be_removed_does_not_stop_a_save(tmp_path, capsys):
    """Such as a folder that is a mount point, or in use on a network disk."""
    for step in 2, 4:
        save_checkpoint(tmp_path, build(step, Ranks()), step=step, keep=1)
    (tmp_path / 'checkpoints' / '.step_00000002.part').write_text('a file')
    save_checkpoint(tmp_path, build(6, Ranks()), step=6, keep=1)
    assert assert_whole(find_checkpoints(tmp_path)[0]) == 6
    assert 'cannot be removed' in capsys.readouterr().err


# --- data that is cut off in use ---------------------------------------------


@pytest.mark.parametrize('ranks, plant, name', [
    (1, 'truncate_at_update', 'train.bin'),
    (2, 'truncate_at_update', 'train.bin'),
    (1, 'truncate_at_evaluation', 'val.bin'),
    (2, 'truncate_at_evaluation', 'val.bin')])
def test_a_bin_that_is_cut_off_while_training(
        warm_ranks, tmp_path, options, data, undisturbed, ranks, plant, name):
    """Reading past its end is an error with a name, and not SIGBUS; with the
    file restored, the run goes on."""
    shutil.copytree(data / 'small', tmp_path / 'small')
    path = tmp_path / 'small' / name
    whole = path.read_bytes()
    how = options | {'dataset': tmp_path / 'small', 'checkpoint_interval': 3}
    at = 8 if 'update' in plant else eval_batches(undisturbed) * 2 // ranks + 2
    result = start_job(
        warm_ranks, ranks, tmp_path / 'out', **how,
        before=f'planted.{plant}(rank, {{0: {at}}}, {str(path)!r})')
    assert result.statuses == [1] * ranks, result.err
    assert result.seconds < LIMIT_S
    text = ''.join(result.err)
    assert 'Traceback' not in text, text
    for part in str(path), '1002', str(len(whole)), 'restore':
        assert part in text, text
    folder = newest(tmp_path / 'out')
    assert read_lines(folder)[-1]['status'] == 'failed'
    assert verify_checkpoint(find_checkpoints(folder)[0])['step'] >= 3
    path.write_bytes(whole)
    if ranks == 2:
        go_on(warm_ranks, tmp_path / 'out', **how)
        assert_as_undisturbed(tmp_path / 'out', undisturbed)


# --- damage ------------------------------------------------------------------


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def mix(path):
    """The shard of the checkpoint before, of the same size."""
    other = sorted(path.parent.parent.glob('step_*'))[-2] / path.name
    assert other.stat().st_size == path.stat().st_size
    shutil.copy(other, path)


DAMAGES = {'a flipped byte': flip_a_byte, 'cut short': truncate,
           'deleted': Path.unlink, 'of another step': mix,
           'not a number': spoil_a_number}


@pytest.fixture(scope='module')
def half_done(warm_ranks, options, tmp_path_factory):
    """An out_dir that was stopped at step 13, with checkpoints 5, 10, 13."""
    out_dir = tmp_path_factory.mktemp('half_done')
    result = start_job(
        warm_ranks, 2, out_dir, before='planted.signal_at_update('
        'rank, {0: (13, "SIGTERM")})', **options
        | {'checkpoint_interval': 5, 'keep_checkpoints': 5})
    assert result.statuses == [143, 143], result.err
    assert [int(c.name[5:]) for c in find_checkpoints(newest(out_dir))] == [
        13, 12, 10, 6, 5]
    return out_dir


@pytest.mark.parametrize('name', ['model-00001-of-00002.safetensors',
                                  'optimizer-00000-of-00002.safetensors'])
@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_damage_is_refused(warm_ranks, half_done, tmp_path, damage, name):
    out_dir = tmp_path / 'out'
    shutil.copytree(half_done, out_dir, symlinks=True)
    checkpoint = newest(out_dir) / 'checkpoints' / 'latest'
    damage(checkpoint / name)
    before = (newest(out_dir) / 'metrics.jsonl').read_bytes()
    result = start_job(warm_ranks, 2, out_dir, init_from='resume')
    assert result.statuses == [2, 2], result.err
    error = one_error(result)
    assert name in error and 'step_00000013' in error
    assert 'remove its folder' in error
    assert (newest(out_dir) / 'metrics.jsonl').read_bytes() == before


def test_auto_goes_back_to_a_whole_checkpoint(warm_ranks, half_done, tmp_path,
                                              options, undisturbed):
    """It says so; the damaged ones do not push out the new ones."""
    how = options | {'checkpoint_interval': 5, 'keep_checkpoints': 5}
    shutil.copytree(half_done, tmp_path / 'out', symlinks=True)
    folder = newest(tmp_path / 'out') / 'checkpoints'
    flip_a_byte(folder / 'step_00000013' / 'model-00001-of-00002.safetensors')
    (folder / 'step_00000012' / 'state.json').unlink()
    spoil_a_number(
        folder / 'step_00000010' / 'optimizer-00000-of-00002.safetensors')
    record = folder.parent / 'run.json'  # as if it had been made here
    record.write_text(record.read_text().replace(
        str(half_done), str(tmp_path / 'out')))
    result = start_job(warm_ranks, 2, tmp_path / 'out', **how | {
        'init_from': 'auto', 'dist_timeout_s': 9, 'step_timeout_s': 8})
    assert result.statuses == [0, 0], result.err
    said = ''.join(result.out + result.err)
    for step in 13, 12, 10:
        assert f'step_{step:08d}' in said
    assert [r['step'] for r in read_lines(folder.parent)
            if r['kind'] == 'resume'] == [6]
    assert_as_undisturbed(tmp_path / 'out', undisturbed)


def test_a_damaged_newer_checkpoint_is_not_kept_instead_of_a_new_one(
        warm_ranks, tmp_path):
    """Going on from an older one, with keep_checkpoints=1."""
    for step in 2, 8:
        save_checkpoint(tmp_path, build(step, Ranks()), step=step, keep=2)
    flip_a_byte(tmp_path / 'checkpoints/step_00000008/model.safetensors')
    for step in 4, 6:  # trained on from 2
        save_checkpoint(tmp_path, build(step, Ranks()), step=step, keep=1)
        assert step in whole_steps(tmp_path)


def test_without_state_nothing_is_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path, build(2, Ranks()), step=2)
    (tmp_path / 'checkpoints/step_00000002/state.json').unlink()
    with pytest.raises(CheckpointError, match='state.json'):
        verify_checkpoint(tmp_path / 'checkpoints' / 'step_00000002')


def test_an_evaluation_that_is_no_number_is_not_the_best(tmp_path):
    for step, loss in ((2, float('nan')), (4, 3.0), (6, 3.5), (8, 4.0)):
        save_checkpoint(tmp_path, build(step, Ranks()), step=step,
                        val_loss=loss, keep=1)
    assert [int(c.name[5:]) for c in find_checkpoints(tmp_path)] == [8, 4]


# --- numbers that are none ---------------------------------------------------


@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('what', ['nan', 'inf'])
def test_a_loss_or_gradient_that_is_no_number(
        warm_ranks, tmp_path, options, undisturbed, ranks, what):
    """All ranks stop before the update, and say which, where and on what."""
    accumulation = 4 // ranks
    at = {ranks - 1: 7 * accumulation + 1}  # the first micro-step of update 8
    how = options | {'checkpoint_interval': 1}
    result = start_job(warm_ranks, ranks, tmp_path, **how,
                       before=f'planted.spoil(rank, {at}, {what!r})')
    assert result.statuses == [3] * ranks, result.err
    error = one_error(result)
    for part in 'step 8', 'samples 28 to 31', what:
        assert part in error, error
    assert (f'rank {ranks - 1}' in error) == (what == 'nan'), error
    folder = newest(tmp_path)
    end = read_lines(folder)[-1]
    assert (end['kind'], end['status'], end['step']) == ('end', 'failed', 7)
    assert verify_checkpoint(find_checkpoints(folder)[0])['step'] == 7
    assert all(torch.isfinite(t).all() for path in
               (folder / 'checkpoints' / 'latest').glob('*.safetensors')
               for t in load_file(path).values())
    if ranks == 2:  # the fault was the machine's: the next try is exact
        go_on(warm_ranks, tmp_path, **how)
        assert_as_undisturbed(tmp_path, undisturbed)


def test_one_such_update_may_be_left_out(warm_ranks, tmp_path, options,
                                         undisturbed):
    """Two would be one too many; what is left out changes no weight."""
    how = options | {'checkpoint_interval': 1, 'skip_nonfinite_steps': 1,
                     'keep_checkpoints': UPDATES}
    result = start_job(warm_ranks, 2, tmp_path, **how,
                       before='planted.spoil(rank, {0: 7 * 2 + 2}, "nan")')
    assert result.statuses == [0, 0], result.err
    folder = newest(tmp_path)
    skipped = [r for r in read_lines(folder) if r['kind'] == 'skipped']
    assert [r['step'] for r in skipped] == [8]
    assert 'rank 0' in skipped[0]['reason']
    assert tensors(folder, 'step_00000008') == tensors(
        folder, 'step_00000007')
    assert tensors(folder, 'step_00000009') != tensors(
        folder, 'step_00000008')
    state = read_json(folder / 'checkpoints' / 'latest' / 'state.json')
    assert (state['step'], state['optimizer_steps']) == (UPDATES, UPDATES - 1)
    found, expected = course(folder), course(newest(undisturbed))
    for step in range(1, 8):
        assert found['train', step] == expected['train', step]
    assert found['train', 9] != expected['train', 9]
    for line in (folder / 'metrics.jsonl').read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is not JSON


def test_the_first_update_may_be_left_out(warm_ranks, tmp_path, options):
    """AdamW has no state yet when it is saved."""
    how = options | {'checkpoint_interval': 1, 'skip_nonfinite_steps': 1,
                     'max_iters': 3}
    result = start_job(warm_ranks, 2, tmp_path, **how,
                       before='planted.spoil(rank, {1: 1}, "nan")')
    assert result.statuses == [0, 0], result.err
    state = read_json(newest(tmp_path) / 'checkpoints/latest/state.json')
    assert state['optimizer_steps'] == 2


def test_a_large_seed(warm_ranks, tmp_path, options):
    result = start_job(warm_ranks, 1, tmp_path, **options | {
        'max_iters': 1, 'warmup_iters': 0, 'seed': 2**31 - 1})
    assert result.statuses == [0], result.err


# --- bad input ---------------------------------------------------------------


@pytest.mark.parametrize('ranks, change, says', [
    (3, {}, ['gradient_accumulation_steps=4', '3', 'multiple']),
    (2, {'use_fsdp': True}, ['use_zero1', 'use_fsdp', 'False']),
    (2, {'out_dir': '/dev/null/out'}, ['/dev/null/out', '--out_dir']),
], ids=['indivisible batch', 'two strategies', 'unwritable out_dir'])
def test_refused_once(warm_ranks, tmp_path, options, ranks, change, says):
    result = start_job(warm_ranks, ranks, **(
        {'out_dir': tmp_path / 'out'} | options | change))
    assert result.statuses == [2] * ranks, result.err
    error = one_error(result)
    assert [part for part in says if part not in error] == []
    assert not (tmp_path / 'out').exists()


def test_a_disk_that_is_full_at_the_start(warm_ranks, tmp_path, options):
    result = start_job(warm_ranks, 2, tmp_path, **options,
                       before='planted.full_disk(1000)')
    assert result.statuses == [2, 2], result.err
    assert 'run.json' in one_error(result)


@pytest.mark.parametrize('plant, says', [
    ('import sys; rank and sys.argv.append("--learning_rate=0.02")',
     ['rank(s) 1', 'options']),
    ('import sys; rank and sys.argv.append("--dataset=./nowhere")',
     ['nowhere', 'prepare.py']),
    ('import sys; rank or sys.argv.append("--dataset=./nowhere")',
     ['nowhere', 'prepare.py']),
    ('import sys; rank and sys.argv.append("--learning_rat=0.02")',
     ['learning_rat', 'learning_rate']),
], ids=['other options', 'dataset missing on rank 1',
        'dataset missing on rank 0', 'misspelt on rank 1'])
def test_ranks_that_differ(warm_ranks, tmp_path, options, plant, says):
    result = start_job(warm_ranks, 2, tmp_path / 'out', **options
                       | {'dist_timeout_s': 3}, before=plant)
    assert result.seconds < 30
    assert 0 not in result.statuses
    text = ' '.join(''.join(result.err).split())
    assert [part for part in says if part not in text] == []
    assert not (tmp_path / 'out').exists()


def test_two_jobs_in_one_run(warm_ranks, tmp_path, options):
    holder = Job(tmp_path, **options | {'max_iters': 100_000})
    try:
        holder.wait_for_step(1)
        pid = holder.workers()[0]
        for how in 'resume', 'auto':
            result = start_job(warm_ranks, 2, tmp_path, **options | {
                'max_iters': 100_000, 'init_from': how})
            assert result.statuses == [2, 2], result.err
            error = one_error(result)
            assert newest(tmp_path).name in error and str(pid) in error
    finally:
        os.kill(holder.process.pid, signal.SIGTERM)
        holder.finish()
    assert len(runs(tmp_path)) == 1


# --- the comparison ----------------------------------------------------------


def test_the_comparison_can_fail(undisturbed, tmp_path):
    """A loss that is off by 1e-3, and one bit of one weight."""
    shutil.copytree(undisturbed, tmp_path / 'out', symlinks=True)
    folder = newest(tmp_path / 'out')
    assert_as_undisturbed(tmp_path / 'out', undisturbed)
    text = (folder / 'metrics.jsonl').read_text()
    loss = course(folder)['train', 5]['loss']
    assert text.count(str(loss)) == 1
    (folder / 'metrics.jsonl').write_text(
        text.replace(str(loss), str(loss * (1 + 1e-3))))
    with pytest.raises(AssertionError, match='first difference'):
        assert_as_undisturbed(tmp_path / 'out', undisturbed)
    (folder / 'metrics.jsonl').write_text(text)
    flip_a_byte(next((folder / 'checkpoints/latest').glob('model-00001*')))
    with pytest.raises(AssertionError):
        assert_as_undisturbed(tmp_path / 'out', undisturbed)


def test_evaluations_do_not_change_the_training(warm_ranks, tmp_path, options,
                                                undisturbed):
    result = start_job(warm_ranks, 2, tmp_path, **options | {
        'eval_interval': 5, 'eval_bytes': 900, 'checkpoint_interval': 4})
    assert result.statuses == [0, 0], result.err
    found, expected = (
        {at: numbers for at, numbers in course(newest(out_dir)).items()
         if at[0] == 'train'} for out_dir in (tmp_path, undisturbed))
    assert len(expected) == UPDATES
    assert_same_course(found, expected)
    assert tensors(newest(tmp_path)) == tensors(newest(undisturbed))


def test_the_same_tokens_on_one_rank(warm_ranks, tmp_path, options,
                                     undisturbed):
    result = start_job(
        warm_ranks, 1, tmp_path, **options, before='planted.witness_batches('
        f'rank, {str(tmp_path / "batches")!r})')
    assert result.statuses == [0], result.err
    one = read_batches(tmp_path / 'batches', 1)
    assert one == read_batches(undisturbed / 'batches', 2)
    assert len(one) == 4 * UPDATES
