"""A folder in Hugging Face's format: found, fetched, read and checked."""

import json
import re
from pathlib import Path

from training.dataset_record import EOT_TOKENS
from training.hf_config import ConversionError, config_from_hf, family_of
from training.hf_weights import ImportedWeights
from training.tensor_files import FolderTensors

HUB = 'hf:'  # before the name of a model, or the path of a folder


def locate(name_or_path) -> Path:
    """The folder of a model: a path, or a name of the hub, which is fetched.

    Only JSON, safetensors and tokenizer files are; nothing in them is run.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_path)
    if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name) or name.startswith('.'):
        raise ConversionError(
            f'{name_or_path} is no folder, nor can it be a name of the hub, '
            'such as Qwen/Qwen3-0.6B')
    import huggingface_hub
    try:
        return Path(huggingface_hub.snapshot_download(
            name, allow_patterns=['*.json', '*.safetensors',
                                  'tokenizer.model'],
            ignore_patterns=['*/*']))
    except Exception as error:  # of the network, of the hub: many kinds
        raise ConversionError(
            f'{name} is no folder here, and the hub does not give a model of '
            f'that name: {type(error).__name__}: '
            f'{str(error).strip().splitlines()[0]}') from error


def read_hf_config(folder):
    """The transformers configuration of a folder, checked."""
    import transformers  # it takes a while
    path = Path(folder) / 'config.json'
    try:
        values = json.loads(path.read_text())
        model_type = values['model_type']
    except FileNotFoundError:
        raise ConversionError(
            f'{folder} is no Hugging Face model: it has no config.json'
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(
            f'{path} is no configuration of a model: '
            f'{type(error).__name__}: {error}') from error
    try:
        family = family_of(model_type)
        return getattr(transformers, family.config).from_dict(values)
    except Exception as error:  # transformers' checks raise several kinds
        raise ConversionError(f'{path}: {error}') from error


def open_hf_folder(folder, **overrides):
    """(architecture, its weights by name and range, the transformers
    configuration) of a folder, everything but the values checked."""
    hf_config = read_hf_config(folder)
    try:
        config = config_from_hf(hf_config, **overrides)
    except ValueError as error:
        raise ConversionError(f'{folder}/config.json: {error}') from error
    return config, ImportedWeights(FolderTensors(folder), config), hf_config


def eot_of(hf_config, vocabulary: dict[str, int]) -> int | None:
    """The id that ends a document.

    A chat model's eos ends a turn (Qwen3: <|im_end|>), so the usual names of
    the end of a text come before it, unless bos and eos are one id: that is
    what lies between documents, as in GPT-2 and in what is exported here.
    """
    bos, eos = hf_config.bos_token_id, hf_config.eos_token_id
    if isinstance(eos, list):
        eos = eos[0] if eos else None
    if eos is not None and bos == eos:
        return eos
    return next((vocabulary[token] for token in EOT_TOKENS
                 if token in vocabulary), eos)
