"""train.py as its user sees it: what a run does, and the record it leaves."""

import gzip
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from running import (
    TINY,
    course,
    finish,
    newest,
    read_json,
    read_lines,
    run,
    runs,
    start,
    weights,
)
from safetensors.torch import load

from hf_convert import to_hf
from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from training.dataset import open_dataset

RECORDS = {
    'start': {'kind', 'step', 'world_size', 'strategy', 'device'},
    'train': {'kind', 'step', 'loss', 'grad_norm', 'lr', 'tokens',
              'tokens_per_s', 'mfu', 'mfu_causal', 'tflops', 'memory_gb',
              'step_ms', 'time_s'},
    'eval': {'kind', 'step', 'val_loss', 'val_bpb', 'tokens', 'time_s'},
    'end': {'kind', 'step', 'status', 'reason'},
}
RUN_KEYS = {
    'format_version', 'run_id', 'command', 'options', 'options_given',
    'architecture', 'architecture_name', 'arch_preset', 'parameters',
    'flops_per_token', 'flops_per_token_causal', 'tokens_per_iter',
    'world_size', 'device', 'dtype', 'peak_tflops', 'attention', 'dataset',
    'versions', 'commit'}
DATASET_KEYS = {
    'name', 'folder', 'fingerprint', 'vocab_size', 'tokenizer', 'train_tokens',
    'val_text_sha256', 'eval_documents', 'eval_bytes', 'eval_tokens',
    'eval_text_sha256'}


def model_of(run_folder):
    config = read_json(run_folder / 'run.json')['architecture']
    model = ConfigurableGPT(ModelArchitectureConfig.from_dict(config)).eval()
    left = model.load_state_dict(load(weights(run_folder)), strict=False)
    assert left.unexpected_keys == [] and left.missing_keys in (
        [], ['lm_head.weight'])
    return model


def test_the_folder_of_a_run(gpt2_run):
    assert re.fullmatch(r'run_\d{8}_\d{6}', gpt2_run.name)
    assert os.readlink(gpt2_run.parent / 'latest') == gpt2_run.name
    assert {path.name for path in gpt2_run.iterdir()} == {
        'run.json', 'metrics.jsonl', 'lock', 'checkpoints'}
    checkpoints = gpt2_run / 'checkpoints'
    assert os.readlink(checkpoints / 'latest') == 'step_00000190'
    # the two newest; the best is one of them
    assert {path.name for path in checkpoints.iterdir()} == {
        'latest', 'step_00000150', 'step_00000190'}
    for folder in checkpoints.glob('step_*'):
        assert {path.name for path in folder.iterdir()} == {
            'model.safetensors', 'optimizer.safetensors', 'state.json'}
        assert read_json(folder / 'state.json')['step'] == int(folder.name[5:])


def test_metrics(gpt2_run):
    lines = read_lines(gpt2_run)
    for record in lines:
        assert RECORDS[record['kind']] | {'unix_s'} == set(record)
    steps = {kind: [r['step'] for r in lines if r['kind'] == kind]
             for kind in RECORDS}
    assert steps == {'start': [0], 'train': list(range(1, 191)), 'end': [190],
                     'eval': [0, 50, 100, 150, 190]}
    clock = [record.pop('unix_s') for record in lines]
    assert clock == sorted(clock) and 0 < clock[-1] - clock[0] < 3600
    assert lines[0] == {'kind': 'start', 'step': 0, 'world_size': 1,
                        'strategy': 'single', 'device': 'cpu (1 threads)'}
    assert lines[-1] == {'kind': 'end', 'step': 190, 'status': 'finished',
                         'reason': None}
    for record in lines[1:-1]:
        assert record['tokens'] == record['step'] * 64
    times = [record['time_s'] for record in lines[1:-1]]
    assert times == sorted(times) and times[0] == 0
    trained = [record for record in lines if record['kind'] == 'train'][2:]
    assert all(record['mfu'] is None and record['tflops'] > 0
               and record['tokens_per_s'] > 0 for record in trained)


