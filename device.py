"""
Where a program computes, and in what: the device, the dtype of matrix products, torch.compile, CUDA graphs,
and several processes that share the work of a step. train.py and lab/ use it.

    device = choose_device('auto')                      # 'cuda', 'mps' or 'cpu'
    dtype, why = choose_dtype('auto', device)           # torch.bfloat16, 'measured: ... 3.4x as fast here'
    device, rank, world_size = join_processes(device)   # as torchrun started them

Not here: a choice among several GPUs, and a watch over processes. torchrun does both.
"""

import ctypes
import os
import sys
import timeit
from datetime import timedelta

import torch
import torch.distributed as dist

from files import one_line
from options import fail, printable

if torch.__version__ < '2.13':
    # Only for GPU machines that come with an older torch of their own: with torch.compile it can return the
    # gradient of a single stripe's thresholds, (1, in), in the shape (in).
    os.environ.setdefault('TORCHINDUCTOR_MIX_ORDER_REDUCTION', '0')


def tune_malloc():
    """
    Asks glibc to keep freed memory. By default it returns large blocks to the system, and every step pays for
    each page again: up to a quarter of the time of a CWIC step on a CPU. Only Linux needs this.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2 ** 31 - 1)


# -----------------------------------------------------------------------------
# device, dtype, torch.compile


def choose_device(name):
    """'auto', 'cuda', 'mps' or 'cpu' -> the device to use. Ends the program if there is none of that name."""
    found = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    available = [device for device in found if found[device]]
    if name != 'auto' and name not in available:
        fail(f'--device {name}: not available here; choose from {", ".join(available)}')
    return available[0] if name == 'auto' else name


def product_seconds(dtype):
    """Seconds of a matrix product of the default model's size on this CPU: the best of eight."""
    a, b = torch.ones(1024, 320, dtype=dtype), torch.ones(320, 1280, dtype=dtype)
    return min(timeit.repeat(lambda: a @ b, number=1, repeat=8))


def choose_dtype(name, device):
    """'auto', 'float32' or 'bfloat16' -> the dtype of matrix products, and why."""
    if name in ('float32', 'bfloat16'):
        return getattr(torch, name), 'as asked'
    if name != 'auto':
        fail(f'--dtype {name}: choose auto, float32 or bfloat16')
    if device == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, 'the usual choice on a GPU'
    if device != 'cpu':
        return torch.float32, 'the safe choice on this GPU'
    ratio = product_seconds(torch.float32) / product_seconds(torch.bfloat16)
    dtype = torch.bfloat16 if ratio > 1.3 else torch.float32
    return dtype, f'measured: a product in bfloat16 is {ratio:.2g}x as fast here'


def check_compile(device):
    """Ends the program if torch.compile does not work, before anything is trained."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:      # a missing compiler, Triton or header raises one of many kinds
        fail(f'--compile: does not work here ({one_line(error)}); it needs a C++ compiler, or on a GPU '
             'Triton; leave it out, or turn it off: --no-compile', 1)


# -----------------------------------------------------------------------------
# CUDA graph replay


def compilations():
    """How many pieces torch.compile has compiled so far; a backward pass counts when it first runs."""
    return sum(map(len, torch._dynamo.utils.compilation_time_metrics.values()))


class CudaGraph:
    """
    function(*arguments), recorded as a CUDA graph after some calls and replayed from then on: a GPU finishes
    a thousand small kernels sooner than Python can launch them one by one. Compiling cannot be recorded, so a
    call in which nothing was compiled must come first. A function that cannot be recorded is called as it is.

    A replay reads and writes the memory of the recording. So only the contents of the tensors among the
    arguments may change between calls (any other change starts a new recording), the function must do the
    same whatever they are, and its results, and the gradients it leaves, are overwritten by the next call.
    """
    WARM_UP = 3         # calls before the recording, at least: torch.compile compiles, memory is allocated

    def __init__(self, function):
        self.function, self.stream = function, None
        self.kind, self.recordable = None, True

    def __call__(self, *arguments):
        tensors = [x for x in arguments if torch.is_tensor(x)]
        kind = [(x.shape, x.dtype) if torch.is_tensor(x) else x for x in arguments]
        if kind != self.kind:
            self.kind, self.calls, self.settled, self.replay = kind, 0, False, None
        if self.recordable and self.settled and not self.replay:
            self.record(arguments)
        if self.replay:
            for copy, tensor in zip(self.tensors, tensors):
                copy.copy_(tensor)
            self.replay()
            return self.results
        before = compilations()
        results = self.run(arguments)
        self.calls += 1
        self.settled = self.calls >= self.WARM_UP and compilations() == before
        return results

    def record(self, arguments):
        """Sets self.replay and what it needs; if CUDA refuses, says so in a line, once."""
        copies = [x.clone() if torch.is_tensor(x) else x for x in arguments]
        try:
            self.results, self.replay = self.capture(copies)
            self.tensors = [x for x in copies if torch.is_tensor(x)]
        except RuntimeError as error:       # an operation that cannot be recorded, or too little memory
            self.recordable = False
            line = str(error).splitlines()[0]
            print(printable(f'{self.function.__name__} is not recorded, so slower: {line}'), file=sys.stderr)

    def run(self, arguments):
        """Calls the function on a stream of its own: the default stream cannot be recorded."""
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.function(*arguments)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def capture(self, arguments):
        """Records the function -> the tensors that each replay fills; a function that replays."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()):    # restored if the recording fails
            # thread_local: NCCL's watchdog thread queries the GPU during capture
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode='thread_local'):
                results = self.function(*arguments)
        return results, graph.replay


# -----------------------------------------------------------------------------
# several processes, each with its share of every step


def join_processes(device):
    """The (device, rank, world_size) of this process, as torchrun has set them; without it, rank 0 of 1."""
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world_size > 1:
        local_rank, backend = int(os.environ['LOCAL_RANK']), 'gloo'
        if device == 'cuda':
            if local_rank >= torch.cuda.device_count():
                fail(f'process {local_rank + 1} of this host has no GPU, as there are '
                     f'{torch.cuda.device_count()}; start fewer: --nproc_per_node')
            device, backend = f'cuda:{local_rank}', 'cpu:gloo,cuda:nccl'
            torch.cuda.set_device(device)
        # an hour, as the others wait while the first process downloads or evaluates
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    return device, rank, world_size


def collective(function, *args):
    """
    function(*args), called by all processes at once; nothing if there is only one. Ends the program if
    another process has ended: that one has said why.
    """
    if dist.is_initialized():
        try:
            function(*args)
        except RuntimeError as error:
            fail(f'another process has ended; see what it said ({str(error).splitlines()[0]})', 1)


def barrier():
    """Waits until all processes are here."""
    collective(dist.all_reduce, torch.zeros(1))


def all_reduce(tensors):
    """Sums tensors over all processes, in place, as one flat message for each dtype."""
    for dtype in dict.fromkeys(t.dtype for t in tensors) if dist.is_initialized() else ():
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        collective(dist.all_reduce, flat)
        sums = flat.split([t.numel() for t in same])
        torch._foreach_copy_(same, [total.view_as(t) for t, total in zip(same, sums)])


def exit_process(code):
    """
    Ends the program; one process of several at once, without clean-up: NCCL's may wait for a process that has
    ended (NVIDIA/nccl issue 863).
    """
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)
