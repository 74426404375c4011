"""Bad input: one clear error before any work, and no file touched."""

import hashlib
import json
import re
import shutil
import signal
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from conftest import write_dataset
from running import (
    TINY,
    newest,
    read_json,
    read_lines,
    snapshot,
    spoil_a_number,
    start,
    wait_for_step,
    wait_until_stopped,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer


@dataclass
class Case:
    """What is asked of train.py in the folder, and what its error must say.

    `prepare(folder)` alters the folder, which has a finished `out`, `data` and
    an empty `unused`; `says` are parts of the message, values and remedies.
    """

    options: dict
    says: list
    prepare: object = None
    arguments: list = field(default_factory=list)
    env: dict = field(default_factory=dict)


def alter(path, change):
    """By a function that returns the new content, or changes the old one."""
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content) or content)


def flip_a_byte(content):
    content[-1] ^= 1


def damage(name, change):
    def prepare(folder):
        alter(newest(folder / 'out') / 'checkpoints' / 'latest' / name, change)
    return prepare


def not_finite(name, value):
    def prepare(folder):
        spoil_a_number(
            newest(folder / 'out') / 'checkpoints' / 'latest' / name, value)
    return prepare


class Malicious:
    """Unpickled, it makes the file `ran` in the working directory."""

    def __reduce__(self):
        return open, ('ran', 'w')


def a_pickle(folder):
    """In place of the weights, under a hash that is right."""
    checkpoint = newest(folder / 'out') / 'checkpoints' / 'latest'
    path = checkpoint / 'model.safetensors'
    torch.save({'wte.weight': Malicious()}, path)
    state = read_json(checkpoint / 'state.json')
    state['files'][path.name] = {
        'bytes': path.stat().st_size,
        'sha256': hashlib.sha256(path.read_bytes()).hexdigest()}
    (checkpoint / 'state.json').write_text(json.dumps(state))


def bins(change):
    def prepare(folder):
        alter(folder / 'data' / 'small' / 'train.bin', change)
    return prepare


def as_uint16(content):
    return np.frombuffer(content, np.uint32).astype(np.uint16).tobytes()


def an_id_of_7777(content):
    content[4000:4004] = (7777).to_bytes(4, 'little')


def legacy(folder):
    """nanoGPT's format: no meta.json, uint16, ids of more than 50304 rows."""
    (folder / 'legacy').mkdir()
    ids = np.arange(4000, dtype=np.uint16)
    ids[1000] = 60000
    for split in 'train', 'val':
        ids.tofile(folder / 'legacy' / f'{split}.bin')


def short(folder):
    small = folder / 'data' / 'small'
    shutil.copytree(small / 'tokenizer', folder / 'short' / 'tokenizer')
    bpe = Tokenizer.from_file(str(small / 'tokenizer' / 'tokenizer.json'))
    write_dataset(folder / 'short', bpe, ['some text'] * 3 + ['abc'],
                  vocab_size=384, n_val=3)


def another_dataset(folder):
    shutil.rmtree(folder / 'data' / 'small')
    shutil.copytree(folder / 'data' / 'coarse', folder / 'data' / 'small')


def no_checkpoint(folder):
    shutil.rmtree(newest(folder / 'out') / 'checkpoints')


def damaged_record(folder):
    alter(newest(folder / 'out') / 'run.json', lambda content: content[:-40])