def test_mfu(qwen_run):
    """Of the peak that was given, by both counts of FLOPs."""
    record = read_json(qwen_run / 'run.json')
    assert record['peak_tflops'] == 5e-3
    causal = record['flops_per_token_causal'] / record['flops_per_token']
    rates = [r for r in read_lines(qwen_run)
             if r['kind'] == 'train' and r['tflops']]
    assert len(rates) > 100
    for r in rates:
        assert r['tflops'] == pytest.approx(
            r['tokens_per_s'] * record['flops_per_token'] / 1e12, rel=1e-9)
        assert r['mfu'] == pytest.approx(r['tflops'] / 5e-3, rel=1e-9)
        assert r['mfu_causal'] == pytest.approx(causal * r['mfu'], rel=1e-9)


def test_the_loss_falls(gpt2_run):
    losses = [r['loss'] for r in read_lines(gpt2_run) if r['kind'] == 'train']
    assert losses[0] == pytest.approx(math.log(384), abs=0.1)
    assert np.mean(losses[-20:]) < losses[0] - 1
    evals = [r['val_loss'] for r in read_lines(gpt2_run) if r['kind'] == 'eval']
    assert max(evals[1:]) < evals[0] - 1


def test_run_json(qwen_run, small_qwen):
    """Counted, not requested: parameters, FLOPs, documents."""
    record = read_json(qwen_run / 'run.json')
    assert RUN_KEYS <= set(record)
    assert DATASET_KEYS <= set(record['dataset'])
    model = model_of(qwen_run)
    assert record['parameters'] == {
        'total': model.get_num_params(),
        'non_embedding': model.get_num_params(non_embedding=True)}
    # q 32, k and v 16 each, out 32; gate, up and down 64; head 384
    matrices = 2 * 32 * (32 + 16 + 16 + 32 + 3 * 64) + 32 * 384
    attention = 12 * 2 * 4 * 8 * 16  # layers, heads, head size, block
    assert record['flops_per_token'] == 6 * matrices + attention
    assert record['flops_per_token_causal'] == pytest.approx(
        6 * matrices + attention / 2, rel=0.02)
    assert record['tokens_per_iter'] == 64
    assert record['architecture']['num_key_value_heads'] == 2
    assert record['options_given']['lr_schedule'] == 'wsd'
    assert record['options']['beta2'] == 0.95
    val = open_dataset(small_qwen['dataset']).split('val')
    documents = record['dataset']['eval_documents']
    sums = np.cumsum(val.document_bytes).tolist()
    assert 1 < documents < val.documents
    assert record['dataset']['eval_bytes'] == sums[documents - 1] <= 2000
    assert sums[documents] > 2000


def lr_expected(step, top, low, warmup, end, decay=None):
    """Of the update `step`, counted from 1; `decay` updates: wsd."""
    done = step - 1
    if done < warmup:
        return top * step / warmup
    if decay:
        return low + (top - low) * min(1, (end - done) / decay)
    share = (done - warmup) / (end - warmup)
    return low + (top - low) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize('name, expected', [
    # 2 % of 190 updates rounded, a tenth of the learning rate
    ('gpt2_run', dict(top=1e-2, low=1e-3, warmup=4, end=190)),
    ('qwen_run', dict(top=1e-2, low=1e-3, warmup=10, end=120, decay=30)),
], ids=['cosine', 'wsd'])
def test_learning_rate(request, name, expected):
    for (kind, step), record in course(request.getfixturevalue(name)).items():
        if kind == 'train':
            assert record['lr'] == pytest.approx(
                lr_expected(step, **expected), rel=1e-9), step


@pytest.mark.parametrize('name', ['gpt2_run', 'qwen_run', 'coarse_run'])
def test_bits_per_byte(request, name):
    """Anew, with transformers, over the recorded documents in float64."""
    folder = request.getfixturevalue(name)
    record = read_json(folder / 'run.json')
    val = open_dataset(record['dataset']['folder']).split('val')
    documents = record['dataset']['eval_documents']
    n_tokens = int(val.document_tokens[:documents].sum())
    n_bytes = int(val.document_bytes[:documents].sum())
    stream = torch.cat([torch.tensor([0]),
                        torch.from_numpy(val.read(0, n_tokens))])
    model, nats = to_hf(model_of(folder)), 0.0
    for begin in range(0, n_tokens, 16):
        ids = stream[begin : begin + 17]
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0].double()
        nats -= logits.log_softmax(-1).gather(1, ids[1:, None]).sum().item()
    last = [r for r in read_lines(folder) if r['kind'] == 'eval'][-1]
    assert last['val_loss'] == pytest.approx(nats / n_tokens, rel=1e-6)
    assert last['val_bpb'] == pytest.approx(
        nats / math.log(2) / n_bytes, rel=1e-6)


