"""Options of a script: annotated module globals, config files, command line.

A script declares its options one a line, in groups under a heading:

    # data
    batch_size: Positive = 12  # sequences per micro-step and rank

and then calls `configure(globals(), __file__, sys.argv[1:])`; on ConfigError it
calls `exit_with(error)`. nanoGPT executes a config file and so accepts a
misspelt name in it without a word. Here a config file is read as assignments
and arithmetic, every value is checked, and one error reports all problems.
"""
import ast
import difflib
import inspect
import io
import json
import os
import sys
import textwrap
import tokenize
import types
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)


class ConfigError(ValueError):
    """All problems with the options of one start, one line each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        head = f"{len(problems)} problem(s) with the options:"
        super().__init__('\n  '.join([head, *problems])
                         + '\n--help lists every option.')


@dataclass(frozen=True)
class Range:
    """Bounds of a number; `above` is exclusive, the other two inclusive."""
    minimum: float = -float('inf')
    maximum: float = float('inf')
    above: float = -float('inf')

    def holds(self, value: float) -> bool:
        return self.minimum <= value <= self.maximum and value > self.above

    def __str__(self) -> str:
        bounds = (('>', self.above), ('>=', self.minimum), ('<=', self.maximum))
        return ' and '.join(f"{sign} {bound}" for sign, bound in bounds
                            if abs(bound) != float('inf'))


Positive = Annotated[int, Range(minimum=1)]
NonNegative = Annotated[int, Range(minimum=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(minimum=0)]
Share = Annotated[float, Range(minimum=0, maximum=1)]

# what JSON can hold: the items of a bare `list` or `dict`
Plain = bool | int | float | str | list | dict | None
UNIONS = (Union, types.UnionType)
PLAIN_TYPES = {bool: 'true or false', int: 'int', float: 'finite float',
               str: 'str', list: 'list', dict: 'dict', type(None): 'None'}


@dataclass(frozen=True)
class Option:
    name: str
    type: Any       # the annotation, constraints included
    default: Any    # as the script has it; `parse` checks it
    comment: str
    section: str    # '' above the first heading


@dataclass(frozen=True)
class Parsed:
    values: dict[str, Any]      # every option, resolved
    given: dict[str, Any]       # those set by a config file or the command line
    config_files: list[str]


def describe(kind: Any) -> str:
    """Which values a type admits, in words; TypeError if not supported."""
    origin, args = get_origin(kind), get_args(kind)
    if (origin is Annotated and args[0] in (int, float)
            and all(isinstance(bounds, Range) for bounds in args[1:])):
        return ' '.join([describe(args[0]), *map(str, args[1:])])
    if origin in UNIONS:
        return ' or '.join(map(describe, args))
    if origin is Literal and all(isinstance(arg, (str, int)) for arg in args):
        return f"one of {', '.join(map(repr, args))}"
    if origin is list and args:
        return f"list[{describe(args[0])}]"
    if origin is dict and args[:1] == (str,):   # JSON has no other keys
        return f"dict[str, {describe(args[1])}]"
    if kind in PLAIN_TYPES:
        return PLAIN_TYPES[kind]
    raise TypeError(f"type {kind} is not supported; use int, float, bool, str, "
                    "list, dict with str keys, Literal, X | None, or int or "
                    "float with a Range")


def convert(value: Any, kind: Any) -> Any:
    """A value as an instance of `kind`, lists and dicts copied.

    An int becomes a float where one is wanted, an integral float an int, a
    tuple a list; a bool is no number. Raises ValueError for anything else.
    """
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin is Annotated:
        value = convert(value, args[0])
        if all(bounds.holds(value) for bounds in args[1:]):
            return value
    elif origin in UNIONS:
        found = []
        for member in args:
            try:
                found.append(convert(value, member))
            except ValueError:
                continue
        if found:   # the value's own type first: 1.0 stays one in `int | float`
            return min(found, key=lambda item: type(item) is not type(value))
    elif origin is Literal:     # with their types, because 1 == True
        if any(type(value) is type(arg) and value == arg for arg in args):
            return value
    elif origin is list and isinstance(value, (list, tuple)):
        return [convert(item, args[0] if args else Plain) for item in value]
    elif origin is dict and isinstance(value, dict):
        return {convert(key, str): convert(item, args[1] if args else Plain)
                for key, item in value.items()}
    elif origin in (int, float) and isinstance(value, bool):
        pass
    elif origin is int and (isinstance(value, int)
                            or isinstance(value, float) and value.is_integer()):
        return int(value)
    elif origin is float and isinstance(value, (int, float)):
        if abs(value) <= sys.float_info.max:    # neither nan nor inf
            return float(value)
    elif origin in (bool, str, type(None)) and isinstance(value, origin):
        return value
    raise ValueError(f"{_short(repr(value))}: expected {describe(kind)}")


def convert_text(text: str, kind: Any) -> Any:
    """The value that text of the command line stands for.

    A str takes the text as it is: a literal counts only where it is no str and
    `kind` admits it, as None for `str | None`. Raises ValueError as `convert`.
    """
    literal: Any = {'true': True, 'false': False}.get(text, text)
    # JSON as well, for lists with true and false in them
    for read in [json.loads] * text.startswith(('[', '{')) + [ast.literal_eval]:
        try:
            literal = read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError,
                RecursionError):
            continue
    if not isinstance(literal, str):
        try:
            return convert(literal, kind)
        except ValueError:
            pass    # the text itself may still be a str that `kind` admits
    return convert(text, kind)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + '...'


def _nearest(name: str, names: dict) -> str:
    near = difflib.get_close_matches(name.replace('-', '_').lower(), names, n=1)
    return f"; did you mean {near[0]}?" if near else ''


def read_schema(namespace: dict, source_path: str | Path) -> dict[str, Option]:
    """The options among a script's globals, in the order of their annotations.

    An option's comment stands behind it and may go on below, in comment lines
    that are indented before their `#` or by two spaces behind it. A heading is
    a single comment line at the left margin above a group; longer notes there
    are left out. Raises ConfigError for an option without a default or of a
    type that is not supported.
    """
    module = types.ModuleType('script')
    module.__dict__.update(namespace)
    notes, schema, problems = _read_comments(source_path), {}, []
    for name, kind in get_type_hints(module, include_extras=True).items():
        if name.startswith('_'):
            continue
        try:
            describe(kind)
            section, comment = notes.get(name, ('', ''))
            schema[name] = Option(name, kind, namespace[name], comment, section)
        except TypeError as error:
            problems.append(f"{source_path}: {name}: {error}")
        except KeyError:
            problems.append(f"{source_path}: {name}: no default; assign one")
    if problems:
        raise ConfigError(problems)
    return schema


def _read_comments(source_path: str | Path) -> dict[str, tuple[str, str]]:
    """{annotated name: (section, comment)} from a script's source."""
    with tokenize.open(source_path) as file:
        source = file.read()
    comments = {token.start[0]: token for token
                in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    alone = {line for line, token in comments.items()
             if token.line.lstrip().startswith('#')}
    indented = {line for line in alone if comments[line].start[1] > 0
                or comments[line].string.startswith('#  ')}
    margin = alone - indented
    notes, section, end = {}, '', 0
    for statement in ast.parse(source).body:
        start, last = statement.lineno, statement.end_lineno
        while last + 1 in indented:
            last += 1
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            for line in range(end + 1, start):
                if line in margin and not margin & {line - 1, line + 1}:
                    section = comments[line].string.strip('#-= ')
        if isinstance(statement, ast.AnnAssign):
            words = [comments[line].string.lstrip('#').strip()
                     for line in range(start, last + 1) if line in comments]
            notes[ast.unparse(statement.target)] = section, ' '.join(words)
        end = last
    return notes


FUNCTIONS = {f.__name__: f for f in (min, max, int, float, round, abs, len)}
ALLOWED = (ast.Constant, ast.Name, ast.BinOp, ast.UnaryOp, ast.BoolOp,
           ast.Compare, ast.IfExp, ast.List, ast.Tuple, ast.Dict, ast.Call,
           ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)


def _faults(node: ast.AST, scope: dict[str, Any]) -> list[str]:
    """What an expression holds that a config file may not."""
    if isinstance(node, ast.Call):
        if getattr(node.func, 'id', None) not in FUNCTIONS or node.keywords:
            return [f"a call is not allowed except {', '.join(FUNCTIONS)}, "
                    "without keywords"]
        return [fault for arg in node.args for fault in _faults(arg, scope)]
    if not isinstance(node, ALLOWED):
        return [f"{type(node).__name__} is not allowed; a config file holds "
                "assignments and arithmetic only"]
    if isinstance(node, ast.Name) and node.id not in scope:
        return [f"unknown name {node.id}{_nearest(node.id, scope)}"]
    return [fault for child in ast.iter_child_nodes(node)
            for fault in _faults(child, scope)]


def _apply_file(path: str, schema: dict[str, Option], values: dict[str, Any],
                problems: list[str]) -> dict[str, Any]:
    """What a config file sets; its expressions see `values` as they stand."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        body = ast.parse(source, path).body
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); "
                        "a config file is named by its path")
        return {}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, 'lineno', None) or 1
        text = getattr(error, 'msg', error)
        problems.append(f"{path}:{line}: syntax error: {text}")
        return {}
    given, private = {}, {}
    for statement in body:
        line = source.split('\n')[statement.lineno - 1].strip()
        where = f"{path}:{statement.lineno}: {_short(line)}"
        targets = getattr(statement, 'targets', None) or [
            getattr(statement, 'target', None)]
        value = getattr(statement, 'value', None)   # None in `name: int` too
        if (statement is body[0] and isinstance(statement, ast.Expr)
                and isinstance(getattr(value, 'value', None), str)):
            continue    # the docstring
        if value is None or not all(isinstance(t, ast.Name) for t in targets):
            problems.append(f"{where}: not allowed; a config file holds "
                            "assignments and arithmetic only")
            continue
        if isinstance(statement, ast.AugAssign):
            # as `a = a + b`, so that no default list is changed in place
            name = ast.Name(targets[0].id, ast.Load())
            value = ast.BinOp(name, statement.op, value)
        scope = values | given | private
        try:
            if faults := _faults(value, scope):
                problems += [f"{where}: {fault}" for fault in faults]
                continue
            tree = ast.fix_missing_locations(ast.Expression(value))
            result = eval(compile(tree, path, 'eval'),
                          {'__builtins__': {}, **FUNCTIONS}, scope)
            shown = _short(repr(result))    # fails for ints of 4300 digits
        except (ArithmeticError, TypeError, ValueError, MemoryError,
                RecursionError) as error:
            # the last argument: OverflowError's first may be a number
            problems.append(f"{where}: {(error.args or [error])[-1]}")
            continue
        for target in targets:
            if target.id.startswith('_'):
                private[target.id] = result
            else:
                at = f"{path}:{statement.lineno}: {target.id} = {shown}"
                given |= _accept(schema, target.id, result, at, problems)
    return given


def _accept(schema: dict[str, Option], name: str, value: Any, where: str,
            problems: list[str], read=convert) -> dict[str, Any]:
    """{name: checked value}, or {} and one more problem."""
    if name not in schema:
        problems.append(f"{where}: unknown option{_nearest(name, schema)}")
        return {}
    try:
        return {name: read(value, schema[name].type)}
    except ValueError:
        problems.append(f"{where}: expected {describe(schema[name].type)}")
        return {}


def parse(schema: dict[str, Option], argv: list[str],
          base: dict[str, Any] | None = None) -> Parsed:
    """Resolve defaults, `base`, config files, and command line, in that order.

    `base` replaces defaults by a run's recorded options. Config files see the
    options as they stand, without the command line. Raises ConfigError with all
    problems.
    """
    problems, values, given = [], {}, {}
    layers = {'default': {name: schema[name].default for name in schema},
              'recorded options': base or {}}
    for origin, layer in layers.items():
        for name, value in layer.items():
            where = f"{origin}: {name} = {_short(repr(value))}"
            values |= _accept(schema, name, value, where, problems)
    config_files = [path for path in argv if not path.startswith('-')]
    for path in config_files:
        given |= _apply_file(path, schema, values | given, problems)
    for argument in argv:
        name, equals, text = argument.removeprefix('--').partition('=')
        where = f"command line: {_short(argument)}"
        if argument.startswith('--') and equals:
            given |= _accept(schema, name, text, where, problems, convert_text)
        elif argument.startswith('--'):
            near = '' if name in schema else _nearest(name, schema)
            problems.append(f"{where}: no value; write --{name}=VALUE{near}")
        elif argument.startswith('-'):
            problems.append(f"{where}: not an option; write --NAME=VALUE")
    if problems:
        raise ConfigError(problems)
    return Parsed(values | given, given, config_files)


def help_text(schema: dict[str, Option], script: str, doc: str = '') -> str:
    """Usage, examples, and every option under its section, in 79 columns."""
    run, first = f"  python {script}", next(iter(schema), 'key')
    usage = f"usage: python {script} [CONFIG.py ...] [--key=value ...]"
    lines = [*inspect.cleandoc(f"{usage}\n\n{doc}").splitlines(), '',
             "Config files apply in the order given, then the command line.",
             "Given twice, the last wins. A str is taken as it is; otherwise",
             "write 12, 1e-3, true, None, [1,2], {'a': 1}.", '', "examples:",
             f"{run} --{first}=VALUE", f"{run} CONFIG.py --{first}=VALUE",
             f"{run} CONFIG.py OVERLAY.py"]
    section = None
    for name, option in schema.items():
        if option.section != section:
            section = option.section
            lines += ['', section or 'options']
        kind = describe(option.type)
        lines += [f"  --{name}  {kind}, default {option.default!r}"]
        lines += [f"      {option.comment}"] * bool(option.comment)
    wrapped = []
    for line in lines:
        indent = ' ' * (len(line) - len(line.lstrip()))
        indent += '      ' * line.startswith('  --')
        wrapped += textwrap.wrap(line, 79, subsequent_indent=indent,
                                 break_on_hyphens=False) or ['']
    return '\n'.join(wrapped)


def configure(namespace: dict, source_path: str | Path, argv: list[str],
              base: dict[str, Any] | None = None) -> Parsed:
    """Resolve a script's options and write them into its globals.

    Prints the help and exits with status 0 for --help. Raises ConfigError, and
    then leaves the globals as they were.
    """
    schema = read_schema(namespace, source_path)
    if '--help' in argv or '-h' in argv:
        doc = namespace.get('__doc__') or ''
        print(help_text(schema, os.path.basename(source_path), doc))
        raise SystemExit(0)
    parsed = parse(schema, argv, base)
    namespace.update(parsed.values)
    return parsed


def exit_with(error: Exception | str, status: int = 2) -> NoReturn:
    """Print an error to stderr and exit."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(status)
