"""FLOPs of a model, and the peaks of devices: what MFU is made of."""

import dataclasses

from model_config import ModelArchitectureConfig


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a GPU can do: dense TFLOP/s, fp32 without TF32 (which this project
    does not switch on), and memory in GB of 1e9 bytes, as PyTorch reports it
    where that is known, otherwise as the datasheet has it."""

    name: str            # words of the name that PyTorch reports
    bf16: float | None   # None: it has no bf16
    fp32: float
    memory_gb: float
    source: str

    @property
    def key(self) -> str:
        """The name on a command line: 'RTX A6000' is a6000."""
        return self.name.lower().removeprefix('rtx ').replace(' ', '-')


# the first whose words all stand in a device's name counts, so longer names
# come first
_NVIDIA = 'https://www.nvidia.com/en-us/'
GPUS = (
    Gpu('GB300', 2500, 80, 279, _NVIDIA + 'data-center/gb300-nvl72/'),
    Gpu('GB200', 2500, 80, 186, _NVIDIA + 'data-center/gb200-nvl72/'),
    Gpu('B300', 2250, 75, 262, _NVIDIA + 'data-center/dgx-b300/'),
    Gpu('B200', 2250, 75, 180, _NVIDIA + 'data-center/dgx-b200/'),
    Gpu('B100', 1750, 60, 180, _NVIDIA + 'data-center/hgx/'),
    Gpu('H200 NVL', 835, 60, 141, _NVIDIA + 'data-center/h200/'),
    Gpu('H200', 989.4, 67, 141, _NVIDIA + 'data-center/h200/'),
    Gpu('H100 PCIe', 756, 51, 84.9, _NVIDIA + 'data-center/h100/'),
    Gpu('H100 NVL', 835, 60, 94, _NVIDIA + 'data-center/h100/'),
    Gpu('H100', 989.4, 67, 84.9, _NVIDIA + 'data-center/h100/'),
    # NVIDIA publishes no page for it
    Gpu('H20', 148, 44, 96, 'https://willitrunai.com/es/gpus/h20-96gb'),
    Gpu('A100 40GB', 312, 19.5, 42.3, _NVIDIA + 'data-center/a100/'),
    Gpu('A100', 312, 19.5, 85.0, _NVIDIA + 'data-center/a100/'),
    Gpu('RTX A6000', 154.8, 38.7, 51.0,
        _NVIDIA + 'design-visualization/rtx-a6000/'),
    Gpu('RTX A5000', 111.1, 27.8, 25.4,
        _NVIDIA + 'design-visualization/rtx-a5000/'),
    Gpu('L40S', 362, 91.6, 47.7, _NVIDIA + 'data-center/l40s/'),
    Gpu('L4', 121, 30.3, 23.6, _NVIDIA + 'data-center/l4/'),
    Gpu('RTX 5090', 209.5, 104.8, 33.6,
        _NVIDIA + 'geforce/graphics-cards/50-series/rtx-5090/'),
    Gpu('RTX 4090', 165.2, 82.6, 25.4,
        _NVIDIA + 'geforce/graphics-cards/40-series/'),
    Gpu('RTX 3090', 71, 35.6, 25.4,
        _NVIDIA + 'geforce/graphics-cards/30-series/'),
    Gpu('V100 SXM2', None, 15.7, 16.9, _NVIDIA + 'data-center/v100/'),
    Gpu('T4', None, 8.1, 15.6, _NVIDIA + 'data-center/tesla-t4/'),
    Gpu('MI300X', 1307.4, 163.4, 192,
        'https://www.amd.com/en/products/accelerators/instinct/mi300/'
        'mi300x.html'),
)

# words that make a name another chip's, or a part of one
OTHER_CHIPS = {'Laptop', 'Max', 'D', 'Ti', 'SUPER', 'MIG'}


def gpu_of(device_name: str) -> Gpu | None:
    """The GPU that goes by a name; an unknown one gets no guess: a wrong peak
    makes a wrong MFU, and nobody notices."""
    words = device_name.replace('-', ' ').split()
    if OTHER_CHIPS & set(words):
        return None
    for gpu in GPUS:
        # whole words: 'L4' is not 'L40S', 'A100' is not 'A1000'
        if all(word in words for word in gpu.name.split()):
            return gpu
    return None


def peak_tflops_of(device_name: str, dtype: str) -> float | None:
    """Dense peak of a device in TFLOP/s, None where it is not known.

    `dtype` is 'bfloat16' or 'float32'.
    """
    gpu = gpu_of(device_name)
    if gpu is None:
        return None
    return gpu.bf16 if dtype == 'bfloat16' else gpu.fp32


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
