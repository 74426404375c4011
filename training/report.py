"""The report of a comparison: one HTML page that needs nothing else.

No script, no network: tables, the curves as inline SVG in the page's own text
colour, light or dark as the reader's system is, one column on a phone.
"""

import datetime
import shlex
from html import escape
from pathlib import Path

from training.comparison_input import Comparison
from training.durable import write_text
from training.figures import inline_svgs, look_of
from training.run_summary import (
    SPIKE_RATIO,
    SPIKE_WINDOW,
    RunSummary,
)
from training.tables import Table
from training.terminal import show

# differ in every run and change nothing
SKIPPED = ('out_dir', 'init_from', 'wandb_run_name')

STYLE = """
:root { color-scheme: light dark; --line: #8884; --mark: #ffe08a;
  --warn: #b3261e; --soft: #8882; }
@media (prefers-color-scheme: dark) { :root { --mark: #6b5300;
  --warn: #ff8a80; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem;
  max-width: 80rem; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; }
.warn { border-left: 4px solid var(--warn); padding: .3rem .8rem;
  background: var(--soft); font-weight: 600; max-width: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .4rem 0; }
th, td { padding: .2rem .55rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: Canvas; min-width: 6rem;
  max-width: 11rem; white-space: normal; }
mark { background: var(--mark); color: inherit; padding: 0 .2rem; }
.grid { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; } figcaption { font-size: .85rem; }
svg { width: 100%; height: auto; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0;
  list-style: none; font-size: .9rem; }
.legend span { display: inline-block; width: 1.8rem; height: 0;
  border-top: 3px solid; vertical-align: middle; margin-right: .4rem; }
code, pre { font: .82rem/1.45 ui-monospace, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft);
  padding: .5rem .7rem; margin: .3rem 0; }
p, li, summary, figcaption { overflow-wrap: anywhere; }
"""
LINES = {'-': 'solid', '--': 'dashed', ':': 'dotted', '-.': 'dashed'}

NOTES = (
    'Ranked by bits per byte of one validation text, which does not depend on '
    'the tokenizer. Loss per token and perplexity are comparable between runs '
    'of one tokenizer only.',
    'Values at a common budget are read off the validation curves, on a '
    'straight line over the logarithm of the budget between two evaluations, '
    'and never beyond the last.',
    'sd is the standard deviation over seeds. +- is the half-width of Welch\'s '
    'interval for a difference, at 95 % over all pairs together. "exceeds": '
    'more than seeds explain; "within": undecided; "unknown": a single seed, '
    'and no spread to judge it by. With three seeds only differences of '
    'several spreads can exceed it.',
    'FLOPs: 6 for each weight that is multiplied and 12 L H D T for attention; '
    '"causal" counts half of the latter. MFU is over the dense peak; a device '
    'without a known peak has none.',
    f'A spike is a logged gradient norm above {SPIKE_RATIO:g} times the median '
    f'of the {SPIKE_WINDOW} logged before it. Slope: of the validation loss '
    'in log-log over its last stretch.',
    'Training: the time of the updates that count. Wall: from start to end, '
    'evaluations, saving and lost work included, without pauses between a '
    'stop and its resume. Hours: wall time times processes; cost is these '
    'times the price of an hour.',
)


def write_report(path: Path, comparison: Comparison, tables: list[Table],
                 warnings: list[str], lines: list[str], command: str, base):
    """Written aside and renamed: a reader sees the old page or the new."""
    write_text(path, page(comparison, tables, warnings, lines, command, base))


