"""Compare runs: which leads at equal tokens, FLOPs and time, and is it real?

A RUN is an out_dir of train.py (its newest run), a run folder, or the folder
of a sweep (all its runs). See docs/comparing.md.

    python compare_architectures.py --latest 4 --report report.html
    python compare_architectures.py out-sweep_rope_theta --by flops
"""

import argparse
import csv
import shlex
import sys
import textwrap
from pathlib import Path

from training.bigram import bigram_baseline
from training.comparison import METRICS, Lead, Refusal, lead
from training.comparison_input import Comparison, gather
from training.data_loader import EvalSet
from training.dataset import DatasetError, open_dataset
from training.durable import write_json
from training.run_log import RunError
from training.run_summary import AXES, RunSummary
from training.sanity import ADVICE
from training.tables import (
    Table,
    amount,
    budget_text,
    group_table,
    run_tables,
    state,
    task_notes,
    task_tables,
    verdict,
    walk_table,
)
from training.terminal import WIDTH, format_table

PLOT_FORMATS = ('.png', '.svg', '.pdf')
OUTPUTS = {'plot': PLOT_FORMATS, 'report': ('.html', '.htm'),
           'csv': ('.csv',), 'json': ('.json',)}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('runs', nargs='*', metavar='RUN',
                        help="an out_dir, a run folder or a sweep's folder")
    parser.add_argument('--latest', type=int, metavar='N',
                        help='the N newest runs in out*/')
    parser.add_argument('--by', choices=AXES, default='tokens',
                        help='the budget at which the tables rank (default: '
                             '%(default)s)')
    parser.add_argument('--report', metavar='FILE.html',
                        help='tables, curves and configurations on one page')
    parser.add_argument('--plot', metavar='FILE.png',
                        help=f'the pictures ({", ".join(PLOT_FORMATS)})')
    parser.add_argument('--csv', metavar='FILE.csv', help='a row a run')
    parser.add_argument('--json', metavar='FILE.json',
                        help='all of it, unrounded')
    parser.add_argument('--dollars_per_gpu_hour', type=float, metavar='X',
                        help='adds the estimated cost')
    parser.add_argument('--keep_suspects', action='store_true',
                        help='rank runs that look too good to be true as well')
    parser.add_argument('--print_best', action='store_true',
                        help="print nothing but the best run's folder")
    arguments = parser.parse_args(argv)
    if arguments.latest is not None and arguments.latest < 1:
        parser.error(f'--latest {arguments.latest} must be at least 1')
    if not arguments.runs and arguments.latest is None:
        parser.error('name the runs, or take the newest with --latest N')
    dollars = arguments.dollars_per_gpu_hour
    if dollars is not None and dollars <= 0:
        parser.error('--dollars_per_gpu_hour must be above 0')
    return arguments


