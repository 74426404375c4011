"""compare_architectures.py: a fair ranking, or none and the reason."""

import csv
import json
import math
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from running import (
    ROOT,
    TINY,
    newest,
    read_json,
    read_lines,
)

from training.configurator import read_schema
from training.durable import hold_lock
from training.run_summary import NOT_WHAT_IS_TRAINED
from training.settings import ARCHITECTURE_OPTIONS


def record_of(run_folder):
    return read_json(run_folder / 'run.json')


def write_record(run_folder, record):
    (run_folder / 'run.json').write_text(json.dumps(record))


def write_lines(run_folder, lines):
    (run_folder / 'metrics.jsonl').write_text(
        ''.join(json.dumps(line) + '\n' for line in lines))


@pytest.fixture
def copy_run(tmp_path, gpt2_run):
    """Copies of a run into tmp_path/out-NAME, its last figures altered."""
    def copy_run(name, source=gpt2_run, **figures):
        shutil.copytree(source.parent, tmp_path / f'out-{name}', symlinks=True)
        folder = newest(tmp_path / f'out-{name}')
        lines = read_lines(folder)
        last = [line for line in lines if line['kind'] == 'eval'][-1]
        last.update(figures)
        write_lines(folder, lines)
        return folder
    return copy_run


@pytest.fixture
def compare(tmp_path, warm):
    def compare(*arguments, status=0):
        result = warm.run('compare_architectures.py', *arguments, cwd=tmp_path)
        assert result.returncode == status, result.stderr
        assert 'Traceback' not in result.stderr
        return result.stdout if status == 0 else result.stderr
    return compare


def summaries(compare, tmp_path, *runs, by='tokens'):
    """The unrounded figures of a comparison."""
    compare(*runs, '--json', 'all.json', '--by', by)
    return read_json(tmp_path / 'all.json')


def write_curve(folder, values, *, seed=1337, every=10, time_per_step=1.0,
                **record):
    """A run that evaluated to `values` every `every` updates, at 64 tokens
    and 1000 FLOPs a token each; its options are those of a copied run."""
    known = record_of(folder)
    known['options']['seed'] = seed
    known |= {'flops_per_token': 1000, 'flops_per_token_causal': 800,
              'tokens_per_iter': 64, 'max_iters': every * len(values)} | record
    write_record(folder, known)
    lines = []
    for i, value in enumerate(values):
        at = {'step': i * every, 'tokens': 64 * i * every,
              'time_s': i * every * time_per_step}
        lines.append({'kind': 'train', 'loss': value, 'grad_norm': 1.0,
                      'tokens_per_s': 64.0, 'tflops': 1e-6, 'mfu': None,
                      'step_ms': 1e3 * time_per_step, 'memory_gb': 1.0} | at)
        lines.append({'kind': 'eval', 'val_loss': 2 * value,
                      'val_bpb': value} | at)
    write_lines(folder, lines + [{'kind': 'end', 'step': at['step'],
                                  'status': 'finished', 'reason': None}])


def labels(table):
    """The labels of the rows, from the best."""
    return re.findall(r'^gpt2 .* out-(\w+)', table, re.MULTILINE)


def test_ranked_by_bits_per_byte(tmp_path, copy_run, compare):
    """Though a loss per token would rank them the other way round."""
    for name, bpb in ('p', 3.25), ('q', 1.5), ('r', 2.75), ('s', 2.0):
        copy_run(name, val_bpb=bpb, val_loss=9 - bpb)
    output = compare('out-p', 'out-q', 'out-r', 'out-s', '--plot', 'a.png')
    assert labels(output) == ['q', 's', 'r', 'p']
    rows = output.split('\n\n')[0].splitlines()
    for part in '1.5000', '7.5000', '9.71k', '12.2k', 'out-q':
        assert part in rows[2]
    assert re.search(r'^best.*out-q', output, re.MULTILINE)
    best = compare('out-p', 'out-q', 'out-r', '--print_best').strip()
    assert (tmp_path / best).resolve() == newest(tmp_path / 'out-q')


def test_plot(tmp_path, copy_run, compare):
    copy_run('p'), copy_run('q', val_bpb=1.5)
    compare('out-p', 'out-q', '--plot', 'curves.png')
    pixels = np.asarray(Image.open(tmp_path / 'curves.png').convert('RGB'))
    assert pixels.shape[0] > 300 and pixels.shape[1] > 400
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0,
                                return_counts=True)
    coloured = np.ptp(colours.astype(int), axis=1) > 100
    assert counts[coloured].sum() > 300  # the curves are not grey


