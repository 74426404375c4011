"""The tables of a comparison, as columns of text for terminal and report."""

import math
from dataclasses import dataclass

from training.comparison import METRICS, Group, Lead
from training.eval_results import main_metric
from training.run_summary import RunSummary
from training.sanity import slopes
from training.spread import difference
from training.terminal import duration, number, short


@dataclass
class Table:
    """Rows of text under a head; the last column is a name, flush left."""

    title: str
    head: tuple
    rows: list[tuple]


def run_tables(runs: list[RunSummary], dollars=None) -> list[Table]:
    """Three narrow tables in place of a wide one."""
    mfu = any(run.median('mfu') for run in runs)
    speed = ('MFU', 'causal MFU') if mfu else ('FLOP/s', 'causal')
    results = Table('results', (
        'preset', 'params', 'depth', 'tokens', 'bits/byte', 'loss', 'tok/s',
        speed[0], 'GB', 'run'), [(
            run.record['arch_preset'],
            short(run.record['parameters']['total']),
            str(run.record['architecture']['n_layer']),
            short((run.last_eval or {}).get('tokens')),
            number((run.last_eval or {}).get('val_bpb'), '.4f'),
            number((run.last_eval or {}).get('val_loss'), '.4f'),
            short(run.median('tokens_per_s')), speeds(run, mfu)[0],
            number(run.peak_memory_gb, '.1f'), run.label + notes(run))
            for run in runs])
    shapes = Table('models and rates', (
        'non-emb', 'width', 'heads', 'd_ff', 'FLOPs/token', 'lr', 'tok/iter',
        'seed', 'run'), [(
            short(run.record['parameters']['non_embedding']),
            str(run.record['architecture']['n_embd']), heads(run),
            str(run.record['architecture']['d_ff']),
            short(run.record['flops_per_token']),
            f'{run.record["schedule"]["learning_rate"]:g}',
            short(run.record['tokens_per_iter']),
            str(run.record['options']['seed']), run.label) for run in runs])
    costs = Table('cost and course', (
        'FLOPs', 'slope', 'perplexity', speed[1], 'spikes', 'training', 'wall',
        'hours', *(['$'] if dollars else []), 'run'), [(
            short(run.flops), number(last_slope(run), '.2f'), perplexity(run),
            speeds(run, mfu)[1],
            str(len(run.spikes)), duration(run.train_s),
            '-' if run.wall_s is None else duration(run.wall_s),
            number(run.device_hours, '.3g'),
            *([number(run.device_hours and run.device_hours * dollars, '.2f')]
              if dollars else []), run.label) for run in runs])
    return [results, shapes, costs]


def task_tables(runs: list[RunSummary]) -> list[Table]:
    """A column for each downstream task that eval.py has given a run, three
    of them a table."""
    metrics = {}  # {task: what to show of it}
    for run in runs:
        for task, result in run.tasks.items():
            metrics.setdefault(task, main_metric(result))

    def value(run, task, metric):
        result = run.tasks.get(task)
        return number(result and result['metrics'].get(metric), '.4f')

    shown = list(metrics.items())
    parts = [shown[at:at + 3] for at in range(0, len(shown), 3)]
    return [Table(
        'downstream tasks',
        ('preset', *(f'{task} {metric}' for task, metric in part), 'run'),
        [(run.record['arch_preset'],
          *(value(run, *column) for column in part), run.label)
         for run in runs]) for part in parts]


def task_notes(runs: list[RunSummary]) -> list[str]:
    """What makes results of one task no comparison."""
    notes = []
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        asked = {tuple(run.tasks[task].get(key) for key in (
            'num_fewshot', 'limit', 'questions', 'version'))
            for run in runs if task in run.tasks}
        if len(asked) > 1:
            notes.append(
                f'{task}: not comparable, since the runs answered different '
                'questions (' + '; '.join(sorted(
                    f'num_fewshot {shots}, limit {limit}, {n} questions, '
                    f'version {version}'
                    for shots, limit, n, version in asked)) + ')')
    return notes


def speeds(run, mfu: bool) -> tuple[str, str]:
    """By the full count of FLOPs and by the causal one: MFU, or FLOP/s."""
    if mfu:
        return (number(run.median('mfu'), '.1%'),
                number(run.median('mfu_causal'), '.1%'))
    full = run.median('tflops')
    causal = full and full * (run.record['flops_per_token_causal']
                              / run.record['flops_per_token'])
    return (short(full and full * 1e12), short(causal and causal * 1e12))