def check_outputs(arguments):
    """Before any work: names that can be written to, outside of the runs."""
    problems = []
    for name, endings in OUTPUTS.items():
        if getattr(arguments, name) is None:
            continue
        path = Path(getattr(arguments, name))
        if path.suffix not in endings:
            problems.append(f'--{name} {path}: name a file that ends in '
                            f'{" or ".join(endings)}')
        folder = path.absolute().parent
        if not folder.is_dir():
            problems.append(f'--{name} {path}: {path.parent} is not a folder')
        elif any((p / 'run.json').exists() for p in
                 [folder.resolve(), *folder.resolve().parents]):
            problems.append(f'--{name} {path} lies in the folder of a run, '
                            'which holds what training wrote: name another')
    if problems:
        raise RunError('\n  '.join(problems))


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    try:
        check_outputs(arguments)
        comparison = gather(arguments.runs, arguments.latest)
    except RunError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    groups = comparison.groups
    if not arguments.keep_suspects:
        groups = sound_groups(comparison)
    leads = {axis: lead(groups, axis) for axis in AXES}
    for found in leads.values():
        if isinstance(found, Lead):  # of seeds elsewhere, where these have none
            found.pool = found.pool or comparison.pool
    if arguments.print_best:
        return print_best(comparison, leads[arguments.by])
    runs = in_order(comparison.runs, leads[arguments.by])
    tables = run_tables(runs, arguments.dollars_per_gpu_hour)
    tables += result_tables(comparison, leads[arguments.by])
    tables += task_tables(runs)
    base, base_note = baseline(runs)
    warnings = [warning(run, arguments.keep_suspects)
                for run in comparison.runs if run.suspicions]
    lines = findings(comparison, leads)
    lines += [*task_notes(runs), base_note]

    for line in warnings:
        print(fill(line) + '\n')
    narrow = all(is_narrow(table) for table in tables[:3])
    for i, table in enumerate(tables):
        keyed = not narrow if i < 3 else not is_narrow(table)
        print(terminal(table, keyed, legend=i not in (1, 2)) + '\n')
    for line in lines:
        print(fill(line))
    command = 'python compare_architectures.py ' + shlex.join(
        sys.argv[1:] if argv is None else argv)
    if arguments.csv:
        write_csv(Path(arguments.csv), runs, arguments.dollars_per_gpu_hour)
    if arguments.json:
        write_json(Path(arguments.json), everything(
            runs, leads, warnings + lines, command,
            arguments.dollars_per_gpu_hour))
    if arguments.plot or arguments.report:  # matplotlib takes a second
        from training.figures import save_pictures
        from training.report import write_report
        if arguments.plot:
            save_pictures(Path(arguments.plot), comparison, base)
        if arguments.report:
            write_report(Path(arguments.report), comparison, tables, warnings,
                         lines, command, base)
    for name in OUTPUTS:
        if getattr(arguments, name):
            print(f'{name}: {getattr(arguments, name)}')
    return 0


def sound_groups(comparison: Comparison) -> list:
    """Without the runs that are too good to be true."""
    groups = []
    for group in comparison.groups:
        kept = [run for run in group.runs if not run.suspicions]
        if kept:
            groups.append(type(group)(group.label, kept, group.cell))
    return groups


def in_order(runs: list[RunSummary], found: Lead | Refusal):
    """Best first by the value at the common budget; what has none, last."""
    if isinstance(found, Refusal):
        return runs
    at = {id(run): value
          for group, spread in zip(found.groups, found.spreads, strict=True)
          for run, value in zip(group.runs, spread.values, strict=True)}
    return sorted(runs, key=lambda run: at.get(id(run), float('inf')))


def print_best(comparison, found) -> int:
    if isinstance(found, Refusal):
        print('error: ' + '; '.join(found.reasons), file=sys.stderr)
        return 2
    for run in comparison.runs:
        if run.suspicions:
            print(f'warning: {run.label}: {"; ".join(run.suspicions)}',
                  file=sys.stderr)
    absent = [run.label for run in comparison.runs if not run.last_eval]
    if absent:
        print(f'error: no evaluation yet: {", ".join(absent)}',
              file=sys.stderr)
        return 2
    print(in_order(found.best.runs, found)[0].folder)
    return 0


def result_tables(comparison: Comparison, found) -> list[Table]:
    """Configurations with their seeds, and the steps of a walk."""
    if isinstance(found, Refusal):
        return []
    tables = []
    if comparison.sweep or any(s.n > 1 for s in found.spreads):
        tables.append(group_table(found))
    if comparison.sweep and comparison.sweep['options'].get('walk_from'):
        order = {c['label']: i for i, c in
                 enumerate(comparison.sweep['configurations'])}
        groups = sorted(comparison.groups, key=lambda g: order[g.label])
        tables.append(walk_table(found, found.pool, groups))
    return tables


def is_narrow(table: Table) -> bool:
    text = format_table(table.head, table.rows)
    return max(map(len, text.splitlines())) <= WIDTH


