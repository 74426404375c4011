"""The configurations in config/, built on the meta device, and exact counts."""

import ast
import dataclasses
import math
import re

import pytest
import torch
from conftest import ROOT

import train
from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig, get_preset_config
from training.configurator import parse, read_schema

SCHEMA = read_schema(vars(train), train.__file__)
RUN_CONFIGS = sorted(p.stem for p in (ROOT / 'config').glob('full_*.py'))

# tokens and batch of the runs that are compared with the 1.5B
SHARED = dict(
    batch_size=6, gradient_accumulation_steps=32, block_size=2048,
    max_iters=25000, learning_rate=3e-4, weight_decay=0.1, dtype='bfloat16',
    compile=True, use_zero1=True, use_fsdp=False, eval_interval=1000,
    log_interval=10, always_save_checkpoint=False, bias=False, dropout=0.0)
QWEN3 = SHARED | dict(
    arch_preset='qwen3', n_layer=28, n_head=16, num_key_value_heads=8,
    vocab_size=151936, rope_theta=1_000_000, weight_tying=True,
    dataset='slimpajama_6b_qwen3')
SPECIFIED = {
    'full_qwen3_0.6b': QWEN3 | dict(
        n_embd=1024, d_ff=3072, batch_size=8, gradient_accumulation_steps=16,
        out_dir='out-qwen3-0.6b'),
    'full_qwen3_1.5b': QWEN3 | dict(
        n_embd=2048, d_ff=6144, out_dir='out-qwen3-1.5b'),
    'full_qwen3_2.0b': QWEN3 | dict(
        n_embd=2304, d_ff=6912, batch_size=4, out_dir='out-qwen3-2.0b'),
    'full_gpt2_1.36b': SHARED | dict(
        arch_preset='gpt2', n_layer=18, n_head=18, n_embd=2304,
        vocab_size=50304, dataset='slimpajama_6b_gpt2'),
    'full_llama2_1.36b': SHARED | dict(
        arch_preset='llama2', n_layer=18, n_head=18, n_embd=2304, d_ff=6144,
        vocab_size=32000, dataset='slimpajama_6b_llama2'),
    'full_llama3_1.5b_optimal': SHARED | dict(
        arch_preset='llama3', n_layer=18, n_head=16, num_key_value_heads=8,
        n_embd=2048, d_ff=7168, vocab_size=128256, rope_theta=500_000,
        dataset='slimpajama_6b_llama3'),
}
# (total, non-embedding); head_dim of the Qwen3 models is 128
COUNTS = {
    'full_qwen3_0.6b': (596_049_920, 440_467_456),
    'full_qwen3_1.5b': (1_720_574_976, 1_409_410_048),
    'full_qwen3_2.0b': (2_084_281_600, 1_734_221_056),
    'full_gpt2_1.36b': (1_267_322_112, 1_146_703_104),
    'full_llama2_1.36b': (1_294_159_104, 1_146_703_104),
    'full_llama3_1.5b_optimal': (1_544_628_224, 1_019_291_648),
}


def path_of(name):
    return ROOT / 'config' / f'{name}.py'


def docstring(name):
    """On one line."""
    text = ast.get_docstring(ast.parse(path_of(name).read_text()))
    return ' '.join(text.split())


def options_of(name, *argv):
    return parse(SCHEMA, [str(path_of(name)), *argv]).values


def architecture_of(options, **fallback):
    names = [f.name for f in dataclasses.fields(ModelArchitectureConfig)]
    given = {n: options[n] for n in names if options[n] is not None}
    return get_preset_config(options['arch_preset'], **fallback | given)


def counts(config):
    with torch.device('meta'):
        model = ConfigurableGPT(config)
    return (model.get_num_params(), model.get_num_params(non_embedding=True))


def numbers(text):
    """The numbers of a text, '1,024' and '3.5 billion' included."""
    found = re.findall(r'(\d[\d,]*(?:\.\d+)?)( billion| million)?', text)
    unit = {'': 1, ' billion': 1e9, ' million': 1e6}
    return [float(n.replace(',', '')) * unit[u] for n, u in found]


def test_the_specified_configurations_exist():
    assert set(SPECIFIED) <= set(RUN_CONFIGS)


@pytest.mark.parametrize('name', SPECIFIED)
def test_values(name):
    options = options_of(name)
    wrong = {k: (options[k], v) for k, v in SPECIFIED[name].items()
             if options[k] != v}
    assert wrong == {}


