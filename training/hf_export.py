"""A run or checkpoint as a folder that transformers, vLLM and llama.cpp's
converter load."""

import json
from pathlib import Path

import torch
import transformers

from model_builder import ConfigurableGPT
from training.durable import write_bytes, write_json
from training.hf_config import (
    FAMILIES,
    TOKEN_IDS,
    ConversionError,
    config_to_hf,
)
from training.hf_weights import ExportedWeights
from training.model_card import model_card
from training.model_source import (
    NoTokenizer,
    find_source,
    find_tokenizer,
    open_weights,
    read_tokenizer,
)
from training.tensor_files import INDEX, write_shards
from training.whole_folder import whole_folder


def export_model(path, out, *, dtype='float32', max_shard_size='5GB',
                 overwrite=False) -> Path:
    """Write a run or checkpoint as a Hugging Face folder; returns its path.

    Weights go through memory one at a time; config.json comes last, so that
    a folder left by a kill is no model. Raises ValueError, among others for
    an architecture that no Hugging Face class can express.
    """
    source = find_source(path)
    if source.kind == 'huggingface':
        raise ConversionError(f'{path} is a Hugging Face folder already')
    hf_config = config_to_hf(source.config)
    try:
        tokenizer, eot_id = find_tokenizer(source)
    except NoTokenizer:
        tokenizer = eot_id = None
    with torch.device('meta'):
        model = ConfigurableGPT(source.config)
    weights = ExportedWeights(open_weights(source, model), source.config)
    with whole_folder(out, overwrite) as part:
        write_shards(part, weights.shapes, max_shard_size,
                     getattr(torch, dtype), weights.__getitem__, INDEX)
        ids = _token_ids(source, eot_id)
        if tokenizer is not None:
            _write_tokenizer(part, tokenizer, source, ids)
        write_json(part / 'generation_config.json', ids | {
            'transformers_version': transformers.__version__})
        at = Path(out).absolute()
        write_bytes(part / 'README.md', model_card(
            source, source.run.name if at.parent == source.run else at.name,
            model.get_num_params(), dtype).encode())
        write_json(part / 'config.json',
                   _config_values(hf_config, source.config, ids, dtype))
    return Path(out)


def _token_ids(source, eot_id) -> dict:
    """What config.json and generation_config.json say of special ids."""
    if source.kind == 'imported':
        return source.state['imported']['token_ids']
    # a document is preceded and followed by the end-of-text id
    return dict.fromkeys(TOKEN_IDS, eot_id)


def _write_tokenizer(part, folder, source, ids):
    """tokenizer.json as it is; tokenizer_config.json so that AutoTokenizer
    takes it as it is, and does not build one of a model's own class."""
    write_bytes(part / 'tokenizer.json',
                (folder / 'tokenizer.json').read_bytes())
    path = folder / 'tokenizer_config.json'
    if source.kind == 'imported':  # as the model was published
        if path.is_file():
            write_bytes(part / path.name, path.read_bytes())
        return
    found = json.loads(path.read_text()) if path.is_file() else {}
    eot = read_tokenizer(folder, source.config.vocab_size).id_to_token(
        ids['eos_token_id'])
    write_json(part / path.name, {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': eot,
        'eos_token': eot, 'pad_token': eot,
        'clean_up_tokenization_spaces': False,
        'model_max_length': source.config.block_size,
        **{key: found[key] for key in ('chat_template',) if key in found}})


def _config_values(hf_config, config, ids: dict, dtype: str) -> dict:
    values = json.loads(hf_config.to_json_string())
    values |= ids | {'architectures': [FAMILIES[hf_config.model_type].model],
                     'dtype': dtype, 'torch_dtype': dtype}
    if config.position_encoding == 'rope':
        # for readers older than transformers 5
        values |= {'rope_theta': config.rope_theta,
                   'rope_scaling': config.rope_scaling}
    return values