def test_one_text_under_two_tokenizers(compare, gpt2_run, coarse_run):
    """Ranked, since the text is the same, by bytes and not by tokens."""
    output = compare(gpt2_run, coarse_run)
    figures = {}
    for folder in gpt2_run, coarse_run:
        last = [r for r in read_lines(folder) if r['kind'] == 'eval'][-1]
        assert f"{last['val_bpb']:.4f}" in output
        figures[last['val_bpb']] = last['val_loss']
    assert re.search(r'^best', output, re.MULTILINE)
    order = re.findall(r'^gpt2 .* (\d\.\d{4}) +\d\.\d{4} ', output,
                       re.MULTILINE)
    assert order == [f'{bpb:.4f}' for bpb in sorted(figures)]
    # by loss per token the order would be the other one
    assert figures[min(figures)] > figures[max(figures)]


@pytest.mark.parametrize('change', [
    {'eval_text_sha256': '0' * 64}, {'eval_documents': 4, 'eval_bytes': 1500,
                                     'eval_text_sha256': '1' * 64}],
    ids=['other text', 'fewer documents'])
def test_other_validation_text_is_not_ranked(copy_run, compare, change):
    copy_run('p', val_bpb=3.0)
    folder = copy_run('q', val_bpb=2.0)
    record = record_of(folder)
    record['dataset'] |= change
    write_record(folder, record)
    output = compare('out-p', 'out-q')
    assert set(labels(output)) == {'p', 'q'}
    assert not re.search(r'^best', output, re.MULTILINE)
    assert 'not ranked' in output and 'validation text' in output
    error = compare('out-p', 'out-q', '--print_best', status=2)
    assert 'validation text' in error


def test_damaged_and_incomplete_metrics(copy_run, compare):
    """A line cut off and a line of garbage cost themselves only."""
    copy_run('p')
    path = copy_run('q') / 'metrics.jsonl'
    lines = path.read_text().splitlines()
    lines[7] = '\x00\x00{garbage'
    path.write_text('\n'.join(lines)[:-20])
    (copy_run('r') / 'metrics.jsonl').write_text('')
    folder = copy_run('s')
    write_lines(folder, [line for line in read_lines(folder)
                         if line['step'] <= 120])
    output = compare('out-p', 'out-q', 'out-r', 'out-s')
    rows = dict(re.findall(r'^(\[\d\]) out-(\w.*)', output, re.MULTILINE))
    last = [r for r in read_lines(newest(folder.parent)) if r['kind'] == 'eval']
    assert last[-1]['step'] == 100
    key = next(key for key, name in rows.items() if name.startswith('s'))
    assert re.search(rf"^gpt2 .* {last[-1]['val_bpb']:.4f} .*"
                     + re.escape(key), output, re.MULTILINE)
    assert sorted(rows.values()) == [
        'p', 'q (incomplete, 2 damaged)', 'r (incomplete)', 's (incomplete)']
    whole = output.replace('\n  ', ' ')
    assert 'out-q: ended without a word' in whole
    assert 'out-s: ended without a word (killed, or the machine went down) ' \
        'at update 120 of 190' in whole
    assert 'out-p:' not in whole


def test_void_entries_of_a_resumed_run_do_not_count(copy_run, compare):
    folder = copy_run('p')
    lines = read_lines(folder)
    ahead = [{**line, 'val_bpb': 0.1} for line in lines
             if line['kind'] == 'eval' and line['step'] == 190]
    at_100 = [line for line in lines if line['step'] <= 100]
    write_lines(folder, [*at_100, *ahead, {'kind': 'resume', 'step': 100}])
    output = compare('out-p')
    last = [line for line in at_100 if line['kind'] == 'eval'][-1]
    assert f"{last['val_bpb']:.4f}" in output and '0.1000' not in output


def test_a_running_run_says_so(copy_run, compare):
    """One whose lock is held; without, the same has ended unsaid."""
    folder = copy_run('p')
    write_lines(folder, [line for line in read_lines(folder)
                         if line['step'] <= 120])
    with hold_lock(folder):
        output = compare('out-p')
    assert 'out-p (running)' in output
    assert re.search('^out-p: running at update 120 of 190', output,
                     re.MULTILINE)
    assert 'running' not in compare('out-p')


