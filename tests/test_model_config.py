"""Presets, overrides and checks of ModelArchitectureConfig."""

import dataclasses
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from model_config import (
    CHOICES,
    PRESET_CONFIGS,
    ModelArchitectureConfig,
    get_gpt2_config,
    get_llama2_style_config,
    get_llama3_style_config,
    get_preset_config,
    get_qwen3_style_config,
    options_without_effect,
)

FIELDS = [f.name for f in dataclasses.fields(ModelArchitectureConfig)]
ROPE_31 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0,
               high_freq_factor=4.0, original_max_position_embeddings=8192)

LLAMA = dict(
    n_layer=32, n_head=32, n_embd=4096, head_dim=128, normalization='rmsnorm',
    activation='silu', position_encoding='rope', norm_position='pre',
    ffn_type='swiglu', qk_norm=False, bias=False, weight_tying=False,
    dropout=0.0, rope_scaling=None, norm_eps=1e-5)
# the released configurations, padded or shortened as the project says
PUBLISHED = {
    'gpt2': dict(
        n_layer=12, n_head=12, n_embd=768, num_key_value_heads=12,
        head_dim=64, d_ff=3072, block_size=1024, vocab_size=50304,
        normalization='layernorm', activation='gelu_tanh',
        position_encoding='learned_absolute', norm_position='pre',
        ffn_type='standard', qk_norm=False, bias=True, weight_tying=True,
        dropout=0.0, norm_eps=1e-5),
    'llama2': LLAMA | dict(
        num_key_value_heads=32, d_ff=11008, block_size=4096,
        vocab_size=32000, rope_theta=10_000),
    'llama3': LLAMA | dict(
        num_key_value_heads=8, d_ff=14336, block_size=8192,
        vocab_size=128256, rope_theta=500_000),
    'qwen3': LLAMA | dict(
        n_layer=28, n_head=16, n_embd=1024, num_key_value_heads=8, d_ff=3072,
        block_size=32768, vocab_size=151936, rope_theta=1_000_000,
        qk_norm=True, norm_eps=1e-6, attention_backend='flash_attn_2'),
}

# two values each, so that one of them is news to any preset
OVERRIDES = dict(
    n_layer=(3, 5), n_head=(8, 16), n_embd=(1920, 960),
    num_key_value_heads=(2, 4), head_dim=(96, 32), d_ff=(1000, 2000),
    block_size=(77, 99), vocab_size=(500, 600), qk_norm=(True, False),
    bias=(True, False), weight_tying=(True, False), dropout=(0.1, 0.2),
    rope_theta=(5000.0, 7), rope_scaling=(ROPE_31, None),
    norm_eps=(1e-3, 1e-4),
    **{name: choices[:2] for name, choices in CHOICES.items()})


@pytest.mark.parametrize('name', PRESET_CONFIGS)
def test_preset_has_the_published_values(name):
    config = get_preset_config(name)
    wrong = {k: (getattr(config, k), v) for k, v in PUBLISHED[name].items()
             if getattr(config, k) != v}
    assert wrong == {}
    assert config == PRESET_CONFIGS[name]()


def test_preset_functions():
    assert PRESET_CONFIGS == {
        'gpt2': get_gpt2_config, 'llama2': get_llama2_style_config,
        'llama3': get_llama3_style_config, 'qwen3': get_qwen3_style_config}
    with pytest.raises(ValueError, match='gpt3.*gpt2, llama2, llama3, qwen3'):
        get_preset_config('gpt3')


@pytest.mark.parametrize('field', FIELDS)
@pytest.mark.parametrize('name', PRESET_CONFIGS)
def test_every_field_can_be_overridden(name, field):
    preset = get_preset_config(name)
    value = next(v for v in OVERRIDES[field] if v != getattr(preset, field))
    config = get_preset_config(name, **{field: value})
    assert getattr(config, field) == value
    followers = {'n_embd': {'d_ff', 'head_dim'}, 'ffn_type': {'d_ff'},
                 'n_head': {'num_key_value_heads', 'head_dim'}}
    changed = {f for f in FIELDS
               if getattr(config, f) != getattr(preset, f)}
    assert changed - {field} <= followers.get(field, set())


