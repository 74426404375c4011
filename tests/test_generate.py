"""Generation: the cache, batches, what is drawn, text as it comes.

Greedy output is compared with `generate` of transformers, by models that
hf_convert.py exports. Drawing one token is in test_model.py, the script in
test_sample.py.
"""

import sys

import pytest
import torch
from conftest import bpe_of
from running import run
from test_model import perturbed, rng

import model_generation
from hf_convert import to_hf
from model_components import ATTENTION_BACKENDS
from model_generation import HalfLinear, KVCache, hold_in_bf16
from training.text_stream import TextStream

PRESETS = ['gpt2', 'llama2', 'llama3', 'qwen3']
V = 61
LENGTHS = (7, 2, 5, 7)


def build(preset='llama3', **kw):
    return perturbed(preset, **{'block_size': 48} | kw).eval()


def prompts(lengths=LENGTHS, seed=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, V, (n,), generator=g).tolist() for n in lengths]


def theirs(hf, rows, n, **options):
    """What transformers generates from rows that it pads on the left."""
    T = max(map(len, rows))
    idx = torch.tensor([[0] * (T - len(row)) + row for row in rows])
    seen = torch.tensor([[0] * (T - len(row)) + [1] * len(row)
                         for row in rows])
    out = hf.generate(idx, attention_mask=seen, do_sample=False,
                      max_new_tokens=n, pad_token_id=0, **options)
    return [row + new for row, new in zip(rows, out[:, T:].tolist(),
                                          strict=True)]


@pytest.mark.parametrize('preset', PRESETS)
def test_greedy_equals_transformers(preset):
    """Token for token: alone and padded, with and without a cache."""
    model, rows = build(preset), prompts()
    assert model.config.num_key_value_heads == (1 if preset == 'llama3' else
                                                2 if preset == 'qwen3' else 4)
    expected = theirs(to_hf(model), rows, 30)
    assert len({token for row in expected for token in row[7:]}) > 10
    for use_cache in True, False:
        options = dict(temperature=0, use_cache=use_cache)
        assert model.generate(rows, 30, **options) == expected
        assert [model.generate([row], 30, **options)[0]
                for row in rows] == expected
        pair = torch.tensor([rows[0], rows[3]])
        assert model.generate(pair, 30, **options).tolist() == [
            expected[0], expected[3]]


@pytest.mark.parametrize('preset', ['gpt2', 'qwen3'])
@pytest.mark.parametrize('backend', ATTENTION_BACKENDS)
def test_logits_with_a_cache(preset, backend):
    """In chunks of 5, 1 and 3, padded by 0 and 2: those of each row alone."""
    model = build(preset, attention_backend=backend)
    rows = prompts((9, 7))
    idx = torch.tensor([rows[0], [0, 0] + rows[1]])
    cache = KVCache(model.config, 9, [0, 2], 'cpu')
    with torch.no_grad():
        found = torch.cat([model.hidden_states(part, cache)
                           for part in idx.split((5, 1, 3), dim=1)], 1)
        for row, padding, x in zip(rows, (0, 2), found, strict=True):
            alone = model.hidden_states(torch.tensor([row]))[0]
            torch.testing.assert_close(x[padding:], alone, rtol=1e-4,
                                       atol=1e-4)
    with pytest.raises(ValueError, match='9 \\+ 1 tokens exceed a cache of 9'):
        model.hidden_states(torch.tensor([[1], [1]]), cache)


@pytest.mark.parametrize('preset, kv_heads', [('gpt2', 4), ('llama3', 1)])
def test_the_cache_has_the_size_of_kv_heads(preset, kv_heads):
    """2 layers, keys and values, B, K, length, head size 8, fp32."""
    model = build(preset)
    cache = KVCache(model.config, 40, [0, 0, 0], 'cpu')
    for n in 5, 1:
        model.hidden_states(torch.ones(3, n, dtype=torch.long), cache)
        assert cache.n_bytes() == 2 * 2 * 3 * kv_heads * 40 * 8 * 4
    assert cache.end == 6
    with torch.autocast('cpu', torch.bfloat16):
        half = KVCache(model.config, 40, [0, 0, 0], 'cpu')
        model.hidden_states(torch.ones(3, 5, dtype=torch.long), half)
    assert half.n_bytes() == cache.n_bytes() / 2


@pytest.mark.parametrize('preset', ['gpt2', 'llama3'])
def test_contexts_beyond_block_size(preset):
    """Each row slides by itself, by a quarter of a block, as it would alone;
    of a prompt that is too long the newest block is read."""
    model = build(preset, block_size=8)
    rows = prompts((3, 8, 5, 21))
    expected = [list(row) for row in rows]
    for row in expected:
        begin = max(0, len(row) - 8)
        for _ in range(20):
            begin += 2 if len(row) - begin > 8 else 0
            logits = model(torch.tensor([row[begin:]]))[0][0, -1]
            row.append(int(logits.argmax()))
    for use_cache in True, False:
        assert model.generate(rows, 20, temperature=0,
                              use_cache=use_cache) == expected


