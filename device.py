"""
Where a program computes, and in what: the device, the dtype of matrix products, memory, torch.compile, and
several processes that share the work of a step. Used by train.py, bench.py and others.

    device = choose_device('auto')                      # 'cuda', 'mps' or 'cpu'
    dtype, why = choose_dtype('auto', device)           # torch.bfloat16, 'measured: ... 3.4x as fast here'
    device, rank, world_size = join_processes(device)        # as torchrun started them

Not here: a choice among several GPUs, which torchrun makes.
"""

import ctypes
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from options import fail, printable

if torch.__version__ < '2.13':
    # for torch.compile: where older ones sum over tokens and over inputs in one kernel, the gradient of a
    # single stripe's thresholds, (1, in), comes out as (in)
    os.environ.setdefault('TORCHINDUCTOR_MIX_ORDER_REDUCTION', '0')


def tune_malloc():
    """
    Asks glibc to keep the memory it is given back. By default it returns large blocks to the system at once,
    and every step pays for each page again: up to a quarter of the time of a CWIC step on a CPU. Elsewhere
    than on Linux this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2 ** 31 - 1)


def choose_device(name):
    """'auto', 'cuda', 'mps' or 'cpu' -> the device to use. Ends the program where it is missing."""
    found = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    available = [device for device in found if found[device]]
    if name != 'auto' and name not in available:
        fail(f'--device {name}: not available here; choose from {", ".join(available)}')
    return available[0] if name == 'auto' else name


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
    """'auto', 'float32' or 'bfloat16' -> the dtype of matrix products, and why."""
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
    dtype = torch.bfloat16 if ratio > 1.3 else torch.float32
    return dtype, f'measured: a product in bfloat16 is {ratio:.2g}x as fast here'


def why_no_compile(device):
    """Why torch.compile cannot work here, in a line; '' where it can."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:      # a missing compiler, Triton or header shows in many ways
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return line.strip()[:200]
    return ''


def check_compile(device):
    """Ends the program where torch.compile cannot work, before anything is trained."""
    why = why_no_compile(device)
    if why:
        fail(f'--compile: does not work here ({why}); it needs a C++ compiler, or on a GPU Triton; leave it '
             'out, or turn it off: --compile no', 1)


def compilations():
    """How many parts of torch.compile's work are done, those of a first backward or a first call included."""
    return sum(map(len, torch._dynamo.utils.compilation_time_metrics.values()))


class CudaGraphs:
    """Runs functions on a stream of their own, and records them there: nothing of the default one can be."""

    def __init__(self):
        self.stream = torch.cuda.Stream()

    def run(self, function, arguments):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = function(*arguments)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def record(self, function, arguments):
        """-> what the function returns at each replay; what replays it. Raises RuntimeError."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()):    # which a failed recording does not restore
            # thread_local: NCCL has a thread that asks the GPU things meanwhile
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode='thread_local'):
                results = function(*arguments)
        return results, graph.replay


class CudaGraph:
    """
    function(*arguments), recorded after some calls and from then on replayed (a CUDA graph): a GPU is done
    with a thousand small kernels sooner than Python has asked for them one by one. Nothing can be compiled
    while recording, so a call in which nothing was has to come first. What cannot be recorded is called.

    A replay reads and writes the memory it was recorded with. So of the arguments only what tensors hold may
    differ from call to call (else it is recorded anew), the function must do the same whatever they hold, and
    what it returns, and the gradients it leaves, stand until the next call.
    """
    WARM_UP = 3         # calls, at least, in which torch.compile compiles, and memory is taken

    def __init__(self, function, graphs=None):
        self.function, self.graphs = function, graphs or CudaGraphs()
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
        results = self.graphs.run(self.function, arguments)
        self.calls += 1
        self.settled = self.calls >= self.WARM_UP and compilations() == before
        return results

    def record(self, arguments):
        copies = [x.clone() if torch.is_tensor(x) else x for x in arguments]
        try:
            self.results, self.replay = self.graphs.record(self.function, copies)
            self.tensors = [x for x in copies if torch.is_tensor(x)]
        except RuntimeError as error:       # what CUDA does not allow while it records; too little memory
            self.recordable = False
            line = str(error).splitlines()[0]
            print(printable(f'{self.function.__name__} is not recorded, so slower: {line}'), file=sys.stderr)


# -----------------------------------------------------------------------------
# several processes, each with its share of every step


PATIENCE = 15       # seconds for a sum on GPUs, once all have begun it; torchrun kills what is left after 30


class ProcessGone(Exception):
    """Another process of this run has ended or is out of reach; the message, one line, is torch's reason."""