def test_mfu_is_shown_where_a_run_has_one(tmp_path, compare, gpt2_run,
                                          qwen_run):
    """In the place of FLOP/s; the other run's is not known."""
    trained = [r for r in read_lines(qwen_run)
               if r['kind'] == 'train' and r['mfu']]
    full, causal = (np.median([r[name] for r in trained])
                    for name in ('mfu', 'mfu_causal'))
    alone = compare(gpt2_run)
    assert 'FLOP/s' in alone and 'MFU' not in alone
    output = compare(gpt2_run, qwen_run, '--json', 'all.json')
    assert 'FLOP/s' not in output
    assert re.search(rf'^qwen3 .* {full:.1%}  .*qwen$', output, re.MULTILINE)
    assert re.search(r'^gpt2 .* -  .*gpt2$', output, re.MULTILINE)
    rows = output.split('causal MFU')[1].splitlines()[1:3]
    assert [f' {causal:.1%} ' in row for row in rows] == [
        row.endswith('qwen') for row in rows]
    found = {run['label']: (run['mfu'], run['mfu_causal'])
             for run in read_json(tmp_path / 'all.json')['runs']}
    assert found == {'qwen': (full, causal), 'gpt2': (None, None)}


def test_latest(tmp_path, copy_run, compare):
    """By the time in the name, over all out*/."""
    for name, time in ('p', '093000'), ('q', '110000'), ('r', '100000'):
        folder = copy_run(name)
        folder.rename(folder.with_name(f'run_20250101_{time}'))
        link = tmp_path / f'out-{name}' / 'latest'
        link.unlink()
        link.symlink_to(f'run_20250101_{time}')
    (tmp_path / 'out-q').rename(tmp_path / 'runs-q')  # no out*/
    output = compare('--latest', 1)
    assert 'out-r' in output or '100000' in output
    output = compare('--latest', 5)
    assert len(re.findall('^gpt2 ', output, re.MULTILINE)) == 2


def test_bigram_baseline(compare, copy_run):
    """Better than knowing nothing, worse than a loss of 1 bit a byte."""
    dataset = record_of(copy_run('p'))['dataset']
    line = re.search(r'^baseline.*bigram[^.]* (\d+\.\d+) bits per byte',
                     compare('out-p'), re.MULTILINE)
    uniform = np.log2(384) * dataset['eval_tokens'] / dataset['eval_bytes']
    assert 1 < float(line[1]) < uniform - 1


def test_width(copy_run, compare):
    """A table of four runs in 80 columns, everything else in 100."""
    folders = [copy_run(name) for name in 'pqrs']
    output = compare('out-p', 'out-q', 'out-r', 'out-s')
    assert max(map(len, output.split('\n\n')[0].splitlines())) <= 80
    (folders[0] / 'metrics.jsonl').write_text('garbage\n' * 3)
    record = record_of(folders[1])
    record['dataset']['eval_text_sha256'] = '0' * 64
    write_record(folders[1], record)
    output = compare('out-p', 'out-q', 'out-r', 'out-s')
    assert max(map(len, output.splitlines())) <= 100, output


@pytest.mark.parametrize('arguments, says', [
    (['out-p', 'nowhere', 'out-empty'], ['nowhere', 'out-empty', 'out_dir']),
    (['out-p', '--plot', 'out-p/latest/run.json/a.png'], ['a.png', '--plot']),
    (['out-p', '--report', 'a.txt', '--csv', 'b.html'], ['a.txt', 'b.html']),
    (['out-p', '--dollars_per_gpu_hour', '-1'], ['--dollars_per_gpu_hour']),
    ([], ['--latest']),
    (['--latest', '0'], ['--latest', '0']),
    (['--latest', '2', '--plot', 'a.nonsense'], ['a.nonsense', 'png']),
], ids=['missing runs', 'plot', 'formats', 'dollars',
        'nothing named', 'latest 0', 'no such format'])
def test_errors(tmp_path, copy_run, compare, arguments, says):
    copy_run('p')
    (tmp_path / 'out-empty').mkdir()
    error = compare(*arguments, status=2)
    assert [part for part in says if part not in error] == [], error


@pytest.mark.parametrize('change', [
    lambda record: record.clear(), lambda record: record.pop('dataset'),
    lambda record: record['dataset'].pop('eval_text_sha256'),
], ids=['empty', 'no dataset', 'no hash of the text'])
def test_a_record_that_is_not_understood(copy_run, compare, change):
    folder = copy_run('p')
    record = record_of(folder)
    change(record)
    write_record(folder, record)
    error = compare('out-p', status=2)
    assert 'out-p' in error and 'run.json' in error


def test_no_runs(compare):
    assert 'train.py' in compare('--latest', 3, status=2)


# --- equal budgets -----------------------------------------------------------


