"""Shared by all tests: the repository on sys.path, and the parity summary."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import TINY, WarmRanks, WarmStarts, finish, newest, start

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_parity_lines = []


@pytest.fixture(scope='session')
def tiny_tokenizer(tmp_path_factory):
    """A folder with a byte-level BPE of 600 ids that is shaped like Qwen3's."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    from data.download_qwen3_tokenizer import SPLIT_PATTERN

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=598,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()] * 2, trainer)
    tokenizer.add_special_tokens(
        [AddedToken('<|endoftext|>', normalized=False, special=True)]
    )
    tokenizer.add_tokens([AddedToken('<think>', normalized=False)])
    folder = tmp_path_factory.mktemp('tiny_tokenizer')
    tokenizer.save(str(folder / 'tokenizer.json'))
    return folder


def bpe_of(texts, n_ids, folder):
    """A byte-level BPE trained on `texts`; id 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=n_ids, special_tokens=['<|endoftext|>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer, folder):
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps({
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'eos_token': '<|endoftext|>'}))
    return tokenizer


def write_dataset(folder, tokenizer, texts, *, vocab_size, n_val=8):
    """The first `n_val` texts are for validation; the tokenizer lies there."""
    from training.dataset import DatasetWriter

    saved = (folder / 'tokenizer' / 'tokenizer.json').read_bytes()
    writer = DatasetWriter(
        folder, name=folder.name, vocab_size=vocab_size, source={},
        tokenizer={'name': folder.name, 'size': tokenizer.get_vocab_size(),
                   'sha256': hashlib.sha256(saved).hexdigest(), 'eot_id': 0,
                   'eot_token': '<|endoftext|>', 'path': 'tokenizer'})
    for i, text in enumerate(texts):
        writer.add('val' if i < n_val else 'train', tokenizer.encode(text).ids,
                   len(text.encode()), hashlib.sha256(text.encode()).digest())
    writer.close()
    return folder


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A folder of three small datasets.

    `small` and `coarse` hold the same text under two tokenizers, of 320 and
    270 ids; `words` has others, and many rows more than its 21 ids.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp('data')
    # as much of it as makes two and a half epochs of 190 updates
    source = (ROOT / 'model_config.py').read_text()[:14_000]
    texts = [source[i : i + 350 + 40 * (i % 3)]
             for i in range(0, len(source) - 400, 400)]
    for name, n_ids in ('small', 320), ('coarse', 270):
        bpe = bpe_of(texts, n_ids, folder / name / 'tokenizer')
        write_dataset(folder / name, bpe, texts, vocab_size=384)
    vocabulary = {'<|endoftext|>': 0} | {f'w{i}': i for i in range(1, 21)}
    words = Tokenizer(models.WordLevel(vocabulary))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save_tokenizer(words, folder / 'words' / 'tokenizer')
    texts = [' '.join(f'w{1 + (i + j) % 20}' for j in range(90))
             for i in range(20)]
    write_dataset(folder / 'words', words, texts, vocab_size=500)
    return folder


@pytest.fixture(scope='session')
def small(data):
    """Options of a run of 190 updates with dropout, two and a half epochs."""
    return TINY | {
        'dataset': data / 'small', 'max_iters': 190, 'learning_rate': 1e-2,
        'dropout': 0.1, 'batch_size': 2, 'gradient_accumulation_steps': 2,
        'eval_interval': 50}


@pytest.fixture(scope='session')
def small_qwen(data):
    """Options of a run of 120 updates without randomness but its seed."""
    return TINY | {
        'dataset': data / 'small', 'arch_preset': 'qwen3', 'n_layer': 2,
        'n_embd': 32, 'n_head': 4, 'num_key_value_heads': 2, 'head_dim': 8,
        'd_ff': 64, 'max_iters': 120, 'learning_rate': 1e-2, 'min_lr': 1e-3,
        'lr_schedule': 'wsd', 'warmup_iters': 10, 'wsd_decay_iters': 30,
        'eval_interval': 40, 'peak_tflops': 5e-3}  # so that it has an MFU


@pytest.fixture(scope='session')
def whole_runs(tmp_path_factory, small, small_qwen):
    """Runs that nothing interrupted, of `small`, of it with the other
    tokenizer, and of `small_qwen`."""
    folder = tmp_path_factory.mktemp('whole_runs')
    coarse = small | {'dataset': small['dataset'].with_name('coarse')}
    options = {'gpt2': small, 'coarse': coarse, 'qwen': small_qwen}
    started = {name: start('train.py', out_dir=folder / name, **options[name])
               for name in options}
    for process in started.values():
        result = finish(process)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope='session')
def warm(tmp_path_factory):
    """Starts scripts from a process that has made the slow imports."""
    starts = WarmStarts(tmp_path_factory.mktemp('warm'))
    yield starts
    starts.close()


@pytest.fixture(scope='session')
def warm_ranks(tmp_path_factory):
    """Starts jobs of several ranks from a process with the slow imports."""
    starts = WarmRanks(tmp_path_factory.mktemp('warm_ranks'))
    yield starts
    starts.close()


@pytest.fixture(scope='session')
def gpt2_run(whole_runs):
    return newest(whole_runs / 'gpt2')


@pytest.fixture(scope='session')
def coarse_run(whole_runs):
    return newest(whole_runs / 'coarse')


@pytest.fixture(scope='session')
def qwen_run(whole_runs):
    return newest(whole_runs / 'qwen')


@pytest.fixture(scope='session')
def qwen3_wheel(tmp_path_factory):
    """The package with Qwen3's BPE ranks, fetched once by pip."""
    from data import download_qwen3_tokenizer as qwen3

    try:
        return qwen3.download_wheel(tmp_path_factory.mktemp('wheel'))
    except qwen3.TokenizerError as error:
        pytest.skip(f'the package of the BPE ranks is out of reach: {error}')


@pytest.fixture(scope='session')
def qwen3_build(qwen3_wheel, tmp_path_factory):
    """The download command with no hub in reach: what it said, its folder."""
    path = tmp_path_factory.mktemp('built')
    done = subprocess.run(
        [sys.executable, ROOT / 'data' / 'download_qwen3_tokenizer.py',
         '--save_path', 'deep/qwen3'],
        capture_output=True, text=True, timeout=120, cwd=path,
        env=os.environ | {
            'HF_ENDPOINT': 'http://127.0.0.1:9', 'NO_PROXY': '127.0.0.1',
            'HF_HOME': str(path / 'home'), 'PIP_NO_INDEX': '1',
            'PIP_FIND_LINKS': str(qwen3_wheel.parent),
            'PIP_CONFIG_FILE': os.devnull,
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, path / 'deep' / 'qwen3'


@pytest.fixture(scope='session')
def qwen3_folder(qwen3_build):
    return qwen3_build[1]


def pytest_collection_modifyitems(items):
    for item in items:
        if (item.path.name in ('test_distributed.py', 'test_faults.py')
                and 'warm_ranks' in item.fixturenames):  # jobs of ranks
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def parity_report():
    return _parity_lines.append


def pytest_terminal_summary(terminalreporter):
    if _parity_lines:
        terminalreporter.section('largest differences')
        for line in _parity_lines:
            terminalreporter.write_line(line)