def reach(others, *args, **more):
    """others(*args, **more), a call that all processes make at once. Raises ProcessGone."""
    try:
        return others(*args, **more)
    except RuntimeError as error:       # of many texts: connection closed by peer, timed out, ...
        raise ProcessGone(str(error).split('\n')[0].split('] ', 1)[-1].split('. ')[0]) from None


TORCHRUN = 'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'    # in a process's environment


def join_processes(device):
    """
    (device, rank, world_size): one process alone, or what torchrun says of this one among many. Raises
    ProcessGone. Ends the program if torchrun cannot have said it: a cluster's jobs leave a part of it behind.
    """
    said = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
    try:
        rank, world_size = int(said.get('RANK', 0)), int(said.get('WORLD_SIZE', 1))
        local, _ = int(said.get('LOCAL_RANK', 0)), int(said.get('MASTER_PORT', 0))
        right = 0 <= rank < world_size and (world_size == 1 or len(said) == len(TORCHRUN))
    except ValueError:
        right = False
    if not right:
        values = ' '.join(f'{name}={value}' for name, value in said.items())
        fail(f'{values}, in the environment, is not what torchrun would say: unset {" ".join(said)}, or '
             'start this with torchrun')
    if world_size > 1:
        backend = 'gloo'
        if device == 'cuda':
            if local >= torch.cuda.device_count():
                fail(f'process {local + 1} of this host has no GPU, there being {torch.cuda.device_count()}; '
                     'start fewer: --nproc_per_node')
            device, backend = f'cuda:{local}', 'cpu:gloo,cuda:nccl'
            torch.cuda.set_device(device)
        reach(dist.init_process_group, backend, timeout=timedelta(hours=1))
    return device, rank, world_size


def together(collective, *args):
    """collective(*args) with all processes; nothing where there is one. Raises ProcessGone."""
    if dist.is_initialized():
        reach(collective, *args)


def meet():
    """Waits until all processes are here, through the CPU. Raises ProcessGone as soon as one has ended."""
    together(dist.all_reduce, torch.zeros(1))


def all_reduce(tensors):
    """
    Sums tensors over all processes, in place, as one message for each dtype.

    On GPUs that is NCCL's work, which waits for ever for a process of the same host that has ended: it sees
    no more than network errors (NVIDIA/nccl issue 279). So it begins only when all are here, with nothing
    left to compute before it, and then takes milliseconds, or is given up. Raises ProcessGone.
    """
    if dist.is_initialized() and tensors[0].is_cuda:
        torch.cuda.synchronize()
        meet()
    for dtype in dict.fromkeys(t.dtype for t in tensors) if dist.is_initialized() else ():
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        message, start = reach(dist.all_reduce, flat, async_op=True), time.monotonic()
        while flat.is_cuda and not message.is_completed():
            if time.monotonic() > start + PATIENCE:
                raise ProcessGone(f'no sum within {PATIENCE} seconds')
            time.sleep(1e-4)
        reach(message.wait)
        torch._foreach_copy_(same, [total.view_as(t) for t, total
                                    in zip(same, flat.split([t.numel() for t in same]))])


def local_main_first(action):
    """action(), by the first process of each host before the others: they find what it downloads."""
    first = os.environ.get('LOCAL_RANK', '0') == '0'
    if not first:
        meet()
    result = action()
    if first:
        meet()
    return result


def leave(code):
    """
    Ends this program. One process of several goes at once, without torch's clearing up: NCCL's waits for
    processes that have ended (NVIDIA/nccl issue 863), and warns of itself.
    """
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)
