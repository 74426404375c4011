"""The cells of a sweep: which configurations, at which rates and seeds.

A configuration is a set of train.py's options beyond those of the base. A
cell is one run of it: a short one to find its learning rate, or one of a seed
to measure it.
"""

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

from training.configurator import (
    ConfigError,
    Option,
    Positive,
    convert,
    convert_text,
    parse,
)
from training.dataset import open_dataset
from training.distributed import Ranks
from training.flops import flops_per_token
from training.memory import count_parameters
from training.settings import build_architecture, derive
from training.terminal import show

# what may stand in a config file of sweep.py beside train.py's options
SWEEP_OPTIONS = {name: Option(name, kind, default, comment, 'sweep')
                 for name, kind, default, comment in (
    ('base', str | list[str] | None, None, 'config files to begin with'),
    ('grid', dict, {}, 'option: values; every combination is run. Options '
     'that go together: NAME,NAME=V:V,V:V'),
    ('seeds', Positive, 1, 'runs of each configuration, seed, seed + 1, ...'),
    ('tune', dict, {}, 'option: values to choose from, per configuration'),
    ('tune_iters', Positive | None, None,
     'updates of a tuning run; None: a fifth of max_iters'),
    ('walk_from', str | None, None, 'preset to start a walk at'),
    ('walk_to', str | None, None, 'preset where it ends'),
    ('equal_params', Positive | None, None,
     'non-embedding parameters of every configuration, by its d_ff'),
    ('equal_total_params', Positive | None, None,
     'all parameters of every configuration, by its d_ff'),
    ('spread_from', str | None, None,
     'the sweep whose seeds tell how far a single run can be trusted'),
    ('nproc_per_node', Positive, 1, 'processes of a run, through torchrun'),
    ('jobs', Positive, 1, 'runs at once; the cores are divided'),
    ('sweep_dir', str | None, None, 'its folder; None: out-<config file>'),
)}
# the sweep decides them for each run
OWN_OPTIONS = ('out_dir', 'init_from')

# A walk changes these one after another: what each step sets.
WALK = (
    ('norm', ('normalization', 'norm_eps', 'norm_position')),
    ('positions', ('position_encoding', 'rope_theta', 'rope_scaling')),
    ('bias', ('bias',)),
    ('FFN', ('ffn_type', 'activation', 'd_ff')),
    ('GQA', ('num_key_value_heads',)),
    ('head size', ('head_dim',)),
    ('QK norm', ('qk_norm',)),
    ('tying', ('weight_tying',)),
)
SIZES = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size', 'dropout')


@dataclass
class Configuration:
    """One architecture or setting; what a sweep compares."""

    label: str                 # 'rope_theta=10000.0'; names its folder
    options: dict              # of train.py, beyond the base's
    chosen: dict = field(default_factory=dict)  # by the sweep: d_ff
    tuned: dict = field(default_factory=dict)  # by tuning: learning_rate
    edge: bool = False         # the best value was the grid's last
    trials: list = field(default_factory=list)  # (value, loss or None)

    @property
    def all_options(self) -> dict:
        return self.options | self.chosen | self.tuned


@dataclass
class Cell:
    """One run of train.py."""

    configuration: Configuration
    folder: Path               # its out_dir
    values: dict               # all options, resolved
    argv: list[str]            # of train.py
    max_iters: int
    flops: float               # of the whole run
    parameters: dict
    flops_per_token: int
    d_ff: int
    dataset: str               # fingerprint
    seed: int
    tuning: bool = False


def read_sweep(train_schema: dict, files: list[str], argv: list[str]):
    """(sweep options, train.py's options that are given) of config files and
    `--name=value` arguments; ConfigError with all problems."""
    schema = train_schema | SWEEP_OPTIONS
    bases = []
    for path in files:
        base = parse(schema, [path]).given.get('base') or []
        bases += [base] if isinstance(base, str) else base
    parsed = parse(schema, [*bases, *files, *argv])
    sweep = {name: parsed.values[name] for name in SWEEP_OPTIONS}
    given = {name: value for name, value in parsed.given.items()
             if name not in SWEEP_OPTIONS and name not in OWN_OPTIONS}
    problems = [f'{argument}: the sweep gives each run its own; name the '
                "sweep's folder with --sweep_dir" for argument in argv
                if argument.split('=')[0].removeprefix('--') in OWN_OPTIONS]
    for name in 'grid', 'tune':
        sweep[name] = {
            option: check_values(train_schema, name, option, values, problems)
            for option, values in sweep[name].items()}
    problems += conflicts(sweep, given)
    if problems:
        raise ConfigError(problems)
    return sweep, given


