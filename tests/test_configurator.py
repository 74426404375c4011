"""Options: schema, values, config files, the one error, and --help.

    python -m pytest tests/test_configurator.py -q
"""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training import configurator
from training.configurator import (
    ConfigError,
    configure,
    convert,
    convert_text,
    exit_with,
    parse,
    read_schema,
)

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = '''\
#!/usr/bin/env python
"""A script with options.

    python script.py --max_iters=3
"""
from typing import Literal

from training.configurator import (NonNegative, NonNegativeFloat, Positive,
                                   PositiveFloat, Share)

_root = 'private'
untyped = 1

# I/O
out_dir: str = 'out'  # where runs go
note: str | None = None

# data
batch_size: Positive = 12  # sequences per micro-step
#   and rank
gradient_accumulation_steps: Positive = 40  # micro-steps over all ranks;
                                            # one optimizer step each
# optimizer
max_iters: NonNegative = 100
learning_rate: PositiveFloat = 6e-4
weight_decay: NonNegativeFloat = 1e-1
dropout: Share = 0  # an int default of a float
betas: list[float] = [0.9, 0.95]
_helper: int = 3  # private
_more = 4

# model
d_ff: Positive | None = None  # the preset decides if None
dtype: Literal['bfloat16', 'float32'] = 'bfloat16'
rope_scaling: dict | None = None
sizes: dict[str, int] = {}
seed: int = 1337
compile: bool = True  # torch.compile '# not a comment'
'''


def load(folder: Path, source: str) -> tuple[dict, Path]:
    path = folder / 'script.py'
    path.write_text(source, encoding='utf-8')
    namespace = {'__name__': 'script', '__file__': str(path)}
    exec(compile(source, str(path), 'exec'), namespace)
    return namespace, path


@pytest.fixture
def schema(tmp_path):
    return read_schema(*load(tmp_path, SCRIPT))


@pytest.fixture
def config(tmp_path):
    """Writes config files; returns their paths."""
    def write(text: str, name: str = 'config.py') -> str:
        path = tmp_path / name
        path.write_text(text, encoding='utf-8')
        return str(path)
    return write


