"""Equality with transformers: the same weights give the same logits, losses
and gradients. The models are small and drawn at random; nothing is fetched.

Every case prints the largest differences (`pytest -rP`, or the summary that
conftest.py adds at the end of the run).
"""

import pytest
import torch
import transformers

from hf_convert import from_hf, to_hf
from model_builder import ConfigurableGPT
from model_config import get_preset_config
from training.hf_weights import state_from_hf

# fp32; what is measured is printed: 2e-6, 1e-6, 2e-6
LOGITS, LOSS = 1e-5, 3e-6
GRADIENTS = 1e-5  # of each parameter, as a share of its own largest
ROPE_31 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0,
               high_freq_factor=4.0, original_max_position_embeddings=64)
COMMON = dict(vocab_size=1000, bos_token_id=None, eos_token_id=None)


def llama(**kw):
    theta, scaling = kw.pop('theta', 1e4), kw.pop('scaling', None)
    rope = dict(scaling or {'rope_type': 'default'}, rope_theta=theta)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **COMMON, num_hidden_layers=3, hidden_size=96, intermediate_size=256,
        num_attention_heads=8, max_position_embeddings=256,
        rope_parameters=rope, **kw))


def qwen3(**kw):
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        **COMMON, num_hidden_layers=3, hidden_size=96, intermediate_size=288,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32,
        max_position_embeddings=256,
        rope_parameters={'rope_type': 'default', 'rope_theta': 1e6}, **kw))


HF_MODELS = {
    'gpt2': lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **COMMON, n_layer=3, n_head=4, n_embd=96, n_positions=256,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    'llama2': lambda: llama(tie_word_embeddings=False),
    'llama3': lambda: llama(num_key_value_heads=2, theta=5e5,
                            tie_word_embeddings=False),
    'llama3.1, scaled RoPE': lambda: llama(
        num_key_value_heads=2, theta=5e5, scaling=ROPE_31,
        tie_word_embeddings=True),
    'qwen3, tied': lambda: qwen3(tie_word_embeddings=True),
    'qwen3, untied': lambda: qwen3(tie_word_embeddings=False),
}


def build(name, seed=0):
    torch.manual_seed(seed)
    hf = HF_MODELS[name]().float()
    with torch.no_grad():
        for parameter in hf.parameters():
            # the released initialisation hides a swapped norm or a dropped
            # bias behind ones and zeros
            parameter.add_(torch.randn_like(parameter) * 0.05)
    hf.eval()
    tokens = torch.randint(0, COMMON['vocab_size'], (2, 201))
    return hf, tokens[:, :-1], tokens[:, 1:].contiguous()


def hf_loss_and_grads(hf, x, y):
    logits = hf(x).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), y.flatten())
    loss.backward()
    return logits.detach(), loss.item(), {
        n: p.grad for n, p in hf.named_parameters()}


@pytest.mark.parametrize('backend', ['sdpa', 'eager'])
@pytest.mark.parametrize('name', HF_MODELS)
def test_equals_transformers(name, backend, parity_report):
    hf, x, y = build(name)
    model = from_hf(hf, attention_backend=backend)
    hf_logits, hf_loss, hf_grads = hf_loss_and_grads(hf, x, y)

    logits, loss = model(x, y)
    d_logits = (logits - hf_logits).abs().max().item()
    d_loss = abs(loss.item() - hf_loss)
    _, fused_loss = model(x, y, return_logits=False)
    d_fused = abs(fused_loss.item() - hf_loss)

    fused_loss.backward()
    expected = state_from_hf(hf_grads, model.config)
    ours = dict(model.named_parameters())
    assert set(expected) == set(ours)  # every parameter is compared
    scales = {n: g.abs().max().item() for n, g in expected.items()}
    d_grads = {n: (ours[n].grad - g).abs().max().item() / scales[n]
               for n, g in expected.items()}
    worst = max(d_grads, key=d_grads.get)
    parity_report(f'{name + ", " + backend:32} logits {d_logits:.1e}  '
                  f'loss {max(d_loss, d_fused):.1e}  gradients '
                  f'{d_grads[worst]:.1e} of the largest ({worst})')
    assert d_logits < LOGITS
    assert max(d_loss, d_fused) < LOSS
    assert d_grads[worst] < GRADIENTS, worst
    assert min(scales.values()) > 1e-5  # not equal by smallness


@pytest.mark.parametrize('name', HF_MODELS)
def test_round_trip_is_exact(name):
    hf, x, _ = build(name)
    model = from_hf(hf)
    back = to_hf(model)
    state = hf.state_dict()
    assert set(back.state_dict()) == set(state)
    for key, value in back.state_dict().items():
        assert torch.equal(value, state[key]), key
    again = from_hf(back)
    assert again.config == model.config
    for (key, a), b in zip(model.state_dict().items(),
                           again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    torch.testing.assert_close(back(x).logits, hf(x).logits, rtol=0, atol=0)


@pytest.mark.parametrize('name', ['gpt2', 'llama3', 'qwen3, tied'])
def test_a_planted_error_is_caught(name):
    """The comparison above must see a single wrong weight."""
    hf, x, _ = build(name)
    model = from_hf(hf)
    with torch.no_grad():
        model.h[1].attn_norm.weight[3] += 1e-3
    difference = (model(x)[0] - hf(x).logits).abs().max().item()
    assert difference > LOGITS


def test_a_gpt2_without_biases_has_some_of_zero_there():
    torch.manual_seed(0)
    model = ConfigurableGPT(get_preset_config(
        'gpt2', n_layer=2, n_embd=64, n_head=4, vocab_size=100,
        block_size=32, bias=False)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    hf = to_hf(model)
    biases = [p for name, p in hf.named_parameters() if name.endswith('bias')]
    assert len(biases) == 2 * 6 + 1 and not any(b.any() for b in biases)
    x = torch.randint(100, (3, 32))
    assert (model(x)[0] - hf(x).logits).abs().max() < LOGITS
    back = from_hf(hf)
    assert back.config.bias and (back(x)[0] - model(x)[0]).abs().max() < LOGITS


def test_to_hf_refuses_what_no_class_expresses():
    config = get_preset_config('qwen3', n_layer=1, n_embd=64, n_head=2,
                               vocab_size=100, block_size=32,
                               position_encoding='none')
    with pytest.raises(ValueError, match='position_encoding') as error:
        to_hf(ConfigurableGPT(config))
    assert 'as gpt2' in str(error.value) and 'as qwen3' in str(error.value)


def test_from_hf_refuses_an_unknown_family():
    hf = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2,
        intermediate_size=64, vocab_size=100))
    with pytest.raises(ValueError, match='gpt_neox'):
        from_hf(hf)


def test_bf16_is_no_further_from_fp64_than_transformers(parity_report):
    """Under bf16 autocast our logits stay as near to the exact ones as those
    of transformers do."""
    hf, x, _ = build('qwen3, tied')
    model = from_hf(hf)
    exact = hf.double()(x).logits
    hf.float()
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        theirs = (hf(x).logits.double() - exact).abs().mean().item()
        ours = (model(x)[0].double() - exact).abs().mean().item()
    parity_report(f'{"qwen3, bf16 autocast":32} mean error {ours:.2e}, '
                  f'transformers {theirs:.2e}')
    # the residual stream is bf16 here and fp32 there
    assert ours < 2 * theirs
