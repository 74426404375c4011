"""FLOPs of a model, and the peaks of devices: what MFU is made of."""

from model_config import ModelArchitectureConfig

# Dense peak TFLOP/s: (name as torch reports it, bf16, fp32, source). The
# first name found in the device's name counts, so longer names come first.
# fp32 is without TF32, which this project does not switch on.
PEAK_TFLOPS = (
    ('B300', 2250, 75, 'https://www.nvidia.com/en-us/data-center/dgx-b300/'),
    ('B200', 2250, 75, 'https://www.nvidia.com/en-us/data-center/dgx-b200/'),
    ('H200 NVL', 835, 60, 'https://www.nvidia.com/en-us/data-center/h200/'),
    ('H200', 989.4, 67, 'https://www.nvidia.com/en-us/data-center/h200/'),
    ('H100 PCIe', 756, 51, 'https://www.nvidia.com/en-us/data-center/h100/'),
    ('H100 NVL', 835, 60, 'https://www.nvidia.com/en-us/data-center/h100/'),
    ('H100', 989.4, 67, 'https://www.nvidia.com/en-us/data-center/h100/'),
    ('A100', 312, 19.5, 'https://www.nvidia.com/en-us/data-center/a100/'),
    ('RTX A6000', 154.8, 38.7,
     'https://www.nvidia.com/en-us/design-visualization/rtx-a6000/'),
    ('L40S', 362, 91.6, 'https://www.nvidia.com/en-us/data-center/l40s/'),
    ('L4', 121, 30.3, 'https://www.nvidia.com/en-us/data-center/l4/'),
    ('RTX 4090', 165.2, 82.6,
     'https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/'),
    ('RTX 3090', 71, 35.6,
     'https://www.nvidia.com/en-us/geforce/graphics-cards/30-series/'),
)

# words that make a name another chip's, or a part of one
OTHER_CHIPS = {'Laptop', 'Max', 'D', 'Ti', 'SUPER', 'MIG'}


def peak_tflops_of(device_name: str, dtype: str) -> float | None:
    """Dense peak of a device in TFLOP/s, None where it is not known.

    `dtype` is 'bfloat16' or 'float32'. An unknown device gets no guess: a
    wrong peak makes a wrong MFU, and nobody notices.
    """
    words = device_name.replace('-', ' ').split()
    if OTHER_CHIPS & set(words):
        return None
    for name, bf16, fp32, _source in PEAK_TFLOPS:
        wanted = name.split()
        # whole words: 'L4' is not 'L40S', 'A100' is not 'A1000'
        if all(word in words for word in wanted):
            return bf16 if dtype == 'bfloat16' else fp32
    return None


def matmul_weights(config: ModelArchitectureConfig) -> int:
    """Weights that each token is multiplied with: the blocks' matrices and
    the head, tied or not; the input embedding is a lookup and costs none."""
    c = config
    heads = c.n_head + 2 * c.num_key_value_heads
    attention = c.n_embd * c.head_dim * (heads + c.n_head)
    ffn = (3 if c.ffn_type == 'swiglu' else 2) * c.n_embd * c.d_ff
    return c.n_layer * (attention + ffn) + c.vocab_size * c.n_embd


def flops_per_token(config: ModelArchitectureConfig,
                    sequence_length: int | None = None) -> tuple[int, int]:
    """(full, causal) FLOPs per token of forward and backward.

    6 per weight (2 forward, 4 backward) and 12 L H D T for the two attention
    products, as in PaLM, appendix B (https://arxiv.org/abs/2204.02311); the
    causal figure halves the latter, since half of the scores are masked.
    """
    T = sequence_length or config.block_size
    weights = 6 * matmul_weights(config)
    attention = 12 * config.n_layer * config.n_head * config.head_dim * T
    return weights + attention, weights + attention // 2