def read_values(text: str, schema: dict) -> tuple[str, list]:
    """('rope_theta', [1e4, 5e5]) of 'rope_theta=1e4,5e5', and
    ('n_layer,n_head', [[2, 4], [3, 6]]) of 'n_layer,n_head=2:4,3:6'."""
    key, equals, values = text.partition('=')
    names = key.split(',')
    if not equals or not values:
        raise ConfigError([f'{text}: write NAME=VALUE,VALUE,...'])
    if not all(name in schema for name in names):
        return key, values.split(',')  # check_values says so
    try:
        read = [[convert_text(v, schema[name].type) for name, v in
                 zip(names, value.split(':'), strict=True)]
                for value in values.split(',')]
    except ValueError as error:
        raise ConfigError([f'{text}: {error}']) from error
    return key, read if len(names) > 1 else [value for [value] in read]


def check_values(schema, what, key, values, problems) -> list:
    """The values of an option, or of options that go together, checked."""
    where, names = f'{what} {key}={values}', key.split(',')
    before = len(problems)
    problems += [f'{where}: unknown option {name}' for name in names
                 if name not in schema]
    problems += [f'{where}: the sweep decides {name}' for name in names
                 if name in (*OWN_OPTIONS, 'seed')]
    if not isinstance(values, list) or not values:
        problems.append(f'{where}: a list of values is wanted')
    if len(problems) > before:
        return values
    try:
        if len(names) == 1:
            values = [convert(v, schema[key].type) for v in values]
        else:
            values = [[convert(v, schema[name].type) for name, v in
                       zip(names, value, strict=True)] for value in values]
    except (ValueError, TypeError) as error:
        problems.append(f'{where}: {error}')
    if any(values.count(v) > 1 for v in values):
        problems.append(f'{where}: a value stands twice')
    return values


def conflicts(sweep: dict, given: dict) -> list[str]:
    """What of a sweep's options excludes each other."""
    problems = []
    walk = sweep['walk_from'], sweep['walk_to']
    sizes = [name for name in ('equal_params', 'equal_total_params')
             if sweep[name] is not None]
    if any(walk) and not all(walk):
        problems.append('a walk needs both ends: --from PRESET --to PRESET')
    if any(walk) and sweep['grid']:
        problems.append('a walk and a grid are two sweeps: run one after the '
                        'other')
    if len(sizes) > 1:
        problems.append('equal_params and equal_total_params exclude each '
                        'other')
    in_grid = {name for key in sweep['grid'] for name in key.split(',')}
    if sizes and ('d_ff' in given or 'd_ff' in in_grid):
        problems.append(f'{sizes[0]} chooses d_ff: leave d_ff out')
    if len(sweep['tune']) > 1 or any(',' in key for key in sweep['tune']):
        problems.append('tune one option; put others into the grid')
    for option in sweep['tune']:
        if option in in_grid:
            problems.append(f'{option} is in the grid and in tune')
    return problems


def plan_configurations(sweep: dict, given: dict, schema: dict
                        ) -> list[Configuration]:
    """All configurations, with the d_ff that makes them equally large."""
    if sweep['walk_from']:
        found = walk_configurations(sweep, given, schema)
    else:
        found = grid_configurations(sweep['grid'])
    problems = []
    for configuration in found:
        try:
            choose_d_ff(configuration, sweep, given, schema)
        except ValueError as error:
            problems += [f'{configuration.label}: {problem}' for problem
                         in getattr(error, 'problems', [str(error)])]
    if problems:
        raise ConfigError(problems)
    return found


def grid_configurations(grid: dict) -> list[Configuration]:
    """Every combination of the grid's values."""
    found = []
    for values in itertools.product(*grid.values()):
        options = {}
        for key, value in zip(grid, values, strict=True):
            names = key.split(',')
            options |= dict(zip(names, value if len(names) > 1 else [value],
                                strict=True))
        text = ', '.join(label(*item) for item in options.items())
        found.append(Configuration(text or 'base', options))
    return found


def label(name: str, value) -> str:
    return str(value) if name == 'arch_preset' else f'{name}={show(value)}'


def architecture_of(given: dict, schema: dict):
    """That of train.py under given options."""
    values = parse(schema, [], base=given).values
    return build_architecture(values, dataset_of(values['dataset']))


@functools.cache
def dataset_of(name: str):
    return open_dataset(name)


