"""The pictures of a comparison, drawn by matplotlib.

Each figure is a function that draws on given axes, so that the same ones make
a page of PNG, SVG or PDF and the SVGs within the report.
"""

import io
import math
import re
from pathlib import Path

import matplotlib
import torch

from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from training.comparison import METRICS, Group
from training.comparison_input import Comparison
from training.layer_groups import layer_part
from training.terminal import short

matplotlib.use('Agg')

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: E402

# seen on white and on black; Okabe and Ito's, without the yellow and the black
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9',
           '#8c6bb1', '#999999')
STYLES = ('-', '--', ':', '-.')
AXIS_NAMES = {'tokens': 'training tokens', 'flops': 'training FLOPs',
              'time': 'training time, s'}
PARTS = ('embedding', 'positions', 'attention', 'ffn', 'norms', 'head')
INK = '#123456'  # stands for the page's own text colour in the report
RC = {'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False,
      'axes.grid': True, 'grid.alpha': 0.2, 'axes.axisbelow': True,
      'lines.linewidth': 1.4, 'svg.fonttype': 'none',
      'svg.hashsalt': 'comparison', 'axes.titlesize': 11,
      'legend.frameon': False}


def look_of(groups: list[Group]) -> dict[int, dict]:
    """{id of a run: colour and style}; the seeds of a group look alike."""
    looks = {}
    for i, group in enumerate(groups):
        look = {'color': COLOURS[i % len(COLOURS)],
                'linestyle': STYLES[i // len(COLOURS) % len(STYLES)]}
        looks |= {id(run): look for run in group.runs}
    return looks


def curves(axes, groups, key: str, axis: str, base):
    """Validation curves, the starting point left out."""
    looks = look_of(groups)
    shown = False
    for group in groups:
        for i, run in enumerate(group.runs):
            points = run.curve(axis, key)
            if points:
                axes.plot(*zip(*points, strict=True), **looks[id(run)],
                          marker='o', markersize=2.5,
                          label=group.label if i == 0 else None)
                shown = True
    at = None if base is None else base[key == 'val_bpb']
    if at is not None and shown:
        axes.axhline(at, color='#999999', linewidth=1, linestyle=(0, (1, 1)))
        axes.annotate('bigrams', (0.99, at), xycoords=('axes fraction', 'data'),
                      ha='right', va='bottom', fontsize=8, color='#999999')
    axes.set(xlabel=AXIS_NAMES[axis], ylabel=METRICS[key])
    few_ticks(axes.xaxis)


def few_ticks(axis):
    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(
        lambda value, _: '0' if value == 0 else short(value)))


def logged(axes, groups, key: str, name: str):
    """A quantity of every logged step, against tokens."""
    looks = look_of(groups)
    for group in groups:
        for i, run in enumerate(group.runs):
            points = [(t['tokens'], t[key]) for t in run.trains
                      if t[key] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), **looks[id(run)],
                          alpha=0.8, linewidth=1,
                          label=group.label if i == 0 else None)
    axes.set(xlabel=AXIS_NAMES['tokens'], ylabel=name)
    few_ticks(axes.xaxis)
    if key == 'tokens_per_s':
        few_ticks(axes.yaxis)
        axes.set_ylim(bottom=0)


def gradients(axes, groups):
    """Gradient norms before clipping; spikes carry a cross."""
    looks = look_of(groups)
    logged(axes, groups, 'grad_norm', 'gradient norm')
    for group in groups:
        for run in group.runs:
            spikes = set(run.spikes)
            points = [(t['tokens'], t['grad_norm']) for t in run.trains
                      if t['step'] in spikes]
            if points:
                axes.plot(*zip(*points, strict=True), 'x', markersize=6,
                          color=looks[id(run)]['color'])
    axes.set_yscale('log')


def parameters_by_part(run) -> dict[str, int]:
    """Counted on a model that takes no memory."""
    config = ModelArchitectureConfig.from_dict(run.record['architecture'])
    with torch.device('meta'):
        model = ConfigurableGPT(config)
    counts = dict.fromkeys(PARTS, 0)
    for name, p in model.named_parameters():
        counts[layer_part(name)] += p.numel()
    return counts


def memory_by_part(run) -> dict[str, float]:
    """GB of a process: fp32 weights, gradients and AdamW's moments as they
    are sharded, and what is left of the measured peak."""
    n, record = run.record['parameters']['total'], run.record
    shards = record['world_size'] if (
        record.get('strategy') == 'FSDP2') else 1
    parts = {'weights': 4 * n / shards / 1e9,
             'gradients': 4 * n / shards / 1e9,
             'AdamW': max(record.get('optimizer_bytes_per_rank') or [8 * n])
             / 1e9}
    if run.peak_memory_gb is not None:
        parts['activations and all else'] = max(
            0.0, run.peak_memory_gb - sum(parts.values()))
    return parts


