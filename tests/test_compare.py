"""compare_architectures.py: a fair ranking, or none and the reason."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
from PIL import Image
from running import TINY, newest, read_json, read_lines, start, wait_for_step


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
        assert part in rows[1]
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
    row = {label: re.search(rf'^gpt2 .* out-{label}.*', output, re.MULTILINE)[0]
           for label in 'pqrs'}
    last = [r for r in read_lines(newest(folder.parent)) if r['kind'] == 'eval']
    assert last[-1]['step'] == 100
    assert f"{last[-1]['val_bpb']:.4f}" in row['s']
    assert 'incomplete' not in row['p'] and 'damaged' not in row['p']
    for label in 'qrs':
        assert 'incomplete' in row[label]
    assert '2 damaged' in row['q']


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


def test_a_running_run_says_so(tmp_path, compare, data):
    process = start('train.py', out_dir=tmp_path / 'out-p', **TINY | {
        'dataset': data / 'small', 'max_iters': 100_000})
    try:
        wait_for_step(process, tmp_path / 'out-p', 1)
        process.send_signal(signal.SIGSTOP)
        assert re.search(r'^gpt2 .* out-p.*running', compare('out-p'),
                         re.MULTILINE)
    finally:
        process.kill()
        process.communicate()


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
    ([], ['--latest']),
    (['--latest', '0'], ['--latest', '0']),
    (['--latest', '2', '--plot', 'a.nonsense'], ['a.nonsense', 'png']),
], ids=['missing runs', 'plot', 'nothing named', 'latest 0', 'no such format'])
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