def terminal(table: Table, keyed: bool, legend: bool) -> str:
    """Its text; `keyed`: names, too long for the line, stand below."""
    if not keyed:
        return f'{table.title}\n{format_table(table.head, table.rows)}'
    keys = [f'[{i + 1}]' for i in range(len(table.rows))]
    text = format_table(table.head, [
        (*row[:-1], key) for row, key in zip(table.rows, keys, strict=True)])
    names = [f'\n{key} {row[-1]}'
             for row, key in zip(table.rows, keys, strict=True)]
    return f'{table.title}\n{text}{"".join(names) if legend else ""}'


def fill(line: str) -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent='  ',
                         break_long_words=False, break_on_hyphens=False)


def warning(run: RunSummary, kept: bool) -> str:
    fate = 'ranked all the same' if kept else (
        'not ranked; --keep_suspects ranks it')
    return (f'WARNING: {run.label} is too good to be true: '
            f'{"; ".join(run.suspicions)}. '
            f'{ADVICE} ({fate}).')


def findings(comparison: Comparison, leads: dict) -> list[str]:
    """Who leads at which budget, or why nobody does."""
    lines = comparison.problems + [
        text for run in comparison.runs if (text := state(run))]
    absent = [run.label for run in comparison.runs
              if not run.curve('tokens', 'val_loss')]
    if absent:
        lines.append('no evaluation after the first update yet: '
                     + ', '.join(absent))
    if len(comparison.groups) > 1 and all(
            isinstance(f, Lead) and len(f.groups) == 1
            for f in leads.values()):
        lines.append('not ranked: one configuration alone is left')
    refused: dict[str, list[str]] = {}
    for axis, found in leads.items():
        if isinstance(found, Refusal):
            for reason in found.reasons:
                refused.setdefault(reason, []).append(axis)
        else:
            lines += tell_lead(found)
    lines += [f'not ranked at equal {", ".join(axes)}: {reason}'
              for reason, axes in refused.items()]
    if any(g.cell.get('edge') for g in comparison.groups):
        lines.append('a rate marked ! was the edge of what its tuning tried: '
                     'a better one may lie beyond, so its configuration may '
                     'be better than it looks')
    if comparison.spread_from:
        lines.append(f'+- from the spread of the seeds of '
                     f'{comparison.spread_from}, {comparison.pool[0]:.4f} '
                     f'with {comparison.pool[1]} degrees of freedom')
    return lines


def tell_lead(found: Lead) -> list[str]:
    """The best at a budget, how sure that is, and who led before."""
    if len(found.groups) == 1:
        return []
    best, second = found.groups[:2]
    behind = found.behind(1)
    sure = {
        'exceeds': f'more than seeds explain (+-{behind.margin or 0:.4f})',
        'within': f'within what seeds explain (+-{behind.margin or 0:.4f}): '
                  'undecided',
        'unknown': 'one seed each: nobody knows what another would change',
    }[verdict(behind)]
    name = best.label
    if len(best.runs) == 1:
        name = f'{best.runs[0].record["arch_preset"]} ({best.runs[0].name})'
    lines = [f'best by {METRICS[found.key]} at {budget_text(found)}: {name}, '
             f'{found.spreads[0].mean:.4f}; '
             f'{second.label} is {behind.value:.4f} behind, {sure}']
    if len(found.leaders) > 1:
        lines.append('  before that: ' + ', '.join(
            f'{group.label} from {amount(found.axis, x)}'
            for x, group in found.leaders[:-1]))
    if len({run.tokens for g in found.groups for run in g.runs}) > 1:
        lines.append(f'  no run is judged beyond {budget_text(found)}, where '
                     f'{found.bounded_by.label} ends')
    return lines + [f'  {note}' for note in found.notes]