@pytest.mark.parametrize('name, overrides, expected', [
    # d_ff keeps its ratio to n_embd
    ('gpt2', dict(n_embd=960), dict(d_ff=3840, head_dim=80)),
    ('llama3', dict(n_embd=2048), dict(d_ff=7168, head_dim=64)),
    ('qwen3', dict(n_embd=2304), dict(d_ff=6912, head_dim=128)),
    # LLaMA 2's is 8/3, rounded up to a multiple of 256
    ('llama2', dict(n_embd=4096), dict(d_ff=11008)),
    ('llama2', dict(n_embd=768), dict(d_ff=2048)),    # 2048 exactly
    ('llama2', dict(n_embd=832), dict(d_ff=2304)),    # from 2218.7
    ('llama2', dict(n_embd=2304, n_head=18), dict(d_ff=6144)),
    # num_key_value_heads keeps its ratio to n_head
    ('gpt2', dict(n_head=6), dict(num_key_value_heads=6, head_dim=128)),
    ('llama2', dict(n_head=16), dict(num_key_value_heads=16, head_dim=256)),
    ('llama3', dict(n_head=64), dict(num_key_value_heads=16, head_dim=64)),
    ('llama3', dict(n_head=4), dict(num_key_value_heads=1)),
    ('qwen3', dict(n_head=32), dict(num_key_value_heads=16, head_dim=128)),
    # what is given stays
    ('llama2', dict(n_embd=2048, d_ff=5000), dict(d_ff=5000)),
    ('llama3', dict(n_head=16, num_key_value_heads=16),
     dict(num_key_value_heads=16)),
    ('llama3', dict(n_embd=2048, head_dim=128), dict(head_dim=128)),
    # another kind of feed-forward takes that kind's usual width
    ('gpt2', dict(ffn_type='swiglu'), dict(d_ff=2048)),
    ('llama3', dict(ffn_type='standard'), dict(d_ff=16384)),
])
def test_what_is_not_given_follows(name, overrides, expected):
    config = get_preset_config(name, **overrides)
    assert {k: getattr(config, k) for k in expected} == expected


@pytest.mark.parametrize('ffn_type, d_ff', [('standard', 400),
                                            ('swiglu', 512)])
def test_without_a_preset_none_means_the_usual_value(ffn_type, d_ff):
    config = ModelArchitectureConfig(n_head=4, n_embd=100, ffn_type=ffn_type)
    assert config.num_key_value_heads == 4
    assert config.head_dim == 25
    assert config.d_ff == d_ff


