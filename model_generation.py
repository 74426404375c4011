"""Generation: the cache of keys and values, drawing a token, the loop.

Shapes as in model_components.py; S is the number of columns in the cache.

    python -c "import torch; from model_builder import ConfigurableGPT; \
        from model_config import get_preset_config; \
        model = ConfigurableGPT(get_preset_config('gpt2', n_layer=2)); \
        print(model.generate([[1, 2], [3]], 5, temperature=0))"
"""

import torch
import torch.nn as nn

from model_config import ModelArchitectureConfig

# --- the cache -------------------------------------------------------------


class KVCache:
    """The keys and values of every layer for the tokens seen so far.

    A batch of contexts of different lengths is padded on the left, so that
    the newest token of every row stands in the same column; a padded column
    is seen by no token but itself. One buffer a layer, (B, K, length, D) for
    keys and as much for values: K is the number of key/value heads, so that
    grouped queries take H / K times less than H heads would.
    """

    def __init__(self, config: ModelArchitectureConfig, length: int,
                 padding: list[int], device):
        self.length = length                  # columns that it can hold
        self.end = 0                          # columns that it holds
        self.padding = None                   # (B, 1) int64
        if any(padding):
            self.padding = torch.tensor(padding, device=device)[:, None]
        self.device = device
        self.layers = [LayerCache(self) for _ in range(config.n_layer)]
        self.positions = self.mask = None     # of the columns added last

    def advance(self, T: int):
        """Make room for T columns, which each layer then fills.

        `positions` are theirs, (T,) or (B, T) int64 from 0; `mask` is
        (B, 1, T, S) bool, True where a query may see a key, or None where it
        is causal. Raises ValueError if they are too many.
        """
        if self.end + T > self.length:
            raise ValueError(f'{self.end} + {T} tokens exceed a cache of '
                             f'{self.length}')
        columns = torch.arange(self.end, self.end + T, device=self.device)
        self.end += T
        self.positions = columns
        if self.padding is not None:
            self.positions = (columns - self.padding).clamp(min=0)
            keys = torch.arange(self.end, device=self.device)
            seen = (keys <= columns[:, None]) & (
                keys >= self.padding[:, :, None])             # (B, T, S)
            # a softmax over nothing would be NaN and spread
            self.mask = (seen | (keys == columns[:, None]))[:, None]

    def n_bytes(self) -> int:
        return sum(t.nbytes for layer in self.layers
                   for t in (layer.keys, layer.values) if t is not None)