def heads(run) -> str:
    a = run.record['architecture']
    return f'{a["n_head"]}:{a["num_key_value_heads"]}x{a["head_dim"]}'


def last_slope(run) -> float | None:
    """Of the validation loss in log-log over its last stretch."""
    found = slopes(run.curve('tokens', 'val_loss'))
    return found[-1][1] if found else None


def perplexity(run) -> str:
    """Per token: comparable under one tokenizer only."""
    loss = (run.last_eval or {}).get('val_loss')
    if loss is None:
        return '-'
    return short(math.exp(loss)) if loss < 700 else 'inf'


def notes(run) -> str:
    """' (stopped, 2 damaged)', '' for a run that is whole."""
    found = ['SUSPECT'] if run.suspicions else []
    if run.status != 'finished':
        found.append(run.status)
    if run.damaged_lines:
        found.append(f'{run.damaged_lines} damaged')
    return f' ({", ".join(found)})' if found else ''


def state(run) -> str | None:
    """What is not whole about a run, in full; None if all is."""
    found = []
    if run.status != 'finished':
        what = {'incomplete': 'ended without a word (killed, or the machine '
                              'went down)'}.get(run.status, run.status)
        found.append(f'{what} at update {run.step} of '
                     f'{run.record["max_iters"]}')
    if run.damaged_lines:
        found.append(f'{run.damaged_lines} damaged line(s) left out of its '
                     'log')
    if run.skipped:
        found.append(f'{run.skipped} update(s) left out, not finite')
    if run.changes:
        found.append(f'resumed with {", ".join(run.changes)}')
    return f'{run.label}: {"; ".join(found)}' if found else None


def group_table(lead: Lead) -> Table:
    """Each configuration at the common budget: mean, spread, distance."""
    rows = []
    for i, (group, spread) in enumerate(
            zip(lead.groups, lead.spreads, strict=True)):
        run = group.runs[0]
        behind = lead.behind(i) if i else None
        rows.append((
            str(spread.n), short(run.record['parameters']['total']),
            short(run.record['parameters']['non_embedding']),
            short(run.flops), rate(group),
            f'{spread.mean:.4f}', number(spread.sd, '.4f'),
            number(behind and behind.value, '+.4f'),
            number(behind and behind.margin, '.4f'),
            '' if behind is None else verdict(behind), group.label))
    return Table(
        f'{METRICS[lead.key]} at {budget_text(lead)}',
        ('n', 'params', 'non-emb', 'FLOPs', 'lr', 'mean', 'sd',
         'behind', '+-', 'seeds?', 'configuration'), rows)


def rate(group: Group) -> str:
    """The learning rate; '!' if it was the edge of what tuning tried."""
    lr = group.runs[0].record['schedule']['learning_rate']
    return f'{lr:g}' + ('!' if group.cell.get('edge') else '')


def verdict(diff) -> str:
    return {True: 'exceeds', False: 'within', None: 'unknown'}[diff.exceeds]


def budget_text(lead: Lead) -> str:
    return amount(lead.axis, lead.budget)


def amount(axis: str, x: float) -> str:
    if axis == 'time':
        return f'{duration(x)} of training'
    return f'{short(x)} {"tokens" if axis == "tokens" else "FLOPs"}'


def walk_table(lead: Lead, pool, groups: list[Group]) -> Table:
    """What each step of a walk changed; `pool` is the spread of seeds."""
    at = {group.label: spread for group, spread in
          zip(lead.groups, lead.spreads, strict=True)}
    rows, before = [], None
    for group in groups:
        spread = at.get(group.label)
        if spread is None:  # it failed: what follows has no step before it
            before = None
            continue
        change = before and difference(before, spread, pool=pool,
                                       pairs=len(groups) - 1)
        run = group.runs[0]
        rows.append((
            f'{spread.mean:.4f}', str(spread.n),
            number(change and change.value, '+.4f'),
            number(change and change.margin, '.4f'),
            verdict(change) if change else '',
            short(run.record['parameters']['total']),
            short(run.record['flops_per_token']), rate(group), group.label))
        before = spread
    return Table(f'the walk, {METRICS[lead.key]} at {budget_text(lead)}',
                 ('value', 'n', 'change', '+-', 'seeds?', 'params',
                  'FLOPs/token', 'lr', 'step'), rows)
