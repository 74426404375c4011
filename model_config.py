"""What a model is made of, as one frozen dataclass, and the four presets.

A preset names every value of a published architecture; any field can be
overridden on any preset, and what depends on an overridden field follows it
(see `get_preset_config`).

    python -c "from model_config import get_preset_config; \
        print(get_preset_config('qwen3').get_architecture_name())"
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

CHOICES = {
    'normalization': ('layernorm', 'rmsnorm'),
    'activation': ('gelu', 'gelu_tanh', 'silu', 'relu'),
    'position_encoding': ('learned_absolute', 'rope', 'none'),
    'norm_position': ('pre', 'post'),
    'ffn_type': ('standard', 'swiglu'),
    'attention_backend': ('flash_attn_2', 'sdpa', 'eager'),
}

POSITIVE = (
    'n_layer', 'n_head', 'n_embd', 'num_key_value_heads', 'head_dim', 'd_ff',
    'block_size', 'vocab_size', 'rope_theta', 'norm_eps',
)

ROPE_SCALING_KEYS = (
    'factor', 'low_freq_factor', 'high_freq_factor',
    'original_max_position_embeddings',
)

# LLaMA rounds the SwiGLU width up to a multiple of this
# (https://github.com/meta-llama/llama, `multiple_of` of the released models)
SWIGLU_MULTIPLE = 256


class ArchitectureError(ValueError):
    """All problems with an architecture, in one error and in `problems`."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__(f'{len(problems)} problem(s) with the architecture:\n'
                         + '\n'.join(f'  {p}' for p in problems))


