"""From the paths that a user names to the runs of a comparison."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from training.comparison import Group, Lead, group_runs, lead
from training.run_log import RunError, find_runs, resolve_run
from training.run_summary import RunSummary, summarize
from training.sanity import suspicions


@dataclass
class Comparison:
    """Runs, their groups and what is odd about them."""

    runs: list[RunSummary]
    groups: list[Group]
    sweep: dict | None = None       # sweep.json, if one sweep is all there is
    spread_from: str | None = None  # the sweep that tells its seeds' spread
    pool: tuple[float, int] | None = None
    problems: list[str] = field(default_factory=list)


def gather(paths: list[str], latest: int | None,
           with_spread: bool = True) -> Comparison:
    """Of out_dirs, run folders and sweeps' folders; RunError with all that
    are none of these. A sweep may name another whose seeds tell the spread:
    that one is read `with_spread`."""
    runs, problems, notes, sweeps = [], [], [], []
    for path in paths:
        try:
            if (Path(path) / 'sweep.json').exists():
                sweeps.append(read_sweep_record(Path(path)))
                runs += runs_of_sweep(Path(path), sweeps[-1], notes)
            else:
                runs.append(summarize(resolve_run(path)))
        except RunError as error:
            problems.append(str(error))
    if problems:
        raise RunError('\n  '.join(problems))
    if latest:
        found = find_runs()[:latest]
        if not found:
            raise RunError('no runs in out*/: train one first, e.g. '
                           'python train.py config/quickstart.py')
        runs += [summarize(run) for run in found]
    seen: dict[Path, RunSummary] = {}
    for run in runs:
        seen.setdefault(run.folder.resolve(), run)
    runs = list(seen.values())
    if not runs:
        raise RunError('no run has begun yet: ' + '; '.join(notes))
    for run, label in zip(runs, labels(runs), strict=True):
        run.label, run.suspicions = label, suspicions(run)
    groups = group_runs(runs)
    if len(sweeps) == 1:
        name_cells(groups, sweeps[0])
    comparison = Comparison(runs, groups, problems=notes)
    comparison.sweep = sweeps[0] if len(paths) == len(sweeps) == 1 and (
        not latest) else None
    if with_spread and comparison.sweep and (
            comparison.sweep['options'].get('spread_from')):
        read_spread(comparison, Path(paths[0]))
    return comparison


def read_sweep_record(folder: Path) -> dict:
    path = folder / 'sweep.json'
    try:
        sweep = json.loads(path.read_text())
        sweep['configurations'][0]['runs'], sweep['options']
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f'{path} cannot be read: {error!r}; start its sweep '
                       'again to write it anew') from error
    return sweep


def runs_of_sweep(folder, sweep, notes) -> list[RunSummary]:
    """The measured cells; those that have not begun become a note."""
    found = []
    for configuration in sweep['configurations']:
        if not configuration['runs']:
            notes.append(f'{configuration["label"]}: no run, since no rate of '
                         'its tuning led to a finite loss')
        for cell in configuration['runs']:
            try:
                run = summarize(resolve_run(folder / cell))
            except RunError:
                notes.append(f'{configuration["label"]} ({Path(cell).name}): '
                             'not begun')
                continue
            run.configuration = configuration['label']
            found.append(run)
    return found


def name_cells(groups: list[Group], sweep: dict):
    cells = {c['label']: c for c in sweep['configurations']}
    for group in groups:
        group.cell = cells.get(group.label, {})


def read_spread(comparison: Comparison, folder: Path):
    """The spread of another sweep's seeds, at its own budget of tokens."""
    named = Path(comparison.sweep['options']['spread_from'])
    for path in named, folder.parent / named:
        if (path / 'sweep.json').exists():
            try:
                other = gather([str(path)], None, with_spread=False)
            except RunError:  # none of its runs has begun
                break
            found = lead(other.groups, 'tokens')
            if isinstance(found, Lead) and found.pool:
                comparison.spread_from = str(named)
                comparison.pool = found.pool
                return
    comparison.problems.append(
        f'{named} has no spread of seeds: run it first, with seeds of 2 or '
        'more; changes of single runs cannot be judged without')


def labels(runs: list[RunSummary]) -> list[str]:
    """The shortest names that tell the runs apart."""
    def of_sweep(run):
        seed = run.record['options']['seed']
        return f'{run.configuration} seed {seed}' if run.configuration else (
            run.folder.parent.name)

    for name in (of_sweep, lambda run: run.record['arch_preset'],
                 lambda run: run.folder.name, lambda run: run.name):
        names = [name(run) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]
