"""Weights under Hugging Face's names, read and made one by one.

GPT-2 stores its linear weights transposed (`Conv1D`), and its q, k, v as one
matrix, as this project does; LLaMA and Qwen3 store q, k, v and gate, up apart.
"""

import dataclasses
import re
from dataclasses import dataclass

import torch

from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from training.hf_config import ConversionError
from training.tensor_files import not_finite

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
             for ours, theirs in (GPT2_TOP if gpt2 else ROTARY_TOP)
             if config.bias or not ours.endswith('.bias')]
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
    Tensors do. `shapes` {their name: shape}. A GPT-2 without biases gets
    those of zero, since Hugging Face's always has some.
    """

    def __init__(self, weights, config: ModelArchitectureConfig):
        self._weights, self.shapes, self._sources = weights, {}, {}
        self._here = entries = layout(config)
        if model_type_of(config) == 'gpt2' and not config.bias:
            entries = layout(dataclasses.replace(config, bias=True))
        for entry in entries.values():
            at = 0
            for part, shape in entry.parts.items():
                self.shapes[part] = shape
                self._sources[part] = entry, at
                at += torch.Size(shape).numel()

    def __getitem__(self, part: str) -> torch.Tensor:
        entry, at = self._sources[part]
        shape = self.shapes[part]
        flat = torch.zeros(torch.Size(shape).numel())
        if entry.name in self._here:
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