def test_equal_tokens_and_not_the_ends(tmp_path, copy_run, compare):
    """The longer run ends lower; where both have been, it is behind. Between
    evaluations the curve is straight over the logarithm of the tokens."""
    write_curve(copy_run('long'), [9, 6, 5, 4, 3.5, 3, 2.5])
    write_curve(copy_run('short'), [9, 5.5, 3.5], every=16)
    found = summaries(compare, tmp_path, 'out-long', 'out-short')
    tokens = found['leads']['tokens']
    assert tokens['budget'] == 32 * 64
    assert [c['configuration'] for c in tokens['order']] == [
        'out-short', 'out-long']
    at_32 = 4 + (3.5 - 4) * math.log(32 / 30) / math.log(40 / 30)
    assert tokens['order'][1]['values'] == [pytest.approx(at_32, abs=1e-12)]
    assert tokens['order'][1]['behind'] == pytest.approx(at_32 - 3.5)
    assert found['runs'][0]['label'] == 'out-short'
    assert found['runs'][1]['val_bpb'] == 2.5


def test_flops_and_time_have_orders_of_their_own(tmp_path, copy_run, compare):
    """p is better at equal tokens, q at equal FLOPs: it needs half of them;
    by time p again, which is four times as fast."""
    write_curve(copy_run('p'), [9, 6, 5, 4.4, 4.0], time_per_step=0.25)
    write_curve(copy_run('q'), [9, 7, 5.2, 4.6, 4.2], flops_per_token=500)
    for by, first in ('tokens', 'p'), ('flops', 'q'), ('time', 'p'):
        found = summaries(compare, tmp_path, 'out-p', 'out-q', by=by)
        assert found['leads'][by]['order'][0]['configuration'] == f'out-{first}'
        assert found['runs'][0]['label'] == f'out-{first}'
    # 40 steps of q are 20 of p
    assert found['leads']['flops']['budget'] == 40 * 64 * 500
    assert found['leads']['flops']['order'][1]['values'] == [5.0]
    # q at 10 s has had 10 steps, p 40
    assert found['leads']['time']['order'][1]['values'] == [7.0]


def test_who_led_before(tmp_path, copy_run, compare):
    write_curve(copy_run('p'), [9, 6, 5.0, 4.5, 4.4])
    write_curve(copy_run('q'), [9, 7, 5.1, 4.4, 4.1])
    found = summaries(compare, tmp_path, 'out-p', 'out-q')
    assert found['leads']['tokens']['leaders'] == [
        [640, 'out-p'], [1920, 'out-q']]


def clock_backwards(lines):
    for line in lines:
        if line['step'] >= 30:
            line['time_s'] -= 25.0


def clock_jump(lines):
    for line in lines:
        if line['kind'] != 'end' and line['step'] >= 30:
            line['time_s'] += 3600.0


def resumed(world_size):
    def change(lines):
        at = [i for i, line in enumerate(lines) if line['step'] == 20][-1]
        lines.insert(at + 1, {
            'kind': 'resume', 'step': 20, 'world_size': world_size,
            'device': 'cpu (1 threads)'})
    return change


@pytest.mark.parametrize('change, says', [
    (clock_backwards, 'backwards'), (clock_jump, 'jumps'),
    (resumed(2), 'another number of processes'),
    (resumed(None), 'does not say')],
    ids=['backwards', 'jump', 'world size', 'unknown world size'])
def test_times_that_stand_for_nothing(tmp_path, copy_run, compare, change,
                                      says):
    """Tokens and FLOPs are compared all the same."""
    write_curve(copy_run('p'), [9, 6, 5, 4.5, 4.4, 4.3, 4.2])
    write_curve(copy_run('q'), [9, 7, 6, 5.5, 5.4, 5.3, 5.2])
    folder = newest(tmp_path / 'out-q')
    lines = [line for line in read_lines(folder) if line['kind'] != 'end']
    change(lines)
    write_lines(folder, lines)
    found = summaries(compare, tmp_path, 'out-p', 'out-q')
    assert says in ' '.join(found['leads']['time']['refused'])
    assert 'out-q' in ' '.join(found['leads']['time']['refused'])
    assert found['leads']['tokens']['order'][0]['configuration'] == 'out-p'
    assert found['leads']['flops']['order'][1]['values'] == [5.2]


def test_times_of_other_devices(tmp_path, copy_run, compare):
    write_curve(copy_run('p'), [9, 6, 5])
    write_curve(copy_run('q'), [9, 7, 6], device='NVIDIA H100')
    refused = summaries(compare, tmp_path, 'out-p', 'out-q')[
        'leads']['time']['refused']
    assert 'NVIDIA H100' in ' '.join(refused)