def page(comparison, tables, warnings, lines, command, base) -> str:
    runs = comparison.runs
    today = datetime.datetime.now().strftime('%Y-%m-%d %H:%M')
    pictures = inline_svgs(comparison, base)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, '
        'initial-scale=1">',
        # nothing may be fetched, not even a favicon
        '<meta http-equiv="Content-Security-Policy" content="default-src '
        "'none'; style-src 'unsafe-inline'; img-src data:\">",
        '<link rel="icon" href="data:,">',
        '<title>Comparison of architectures</title>',
        f'<style>{STYLE}</style></head><body>',
        '<h1>Comparison of architectures</h1>',
        f'<p>{len(runs)} run(s) of {len(comparison.groups)} '
        f'configuration(s), {today}</p><pre>{escape(command)}</pre>',
        *(f'<p class="warn">{escape(line)}</p>' for line in warnings),
        '<h2>Findings</h2><ul>',
        *(f'<li>{escape(line)}</li>' for line in lines), '</ul>',
        '<h2>Tables</h2>', *map(table_html, tables[3:]),
        *map(table_html, tables[:3]),
        '<h2>Curves</h2>', legend(comparison), '<div class="grid">',
        *(f'<figure aria-label="{escape(caption)}">{svg}<figcaption>'
          f'{escape(caption)}</figcaption></figure>'
          for caption, svg in pictures.values()), '</div>',
        '<h2>Configurations</h2>', differences(runs),
        '<h2>Runs</h2>', *map(run_html, runs),
        '<h2>How to read it</h2><ul>',
        *(f'<li>{escape(note)}</li>' for note in NOTES), '</ul>',
        '</body></html>']
    return '\n'.join(parts) + '\n'


def table_html(table: Table) -> str:
    """The name comes first, and stays in sight when a phone scrolls."""
    def turned(row):
        return [row[-1], *row[:-1]]

    head = ''.join(f'<th scope="col">{escape(name)}</th>'
                   for name in turned(table.head))
    rows = ''.join('<tr>' + ''.join(f'<td>{escape(cell)}</td>'
                                    for cell in turned(row)) + '</tr>'
                   for row in table.rows)
    return (f'<div class="scroll"><table><caption>{escape(table.title)}'
            f'</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
            '</table></div>')


def legend(comparison: Comparison) -> str:
    """Which colour is whose."""
    looks, items = look_of(comparison.groups), []
    for group in comparison.groups:
        look = looks[id(group.runs[0])]
        items.append(
            f'<li><span style="border-color:{look["color"]};border-top-style:'
            f'{LINES[look["linestyle"]]}"></span>{escape(group.label)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def settings(run: RunSummary) -> dict:
    """Options and architecture as built, the latter where both have one."""
    options = {k: v for k, v in run.record['options'].items()
               if k not in SKIPPED}
    data, commit = run.record['dataset'], run.record.get('commit')
    return options | run.record['architecture'] | {
        'begun from': run.begun_from or 'scratch',
        'dataset': data.get('name', data['folder']),
        'max_iters': run.record['max_iters'],
        'processes': run.record['world_size'],
        'device': run.record['device'],
        'commit': commit and commit[:12] + commit[40:]}  # with +changes


def differences(runs: list[RunSummary]) -> str:
    """A row for each setting in which the runs differ; what differs from the
    most frequent value is marked."""
    every = [settings(run) for run in runs]
    names = list(dict.fromkeys(name for one in every for name in one))
    rows, equal = [], 0
    for name in names:
        values = [show(one.get(name)) for one in every]
        if len(set(values)) == 1:
            equal += 1
            continue
        usual = max(dict.fromkeys(values), key=values.count)
        cells = ''.join(
            f'<td>{escape(v) if v == usual else mark(v)}</td>'
            for v in values)
        rows.append(f'<tr><td>{escape(name)}</td>{cells}</tr>')
    if not rows:
        return f'<p>All {equal} settings are equal.</p>'
    head = ''.join(f'<th scope="col">{escape(run.label)}</th>'
                   for run in runs)
    return (f'<p>{equal} other settings are equal; what differs from the most '
            'frequent value is marked.</p><div class="scroll"><table><thead>'
            f'<tr><th scope="col">setting</th>{head}</tr></thead><tbody>'
            f'{"".join(rows)}</tbody></table></div>')


def mark(value: str) -> str:
    return f'<mark>{escape(value)}</mark>'


def run_html(run: RunSummary) -> str:
    """Its command and all its settings, folded."""
    command = shlex.join(map(str, run.record['command']))
    every = '\n'.join(f'{name} = {value!r}'
                      for name, value in sorted(settings(run).items()))
    return (f'<details><summary>{escape(run.label)}: {escape(run.status)}, '
            f'{escape(str(run.folder))}</summary>'
            f'<pre>python {escape(command)}</pre><pre>{escape(every)}</pre>'
            '</details>')
