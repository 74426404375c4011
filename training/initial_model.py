"""A published or imported model to begin training from.

Its architecture then comes from the model, and the data must have been made
with its tokenizer.
"""

import json
from pathlib import Path

from training.configurator import ConfigError
from training.dataset import Dataset, DatasetError
from training.distributed import all_or_none, broadcast_text, on_main
from training.hf_folder import HUB
from training.hf_weights import model_type_of
from training.model_source import (
    NoTokenizer,
    Source,
    find_source,
    find_tokenizer,
    read_tokenizer,
)
from training.settings import ARCHITECTURE_OPTIONS

# fields that change no weight and that training may choose
CHOSEN_BY_TRAINING = ('attention_backend', 'dropout')


def find_published(init_from: str, ranks) -> Source | None:
    """The model that init_from names, if it is one of Hugging Face or an
    imported one, as rank 0 sees it; rank 0 looks first, so that it is fetched
    once."""
    named = ranks.is_main and (init_from.startswith(HUB)
                               or _is_imported(init_from))
    path = broadcast_text(init_from if named else '')
    if not path:
        return None
    on_main(ranks, find_source, path)
    return all_or_none(find_source, path)


def _is_imported(path) -> bool:
    try:
        state = json.loads((Path(path) / 'state.json').read_text())
    except (OSError, ValueError):
        return False  # what is wrong with a checkpoint is told later
    return isinstance(state, dict) and 'imported' in state


def adopt_architecture(parsed, source: Source):
    """Set the options of the architecture to the model's.

    A shorter block_size is free with rotary positions. Raises ConfigError
    that lists the given options that contradict the model.
    """
    model, given = source.config.to_dict(), parsed.given
    rotary = source.config.position_encoding == 'rope'
    family = {'gpt2': ('gpt2',), 'qwen3': ('qwen3',),
              'llama': ('llama3', 'llama2')}[model_type_of(source.config)]
    problems = []
    if given.get('arch_preset', family[0]) not in family:
        problems.append(f"arch_preset={given['arch_preset']!r} contradicts "
                        f'the model, which is {" or ".join(family)}: leave '
                        'it out')
    elif 'arch_preset' not in given:
        parsed.values['arch_preset'] = family[0]
    for name in ARCHITECTURE_OPTIONS:
        value = given.get(name)
        if value is None:
            if rotary or name not in ('rope_theta', 'rope_scaling'):
                parsed.values[name] = model[name]
        elif (name not in CHOSEN_BY_TRAINING and value != model[name]
              and not (name == 'block_size' and rotary
                       and value < model[name])):
            problems.append(f'{name}={value!r} contradicts the model, which '
                            f'has {model[name]!r}: leave it out')
    if problems:
        raise ConfigError(problems)


def check_vocabulary(source: Source, dataset: Dataset):
    """DatasetError unless the ids of the data are those of the model."""
    if dataset.tokenizer_size > source.config.vocab_size:
        raise DatasetError(
            f'{dataset.name} has {dataset.tokenizer_size} ids, the model '
            f'{source.folder} {source.config.vocab_size} rows: prepare the '
            "data with the model's tokenizer")
    if dataset.tokenizer_folder is None:
        return
    try:
        folder, _ = find_tokenizer(source)
    except NoTokenizer:
        return  # a model without a tokenizer says nothing of its ids
    model = read_tokenizer(folder, source.config.vocab_size)
    theirs = model.get_vocab()
    ours = read_tokenizer(dataset.tokenizer_folder,
                          dataset.vocab_size).get_vocab()
    # special tokens that the data does without are no difference
    plain = model.get_vocab(with_added_tokens=False)
    other = [token for token in ours.keys() | plain.keys()
             if ours.get(token) != theirs.get(token)]
    if other:
        token = min(other)
        raise DatasetError(
            f'{dataset.name} was made with another tokenizer than the model '
            f'{source.folder}: {len(other):,} tokens differ, one of them, '
            f"{token!r}, is id {ours.get(token, 'absent')} here and "
            f"{theirs.get(token, 'absent')} there; prepare the data with "
            f'--tokenizer {folder}')
