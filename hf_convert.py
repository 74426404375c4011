"""Hugging Face models and this project's, either way, weight by weight.

    python hf_convert.py import Qwen/Qwen3-0.6B out-qwen3-official
    python hf_convert.py export out-quickstart my-model
    python hf_convert.py check Qwen/Qwen3-0.6B README.md

`import` makes a checkpoint folder out of a model of the hub or of a folder:
train.py begins from it with --init_from=PATH, sample.py and eval.py read it.
`export` makes a folder that transformers, vLLM and llama.cpp's converter load.
Neither overwrites a folder unasked, and a folder with the final name is whole.
`check` compares logits and perplexity with transformers.

Hugging Face's names occur in this file alone. GPT-2 stores its linear weights
transposed (`Conv1D`), and its q, k, v as one matrix, as this project does;
LLaMA and Qwen3 store q, k, v and gate, up apart.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm

from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig, get_preset_config
from training.checkpoint import FORMAT_VERSION
from training.configurator import exit_with
from training.model_card import model_card
from training.model_source import (
    NoTokenizer,
    fill,
    find_source,
    find_tokenizer,
    open_model,
    open_weights,
    read_tokenizer,
)
from training.run_log import write_json
from training.tensor_files import (
    INDEX,
    FolderTensors,
    not_finite,
    write_tensors,
)
from training.whole_folder import whole_folder, write_bytes

TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')

ACTIVATION_FROM_HF = {
    'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh',
    'silu': 'silu', 'swish': 'silu', 'relu': 'relu',
}
ACTIVATION_TO_HF = {
    'gelu': 'gelu', 'gelu_tanh': 'gelu_new', 'silu': 'silu', 'relu': 'relu',
}


class ConversionError(ValueError):
    """A model that cannot be imported or exported."""


def from_hf(hf_model, **overrides) -> ConfigurableGPT:
    """A ConfigurableGPT with the weights of a GPT2LMHeadModel,
    LlamaForCausalLM or Qwen3ForCausalLM.

    `overrides` are fields of the architecture that do not change the weights,
    e.g. attention_backend. Weights keep their values and become fp32.
    Raises ValueError for a model or variant that this project cannot express.
    """
    config = config_from_hf(hf_model.config, **overrides)
    model = ConfigurableGPT(config)
    fill(model, ImportedWeights(hf_model.state_dict(), config))
    return model


def to_hf(model: ConfigurableGPT):
    """The transformers model with these weights, in fp32.

    Raises ValueError that names the fields no Hugging Face class can express.
    """
    hf_config = config_to_hf(model.config)
    hf_class = getattr(transformers, FAMILIES[hf_config.model_type].model)
    hf_model = hf_class(hf_config)
    state = state_to_hf(model.state_dict(), model.config)
    missing, unexpected = hf_model.load_state_dict(state, strict=False)
    if model.config.weight_tying:
        missing = [name for name in missing if name != 'lm_head.weight']
    if missing or unexpected:
        raise RuntimeError(f'weights that do not match: missing {missing}, '
                           f'unexpected {unexpected}')
    hf_model.tie_weights()
    return hf_model.eval()


# --- configurations --------------------------------------------------------


def config_from_hf(hf, **overrides) -> ModelArchitectureConfig:
    """The architecture of a transformers configuration object."""
    family = family_of(hf.model_type)
    if getattr(hf, 'quantization_config', None):
        raise ConversionError('quantized weights cannot be read: take the '
                              'model as it was before')
    return get_preset_config(**(family.read(hf) | overrides))


def _activation(name: str) -> str:
    if name not in ACTIVATION_FROM_HF:
        raise ConversionError(
            f'the activation {name!r} is not supported; there are '
            f'{", ".join(ACTIVATION_FROM_HF)}')
    return ACTIVATION_FROM_HF[name]


def _gpt2_from_hf(hf) -> dict:
    if hf.scale_attn_by_inverse_layer_idx or not hf.scale_attn_weights:
        raise ConversionError(
            'scaled attention variants of GPT-2 are not supported: '
            'scale_attn_weights must be True and '
            'scale_attn_by_inverse_layer_idx False')
    if hf.add_cross_attention:
        raise ConversionError('cross-attention of GPT-2 is not supported')
    return dict(
        name='gpt2', n_layer=hf.n_layer, n_head=hf.n_head, n_embd=hf.n_embd,
        d_ff=hf.n_inner or 4 * hf.n_embd, block_size=hf.n_positions,
        vocab_size=hf.vocab_size,
        activation=_activation(hf.activation_function),
        norm_eps=hf.layer_norm_epsilon, dropout=hf.resid_pdrop,
        weight_tying=hf.tie_word_embeddings)


def _llama_from_hf(hf) -> dict:
    if hf.attention_bias != hf.mlp_bias:
        raise ConversionError('attention_bias and mlp_bias differ; this '
                              'project has one `bias` for both')
    return dict(
        name='llama3', num_key_value_heads=hf.num_key_value_heads,
        bias=hf.attention_bias, **_rotary_from_hf(hf))


def _qwen3_from_hf(hf) -> dict:
    if hf.attention_bias or getattr(hf, 'use_sliding_window', False):
        raise ConversionError('attention_bias and sliding windows are not '
                              'supported for Qwen3')
    return dict(
        name='qwen3', num_key_value_heads=hf.num_key_value_heads,
        bias=False, **_rotary_from_hf(hf))


def _rotary_from_hf(hf) -> dict:
    """What LLaMA and Qwen3 configurations have in common."""
    rope = dict(hf.rope_parameters)
    theta = rope.pop('rope_theta')
    if rope.get('rope_type', 'default') == 'default':
        rope = None
    head_dim = getattr(hf, 'head_dim', None)
    return dict(
        n_layer=hf.num_hidden_layers, n_head=hf.num_attention_heads,
        n_embd=hf.hidden_size, d_ff=hf.intermediate_size,
        head_dim=head_dim or hf.hidden_size // hf.num_attention_heads,
        block_size=hf.max_position_embeddings, vocab_size=hf.vocab_size,
        activation=_activation(hf.hidden_act),
        norm_eps=hf.rms_norm_eps, rope_theta=theta, rope_scaling=rope,
        dropout=hf.attention_dropout, weight_tying=hf.tie_word_embeddings)


class Family(NamedTuple):
    """A model_type of Hugging Face: names of transformers' classes, and what
    reads a configuration as options of get_preset_config."""

    config: str
    model: str
    read: Callable


FAMILIES = {
    'gpt2': Family('GPT2Config', 'GPT2LMHeadModel', _gpt2_from_hf),
    'llama': Family('LlamaConfig', 'LlamaForCausalLM', _llama_from_hf),
    'qwen3': Family('Qwen3Config', 'Qwen3ForCausalLM', _qwen3_from_hf),
}


def family_of(model_type) -> Family:
    if model_type not in FAMILIES:
        raise ConversionError(f'model_type={model_type!r} cannot be read; '
                              f'expected one of {", ".join(FAMILIES)}')
    return FAMILIES[model_type]


def config_to_hf(config: ModelArchitectureConfig):
    """The transformers configuration of this architecture.

    Raises ValueError that names the fields no Hugging Face class can express.
    """
    problems_of = {
        'gpt2': _gpt2_problems(config),
        'llama': _rotary_problems(config, qk_norm=False),
        'qwen3': _rotary_problems(config, qk_norm=True),
    }
    family = next((f for f, problems in problems_of.items() if not problems),
                  None)
    if family is None:
        raise ConversionError(
            'no Hugging Face class can express this architecture:\n'
            + '\n'.join(f'  as {f}: {", ".join(problems)}'
                        for f, problems in problems_of.items()))
    if family == 'gpt2':
        return transformers.GPT2Config(
            n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
            n_inner=config.d_ff, n_positions=config.block_size,
            vocab_size=config.vocab_size,
            activation_function=ACTIVATION_TO_HF[config.activation],
            layer_norm_epsilon=config.norm_eps, resid_pdrop=config.dropout,
            embd_pdrop=config.dropout, attn_pdrop=config.dropout,
            tie_word_embeddings=config.weight_tying,
            bos_token_id=None, eos_token_id=None)
    rope = dict(config.rope_scaling or {'rope_type': 'default'})
    values = dict(
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        num_key_value_heads=config.num_key_value_heads,
        hidden_size=config.n_embd, intermediate_size=config.d_ff,
        head_dim=config.head_dim, max_position_embeddings=config.block_size,
        vocab_size=config.vocab_size,
        hidden_act=ACTIVATION_TO_HF[config.activation],
        rms_norm_eps=config.norm_eps, attention_dropout=config.dropout,
        rope_parameters=rope | {'rope_theta': config.rope_theta},
        attention_bias=config.bias, tie_word_embeddings=config.weight_tying,
        bos_token_id=None, eos_token_id=None)
    if family == 'llama':
        values['mlp_bias'] = config.bias
    return getattr(transformers, FAMILIES[family].config)(**values)


def _differences(config, expected: dict) -> list[str]:
    return [f'{name}={getattr(config, name)!r} (needs {value!r})'
            for name, value in expected.items()
            if getattr(config, name) != value]


def _gpt2_problems(config) -> list[str]:
    return _differences(config, dict(
        normalization='layernorm', position_encoding='learned_absolute',
        norm_position='pre', ffn_type='standard', qk_norm=False, bias=True,
        num_key_value_heads=config.n_head,
        head_dim=config.n_embd // config.n_head))


def _rotary_problems(config, qk_norm: bool) -> list[str]:
    expected = dict(normalization='rmsnorm', position_encoding='rope',
                    norm_position='pre', ffn_type='swiglu', qk_norm=qk_norm)
    if qk_norm:
        expected['bias'] = False
    return _differences(config, expected)


# --- weights ---------------------------------------------------------------

# (this project's name, Hugging Face's name or names that are joined by rows)

GPT2_TOP = [('wte.weight', 'transformer.wte.weight'),
            ('wpe.weight', 'transformer.wpe.weight'),
            ('ln_f.weight', 'transformer.ln_f.weight'),
            ('ln_f.bias', 'transformer.ln_f.bias')]
GPT2_BLOCK = [('attn_norm', ['ln_1']), ('attn.qkv', ['attn.c_attn']),
              ('attn.proj', ['attn.c_proj']), ('ffn_norm', ['ln_2']),
              ('ffn.up', ['mlp.c_fc']), ('ffn.down', ['mlp.c_proj'])]
ROTARY_TOP = [('wte.weight', 'model.embed_tokens.weight'),
              ('ln_f.weight', 'model.norm.weight')]
ROTARY_BLOCK = [
    ('attn_norm', ['input_layernorm']),
    ('attn.qkv', ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj']),
    ('attn.q_norm', ['self_attn.q_norm']),
    ('attn.k_norm', ['self_attn.k_norm']),
    ('attn.proj', ['self_attn.o_proj']),
    ('ffn_norm', ['post_attention_layernorm']),
    ('ffn.gate_up', ['mlp.gate_proj', 'mlp.up_proj']),
    ('ffn.down', ['mlp.down_proj'])]


def weight_names(config: ModelArchitectureConfig, model_type: str):
    """[(our name, [Hugging Face names, joined by rows], transposed)]."""
    gpt2 = model_type == 'gpt2'
    names = [(ours, [theirs], False)
             for ours, theirs in (GPT2_TOP if gpt2 else ROTARY_TOP)]
    for layer in range(config.n_layer):
        prefix = f'transformer.h.{layer}' if gpt2 else f'model.layers.{layer}'
        for ours, theirs in GPT2_BLOCK if gpt2 else ROTARY_BLOCK:
            if ours.endswith(('q_norm', 'k_norm')) and not config.qk_norm:
                continue
            norm = ours.endswith('_norm')
            kinds = ['weight']
            if config.bias and (gpt2 or not norm):
                kinds.append('bias')
            names += [(f'h.{layer}.{ours}.{kind}',
                       [f'{prefix}.{t}.{kind}' for t in theirs],
                       gpt2 and not norm and kind == 'weight')
                      for kind in kinds]
    if not config.weight_tying:
        names.append(('lm_head.weight', ['lm_head.weight'], False))
    return names


def model_type_of(config: ModelArchitectureConfig) -> str:
    """The family whose layout the weights of `config` have."""
    if config.position_encoding == 'learned_absolute':
        return 'gpt2'
    return 'qwen3' if config.qk_norm else 'llama'


@dataclass
class Entry:
    """One weight of this project and where Hugging Face keeps it."""

    name: str
    shape: tuple
    parts: dict[str, tuple]  # their names and shapes, joined by rows
    transposed: bool


def layout(config: ModelArchitectureConfig) -> dict[str, Entry]:
    """{this project's name: Entry}, in the order of the model."""
    D = config.head_dim
    rows = {'attn.qkv': [config.n_head * D] + 2 * [config.num_key_value_heads
                                                   * D],
            'ffn.gate_up': 2 * [config.d_ff]}
    with torch.device('meta'):
        model = ConfigurableGPT(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names = weight_names(config, model_type_of(config))
    entries = {}
    for ours, theirs, transposed in names:
        shape = shapes[ours]
        heights = (rows['.'.join(ours.split('.')[2:4])] if len(theirs) > 1
                   else shape[:1])
        parts = {name: (n, *shape[1:])[::-1 if transposed else 1]
                 for name, n in zip(theirs, heights, strict=True)}
        entries[ours] = Entry(ours, shape, parts, transposed)
    return entries


# masks and tables that older files hold beside the weights
NO_WEIGHTS = re.compile(
    r'(h\.\d+\.attn\.(bias|masked_bias)|.*\.rotary_emb\.inv_freq)')
PREFIXES = ('', 'transformer.', 'model.')


class ImportedWeights:
    """This project's weights, read from Hugging Face's tensors by range.

    `tensors` is a mapping {their name: tensor}, of which one is held at a
    time: a state dict or FolderTensors. Their names may lack the prefix of
    the whole model, as in the official GPT-2. Raises ConversionError that
    lists missing and surplus weights and those of another shape.
    """

    def __init__(self, tensors, config: ModelArchitectureConfig):
        self._tensors, self._entries = tensors, layout(config)
        shapes = getattr(tensors, 'shapes', None) or {
            name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._places = {part: part for part in shapes}
        due = {name: shape for entry in self._entries.values()
               for name, shape in entry.parts.items()}
        for name in shapes:
            for prefix in PREFIXES:
                if prefix + name in due:
                    self._places.setdefault(prefix + name, name)
        problems = []
        missing = [name for name in due if name not in self._places]
        used = {self._places[name] for name in due if name in self._places}
        surplus = [name for name in shapes if name not in used
                   and not NO_WEIGHTS.fullmatch(
                       re.sub('^(transformer|model)\\.', '', name))]
        if config.weight_tying and 'lm_head.weight' in surplus:
            surplus.remove('lm_head.weight')
            problems += self._head_problems(shapes)
        problems += _listed('missing', missing) + _listed('surplus', surplus)
        problems += [
            f'{name} is {shapes[self._places[name]]}, the configuration '
            f'makes it {shape}' for name, shape in due.items()
            if name in self._places and shapes[self._places[name]] != shape]
        if problems:
            more = len(problems) - 20
            problems = problems[:20] + (
                [f'and {more} more'] if more > 0 else [])
            where = getattr(tensors, 'folder', 'the state dict')
            raise ConversionError(
                f'the weights of {where} do not fit its configuration:\n'
                + '\n'.join(f'  {p}' for p in problems))
        self.shapes = {name: e.shape for name, e in self._entries.items()}

    def _head_problems(self, shapes) -> list[str]:
        """A tied head may be there as well, if it is the embedding."""
        (embedding,) = self._entries['wte.weight'].parts
        embedding = self._places.get(embedding)
        if embedding is None or (
                shapes[embedding] == shapes['lm_head.weight'] and torch.equal(
                    self._tensors[embedding], self._tensors['lm_head.weight'])):
            return []
        return ['lm_head.weight differs from the embedding, to which the '
                'configuration ties it']

    def read(self, name: str, start: int, out: torch.Tensor):
        """Fill the 1-D `out` with elements start.. of a flattened tensor."""
        entry, end, at = self._entries[name], start + len(out), 0
        for part, shape in entry.parts.items():
            length = torch.Size(shape).numel()
            a, b = max(start, at), min(end, at + length)
            if a < b:
                tensor = self._tensors[self._places[part]]
                if problem := not_finite(part, tensor):
                    raise ConversionError(problem)
                tensor = tensor.t() if entry.transposed else tensor
                out[a - start:b - start].copy_(
                    tensor.reshape(-1)[a - at:b - at])
            at += length


def _listed(what: str, names: list[str]) -> list[str]:
    return [f'{what}: {name}' for name in names]


def state_from_hf(hf_state: dict, config: ModelArchitectureConfig) -> dict:
    """Hugging Face's state dict -> this project's."""
    weights = ImportedWeights(hf_state, config)
    like = next(iter(hf_state.values()))
    state = {}
    for name, shape in weights.shapes.items():
        state[name] = like.new_empty(shape)
        weights.read(name, 0, state[name].view(-1))
    return state


class ExportedWeights:
    """Hugging Face's tensors, made from this project's weights one by one.

    `weights.read(name, start, out)` gives the latter, as a checkpoint's
    Tensors do. `shapes` {their name: shape}.
    """

    def __init__(self, weights, config: ModelArchitectureConfig):
        self._weights, self.shapes, self._sources = weights, {}, {}
        for entry in layout(config).values():
            at = 0
            for part, shape in entry.parts.items():
                self.shapes[part] = shape
                self._sources[part] = entry, at
                at += torch.Size(shape).numel()

    def __getitem__(self, part: str) -> torch.Tensor:
        entry, at = self._sources[part]
        shape = self.shapes[part]
        flat = torch.empty(torch.Size(shape).numel())
        self._weights.read(entry.name, at, flat)
        if entry.transposed:
            return flat.view(shape[::-1]).t()
        return flat.view(shape)


class StateDict:
    """A state dict of this project, read by name and range."""

    def __init__(self, state: dict):
        self._state = state

    def read(self, name, start, out):
        out.copy_(self._state[name].view(-1)[start:start + len(out)])


def state_to_hf(state: dict, config: ModelArchitectureConfig) -> dict:
    """This project's state dict -> Hugging Face's, in fp32."""
    exported = ExportedWeights(StateDict(state), config)
    return {name: exported[name].contiguous() for name in exported.shapes}


# --- folders ---------------------------------------------------------------


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
    """(transformers configuration, as it was read) of a folder."""
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
    from data.corpus_tokenizer import EOT_TOKENS
    return next((vocabulary[token] for token in EOT_TOKENS
                 if token in vocabulary), eos)


def import_model(name_or_path, out, *, dtype='float32', max_shard_size='5GB',
                 overwrite=False) -> Path:
    """Write a Hugging Face model as a checkpoint folder; returns its path.

    Weights go through memory one at a time. The tokenizer lies in
    tokenizer/; there is no optimizer state. Raises ValueError.
    """
    folder = locate(name_or_path).absolute()
    config, weights, hf_config = open_hf_folder(folder)
    tokenizer = _tokenizer_of(folder, config, hf_config)
    with whole_folder(out, overwrite) as part:
        files = _write_shards(part, weights.shapes, max_shard_size, dtype,
                              lambda name: _whole(weights, name))
        for name, content in (tokenizer.files if tokenizer else {}).items():
            write_bytes(part / 'tokenizer' / name, content)
        write_json(part / 'state.json', {
            'format_version': FORMAT_VERSION, 'step': 0, 'val_loss': None,
            'world_size': 1, 'optimizer_steps': 0,
            'architecture': config.to_dict(), 'files': files,
            'imported': {
                'from': str(name_or_path), 'weights': dtype,
                'tokenizer': tokenizer.record if tokenizer else None,
                'token_ids': {name: getattr(hf_config, name, None)
                              for name in TOKEN_IDS}}})
    return Path(out)


def _whole(weights, name) -> torch.Tensor:
    flat = torch.empty(torch.Size(weights.shapes[name]).numel())
    weights.read(name, 0, flat)
    return flat.view(weights.shapes[name])


def _tokenizer_of(folder, config, hf_config):
    """The CorpusTokenizer of a folder, None if it has none."""
    from data.corpus_tokenizer import load_tokenizer
    names = ('tokenizer.json', 'tokenizer.model')
    if not any((folder / name).is_file() for name in names):
        return None
    eot_token = None
    if (folder / 'tokenizer.json').is_file():
        vocabulary = read_tokenizer(folder, config.vocab_size).get_vocab()
        eot_id = eot_of(hf_config, vocabulary)
        eot_token = next((token for token, number in vocabulary.items()
                          if number == eot_id), None)
    return load_tokenizer(folder, eot_token=eot_token,
                          vocab_size=config.vocab_size)


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
        _write_shards(part, weights.shapes, max_shard_size, dtype,
                      weights.__getitem__, INDEX)
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


def _write_shards(part, shapes, max_shard_size, dtype, make, index=None):
    """model.safetensors or shards of it; {file: {'bytes', 'sha256'}}."""
    kind = getattr(torch, dtype)

    def cast(name):
        tensor = make(name).to(kind)
        if problem := not_finite(name, tensor):
            raise ConversionError(
                f'{problem} in {dtype}: give --dtype bfloat16 or float32')
        return tensor

    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(shape, dtype=kind, device='meta')
         for name, shape in shapes.items()}, max_shard_size=max_shard_size)
    files = {}
    with tqdm(total=len(shapes), unit='weight', disable=None) as bar:
        def counted(name):
            bar.update()
            return cast(name)

        for file, names in plan.filename_to_tensors.items():
            files[file] = write_tensors(
                part / file, {name: shapes[name] for name in names}, kind,
                counted)
    if index and plan.is_sharded:
        write_json(part / index, {'metadata': plan.metadata,
                                  'weight_map': plan.tensor_to_filename})
    return files


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


@torch.no_grad()
def check_model(name_or_path, text_file, *, tokens=1024) -> float:
    """Print how far this project and transformers are apart on a text.

    Both read the same folder in float32, and score the first `tokens` ids.
    Returns the largest difference of the logits.
    """
    folder = locate(name_or_path)
    found = open_model(f'hf:{folder}', attention_backend='sdpa')
    ids = found.tokenizer.encode(Path(text_file).read_text('utf-8')).ids
    ids = torch.tensor([ids[:min(tokens, found.model.config.block_size)]])
    if ids.shape[1] < 2:
        raise ConversionError(f'{text_file} has fewer than two tokens')
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True).eval()
    ours, theirs = found.model(ids)[0], hf(ids).logits
    difference = (ours - theirs).abs().max().item()
    print(f'{ids.shape[1]} tokens; largest difference of the logits '
          f'{difference:.1e}, their spread {theirs.std().item():.2f}')
    for name, logits in ('here', ours), ('transformers', theirs):
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        print(f'perplexity, {name}: {loss.exp().item():.5f}')
    return difference


