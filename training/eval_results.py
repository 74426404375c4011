"""The results of eval.py, beside a run's metrics: RUN/evals.jsonl.

One JSON object a line, only ever appended to. Each has `kind` (validation,
text or task), the `step` whose weights were evaluated, and `unix_s`.

    python -c "from training.eval_results import read_results; \\
print(read_results('out-quickstart/latest'))"
"""

import json
import math
import time
from pathlib import Path

from training.durable import naming

FILE = 'evals.jsonl'
NEEDED = {'validation': ('loss', 'bpb'), 'text': ('path', 'loss', 'bpb'),
          'task': ('task', 'metrics', 'stderr', 'limit', 'num_fewshot')}


def append_results(run: Path, results: list[dict]):
    """Add lines to the run's file; numbers that are not finite become null."""
    path = Path(run) / FILE
    with naming(path), open(path, 'a+b') as file:
        # a killed writer may have left half a line; end it
        if file.tell():
            file.seek(-1, 2)
            if file.read() != b'\n':
                file.write(b'\n')
        for result in results:
            line = json.dumps(plain({**result, 'unix_s': time.time()}))
            file.write(line.encode() + b'\n')


def plain(value):
    """As JSON can hold it: without NaN and infinity."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_results(run) -> tuple[list[dict], int]:
    """(results in the order written, number of damaged lines)."""
    path, results, damaged = Path(run) / FILE, [], 0
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            result = json.loads(line)
            whole = isinstance(result['step'], int) and all(
                key in result for key in NEEDED[result['kind']])
        except (ValueError, LookupError, TypeError):
            whole = False
        if whole:
            results.append(result)
        else:
            damaged += bool(line.strip())
    return results, damaged


def tasks_at(results: list[dict], step: int) -> dict[str, dict]:
    """{task: its newest result} of the weights of a step."""
    return {r['task']: r for r in results
            if r['kind'] == 'task' and r['step'] == step}


def main_metric(result: dict) -> str | None:
    """The metric to show of a task: accuracy over normalised lengths where
    there is one, else the first that the task names."""
    metrics = result['metrics']
    return 'acc_norm' if 'acc_norm' in metrics else next(iter(metrics), None)
