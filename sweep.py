"""Run a grid of configurations, or a walk between two presets, then compare.

Each cell is an ordinary run of train.py in its own folder below the sweep's.
The same command again goes on where the last one stopped: finished cells are
not run again, an unfinished one is resumed. Config files and --name=value set
train.py's options for all cells; a config file may set a sweep's own as well.

    python sweep.py config/quickstart.py --grid rope_theta=1e4,5e5,1e6 \
        --arch_preset=qwen3 --seeds 3 --tune learning_rate=1e-3,2e-3,4e-3
    python sweep.py config/quickstart.py --from gpt2 --to qwen3
    python sweep.py config/sweep_ffn_ratio.py
"""

import argparse
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

from training.configurator import exit_with, read_schema
from training.durable import FolderHeld, hold_lock, write_json
from training.run_log import RunError
from training.sweep_plan import (
    SWEEP_OPTIONS,
    choose,
    plan_configurations,
    read_sweep,
    read_values,
    run_cells,
    tune_cells,
)
from training.sweep_run import Runner
from training.terminal import format_table, show

ROOT = Path(__file__).resolve().parent
TRAIN = ROOT / 'train.py'
# where the command line has another name than a config file
FLAGS = {'walk_from': '--from', 'walk_to': '--to'}


def parse_arguments(argv, schema):
    """(arguments, --name=value of the sweep's and train.py's options)."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='*', metavar='CONFIG.py')
    for name, option in SWEEP_OPTIONS.items():
        if name == 'base':
            continue
        parser.add_argument(
            FLAGS.get(name, f'--{name}'), dest=name, help=option.comment,
            metavar='NAME=V,V' if option.type is dict else 'VALUE',
            action='append' if option.type is dict else 'store')
    parser.add_argument('--report', metavar='FILE.html',
                        help="where the report goes; default: the sweep's "
                             'folder')
    parser.add_argument('--dry_run', action='store_true',
                        help='say what would be run, and stop')
    arguments, rest = parser.parse_known_intermixed_args(argv)
    given = []
    for name in SWEEP_OPTIONS:
        value = getattr(arguments, name, None)
        if isinstance(value, list):
            value = dict(read_values(text, schema) for text in value
                         if text != 'none')  # --tune none: not as the file
        if value is not None:
            given.append(f'--{name}={value}')
    return arguments, given + rest


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    schema = read_schema(runpy.run_path(str(TRAIN), run_name='train'), TRAIN)
    try:
        arguments, options = parse_arguments(argv, schema)
        sweep, given = read_sweep(schema, arguments.files, options)
        folder = Path(sweep['sweep_dir'] or default_folder(arguments.files))
        configurations = plan_configurations(sweep, given, schema)
        cells = {id(c): cells_of(c, sweep, given, schema, folder)
                 for c in configurations}
        announce(folder, configurations, cells, sweep)
        if arguments.dry_run:
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    except (ValueError, OSError) as error:
        exit_with(error)
    defaults = {name: option.default for name, option in schema.items()}
    with lock:
        runner = Runner(
            TRAIN, defaults, jobs=sweep['jobs'],
            nproc_per_node=sweep['nproc_per_node'],
            total_flops=sum(c.flops for tune, runs in cells.values()
                            for c in tune + runs))
        status = run_all(runner, configurations, cells, sweep, given, schema,
                         folder, argv)
        runner.close()
    if status < 128:
        compare(folder, arguments.report)
    else:
        print(f'stopped; to go on: python sweep.py {shlex.join(argv)}')
    return status


def lock_folder(folder: Path):
    try:
        return hold_lock(folder)
    except FolderHeld:
        raise RunError(f'{folder}: another sweep is at work there; wait for '
                       'it, or choose another --sweep_dir') from None


def default_folder(files: list[str]) -> str:
    name = Path(files[-1]).stem if files else 'base'
    return f'out-sweep_{name.removeprefix("sweep_")}'


def cells_of(configuration, sweep, given, schema, folder):
    """(tuning cells, measured cells); the latter's rate is not known yet."""
    tune = tune_cells(configuration, sweep, given, schema, folder
                      ) if sweep['tune'] else []
    return tune, run_cells(configuration, sweep, given, schema, folder)


