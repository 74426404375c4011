"""sweep.py: what it plans, what it repeats (nothing), what it leaves behind."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import write_dataset
from running import (
    ROOT,
    TIMEOUT,
    TINY,
    finish,
    newest,
    read_json,
    read_lines,
    runs,
    start,
    wait_for,
)
from tokenizers import Tokenizer

from model_config import get_preset_config
from training.configurator import ConfigError, read_schema
from training.sweep_plan import (
    architecture_of,
    choose,
    make_cell,
    plan_configurations,
    read_sweep,
    run_cells,
    tune_cells,
)


@pytest.fixture(scope='module')
def schema():
    import runpy
    path = ROOT / 'train.py'
    return read_schema(runpy.run_path(str(path), run_name='train'), path)


@pytest.fixture
def plan(schema, data):
    """(configurations, sweep, given) of a sweep's options."""
    def plan(*files, sizes=True, **options):
        argv = [f'--{k}={v}' for k, v in
                ({'dataset': data / 'small'} | options).items()]
        if sizes:
            argv += [f'--{k}={v}' for k, v in (TINY | {
                'n_layer': 2, 'n_embd': 64, 'n_head': 4,
                'head_dim': 16}).items()]
        sweep, given = read_sweep(schema, list(map(str, files)), argv)
        return plan_configurations(sweep, given, schema), sweep, given
    return plan


def problems(plan, **options):
    with pytest.raises(ConfigError) as error:
        plan(**options)
    return '\n'.join(error.value.problems)


# --- what is planned ---------------------------------------------------------


def test_grid(plan, schema, tmp_path):
    """Every combination, every seed; options that go together stay so."""
    found, sweep, given = plan(
        grid={'arch_preset': ['gpt2', 'qwen3'],
              'block_size,batch_size': [[8, 8], [16, 4]]}, seeds=3, seed=7)
    assert [c.label for c in found] == [
        'gpt2, block_size=8, batch_size=8', 'gpt2, block_size=16, batch_size=4',
        'qwen3, block_size=8, batch_size=8',
        'qwen3, block_size=16, batch_size=4']
    cells = run_cells(found[3], sweep, given, schema, tmp_path)
    assert [cell.seed for cell in cells] == [7, 8, 9]
    assert cells[0].values['arch_preset'] == 'qwen3'
    assert cells[0].values['batch_size'] == 4
    assert len({cell.folder for c in found for cell in run_cells(
        c, sweep, given, schema, tmp_path)}) == 12


@pytest.mark.parametrize('kind', ['equal_params', 'equal_total_params'])
def test_equal_parameters(plan, schema, tmp_path, kind):
    """Within half of what four more in d_ff add, in every preset."""
    found, sweep, given = plan(
        grid={'arch_preset': ['gpt2', 'llama2', 'llama3', 'qwen3'],
              'weight_tying': [True, False]}, **{kind: 150_000})
    counted = 'total' if 'total' in kind else 'non_embedding'
    for c in found:
        [cell] = run_cells(c, sweep, given, schema, tmp_path)
        assert abs(cell.parameters[counted] - 150_000) <= 2 * 2 * (3 * 64 + 1)
        assert cell.d_ff == c.chosen['d_ff'] and cell.d_ff % 4 == 0


@pytest.mark.parametrize('ends', [('gpt2', 'qwen3'), ('qwen3', 'gpt2'),
                                  ('llama2', 'llama3')])
def test_a_walk_ends_where_it_should(plan, schema, ends):
    """One component a step, in the order that is stated; the last
    configuration is the other preset, to the field."""
    found, sweep, given = plan(walk_from=ends[0], walk_to=ends[1])
    order = ['norm', 'positions', 'bias', 'FFN', 'GQA', 'head', 'QK', 'tying']
    steps = [c.label.split()[1] for c in found]
    assert steps[0] == ends[0]
    assert steps[1:] == [name for name in order if name in steps]
    assert len(steps) == {'gpt2': 8, 'qwen3': 8, 'llama2': 4}[ends[0]]

    def architecture(configuration):
        return architecture_of(
            given | configuration.options, schema).to_dict()

    sizes = {name: given[name] for name in
             ('n_layer', 'n_embd', 'n_head', 'head_dim', 'block_size')}
    end = get_preset_config(ends[1], vocab_size=384, **sizes).to_dict()
    walked = architecture(found[-1])
    if ends[1] == 'gpt2':  # which has no RoPE for it to matter
        end.pop('rope_theta'), walked.pop('rope_theta')
    assert walked == end
    before = architecture(found[0])
    for c in found[1:]:
        now = architecture(c)
        changed = {k for k in now if now[k] != before[k]}
        assert 1 <= len(changed) <= 3, (c.label, changed)
        before = now