def walk_configurations(sweep, given, schema) -> list[Configuration]:
    """From one preset to the other, one component at a time, in WALK's order;
    components in which they do not differ are passed over."""
    begin, end = (architecture_of(given | {'arch_preset': sweep[name]}, schema)
                  for name in ('walk_from', 'walk_to'))
    other = [name for name in SIZES if getattr(begin, name)
             != getattr(end, name)]
    if other:
        raise ConfigError([
            f'{sweep["walk_from"]} and {sweep["walk_to"]} differ in '
            f'{", ".join(other)}: a walk changes components, not sizes; set '
            'these options to one value for both'])
    options = {'arch_preset': sweep['walk_from']}
    found = [Configuration(f'0 {sweep["walk_from"]}', dict(options))]
    for step, names in WALK:
        changed = {name: getattr(end, name) for name in names
                   if getattr(begin, name) != getattr(end, name)}
        if end.position_encoding != 'rope':  # there they have no effect
            changed.pop('rope_theta', None)
            changed.pop('rope_scaling', None)
        if sweep['equal_params'] or sweep['equal_total_params']:
            changed.pop('d_ff', None)
        if changed:
            options |= changed
            found.append(Configuration(f'{len(found)} {step}', dict(options)))
    return found


# --- equal parameters --------------------------------------------------------


def choose_d_ff(configuration, sweep, given, schema):
    """The d_ff whose parameters come nearest to the number that is asked for.

    They grow linearly with d_ff. A multiple of 64 at widths from 1024 on, of
    4 below: matmuls of odd sizes are slow. Nothing is chosen where no number
    is asked for. Raises ValueError for an architecture that is none.
    """
    config = architecture_of(given | configuration.options, schema)
    kind, wanted = (('total', sweep['equal_total_params'])
                    if sweep['equal_total_params']
                    else ('non_embedding', sweep['equal_params']))
    if wanted is None:
        return
    step = 64 if config.n_embd >= 1024 else 4

    def count(d_ff):
        at = dataclasses.replace(config, d_ff=d_ff)
        return count_parameters(at)[kind]

    per_step = count(2 * step) - count(step)
    least = count(step)
    d_ff = step * (1 + round((wanted - least) / per_step))
    if d_ff < step:
        raise ValueError(f'already {least:,} {kind} parameters at d_ff={step}: '
                         f'ask for more than {wanted:,}, or shrink the model')
    configuration.chosen = {'d_ff': d_ff}


# --- cells -------------------------------------------------------------------


def run_cells(configuration, sweep, given, schema, folder) -> list[Cell]:
    """A cell for each seed."""
    first = given.get('seed', schema['seed'].default)
    return [make_cell(configuration, given | configuration.all_options
                      | {'seed': seed}, schema, sweep,
                      folder / folder_name(configuration) / f'seed_{seed}')
            for seed in range(first, first + sweep['seeds'])]


def tune_cells(configuration, sweep, given, schema, folder) -> list[Cell]:
    """A short cell for each value, with a schedule that is as much shorter."""
    [(name, values)] = sweep['tune'].items()
    options = given | configuration.options | configuration.chosen
    whole = make_cell(configuration, options, schema, sweep, folder)
    iters = sweep['tune_iters'] or max(1, whole.max_iters // 5)
    short = {'max_iters': iters, 'max_tokens': None}
    for key in 'warmup_iters', 'lr_decay_iters', 'wsd_decay_iters':
        if options.get(key) is not None:
            short[key] = max(1, round(options[key] * iters / whole.max_iters))
    return [make_cell(configuration, options | short | {name: value}, schema,
                      sweep, folder / folder_name(configuration)
                      / f'tune_{name}={show(value)}', tuning=True)
            for value in values]


def make_cell(configuration, options, schema, sweep, folder, tuning=False):
    """Checks its options as train.py will; ConfigError if they are wrong."""
    ranks = Ranks(world_size=sweep['nproc_per_node'])
    values = parse(schema, [], base=options).values
    plan = derive(values, dataset_of(values['dataset']), ranks)
    config = plan['config']
    per_token, _ = flops_per_token(config)
    return Cell(
        configuration=configuration, folder=folder, values=values,
        d_ff=config.d_ff,
        argv=[f'--{name}={value}' for name, value in options.items()],
        max_iters=plan['max_iters'], flops_per_token=per_token,
        flops=per_token * plan['tokens_per_iter'] * plan['max_iters'],
        parameters=count_parameters(config), seed=values['seed'],
        dataset=dataset_of(values['dataset']).fingerprint, tuning=tuning)


def folder_name(configuration) -> str:
    """The label, as a folder's name on any system."""
    return ''.join(c if c.isalnum() or c in '=.,+-_' else '_'
                   for c in configuration.label.replace(', ', ','))


def choose(values: list, losses: list[float]):
    """(best value, whether it is the smallest or largest tried).

    A best value at the edge says that a better one may lie beyond it.
    """
    best = min(range(len(values)), key=lambda i: losses[i])
    if not math.isfinite(losses[best]):
        return None, False
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool)
                  for v in values)
    return values[best], numbers and len(values) > 1 and (
        values[best] in (min(values), max(values)))
