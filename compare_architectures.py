"""Compare trained runs: a table ranked by bits per byte, and their curves.

Runs are out_dirs of train.py (their newest run) or run folders.

    python compare_architectures.py --latest 4 --plot comparison.png
"""

import argparse
import statistics
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from training.bigram import bigram_baseline
from training.data_loader import EvalSet
from training.dataset import DatasetError, open_dataset
from training.run_log import (
    RunError,
    find_runs,
    is_running,
    read_metrics,
    read_record,
    resolve_run,
)

# what is read of a run's record
NEEDED = {
    '': ('arch_preset', 'architecture', 'parameters', 'dataset'),
    'parameters': ('total',),
    'dataset': ('folder', 'fingerprint', 'eval_text_sha256', 'eval_tokens',
                'eval_bytes_wanted'),
}
PLOT_FORMATS = ('.png', '.svg', '.pdf')


@dataclass
class RunSummary:
    """What the comparison needs of one run; None where it is not known."""

    folder: Path
    record: dict
    evals: list[dict]
    trains: list[dict]
    status: str            # finished, running, stopped, failed or incomplete
    damaged_lines: int

    @property
    def name(self) -> str:
        return f'{self.folder.parent.name}/{self.folder.name}'

    @property
    def last_eval(self) -> dict | None:
        return self.evals[-1] if self.evals else None

    def median(self, key: str) -> float | None:
        """Median of a logged quantity over the steps that have it."""
        values = [t[key] for t in self.trains if t.get(key) is not None]
        return statistics.median(values) if values else None

    @property
    def peak_memory_gb(self) -> float | None:
        return max((t['memory_gb'] for t in self.trains), default=None)


def summarize(folder: Path) -> RunSummary:
    record = read_record(folder)
    absent = [f'{part}.{key}'.removeprefix('.')
              for part, keys in NEEDED.items() for key in keys
              if key not in (record.get(part, {}) if part else record)]
    if absent:
        raise RunError(f'{folder / "run.json"} lacks {", ".join(absent)}: it '
                       'was written by another version; leave this run out')
    records, damaged = read_metrics(folder)
    ends = [r['status'] for r in records if r['kind'] == 'end']
    status = ends[-1] if ends else (
        'running' if is_running(folder) else 'incomplete')
    return RunSummary(
        folder=folder, record=record,
        evals=[r for r in records if r['kind'] == 'eval'
               and r['val_loss'] is not None],  # None: it was not finite
        trains=[r for r in records if r['kind'] == 'train'],
        status=status, damaged_lines=damaged)


def rank(runs: list[RunSummary]) -> tuple[list[RunSummary], str, list[str]]:
    """(runs best first, what they are ranked by, what forbids ranking).

    Bits per byte of the same text are comparable under any tokenizer; loss
    per token only under one.
    """
    reasons = []
    scored = [run for run in runs if run.last_eval]
    if len(scored) < len(runs):
        absent = [run.name for run in runs if not run.last_eval]
        reasons.append(f'no evaluation yet: {", ".join(absent)}')
    data = [run.record['dataset'] for run in scored]
    one_text = len({d['eval_text_sha256'] for d in data}) == 1
    have_bytes = all(run.last_eval['val_bpb'] is not None for run in scored)
    one_dataset = len({d['fingerprint'] for d in data}) == 1
    key, label = 'val_bpb', 'bits per byte'
    if scored and not have_bytes:
        key, label = 'val_loss', 'loss per token'
        if not one_dataset or len({d['eval_tokens'] for d in data}) > 1:
            reasons.append('no bits per byte in every run, and loss per token '
                           'is not comparable between datasets')
    elif scored and not one_text:
        reasons.append(
            'evaluated on different validation text; make the datasets from '
            'the same documents and use one eval_bytes')
    if len({run.last_eval['tokens'] for run in scored}) > 1:
        reasons.append('trained on different numbers of tokens')
    ranked = sorted(scored, key=lambda run: run.last_eval[key])
    return (ranked + [run for run in runs if not run.last_eval], label,
            reasons)


def columns(runs: list[RunSummary]) -> tuple:
    speed = 'MFU' if any(run.median('mfu') for run in runs) else 'TFLOP/s'
    return ('preset', 'params', 'depth', 'tokens', 'bits/byte', 'loss',
            'tok/s', speed, 'GB', 'run')


def row(run: RunSummary, label: str) -> tuple:
    record, last = run.record, run.last_eval or {}
    mfu = run.median('mfu')
    notes = [] if run.status == 'finished' else [run.status]
    if run.damaged_lines:
        notes.append(f'{run.damaged_lines} damaged')
    if notes:
        label += f' ({", ".join(notes)})'
    return (
        record['arch_preset'], short(record['parameters']['total']),
        str(record['architecture']['n_layer']), short(last.get('tokens')),
        number(last.get('val_bpb'), '.4f'), number(last.get('val_loss'), '.4f'),
        short(run.median('tokens_per_s')),
        f'{mfu:.1%}' if mfu else number(run.median('tflops'), '.2f'),
        number(run.peak_memory_gb, '.1f'), label)