def test_another_schedule_is_said(tmp_path, copy_run, compare):
    """At the end of q's schedule p is in the midst of its own."""
    schedule = record_of(copy_run('p'))['schedule'] | {'min_lr': 0.0}
    write_curve(newest(tmp_path / 'out-p'), [9, 6, 5, 4.5, 4.4],
                schedule=schedule | {'lr_decay_iters': 80})
    write_curve(copy_run('q'), [9, 7, 6],
                schedule=schedule | {'lr_decay_iters': 20})
    output = compare('out-p', 'out-q')
    assert 'schedules differ' in output
    assert 'rate of out-q has come down to 1% of its peak' in (
        output.replace('\n  ', ' '))


def test_cost_counts_lost_work(tmp_path, copy_run, compare):
    """1800 s to the kill, 600 s after the resume on two processes: the pause
    of a day between them costs nothing."""
    folder = copy_run('p')
    write_curve(folder, [9, 6, 5, 4.5])
    lines = read_lines(folder)
    for line in lines:
        line['unix_s'] = 1000.0 + 60 * line['step']
    cut = [line for line in lines if line['step'] == 30]
    resume = {'kind': 'resume', 'step': 20, 'world_size': 2, 'device': 'cpu',
              'unix_s': 90_000.0}
    again = [line | {'unix_s': 90_600.0} for line in cut]
    write_lines(folder, [line for line in lines if line['kind'] != 'end']
                + [resume, *again])
    compare('out-p', '--csv', 'a.csv', '--dollars_per_gpu_hour', 6)
    [row] = csv.DictReader(open(tmp_path / 'a.csv'))
    assert float(row['wall_s']) == 2400
    assert float(row['device_hours']) == pytest.approx((1800 + 1200) / 3600)
    assert float(row['dollars']) == pytest.approx(5.0)


def test_spikes(tmp_path, copy_run, compare):
    folder = copy_run('p')
    write_curve(folder, [9.0] * 30)
    lines = read_lines(folder)
    for line in lines:
        if line['kind'] == 'train':  # the first has too few before it
            line['grad_norm'] = {50: 3.5, 200: 3.5, 210: 2.9}.get(
                line['step'], 1.0)
    write_lines(folder, lines)
    assert summaries(compare, tmp_path, 'out-p')['runs'][0]['spikes'] == 1


# --- seeds -------------------------------------------------------------------


def seeds(copy_run, name, ends):
    """Runs of one configuration that end at these bits per byte."""
    schedule = {'schedule': 'cosine', 'learning_rate': 1e-3 * ord(name),
                'min_lr': 0.0, 'warmup_iters': 0, 'lr_decay_iters': 30,
                'wsd_decay_iters': 0}
    for i, end in enumerate(ends):
        write_curve(copy_run(f'{name}{i}'), [9, 6, end], seed=i,
                    schedule=schedule)
    return [f'out-{name}{i}' for i in range(len(ends))]


def test_seeds_are_told_apart_from_configurations(tmp_path, copy_run, compare):
    """Welch's interval by hand: variances 0.01 and 0.04 over three seeds each
    give the error 0.1291 with 2.941 degrees of freedom."""
    runs = seeds(copy_run, 'p', [4.0, 4.1, 3.9])
    runs += seeds(copy_run, 'q', [5.0, 5.2, 4.8])
    order = summaries(compare, tmp_path, *runs)['leads']['tokens']['order']
    assert [len(c['runs']) for c in order] == [3, 3]
    assert order[0]['mean'] == pytest.approx(4.0)
    assert order[0]['sd'] == pytest.approx(0.1)
    assert order[1]['sd'] == pytest.approx(0.2)
    assert order[1]['behind'] == pytest.approx(1.0)
    assert order[1]['margin'] == pytest.approx(0.12910 * 3.2212, rel=1e-3)
    output = compare(*runs)
    assert 'exceeds' in output and 'more than seeds explain' in output.replace(
        '\n  ', ' ')


def test_a_difference_within_the_spread(copy_run, compare):
    runs = seeds(copy_run, 'p', [4.0, 4.1, 3.9])
    runs += seeds(copy_run, 'q', [4.2, 4.4, 4.0])
    output = compare(*runs).replace('\n  ', ' ')
    assert 'within what seeds explain' in output and 'undecided' in output


def test_one_seed_cannot_tell(copy_run, compare):
    runs = seeds(copy_run, 'p', [4.0]) + seeds(copy_run, 'q', [4.2])
    assert 'nobody knows' in compare(*runs).replace('\n  ', ' ')


