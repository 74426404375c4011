"""Shared by all tests: the repository on sys.path, and the parity summary."""

import sys
from pathlib import Path

import pytest

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


@pytest.fixture
def parity_report():
    return _parity_lines.append


def pytest_terminal_summary(terminalreporter):
    if _parity_lines:
        terminalreporter.section('largest differences from transformers')
        for line in _parity_lines:
            terminalreporter.write_line(line)