def test_a_token_needs_one_position():
    """With a cache, each token but the first is computed from itself."""
    model, widths = build(block_size=16), []
    model.wte.register_forward_hook(
        lambda module, args, out: widths.append(args[0].shape[1]))
    model.generate(prompts((4, 4)), 14, temperature=0)
    # at 17 tokens a row is computed again from its newest 13
    assert widths == [4] + 12 * [1] + [13]
    widths.clear()
    model.generate(prompts((4,)), 3, temperature=0, use_cache=False)
    assert widths == [4, 5, 6]


@pytest.mark.parametrize('options', [
    {}, {'top_k': 5}, {'top_p': 0.8}, {'top_k': 20, 'top_p': 0.9}], ids=str)
def test_a_seed_draws_the_same_with_and_without_cache(options):
    model, rows = build(), prompts()
    def drawn(seed, **kw):
        return model.generate(rows, 30, generator=rng(seed), **options, **kw)
    first = drawn(1)
    assert drawn(1) == first == drawn(1, use_cache=False)
    assert drawn(2) != first
    # with a generator a row, a row does not depend on the batch
    many = model.generate(rows, 30, generator=[rng(i) for i in range(4)],
                          **options)
    assert many[2:] == model.generate(
        rows[2:], 30, generator=[rng(2), rng(3)], **options)
    assert many[0] != many[3]


def test_rows_end_apart():
    """By an end-of-text id, by on_token, or by their length."""
    model, rows, seen = build(), prompts(), []
    full = model.generate(rows, 20, temperature=0)
    eos_id = full[0][7 + 4]            # row 0 ends after at most 5 tokens
    def on_token(row, token):
        seen.append((row, token))
        return row == 1 and len([1 for r, _ in seen if r == 1]) == 3
    out = model.generate(rows, 20, temperature=0, eos_id=eos_id,
                         on_token=on_token)
    for number, (row, whole) in enumerate(zip(out, full, strict=True)):
        new = whole[LENGTHS[number]:]
        if eos_id in new:
            new = new[:new.index(eos_id) + 1]
        new = new[:3] if number == 1 else new
        assert row == rows[number] + new
        assert [token for r, token in seen if r == number] == new
    assert len(out[0]) <= 7 + 5 and len(out[1]) <= 2 + 3
    # in a tensor the ended row is filled up
    pair = torch.tensor([rows[0], rows[3]])
    out = model.generate(pair, 20, temperature=0, eos_id=eos_id).tolist()
    new = out[0][7:]
    assert new[new.index(eos_id):] == [eos_id] * (
        len(new) - new.index(eos_id))


@pytest.mark.parametrize('rows, options, says', [
    ([], {}, 'no prompt'),
    ([[1], []], {}, 'prompt 1 is empty: give at least one id'),
    (torch.zeros(1, 0, dtype=torch.long), {}, 'prompt 0 is empty'),
    ([[1, 61]], {}, 'prompt 0 has the id 61, .* from 0 to 60'),
    ([[-1]], {}, 'the id -1'),
    ([[1]], dict(temperature=-1.0, top_k=0, top_p=1.5),
     'temperature=-1.0 .*top_k=0 .*top_p=1.5'),
    ([[1], [2]], dict(generator=[rng(0)]), '1 generators for 2 prompts'),
    ([[1]], dict(max_new_tokens=-1), 'max_new_tokens=-1'),
])
def test_refused(rows, options, says):
    model = build()
    with pytest.raises(ValueError, match=says):
        model.generate(rows, **{'max_new_tokens': 3} | options)


def test_bf16_autocast():
    model, rows = build(), prompts()
    with torch.autocast('cpu', torch.bfloat16):
        out = model.generate(rows, 10, temperature=0)
    exact = model.generate(rows, 10, temperature=0)
    assert [len(row) for row in out] == [n + 10 for n in LENGTHS]
    # the first tokens, before roundings have added up
    assert [row[n] for row, n in zip(out, LENGTHS, strict=True)] == [
        row[n] for row, n in zip(exact, LENGTHS, strict=True)]