def baseline(runs: list[RunSummary]):
    """((nats per token, bits per byte) of bigrams or None, a line on it)."""
    data = runs[0].record['dataset']
    if len({run.record['dataset']['fingerprint'] for run in runs}) > 1:
        return None, 'no bigram baseline: the runs have different datasets'
    try:
        dataset = open_dataset(data['folder'])
    except DatasetError as error:
        return None, f'no bigram baseline: {str(error).splitlines()[0]}'
    if dataset.fingerprint != data['fingerprint']:
        return None, ('no bigram baseline: the dataset has changed since the '
                      'runs')
    eval_set = EvalSet(
        dataset.split('val'), eval_bytes=data['eval_bytes_wanted'],
        block_size=1, eot_id=dataset.eot_id)
    base = bigram_baseline(dataset, eval_set)
    bits = '' if base[1] is None else f'{base[1]:.4f} bits per byte, '
    return base, ('baseline: interpolated bigrams of the training split, '
                  f'{bits}loss {base[0]:.4f}')


def row_of(run: RunSummary, dollars) -> dict:
    """All figures of a run, unrounded."""
    record, last = run.record, run.last_eval or {}
    a = record['architecture']
    return {
        'run': str(run.folder), 'label': run.label,
        'configuration': run.configuration, 'status': run.status,
        'step': run.step, 'max_iters': record['max_iters'],
        'damaged_lines': run.damaged_lines, 'left_out_updates': run.skipped,
        'arch_preset': record['arch_preset'],
        'parameters': record['parameters']['total'],
        'non_embedding': record['parameters']['non_embedding'],
        **{k: a[k] for k in ('n_layer', 'n_embd', 'n_head',
                             'num_key_value_heads', 'head_dim', 'd_ff')},
        'seed': record['options']['seed'],
        'learning_rate': record['schedule']['learning_rate'],
        'tokens': run.tokens, 'flops': run.flops,
        'flops_per_token': record['flops_per_token'],
        'val_bpb': last.get('val_bpb'), 'val_loss': last.get('val_loss'),
        'tokens_per_s': run.median('tokens_per_s'),
        'mfu': run.median('mfu'), 'mfu_causal': run.median('mfu_causal'),
        'tflops': run.median('tflops'), 'memory_gb': run.peak_memory_gb,
        'spikes': len(run.spikes), 'train_s': run.train_s,
        'wall_s': run.wall_s, 'device_hours': run.device_hours,
        'dollars': dollars and run.device_hours
        and run.device_hours * dollars,
        'device': record['device'], 'world_size': record['world_size'],
        **{f'{task}/{metric}{kind}': value
           for task, result in run.tasks.items()
           for kind, values in (('', result['metrics']),
                                ('_stderr', result['stderr']))
           for metric, value in values.items()},
    }


def write_csv(path: Path, runs, dollars):
    rows = [row_of(run, dollars) for run in runs]
    with open(path, 'w', newline='') as file:
        # a run may have no result of a task
        writer = csv.DictWriter(
            file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)


def everything(runs, leads, lines, command, dollars) -> dict:
    """What --json has, unrounded."""
    def told(found):
        if isinstance(found, Refusal):
            return {'refused': found.reasons}
        return {
            'metric': found.key, 'budget': found.budget,
            'notes': found.notes,
            'leaders': [[x, group.label] for x, group in found.leaders],
            'order': [{
                'configuration': group.label, 'values': spread.values,
                'mean': spread.mean, 'sd': spread.sd,
                'runs': [run.label for run in group.runs],
                'behind': found.behind(i).value if i else 0.0,
                'margin': found.behind(i).margin if i else None,
            } for i, (group, spread) in enumerate(
                zip(found.groups, found.spreads, strict=True))]}

    return {
        'command': command, 'runs': [row_of(run, dollars) for run in runs],
        'leads': {axis: told(found) for axis, found in leads.items()},
        'findings': lines}


if __name__ == '__main__':
    sys.exit(main())