def labels(runs: list[RunSummary]) -> list[str]:
    """The shortest names that tell the runs apart."""
    for name in (lambda run: run.folder.parent.name,
                 lambda run: run.folder.name, lambda run: run.name):
        names = [name(run) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def short(value) -> str:
    """1234567 -> 1.23M; None -> '-'."""
    if value is None:
        return '-'
    for unit, size in (('T', 1e12), ('B', 1e9), ('M', 1e6), ('k', 1e3)):
        if value >= size:
            return f'{value / size:.3g}{unit}'
    return f'{value:.3g}'


def number(value, spec, unit='') -> str:
    return '-' if value is None else format(value, spec) + unit


def table(head: tuple, rows: list[tuple]) -> str:
    """Columns of text: the first and the last flush left, numbers right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return '\n'.join(
        '  '.join(cell.ljust(width) if i in (0, len(widths) - 1)
                  else cell.rjust(width)
                  for i, (cell, width) in enumerate(
                      zip(line, widths, strict=True))).rstrip()
        for line in lines)


def baseline(runs: list[RunSummary]) -> tuple[float, float | None] | None:
    """The bigram baseline of the dataset that all runs share, if it is here."""
    data = runs[0].record['dataset']
    if len({run.record['dataset']['fingerprint'] for run in runs}) > 1:
        print('no bigram baseline: the runs have different datasets')
        return None
    try:
        dataset = open_dataset(data['folder'])
    except DatasetError as error:
        print(f'no bigram baseline: {str(error).splitlines()[0]}')
        return None
    if dataset.fingerprint != data['fingerprint']:
        print('no bigram baseline: the dataset has changed since the runs')
        return None
    eval_set = EvalSet(
        dataset.split('val'), eval_bytes=data['eval_bytes_wanted'],
        block_size=1, eot_id=dataset.eot_id)
    return bigram_baseline(dataset, eval_set)


def plot(runs: list[RunSummary], label: str, base, path: Path):
    """Validation curves against tokens, as a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    bits = label == 'bits per byte'
    key = 'val_bpb' if bits else 'val_loss'
    figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
    for run in runs:
        points = [(e['tokens'], e[key]) for e in run.evals if e['tokens'] > 0]
        if points:
            axes.plot(*zip(*points), marker='o', markersize=3,
                      label=f'{run.record["arch_preset"]}, '
                            f'{short(run.record["parameters"]["total"])} '
                            f'({points[-1][1]:.3f})')
    if base is not None and base[bits] is not None:
        axes.axhline(base[bits], color='grey', linestyle='--',
                     label=f'interpolated bigram ({base[bits]:.3f})')
    axes.set(xlabel='training tokens', ylabel=f'validation {label}',
             title='Validation ' + label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('runs', nargs='*', metavar='RUN',
                        help='an out_dir or a run folder')
    parser.add_argument('--latest', type=int, metavar='N',
                        help='the N newest runs in out*/')
    parser.add_argument('--plot', default='comparison.png', metavar='FILE',
                        help='where the curves go (default: %(default)s)')
    parser.add_argument('--print_best', action='store_true',
                        help="print nothing but the best run's folder")
    arguments = parser.parse_args(argv)
    if arguments.latest is not None and arguments.latest < 1:
        parser.error(f'--latest {arguments.latest} must be at least 1')
    if not arguments.runs and arguments.latest is None:
        parser.error('name the runs, or take the newest with --latest N')
    return arguments


def check_plot(path: Path):
    """Before any work: a name that a picture can be written to."""
    if path.suffix not in PLOT_FORMATS:
        raise RunError(f'--plot {path}: name a file that ends in one of '
                       f'{", ".join(PLOT_FORMATS)}')
    if not path.absolute().parent.is_dir():
        raise RunError(f'--plot {path}: {path.parent} is not a folder')


def resolve_all(paths: list[str]) -> list[Path]:
    """Their run folders, or one error that names all that are none."""
    folders, problems = [], []
    for path in paths:
        try:
            folders.append(resolve_run(path))
        except RunError as error:
            problems.append(str(error))
    if problems:
        raise RunError('\n  '.join(problems))
    return folders


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    try:
        check_plot(Path(arguments.plot))
        folders = resolve_all(arguments.runs)
        if arguments.latest:
            found = find_runs()[:arguments.latest]
            if not found:
                raise RunError('no runs in out*/: train one first, e.g. '
                               'python train.py config/quickstart.py')
            folders += [run for run in found if run.resolve() not in folders]
        runs = [summarize(folder) for folder in folders]
    except RunError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2

    ranked, label, reasons = rank(runs)
    if arguments.print_best:
        if reasons:
            print('error: ' + '; '.join(reasons), file=sys.stderr)
            return 2
        print(ranked[0].folder)
        return 0
    print(table(columns(ranked), [
        row(run, name)
        for run, name in zip(ranked, labels(ranked), strict=True)]))
    base = baseline(runs)
    if base is not None:
        bits = '' if base[1] is None else f'{base[1]:.4f} bits per byte, '
        print('\nbaseline: interpolated bigrams of the training split, '
              f'{bits}loss {base[0]:.4f}')
    if reasons:
        print('\nnot ranked:')
        for reason in reasons:
            print(textwrap.fill(reason, 80, initial_indent='  ',
                                subsequent_indent='  '))
    elif len(ranked) > 1:
        best = ranked[0]
        print(f'\nbest by {label} at {short(best.last_eval["tokens"])} tokens: '
              f'{best.record["arch_preset"]} ({best.name})')
    plot(ranked, label, base, Path(arguments.plot))
    print(f'curves: {arguments.plot}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