@pytest.mark.parametrize('packs', [True, False])
@pytest.mark.parametrize('preset', PRESETS)
def test_weights_held_in_bf16(preset, packs, monkeypatch):
    """The model whose weights are rounded to bf16, computed otherwise."""
    if packs and 'fbgemm' not in torch.backends.quantized.supported_engines:
        pytest.skip('PyTorch has no FBGEMM here')
    monkeypatch.setattr(model_generation, 'packs_for', lambda device: packs)
    model, rounded = build(preset), build(preset)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if name.endswith('weight') and not any(
                    part in name for part in ('norm', 'ln_f')):
                parameter.copy_(parameter.bfloat16())
    before = model.lm_head.weight.nbytes
    drawn = model.lm_head.weight.clone()
    hold_in_bf16(model)
    assert isinstance(model.lm_head, HalfLinear) == packs
    assert model.wte.weight.nbytes == before / 2
    held = dict(model.named_modules())
    for name, part in rounded.named_modules():
        if part.__class__ in (torch.nn.Linear, torch.nn.Embedding):
            # fp16 holds what is below 6e-5 to 3e-8
            assert (weight_of(held[name]) - part.weight).abs().max() < 3.1e-8
    assert (weight_of(model.lm_head) - drawn).abs().max() > 1e-5
    idx = torch.tensor(prompts((9,)))
    with torch.no_grad():
        expected = rounded.lm_head(rounded.hidden_states(idx))
        found = model.lm_head(model.hidden_states(idx)).float()
    # what is between the products is bf16 as well: up to 0.011
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 0.02 * scale
    out, alike = (m.generate(prompts(), 5, temperature=0)
                  for m in (model, rounded))
    assert [len(row) for row in out] == [n + 5 for n in LENGTHS]
    # the first token, before roundings have added up
    assert [row[:n + 1] for row, n in zip(out, LENGTHS, strict=True)] == [
        row[:n + 1] for row, n in zip(alike, LENGTHS, strict=True)]


def weight_of(part):
    if isinstance(part, HalfLinear):
        return torch.ops.quantized.linear_unpack_fp16(part.packed)[0]
    return part.weight.float()


# --- text ------------------------------------------------------------------


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    """No merges but of 'ab': every other byte is a token of its own."""
    return bpe_of(['ab ab ab'], 258, tmp_path_factory.mktemp('bpe') / 'bpe')


def pieces(tokenizer, text, prompt='', stop=()):
    stream = TextStream(tokenizer, tokenizer.encode(prompt).ids, stop)
    found = []
    for token in tokenizer.encode(text).ids:
        found.append(stream.add(token))
        if stream.stopped:
            break
    return found, stream.end(), stream


def test_characters_are_held_until_they_are_whole(tokenizer):
    text = 'é€😀a'
    found, rest, _ = pieces(tokenizer, text, prompt='z')
    assert found == ['', 'é', '', '', '€', '', '', '', '😀', 'a']
    assert rest == ''
    # what never becomes whole comes at the end
    stream = TextStream(tokenizer, [])
    half = tokenizer.encode('€').ids[:2]
    assert [stream.add(token) for token in half] == ['', '']
    assert stream.end() == '\ufffd'


def test_words_are_joined_as_the_tokenizer_joins_them(data):
    from tokenizers import Tokenizer
    words = Tokenizer.from_file(str(data / 'words' / 'tokenizer' /
                                    'tokenizer.json'))
    found, rest, stream = pieces(words, 'w3 w4 w5', prompt='w1 w2')
    assert stream.prompt_text == 'w1 w2'
    assert found == [' w3', ' w4', ' w5'] and rest == ''


@pytest.mark.parametrize('stop, expected', [
    (['cd'], 'x'), (['d'], 'xc'), (['cde', 'xcdq'], 'x'), (['€'], 'xcdef'),
    (['zz'], 'xcdef€'), (['abc'], 'xcdef€'), (['ef€', 'cd'], 'x')])
def test_stop_strings_that_span_tokens(tokenizer, stop, expected):
    """The prompt, which ends in ab, counts nothing."""
    found, rest, stream = pieces(tokenizer, 'xcdef€', 'ab', stop)
    assert ''.join(found) + rest == expected
    assert stream.stopped == (expected != 'xcdef€')


def test_what_may_begin_a_stop_string_is_held(tokenizer):
    assert pieces(tokenizer, 'xcdef', '', ['cde', 'xcdq'])[0] == [
        '', '', '', 'x']
    assert pieces(tokenizer, 'xcxcd', '', ['cd'])[0] == [
        'x', '', 'cx', '', '']
    # both are in one token: the first counts
    assert pieces(tokenizer, 'xab', '', ['b', 'ab'])[0] == ['x', '']
    found, rest, stream = pieces(tokenizer, 'xyz', '', ['z!'])
    assert (found, rest, stream.stopped) == (['x', 'y', ''], 'z', False)


# --- the benchmark ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_the_benchmark_runs():
    result = run('benchmarks/generation_speed.py', '--smoke',
                 '--dtype=float32')
    assert result.returncode == 0, result.stderr
    rows = [line.split(' | ') for line in result.stdout.splitlines()[3:]]
    assert [row[0].strip('| ') for row in rows[1:]] == [
        'this project', 'transformers', 'transformers, static cache']
    for row in rows[1:]:
        rate, ms, ratio, prompt, memory, equal = (
            float(cell.strip('| ')) for cell in row[1:])
        assert rate > 0 and ratio > 0 and 0.1 < memory < 5 and equal == 8
        assert rate * ms == pytest.approx(1000, rel=0.05)