# --- command ---------------------------------------------------------------


def main(argv=None):
    first, *_ = __doc__.split('\n\n')
    parser = argparse.ArgumentParser(
        description=first, epilog=__doc__[len(first):],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)

    def add(name, function, what, source, meaning):
        command = commands.add_parser(
            name, help=what, description=what[0].upper() + what[1:] + '.',
            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(function=function)
        command.add_argument('source', metavar=source, help=meaning)
        return command

    published = 'HF_NAME_OR_PATH', 'a folder, or a name of the hub'
    for command in (
            add('import', import_model, 'a Hugging Face model into a '
                'checkpoint', *published),
            add('export', export_model, 'a run or checkpoint into a Hugging '
                'Face folder', 'RUN_OR_CHECKPOINT', 'an out_dir (its newest '
                'run), a run folder, a checkpoint or an imported folder')):
        command.add_argument('out', metavar='OUT', help='the folder to write')
        command.add_argument(
            '--dtype', choices=('float32', 'bfloat16', 'float16'),
            default='float32', help='of the weights that are written')
        command.add_argument(
            '--max_shard_size', default='5GB', type=_size, metavar='SIZE',
            help='largest file of weights, e.g. 500MB')
        command.add_argument(
            '--overwrite', action='store_true',
            help='replace OUT, if it is a folder of a model')
    command = add('check', check_model, 'compare logits and perplexity with '
                  'transformers', *published)
    command.add_argument('text_file', metavar='TEXT_FILE',
                         help='a UTF-8 file, whose beginning is scored')
    command.add_argument('--tokens', type=int, default=1024,
                         help='so many tokens of it')
    arguments = vars(parser.parse_args(argv))
    function = arguments.pop('function')
    arguments.pop('command')
    second = 'text_file' if 'text_file' in arguments else 'out'
    try:
        result = function(arguments.pop('source'), arguments.pop(second),
                          **arguments)
    except (ValueError, OSError) as error:
        exit_with(error)
    if second == 'out':
        print(f'written: {result}')


def _size(text: str) -> str:
    if not re.fullmatch(r'[1-9]\d*(KB|MB|GB|TB)', text):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no size; write e.g. 500MB or 5GB')
    return text


if __name__ == '__main__':
    main()