def bars(axes, groups, parts_of, unit: str, scale=1.0):
    """A stacked bar for the first run of each configuration."""
    rows = [(g.label, parts_of(g.runs[0])) for g in groups]
    names = list(dict.fromkeys(name for _, parts in rows for name in parts))
    left = [0.0] * len(rows)
    for i, name in enumerate(names):
        widths = [parts.get(name, 0) / scale for _, parts in rows]
        if any(widths):
            axes.barh(range(len(rows)), widths, left=left, label=name,
                      color=COLOURS[i % len(COLOURS)])
            left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [shorten(label) for label, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -2.2)  # the legend stands above the bars
    axes.grid(axis='y', visible=False)
    axes.set_xlabel(unit)
    axes.legend(fontsize=8, loc='upper left', ncols=3, columnspacing=1,
                handlelength=1, borderpad=0)


def shorten(label: str) -> str:
    return label if len(label) <= 22 else label[:21] + '…'


def pictures(comparison: Comparison, base) -> dict:
    """{name: (caption, function that draws on axes)}."""
    groups, runs = comparison.groups, comparison.runs
    key = 'val_bpb' if any(run.curve('tokens', 'val_bpb')
                           for run in runs) else 'val_loss'
    found = {}
    for axis, name in AXIS_NAMES.items():
        found[f'{key}-{axis}'] = (
            f'validation {METRICS[key]} against {name.split(",")[0]}',
            lambda axes, axis=axis: curves(axes, groups, key, axis, base))
    if key == 'val_bpb':
        one = len({run.record['dataset']['fingerprint'] for run in runs}) == 1
        warning = '' if one else ' (not comparable between tokenizers)'
        for axis, name in AXIS_NAMES.items():
            found[f'val_loss-{axis}'] = (
                f'validation loss per token against {name.split(",")[0]}'
                + warning, lambda axes, axis=axis: curves(
                    axes, groups, 'val_loss', axis, base))
    found['train-loss'] = (
        'training loss per token of single updates',
        lambda axes: logged(axes, groups, 'loss', 'loss per token'))
    found['throughput'] = ('throughput', lambda axes: logged(
        axes, groups, 'tokens_per_s', 'tokens/s'))
    found['gradients'] = ('gradient norm before clipping; crosses are spikes',
                          lambda axes: gradients(axes, groups))
    found['parameters'] = ('parameters by part, in millions', lambda axes: bars(
        axes, groups, parameters_by_part, 'million parameters', 1e6))
    found['memory'] = ('memory of a process by part', lambda axes: bars(
        axes, groups, memory_by_part, 'GB'))
    return found


def size_of(name: str, comparison: Comparison) -> tuple[float, float]:
    """Inches; bars grow with the number of configurations."""
    if name in ('parameters', 'memory'):
        return 4.4, 1.4 + 0.3 * len(comparison.groups)
    return 4.4, 2.9


def save_pictures(path: Path, comparison: Comparison, base):
    """All of them on one sheet."""
    found = pictures(comparison, base)
    rows = math.ceil(len(found) / 3)
    height = max(size_of(name, comparison)[1] for name in found)
    with plt.rc_context(RC):
        figure, grid = plt.subplots(
            rows, 3, figsize=(14, rows * height), layout='constrained')
        for axes in grid.flat[len(found):]:
            axes.axis('off')
        for axes, (caption, draw) in zip(grid.flat, found.values(),
                                         strict=False):
            draw(axes)
            axes.set_title(caption)
        handles, names = grid.flat[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, names, loc='outside upper center', ncols=4)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def inline_svgs(comparison: Comparison, base) -> dict[str, tuple[str, str]]:
    """{name: (caption, SVG to stand within a page)}: in the page's text
    colour, on its background, with ids of its own."""
    rc = RC | {name: INK for name in (
        'text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color',
        'ytick.color', 'grid.color')}
    found = {}
    with plt.rc_context(rc):
        for name, (caption, draw) in pictures(comparison, base).items():
            figure, axes = plt.subplots(
                figsize=size_of(name, comparison), layout='constrained')
            draw(axes)
            text = io.StringIO()
            figure.savefig(text, format='svg', transparent=True,
                           metadata={'Date': None})
            plt.close(figure)
            found[name] = caption, for_page(text.getvalue(), name)
    return found


def for_page(svg: str, name: str) -> str:
    svg = svg[svg.index('<svg'):]
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
                 r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = svg.replace(INK, 'currentColor')
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('url(#', f'url(#{name}-')
    # the page's font, not those of this machine
    svg = re.sub(r'font-family: [^;"]*;?', '', svg)
    svg = re.sub(r'<style.*?</style>', '', svg, flags=re.DOTALL)
    return svg.replace('xlink:href="#', f'href="#{name}-')
