"""What a run's folder comes to, for a comparison: figures, curves, faults.

Reads run.json, metrics.jsonl and evals.jsonl; writes nothing.
"""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from training.durable import is_held
from training.eval_results import read_results, tasks_at
from training.run_log import (
    RunError,
    read_lines,
    read_record,
    without_void,
)

# what is read of a run's record
NEEDED = {
    '': ('arch_preset', 'architecture', 'parameters', 'dataset', 'options',
         'flops_per_token', 'flops_per_token_causal', 'tokens_per_iter',
         'max_iters', 'schedule', 'world_size', 'device', 'command'),
    'parameters': ('total', 'non_embedding'),
    'dataset': ('folder', 'fingerprint', 'eval_text_sha256', 'eval_tokens',
                'eval_bytes_wanted'),
}
# and of a line of its metrics; a line without is damaged
LINE = {
    'train': ('loss', 'grad_norm', 'tokens', 'time_s', 'tokens_per_s',
              'tflops', 'step_ms', 'memory_gb'),
    'eval': ('val_loss', 'val_bpb', 'tokens', 'time_s'),
    'end': ('status', 'reason'),
}
AXES = ('tokens', 'flops', 'time')

# options that say how a run is recorded, kept or placed, not what is trained
NOT_WHAT_IS_TRAINED = {
    'out_dir', 'init_from', 'seed', 'eval_interval', 'eval_bytes',
    'log_interval', 'gradient_log_interval', 'checkpoint_interval',
    'always_save_checkpoint', 'keep_checkpoints', 'wandb_log',
    'wandb_project', 'wandb_run_name', 'device', 'compile',
    'activation_checkpointing', 'use_zero1', 'use_fsdp',
    'fsdp_reshard_after_forward', 'dist_timeout_s', 'step_timeout_s',
    'deterministic', 'peak_tflops', 'max_tokens', 'max_iters',
    'attention_backend', 'export_hf_at_end', 'profile', 'dry_run',
    'activation_memory_budget',
    # with both of them the batch is the same: tokens_per_iter says it
    'batch_size', 'gradient_accumulation_steps',
}

# A logged gradient norm is a spike if it is above SPIKE_RATIO times the
# median of the SPIKE_WINDOW logged ones before it (SPIKE_LEAST at least).
SPIKE_RATIO, SPIKE_WINDOW, SPIKE_LEAST = 3.0, 20, 10

# A step that takes so many times the median, and so long, is no step: the
# machine slept, or its clock was set.
JUMP_RATIO, JUMP_S = 20, 60


@dataclass
class RunSummary:
    """What the comparison needs of one run; None where it is not known."""

    folder: Path
    record: dict
    evals: list[dict]      # by step, those that are not void
    trains: list[dict]
    status: str            # finished, running, stopped, failed or incomplete
    damaged_lines: int
    skipped: int           # updates left out for a loss that is not finite
    segments: list['Segment']
    changes: list[str]     # of what is trained, by resumes
    clock_fault: str | None  # why its training time is not to be relied on
    label: str = ''        # tells it apart from the runs beside it
    configuration: str | None = None  # of a sweep
    suspicions: list[str] = field(default_factory=list)  # too good to be true
    results: list[dict] = field(default_factory=list)  # of eval.py

    @property
    def name(self) -> str:
        return f'{self.folder.parent.name}/{self.folder.name}'

    @property
    def last_eval(self) -> dict | None:
        return self.evals[-1] if self.evals else None

    @property
    def step(self) -> int:
        """The last one that is recorded."""
        return max((r['step'] for r in self.evals + self.trains), default=0)

    @property
    def tasks(self) -> dict[str, dict]:
        """{downstream task: its newest result} at the last evaluation."""
        last = self.last_eval
        return tasks_at(self.results, last['step']) if last else {}

    def median(self, key: str) -> float | None:
        """Median of a logged quantity over the steps that have it."""
        values = [t[key] for t in self.trains if t.get(key) is not None]
        return statistics.median(values) if values else None

    @property
    def tokens(self) -> int:
        return max((r['tokens'] for r in self.evals + self.trains), default=0)

    @property
    def flops(self) -> float:
        """Of the forward and backward passes whose updates count."""
        return self.tokens * self.record['flops_per_token']

    @property
    def train_s(self) -> float:
        """Of the updates that count, without evaluations and saving."""
        return max((r['time_s'] for r in self.evals + self.trains), default=0)

    @property
    def wall_s(self) -> float | None:
        """From start to end, evaluations and work lost in kills included,
        the time between a stop and its resume not."""
        walls = [segment.wall_s for segment in self.segments]
        return None if None in walls else sum(walls)

    @property
    def device_hours(self) -> float | None:
        """Wall time times processes; training time where a log of an earlier
        version has no wall time."""
        if any(s.world_size is None for s in self.segments):
            return None
        if self.wall_s is None:
            sizes = {s.world_size for s in self.segments}
            if len(sizes) > 1:
                return None
            return self.train_s * sizes.pop() / 3600
        return sum(s.wall_s * s.world_size for s in self.segments) / 3600

    @property
    def peak_memory_gb(self) -> float | None:
        return max((t['memory_gb'] for t in self.trains), default=None)

    @property
    def begun_from(self) -> str | None:
        """The model whose weights it began with, if it was not drawn anew."""
        source = self.record['options']['init_from']
        # auto resumes the run itself
        return None if source in ('scratch', 'auto') else source

    @property
    def spikes(self) -> list[int]:
        """Steps whose gradient norm is a spike; only logged ones are seen."""
        found, norms = [], []
        for t in self.trains:
            norm = t['grad_norm']
            if norm is None or not math.isfinite(norm):
                continue
            before = norms[-SPIKE_WINDOW:]
            if (len(before) >= SPIKE_LEAST
                    and norm > SPIKE_RATIO * statistics.median(before)):
                found.append(t['step'])
            norms.append(norm)
        return found

    def place(self, record: dict, axis: str) -> float:
        """Where on an axis a line of the log lies."""
        if axis == 'time':
            return record['time_s']
        tokens = record['tokens']
        return tokens * self.record['flops_per_token'] if (
            axis == 'flops') else tokens

    def curve(self, axis: str, key: str) -> list[tuple[float, float]]:
        """(place, value) of the evaluations after the first update."""
        return [(self.place(e, axis), e[key]) for e in self.evals
                if e['tokens'] > 0 and e[key] is not None]

    def configuration_key(self) -> str:
        """Equal for runs that differ in their seed alone."""
        record, options = self.record, self.record['options']
        return json.dumps([
            {k: v for k, v in record['architecture'].items()
             if k != 'attention_backend'},
            {k: v for k, v in options.items()
             if k not in NOT_WHAT_IS_TRAINED and k not in record['architecture']
             and k != 'dataset'},
            record['dataset']['fingerprint'], record['tokens_per_iter'],
            record['max_iters'], record['schedule'], record.get('dtype'),
            self.begun_from,
        ], sort_keys=True)


