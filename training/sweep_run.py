"""Running the cells of a sweep: each a process of train.py in its own folder.

A cell is finished when its folder holds a run of the same options and data
that came to its end, or that stopped at a loss that is not finite, which would
happen again. What is unfinished is resumed (train.py --init_from=auto).

A cell's folder is locked by its process, not by the sweep: a sweep that was
killed leaves processes that go on, and the next one waits for them instead of
starting theirs again.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from training.durable import FolderHeld, hold_lock, is_held
from training.run_log import (
    RunError,
    read_metrics,
    read_record,
    resolve_run,
)
from training.startup import FREE_WHEN_RESUMED
from training.sweep_plan import OWN_OPTIONS, Cell
from training.terminal import duration

POLL_S = 0.2
LOOK_S = 2.0  # how often the steps of running cells are read


@dataclass
class Result:
    """What a finished cell came to."""

    run: Path
    val_loss: float  # inf: it diverged
    val_bpb: float | None


def result_of(cell: Cell, defaults: dict) -> Result | None:
    """Of the newest run in the cell's folder; None if it is not finished.

    An option that the record lacks came later: it had its default then.
    """
    try:
        run = resolve_run(cell.folder)
        record = read_record(run)
    except RunError:
        return None
    recorded = defaults | record.get('options', {})
    same = all(recorded[name] == value for name, value in cell.values.items()
               if name not in (*OWN_OPTIONS, *FREE_WHEN_RESUMED))
    if not same or record.get('dataset', {}).get(
            'fingerprint') != cell.dataset:
        return None
    records, _ = read_metrics(run)
    ends = [r for r in records if r['kind'] == 'end']
    evals = [r for r in records if r['kind'] == 'eval']
    if not ends:
        return None
    if ends[-1]['status'] == 'finished' and evals:
        loss = evals[-1]['val_loss']
        return Result(run, float('inf') if loss is None else loss,
                      evals[-1]['val_bpb'])
    if (ends[-1]['status'] == 'failed'
            and 'not finite' in (ends[-1]['reason'] or '')):
        return Result(run, float('inf'), None)
    return None


class Runner:
    """Runs cells, `jobs` at once; its bar counts their FLOPs."""

    def __init__(self, train_py: Path, defaults: dict, *, jobs, nproc_per_node,
                 total_flops):
        self.defaults, self.jobs = defaults, jobs
        self.failures: list[tuple[Cell, str]] = []
        self.stopped_by = 0
        self._live: dict[str, Live] = {}
        self._signalled = 0
        self._begun = self._looked = time.monotonic()
        self._bar = tqdm(total=total_flops, disable=None, dynamic_ncols=True,
                         bar_format='{desc}{percentage:3.0f}%|{bar}| '
                                    '{elapsed}<{remaining}')
        self._done_flops = 0.0
        self._left_flops = total_flops
        self._command = [sys.executable, str(train_py)]
        if nproc_per_node > 1:
            self._command = [sys.executable, '-m', 'torch.distributed.run',
                             '--standalone',
                             f'--nproc_per_node={nproc_per_node}',
                             str(train_py)]
        self._env = dict(os.environ)
        processes = jobs * nproc_per_node
        if processes > 1:
            threads = max(1, torch.get_num_threads() // processes)
            self._env['OMP_NUM_THREADS'] = str(threads)
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, self._receive)

    def _receive(self, number, _frame):
        self.stopped_by = self.stopped_by or number
        self._signalled += 1

    def run(self, cells: list[Cell]) -> dict[int, Result]:
        """{id of a cell: its result}; failed and stopped cells are absent."""
        results, waiting = {}, []
        for cell in cells:
            result = result_of(cell, self.defaults)
            if result:
                results[id(cell)] = result
                self._account(cell, trained=False)
            else:
                waiting.append(cell)
        told = 0  # signals that the processes have been sent
        while self._live or (waiting and not self.stopped_by):
            while (waiting and len(self._live) < self.jobs
                   and not self.stopped_by):
                self._start(waiting.pop(0))
            if self._signalled > told:
                told = self._signalled
                self._tell_all(told)
            time.sleep(POLL_S)
            for live in list(self._live.values()):
                if live.ended():
                    self._end(live, results, waiting)
            self._show(len(cells) - len(waiting) - len(self._live),
                       len(cells))
        return results

    def say(self, line: str):
        self._bar.write(line)
        sys.stdout.flush()

    def close(self):
        self._bar.close()

    def _start(self, cell: Cell):
        cell.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = hold_lock(cell.folder)
        except FolderHeld:
            self.say(f'{name_of(cell)}: still being trained; waiting for it')
            self._live[str(cell.folder)] = Live(cell, None)
            return
        with lock, open(cell.folder / 'log.txt', 'a') as log:
            process = subprocess.Popen(
                [*self._command, *cell.argv, '--init_from=auto',
                 f'--out_dir={cell.folder}'],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._env, pass_fds=[lock.fileno()],
                # a Ctrl-C reaches it through the sweep alone, and once
                start_new_session=True)
        self._live[str(cell.folder)] = Live(cell, process)

    def _tell_all(self, times: int):
        if times == 1:
            self.say('stopping: the running cells save a checkpoint; once '
                     'more to stop without')
        for live in self._live.values():
            if live.process is None:  # another sweep's: not this one's to stop
                live.abandoned = True
            elif times == 1:
                live.process.send_signal(signal.SIGINT)
            else:
                os.killpg(live.process.pid, signal.SIGKILL)

    def _end(self, live, results, waiting):
        cell = live.cell
        del self._live[str(cell.folder)]
        if live.abandoned:
            return
        result = result_of(cell, self.defaults)
        if result:
            results[id(cell)] = result
            self._account(cell)
            self.say(f'{name_of(cell)}: {describe(result)}; {self._left()}')
        elif live.process is None:  # it was stopped: go on with it
            waiting.insert(0, cell)
        elif not self.stopped_by:
            self._account(cell)
            last = last_line(cell.folder / 'log.txt')
            self.failures.append((cell, last))
            self.say(f'{name_of(cell)}: failed with status '
                     f'{live.process.returncode}: {last} '
                     f'({cell.folder / "log.txt"})')

    def _account(self, cell, trained=True):
        self._left_flops -= cell.flops
        self._done_flops += cell.flops if trained else 0
        self._bar.total = self._done_flops + self._left_flops
        self._bar.n = self._done_flops

    def _left(self) -> str:
        seconds = time.monotonic() - self._begun
        left = seconds * self._left_flops / self._done_flops
        return f'about {duration(left)} left'

    def _show(self, done, total):
        if time.monotonic() - self._looked < LOOK_S or self._bar.disable:
            return
        self._looked = time.monotonic()
        self._bar.n = self._done_flops + sum(
            live.cell.flops * live.share() for live in self._live.values())
        self._bar.set_description_str(f'{done}/{total} runs ', refresh=False)
        self._bar.refresh()


@dataclass
class Live:
    """A cell that is being trained, by this sweep or (None) by another."""

    cell: Cell
    process: subprocess.Popen | None
    abandoned: bool = False

    def ended(self) -> bool:
        if self.abandoned:
            return True
        if self.process is None:
            return not is_held(self.cell.folder)
        return self.process.poll() is not None

    def share(self) -> float:
        """How much of its updates it has made, by its log."""
        try:
            records, _ = read_metrics(resolve_run(self.cell.folder))
        except RunError:
            return 0.0
        steps = [r['step'] for r in records if r['step']]
        return min(1.0, max(steps, default=0) / self.cell.max_iters)


def name_of(cell: Cell) -> str:
    return f'{cell.configuration.label} ({cell.folder.name})'


def describe(result: Result) -> str:
    if result.val_loss == float('inf'):
        return 'diverged'
    return (f'loss {result.val_loss:.4f}' if result.val_bpb is None
            else f'{result.val_bpb:.4f} bits per byte')


def last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors='replace').splitlines()
             if line.strip()]
    return lines[-1].strip() if lines else 'no output'
