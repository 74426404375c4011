"""A run's folder: its record, its metrics, its lock, and how to find it.

    out_dir/run_YYYYMMDD_HHMMSS/
        run.json        what was asked for and what was built, written once
        metrics.jsonl   one JSON object a line, only ever appended to; a
                        resume's line has what it changed of run.json
        evals.jsonl     of eval.py, see eval_results.py
        checkpoints/    see checkpoint.py
        hf/             with export_hf_at_end
        profile.json.gz with profile
        lock            held by the process that trains
    out_dir/latest      link to the newest run
"""

import datetime
import importlib.metadata
import json
import math
import platform
import subprocess
import time
from pathlib import Path

import numpy
import torch

from training.durable import FolderHeld, hold_lock, naming, point_to, write_json

FORMAT_VERSION = 1


class RunError(ValueError):
    """A run folder that is absent, locked, unwritable or not understood."""


class Run:
    """An open run folder; holds its lock until `close`."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self._lock = hold_lock(self.folder)
        except FolderHeld as error:
            raise RunError(
                f'{folder} is being trained by {error.holder}: wait for it, '
                'stop it, or start a new run with --init_from=scratch'
            ) from None
        self._metrics = open(self.folder / 'metrics.jsonl', 'ab')

    @classmethod
    def create(cls, out_dir) -> 'Run':
        """A new run_YYYYMMDD_HHMMSS in `out_dir`; `latest` points to it."""
        out_dir = Path(out_dir)
        name = datetime.datetime.now().strftime('run_%Y%m%d_%H%M%S')
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            folder, n = out_dir / name, 2
            while True:
                try:
                    folder.mkdir()
                    break
                except FileExistsError:  # two starts in one second
                    folder, n = out_dir / f'{name}_{n}', n + 1
            run = cls(folder)
            point_to(out_dir / 'latest', folder.name)
        except OSError as error:
            raise RunError(f'out_dir={out_dir} cannot be written '
                           f'({error.strerror}): choose another with '
                           '--out_dir=...') from error
        return run

    @classmethod
    def reopen(cls, folder) -> 'Run':
        """Continue an existing run in place."""
        run = cls(Path(folder))
        # a killed writer may have left half a line; end it, so that it spoils
        # itself only
        path = run.folder / 'metrics.jsonl'
        with open(path, 'rb') as f:
            f.seek(max(0, path.stat().st_size - 1))
            if f.read() not in (b'', b'\n'):
                run._metrics.write(b'\n')
        return run

    def write_record(self, record: dict):
        write_json(self.folder / 'run.json',
                   {'format_version': FORMAT_VERSION,
                    'run_id': self.folder.name, **record})

    def append(self, kind: str, **values):
        # JSON has no NaN and no infinity
        values = {name: None if isinstance(value, float)
                  and not math.isfinite(value) else value
                  for name, value in values.items()}
        line = json.dumps({'kind': kind, **values, 'unix_s': time.time()})
        with naming(self.folder / 'metrics.jsonl'):
            self._metrics.write(line.encode() + b'\n')
            self._metrics.flush()

    def close(self):
        self._metrics.close()
        self._lock.close()


class SilentRun:
    """A run as the ranks other than 0 see it: a folder, nothing to write."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def append(self, kind, **values):
        pass

    def close(self):
        pass


# --- reading ---------------------------------------------------------------


def find_runs(root='.') -> list[Path]:
    """Run folders in out*/ under `root`, newest first."""
    runs = [p.parent for p in Path(root).glob('out*/run_*/run.json')
            if not p.parent.parent.is_symlink()]
    return sorted(runs, key=lambda run: (run.name, str(run)), reverse=True)


def resolve_run(path) -> Path:
    """The run folder that `path` names: itself, or an out_dir's newest."""
    path = Path(path)
    if (path / 'run.json').exists():
        return path.resolve()
    runs = sorted((p.parent for p in path.glob('run_*/run.json')),
                  key=lambda run: run.name)
    if not runs:
        what = 'holds no run' if path.is_dir() else 'does not exist'
        raise RunError(f'{path} {what}: name an out_dir of train.py or a '
                       'folder run_YYYYMMDD_HHMMSS in it')
    return runs[-1].resolve()


def read_record(run) -> dict:
    """run.json, with what resumes have changed since."""
    path = Path(run) / 'run.json'
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f'{path} cannot be read: {error}') from error
    if record.get('format_version') != FORMAT_VERSION:
        raise RunError(f'{path} has format_version '
                       f'{record.get("format_version")}; this version reads '
                       f'{FORMAT_VERSION}')
    for line in read_lines(run)[0]:
        if line['kind'] == 'resume' and 'options' in line:
            record |= {'max_iters': line['max_iters'],
                       'schedule': line['schedule'],
                       'options': record['options'] | line['options']}
    return record


def read_metrics(run) -> tuple[list[dict], int]:
    """(records that count, number of damaged lines) of a run's metrics."""
    lines, damaged = read_lines(run)
    return without_void(lines), damaged


def without_void(lines: list[dict]) -> list[dict]:
    """A resume at step k voids what was logged beyond k before it: those
    steps were trained again."""
    records = []
    for record in lines:
        if record['kind'] == 'resume':
            records = [r for r in records
                       if r['kind'] != 'end' and r['step'] <= record['step']]
        records.append(record)
    return records


def read_lines(run) -> tuple[list[dict], int]:
    """(records as written, void ones too; number of damaged lines)."""
    records, damaged = [], 0
    path = Path(run) / 'metrics.jsonl'
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and {'kind', 'step'} <= record.keys():
            records.append(record)
        else:
            damaged += bool(line.strip())
    return records, damaged


# --- what a record says of its surroundings --------------------------------


def versions() -> dict:
    # to import transformers for its version takes half a second
    return {'python': platform.python_version(), 'torch': torch.__version__,
            'numpy': numpy.__version__,
            'transformers': importlib.metadata.version('transformers')}


def source_commit() -> str | None:
    """The commit of this code, '+changes' where files differ from it."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ['git', 'rev-parse', 'HEAD'], cwd=here, capture_output=True,
            text=True, check=True).stdout.strip()
        changed = subprocess.run(
            ['git', 'status', '--porcelain', '--untracked-files=no'],
            cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or no checkout
    return commit + ('+changes' if changed else '')
