"""Values, rows and columns as text for a terminal."""

import textwrap

WIDTH = 80


def duration(seconds: float) -> str:
    """1.5 h, 12 min or 40 s."""
    for unit, length in (('d', 86400), ('h', 3600), ('min', 60)):
        if seconds >= 2 * length:
            return f'{seconds / length:.1f} {unit}'
    return f'{seconds:.0f} s'


def short(value) -> str:
    """1234567 -> 1.23M; None -> '-'."""
    if value is None:
        return '-'
    for unit, size in (('E', 1e18), ('P', 1e15), ('T', 1e12), ('B', 1e9),
                       ('M', 1e6), ('k', 1e3)):
        if value >= size:
            return f'{value / size:.3g}{unit}'
    return f'{value:.3g}'


def number(value, spec, unit='') -> str:
    return '-' if value is None else format(value, spec) + unit


def show(value) -> str:
    """Of an option."""
    return f'{value:g}' if isinstance(value, float) else str(value)


def format_table(head: tuple, rows: list[tuple], left=None) -> str:
    """Columns of text: those of `left`, if None the first and the last, flush
    left, numbers right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = (0, len(widths) - 1) if left is None else left
    return '\n'.join(
        '  '.join(cell.ljust(width) if i in left else cell.rjust(width)
                  for i, (cell, width) in enumerate(
                      zip(line, widths, strict=True))).rstrip()
        for line in lines)


def print_rows(rows: list[tuple[str, str]]):
    """Print keys and what is said of each, in WIDTH columns."""
    for key, value in rows:
        print(textwrap.fill(value, WIDTH, initial_indent=f'{key:13} ',
                            subsequent_indent=14 * ' ',
                            break_long_words=False, break_on_hyphens=False))