def problems(schema, argv, base=None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(schema, argv, base)
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    return caught.value.problems


# schema

def test_schema_holds_the_annotated_public_names_in_order(schema):
    assert list(schema) == [
        'out_dir', 'note', 'batch_size', 'gradient_accumulation_steps',
        'max_iters', 'learning_rate', 'weight_decay', 'dropout', 'betas',
        'd_ff', 'dtype', 'rope_scaling', 'sizes', 'seed', 'compile']
    assert schema['batch_size'].default == 12
    assert schema['batch_size'].name == 'batch_size'


def test_schema_reads_comments_and_sections(schema):
    assert schema['out_dir'].comment == 'where runs go'
    assert schema['note'].comment == ''
    assert (schema['batch_size'].comment
            == 'sequences per micro-step and rank')
    assert (schema['gradient_accumulation_steps'].comment
            == 'micro-steps over all ranks; one optimizer step each')
    assert schema['compile'].comment == "torch.compile '# not a comment'"
    sections = {name: option.section for name, option in schema.items()}
    assert sections['out_dir'] == sections['note'] == 'I/O'
    assert sections['batch_size'] == 'data'
    assert sections['max_iters'] == sections['betas'] == 'optimizer'
    assert sections['d_ff'] == sections['compile'] == 'model'


def test_schema_without_headings(tmp_path):
    schema = read_schema(*load(tmp_path, 'x: int = 1  # é\ny: "int" = 2\n'))
    assert [o.section for o in schema.values()] == ['', '']
    assert schema['x'].comment == 'é'
    assert schema['y'].type is int


def test_a_heading_may_stand_above_a_private_name_and_a_note_is_none(tmp_path):
    schema = read_schema(*load(tmp_path, '''\
# I/O
_root = 'data'
a: int = 1
# this note of two lines
# is no heading
b: int = 2

# ---- model ----

c: int = 3
'''))
    assert [o.section for o in schema.values()] == ['I/O', 'I/O', 'model']
    assert [o.comment for o in schema.values()] == ['', '', '']


def test_schema_with_postponed_annotations(tmp_path):
    source = SCRIPT.replace(
        'from typing', 'from __future__ import annotations\nfrom typing', 1)
    schema = read_schema(*load(tmp_path, source))
    assert parse(schema, ['--batch_size=3']).values['batch_size'] == 3
    assert len(problems(schema, ['--batch_size=0'])) == 1


def test_schema_refuses_unsupported_types_and_missing_defaults(tmp_path):
    source = ('from typing import Annotated, Literal\n'
              'from training.configurator import Range\n'
              'a: tuple = ()\nb: set[int] = set()\nc: int\n'
              'd: dict[int, int] = {}\ne: complex = 1j\n'
              "f: Annotated[str, Range(minimum=1)] = 'f'\n"
              "g: Annotated[int, 'odd'] = 1\nh: list[bytes] = []\ni: int = 1\n"
              "j: Literal[{'a': 1}] = 'a'\n")
    with pytest.raises(ConfigError) as caught:
        read_schema(*load(tmp_path, source))
    assert len(caught.value.problems) == 9
    assert 'c: no default' in caught.value.problems[2]
    assert 'tuple' in caught.value.problems[0]


def test_defaults_of_the_script_are_checked_with_the_rest(tmp_path):
    source = ("from training.configurator import Positive\n"
              "n_layer: Positive = 0\nname: str = 3\nx: float = float('nan')\n"
              "good: int = 1\n")
    schema = read_schema(*load(tmp_path, source))
    found = problems(schema, ['--god=2'])
    assert len(found) == 4
    assert found[0] == 'default: n_layer = 0: expected int >= 1'
    assert found[2] == 'default: x = nan: expected finite float'
    assert 'did you mean good?' in found[3]


# values

@pytest.mark.parametrize('text, kind, value', [
    ('12', int, 12), ('-3', int, -3), ('1e9', int, 10 ** 9), ('1e3', int, 1000),
    ('9007199254740993', int, 2 ** 53 + 1),     # is no float
    ('1e-3', float, 1e-3), ('3', float, 3.0), ('.5', float, 0.5),
    ('true', bool, True), ('True', bool, True), ('false', bool, False),
    ('False', bool, False), ('a b', str, 'a b'), ('', str, ''),
    ('12', str, '12'),
    ("'a'", str, "'a'"), ('true', str, 'true'), ('None', str, 'None'),
    ('[1, 2]', str, '[1, 2]'), ('a=b', str, 'a=b'),
    ('null', str | None, 'null'),
    ('None', str | None, None), ('x', str | None, 'x'),
    ('12', str | None, '12'),
    ('None', int | None, None), ('7', int | None, 7),
    ('[1,2]', list[int], [1, 2]), ('[]', list[int], []),
    ('(1,2)', list[int], [1, 2]), ('[1,2.5]', list[float], [1.0, 2.5]),
    ('[true, false]', list[bool], [True, False]),
    ("['a', None]", list[str | None], ['a', None]),
    ('[[1], [2]]', list[list[int]], [[1], [2]]),
    ('{"a": 1}', dict[str, int], {'a': 1}),
    ('{"type": "linear", "on": true}', dict, {'type': 'linear', 'on': True}),
    ("{'a': [1, 2.0]}", dict | None, {'a': [1, 2.0]}),
    ('1', int | str, 1), ('one', int | str, 'one'), ('1', bool | int, 1),
    ('float32', configurator.Literal['float32', 16], 'float32'),
    ('16', configurator.Literal['float32', 16], 16),
    ('1', configurator.Positive, 1), ('0', configurator.NonNegative, 0),
    ('1', configurator.Share, 1.0), ('0', configurator.Share, 0.0),
    ('0', configurator.NonNegativeFloat, 0.0),
    ('1e-300', configurator.PositiveFloat, 1e-300),
])
def test_text_is_read_by_the_type_it_is_for(text, kind, value):
    result = convert_text(text, kind)
    assert result == value and type(result) is type(value)
    if isinstance(value, list):
        assert [type(item) for item in result] == [type(item) for item in value]


@pytest.mark.parametrize('text, kind', [
    ('1.5', int), ('true', int), ('True', int), ('a', int), ('', int),
    ('None', int), ('1e309', int), ('inf', int), ('[1]', int), ('1+1', int),
    ('nan', float), ('inf', float), ('-inf', float), ('1e309', float),
    ('true', float), ('1j', float), ('1' + '0' * 400, float), ('9' * 5000, int),
    ('1', bool), ('0', bool), ('yes', bool), ('TRUE', bool), ('None', bool),
    ('none', int | None), ('null', int | None),
    ('1', list[int]), ('[1', list[int]), ('[a]', list[str]),
    ('[1.5]', list[int]),
    ('[True]', list[int]), ('{1: 2}', dict), ('{1, 2}', dict), ('[1]', dict),
    ('{"a": "b"}', dict[str, int]), ('{"a": 1e309}', dict),
    ('{"a": NaN}', dict), ('[NaN]', list), ('[' * 5000, list),
    ("__import__('os')", int), ('f()', list),
    ('int4', configurator.Literal['float32']),
    ('True', configurator.Literal[1]),
    ('0', configurator.Positive), ('-1', configurator.NonNegative),
    ('0', configurator.PositiveFloat), ('-1e-9', configurator.NonNegativeFloat),
    ('1.01', configurator.Share), ('-0.1', configurator.Share),
    ('nan', configurator.Share),
])
def test_text_of_a_wrong_type_or_range_is_refused(text, kind):
    with pytest.raises(ValueError, match='expected'):
        convert_text(text, kind)


def test_a_float_keeps_its_type_in_a_union_and_in_a_bare_dict():
    assert type(convert(1.0, int | float)) is float
    assert type(convert(1, float | int)) is int
    found = convert({'a': 1.0, 'b': 1, 'c': True}, dict)
    assert [type(v) for v in found.values()
            ] == [float, int, bool]


def test_numbers_that_are_no_number_are_refused_as_values():
    for value in (math.nan, math.inf, -math.inf, True, '1', None, 10 ** 400):
        with pytest.raises(ValueError):
            convert(value, float)


# command line

def test_defaults_alone(schema):
    parsed = parse(schema, [])
    assert parsed.values['learning_rate'] == 6e-4
    assert type(parsed.values['dropout']) is float
    assert list(parsed.values) == list(schema)
    assert parsed.given == {} and parsed.config_files == []


def test_the_last_of_two_settings_wins(schema):
    parsed = parse(schema, ['--seed=1', '--max_iters=2', '--seed=3'])
    assert parsed.given == {'seed': 3, 'max_iters': 2}
    assert parsed.values['seed'] == 3 and parsed.values['batch_size'] == 12


def test_the_command_line_wins_wherever_it_stands(schema, config):
    one = config('seed = 1\nbatch_size = 2\n', 'one.py')
    two = config('seed = seed + 10\nmax_iters = 7\n', 'two.py')
    parsed = parse(schema, ['--batch_size=5', one, '--max_iters=9', two])
    assert parsed.config_files == [one, two]
    assert parsed.given == {'seed': 11, 'batch_size': 5, 'max_iters': 9}
    assert parse(schema, [two, one]).values['seed'] == 1
    # config files do not see the command line
    parsed = parse(schema, ['--seed=100', two, '--max_iters=1'])
    assert parsed.values['seed'] == 100
    derived = config('max_iters = seed\n', 'derived.py')
    assert parse(schema, ['--seed=5', derived]).values['max_iters'] == 1337


def test_a_value_given_as_its_default_is_given(schema, config):
    assert parse(schema, ['--seed=1337']).given == {'seed': 1337}
    assert parse(schema, [config('d_ff = None\n')]).given == {'d_ff': None}


def test_none_can_be_set(schema):
    parsed = parse(schema, ['--d_ff=8', '--d_ff=None', '--note=None',
                            '--rope_scaling=None'])
    assert parsed.given == {'d_ff': None, 'note': None, 'rope_scaling': None}
    assert parse(schema, ['--out_dir=None']).values['out_dir'] == 'None'


def test_all_problems_come_in_one_error(schema):
    found = problems(schema, ['--max_itres=10', '--dtype=int4', '--dropout=2'])
    assert found == [
        'command line: --max_itres=10: unknown option; did you mean max_iters?',
        "command line: --dtype=int4: expected one of 'bfloat16', 'float32'",
        'command line: --dropout=2: expected finite float >= 0 and <= 1']


def test_the_error_is_a_value_error_with_count_and_remedy(schema):
    with pytest.raises(ValueError, match=r'^2 problem') as caught:
        parse(schema, ['--zzzzzz=1', '--seed=x'])
    assert '--help' in str(caught.value)
    assert 'did you mean' not in str(caught.value)


@pytest.mark.parametrize('argument, text', [
    ('--compile', 'write --compile=VALUE'), ('--', 'write --'),
    ('--max_itres', 'did you mean max_iters?'),
    ('-x', 'write --NAME=VALUE'), ('-seed=1', 'write --NAME=VALUE'),
    ('--=1', 'unknown option'), ('--batch-size=1', 'did you mean batch_size?'),
    ('--MAX_ITERS=1', 'did you mean max_iters?'),
    ('--_helper=1', 'unknown option'),
    ('--untyped=2', 'unknown option'), ('--__name__=2', 'unknown option'),
    ('--seed=', 'expected int'), ('--d_ff=0', 'expected int >= 1 or None'),
])
def test_malformed_arguments(schema, argument, text):
    found = problems(schema, [argument])
    assert len(found) == 1
    assert text in found[0] and argument in found[0]
    assert found[0].startswith('command line: ')


def test_a_wrong_value_is_reported_even_if_a_later_one_is_right(schema):
    assert len(problems(schema, ['--seed=x', '--seed=1'])) == 1


def test_a_long_value_is_cut_in_the_report(schema):
    found = problems(schema, ['--dtype=' + 'x' * 10 ** 5])
    assert len(found) == 1 and len(found[0]) < 200


# config files

def test_a_config_file_with_all_that_is_allowed(schema, config):
    path = config('"""A run."""\n'
                  '_tokens = 2 ** 19\n'
                  'batch_size = 16  # of 40\n'
                  'gradient_accumulation_steps = (gradient_accumulation_steps'
                  ' * 12 // batch_size)\n'
                  'max_iters = 1e3 if _tokens > 5 and not batch_size == 3'
                  ' else 0\n'
                  'learning_rate: float = min(6e-4, 3e-4) * 2\n'
                  'weight_decay /= 2\n'
                  'betas = (0.9, 1 - 0.01)\n'
                  'seed = d_ff = max(abs(-3), int(2.5), round(1.5),'
                  ' len("ab"))\n'
                  'sizes = {"a": 480 / 16}\n'
                  'dropout = float(0)\n'
                  'compile = 0 < 1 < 2\n'
                  'note = None\n')
    assert parse(schema, [path]).given == {
        'batch_size': 16, 'gradient_accumulation_steps': 30, 'max_iters': 1000,
        'learning_rate': 6e-4, 'weight_decay': 0.05, 'betas': [0.9, 0.99],
        'seed': 3, 'd_ff': 3, 'sizes': {'a': 30}, 'dropout': 0.0,
        'compile': True, 'note': None}
    assert type(parse(schema, [path]).values['max_iters']) is int


def test_an_overlay_reads_what_earlier_files_set(schema, config):
    run = config('batch_size = 8\ngradient_accumulation_steps = 64\n', 'run.py')
    overlay = config('gradient_accumulation_steps = '
                     'gradient_accumulation_steps * batch_size // 16\n'
                     'batch_size = 16\n', 'overlay.py')
    parsed = parse(schema, [run, overlay])
    assert parsed.given == {'batch_size': 16, 'gradient_accumulation_steps': 32}
    assert parse(schema, [overlay]).values['gradient_accumulation_steps'] == 30


def test_lists_of_the_script_are_never_changed_in_place(tmp_path, config):
    namespace, path = load(tmp_path, SCRIPT)
    default = namespace['betas']
    base = {'sizes': {'a': 1}}
    parsed = configure(namespace, path, [config('betas += [0.5]\n')], base)
    assert parsed.values['betas'] == [0.9, 0.95, 0.5] == namespace['betas']
    assert default == [0.9, 0.95]
    namespace['sizes']['b'] = 2
    assert base == {'sizes': {'a': 1}}


def test_private_names_stay_in_their_file(schema, config):
    one = config('_n = 4\n_n += 1\nseed = _n\n', 'one.py')
    assert parse(schema, [one]).given == {'seed': 5}
    found = problems(schema, [one, config('seed = _n\n', 'two.py')])
    assert len(found) == 1 and 'two.py:1' in found[0]
    # nor are the script's own private and untyped names seen
    path = config('seed = _helper\n_a = untyped\n')
    assert len(problems(schema, [path])) == 2


@pytest.mark.parametrize('line', [
    'seed = ().__class__', "seed = __import__('os')", 'import os',
    'from os import path', "out_dir = f'{seed}'", 'seed = (lambda: 1)()',
    'seed = lambda: 1', '_f = [x for x in [1]]', '_f = {x for x in [1]}',
    '_f = {x: 1 for x in [1]}', '_f = sum(x for x in [1])', '_f = (seed := 3)',
    '(seed := 3)', 'seed = betas[0]', 'betas[0] = 1', 'seed.x = 1',
    'seed, d_ff = 1, 2', '[seed] = [1]', 'for seed in [1]: pass',
    'if True: seed = 1', 'while False: pass', 'def f(): pass', 'class A: pass',
    'del seed', 'assert seed', 'pass', 'print(1)', 'seed', '1', "b'doc'",
    'seed: int', 'with seed: pass', 'try: pass\nfinally: pass', 'global seed',
    'return 3', '_f = await_()', '_f = yield 3', '_f = *betas, 1',
    '_f = {1, 2}', "exec('1')", "_f = eval('1')", "_f = open('x')",
    '_f = getattr(seed, "real")', '_f = min', '_f = [max, 1]',
    '_f = min(1, len)',
    '_f = max(betas, key=abs)', '_f = min(*betas)', '_f = min(**sizes)',
    '_f = (min)(1, 2)(3)', '_f = "a".join(betas)', '_f = seed.real',
    "_f = '{0.__class__}'.format(seed)", '_f = __builtins__', '_f = __name__',
    '_f = str(3)', '_f = pow(2, 3)', '_f = [1][0:1]', 'raise seed',
    'match seed:\n  case 1: pass', 'async def f(): pass',
])
def test_what_a_config_file_may_not_hold(schema, config, line):
    path = config(f'"""Doc."""\nmax_iters = 1\n{line}\n')
    found = problems(schema, [path])
    assert len(found) == 1
    assert found[0].startswith(f'{path}:3: ')
    assert 'not allowed' in found[0] or 'unknown name' in found[0]


def test_an_annotation_in_a_config_file_is_not_run(schema, config, tmp_path):
    mark = tmp_path / 'mark'
    path = config(f"seed: open({str(mark)!r}, 'w') = 3\n")
    assert parse(schema, [path]).given == {'seed': 3}
    assert not mark.exists()


def test_only_the_first_string_is_a_docstring(schema, config):
    assert parse(schema, [config('"""Doc."""\n')]).given == {}
    assert parse(schema, [config('')]).given == {}
    found = problems(schema, [config('seed = 1\n"""Not a docstring."""\n')])
    assert len(found) == 1 and ':2:' in found[0]


@pytest.mark.parametrize('line, text', [
    ('max_itres = 10', 'unknown option; did you mean max_iters?'),
    ('seed = max_itres * 2', 'unknown name max_itres; did you mean max_iters?'),
    ('max_itres += 1', 'unknown name max_itres; did you mean max_iters?'),
    ('_n += 1', 'unknown name _n'), ('min = 3', 'unknown option'),
    ("dtype = 'int4'", "dtype = 'int4': expected one of 'bfloat16', 'float32'"),
    ('seed = 1.5', 'seed = 1.5: expected int'),
    ('seed = True', 'seed = True: expected int'),
    ('compile = 1', 'compile = 1: expected true or false'),
    ('out_dir = 3', 'out_dir = 3: expected str'),
    ("seed = '3'", "seed = '3': expected int"),
    ('seed = None', 'seed = None: expected int'),
    ('learning_rate = 1e309', 'learning_rate = inf: expected finite float > 0'),
    ('learning_rate = 1e309 - 1e309', 'learning_rate = nan: expected'),
    ('betas = [1e309]', 'betas = [inf]: expected list[finite float]'),
    ('batch_size = batch_size * 0', 'batch_size = 0: expected int >= 1'),
    ('rope_scaling = {1: 2}', 'rope_scaling = {1: 2}: expected dict or None'),
    ('seed = ...', 'seed = Ellipsis: expected int'),
    ('seed = 1 // 0', 'seed = 1 // 0: integer division or modulo by zero'),
    ('seed = d_ff * 2', 'seed = d_ff * 2: unsupported operand'),
    ("seed = int('x')", 'invalid literal'),
    ('learning_rate = 10.0 ** 400', '400: Numerical result out of range'),
    ('learning_rate = 2 ** 4000 / 1', 'too large'),
    ('_n = 10 ** 5000', 'digit'),
    ('_n = min()', 'expected at least 1 argument'),
])
def test_a_problem_of_a_config_file_says_where_and_what(schema, config, line,
                                                        text):
    path = config(f'\n# a comment\n{line}\n')
    found = problems(schema, [path])
    assert len(found) == 1
    assert found[0].startswith(f'{path}:3: ') and text in found[0]


def test_all_problems_of_all_sources_come_in_one_error(schema, config,
                                                       tmp_path):
    bad = config('x = 1\nseed = "a"\nimport os\nd_ff = foo + bar\n', 'bad.py')
    worse = config('seed = 1\nmax_iters = = 2\n', 'worse.py')
    missing = str(tmp_path / 'missing.py')
    found = problems(schema, [bad, '--compile', worse, missing, '--dtype=int4'],
                     {'old_option': 1})
    wheres = ['recorded options: old_option = 1: ', f'{bad}:1: ', f'{bad}:2: ',
              f'{bad}:3: ', f'{bad}:4: ', f'{bad}:4: ',
              f'{worse}:2: syntax error',
              f'{missing}: cannot be read (No such file',
              'command line: --compile',
              'command line: --dtype=int4']
    assert len(found) == len(wheres)
    for problem, where in zip(found, wheres):
        assert problem.startswith(where)


def test_files_that_cannot_be_read(schema, tmp_path):
    binary, null = tmp_path / 'binary.py', tmp_path / 'null.py'
    binary.write_bytes(b'seed = 1\nout_dir = "\xff"\n')
    null.write_bytes(b'seed = 1\0\n')
    deep = tmp_path / 'deep.py'
    deep.write_text('seed = ' + '-' * 10 ** 5 + '1\n')
    for path in (binary, null, deep):
        found = problems(schema, [str(path)])
        assert len(found) == 1 and found[0].startswith(f'{path}:1: ')
    for path in (str(tmp_path), ''):
        found = problems(schema, [path])
        assert len(found) == 1 and 'cannot be read' in found[0]


def test_a_long_sum_in_a_config_file_ends_in_the_error(schema, config):
    assert parse(schema, [config('seed = ' + '1 + ' * 99 + '1')]).given == {
        'seed': 100}
    for count in (900, 10 ** 5):    # too deep to walk; too deep to parse
        path = config('seed = ' + '1 + ' * count + '1')
        found = problems(schema, [path])
        assert len(found) == 1 and found[0].startswith(f'{path}:1: ')
        assert 'recursion' in found[0]


def test_line_ends_and_form_feeds_do_not_shift_lines(schema, tmp_path):
    path = tmp_path / 'odd.py'
    path.write_bytes(b'\xef\xbb\xbfseed = 1\r\n\x0c\r\n_a = "\x0b"\r\n'
                     b'sed = 2\r\nseed = foo\r\n')
    found = problems(schema, [str(path)])
    assert found == [f'{path}:4: sed = 2: unknown option; did you mean seed?',
                     f'{path}:5: seed = foo: unknown name foo']


# recorded options

def test_base_replaces_defaults_below_files_and_command_line(schema, config):
    base = {'seed': 5, 'batch_size': 4, 'd_ff': None, 'betas': [0, 1],
            'rope_scaling': {'type': 'linear', 'factor': 2.0}, 'max_iters': 1e3}
    parsed = parse(schema, [config('seed = seed + 1\n'), '--max_iters=8'], base)
    assert parsed.given == {'seed': 6, 'max_iters': 8}
    assert parsed.values['batch_size'] == 4
    assert parsed.values['betas'] == [0.0, 1.0]
    assert type(parsed.values['betas'][0]) is float
    assert parsed.values['rope_scaling'] == {'type': 'linear', 'factor': 2.0}


def test_base_is_checked_by_the_same_rules(schema):
    found = problems(schema, [], {
        'seeds': 1, 'batch_size': 0, 'dtype': None, 'compile': 'true',
        'betas': [math.nan], 'note': 'fine', 'learning_rate': '1e-3'})
    assert found == [
        'recorded options: seeds = 1: unknown option; did you mean seed?',
        'recorded options: batch_size = 0: expected int >= 1',
        "recorded options: dtype = None: expected one of 'bfloat16', 'float32'",
        "recorded options: compile = 'true': expected true or false",
        'recorded options: betas = [nan]: expected list[finite float]',
        "recorded options: learning_rate = '1e-3': expected finite float > 0"]


# configure, help, exit status

def test_configure_writes_into_the_namespace(tmp_path):
    namespace, path = load(tmp_path, SCRIPT)
    parsed = configure(namespace, path, ['--max_iters=7'], {'seed': 2})
    assert namespace['max_iters'] == 7 and namespace['seed'] == 2
    assert namespace['_root'] == 'private' and namespace['untyped'] == 1
    assert parsed.given == {'max_iters': 7}
    assert type(namespace['dropout']) is float


def test_configure_leaves_the_namespace_alone_on_an_error(tmp_path):
    namespace, path = load(tmp_path, SCRIPT)
    with pytest.raises(ConfigError):
        configure(namespace, path, ['--max_iters=7', '--seed=x'])
    assert namespace['max_iters'] == 100


@pytest.mark.parametrize('argv', [['-h'], ['--help'], ['--seed=x', '--help'],
                                  ['missing.py', '-h']])
def test_help_exits_with_0_whatever_else_is_given(tmp_path, capsys, argv):
    with pytest.raises(SystemExit) as caught:
        configure(*load(tmp_path, SCRIPT), argv)
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith('usage: python script.py [CONFIG')


def test_help_wraps_what_is_long(tmp_path):
    choices = ', '.join(repr('choice-' + c * 9) for c in 'abcdefgh')
    source = ('from typing import Literal\n'
              f"path: str = '{'x' * 200}'  # {'word ' * 40}end\n"
              f'kind: Literal[{choices}]'
              f" = 'choice-{'a' * 9}'\n")
    schema = read_schema(*load(tmp_path, source))
    text = configurator.help_text(schema, 'script.py', 'Long. ' * 50)
    assert max(map(len, text.splitlines())) <= 79
    assert text.count('x' * 5) >= 1
    assert sum(line.count('x') for line in text.splitlines()) >= 200
    assert text.count('word') == 40 and text.count('Long.') == 50
    for letter in 'abcdefgh':
        assert f"'choice-{letter * 9}'" in text


def test_exit_with_prints_to_stderr_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        exit_with(ConfigError(['one', 'two']))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith('error: 2 problem(s)') and '\n  two\n' in err


def run(tmp_path, *argv: str) -> subprocess.CompletedProcess:
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT + '''
import sys
from training.configurator import ConfigError, configure, exit_with
try:
    parsed = configure(globals(), __file__, sys.argv[1:])
except ConfigError as error:
    exit_with(error)
steps: int = 3  # after the call, so no option
print(max_iters, dtype, parsed.given)
''', encoding='utf-8')
    return subprocess.run([sys.executable, str(script), *argv], text=True,
                          capture_output=True, cwd=tmp_path, timeout=60,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})