NEW = {'out_dir': 'unused'}
RESUME = {'init_from': 'resume', 'out_dir': 'out'}
QWEN = NEW | {'arch_preset': 'qwen3', 'head_dim': 8}
CASES = {
    'missing dataset': Case(
        NEW | {'dataset': 'no_such_set'},
        ['no_such_set', 'python data/custom/prepare.py --name no_such_set']),
    'missing dataset folder': Case(
        NEW | {'dataset': './nowhere/set'}, ['nowhere/set', 'prepare.py']),
    'short split': Case(
        NEW | {'dataset': './short'}, ['train', '4 tokens', '--block_size'],
        short),
    'id without a row': Case(
        NEW, ['train.bin', '7777', '384'], bins(an_id_of_7777)),
    'id without a row, nanoGPT format': Case(
        NEW | {'dataset': './legacy'}, ['60000', '50304'], legacy),
    'vocab_size below the ids': Case(
        NEW | {'vocab_size': 100}, ['vocab_size', '100', '384']),
    'bin too long': Case(
        NEW, ['train.bin', 'prepare.py'], bins(lambda c: c + b'\0')),
    'bin too short': Case(
        NEW, ['train.bin', 'prepare.py'], bins(lambda c: c[:-4])),
    'bin of another type': Case(
        NEW, ['train.bin', 'prepare.py'], bins(as_uint16)),
    'unknown and mistyped options': Case(
        NEW | {'max_itres': 10, 'dtype': 'int4', 'seed': 'x', 'n_lyer': 2},
        ['max_itres', 'max_iters', 'int4', 'bfloat16', '--seed=x',
         'n_lyer', 'n_layer', '--help']),
    'several wrong values': Case(
        NEW | {'rope_theta': 123456.0, 'min_lr': 1.5, 'learning_rate': 0.5,
               'warmup_iters': 77, 'lr_decay_iters': 66, 'n_embd': 15},
        ['rope_theta', '123456', 'min_lr', '1.5', 'learning_rate', '0.5',
         'warmup_iters', '77', 'lr_decay_iters', '66', 'n_embd', '15']),
    'heads and KV heads': Case(
        QWEN | {'n_head': 4, 'num_key_value_heads': 3},
        ['n_head', '4', 'num_key_value_heads', '3']),
    'wsd option without wsd': Case(
        NEW | {'wsd_decay_iters': 7}, ['wsd_decay_iters', '7', 'lr_schedule']),
    'both shardings': Case(
        NEW | {'use_zero1': True, 'use_fsdp': True}, ['use_zero1', 'use_fsdp']),
    'unwritable out_dir': Case(
        {'out_dir': 'out/latest/run.json/sub'},
        ['out/latest/run.json', '--out_dir']),
    'no compiler': Case(
        NEW | {'compile': True}, ['compile', '--compile=False'],
        env={'PATH': '/nowhere', 'CXX': '', 'CC': ''}),
    'device that is not there': Case(NEW | {'device': 'xpu'}, ['xpu', 'cpu']),
    'weights of nothing': Case(
        NEW | {'init_from': './no_run'}, ['no_run', 'init_from']),
    'weights of another architecture': Case(
        NEW | {'init_from': './out', 'n_layer': 3}, ['n_layer', '3', '1']),
    'resume with nothing there': Case(
        {'init_from': 'resume', 'out_dir': 'unused'},
        ['unused', 'run_YYYYMMDD_HHMMSS']),
    'resume without a checkpoint': Case(
        RESUME, ['checkpoint', '--init_from=scratch'], no_checkpoint),
    'resume with another architecture': Case(
        RESUME | {'n_layer': 2, 'n_embd': 32},
        ['n_layer', '2', '1', 'n_embd', '32', '16']),
    'resume with another batch and block': Case(
        RESUME | {'batch_size': 3, 'block_size': 8},
        ['tokens per update', '64', '48', 'block_size', '16', '8']),
    'resume with another dataset': Case(
        RESUME | {'dataset': './data/coarse'}, ['dataset', 'coarse', 'small']),
    'resume after the dataset changed': Case(
        RESUME, ['dataset', 'small', 'coarse', '--init_from=scratch'],
        another_dataset),
    'model checkpoint with a flipped byte': Case(
        RESUME, ['model.safetensors', 'SHA-256'],
        damage('model.safetensors', flip_a_byte)),
    'optimizer checkpoint with a flipped byte': Case(
        RESUME, ['optimizer.safetensors', 'SHA-256'],
        damage('optimizer.safetensors', flip_a_byte)),
    'truncated model checkpoint': Case(
        RESUME, ['model.safetensors', 'bytes'],
        damage('model.safetensors', lambda content: content[:999])),
    'truncated state of a checkpoint': Case(
        RESUME, ['state.json'],
        damage('state.json', lambda content: content[:99])),
    'weights from a damaged checkpoint': Case(
        NEW | {'init_from': './out'}, ['model.safetensors', 'SHA-256'],
        damage('model.safetensors', flip_a_byte)),
    'emptied optimizer checkpoint': Case(
        RESUME, ['optimizer.safetensors', '0 bytes', 'remove its folder'],
        damage('optimizer.safetensors', bytearray.clear)),
    'a pickle in place of the weights': Case(
        RESUME, ['model.safetensors', 'cannot be read'], a_pickle),
    'NaN in the weights of a checkpoint': Case(
        RESUME, ['model.safetensors', 'wte.weight', '1 of the', 'nan',
                 'remove its folder'],
        not_finite('model.safetensors', float('nan'))),
    'infinity in the moments of a checkpoint': Case(
        RESUME, ['optimizer.safetensors', 'wte.weight', '-inf',
                 'remove its folder'],
        not_finite('optimizer.safetensors', float('-inf'))),
    'weights with infinity': Case(
        NEW | {'init_from': './out'},
        ['model.safetensors', 'wte.weight', 'inf', 'older one'],
        not_finite('model.safetensors', float('inf'))),
    'damaged run.json': Case(RESUME, ['run.json'], damaged_record),
    'missing config file': Case(
        NEW, ['no_config.py'], arguments=['no_config.py']),
}


