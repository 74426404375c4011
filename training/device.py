"""The device: choosing it, its clock, its memory, and what it can do."""

import os
import re
import resource
import shutil
import sys
from pathlib import Path

import torch

DTYPES = {'bfloat16': torch.bfloat16, 'float32': torch.float32}


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """'auto' -> CUDA, else MPS, else CPU; a device that is absent is a
    ValueError. On CUDA, each process of a node takes the GPU of its number."""
    available = ['cpu']
    if torch.backends.mps.is_available():
        available.insert(0, 'mps')
    if torch.cuda.is_available():
        available.insert(0, 'cuda')
    if name == 'auto':
        name = available[0]
    if name == 'cuda':
        name = f'cuda:{local_rank}'
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in available:
        raise ValueError(f'device={name}: this machine has '
                         f'{", ".join(available)}')
    if device.type == 'cuda' and (device.index or 0) >= (
            torch.cuda.device_count()):
        raise ValueError(f'device={name}: this machine has '
                         f'{torch.cuda.device_count()} CUDA device(s)')
    return device


def computing_dtype(device: torch.device, dtype: str) -> tuple[str, str]:
    """(dtype, reason) of the arithmetic that really runs for a request.

    PyTorch computes bf16 without a fast kernel on CPUs below AVX-512, up to
    48 times as slowly as fp32 (RESULTS.md, "bf16 on a CPU").
    """
    if (dtype == 'bfloat16' and device.type == 'cpu'
            and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return 'float32', 'this CPU has no fast bfloat16'
    return dtype, 'as configured'


def device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type} ({torch.get_num_threads()} threads)'


def autocast(device: torch.device, dtype: str):
    """bf16 for the matmuls; fp32 master weights stay as they are."""
    return torch.autocast(device.type, dtype=torch.bfloat16,
                          enabled=dtype == 'bfloat16')


def synchronize(device: torch.device):
    """Wait until the device has done what it was given: a true clock."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


class HostCopy:
    """A number on its way from the device; `item` waits for this number, not
    for what the device was given after it."""

    def __init__(self, tensor: torch.Tensor):
        self._event = None
        self._value = tensor
        if tensor.device.type == 'cuda':
            self._value = torch.empty_like(tensor, device='cpu',
                                           pin_memory=True)
            self._value.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def item(self):
        if self._event is not None:
            self._event.synchronize()
        return self._value.item()


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far, in GB of 1e9 bytes: allocated on a GPU, resident
    on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == 'linux':  # its ru_maxrss is the launcher's, if larger
        return resident('VmHWM') / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes, but bytes on a Mac
    return peak / 1e9 if sys.platform == 'darwin' else peak * 1024 / 1e9


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak) of this process, on Linux."""
    text = Path('/proc/self/status').read_text()
    return int(re.search(field + r':\s+(\d+) kB', text)[1]) * 1024


def forget_peak(device: torch.device):
    """The peak is counted from now on: VmHWM, or PyTorch's on a GPU."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == 'linux':
        Path('/proc/self/clear_refs').write_text('5')


def check_compiler(device: torch.device):
    """Raise ValueError where torch.compile has no compiler to work with."""
    if device.type == 'cuda':
        from torch.utils._triton import has_triton
        if not has_triton():
            raise ValueError('compile=True needs Triton on a GPU, which is '
                             'not installed: pip install triton, or pass '
                             '--compile=False')
        return
    names = [os.environ['CXX']] if 'CXX' in os.environ else [
        'g++', 'clang++', 'c++']
    if not any(shutil.which(name) for name in names):
        raise ValueError(
            'compile=True needs a C++ compiler, and none of '
            f'{", ".join(names)} is on the PATH: install one (Debian and '
            'Ubuntu: sudo apt install g++), or pass --compile=False')
