"""Which run leads at equal tokens, FLOPs or time, and whether it is real.

Values at a common budget are read off the validation curves, between two
evaluations on a straight line over the logarithm of the budget, and never
beyond the last. Bits per byte of the same text are comparable under any
tokenizer, loss per token only under one.
"""

import math
from dataclasses import dataclass, field

from training.optimizer import learning_rate_at
from training.run_summary import RunSummary, time_fault
from training.spread import Difference, Spread, difference, pooled

METRICS = {'val_bpb': 'bits per byte', 'val_loss': 'loss per token'}


@dataclass
class Group:
    """The runs of one configuration; they differ in their seed."""

    label: str
    runs: list[RunSummary]
    cell: dict = field(default_factory=dict)  # of a sweep, its sweep.json

    def spread_at(self, axis, key, budget) -> Spread:
        return Spread([value_at(run.curve(axis, key), budget)
                       for run in self.runs])


@dataclass
class Lead:
    """The order of the configurations at one budget."""

    axis: str
    key: str                     # val_bpb or val_loss
    budget: float                # the largest that all runs have reached
    bounded_by: RunSummary       # the run that reaches no further
    groups: list[Group]          # best first
    spreads: list[Spread]        # of the groups, in their order
    pool: tuple[float, int] | None  # within all configurations
    leaders: list[tuple[float, Group]]  # (from which budget on, who leads)
    notes: list[str]

    @property
    def best(self) -> Group:
        return self.groups[0]

    def behind(self, i: int) -> Difference:
        """How far the i-th lies behind the first, one of all pairs."""
        n = len(self.groups)
        return difference(self.spreads[0], self.spreads[i], pool=self.pool,
                          pairs=n * (n - 1) // 2)


@dataclass
class Refusal:
    """Why there is no order."""

    axis: str
    reasons: list[str]


def value_at(curve: list[tuple[float, float]], x: float) -> float | None:
    """The curve at x: straight over log x between two points of it, None
    outside of them. Points (x, y) with x > 0, in order."""
    before = None
    for point in curve:
        if point[0] == x:
            return point[1]
        if point[0] > x:
            if before is None:
                return None
            share = math.log(x / before[0]) / math.log(point[0] / before[0])
            return before[1] + share * (point[1] - before[1])
        before = point
    return None


def metric(runs: list[RunSummary]) -> tuple[str, list[str]]:
    """(val_bpb or val_loss, reasons why these runs cannot be ranked by it)."""
    reasons = []
    data = [run.record['dataset'] for run in runs]
    if any(e['val_bpb'] is None for run in runs for e in run.evals):
        if len({(d['fingerprint'], d['eval_tokens']) for d in data}) > 1:
            reasons.append('no bits per byte in every run, and loss per token '
                           'is not comparable between datasets')
        return 'val_loss', reasons
    if len({d['eval_text_sha256'] for d in data}) > 1:
        reasons.append('evaluated on different validation text; make the '
                       'datasets from the same documents and use one '
                       'eval_bytes')
    return 'val_bpb', reasons


def time_reasons(runs: list[RunSummary]) -> list[str]:
    """Why their training times cannot be compared."""
    reasons = [f'{run.label}: {fault}' for run in runs
               if (fault := time_fault(run))]
    places = {(run.record['device'], run.record['world_size'])
              for run in runs}
    if len(places) > 1:
        reasons.append('trained on different devices: ' + '; '.join(
            sorted(f'{n} x {device}' for device, n in places)))
    return reasons


def lead(groups: list[Group], axis: str) -> Lead | Refusal:
    """The order at the largest common budget, or the reasons against one."""
    runs = [run for group in groups for run in group.runs]
    scored = [run for run in runs if run.curve('tokens', 'val_loss')]
    if not scored:
        return Refusal(axis, ['no run has an evaluation after its first '
                              'update'])
    key, reasons = metric(scored)
    if axis == 'time':
        reasons += time_reasons(scored)
    if reasons:
        return Refusal(axis, reasons)
    curves = [run.curve(axis, key) for run in scored]
    budget = min(curve[-1][0] for curve in curves)
    start = max(curve[0][0] for curve in curves)
    bounded_by = scored[[curve[-1][0] for curve in curves].index(budget)]
    if start > budget:
        late = scored[[curve[0][0] for curve in curves].index(start)]
        return Refusal(axis, [
            f'no common budget: {bounded_by.label} ends before the first '
            f'evaluation of {late.label}; leave one of them out'])
    groups = [Group(g.label, kept, g.cell) for g in groups
              if (kept := [run for run in g.runs if run in scored])]

    def order(x):
        return sorted(groups, key=lambda g: g.spread_at(axis, key, x).mean)

    points = sorted({x for curve in curves for x, _ in curve
                     if start <= x <= budget})
    leaders = []
    for x in points:
        first = order(x)[0]
        if not leaders or leaders[-1][1] is not first:
            leaders.append((x, first))
    ranked = order(budget)
    spreads = [g.spread_at(axis, key, budget) for g in ranked]
    return Lead(axis, key, budget, bounded_by, ranked, spreads,
                pooled(spreads), leaders,
                schedule_notes(scored, axis, budget) + weight_notes(scored))


def schedule_notes(runs, axis, budget) -> list[str]:
    """A run whose rate has decayed at the budget is ahead of one in the midst
    of its schedule; that says nothing of the architectures."""
    shares = {run.label: rate_share(run, axis, budget) for run in runs}
    if max(shares.values()) - min(shares.values()) <= 0.1:
        return []
    low, high = (f(shares, key=shares.get) for f in (min, max))
    return [f'their schedules differ at this budget: the learning rate of '
            f'{low} has come down to {shares[low]:.0%} of its peak, that of '
            f'{high} is at {shares[high]:.0%}. The former has the advantage']


def weight_notes(runs) -> list[str]:
    """A run from trained weights has more behind it than its own budget."""
    begun = [run for run in runs if run.begun_from]
    if not begun or len({run.begun_from for run in runs}) == 1:
        return []
    return [', '.join(f'{run.label} began from {run.begun_from}'
                      for run in begun)
            + ': what trained those weights is not in its budget']


def rate_share(run: RunSummary, axis: str, budget: float) -> float:
    """The learning rate at a budget, over its peak."""
    at = [r['step'] for r in run.evals + run.trains
          if run.place(r, axis) <= budget * (1 + 1e-9)]
    schedule = run.record['schedule']
    step = max(max(at, default=0) - 1, 0)
    return learning_rate_at(step, **schedule) / schedule['learning_rate']


def group_runs(runs: list[RunSummary]) -> list[Group]:
    """Runs that differ in their seed alone, together; in order of the first.

    Runs of a sweep keep the names of its configurations. A second run of one
    seed is another configuration's: it would halve the spread for nothing.
    """
    groups: dict[tuple, Group] = {}
    for run in runs:
        key, n = (run.configuration, run.configuration_key()), 0
        seed = run.record['options']['seed']
        while any(r.record['options']['seed'] == seed
                  for r in groups.get((*key, n), Group('', [])).runs):
            n += 1
        group = groups.setdefault((*key, n), Group(
            run.configuration or run.label, []))
        group.runs.append(run)
    for group in groups.values():
        if len(group.runs) > 1 and not group.runs[0].configuration:
            first = group.runs[0]
            group.label = f'{first.record["arch_preset"]} like {first.label}'
    return list(groups.values())