@dataclass(frozen=True)
class ModelArchitectureConfig:
    """The architecture of a decoder-only transformer, checked when built.

    `None` for `num_key_value_heads`, `head_dim` or `d_ff` means the usual
    value (`n_head`, `n_embd / n_head`, 4 x or 8/3 x `n_embd`); the built
    configuration always holds the number.

    Raises ArchitectureError that lists every problem at once.
    """

    # dimensions
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    num_key_value_heads: int | None = None  # < n_head: grouped-query attention
    head_dim: int | None = None
    d_ff: int | None = None
    block_size: int = 1024                  # longest sequence, in tokens
    vocab_size: int = 50304                 # rows of the embedding

    # components
    normalization: str = 'layernorm'
    activation: str = 'gelu_tanh'
    position_encoding: str = 'learned_absolute'
    norm_position: str = 'pre'
    ffn_type: str = 'standard'
    attention_backend: str = 'sdpa'
    qk_norm: bool = False        # normalise each head's q and k before RoPE

    # their options
    bias: bool = True            # of every linear layer and LayerNorm
    weight_tying: bool = True    # the head shares the embedding's weights
    dropout: float = 0.0
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None        # Llama 3.1's, see ROPE_SCALING_KEYS
    norm_eps: float = 1e-5

    def __post_init__(self):
        problems = self._problems()
        if problems:
            raise ArchitectureError(problems)
        # the object is frozen: derived values are filled in once, here
        if self.rope_scaling is not None:
            object.__setattr__(self, 'rope_scaling', dict(self.rope_scaling))
        if self.num_key_value_heads is None:
            object.__setattr__(self, 'num_key_value_heads', self.n_head)
        if self.head_dim is None:
            object.__setattr__(self, 'head_dim', self.n_embd // self.n_head)
        if self.d_ff is None:
            object.__setattr__(self, 'd_ff', default_d_ff(
                self.ffn_type, self.n_embd))

    def _problems(self) -> list[str]:
        problems, wrong = [], set()  # rules are not asked of a wrong field

        def problem(text, *names):
            problems.append(text)
            wrong.update(names)

        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), field.name
            kinds = [kind.strip() for kind in _type_name(field).split('|')]
            if not any(_is_a(value, kind) for kind in kinds):
                problem(f'{name}={value!r} is not of type '
                        f'{" or ".join(kinds)}', name)
            elif name in CHOICES and value not in CHOICES[name]:
                problem(f'{name}={value!r} is not one of '
                        f'{", ".join(CHOICES[name])}', name)
            elif name in POSITIVE and value is not None and not (
                    0 < value < math.inf):
                problem(f'{name}={value} must be above 0', name)
            elif name == 'dropout' and not 0 <= value < 1:
                problem(f'dropout={value} must be in [0, 1)', name)

        n_kv, head_dim = self.num_key_value_heads, self.head_dim
        if (n_kv is not None and not wrong & {'n_head', 'num_key_value_heads'}
                and self.n_head % n_kv):
            problem(f'n_head={self.n_head} is not divisible by '
                    f'num_key_value_heads={n_kv}: each key/value head serves '
                    'an equal number of query heads')
        if head_dim is None and not wrong & {'n_head', 'n_embd', 'head_dim'}:
            head_dim, rest = divmod(self.n_embd, self.n_head)
            if rest:
                problem(f'n_embd={self.n_embd} is not divisible by '
                        f'n_head={self.n_head}: change one of them or set '
                        'head_dim', 'head_dim')
        if (self.position_encoding == 'rope' and 'head_dim' not in wrong
                and head_dim is not None and head_dim % 2):
            problem(f'head_dim={head_dim} must be even, since RoPE turns '
                    'pairs of dimensions')
        if self.rope_scaling is not None and 'rope_scaling' not in wrong:
            problems += _rope_scaling_problems(self.rope_scaling)
        return problems

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> 'ModelArchitectureConfig':
        """The inverse of `to_dict`; an unknown field is a ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f'unknown architecture field(s) {", ".join(unknown)}; known: '
                f'{", ".join(sorted(known))}')
        return cls(**values)

    def save_json(self, path):
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + '\n')

    @classmethod
    def load_json(cls, path) -> 'ModelArchitectureConfig':
        return cls.from_dict(json.loads(Path(path).read_text()))

    def get_architecture_name(self) -> str:
        """One line that tells the components apart, e.g. for a table."""
        if self.num_key_value_heads == self.n_head:
            attention = f'MHA {self.n_head}'
        else:
            attention = f'GQA {self.n_head}:{self.num_key_value_heads}'
        if self.head_dim * self.n_head != self.n_embd:
            attention += f'x{self.head_dim}'
        if self.qk_norm:
            attention += ' QK-norm'
        positions = {'rope': f'RoPE {self.rope_theta:g}',
                     'learned_absolute': 'learned positions',
                     'none': 'no positions'}
        if self.rope_scaling:
            positions['rope'] += ' scaled'
        norm = {'layernorm': 'LayerNorm', 'rmsnorm': 'RMSNorm'}
        return ', '.join([
            f'{self.n_layer}x{self.n_embd}', attention,
            positions.get(self.position_encoding, self.position_encoding),
            f'{self.norm_position}-'
            + norm.get(self.normalization, self.normalization),
            f'{"gated " if self.ffn_type == "swiglu" else ""}'
            f'{self.activation} {self.d_ff}',
            'tied' if self.weight_tying else 'untied'])


def _type_name(field: dataclasses.Field) -> str:
    kind = field.type
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _is_a(value, kind: str) -> bool:
    if kind == 'None':
        return value is None
    if kind == 'float':
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == 'int':
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, {'bool': bool, 'str': str, 'dict': dict}[kind])


def _rope_scaling_problems(scaling: dict) -> list[str]:
    expected = {'rope_type', *ROPE_SCALING_KEYS}
    if set(scaling) != expected or scaling['rope_type'] != 'llama3':
        return [f"rope_scaling={scaling} must hold rope_type='llama3' and "
                f'{", ".join(ROPE_SCALING_KEYS)}']
    problems = [
        f'rope_scaling[{key!r}]={scaling[key]!r} must be a number above 0'
        for key in ROPE_SCALING_KEYS
        if not _is_a(scaling[key], 'float') or not scaling[key] > 0]
    if not problems and not (scaling['low_freq_factor']
                             < scaling['high_freq_factor']):
        problems.append('rope_scaling: low_freq_factor must be below '
                        'high_freq_factor')
    return problems


def default_d_ff(ffn_type: str, n_embd: int) -> int:
    """4 x width, or for SwiGLU 8/3 x width rounded up to a multiple of 256.

    8/3 keeps three matrices at the cost of the usual two of 4 x width
    (Shazeer 2020, https://arxiv.org/abs/2002.05202); the rounding is LLaMA's.
    """
    if ffn_type == 'standard':
        return 4 * n_embd
    multiples = Fraction(8, 3) * n_embd / SWIGLU_MULTIPLE
    return SWIGLU_MULTIPLE * math.ceil(multiples)


def get_gpt2_config() -> ModelArchitectureConfig:
    """GPT-2 124M (Radford et al. 2019; `openai-community/gpt2`)."""
    return ModelArchitectureConfig(
        n_layer=12,
        n_head=12,
        n_embd=768,
        num_key_value_heads=12,  # multi-head attention
        head_dim=64,             # 768 / 12
        d_ff=3072,               # 4 x n_embd
        block_size=1024,
        vocab_size=50304,        # 50,257 ids, padded to a multiple of 64
        normalization='layernorm',
        activation='gelu_tanh',  # the tanh form is what GPT-2 was trained with
        position_encoding='learned_absolute',
        norm_position='pre',     # GPT-2 moved the norms before each sub-block
        ffn_type='standard',
        attention_backend='flash_attn_2',
        qk_norm=False,
        bias=True,
        weight_tying=True,
        dropout=0.0,             # 0.1 there; one pass over the data needs none
        norm_eps=1e-5,
    )


def get_llama2_style_config() -> ModelArchitectureConfig:
    """LLaMA-2-7B (Touvron et al. 2023, https://arxiv.org/abs/2307.09288)."""
    return ModelArchitectureConfig(
        n_layer=32,
        n_head=32,
        n_embd=4096,
        num_key_value_heads=32,  # the 7B has no grouped queries
        head_dim=128,            # 4096 / 32
        d_ff=11008,              # 8/3 x n_embd, rounded up to a multiple of 256
        block_size=4096,
        vocab_size=32000,        # SentencePiece BPE, every row is used
        normalization='rmsnorm',
        activation='silu',
        position_encoding='rope',
        norm_position='pre',
        ffn_type='swiglu',
        attention_backend='flash_attn_2',
        qk_norm=False,
        bias=False,
        weight_tying=False,
        dropout=0.0,
        rope_theta=10_000.0,     # RoFormer's base
        norm_eps=1e-5,
    )


def get_llama3_style_config() -> ModelArchitectureConfig:
    """Llama-3-8B (Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783)."""
    return ModelArchitectureConfig(
        n_layer=32,
        n_head=32,
        n_embd=4096,
        num_key_value_heads=8,   # grouped queries, 4:1
        head_dim=128,            # 4096 / 32
        d_ff=14336,              # 3.5 x n_embd
        block_size=8192,
        vocab_size=128256,       # 128,000 BPE tokens and 256 special ones
        normalization='rmsnorm',
        activation='silu',
        position_encoding='rope',
        norm_position='pre',
        ffn_type='swiglu',
        attention_backend='flash_attn_2',
        qk_norm=False,
        bias=False,
        weight_tying=False,
        dropout=0.0,
        rope_theta=500_000.0,    # for contexts beyond 4K
        norm_eps=1e-5,
    )


def get_qwen3_style_config() -> ModelArchitectureConfig:
    """Qwen3-0.6B's shape (https://arxiv.org/abs/2505.09388), head untied.

    The official 0.6B, 1.7B and 4B tie head and embedding, the larger models
    do not; set `weight_tying=True` for the official 0.6B.
    """
    return ModelArchitectureConfig(
        n_layer=28,
        n_head=16,
        n_embd=1024,
        num_key_value_heads=8,   # grouped queries, 2:1
        head_dim=128,            # not n_embd / n_head: q is 2048 wide
        d_ff=3072,               # 3 x n_embd
        block_size=32768,
        vocab_size=151936,       # 151,669 ids, padded to a multiple of 128
        normalization='rmsnorm',
        activation='silu',
        position_encoding='rope',
        norm_position='pre',
        ffn_type='swiglu',
        attention_backend='flash_attn_2',
        qk_norm=True,            # replaces the QKV bias of Qwen2
        bias=False,
        weight_tying=False,
        dropout=0.0,
        rope_theta=1_000_000.0,  # for 32K contexts
        norm_eps=1e-6,
    )


PRESET_CONFIGS = {
    'gpt2': get_gpt2_config,
    'llama2': get_llama2_style_config,
    'llama3': get_llama3_style_config,
    'qwen3': get_qwen3_style_config,
}


def get_preset_config(name: str, **overrides) -> ModelArchitectureConfig:
    """The preset `name` with some fields replaced.

    Fields that are not given follow those that are: `d_ff` keeps its ratio to
    `n_embd` (LLaMA 2's is 8/3, rounded up to a multiple of 256),
    `num_key_value_heads` its ratio to `n_head`, and `head_dim` is
    `n_embd / n_head`, except in `qwen3`, where it stays 128. A change of
    `ffn_type` takes that type's usual `d_ff`.
    """
    if name not in PRESET_CONFIGS:
        raise ValueError(f'no preset {name!r}; there are '
                         f'{", ".join(PRESET_CONFIGS)}')
    preset = PRESET_CONFIGS[name]()
    values = preset.to_dict() | overrides

    if 'd_ff' not in overrides:
        values['d_ff'] = _follow_d_ff(name, preset, values)
    group = preset.n_head // preset.num_key_value_heads
    if ('num_key_value_heads' not in overrides
            and _is_a(values['n_head'], 'int')
            and values['n_head'] % group == 0):
        values['num_key_value_heads'] = values['n_head'] // group
    if 'head_dim' not in overrides and name != 'qwen3':
        values['head_dim'] = None
    return ModelArchitectureConfig.from_dict(values)


def _follow_d_ff(name, preset, values) -> int | None:
    n_embd = values['n_embd']
    if (values['ffn_type'] != preset.ffn_type or name == 'llama2'
            or not _is_a(n_embd, 'int')):
        return None  # the formula of default_d_ff, after the checks
    return math.ceil(Fraction(preset.d_ff, preset.n_embd) * n_embd)


def options_without_effect(config: ModelArchitectureConfig,
                           given: set[str]) -> list[str]:
    """Problems with fields that were set although `config` never reads them.

    `given` holds the names that a user set. A set value without effect would
    make an ablation that changes nothing.
    """
    problems = []
    if config.position_encoding != 'rope':
        for name in sorted({'rope_theta', 'rope_scaling'} & given):
            if getattr(config, name) is not None:
                problems.append(
                    f'{name}={getattr(config, name)} has no effect with '
                    'position_encoding='
                    f"{config.position_encoding!r}; set position_encoding="
                    "'rope' or leave it out")
    return problems
