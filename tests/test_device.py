"""device.py: when a CudaGraph records. On a CPU, with a stand-in."""

import pytest
import torch

import device


class CudaGraph(device.CudaGraph):
    """On a CPU: notes what was called, recorded and replayed."""

    def __init__(self, function, fails=False):
        super().__init__(function)
        self.fails, self.done = fails, []

    def run(self, arguments):
        self.done.append('run')
        return self.function(*arguments)

    def capture(self, arguments):
        self.done.append('record')
        if self.fails:
            raise RuntimeError('CUDA error: operation not permitted when stream is capturing\nand more')
        results = self.function(*arguments)
        return results, lambda: (self.done.append('replay'), results.copy_(self.function(*arguments)))


@pytest.mark.parametrize('compiling_in, recorded_in', [([1], 4), ([1, 3], 5), ([1, 2, 3, 4, 6], 6), ([3, 4, 5], 7)])
def test_recording_waits_until_nothing_compiles(compiling_in, recorded_in, monkeypatch):
    """
    The fourth call was recorded whatever the third had done: a step of Llama's size, in which something was still
    compiled, ended in a traceback. Call 6 of the third case would compile, but it is recorded: nothing did in call 5.
    """
    times, calls = {'what was timed': []}, []
    monkeypatch.setattr(torch._dynamo.utils, 'compilation_time_metrics', times)

    def twice(x):
        calls.append(x)
        if len(calls) in compiling_in:
            times['what was timed'].append(0.5)
        return 2 * x

    recorded = CudaGraph(twice)
    for call in range(1, 10):
        assert float(recorded(torch.tensor(float(call)))) == 2 * call
    assert recorded.done == ['run'] * (recorded_in - 1) + ['record'] + ['replay'] * (10 - recorded_in)


def test_compilations_count_forward_and_backward():
    """A forward, the backward that is compiled when it first runs, and both again for another dtype; but no call after."""
    function, counts = torch.compile(lambda x: (x.sin() * 2).sum(), backend='aot_eager'), []
    for dtype in (torch.float32, torch.float32, torch.float64, torch.float64):
        before = device.compilations()
        loss = function(torch.ones(3, dtype=dtype, requires_grad=True))
        between = device.compilations()
        loss.backward()
        counts.append((between > before, device.compilations() > between))
    assert counts == [(True, True), (False, False)] * 2


def test_a_function_that_cannot_be_recorded_is_called(capsys):
    """And that is said once, in a line: it is slower, but it is no reason to end."""
    recorded = CudaGraph(torch.neg, fails=True)
    assert [float(recorded(torch.tensor(float(i)))) for i in range(8)] == [-i for i in range(8)]
    assert recorded.done == ['run'] * 3 + ['record'] + ['run'] * 5
    error = capsys.readouterr().err
    assert error == 'neg is not recorded, so slower: CUDA error: operation not permitted when stream is capturing\n'
