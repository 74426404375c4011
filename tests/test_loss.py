"""The loss that never holds all logits, against PyTorch's and fp64."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model_components
from model_builder import ConfigurableGPT
from model_components import linear_cross_entropy
from model_config import get_preset_config

CHUNK = 8
N, C, V = 37, 24, 101   # N is no multiple of CHUNK


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(model_components.LOSS_CHUNK_ROWS, 'cpu', CHUNK)


def draw_case(n=N, ignored='some', seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, C, generator=g)
    w = torch.randn(V, C, generator=g) * 0.5
    targets = torch.randint(0, V, (n,), generator=g)
    if ignored == 'some':
        targets[1::3] = -1
    elif ignored == 'a chunk':
        targets[CHUNK:2 * CHUNK] = -1
    elif ignored == 'all':
        targets[:] = -1
    return x, w, targets


def loss_and_grads(function, x, w, targets, scale=1.0):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = function(x, w, targets)
    (loss * scale).backward()
    return loss.detach(), x.grad, w.grad


def plain(x, w, targets):
    return F.cross_entropy(F.linear(x, w).float(), targets, ignore_index=-1,
                           reduction='sum')


def exact(x, w, targets):
    return F.cross_entropy(x.double() @ w.double().t(), targets,
                           ignore_index=-1, reduction='sum')


def distance(a, b):
    """||a - b|| / ||b||"""
    b = b.double()
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize('ignored', ['none', 'some', 'a chunk'])
@pytest.mark.parametrize('n', [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, N])
def test_equals_cross_entropy(n, ignored):
    case = draw_case(n, ignored)
    ours = loss_and_grads(linear_cross_entropy, *case, scale=0.37)
    for reference in (plain, exact):
        theirs = loss_and_grads(reference, *case, scale=0.37)
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape and a.dtype == torch.float32
            assert distance(a, b) < 1e-6


def test_large_logits_do_not_overflow():
    x, w, targets = draw_case()
    case = x * 100, w * 10, targets
    ours = loss_and_grads(linear_cross_entropy, *case)
    for a, b in zip(ours, loss_and_grads(exact, *case), strict=True):
        assert distance(a, b) < 1e-5


def test_all_ignored_is_zero():
    ours = loss_and_grads(linear_cross_entropy, *draw_case(ignored='all'))
    assert [t.abs().max().item() for t in ours] == [0, 0, 0]


@pytest.mark.parametrize('frozen', [0, 1])
def test_gradient_of_one_input_only(frozen):
    x, w, targets = draw_case()
    inputs = [x.clone(), w.clone()]
    inputs[1 - frozen].requires_grad_()
    linear_cross_entropy(*inputs, targets).backward()
    expected = loss_and_grads(plain, x, w, targets)[2 - frozen]
    assert inputs[frozen].grad is None
    assert distance(inputs[1 - frozen].grad, expected) < 1e-6


@pytest.mark.parametrize('seed', range(3))
def test_bf16_autocast_is_no_worse_than_the_plain_path(seed):
    case = draw_case(n=203, seed=seed)
    truth = loss_and_grads(exact, *case)
    with torch.autocast('cpu', torch.bfloat16):
        ours = loss_and_grads(linear_cross_entropy, *case)
        theirs = loss_and_grads(plain, *case)
    assert ours[0].dtype == torch.float32
    for a, b, c in zip(ours[1:], theirs[1:], truth[1:], strict=True):
        assert distance(a, c) < 1.1 * distance(b, c)
        assert 1e-5 < distance(a, c) < 2e-2   # bf16 it is, and right
    assert distance(ours[0], truth[0]) < 1e-3
    assert distance(ours[0], theirs[0]) < 1e-5  # the same logits, summed


class Recorder(TorchDispatchMode):
    """The largest tensor that any operation makes, and the matmuls."""

    def __init__(self):
        super().__init__()
        self.largest = self.n_matmuls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.n_matmuls += func.overloadpacket in (
            torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def tiny(**kw):
    torch.manual_seed(0)
    values = dict(n_layer=1, n_head=2, n_embd=8, head_dim=4, d_ff=16,
                  num_key_value_heads=1, block_size=32, vocab_size=512)
    return ConfigurableGPT(get_preset_config('llama3', **values | kw))


def test_the_logits_are_never_held_whole():
    model = tiny()
    x, y = torch.randint(0, 512, (2, 4, 32))  # N*V = 65,536
    largest = {}
    for return_logits in (True, False):
        with Recorder() as recorder:
            model(x, y, return_logits=return_logits)[1].backward()
        largest[return_logits] = recorder.largest
    assert largest[True] == 4 * 32 * 512   # the recorder sees them here
    # a chunk of logits and the gradient of the head are 4,096 each
    assert largest[False] == CHUNK * 512


def test_without_gradients_only_the_logits_are_computed():
    """Evaluation must not pay for gradients that nobody asks for."""
    x, w, targets = draw_case()
    w.requires_grad_()
    with torch.no_grad(), Recorder() as recorder:
        linear_cross_entropy(x, w, targets)
    assert recorder.n_matmuls == -(-N // CHUNK)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('weight_tying', [True, False])
def test_model_gives_the_same_with_and_without_logits(weight_tying, reduction):
    model = tiny(weight_tying=weight_tying)
    x, y = torch.randint(0, 512, (2, 3, 21))
    y[0, :5], y[2, 7] = -1, -1
    results = []
    for return_logits in (True, False):
        model.zero_grad()
        logits, loss = model(x, y, return_logits=return_logits,
                             reduction=reduction)
        assert (logits is not None) == return_logits
        assert loss.dtype == torch.float32 and loss.shape == ()
        loss.backward()
        results.append((loss.detach(), {
            n: p.grad for n, p in model.named_parameters()}))
    (loss, grads), (fused_loss, fused_grads) = results
    assert distance(fused_loss, loss) < 1e-6
    for name, grad in grads.items():
        assert distance(fused_grads[name], grad) < 1e-5, name


@pytest.mark.parametrize('return_logits', [True, False])
def test_sum_is_mean_times_targets(return_logits):
    model = tiny()
    x, y = torch.randint(0, 512, (2, 3, 21))
    y[1, 3:] = -1
    with torch.no_grad():
        mean, total = (model(x, y, return_logits=return_logits, reduction=r)[1]
                       for r in ('mean', 'sum'))
    n_targets = 3 * 21 - 18
    assert total.item() == pytest.approx(mean.item() * n_targets, rel=1e-6)
    y[:] = -1
    assert model(x, y, return_logits=return_logits,
                 reduction='sum')[1].item() == 0


@pytest.mark.parametrize('return_logits', [True, False])
def test_an_unknown_reduction_is_an_error(return_logits):
    x = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match='average'):
        tiny()(x, x, return_logits=return_logits, reduction='average')


def test_without_targets():
    model = tiny()
    x = torch.zeros(2, 5, dtype=torch.long)
    logits, loss = model(x)
    assert logits.shape == (2, 5, 512) and loss is None
    assert model(x, return_logits=False) == (None, None)