def announce(folder, configurations, cells, sweep):
    """What will be run, with what the sweep has chosen."""
    print(f'{folder}: {len(configurations)} configuration(s), '
          f'{sweep["seeds"]} seed(s) each')
    if sweep['equal_params'] or sweep['equal_total_params']:
        kind = 'non-embedding ' if sweep['equal_params'] else ''
        print(f'd_ff is chosen for '
              f'{sweep["equal_params"] or sweep["equal_total_params"]:,} '
              f'{kind}parameters')
    firsts = [(c, cells[id(c)][1][0]) for c in configurations]
    print(format_table(
        ('parameters', 'non-embedding', 'FLOPs/token', 'd_ff', 'configuration'),
        [(f'{cell.parameters["total"]:,}',
          f'{cell.parameters["non_embedding"]:,}',
          f'{cell.flops_per_token:,}', str(cell.d_ff), c.label)
         for c, cell in firsts]))
    total = sum(c.flops for tune, runs in cells.values() for c in tune + runs)
    print(f'{sum(len(t) + len(r) for t, r in cells.values())} runs, '
          f'{total:.3g} FLOPs in all\n', flush=True)


def run_all(runner, configurations, cells, sweep, given, schema, folder,
            argv) -> int:
    """Tune, then measure; the exit status."""
    if sweep['tune']:
        tuning = [c for tune, _ in cells.values() for c in tune]
        results = runner.run(tuning)
        if runner.stopped_by:
            return 128 + runner.stopped_by
        [(name, values)] = sweep['tune'].items()
        for c in configurations:
            losses = [results[id(cell)].val_loss if id(cell) in results
                      else float('inf') for cell in cells[id(c)][0]]
            c.trials = list(zip(values, losses, strict=True))
            best, c.edge = choose(values, losses)
            if best is None:
                runner.say(f'{c.label}: no {name} led to a finite loss; it is '
                           'left out')
                cells[id(c)] = (cells[id(c)][0], [])
                continue
            c.tuned = {name: best}
            cells[id(c)] = (cells[id(c)][0], run_cells(
                c, sweep, given, schema, folder))
            runner.say(f'{c.label}: {name}={show(best)}' + (
                ', the edge of what was tried: a better one may lie beyond'
                if c.edge else ''))
    runs = [c for _, measured in cells.values() for c in measured]
    write_json(folder / 'sweep.json', sweep_record(
        configurations, cells, sweep, argv, folder))
    results = runner.run(runs)
    if runner.stopped_by:
        return 128 + runner.stopped_by
    if runner.failures:
        print(f'\n{len(runner.failures)} cell(s) failed; the same command '
              'tries them again:')
        for cell, reason in runner.failures:
            print(f'  {cell.configuration.label} ({cell.folder.name}): '
                  f'{reason}')
    return 1 if runner.failures or any(
        not measured for _, measured in cells.values()) else 0


def sweep_record(configurations, cells, sweep, argv, folder) -> dict:
    """sweep.json: what compare_architectures.py needs beside the runs."""
    return {
        'format_version': 1,
        'command': ['sweep.py', *argv],
        'options': sweep,
        'configurations': [{
            'label': c.label, 'options': c.options, 'chosen': c.chosen,
            'tuned': c.tuned, 'edge': c.edge,
            # JSON has no infinity: None is a rate that diverged
            'trials': [[value, loss if loss < float('inf') else None]
                       for value, loss in c.trials],
            'runs': [str(cell.folder.relative_to(folder))
                     for cell in cells[id(c)][1]],
        } for c in configurations],
    }


def compare(folder: Path, report):
    subprocess.run(
        [sys.executable, str(ROOT / 'compare_architectures.py'), str(folder),
         '--report', str(report or folder / 'report.html')], check=False)


if __name__ == '__main__':
    sys.exit(main())