def test_one_seed_twice_is_no_spread(tmp_path, copy_run, compare):
    """Equal runs of one seed would make any difference look real."""
    for name in 'pq':
        write_curve(copy_run(name), [9, 6, 4])
    order = summaries(compare, tmp_path, 'out-p', 'out-q')[
        'leads']['tokens']['order']
    assert [len(c['runs']) for c in order] == [1, 1]


def test_quantiles_of_t():
    """Of the tables: P(|t| > t) for 1, 2, 4 and 10 degrees of freedom."""
    from training.spread import t_quantile
    for p, dof, t in ((.975, 1, 12.7062), (.975, 2, 4.30265),
                      (.975, 4, 2.77645), (.995, 10, 3.16927)):
        assert t_quantile(p, dof) == pytest.approx(t, abs=2e-5)


# --- bits per byte and what is too good to be true ---------------------------


@pytest.mark.parametrize('name', ['gpt2', 'coarse'])
def test_bits_per_byte_by_hand(tmp_path, compare, whole_runs, data, name):
    """From the text, the tokenizer, the weights and plain cross-entropies."""
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from torch.nn import functional as F

    from model_builder import ConfigurableGPT
    from model_config import ModelArchitectureConfig

    run = newest(whole_runs / name)
    record = record_of(run)
    folder = data / {'gpt2': 'small', 'coarse': 'coarse'}[name]
    tokenizer = Tokenizer.from_file(str(folder / 'tokenizer/tokenizer.json'))
    source = (ROOT / 'model_config.py').read_text()[:14_000]
    texts = [source[i: i + 350 + 40 * (i % 3)]
             for i in range(0, len(source) - 400, 400)][:8]
    kept, n_bytes = [], 0
    for text in texts:  # the first whole ones within eval_bytes
        if n_bytes + len(text.encode()) > 2000:
            break
        kept.append(text)
        n_bytes += len(text.encode())
    stream = [0]
    for text in kept:
        stream += [*tokenizer.encode(text).ids, 0]
    config = ModelArchitectureConfig.from_dict(record['architecture'])
    model = ConfigurableGPT(config).eval()
    model.load_state_dict(load_file(
        run / 'checkpoints' / 'latest' / 'model.safetensors'), strict=False)
    nats, T = 0.0, config.block_size
    for begin in range(0, len(stream) - 1, T):
        ids = torch.tensor(stream[begin:begin + T + 1])
        with torch.no_grad():
            logits, _ = model(ids[None, :-1])
        nats += F.cross_entropy(logits[0].double(), ids[1:],
                                reduction='sum').item()
    found = summaries(compare, tmp_path, newest(whole_runs / 'gpt2'),
                      newest(whole_runs / 'coarse'))
    [row] = [r for r in found['runs'] if r['run'] == str(run)]
    assert row['val_bpb'] == pytest.approx(nats / math.log(2) / n_bytes,
                                           abs=1e-6)
    assert [r['val_bpb'] for r in found['runs']] == sorted(
        r['val_bpb'] for r in found['runs'])


BROKEN = {
    'no mask': """
from torch.nn import functional as F
real = F.scaled_dot_product_attention
F.scaled_dot_product_attention = (
    lambda *a, is_causal=False, **k: real(*a, **k))
""",
    'not shifted': """
from model_builder import ConfigurableGPT
real = ConfigurableGPT.forward
ConfigurableGPT.forward = (
    lambda self, x, y, **k: real(self, x, x.where(y >= 0, y), **k))
"""}


