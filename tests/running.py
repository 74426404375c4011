"""Starting the scripts as a user does, and reading what they leave behind."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 90  # seconds; a tiny run takes three, nearly all of it for imports

SYSTEM = {'device': 'cpu', 'dtype': 'float32', 'compile': False}
# 4 windows of 16 tokens an update
TINY = SYSTEM | {
    'n_layer': 1, 'n_embd': 16, 'n_head': 2, 'block_size': 16,
    'batch_size': 4, 'log_interval': 1, 'eval_bytes': 2000,
}


def command(script, *arguments, **options):
    """SCRIPT ARGUMENTS --key=value ..."""
    given = [f'--{name}={value}' for name, value in options.items()]
    return [str(ROOT / script), *map(str, arguments), *given]


def start(script, *arguments, cwd=None, env=None, **options):
    """A Popen of the script, on one thread."""
    return subprocess.Popen(
        [sys.executable, *command(script, *arguments, **options)],
        cwd=cwd, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {'OMP_NUM_THREADS': '1'} | (env or {}))


def finish(process):
    """Its CompletedProcess; a process that hangs is killed and fails."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(
        process.args, process.returncode, out, err)


def run(script, *arguments, **options):
    return finish(start(script, *arguments, **options))


class WarmStarts:
    """`run` at a fraction of its price: see warm_starts.py. Close it."""

    def __init__(self, folder):
        self._server = subprocess.Popen(
            [sys.executable, str(ROOT / 'tests' / 'warm_starts.py')],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'})
        self._folder, self._count = Path(folder), 0

    def run(self, script, *arguments, cwd, env=None, **options):
        self._count += 1
        out, err = (self._folder / f'{name}_{self._count}'
                    for name in ('out', 'err'))
        argv = command(script, *arguments, **options)
        job = {'argv': argv, 'cwd': str(cwd), 'env': env or {},
               'out': str(out), 'err': str(err)}
        print(json.dumps(job), file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(
            argv, status, out.read_text(), err.read_text())

    def close(self):
        self._server.stdin.close()
        self._server.wait(TIMEOUT)


@dataclasses.dataclass
class RanksResult:
    """How the ranks of a job ended, and what each of them printed."""

    statuses: list[int]  # -n: killed by signal n
    out: list[str]
    err: list[str]
    seconds: float


class WarmRanks:
    """Jobs of several ranks, each after the other: see warm_ranks.py."""

    def __init__(self, folder):
        self._server = subprocess.Popen(
            [sys.executable, str(ROOT / 'tests' / 'warm_ranks.py')],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {'OMP_NUM_THREADS': '1'})
        self._folder, self._count = Path(folder), 0
        self.pids = []

    def start(self, ranks, script, *arguments, cwd='.', before='', **options):
        """Start `ranks` processes; `before` runs first in each of them."""
        self._count += 1
        self._output = self._folder / f'job_{self._count}'
        self._output.mkdir()
        job = {'argv': command(script, *arguments, **options),
               'cwd': str(cwd), 'ranks': ranks, 'before': before,
               'folder': str(self._output)}
        self._begin = time.monotonic()
        print(json.dumps(job), file=self._server.stdin, flush=True)
        self.pids = json.loads(self._server.stdout.readline())

    def finish(self) -> RanksResult:
        statuses = json.loads(self._server.stdout.readline())
        seconds = time.monotonic() - self._begin
        out, err = ([(self._output / f'{name}_{rank}').read_text()
                     for rank in range(len(statuses))]
                    for name in ('out', 'err'))
        return RanksResult(statuses, out, err, seconds)

    def run(self, ranks, script, *arguments, **options):
        self.start(ranks, script, *arguments, **options)
        return self.finish()

    # as a Popen has them, for wait_for

    def poll(self):
        return None if any(map(psutil.pid_exists, self.pids)) else 1

    def kill(self):
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def communicate(self):
        result = self.finish()
        return ''.join(result.out), ''.join(result.err)

    def close(self):
        self._server.stdin.close()
        self._server.wait(TIMEOUT)


def runs(out_dir):
    return sorted(Path(out_dir).glob('run_*'))


def newest(out_dir):
    return (Path(out_dir) / 'latest').resolve()


def read_json(path):
    return json.loads(Path(path).read_text())


def read_lines(run_folder):
    """The records of metrics.jsonl as written; a half-written end is left."""
    path = Path(run_folder) / 'metrics.jsonl'
    text = path.read_text() if path.exists() else ''
    return [json.loads(line) for line in text.split('\n')[:-1] if line]


def course(run_folder):
    """{(kind, step): numbers} of a run, without those that are void.

    What a resume at step k finds beyond k was trained again after it.
    """
    found = {}
    for record in read_lines(run_folder):
        kind, step = record['kind'], record['step']
        if kind == 'resume':
            found = {at: found[at] for at in found if at[1] <= step}
        elif kind == 'train':
            found[kind, step] = {
                name: record[name]
                for name in ('loss', 'grad_norm', 'lr', 'tokens')}
        elif kind == 'eval':
            found[kind, step] = {
                name: record[name]
                for name in ('val_loss', 'val_bpb', 'tokens')}
    return found


def assert_same_course(found, expected):
    """Equal to the bit at every step; floats in JSON keep all their bits."""
    for at in sorted(expected.keys() | found.keys(), key=lambda at: at[1]):
        assert found.get(at) == expected.get(at), f'first difference at {at}'


def weights(run_folder, step=None):
    name = 'latest' if step is None else f'step_{step:08d}'
    path = Path(run_folder) / 'checkpoints' / name / 'model.safetensors'
    return path.read_bytes()


def whole_tensors(checkpoint):
    """{file kind: {name: 1-D tensor}}, put together from all files' parts.

    Every element must be there once; read without the project's own reader.
    """
    import torch
    from safetensors.torch import load_file

    merged = {}
    for path in sorted(checkpoint.glob('*.safetensors')):
        kind = path.name.split('-')[0].split('.')[0]
        for key, tensor in load_file(path).items():
            name, _, start = key.partition('@')
            merged.setdefault((kind, name), []).append(
                (int(start or 0), tensor.flatten()))
    whole = {}
    for key, parts in merged.items():
        parts.sort(key=lambda part: part[0])
        end = 0
        for start, tensor in parts:
            assert start == end, (key, start, end)
            end += len(tensor)
        whole[key] = torch.cat([tensor for _, tensor in parts])
    return whole


def spoil_a_number(path, value=float('nan')):
    """Into the last element of a checkpoint's file, with its hash put right:
    what a run that has gone wrong would save."""
    import hashlib

    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    state = read_json(path.parent / 'state.json')
    state['files'][path.name] = {
        'bytes': path.stat().st_size,
        'sha256': hashlib.sha256(path.read_bytes()).hexdigest()}
    (path.parent / 'state.json').write_text(json.dumps(state))


def wait_for(condition, process, seconds=TIMEOUT):
    """Poll until `condition()` is true; fails, with what the process (a Popen
    or alike) says, if it ends first or takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f'not reached: {process.communicate()[1]}')
        time.sleep(0.003)


def wait_for_step(process, out_dir, step):
    """Until the newest run of `out_dir` has logged the update `step`."""
    wait_for(lambda: any(
        record['kind'] == 'train' and record['step'] >= step
        for record in read_lines(newest(out_dir))), process)


def wait_until_stopped(process):
    """Until it stands still by SIGSTOP, which is sent, not obeyed at once."""
    wait_for(lambda: psutil.Process(process.pid).status() ==
             psutil.STATUS_STOPPED, process)


def snapshot(folder):
    """{path: what a change of it would change} of everything in `folder`."""
    found = {}
    for path in [Path(folder), *Path(folder).rglob('*')]:
        status = path.lstat()
        content = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        found[str(path)] = (status.st_mtime_ns, status.st_mode, content)
    return found