class LayerCache:
    """What one attention layer has of a KVCache."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.keys = self.values = None        # (B, K, length, D)

    @property
    def mask(self):
        return self.cache.mask

    def append(self, k, v):
        """k and v (B, T, K, D) of the newest columns -> of all columns."""
        T, end = k.shape[1], self.cache.end
        if self.keys is None:  # now that the dtype is known
            B, _, K, D = k.shape
            shape = B, K, self.cache.length, D
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        self.keys[:, :, end - T:end] = k.transpose(1, 2)
        self.values[:, :, end - T:end] = v.transpose(1, 2)
        return (self.keys[:, :, :end].transpose(1, 2),
                self.values[:, :, :end].transpose(1, 2))


# --- the next token --------------------------------------------------------


def draw(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One token per row: logits (B, V) fp32 -> (B, 1) int64.

    `generator` is one for all rows, or a list of one for each.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.shape[-1]))
        logits = torch.full_like(logits, float('-inf')).scatter_(
            1, kept.indices, kept.values)
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        ordered, order = probs.sort(dim=-1, descending=True)
        # a token goes when those before it already have top_p
        before = ordered.cumsum(dim=-1) - ordered
        before[:, 0] = -1.0  # the likeliest stays
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(1, order, ordered)
    if isinstance(generator, (list, tuple)):
        return torch.cat([torch.multinomial(row[None], 1, generator=g)
                          for row, g in zip(probs, generator, strict=True)])
    return torch.multinomial(probs, 1, generator=generator)


# --- the loop --------------------------------------------------------------


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=None,
             top_p=None, n_ids=None, eos_id=None, generator=None,
             use_cache=True, on_token=None):
    """See ConfigurableGPT.generate."""
    rows = prompts.tolist() if torch.is_tensor(prompts) else [
        list(prompt) for prompt in prompts]
    config, device = model.config, model.wte.weight.device
    check(rows, config, max_new_tokens, temperature, top_k, top_p, generator)
    contexts = Contexts(rows, config.block_size)
    length = min(config.block_size,
                 max(len(row) for row in rows) + max_new_tokens)
    done, cache, token = [False] * len(rows), None, None
    for _ in range(max_new_tokens):
        if contexts.slide() or not use_cache:
            cache = None  # every position in it has changed
        if cache is not None:
            x = model.hidden_states(token, cache)
        elif use_cache:
            idx, padding = contexts.padded(device)
            cache = KVCache(config, length, padding, device)
            x = model.hidden_states(idx, cache)
        else:
            x = torch.cat([model.hidden_states(idx)[:, -1:]
                           for idx in contexts.alone(device)])
        logits = model.lm_head(x[:, -1]).float()[:, :n_ids]   # (B, V)
        token = draw(logits, temperature, top_k, top_p, generator)
        for number, new in enumerate(token[:, 0].tolist()):
            rows[number].append(new)
            if not done[number]:
                contexts.ends[number] = len(rows[number])
                wanted = on_token is not None and on_token(number, new)
                done[number] = bool(wanted) or new == eos_id
        if all(done):
            break
    if torch.is_tensor(prompts):
        filler = 0 if eos_id is None else eos_id
        for row, end in zip(rows, contexts.ends, strict=True):
            row[end:] = [filler] * (len(row) - end)
        return torch.tensor(rows, device=device)
    return [row[:end] for row, end in zip(rows, contexts.ends, strict=True)]


class Contexts:
    """Which part of each row the next token is drawn from.

    A prompt keeps its newest block_size tokens. A row that outgrows
    block_size loses its oldest quarter of a block at once, since all that
    remains must then be computed again: its positions are new.
    """

    def __init__(self, rows, block_size):
        self.rows, self.block_size = rows, block_size
        self.starts = [max(0, len(row) - block_size) for row in rows]
        self.ends = [len(row) for row in rows]  # without what came after eos

    def slide(self) -> bool:
        """Cut the rows that are too long; whether there were any."""
        long = [number for number, row in enumerate(self.rows)
                if len(row) - self.starts[number] > self.block_size]
        for number in long:
            self.starts[number] += max(1, self.block_size // 4)
        return bool(long)

    def _rows(self):
        return [row[start:] for row, start in zip(self.rows, self.starts,
                                                  strict=True)]

    def padded(self, device):
        """(B, T) int64, padded on the left, and the padding of each row."""
        rows = self._rows()
        T = max(map(len, rows))
        padding = [T - len(row) for row in rows]
        idx = [[0] * n + row for n, row in zip(padding, rows, strict=True)]
        return torch.tensor(idx, device=device), padding

    def alone(self, device):
        """The rows one by one, (1, T) int64 each."""
        return [torch.tensor([row], device=device) for row in self._rows()]


def check(rows, config, max_new_tokens, temperature, top_k, top_p, generator):
    """Raise ValueError that names all that is wrong with a request."""
    problems = []
    if not rows:
        problems.append('there is no prompt: give at least one')
    for number, row in enumerate(rows):
        if not row:
            problems.append(f'prompt {number} is empty: give at least one id, '
                            'e.g. the end-of-text id, which begins a document')
        wrong = [i for i in row if not 0 <= i < config.vocab_size]
        if wrong:
            problems.append(f'prompt {number} has the id {wrong[0]}, and the '
                            f'model has ids from 0 to {config.vocab_size - 1}')
    if max_new_tokens < 0:
        problems.append(f'max_new_tokens={max_new_tokens} must be 0 or more')
    if not 0 <= temperature < float('inf'):
        problems.append(f'temperature={temperature} must be 0 or more')
    if top_k is not None and top_k < 1:
        problems.append(f'top_k={top_k} must be 1 or more, or None')
    if top_p is not None and not 0 <= top_p <= 1:
        problems.append(f'top_p={top_p} must be from 0 to 1, or None')
    if isinstance(generator, (list, tuple)) and len(generator) != len(rows):
        problems.append(f'{len(generator)} generators for {len(rows)} prompts')
    if problems:
        raise ValueError('; '.join(problems))


# --- weights of 16 bits ----------------------------------------------------


class HalfLinear(nn.Module):
    """x @ W.T + b in fp32 from weights that are held as fp16, by FBGEMM.

    For CPUs without a bf16 kernel: a token is drawn as fast as its weights
    are read, and PyTorch's own bf16 product is bound by arithmetic there
    (RESULTS.md, "Generation"). Weights are rounded to bf16; fp16 holds such a
    number exactly from 6e-5 to 65504, and smaller ones to 3e-8.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().bfloat16().float()
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def forward(self, x):
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)


def packs_for(device) -> bool:
    """Whether HalfLinear runs there, and is faster than a bf16 product."""
    return (device.type == 'cpu'
            and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
            and 'fbgemm' in torch.backends.quantized.supported_engines)


@torch.no_grad()
def hold_in_bf16(model):
    """Keep the weights of all products and embeddings as bf16, for generation.

    In place: the model cannot be trained or saved afterwards. Norms are fp32.
    Where HalfLinear runs, a tied head is held apart from the embedding.
    """
    packs = packs_for(model.wte.weight.device)
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.Embedding):
                part.to(torch.bfloat16)
            elif not isinstance(part, nn.Linear):
                if not list(part.children()):
                    part.float()
            elif packs and part.weight.abs().max() < 65504:
                setattr(parent, name, HalfLinear(part))
            else:
                part.to(torch.bfloat16)
    return model