@dataclass
class Segment:
    """A run between a start or resume and the end or the next resume."""

    world_size: int | None
    device: str | None
    wall_s: float | None = None


def summarize(folder: Path) -> RunSummary:
    """RunError where its record is not understood."""
    record = read_record(folder)
    absent = [f'{part}.{key}'.removeprefix('.')
              for part, keys in NEEDED.items() for key in keys
              if key not in (record.get(part, {}) if part else record)]
    if absent:
        raise RunError(f'{folder / "run.json"} lacks {", ".join(absent)}: it '
                       'was written by another version; leave this run out')
    lines, damaged = read_lines(folder)
    records = without_void(lines)
    whole = [r for r in records if is_whole(r)]
    results, more = read_results(folder)
    damaged += len(records) - len(whole) + more
    ends = [r['status'] for r in whole if r['kind'] == 'end']
    status = ends[-1] if ends else (
        'running' if is_held(folder) else 'incomplete')
    trains = by_step(whole, 'train')
    evals = [r for r in by_step(whole, 'eval')
             if r['val_loss'] is not None]  # None: it was not finite
    return RunSummary(
        folder=folder, record=record, evals=evals, trains=trains,
        status=status, damaged_lines=damaged,
        skipped=sum(r['kind'] == 'skipped' for r in whole),
        segments=segments_of(record, lines), changes=changes_of(lines),
        clock_fault=clock_fault(evals, trains), results=results)


def is_whole(line: dict) -> bool:
    """It has what its kind needs, numbers where there should be some."""
    kind = line['kind']
    if any(key not in line for key in LINE.get(kind, ())):
        return False
    if kind in ('train', 'eval'):
        return all(isinstance(line[key], (int, float))
                   for key in ('step', 'tokens', 'time_s'))
    return True


def by_step(records: list[dict], kind: str) -> list[dict]:
    """Those of a kind, one a step, the last one written."""
    found = {r['step']: r for r in records if r['kind'] == kind}
    return [found[step] for step in sorted(found)]


def segments_of(record: dict, lines: list[dict]) -> list[Segment]:
    """One for the start, one for each resume; their wall time is None where
    the log has no clock, or one that ran backwards."""
    segments = [Segment(record['world_size'], record['device'])]
    clocks = [[]]
    for line in lines:
        if line['kind'] == 'resume':
            segments.append(Segment(line.get('world_size'),
                                    line.get('device')))
            clocks.append([])
        clocks[-1].append(line.get('unix_s'))
    for segment, clock in zip(segments, clocks, strict=True):
        if clock and None not in clock and clock == sorted(clock):
            segment.wall_s = clock[-1] - clock[0]
    return segments


def changes_of(lines: list[dict]) -> list[str]:
    """What resumes have changed of what is trained, in words."""
    return [f'{name}={value} from update {line["step"]} on'
            for line in lines if line['kind'] == 'resume'
            for name, value in line.get('options', {}).items()
            if name not in NOT_WHAT_IS_TRAINED - {'max_iters', 'max_tokens'}]


def clock_fault(evals: list[dict], trains: list[dict]) -> str | None:
    """A training time that runs backwards or jumps; None if it does not."""
    lines = sorted(evals + trains, key=lambda r: r['step'])
    for before, after in zip(lines, lines[1:], strict=False):
        if after['time_s'] < before['time_s']:
            return (f'its clock runs backwards between steps {before["step"]} '
                    f'and {after["step"]}')
    per_step = [(b['time_s'] - a['time_s']) / (b['step'] - a['step'])
                for a, b in zip(trains, trains[1:], strict=False)]
    usual = statistics.median(per_step) if per_step else 0
    for before, after, s in zip(trains, trains[1:], per_step, strict=False):
        steps = after['step'] - before['step']
        if s > JUMP_RATIO * usual and s * steps > JUMP_S:
            return (f'its clock jumps by {s * steps:.0f} s between steps '
                    f'{before["step"]} and {after["step"]}')
    return None


def time_fault(run: RunSummary) -> str | None:
    """Why the run's training time stands for no one machine."""
    if run.clock_fault:
        return run.clock_fault
    if any(s.world_size is None for s in run.segments):
        return 'it was resumed, and its log does not say on how many processes'
    if len({(s.world_size, s.device) for s in run.segments}) > 1:
        return 'it was resumed on another number of processes or device'
    return None
