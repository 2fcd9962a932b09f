"""
Where a program computes, and in what: the device, the dtype of matrix products, memory, torch.compile. Used by train.py and
bench.py.

    device = choose_device('auto')                      # 'cuda', 'mps' or 'cpu'
    dtype, why = choose_dtype('auto', device)           # torch.bfloat16, 'measured: a product in bfloat16 is 3.4x as fast here'

But: no choice among several GPUs; torchrun makes that one.
"""

import ctypes
import sys
import time

import torch

from options import fail


def keep_memory():
    """
    Asks glibc to keep the memory it is given back. By default it returns large blocks to the system at once, and every step
    pays for each page again: up to a quarter of the time of a CWIC step on a CPU. Elsewhere than on Linux this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2 ** 31 - 1)


def choose_device(name):
    """'auto', 'cuda', 'mps' or 'cpu' -> the device to use. Ends the program where it is not there."""
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        return next(device for device in there if there[device])
    if not there.get(name):
        fail(f'--device {name}: not available here; choose from ' + ', '.join(device for device in there if there[device]))
    return name


def product_seconds(dtype):
    """Seconds of a matrix product of the default model's size on this CPU: the best of eight."""
    a, b = torch.ones(1024, 320, dtype=dtype), torch.ones(320, 1280, dtype=dtype)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def choose_dtype(name, device):
    """The dtype of matrix products, and why."""
    if name in ('float32', 'bfloat16'):
        return getattr(torch, name), 'as asked'
    if name != 'auto':
        fail(f'--dtype {name}: choose auto, float32 or bfloat16')
    if device == 'cuda':
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, 'the usual choice on a GPU'
        return torch.float32, 'this GPU has no bfloat16'
    if device == 'mps':
        return torch.float32, 'the safe choice on an Apple GPU'
    ratio = product_seconds(torch.float32) / product_seconds(torch.bfloat16)
    return (torch.bfloat16 if ratio > 1.3 else torch.float32), f'measured: a product in bfloat16 is {ratio:.1f}x as fast here'


def check_compile(device):
    """Ends the program where torch.compile cannot work, before anything is trained."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:      # what is missing shows in a dozen ways: no compiler, one too old, no Triton, no Python headers
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        fail(f'--compile: does not work here ({line.strip()[:200]}); it needs a C++ compiler, or on a GPU Triton; leave it out, or turn it off: --compile no', 1)