@pytest.mark.parametrize('wrong, words', [
    (dict(n_layer=0), ['n_layer=0']),
    (dict(n_layer=2.5), ['n_layer=2.5', 'int']),
    (dict(n_layer=True), ['n_layer=True', 'int']),
    (dict(n_head=-1), ['n_head=-1']),
    (dict(d_ff=0), ['d_ff=0']),
    (dict(vocab_size='big'), ["vocab_size='big'", 'int']),
    (dict(block_size=None), ['block_size=None', 'int']),
    (dict(bias=1), ['bias=1', 'bool']),
    (dict(dropout=1.0), ['dropout=1.0', '[0, 1)']),
    (dict(dropout=-0.1), ['dropout=-0.1']),
    (dict(dropout=float('nan')), ['dropout=nan']),
    (dict(norm_eps=0.0), ['norm_eps=0.0']),
    (dict(rope_theta=float('inf')), ['rope_theta=inf']),
    (dict(activation='swish'), ["activation='swish'", 'gelu, gelu_tanh, silu']),
    (dict(normalization='batch'), ["normalization='batch'", 'rmsnorm']),
    (dict(position_encoding='alibi'), ['alibi', 'learned_absolute, rope']),
    (dict(norm_position='sandwich'), ['sandwich', 'pre, post']),
    (dict(ffn_type='moe'), ['moe', 'standard, swiglu']),
    (dict(attention_backend='xformers'), ['xformers', 'sdpa, eager']),
    (dict(n_head=12, num_key_value_heads=5), ['n_head=12', 'heads=5']),
    (dict(n_head=4, num_key_value_heads=8), ['n_head=4', 'heads=8']),
    (dict(n_embd=100, n_head=12), ['n_embd=100', 'n_head=12', 'head_dim']),
    (dict(position_encoding='rope', head_dim=15), ['head_dim=15', 'even']),
    (dict(position_encoding='rope', n_embd=36, n_head=4), ['head_dim=9']),
    (dict(rope_scaling={'factor': 8.0}), ['rope_scaling', 'low_freq_factor']),
    (dict(rope_scaling=ROPE_31 | {'rope_type': 'yarn'}), ['yarn', 'llama3']),
    (dict(rope_scaling=ROPE_31 | {'factor': 0}), ["'factor'", '0']),
    (dict(rope_scaling=ROPE_31 | {'low_freq_factor': 4.0}),
     ['low_freq_factor', 'high_freq_factor']),
])
def test_a_wrong_value_is_refused(wrong, words):
    with pytest.raises(ValueError, match=r'1 problem\(s\)') as error:
        ModelArchitectureConfig(**wrong)
    assert [w for w in words if w not in str(error.value)] == []


def test_all_problems_in_one_error():
    wrong = dict(n_layer=-2, n_embd='wide', d_ff=0, n_head=12,
                 num_key_value_heads=7, activation='swish', dropout=2.0,
                 norm_eps=-1e-5, weight_tying=None,
                 rope_scaling={'rope_type': 'linear'})
    for build in (ModelArchitectureConfig, lambda **kw: get_preset_config(
            'llama3', **kw)):
        with pytest.raises(ValueError) as error:
            build(**wrong)
        text = str(error.value)
        assert text.startswith('9 problem(s)')
        assert [n for n in wrong if n not in text] == []
        assert len(text.splitlines()) == 10


def test_frozen():
    config = get_preset_config('gpt2')
    for name in FIELDS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, getattr(config, name))


def test_a_callers_dict_does_not_change_a_built_configuration():
    scaling = dict(ROPE_31)
    config = get_preset_config('llama3', rope_scaling=scaling)
    scaling['factor'] = -1.0
    assert config.rope_scaling['factor'] == 8.0
    config.to_dict()['rope_scaling']['factor'] = -1.0
    assert config.rope_scaling['factor'] == 8.0


@pytest.mark.parametrize('config', [
    *(get_preset_config(name) for name in PRESET_CONFIGS),
    get_preset_config('llama3', rope_scaling=ROPE_31, n_embd=2048,
                      dropout=0.25, vocab_size=512, norm_eps=3e-7),
], ids=[*PRESET_CONFIGS, 'changed'])
def test_round_trips(config, tmp_path):
    assert list(config.to_dict()) == FIELDS
    assert ModelArchitectureConfig.from_dict(config.to_dict()) == config
    path = tmp_path / 'config.json'
    config.save_json(path)
    assert json.loads(path.read_text()) == config.to_dict()
    assert ModelArchitectureConfig.load_json(path) == config
    assert ModelArchitectureConfig.load_json(str(path)) == config


def test_unknown_fields_are_named(tmp_path):
    values = get_preset_config('gpt2').to_dict() | {'n_heads': 3, 'depth': 1}
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(values))
    for build in (lambda: ModelArchitectureConfig.from_dict(values),
                  lambda: ModelArchitectureConfig.load_json(path),
                  lambda: get_preset_config('gpt2', n_heads=3, depth=1)):
        with pytest.raises(ValueError, match='depth, n_heads.*num_key_value'):
            build()


