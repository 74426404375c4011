"""Hugging Face models and this project's, either way, weight by weight.

    python -c "from transformers import GPT2Config, GPT2LMHeadModel; \
        from hf_convert import from_hf; \
        model = from_hf(GPT2LMHeadModel(GPT2Config(n_layer=2))); \
        print(model.config.get_architecture_name())"

Hugging Face's names occur in this file alone. GPT-2 stores its linear weights
transposed (`Conv1D`), and its q, k, v as one matrix, as this project does;
LLaMA and Qwen3 store q, k, v and gate, up apart.
"""

import torch
import transformers

from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig, get_preset_config

ACTIVATION_FROM_HF = {
    'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh',
    'silu': 'silu', 'swish': 'silu', 'relu': 'relu',
}
ACTIVATION_TO_HF = {
    'gelu': 'gelu', 'gelu_tanh': 'gelu_new', 'silu': 'silu', 'relu': 'relu',
}


def from_hf(hf_model, **overrides) -> ConfigurableGPT:
    """A ConfigurableGPT with the weights of a GPT2LMHeadModel,
    LlamaForCausalLM or Qwen3ForCausalLM.

    `overrides` are fields of the architecture that do not change the weights,
    e.g. attention_backend. Weights keep their values and become fp32.
    Raises ValueError for a model or variant that this project cannot express.
    """
    config = config_from_hf(hf_model.config, **overrides)
    model = ConfigurableGPT(config)
    state = state_from_hf(hf_model.state_dict(), config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if config.weight_tying:
        missing = [name for name in missing if name != 'lm_head.weight']
    if missing or unexpected:
        raise ValueError(f'weights that do not match: missing {missing}, '
                         f'unexpected {unexpected}')
    return model


def to_hf(model: ConfigurableGPT):
    """The transformers model with these weights, in fp32.

    Raises ValueError that names the fields no Hugging Face class can express.
    """
    hf_config = config_to_hf(model.config)
    hf_class = {
        'gpt2': transformers.GPT2LMHeadModel,
        'llama': transformers.LlamaForCausalLM,
        'qwen3': transformers.Qwen3ForCausalLM,
    }[hf_config.model_type]
    hf_model = hf_class(hf_config)
    state = state_to_hf(model.state_dict(), model.config, hf_config.model_type)
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
    readers = {'gpt2': _gpt2_from_hf, 'llama': _llama_from_hf,
               'qwen3': _qwen3_from_hf}
    if hf.model_type not in readers:
        raise ValueError(f'model_type={hf.model_type!r} cannot be read; '
                         f'expected one of {", ".join(readers)}')
    return get_preset_config(**(readers[hf.model_type](hf) | overrides))


def _gpt2_from_hf(hf) -> dict:
    if hf.scale_attn_by_inverse_layer_idx or not hf.scale_attn_weights:
        raise ValueError('scaled attention variants of GPT-2 are not '
                         'supported: scale_attn_weights must be True and '
                         'scale_attn_by_inverse_layer_idx False')
    return dict(
        name='gpt2', n_layer=hf.n_layer, n_head=hf.n_head, n_embd=hf.n_embd,
        d_ff=hf.n_inner or 4 * hf.n_embd, block_size=hf.n_positions,
        vocab_size=hf.vocab_size,
        activation=ACTIVATION_FROM_HF[hf.activation_function],
        norm_eps=hf.layer_norm_epsilon, dropout=hf.resid_pdrop,
        weight_tying=hf.tie_word_embeddings)


def _llama_from_hf(hf) -> dict:
    if hf.attention_bias != hf.mlp_bias:
        raise ValueError('attention_bias and mlp_bias differ; this project '
                         'has one `bias` for both')
    return dict(
        name='llama3', num_key_value_heads=hf.num_key_value_heads,
        bias=hf.attention_bias, **_rotary_from_hf(hf))


def _qwen3_from_hf(hf) -> dict:
    if hf.attention_bias or getattr(hf, 'use_sliding_window', False):
        raise ValueError('attention_bias and sliding windows are not '
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
        activation=ACTIVATION_FROM_HF[hf.hidden_act],
        norm_eps=hf.rms_norm_eps, rope_theta=theta, rope_scaling=rope,
        dropout=hf.attention_dropout, weight_tying=hf.tie_word_embeddings)


def config_to_hf(config: ModelArchitectureConfig):
    """The transformers configuration of this architecture.

    Raises ValueError that names the fields no Hugging Face class can express.
    """
    families = {
        'gpt2': _gpt2_problems(config),
        'llama': _rotary_problems(config, qk_norm=False),
        'qwen3': _rotary_problems(config, qk_norm=True),
    }
    family = next((f for f, problems in families.items() if not problems), None)
    if family is None:
        raise ValueError(
            'no Hugging Face class can express this architecture:\n'
            + '\n'.join(f'  as {f}: {", ".join(problems)}'
                        for f, problems in families.items()))
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
    hf_class = {'llama': transformers.LlamaConfig,
                'qwen3': transformers.Qwen3Config}[family]
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
    return hf_class(**values)


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


def _model_type(config: ModelArchitectureConfig) -> str:
    if config.position_encoding == 'learned_absolute':
        return 'gpt2'
    return 'qwen3' if config.qk_norm else 'llama'


def state_from_hf(hf_state: dict, config: ModelArchitectureConfig) -> dict:
    """Hugging Face's state dict -> this project's."""
    state = {}
    for ours, theirs, transposed in weight_names(config, _model_type(config)):
        absent = [name for name in theirs if name not in hf_state]
        if absent:
            raise ValueError(f'the checkpoint lacks {", ".join(absent)}')
        parts = [hf_state[name] for name in theirs]
        weight = torch.cat(parts) if len(parts) > 1 else parts[0]
        state[ours] = (weight.t() if transposed else weight).contiguous()
    return state


def state_to_hf(state: dict, config: ModelArchitectureConfig,
                model_type: str) -> dict:
    """This project's state dict -> Hugging Face's."""
    D = config.head_dim
    rows = {'attn.qkv': [config.n_head * D] + 2 * [config.num_key_value_heads
                                                   * D],
            'ffn.gate_up': 2 * [config.d_ff]}
    hf_state = {}
    for ours, theirs, transposed in weight_names(config, model_type):
        weight = state[ours].t() if transposed else state[ours]
        parts = [weight]
        if len(theirs) > 1:
            layer_part = '.'.join(ours.split('.')[2:4])
            parts = weight.split(rows[layer_part])
        for name, part in zip(theirs, parts, strict=True):
            hf_state[name] = part.contiguous().clone()
    return hf_state