@pytest.mark.parametrize('name', RUN_CONFIGS)
def test_counts(name):
    config = architecture_of(options_of(name))
    total, non_embedding = counts(config)
    assert (total, non_embedding) == COUNTS[name]
    assert config.head_dim == 128
    doc = docstring(name)
    stated = re.search(r'([\d,]+) parameters\. ([\d,]+) of them', doc)
    assert stated is not None
    assert numbers(' '.join(stated.groups())) == [total, non_embedding]
    assert f'config/{name}.py' in doc


@pytest.mark.parametrize('name', RUN_CONFIGS)
def test_batch_arithmetic_of_the_comment(name):
    options = options_of(name)
    batch = (options['batch_size'], options['gradient_accumulation_steps'],
             options['block_size'])
    per_update = batch[0] * batch[1] * batch[2]
    comment = re.search(r'# training: (.*\n# .*)', path_of(name).read_text())
    *factors, product, n_updates, total = numbers(comment[1])
    assert tuple(factors) == batch
    assert product == per_update
    assert n_updates == options['max_iters']
    assert total == round(per_update * n_updates / 1e9, 2) * 1e9


def test_quickstart_presets_are_equally_large():
    """Their widths are in the Makefile, their size in the docstring."""
    makefile = (ROOT / 'Makefile').read_text()
    runs = re.search(r'^QUICK_RUNS := (.*)', makefile, re.M)[1].split()
    assert [r.split(':')[0] for r in runs] == [
        'gpt2', 'llama2', 'llama3', 'qwen3']
    totals = []
    for run in runs:
        preset, d_ff = run.split(':')
        options = options_of('quickstart', f'--arch_preset={preset}',
                             f'--d_ff={d_ff}')
        config = architecture_of(options, vocab_size=2048)
        assert (config.d_ff, config.weight_tying) == (int(d_ff), True)
        totals.append(counts(config)[0])
    assert max(totals) < 1.005 * min(totals)
    doc = docstring('quickstart')
    stated = numbers(re.search(r'([\d.]+ million) parameters', doc)[1])
    assert [round(t / 1e6, 2) * 1e6 for t in totals] == stated * 4


def test_quickstart_arithmetic():
    found = re.search(r'((?:\d+ x )+\d+) tokens x (\d+) updates = ([\d,]+)',
                      docstring('quickstart'))
    options = options_of('quickstart')
    per_update = math.prod(numbers(found[1]))
    assert per_update == (
        options['batch_size'] * options['gradient_accumulation_steps']
        * options['block_size'])
    assert numbers(found[2]) == [options['max_iters']]
    assert numbers(found[3]) == [per_update * options['max_iters']]


@pytest.mark.parametrize('name', [*RUN_CONFIGS, 'quickstart'])
def test_the_heading_comments_hold(name):
    """`d_ff = 9216  # 4 x n_embd`: what such a comment says is so."""
    options = options_of(name)
    stated = re.findall(r'^d_ff = .*# ([\d./]+) x n_embd',
                        path_of(name).read_text(), re.M)
    for ratio in stated:
        top, _, bottom = ratio.partition('/')
        expected = float(top) / float(bottom or 1) * options['n_embd']
        assert options['d_ff'] == pytest.approx(expected, rel=1e-9)
    assert len(stated) == (0 if name in ('quickstart', 'full_qwen3_0.6b')
                           else 1)


@pytest.mark.parametrize('preset, overrides, total', [
    # the released models
    ('gpt2', dict(vocab_size=50257), 124_439_808),
    ('llama2', {}, 6_738_415_616),
    ('llama3', {}, 8_030_261_248),
    ('qwen3', dict(weight_tying=True), 596_049_920),
    ('qwen3', dict(weight_tying=True, n_embd=2048), 1_720_574_976),
    # and what the project makes of them
    ('gpt2', {}, 124_475_904),
    ('qwen3', {}, 751_632_384),
])
def test_counts_of_presets(preset, overrides, total):
    assert counts(get_preset_config(preset, **overrides))[0] == total


@pytest.mark.parametrize('name, total, non_embedding', [
    ('full_qwen3_0.6b', 0.752, 0.440),
    ('full_qwen3_1.5b', 2.032, 1.409),
    ('full_qwen3_2.0b', 2.434, 1.734),
])
def test_untied_counts(name, total, non_embedding):
    options = options_of(name, '--weight_tying=False')
    found = counts(architecture_of(options))
    assert [round(n / 1e9, 3) for n in found] == [total, non_embedding]
