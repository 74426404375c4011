"""Memory of a training step, told before it runs.

What a block keeps for its backward pass is counted, not guessed: the block is
traced with fake tensors, which have shapes and no data, through PyTorch's own
autograd, or through the partitioner that torch.compile uses. The rest is
arithmetic. tests/test_memory.py holds it against processes that train.
"""

import dataclasses
import functools
import json
import warnings

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from model_builder import BLOCKS, ConfigurableGPT
from model_components import LOSS_CHUNK_ROWS, build_rope
from model_config import ModelArchitectureConfig

STRATEGIES = ('ddp', 'zero1', 'fsdp')


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a model is trained, as far as memory goes."""

    batch_size: int
    accumulation: int = 1         # micro-steps of one process
    world_size: int = 1
    strategy: str = 'ddp'         # one of STRATEGIES
    dtype: str = 'bfloat16'
    compile: bool = True
    activation_checkpointing: str = 'none'
    activation_memory_budget: float = 1.0
    fsdp_reshard_after_forward: bool = False
    device_type: str = 'cuda'


def once_per_config(function):
    """functools.cache for a configuration, which may hold a dict."""
    results = {}

    @functools.wraps(function)
    def cached(config, *arguments):
        key = json.dumps(config.to_dict(), sort_keys=True), *arguments
        if key not in results:
            results[key] = function(config, *arguments)
        return results[key]

    return cached


@once_per_config
def count_parameters(config: ModelArchitectureConfig) -> dict[str, int]:
    """'total' and 'non_embedding' of a model that is not allocated."""
    with torch.device('meta'):
        model = ConfigurableGPT(config)
    return {'total': model.get_num_params(),
            'non_embedding': model.get_num_params(non_embedding=True)}


def memory_plan(config: ModelArchitectureConfig, setting: Setting) -> dict:
    """Bytes on one device at the fullest moment of a step, by their use.

    'weights', 'gradients', 'optimizer'; 'activations' are what the blocks
    keep, 'loss' the head's buffers, 'buffers' copies of weights in the compute
    dtype and what one block's backward pass works with. The context of a GPU
    and what its allocator cannot use come on top.
    """
    s, c = setting, config
    P = count_parameters(c)['total']
    share = s.world_size if s.strategy == 'fsdp' else 1
    parts = {
        'weights': 4 * P // share,
        'optimizer': 8 * P // (1 if s.strategy == 'ddp' else s.world_size)}
    # FSDP keeps whole gradients until the last micro-step sums them
    gradients = 4 * P // (share if s.accumulation == 1 else 1)
    # they are there throughout, but where a step makes them anew
    kept = s.accumulation > 1 or (s.world_size > 1 and s.strategy != 'fsdp')

    size = 2 if s.dtype == 'bfloat16' else 4
    N = s.batch_size * c.block_size
    sequence, copies = block_memory(c, s.dtype, s.compile,
                                    s.activation_memory_budget)
    block = block_parameters(c)
    # gradients of the feed-forward layer's inside, and of the block's weights
    inside = (3 if c.ffn_type == 'swiglu' else 2) * c.d_ff + 2 * c.n_embd
    working = N * inside * size + block * (6 if size == 2 else 4)
    if s.activation_checkpointing == 'full':
        kept_activations = c.n_layer * N * c.n_embd * size
        working += s.batch_size * sequence - N * c.n_embd * size + copies
        copies = 0
    else:
        kept_activations = c.n_layer * s.batch_size * sequence
        copies *= c.n_layer
    # the final norm's input and output, and the tokens as int64
    kept_activations += 2 * N * c.n_embd * size + 3 * 8 * N
    if s.strategy == 'fsdp' and s.world_size > 1:
        # what is gathered has the compute dtype already: all of it, or two
        # blocks and what lies outside of them
        gathered = c.n_layer if not s.fsdp_reshard_after_forward else 2
        copies = size * (P - (c.n_layer - gathered) * block)

    head = c.vocab_size * c.n_embd
    computing = loss_buffers(c, s, N, size)
    # a tied head's gradient waits for the embedding's
    waiting = 4 * head if kept or c.weight_tying else 0
    moments = [  # (gradients, activations, loss, buffers)
        (gradients * kept, kept_activations, computing, copies),
        (gradients * kept, kept_activations, waiting + N * c.n_embd * size,
         copies + working),
        (gradients, 0, waiting * c.weight_tying,
         4 * head if kept else 0)]
    names = ('gradients', 'activations', 'loss', 'buffers')
    return parts | dict(zip(names, max(moments, key=sum), strict=True))


def loss_buffers(c, s: Setting, N: int, size: int) -> int:
    """Bytes of the chunked loss: see linear_cross_entropy."""
    rows = min(N, LOSS_CHUNK_ROWS.get(s.device_type, 2048))
    head = c.vocab_size * c.n_embd
    logits = rows * c.vocab_size * size
    if not s.compile:  # in fp32, and what logsumexp makes of it
        logits += rows * c.vocab_size * (4 if size == 4 else 8)
    gradients = 4 * head + N * c.n_embd * size
    if size == 4:
        return logits + gradients
    # the head in bf16, and a chunk's share of its gradient, which a GPU adds
    # up where it computes it
    return logits + gradients + 2 * head * (
        1 if s.device_type == 'cuda' else 2)


@once_per_config
def block_parameters(config) -> int:
    with torch.device('meta'):
        block = BLOCKS[config.norm_position](config)
    return sum(p.numel() for p in block.parameters())


# --- what a block keeps for its backward pass --------------------------------


class _Block(nn.Module):
    """A block and its positions, with attention as a GPU has it."""

    def __init__(self, config):
        super().__init__()
        self.block = BLOCKS[config.norm_position](config)
        self.rope = build_rope(config)
        if config.attention_backend != 'eager':
            self.block.attn.attend = _attention

    def forward(self, x):
        return self.block(x, self.rope)


def _attention(q, k, v, dropout, mask=None):
    """SDPA without what sdpa_attention does for bf16 on a CPU."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True,
        enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


