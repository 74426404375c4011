"""The benchmarks run to their end on tiny shapes; speeds are not judged."""

import re
import subprocess
import sys

import pytest
from running import ROOT


def table(text):
    """The cells of each row of a Markdown table, its head first."""
    rows = [[cell.strip() for cell in line.split('|')[1:-1]]
            for line in text.splitlines() if line.startswith('|')]
    return [row for row in rows if row[0] != '---']


def run(script, *arguments):
    """Its output; a process that hangs or fails is an error."""
    done = subprocess.run(
        [sys.executable, ROOT / 'benchmarks' / script, *arguments],
        capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('shape, ours, peer', [
    ('gpt2', 'gpt2', 'nanoGPT'), ('small', 'qwen3', 'transformers')])
def test_vs_peers(shape, ours, peer):
    """Both contenders, ratios, memory in processes of their own."""
    output = run('vs_peers.py', '--smoke', '--eager', '--rounds', '1',
                 '--dtype', 'float32', '--shape', shape)
    assert re.match(r'.*torch \d.*transformers \d.*eager, 1 rounds\n', output)
    head, first, second = table(output)
    assert first[:3] == [shape, 'float32', ours]
    assert second[:3] == [shape, 'float32', peer]
    assert first[3] == second[3]  # as many parameters
    assert float(first[5]) > 0 and re.match(r'-?[\d.]+', first[8])
    assert len(first) == len(second) == len(head)


def test_nanogpt_is_gpt2():
    """The peer written out computes what our preset does, but for the exact
    GELU in place of its tanh form."""
    import torch

    from benchmarks import vs_peers
    shape = vs_peers.shape_of('gpt2', True)
    torch.manual_seed(0)
    peer, ours = vs_peers.NanoGPT(shape), vs_peers.Ours(shape).model
    counts = [sum(p.numel() for p in m.parameters()) for m in (peer, ours)]
    assert counts[0] == counts[1]
    state = {}
    for name, tensor in peer.state_dict().items():
        for theirs, own in (
                ('.ln_1.', '.attn_norm.'), ('.ln_2.', '.ffn_norm.'),
                ('.c_attn.', '.attn.qkv.'), ('.c_proj.', '.attn.proj.'),
                ('.c_fc.', '.ffn.up.'), ('.mlp_proj.', '.ffn.down.')):
            name = name.replace(theirs, own)
        state[name] = tensor
    ours.load_state_dict(state)
    x, y = torch.randint(0, shape.vocab_size, (2, 2, shape.block_size))
    loss, expected = ours(x, y, return_logits=False)[1], peer(x, y)
    assert abs(loss.item() - expected.item()) < 1e-4


@pytest.mark.slow
def test_loader_speed():
    output = run('loader_speed.py', '--smoke')
    share = re.search(r'for its batch: ([\d.]+)%', output)
    assert 0 < float(share[1]) < 100


@pytest.mark.slow
def test_prepare_speed(tiny_tokenizer, tmp_path):
    """Every peer, two sizes, the table at the end."""
    for i in range(2000):  # one in 200 is for validation
        (tmp_path / f'{i}.py').write_text(f'value_{i} = {i} * 2\n' * 50)
    head, *rows = table(run(
        'prepare_speed.py', '--tokenizer', tiny_tokenizer, '--text', tmp_path,
        '--megabytes', '1', '--larger', '2', '--num_proc', '1'))
    names = [row[0] for row in rows]
    assert 'tokenizers.encode_batch' in names
    assert names.count('nanoGPT-style, tiktoken') == 2
    factors = [row[8] for row in rows if row[0].startswith('nanoGPT')]
    assert all(re.match(r'[\d.]+ x', factor) for factor in factors)