def test_gradient_accumulation(tmp_path, data):
    """The same windows however a batch of 8 is cut; starts at one moment."""
    started = [start('train.py', out_dir=tmp_path, **TINY | {
        'dataset': data / 'small', 'max_iters': 15, 'learning_rate': 1e-2,
        'batch_size': batch, 'gradient_accumulation_steps': 8 // batch})
        for batch in (1, 2, 4)]
    for process in started:
        result = finish(process)
        assert result.returncode == 0, result.stderr
    folders = runs(tmp_path)
    assert len(folders) == 3 and newest(tmp_path) in folders
    assert {read_json(folder / 'run.json')['options']['batch_size']
            for folder in folders} == {1, 2, 4}
    first, *others = map(course, folders)
    for other in others:
        assert other.keys() == first.keys()
        for at, record in first.items():
            for name, value in record.items():
                assert math.isclose(
                    other[at][name], value, abs_tol=0,
                    rel_tol=0 if name in ('lr', 'tokens') else 1e-6), (at, name)
    losses = [first['train', step]['loss'] for step in range(1, 16)]
    assert np.abs(np.diff(losses)).min() > 1e-5  # other windows, other losses


def test_profile(tmp_path, data, warm):
    """A trace of the updates 4 to 6."""
    result = warm.run('train.py', cwd=tmp_path, out_dir='out', **TINY | {
        'dataset': data / 'small', 'max_iters': 7, 'profile': True})
    assert result.returncode == 0, result.stderr
    path = newest(tmp_path / 'out') / 'profile.json.gz'
    assert 'profile.json.gz, to be opened' in result.stdout
    names = {event.get('name') for event in json.loads(
        gzip.decompress(path.read_bytes()))['traceEvents']}
    assert {name for name in names if str(name).startswith('ProfilerStep')} == {
        'ProfilerStep#3', 'ProfilerStep#4', 'ProfilerStep#5'}  # from 0 on
    assert 'aten::linear' in names


@pytest.fixture(scope='module')
def continued(tmp_path_factory, gpt2_run, small):
    """Its weights alone, 3 in a batch, and a wandb that does not work."""
    folder = tmp_path_factory.mktemp('continued')
    (folder / 'wandb.py').write_text(
        'def init(*args, **options):\n    raise OSError("no network here")\n')
    return folder, run(
        'train.py', out_dir=folder / 'out', env={'PYTHONPATH': str(folder)},
        **small | {'init_from': gpt2_run.parent, 'batch_size': 3,
                   'gradient_accumulation_steps': 1, 'max_tokens': 5 * 48,
                   'max_iters': 1000, 'wandb_log': True, 'dropout': 0.0})


def test_weights_only_start(continued, gpt2_run):
    """A run of its own from step 0; evaluation does not see the batch size."""
    folder, result = continued
    assert result.returncode == 0, result.stderr
    found, source = course(newest(folder / 'out')), course(gpt2_run)
    assert found['eval', 0]['val_loss'] == pytest.approx(
        source['eval', 190]['val_loss'], rel=1e-6)
    assert found['eval', 0]['tokens'] == 0
    assert found['train', 1]['lr'] > source['train', 190]['lr']
    assert max(step for kind, step in found) == 5  # max_tokens


def test_wandb_never_stops_a_run(continued):
    folder, result = continued
    assert result.stderr.count('no network here') == 1 or (
        result.stdout.count('no network here') == 1)
    assert read_lines(newest(folder / 'out'))[-1]['status'] == 'finished'


def test_what_is_printed(continued):
    """The report shows the built model; then a line for every step."""
    folder, result = continued
    record = read_json(newest(folder / 'out') / 'run.json')
    output = result.stdout + result.stderr
    for part in (f"{record['parameters']['total']:,}",
                 f"{record['parameters']['non_embedding']:,}",
                 str(record['tokens_per_iter']), record['attention'],
                 record['run_id'], 'FLOPs', 'bits per byte', 'left'):
        assert part in output
    assert len(re.findall(r'^ *\d+/5 +loss \d', output, re.MULTILINE)) == 5
    assert max(map(len, result.stdout.splitlines())) <= 100