def test_a_script_run_with_a_config_file(tmp_path, config):
    config('max_iters = 5\n', 'run.py')
    result = run(tmp_path, 'run.py', '--dtype=float32')
    assert result.returncode == 0 and result.stderr == ''
    assert result.stdout == ("5 float32 {'max_iters': 5, 'dtype': 'float32'}\n")


def test_a_script_run_with_problems(tmp_path):
    result = run(tmp_path, '--max_itres=10', '--dtype=int4', '--steps=3')
    assert result.returncode == 2 and result.stdout == ''
    assert result.stderr.startswith('error: 3 problem(s)')
    assert 'did you mean max_iters?' in result.stderr
    assert 'Traceback' not in result.stderr


def test_help_of_a_script_is_complete_in_80_columns(tmp_path, schema):
    result = run(tmp_path, '--help')
    assert result.returncode == 0 and result.stderr == ''
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert 'examples:' in lines
    assert '    python script.py --max_iters=3' in lines
    at = [lines.index(section)
          for section in ('I/O', 'data', 'optimizer', 'model')]
    assert at == sorted(at)
    text = ' '.join(result.stdout.split())
    for name, option in schema.items():
        assert (f"--{name} {configurator.describe(option.type)}, "
                f"default {option.default!r}") in text
        assert option.comment in text
    for name in ('_helper', 'untyped', 'steps'):
        assert f'--{name}' not in text
    assert lines.index('data') < lines.index(
        '  --batch_size  int >= 1, default 12') < lines.index('optimizer')