def test_a_walk_does_not_change_sizes(plan):
    said = problems(plan, walk_from='gpt2', walk_to='qwen3', sizes=False)
    assert 'n_layer' in said and 'vocab_size' not in said


def test_tuning_runs_are_shorter_in_all(plan, schema, tmp_path):
    [c], sweep, given = plan(
        tune={'learning_rate': [1e-3, 2e-3]}, max_iters=1000,
        warmup_iters=100, lr_schedule='wsd', wsd_decay_iters=300)
    cells = tune_cells(c, sweep, given, schema, tmp_path)
    assert [cell.values['learning_rate'] for cell in cells] == [1e-3, 2e-3]
    assert {cell.max_iters for cell in cells} == {200}
    assert cells[0].values['warmup_iters'] == 20
    assert cells[0].values['wsd_decay_iters'] == 60


def test_choice_of_a_rate():
    inf = float('inf')
    assert choose([1e-3, 2e-3, 4e-3], [3.0, 2.0, 2.5]) == (2e-3, False)
    assert choose([1e-3, 2e-3, 4e-3], [3.0, 2.5, 2.0]) == (4e-3, True)
    assert choose([4e-3, 1e-3, 2e-3], [inf, 2.0, 2.5]) == (1e-3, True)
    assert choose([1e-3, 2e-3], [inf, inf]) == (None, False)
    assert choose([1e-3], [2.0]) == (1e-3, False)


def test_all_problems_at_once(plan):
    said = problems(
        plan, grid={'n_layer': [1, 1], 'rope_thta': [1e4], 'out_dir': ['a']},
        tune={'learning_rate': 'x'}, walk_from='gpt2')
    for part in ('twice', 'rope_thta', 'out_dir', 'list of values',
                 'both ends', 'two sweeps'):
        assert part in said, said
    assert 'chooses d_ff' in problems(plan, equal_params=9, d_ff=8)
    said = problems(plan, grid={'n_head': [3, 4], 'rope_theta': [1e4]},
                    arch_preset='llama3')
    assert 'n_head=3' in said and 'n_head=4' not in said
    assert 'already' in problems(plan, equal_params=100)


@pytest.fixture(scope='module')
def long_data(data, tmp_path_factory):
    """A dataset with tokens for a sequence of the longest context."""
    folder = tmp_path_factory.mktemp('long') / 'long'
    shutil.copytree(data / 'words' / 'tokenizer', folder / 'tokenizer')
    tokenizer = Tokenizer.from_file(str(folder / 'tokenizer/tokenizer.json'))
    return write_dataset(folder, tokenizer, ['w1 w2 w3 ' * 400] * 24,
                         vocab_size=384)


@pytest.mark.parametrize('name', sorted(
    p.stem for p in (ROOT / 'config').glob('s[wt]*_*.py')))
def test_presets(plan, schema, tmp_path, name, long_data):
    """Each plans on its own; every cell is one that train.py would take."""
    found, sweep, given = plan(ROOT / 'config' / f'{name}.py', sizes=False,
                               dataset=long_data)
    assert len(found) >= 2 and sweep['tune']
    first = [make_cell(c, given | c.all_options, schema, sweep, tmp_path)
             for c in found]
    if sweep['equal_params']:
        counts = [cell.parameters['non_embedding'] for cell in first]
        assert max(counts) - min(counts) < 0.004 * max(counts)
    if 'study' in name:
        assert max(counts) < 1_000_000
        tokens = [c.values['batch_size'] * 128 * c.max_iters for c in first]
        assert set(tokens) == {1954 * 1024}
    assert f'config/{name}.py' in (ROOT / 'config' / f'{name}.py').read_text()


# --- what is run -------------------------------------------------------------