def assert_refused(result, says):
    assert result.returncode == 2, result.stderr
    assert 'Traceback' not in result.stderr
    assert result.stderr.count('error:') == 1
    assert [part for part in says if part not in result.stderr] == [], (
        result.stderr)


@pytest.fixture
def folder(tmp_path, data, whole_runs):
    """What a case alters: see Case."""
    shutil.copytree(data, tmp_path / 'data')
    shutil.copytree(whole_runs / 'gpt2', tmp_path / 'out', symlinks=True)
    record = newest(tmp_path / 'out') / 'run.json'
    record.write_text(record.read_text().replace(
        str(data), str(tmp_path / 'data')))
    (tmp_path / 'unused').mkdir()
    return tmp_path


def options_of(case):
    if case.options.get('init_from') == 'resume':
        return case.options
    return TINY | {'dataset': './data/small', 'max_iters': 40} | case.options


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_refused(folder, warm, case):
    if case.prepare:
        case.prepare(folder)
    before = snapshot(folder)
    result = warm.run('train.py', *case.arguments, cwd=folder, env=case.env,
                      **options_of(case))
    after = snapshot(folder)
    assert_refused(result, case.says)
    assert [path for path in before | after
            if before.get(path) != after.get(path)] == []


@pytest.mark.parametrize('options', [
    RESUME, NEW, NEW | {'init_from': './out'}], ids=['resume', 'new', 'from'])
def test_the_same_folder_is_accepted_undamaged(folder, warm, options):
    """So that each refusal above is due to what its case changed."""
    result = warm.run('train.py', cwd=folder, **options_of(Case(options, [])))
    assert result.returncode == 0, result.stderr
    assert 'error:' not in result.stderr


def test_a_running_run_is_not_resumed(tmp_path, small, warm):
    holder = start('train.py', out_dir=tmp_path,
                   **small | {'max_iters': 100_000})
    try:
        wait_for_step(holder, tmp_path, 1)
        holder.send_signal(signal.SIGSTOP)  # it writes nothing meanwhile
        wait_until_stopped(holder)
        before = snapshot(tmp_path)
        result = warm.run('train.py', cwd=tmp_path, init_from='resume',
                          out_dir=tmp_path)
        assert snapshot(tmp_path) == before
        assert_refused(result, [str(tmp_path), str(holder.pid)])
    finally:
        holder.kill()
        holder.communicate()


def test_a_loss_that_is_not_finite(tmp_path, data, warm):
    """Exit status 3; the last checkpoint stays, the bad step is not taken."""
    result = warm.run('train.py', cwd=tmp_path, out_dir=tmp_path, **TINY | {
        'dataset': data / 'small', 'max_iters': 50, 'learning_rate': 1e30,
        'grad_clip': 0, 'checkpoint_interval': 1})
    assert result.returncode == 3
    assert 'Traceback' not in result.stderr
    folder = newest(tmp_path)
    end = read_lines(folder)[-1]
    assert (end['kind'], end['status']) == ('end', 'failed')
    taken, failing = end['step'], end['step'] + 1
    assert 1 <= taken < 50
    message = ' '.join(result.stderr.split())
    for number in failing, 4 * taken, 4 * taken + 3:  # update, its samples
        assert re.search(rf'\b{number}\b', message), message
    # the record names the kind of error before
    assert end['reason'].removeprefix('NotFinite: ') in message
    checkpoint = folder / 'checkpoints' / 'latest'
    assert read_json(checkpoint / 'state.json')['step'] == taken
    for name in 'model', 'optimizer':
        tensors = load_file(checkpoint / f'{name}.safetensors')
        assert all(torch.isfinite(t).all() for t in tensors.values())
