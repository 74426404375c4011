"""Architectures in the terms of Hugging Face's configurations, and back."""

from collections.abc import Callable
from typing import NamedTuple

from model_config import ModelArchitectureConfig, get_preset_config

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
    import transformers  # it takes a while
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
        norm_position='pre', ffn_type='standard', qk_norm=False,
        num_key_value_heads=config.n_head,
        head_dim=config.n_embd // config.n_head))


def _rotary_problems(config, qk_norm: bool) -> list[str]:
    expected = dict(normalization='rmsnorm', position_encoding='rope',
                    norm_position='pre', ffn_type='swiglu', qk_norm=qk_norm)
    if qk_norm:
        expected['bias'] = False
    return _differences(config, expected)
