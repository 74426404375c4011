"""Whatever happens to a process of a job, nothing is lost but the steps since
the last checkpoint, and nobody waits for a process that has gone.

The runs with torchrun are real jobs with real signals. Those of `warm_ranks`
have the same ranks without an agent beside them: what one does about another
is its own doing, and a fault comes at an exact instant (planted.py).
"""

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
from planted import read_batches
from running import (
    ROOT,
    TINY,
    assert_same_course,
    command,
    course,
    newest,
    read_json,
    read_lines,
    runs,
    wait_for_step,
)
from safetensors.torch import load_file

from training.checkpoint import (
    CheckpointError,
    find_checkpoints,
    verify_checkpoint,
)

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
    assert text.count('error:') == 1, text
    return ' '.join(text.partition('error:')[2].split())


# --- jobs of torchrun: signals, kills, restarts --------------------------------


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

    def wait_for_step(self, step):
        while not (newest(self.out_dir) / 'metrics.jsonl').exists():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)
        wait_for_step(self.process, self.out_dir, step)

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


LONG = {'max_iters': 400, 'eval_interval': 100, 'dist_timeout_s': 20,
        'checkpoint_interval': 7}


@pytest.fixture(scope='module')
def long_run(warm_ranks, options, tmp_path_factory):
    """As `undisturbed`, and long enough to be hit from outside."""
    out_dir = tmp_path_factory.mktemp('long_run')
    result = start_job(warm_ranks, 2, out_dir, **options | LONG)
    assert result.statuses == [0, 0], result.err
    return out_dir


def test_stopped_by_each_signal_and_resumed(tmp_path, options, long_run):
    """To the launcher, to one rank, to all, Ctrl-C; then to the end."""
    begin = 0
    for send, name in (
        (lambda job: os.kill(job.process.pid, signal.SIGTERM), 'SIGTERM'),
        (lambda job: os.kill(job.workers()[1], signal.SIGUSR1), 'SIGUSR1'),
        # what a terminal does
        (lambda job: os.killpg(job.process.pid, signal.SIGINT), 'SIGINT'),
        # what a batch system does: all of them, and the launcher tells the
        # ranks once more
        (lambda job: [os.kill(pid, signal.SIGTERM)
                      for pid in [*job.workers(), job.process.pid]],
         'SIGTERM'),
    ):
        how = {'init_from': 'auto'} | options | LONG
        job = Job(tmp_path, **how)
        job.wait_for_step(begin + 20)
        send(job)
        status, err = job.finish()
        assert status != 0
        end = read_lines(newest(tmp_path))[-1]
        assert end['kind'] == 'end', (name, end, err[-3000:])
        assert (end['status'], end['reason']) == (
            'stopped', f'signal {getattr(signal, name).value}'), name
        state = read_json(newest(tmp_path) / 'checkpoints/latest/state.json')
        assert begin + 20 <= state['step'] == end['step'] < 400
        begin = end['step']
    status, err = Job(tmp_path, **how).finish()
    assert status == 0, err
    assert_as_undisturbed(tmp_path, long_run)
    assert [r['step'] for r in read_lines(newest(tmp_path))
            if r['kind'] == 'resume'] == [
        r['step'] for r in read_lines(newest(tmp_path))
        if r['kind'] == 'end'][:-1]


def test_a_killed_rank_ends_the_job(tmp_path, options, long_run):
    job = Job(tmp_path, **options | LONG | {'init_from': 'auto'})
    job.wait_for_step(30)
    os.kill(job.workers()[1], signal.SIGKILL)
    status, _ = job.finish()
    assert status != 0
    status, err = Job(
        tmp_path, **options | LONG | {'init_from': 'auto'}).finish()
    assert status == 0, err
    assert_as_undisturbed(tmp_path, long_run)


def test_a_killed_rank_restarts_the_job(tmp_path, options, long_run):
    """torchrun --max_restarts=1 with init_from=auto needs nobody."""
    job = Job(tmp_path, '--max_restarts=1',
              **options | LONG | {'init_from': 'auto'})
    job.wait_for_step(30)
    os.kill(job.workers()[0], signal.SIGKILL)
    status, err = job.finish()
    assert status == 0, err
    assert sum(r['kind'] == 'resume'
               for r in read_lines(newest(tmp_path))) == 1
    assert_as_undisturbed(tmp_path, long_run)


def test_a_frozen_rank_ends_the_job(tmp_path, options):
    """It answers nobody: dist_timeout_s, then torchrun's own patience."""
    job = Job(tmp_path, '--shutdown_timeout=2',
              **options | LONG | {'dist_timeout_s': 4})
    job.wait_for_step(10)
    os.kill(job.workers()[1], signal.SIGSTOP)
    begin = time.monotonic()
    status, _ = job.finish()
    assert status != 0
    assert 4 < time.monotonic() - begin < 20
    assert verify_checkpoint(find_checkpoints(newest(tmp_path))[0])['step'] > 0