@once_per_config
def block_memory(config: ModelArchitectureConfig, dtype: str,
                 compiled: bool, budget: float = 1.0) -> tuple[int, int]:
    """(bytes per sequence, bytes per block) that a block keeps from its
    forward to its backward pass, its input among them: activations, and
    copies of weights in the compute dtype."""
    count = _kept_by_compiler if compiled else _kept_by_autograd
    with FakeTensorMode():
        block = _Block(config)
        x = torch.randn(1, config.block_size, config.n_embd,
                        dtype=getattr(torch, dtype), requires_grad=True)
        return count(block, x, budget)


def _autocast(x):
    return torch.autocast('cpu', torch.bfloat16,
                          enabled=x.dtype == torch.bfloat16)


def _kept_by_autograd(block, x, _budget):
    """What the saved-tensor hooks see; twice, to tell what grows with the
    batch from what does not."""
    own = {t.untyped_storage()._cdata
           for t in (*block.parameters(), *block.buffers())}

    def kept(x):
        seen = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                # kept alive: an address may not come again
                seen[storage._cdata] = (storage.nbytes(), tensor)
            return tensor

        with (_autocast(x), torch.autograd.graph.saved_tensors_hooks(
                pack, lambda tensor: tensor)):
            block(x)
        return sum(nbytes for nbytes, _ in seen.values())

    one = kept(x)
    two = kept(torch.cat((x, x)).detach().requires_grad_())
    return two - one, 2 * one - two


def _kept_by_compiler(block, x, budget):
    """What the partitioner of torch.compile hands from its forward graph to
    its backward graph."""
    from functorch.compile import aot_function, make_boxed_func
    from torch._functorch import config as functorch_config
    from torch._functorch.partitioners import (
        min_cut_rematerialization_partition,
    )
    from torch._inductor.decomposition import select_decomp_table
    state = dict(block.named_parameters()) | dict(block.named_buffers())
    graphs = []

    def compute(x, *tensors):
        named = dict(zip(state, tensors, strict=True))
        with _autocast(x):
            return torch.func.functional_call(block, named, (x,))

    def forward_graph(graph, _):
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    with (functorch_config.patch(activation_memory_budget=budget),
          warnings.catch_warnings()):
        warnings.simplefilter('ignore')  # of the compiler's own modules
        aot_function(
            compute, forward_graph,
            bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table())(x, *state.values())
    graph = graphs[0]
    first = next(iter(graph.nodes))  # x
    of_x = {first}
    own = {node.meta['val'].untyped_storage()._cdata
           for node in graph.nodes if node.op == 'placeholder'}
    activations, copies = {}, {}
    for node in graph.nodes:
        if of_x & set(node.all_input_nodes):
            of_x.add(node)
    for node in graph.output_node().args[0][1:]:
        value = node.meta.get('val')
        if not isinstance(value, torch.Tensor):
            continue
        storage = value.untyped_storage()
        if node in of_x:
            activations[storage._cdata] = storage.nbytes()
        elif storage._cdata not in own:  # no weight itself, nor a view of it
            copies[storage._cdata] = storage.nbytes()
    return sum(activations.values()), sum(copies.values())
