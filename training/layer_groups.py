"""Which group of layers a parameter belongs to, by its name in the model."""

BY_BLOCK = 6  # deeper models are told apart by thirds
THIRDS = ('early', 'middle', 'late')


def layer_part(name: str) -> str:
    """embedding, positions, attention, ffn, norms or head.

    The norms of q and k count as norms. A tied head is the embedding.
    """
    first = name.split('.')[0]
    if first in ('wte', 'wpe', 'lm_head'):
        return {'wte': 'embedding', 'wpe': 'positions',
                'lm_head': 'head'}[first]
    if 'norm' in name or first == 'ln_f':
        return 'norms'
    return 'attention' if '.attn.' in name else 'ffn'


def layer_group(name: str, n_layer: int) -> str:
    """The part, and for blocks which: `attention.0`, or `attention.early`."""
    part = layer_part(name)
    if name.startswith('ln_f'):
        return f'{part}.final'
    if not name.startswith('h.'):
        return part
    block = int(name.split('.')[1])
    if n_layer <= BY_BLOCK:
        return f'{part}.{block}'
    return f'{part}.{THIRDS[block * 3 // n_layer]}'