def test_a_loaded_file_is_checked(tmp_path):
    path = tmp_path / 'config.json'
    path.write_text(json.dumps({'n_layer': 0, 'bias': 'no'}))
    with pytest.raises(ValueError, match=r'2 problem\(s\)'):
        ModelArchitectureConfig.load_json(path)


def test_architecture_names():
    names = {p: get_preset_config(p).get_architecture_name()
             for p in PRESET_CONFIGS}
    for word in ('28x1024', 'GQA 16:8', 'x128', 'QK-norm', 'RoPE 1e+06',
                 'RMSNorm', 'silu 3072', 'untied'):
        assert word in names['qwen3']
    for word in ('12x768', 'MHA 12', 'learned', 'LayerNorm', 'gelu_tanh 3072'):
        assert word in names['gpt2']
    assert 'untied' not in names['gpt2'] and 'gated' not in names['gpt2']


@pytest.mark.parametrize('change', [
    dict(normalization='layernorm'), dict(activation='relu'),
    dict(position_encoding='none'), dict(norm_position='post'),
    dict(ffn_type='standard', d_ff=14336), dict(qk_norm=True),
    dict(num_key_value_heads=32), dict(num_key_value_heads=4),
    dict(head_dim=64), dict(d_ff=11008), dict(weight_tying=True),
    dict(rope_theta=1e4), dict(rope_scaling=ROPE_31), dict(n_layer=31),
])
def test_the_name_tells_components_apart(change):
    base = get_preset_config('llama3')
    other = get_preset_config('llama3', **change)
    assert other.get_architecture_name() != base.get_architecture_name()


@pytest.mark.parametrize('overrides, named', [
    (dict(rope_theta=5e5), ['rope_theta']),
    (dict(rope_scaling=ROPE_31), ['rope_scaling']),
    (dict(rope_theta=5e5, rope_scaling=ROPE_31),
     ['rope_scaling', 'rope_theta']),
    (dict(rope_theta=5e5, position_encoding='rope'), []),
    (dict(position_encoding='none', rope_theta=5e5), ['rope_theta']),
    (dict(n_layer=3, activation='relu'), []),
])
def test_options_without_effect(overrides, named):
    config = get_preset_config('gpt2', **overrides)
    problems = options_without_effect(config, set(overrides))
    assert [p.split('=')[0] for p in problems] == named
    assert all('position_encoding' in p for p in problems)
    # a preset's own value that goes unread is nobody's mistake
    assert options_without_effect(config, set()) == []


PRESET_CHECK = '''
from model_config import get_preset_config
config = get_preset_config('qwen3')
print(f'Qwen3 preset: {config.get_architecture_name()}')
assert config.rope_theta == 1_000_000, 'RoPE theta incorrect'
assert config.num_key_value_heads == 8, 'GQA heads incorrect'
print('\u2713 Qwen3 preset validation passed')
'''
BUILD_CHECK = '''
from model_builder import ConfigurableGPT
from model_config import get_preset_config
config = get_preset_config('qwen3')
model = ConfigurableGPT(config)
print(f'Parameters: {model.get_num_params() / 1e6:.2f}M')
print('\u2713 Qwen3 model construction passed')
'''


@pytest.mark.parametrize('code, words', [
    (PRESET_CHECK, ['Qwen3 preset: 28x1024', '\u2713 Qwen3 preset']),
    pytest.param(  # draws 0.75 billion numbers
        BUILD_CHECK, ['Parameters: 751.63M', '\u2713 Qwen3 model'],
        marks=pytest.mark.slow),
], ids=['preset', 'build'])
def test_inline_checks(code, words):
    """`python -c` from the root: the whole 0.75B model is really built."""
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True,
        encoding='utf-8', timeout=300)
    assert done.returncode == 0, done.stderr
    assert [w for w in words if w not in done.stdout] == []