@pytest.fixture(scope='module')
def broken_runs(tmp_path_factory, data):
    """The same training three times: sound, and broken in two ways."""
    folder = tmp_path_factory.mktemp('broken')
    options = TINY | {
        'dataset': data / 'small', 'arch_preset': 'qwen3', 'n_embd': 64,
        'n_head': 2, 'head_dim': 32, 'weight_tying': False, 'batch_size': 16,
        'max_iters': 150, 'learning_rate': 1e-2, 'warmup_iters': 20,
        'eval_interval': 25, 'checkpoint_interval': 1000, 'log_interval': 50}
    processes = []
    for name, patch in {'sound': '', **BROKEN}.items():
        code = (f'import runpy, sys; sys.path.insert(0, {str(ROOT)!r})\n'
                f'{patch}\nsys.argv[0] = {str(ROOT / "train.py")!r}\n'
                "runpy.run_path(sys.argv[0], run_name='__main__')")
        processes.append(subprocess.Popen(
            [sys.executable, '-c', code, f'--out_dir={folder / name}',
             *(f'--{k}={v}' for k, v in options.items())],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    for process in processes:
        error = process.communicate()[1]
        assert process.returncode == 0, error
    return folder


@pytest.mark.slow
def test_a_broken_model_is_called_out(broken_runs, compare):
    for name in BROKEN:
        output = compare(broken_runs / name, broken_runs / 'sound')
        assert output.startswith(f'WARNING: {name} is too good to be true')
        assert 'bits per byte' in output.split('\n\n')[0]
        assert f'{name} (SUSPECT)' in output
        assert not re.search('^best', output, re.MULTILINE)
        assert re.search(f'^best .*{name}', compare(
            broken_runs / name, broken_runs / 'sound', '--keep_suspects'),
            re.MULTILINE)
    output = compare(broken_runs / 'sound')
    assert 'WARNING' not in output and 'SUSPECT' not in output


def test_sound_curves_are_not_called_out(whole_runs, compare):
    runs = [newest(whole_runs / name) for name in ('gpt2', 'coarse', 'qwen')]
    assert 'WARNING' not in compare(*runs)


@pytest.mark.parametrize('flops, bpb', [
    (8e12, 1.87), (5e17, 1.05), (4e19, 0.81), (1e23, 0.33), (4e25, 0.55)],
    ids=['quickstart', 'GPT-2 124M', 'nanochat d20', '15B on code', '405B'])
def test_what_others_reach_is_above_the_floor(flops, bpb):
    from training.sanity import floor_bpb
    assert floor_bpb(flops) < bpb
    assert floor_bpb(flops) > bpb / 4


def test_a_run_from_trained_weights(tmp_path, copy_run, compare):
    """It is no seed of a run from scratch, has more behind it than its
    budget, and may be better than that could make it."""
    write_curve(copy_run('p'), [9, 6, 3.9], seed=1)
    write_curve(copy_run('q'), [0.32, 0.31, 0.3], seed=2)
    assert 'WARNING: out-q is too good' in compare('out-p', 'out-q')
    record = record_of(newest(tmp_path / 'out-q'))
    record['options']['init_from'] = 'hf:some/model'
    write_record(newest(tmp_path / 'out-q'), record)
    output = compare('out-p', 'out-q').replace('\n  ', ' ')
    assert 'WARNING' not in output
    assert 'out-q began from hf:some/model' in output
    order = summaries(compare, tmp_path, 'out-p', 'out-q')[
        'leads']['tokens']['order']
    assert [c['runs'] for c in order] == [['out-q'], ['out-p']]


def test_a_step_of_a_walk_whose_first_seed_is_left_out(
        tmp_path, copy_run, compare):
    """Its other seed still stands between the steps before and after."""
    ends = {'p0': 4.5, 'p1': 4.4, 'q0': 0.3, 'q1': 4.2, 'r0': 4.0, 'r1': 4.1}
    for name, end in ends.items():
        write_curve(copy_run(name), [9, 6, end], seed=int(name[1]))
    (tmp_path / 'sweep.json').write_text(json.dumps({
        'options': {'walk_from': 'gpt2', 'walk_to': 'llama3'},
        'configurations': [{'label': step, 'runs': [f'out-{step[0]}0',
                                                    f'out-{step[0]}1']}
                           for step in ('p gpt2', 'q norm', 'r rope')]}))
    output = compare(tmp_path)
    walk = output[output.index('the walk'):].splitlines()[2:5]
    assert [row.split()[:3] for row in walk] == [
        ['4.4500', '2', '-'], ['4.2000', '1', '-0.2500'],
        ['4.0500', '2', '-0.1500']]


def test_the_spread_of_another_sweep(tmp_path, copy_run, compare):
    """Its seeds judge the steps of a walk of single runs; before it has any,
    the walk says so. Two sweeps may name each other."""
    for name, end in {'p': 4.5, 'q': 4.2}.items():
        write_curve(copy_run(name), [9, 6, end])
    seeds(copy_run, 's', [4.0, 4.01, 3.99])

    def sweep(name, runs, spread_from):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'sweep.json').write_text(json.dumps({
            'options': {'walk_from': 'gpt2', 'walk_to': 'llama3',
                        'spread_from': spread_from},
            'configurations': [{'label': step, 'runs': found}
                               for step, found in runs.items()]}))

    sweep('walk', {'p': ['../out-p'], 'q': ['../out-q']}, 'other')
    sweep('other', {'s': [f'../out-s{i}' for i in range(3)]}, 'walk')
    found = compare('walk').replace('\n  ', ' ')
    [row] = re.findall('^4.2000 .*', found, re.MULTILINE)
    # 4.3027 is Student's for 2 degrees of freedom: x 0.01 x sqrt(2)
    assert row.split()[2:5] == ['-0.3000', '0.0608', 'exceeds']
    (tmp_path / 'other' / 'sweep.json').unlink()
    (tmp_path / 'other').rmdir()
    sweep('other', {'s': ['none']}, None)
    assert 'other has no spread of seeds' in compare('walk').replace(
        '\n  ', ' ')


def test_every_option_is_what_is_trained_or_not():
    """A new option of train.py must be put on one side."""
    trained = {
        'dataset', 'arch_preset', 'learning_rate', 'lr_schedule',
        'warmup_iters', 'lr_decay_iters', 'wsd_decay_iters', 'min_lr',
        'weight_decay', 'beta1', 'beta2', 'adam_eps', 'grad_clip',
        'skip_nonfinite_steps', 'dtype'}
    schema = read_schema(runpy.run_path(str(ROOT / 'train.py')),
                         ROOT / 'train.py')
    assert not trained & NOT_WHAT_IS_TRAINED
    assert set(schema) == trained | NOT_WHAT_IS_TRAINED | set(
        ARCHITECTURE_OPTIONS)


# --- downstream tasks --------------------------------------------------------


def write_results(folder, *results):
    """Lines of evals.jsonl as eval.py writes them."""
    usual = {'kind': 'task', 'step': 190, 'stderr': {'acc': 0.01},
             'limit': None, 'num_fewshot': 0, 'questions': 100, 'version': 1}
    (folder / 'evals.jsonl').write_text(''.join(
        json.dumps(usual | result) + '\n' for result in results))


def test_downstream_tasks(tmp_path, copy_run, compare):
    """A column each, in all four outputs; of several results of the last
    step the newest, of other steps none."""
    p, q, _ = copy_run('p'), copy_run('q', val_bpb=1.5), copy_run('r')
    write_results(
        p, {'task': 'easy', 'metrics': {'acc': 0.1111}},
        {'task': 'easy', 'metrics': {'acc': 0.2222}},
        {'task': 'easy', 'metrics': {'acc': 0.3333}, 'step': 100},
        {'kind': 'text', 'path': 'a', 'loss': 1.0, 'bpb': 0.4444})
    write_results(
        q, {'task': 'easy', 'metrics': {'acc': 0.5555}},
        {'task': 'hard', 'metrics': {'acc': 0.6666, 'acc_norm': 0.7777}})
    output = compare('out-p', 'out-q', 'out-r', '--csv', 'a.csv',
                     '--json', 'a.json', '--report', 'a.html')
    table = output[output.index('downstream tasks'):].split('\n\n')[0]
    assert [line.split() for line in table.splitlines()[1:]] == [
        ['preset', 'easy', 'acc', 'hard', 'acc_norm', 'run'],
        ['gpt2', '0.5555', '0.7777', 'out-q'],
        ['gpt2', '0.2222', '-', 'out-p'], ['gpt2', '-', '-', 'out-r']]
    assert 'not comparable' not in output
    with open(tmp_path / 'a.csv', newline='') as file:
        rows = {row['label']: row for row in csv.DictReader(file)}
    runs = {run['label']: run
            for run in read_json(tmp_path / 'a.json')['runs']}
    for label, name, value in (
            ('out-p', 'easy/acc', 0.2222), ('out-q', 'easy/acc', 0.5555),
            ('out-q', 'hard/acc', 0.6666), ('out-q', 'hard/acc_norm', 0.7777),
            ('out-q', 'hard/acc_stderr', 0.01)):
        assert float(rows[label][name]) == runs[label][name] == value
    assert rows['out-r']['easy/acc'] == '' and 'easy/acc' not in runs['out-r']
    page = (tmp_path / 'a.html').read_text()
    assert '<th scope="col">hard acc_norm</th>' in page
    assert '<td>0.7777</td>' in page and '0.3333' not in page


def test_downstream_tasks_asked_differently(copy_run, compare):
    for name, shots in ('p', 0), ('q', 5):
        write_results(copy_run(name), {
            'task': 'easy', 'metrics': {'acc': 0.5}, 'num_fewshot': shots})
    output = compare('out-p', 'out-q').replace('\n  ', ' ')
    assert 'easy: not comparable' in output and 'num_fewshot 5' in output


def test_damaged_results_cost_themselves_only(copy_run, compare):
    folder = copy_run('p')
    write_results(folder, {'task': 'easy', 'metrics': {'acc': 0.1234}})
    with open(folder / 'evals.jsonl', 'a') as file:
        file.write('{"kind": "task"}\n[]\n{"kind": "task", "st')
    output = compare('out-p')
    assert '0.1234' in output and 'out-p (3 damaged)' in output