@pytest.fixture
def options(data, tmp_path):
    """A sweep of two configurations in tmp_path/out-s."""
    return TINY | {
        'dataset': data / 'small', 'max_iters': 300, 'eval_interval': 100,
        'warmup_iters': 10, 'sweep_dir': tmp_path / 'out-s'}


def run_sweep(*arguments, **options):
    """`run`, with the patience that several runs in turn need."""
    process = start('sweep.py', *arguments, **options)
    try:
        out, err = process.communicate(timeout=4 * TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(
        process.args, process.returncode, out, err)


def cells_in(folder):
    return sorted(folder.glob('*/*/run_*'))


def assert_nothing_repeated(folder, n, max_iters):
    """`n` runs, each with every update once in what is not void."""
    assert len(cells_in(folder)) == n
    for cell in cells_in(folder):
        assert len(runs(cell.parent)) == 1
        lines = read_lines(cell)
        assert lines[-1]['kind'] == 'end'
        assert lines[-1]['status'] == 'finished'
        steps = [line['step'] for line in lines if line['kind'] == 'train']
        assert steps == list(range(1, max_iters + 1))


@pytest.mark.slow
def test_killed_and_started_again(options, tmp_path):
    """kill -9 of the sweep alone while its second run trains: that run goes
    on by itself, and the next sweep waits for it; the first is not touched."""
    arguments = ['--grid', 'n_layer=1,2']
    process = start('sweep.py', *arguments, **options)
    second = tmp_path / 'out-s' / 'n_layer=2' / 'seed_1337'
    wait_for(lambda: (second / 'latest').exists() and any(
        line['kind'] == 'train' for line in read_lines(newest(second))),
        process, 2 * TIMEOUT)
    holder = int((newest(second) / 'lock').read_text().split()[1])
    os.kill(holder, signal.SIGSTOP)  # so that it cannot end too early
    process.kill()
    process.communicate()
    first = newest(tmp_path / 'out-s' / 'n_layer=1' / 'seed_1337')
    untouched = (first / 'metrics.jsonl').stat().st_mtime_ns
    process = start('sweep.py', *arguments, **options)
    try:
        while 'waiting for it' not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
    finally:
        os.kill(holder, signal.SIGCONT)
    result = finish(process)
    assert result.returncode == 0, result.stderr
    assert_nothing_repeated(tmp_path / 'out-s', 2, 300)
    assert (first / 'metrics.jsonl').stat().st_mtime_ns == untouched
    assert 'n_layer=2' in result.stdout and '<svg' in (
        tmp_path / 'out-s' / 'report.html').read_text()
    sweep = read_json(tmp_path / 'out-s' / 'sweep.json')
    assert [c['label'] for c in sweep['configurations']] == [
        'n_layer=1', 'n_layer=2']


@pytest.mark.slow
def test_ctrl_c_and_going_on(options, tmp_path):
    """The running cell saves a checkpoint and is resumed from it."""
    arguments = ['--grid', 'n_layer=1,2']
    process = start('sweep.py', *arguments, **options)
    first = tmp_path / 'out-s' / 'n_layer=1' / 'seed_1337'
    wait_for(lambda: (first / 'latest').exists() and any(
        line['step'] >= 20 for line in read_lines(newest(first))
        if line['kind'] == 'train'), process)
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert result.returncode == 128 + signal.SIGINT
    assert 'to go on' in result.stdout
    end = read_lines(newest(first))[-1]
    assert (end['kind'], end['status']) == ('end', 'stopped')
    assert not (tmp_path / 'out-s' / 'n_layer=2').exists()
    assert run_sweep(*arguments, **options).returncode == 0
    assert_nothing_repeated(tmp_path / 'out-s', 2, 300)
    resumed = [line['step'] for line in read_lines(newest(first))
               if line['kind'] == 'resume']
    assert resumed == [end['step']]


@pytest.mark.slow
def test_killed_with_its_runs(options, tmp_path):
    """The run that was killed goes on from its last checkpoint."""
    arguments = ['--grid', 'n_layer=1,2', '--checkpoint_interval=50']
    process = subprocess.Popen(
        [sys.executable, ROOT / 'sweep.py', *arguments,
         *(f'--{k}={v}' for k, v in options.items())],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    first = tmp_path / 'out-s' / 'n_layer=1' / 'seed_1337'
    wait_for(lambda: (first / 'latest' / 'checkpoints').exists() and list(
        (newest(first) / 'checkpoints').glob('step_*')), process)
    process.kill()
    holder = (newest(first) / 'lock').read_text().split()[1]
    os.kill(int(holder), signal.SIGKILL)
    process.communicate()
    assert run_sweep(*arguments, **options).returncode == 0
    lines = read_lines(newest(first))
    assert len(runs(first)) == 1 and lines[-1]['status'] == 'finished'
    [resume] = [line['step'] for line in lines if line['kind'] == 'resume']
    assert resume >= 50
    steps = [line['step'] for line in lines if line['kind'] == 'train']
    assert len(steps) < 300 + 60


@pytest.mark.slow
def test_tuned_seeds_and_a_failure(options, tmp_path):
    """Rates per configuration, the edge told; a cell that fails is reported
    and the rest goes on; one that diverges is a result, not a failure."""
    options |= {'max_iters': 40, 'eval_interval': 20}
    arguments = ['--grid', 'n_layer=1,2', '--tune',
                 'learning_rate=1e-3,1e-2,1e20', '--tune_iters', 10,
                 '--seeds', 2, '--jobs', 2]
    blocked = tmp_path / 'out-s' / 'n_layer=2' / 'seed_1338'
    blocked.mkdir(parents=True)
    (blocked / 'latest').mkdir()  # no run can point there
    (blocked / 'latest' / 'x').touch()
    result = run_sweep(*arguments, **options)
    assert result.returncode == 1
    assert 'n_layer=2 (seed_1338)' in result.stdout
    assert result.stdout.count('diverged') == 2
    sweep = read_json(tmp_path / 'out-s' / 'sweep.json')
    for c in sweep['configurations']:
        assert c['tuned'] == {'learning_rate': 1e-2} and not c['edge']
        assert c['trials'][2] == [1e20, None]
    for seed in 'n_layer=1/seed_1337', 'n_layer=1/seed_1338', (
            'n_layer=2/seed_1337'):
        record = read_json(newest(tmp_path / 'out-s' / seed) / 'run.json')
        assert record['options']['learning_rate'] == 1e-2
    (blocked / 'latest' / 'x').unlink()
    (blocked / 'latest').rmdir()
    before = len(cells_in(tmp_path / 'out-s'))
    result = run_sweep(*arguments, **options)
    assert result.returncode == 0, result.stdout
    # the failed one alone, which had left a run that had not begun
    assert len(cells_in(tmp_path / 'out-s')) == before + 1
    assert result.stdout.count(' left') == 1
    table = result.stdout[result.stdout.index('bits per byte at'):]
    assert 'n_layer=1' in table and '0.01' in table


@pytest.mark.slow
def test_a_choice_that_is_no_number(options):
    options |= {'max_iters': 20, 'eval_interval': 10}
    result = run_sweep('--tune', 'lr_schedule=cosine,wsd', '--tune_iters', 5,
                       **options)
    assert result.returncode == 0, result.stderr
    assert re.search('base: lr_schedule=(cosine|wsd)$', result.stdout,
                     re.MULTILINE)


def test_refusals(options, warm, tmp_path):
    (tmp_path / 'a.py').write_text('grid = {"n_layer": [1, 2]}\nseeds = 0\n')
    for arguments, says in (
            (['a.py'], 'seeds'), (['--grid', 'n_layer'], 'NAME=VALUE'),
            (['--out_dir=x', '--grid', 'n_layer=1'], '--sweep_dir'),
            (['--grid', 'nlayer=1'], 'nlayer')):
        result = warm.run('sweep.py', *arguments, cwd=tmp_path,
                          dataset=options['dataset'])
        assert result.returncode == 2, result.stdout
        assert says in result.stderr and 'Traceback' not in result.stderr
        assert not list(tmp_path.glob('out*'))


def test_dry_run(options, warm, tmp_path):
    result = warm.run('sweep.py', '--dry_run', '--grid', 'n_layer=1,2',
                      '--seeds', 2, cwd=tmp_path, **options)
    assert result.returncode == 0, result.stderr
    assert '4 runs' in result.stdout and not list(tmp_path.glob('out*'))
    # the first line begins with a path
    assert max(map(len, result.stdout.splitlines()[1:])) <= 80
