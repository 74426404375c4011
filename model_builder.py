"""A decoder-only transformer built from a ModelArchitectureConfig.

    python -c "from model_builder import ConfigurableGPT; \
        from model_config import get_preset_config; \
        model = ConfigurableGPT(get_preset_config('gpt2')); \
        print(f'{model.get_num_params():,}')"
"""

import functools
import math

import torch
import torch.nn as nn
from torch._functorch import config as functorch_config
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model_components import (
    FEED_FORWARDS,
    CausalSelfAttention,
    build_norm,
    build_rope,
    linear_cross_entropy,
    softmax_chunk,
)
from model_config import ModelArchitectureConfig
from model_generation import generate


class PreNormBlock(nn.Module):
    """x + attn(norm(x)), then x + ffn(norm(x)): GPT-2 and all since."""

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.attn_norm = build_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ffn_norm = build_norm(config, config.n_embd)
        self.ffn = FEED_FORWARDS[config.ffn_type](config)

    def forward(self, x, rope=None, cache=None):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.attn_norm(x), rope, cache)
        return x + self.ffn(self.ffn_norm(x))


class PostNormBlock(PreNormBlock):
    """norm(x + attn(x)), then norm(x + ffn(x)): the first transformer.

    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762.
    """

    def forward(self, x, rope=None, cache=None):
        """x (B, T, C) -> (B, T, C)."""
        x = self.attn_norm(x + self.attn(x, rope, cache))
        return self.ffn_norm(x + self.ffn(x))


BLOCKS = {'pre': PreNormBlock, 'post': PostNormBlock}


class ConfigurableGPT(nn.Module):
    """The model of `config`; weights are drawn anew from torch's generator."""

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None
        if config.position_encoding == 'learned_absolute':
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.rope = build_rope(config)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(
            BLOCKS[config.norm_position](config) for _ in range(config.n_layer))
        # a post-norm block already ends in a norm
        self.ln_f = nn.Identity() if config.norm_position == 'post' else (
            build_norm(config, config.n_embd))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.weight_tying:
            self.lm_head.weight = self.wte.weight  # Press and Wolf 2017
        self.softmax_chunk = softmax_chunk
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal 0.02; projections into the residual stream are scaled by
        1/sqrt(2 n_layer), since 2 n_layer of them add up (GPT-2, section 2.3);
        biases 0, norms 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if module is self.lm_head and self.config.weight_tying:
                    continue  # drawn once, as wte
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.h:
            for linear in (block.attn.proj, block.ffn.down):
                linear.weight.mul_(1 / math.sqrt(2 * self.config.n_layer))

    def get_num_params(self, non_embedding: bool = False) -> int:
        """Parameters, a tied head counted once.

        With `non_embedding`, without the token and position embeddings and
        the head: what the blocks and norms hold.
        """
        n = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n -= self.wte.weight.numel()
            if self.wpe is not None:
                n -= self.wpe.weight.numel()
            if not self.config.weight_tying:
                n -= self.lm_head.weight.numel()
        return n

    def forward(self, idx, targets=None, return_logits=True,
                reduction='mean'):
        """Next-token logits and, with targets, the cross-entropy.

        idx (B, T) int64, targets (B, T) int64 with -1 where nothing is to be
        predicted. Returns (logits (B, T, V), loss or None); with
        `return_logits=False` (None, loss), and the logits are never held
        whole. The loss is fp32, in nats: the mean over targets, or their sum
        with `reduction='sum'`.
        """
        if reduction not in ('mean', 'sum'):
            raise ValueError(f'reduction={reduction!r} is not mean or sum')
        x = self.hidden_states(idx)                           # (B, T, C)
        logits = self.lm_head(x) if return_logits else None   # (B, T, V)
        if targets is None:
            return logits, None
        if return_logits:
            loss = F.cross_entropy(logits.float().flatten(0, 1),
                                   targets.flatten(), ignore_index=-1,
                                   reduction=reduction)
        else:
            loss = linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight,
                                        targets.flatten(), self.softmax_chunk)
            if reduction == 'mean':
                loss = loss / (targets >= 0).sum()
        return logits, loss

    def hidden_states(self, idx, cache=None):
        """idx (B, T) int64 -> (B, T, C), what the head is applied to.

        `cache` is a KVCache of the tokens before idx; it takes up those of
        idx.
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(
                f'a sequence of {T} tokens exceeds block_size='
                f'{self.config.block_size}: shorten it, or build the model '
                'with a larger block_size')
        rope, layers = self.rope, [None] * len(self.h)
        positions = slice(T)
        if cache is not None:
            cache.advance(T)
            positions, layers = cache.positions, cache.layers
            rope = None if rope is None else rope.at(positions)
        x = self.wte(idx)                                     # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe.weight[positions]
        if torch.is_autocast_enabled(x.device.type):
            # an embedding is no matmul, so autocast leaves it in fp32, and
            # the whole residual stream with it
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.drop(x)
        for block, layer in zip(self.h, layers, strict=True):
            x = block(x, rope, layer)
        return self.ln_f(x)

    def checkpoint_blocks(self):
        """Keep no activations within a block; the backward pass computes
        them again (Chen et al. 2016, https://arxiv.org/abs/1604.06174)."""
        for block in self.h:
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False)

    def compile_parts(self, activation_memory_budget: float = 1.0):
        """torch.compile each block and the softmax of the loss.

        All blocks share one graph, so that compilation takes as long for 28
        layers as for one. A graph of the whole model would hand out the
        gradients of all weights together at its end: 4 bytes a parameter
        more in memory while earlier micro-steps' gradients wait. A budget
        below 1 makes the backward pass compute the cheaper activations again
        (PyTorch's partitioner, https://pytorch.org/blog/
        activation-checkpointing-techniques/).
        """
        # read when a graph is compiled, which is at its first call
        functorch_config.activation_memory_budget = activation_memory_budget
        compiled = functools.partial(torch.compile, fullgraph=True,
                                     dynamic=False)
        # of forward alone: the hooks of DDP and FSDP stay outside
        for part in (*self.h, self.ln_f):
            part.forward = compiled(part.forward)
        self.softmax_chunk = compiled(softmax_chunk)

    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None,
                 top_p=None, n_ids=None, eos_id=None, generator=None,
                 use_cache=True, on_token=None):
        """Prompts, continued token by token.

        `prompts` is (B, T) int64, or B lists of ids, which may differ in
        length. The result is of the same kind, prompts included; in a tensor
        rows that ended early are filled up with `eos_id` (0 without one).

        `temperature` 0 takes the likeliest token. `top_k` keeps the k
        likeliest, `top_p` the fewest that together have that probability.
        `n_ids` is the tokenizer's size: rows from there on are padding of the
        embedding and are never drawn. A row ends when it draws `eos_id`, or
        when `on_token(row, id)`, called with each token, returns True.
        `generator` is one torch.Generator or a list of one a row.

        Contexts beyond block_size lose their beginning: of a prompt the
        newest block_size tokens are read, and a row that outgrows block_size
        goes on from its newest three quarters. With `use_cache=False` every
        token is computed from its whole context; the tokens are the same.
        Raises ValueError for an empty prompt and for ids or options out of
        range.
        """
        return generate(self, prompts, max_new_tokens, temperature, top_k,
                        top_p, n_ids, eos_id, generator, use_cache, on_token)
