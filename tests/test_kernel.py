"""sparse_kernel.c against PyTorch in eval mode, against sums written out in numpy, and against the sanitizers."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import build_kernel
from cwic import StripedLinear
from decoder import Packed

SOURCE = build_kernel.SOURCE

try:
    build_kernel.load()
except build_kernel.KernelUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope='module', params=['native', 'plain'])
def kernel(request):
    """The kernel as it is built here, and without its intrinsics and threads."""
    return build_kernel.load(('-DPLAIN',) if request.param == 'plain' else ())


def random_linear(n_in, n_out, stripe, bias, share, seed=0):
    """A layer with statistics, and thresholds that leave about this share of its inputs active."""
    torch.manual_seed(seed)
    linear = StripedLinear(n_in, n_out, stripe, bias).eval()
    linear.mu.normal_()
    linear.sigma.uniform_(0.5, 2)
    with torch.no_grad():
        if bias:
            linear.bias.normal_()
        t = {0: 1e9, 1: 0}.get(share, torch.rand(linear.theta.shape) * 1.4)
        linear.theta.copy_(t / linear.scale * torch.ones_like(linear.theta))
    return linear


def matvec(kernel, linear, x, dtype='f32', threads=2):
    """-> y (out), active weights, through the kernel; x (in,)."""
    lib, ffi = kernel.lib, kernel.ffi
    packed = Packed(ffi, linear, dtype)
    team = ffi.gc(lib.team_new(threads, linear.n_in, packed.room), lib.team_free)
    x, y, active = x.numpy().copy(), np.full(linear.n_out, 7, np.float32), np.zeros(1, np.int64)
    number = {'f32': lib.F32, 'bf16': lib.BF16, 'int8': lib.INT8}[dtype]
    assert lib.matvec(team, ffi.new('Linear *', packed.struct), number, ffi.from_buffer('float[]', x),
                      ffi.from_buffer('float[]', y), ffi.from_buffer('int64_t[]', active)) == 0
    return y, int(active[0])


@pytest.mark.parametrize('n_in, n_out, stripe', [(4, 4, 2), (1, 1, 1), (7, 1, 1), (1, 1000, 1000), (17, 23, 5), (64, 96, 96), (1000, 7, 7),
                                                 (193, 37, 37), (130, 130, 1), (96, 4100, 4100), (300, 500, 192)])
def test_equals_pytorch(kernel, n_in, n_out, stripe):
    """
    Over bias x share active x dtype: as many active weights as PyTorch counts, and the same outputs: in f32 to 1e-4 of the
    largest, in bf16 and int8 to what rounding every weight may do. A bias must not be added twice: base holds it, once.
    Prints the largest difference.
    """
    for bias, share, dtype in itertools.product((True, False), (0, 0.5, 1), ('f32', 'bf16', 'int8')):
        linear = random_linear(n_in, n_out, stripe, bias, share)
        x = torch.randn(n_in) * 2
        with torch.no_grad():
            want, count, _ = linear(x.view(1, 1, -1))
        y, active = matvec(kernel, linear, x, dtype)
        assert active == int(count)
        error = np.abs(y - want.view(-1).numpy())
        print(f'{n_in}x{n_out}/{stripe} bias {bias} share {share} {dtype}: {error.max():.1e}')
        c, weight = (x - linear.mu).abs().numpy(), linear.weight.detach().abs().numpy()
        rounding = {'f32': 0, 'bf16': c @ weight / 2 ** 8, 'int8': np.full(n_out, c @ weight.max(1) / 254)}[dtype]
        assert (error <= 1e-4 * max(float(want.abs().max()), 1e-2) + rounding).all()


def test_active_set_is_the_one_written_out(kernel):
    """
    The set, not only its size: weights are made so that each output tells which inputs it used. Inputs that equal their
    threshold to the bit are not active (strict >), in f32, on the same c = x - mu as PyTorch's.
    """
    linear = random_linear(24, 6, 2, False, 0.5)
    with torch.no_grad():
        linear.weight.copy_((2.0 ** torch.arange(24))[:, None].expand(24, 6))
        linear.mu.zero_()
        linear.sigma.fill_(1)
        linear.theta.copy_(torch.randint(0, 3, (3, 24)) / linear.scale)
    t = linear.thresholds().detach().numpy()                    # near 0, 1, 2
    c = np.where(np.arange(24) % 2, t[0], np.float32(1.5)).astype(np.float32)
    y, _ = matvec(kernel, linear, torch.from_numpy(c))
    for stripe in range(3):
        used = np.abs(c) > t[stripe]
        assert not used[1::2].any() or stripe > 0
        want = (np.where(used, c, 0).astype(np.float64) * 2.0 ** np.arange(24)).sum()
        assert y[2 * stripe] == pytest.approx(want, rel=1e-6)


def test_worked_example(kernel):
    """4 inputs, 2 stripes, by hand: 8 of 16 weights are active, and no input is dropped by both stripes."""
    linear = random_linear(4, 4, 2, False, 0.5)
    with torch.no_grad():
        linear.mu.zero_()
        linear.sigma.fill_(1)
        linear.theta.copy_(torch.tensor([[.5, .5, .5, .5], [1, .1, .4, 2]]) / linear.scale)
        linear.weight.copy_(torch.arange(16.).view(4, 4))
    y, active = matvec(kernel, linear, torch.tensor([.9, -.2, .5, -1.0]))
    assert active == 8
    # columns 0, 1 from rows 0, 3; columns 2, 3 from rows 1, 2
    assert y == pytest.approx([.9 * 0 - 12, .9 * 1 - 13, -.2 * 6 + .5 * 10, -.2 * 7 + .5 * 11], rel=1e-5)


def test_skipped_weights_are_not_read(kernel):
    """What counts as skipped must not be read: work that was counted as saved, but done, was a bug elsewhere. NaN would tell."""
    linear = random_linear(40, 90, 30, True, 1)
    with torch.no_grad():
        linear.theta[1, 3:20] = 1e9
    packed = Packed(kernel.ffi, linear, 'f32')
    packed.arrays[0].reshape(3, 40, 30)[1, 3:20] = np.nan
    team = kernel.ffi.gc(kernel.lib.team_new(1, 40, packed.room), kernel.lib.team_free)
    x, y, active = np.ones(40, np.float32), np.zeros(90, np.float32), np.zeros(1, np.int64)
    assert kernel.lib.matvec(team, kernel.ffi.new('Linear *', packed.struct), kernel.lib.F32, kernel.ffi.from_buffer('float[]', x),
                             kernel.ffi.from_buffer('float[]', y), kernel.ffi.from_buffer('int64_t[]', active)) == 0
    assert np.isfinite(y).all() and active[0] == 90 * 40 - 17 * 30


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', ['f32', 'bf16', 'int8'])
def test_not_finite_spreads(kernel, bad, dtype):
    """A NaN or an infinity in the input reaches every output of a stripe that does not skip it, as in PyTorch; a NaN, all."""
    linear = random_linear(33, 50, 20, True, 1)
    x = torch.randn(33)
    x[5] = bad
    y, active = matvec(kernel, linear, x, dtype)
    assert not np.isfinite(y).any()
    with torch.no_grad():
        linear.theta.fill_(1e9)
    y, active = matvec(kernel, linear, x, dtype)
    assert np.isnan(y).all() if np.isnan(bad) else not np.isfinite(y).any()


def test_same_bits_however_many_threads(kernel):
    """Parts of a tile are added up in one order, whoever computed them: 1, 2 and 3 threads give the same bits."""
    linear = random_linear(700, 300, 300, True, 0.5)
    x = torch.randn(700)
    runs = [matvec(kernel, linear, x, threads=threads) for threads in (1, 2, 3) for _ in range(5)]
    assert all(np.array_equal(y, runs[0][0]) and active == runs[0][1] for y, active in runs)


def test_impossible_sizes_are_refused(kernel):
    """Every entry point looks at what it is given: sizes that would reach outside a buffer give -1, and nothing is read."""
    linear = random_linear(64, 32, 16, True, 1)
    packed = Packed(kernel.ffi, linear, 'f32')
    team = kernel.ffi.gc(kernel.lib.team_new(1, 64, packed.room), kernel.lib.team_free)
    null = kernel.ffi.NULL
    for wrong in (dict(n_in=0), dict(n_in=65), dict(n_out=0), dict(stripe=0), dict(stripe=33), dict(tile=0), dict(tile=17), dict(parts=0),
                  dict(parts=65), dict(stripe=32, tile=32, parts=64)):
        assert kernel.lib.matvec(team, kernel.ffi.new('Linear *', {**packed.struct, **wrong}), 0, null, null, null) == -1, wrong
    good = kernel.ffi.new('Linear *', packed.struct)
    assert kernel.lib.matvec(team, good, 3, null, null, null) == -1
    assert kernel.lib.matvec(team, good, kernel.lib.INT8, null, null, null) == -1         # no scales
    assert kernel.lib.team_new(0, 1, 1) == null and kernel.lib.team_new(1, 0, 1) == null


DRIVER = r'''
#include "sparse_kernel.c"
#include <stdio.h>

static size_t below(size_t n) { return (size_t)rand() % n; }
static float uniform(void) { return (float)rand() / (float)RAND_MAX * 2 - 1; }
static float *floats(size_t n) { float *p = malloc(n * sizeof *p); for (size_t i = 0; i < n; i++) p[i] = uniform(); return p; }

int main(void)
{
    static const size_t widths[] = {1, 7, 1000, 2, 16, 63, 64, 65, 129, 300};
    for (int trial = 0; trial < 150; trial++) {
        srand((unsigned)trial);
        Linear l = {0};
        l.n_in = widths[below(10)]; l.n_out = widths[below(10)];
        switch (below(3)) { case 0: l.stripe = 1; break; case 1: l.stripe = l.n_out; break; default: l.stripe = 1 + below(l.n_out); }
        l.tile = 1 + below(l.stripe); l.parts = 1 + below(l.n_in < 9 ? l.n_in : 9);
        int dtype = (int)below(3), kind = (int)below(4), threads = 1 + (int)below(3);
        size_t n = (l.n_out + l.stripe - 1) / l.stripe, tiles = n * ((l.stripe + l.tile - 1) / l.tile), weights = l.n_in * l.n_out;
        float *w = floats(weights), *scale = floats(n * l.n_in), *t = floats(n * l.n_in), *mu = floats(l.n_in), *base = floats(l.n_out);
        float *x = floats(l.n_in), *y = malloc(l.n_out * sizeof *y);
        for (size_t i = 0; i < n * l.n_in; i++) t[i] = kind == 0 ? 1e9f : kind == 1 ? -1 : fabsf(t[i]);
        if (kind == 3) x[below(l.n_in)] = below(2) ? NAN : INFINITY;
        void *packed = malloc(weights * (dtype == F32 ? 4 : dtype == BF16 ? 2 : 1));     // exactly as large as it may be read
        for (size_t i = 0; i < weights; i++) {
            if (dtype == F32) ((float *)packed)[i] = w[i];
            if (dtype == BF16) { uint32_t u; memcpy(&u, &w[i], 4); ((uint16_t *)packed)[i] = (uint16_t)(u >> 16); }
            if (dtype == INT8) ((int8_t *)packed)[i] = (int8_t)(w[i] * 127);
        }
        l.weight = packed; l.scale = scale; l.thresholds = t; l.mu = mu; l.base = base;
        int64_t active = 0, want_active = 0;
        Team *team = team_new(threads, l.n_in, tiles * l.parts * l.tile);
        if (!team || matvec(team, &l, dtype, x, y, &active)) return printf("trial %d refused\n", trial), 1;
        for (size_t j = 0; j < l.n_out; j++) {
            size_t s = j / l.stripe, start = s * l.stripe + j % l.stripe / l.tile * l.tile;
            size_t end = s + 1 < n ? (s + 1) * l.stripe : l.n_out, width = end - start < l.tile ? end - start : l.tile;
            double sum = base[j];
            for (size_t i = 0; i < l.n_in; i++) {
                float c = x[i] - mu[i];
                if (fabsf(c) <= t[s * l.n_in + i]) continue;
                size_t at = start * l.n_in + i * width + (j - start);
                double weight = dtype == F32 ? ((float *)packed)[at] : dtype == BF16 ? widen_bf16(((uint16_t *)packed)[at])
                              : ((int8_t *)packed)[at] * (double)scale[s * l.n_in + i];
                sum += (double)c * weight;
                want_active++;
            }
            if (isfinite(sum) ? !(fabs(sum - y[j]) < 1e-2 * (dtype == INT8 ? 127 : 1)) : isfinite(y[j])) return printf("trial %d column %zu: %g %g\n", trial, j, sum, y[j]), 1;
        }
        if (active != want_active) return printf("trial %d active\n", trial), 1;
        team_free(team);
        free(w); free(scale); free(t); free(mu); free(base); free(x); free(y); free(packed);
    }
    // a whole model, as small as can be, a step at each position and some that must be refused
    enum { D = 6, V = 11, T = 5 };
    float *w = floats(4 * D * D * 4), *z = calloc(4 * D * 4, 4), *wte = floats(D * V), *wpe = floats(T * D), *k = floats(D * T), *v = floats(D * T);
    Norm norm = {wpe, NULL};
    Linear in = {D, 3 * D, D, D, 2, w, NULL, z, z, z}, out = {D, D, 4, 2, 1, w, NULL, z, z, z}, up = {D, 4 * D, 7, 7, 1, w, NULL, z, z, z};
    Linear down = {4 * D, D, D, D, 3, w, NULL, z, z, z}, head = {D, V, 3, 3, 1, wte, NULL, z, z, z};
    Linear linears[5] = {in, out, up, down, head};
    for (int i = 0; i < 5; i++) linears[i].thresholds = calloc(linears[i].n_in * linears[i].n_out, 4);
    Block block = {norm, norm, linears[0], linears[1], linears[2], linears[3]};
    Model model = {F32, V, T, 1, 2, D, wte, wpe, &block, norm, linears[4]};
    State state = {k, v, floats(D), floats(D), floats(3 * D), floats(4 * D)};
    float *logits = floats(V);
    int64_t active[5];
    Team *team = team_new(2, 4 * D, 256);
    for (size_t position = 0; position < T; position++) {
        if (decode_token(team, &model, &state, position, position, logits, active)) return printf("refused\n"), 1;
        for (int i = 0; i < V; i++) if (!isfinite(logits[i])) return printf("logits\n"), 1;
    }
    if (decode_token(team, &model, &state, V, 0, logits, active) == 0 || decode_token(team, &model, &state, 0, T, logits, active) == 0) return printf("not refused\n"), 1;
    team_free(team);
    for (int i = 0; i < 5; i++) free((void *)linears[i].thresholds);
    free(w); free(z); free(wte); free(wpe); free(k); free(v); free(state.x); free(state.mixed); free(state.qkv); free(state.hidden); free(logits);
    printf("fine\n");
    return 0;
}
'''


@pytest.mark.parametrize('sanitizer, plain', [('address,undefined', False), ('address,undefined', True), ('thread', False)])
def test_sanitizers_on_random_shapes(tmp_path, sanitizer, plain):
    """Random shapes, all, some and no inputs active, NaN and infinity: the right sums, and nothing read out of bounds or raced for."""
    (tmp_path / 'driver.c').write_text(DRIVER, encoding='utf-8')
    command = [*build_kernel.compiler(), '-std=gnu11', '-O1', '-g', '-march=native', '-fopenmp-simd', f'-fsanitize={sanitizer}',
               '-fno-sanitize-recover=all', f'-I{SOURCE.parent}', 'driver.c', '-o', 'driver', '-pthread', '-lm']
    built = subprocess.run(command + (['-DPLAIN'] if plain else []), cwd=tmp_path, capture_output=True, text=True)
    if built.returncode and ('asan' in built.stderr or 'tsan' in built.stderr or 'ubsan' in built.stderr):
        pytest.skip(f'this compiler has no {sanitizer} sanitizer: {built.stderr[:200]}')
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(tmp_path / 'driver')], capture_output=True, text=True)
    if 'unexpected memory mapping' in done.stderr:
        pytest.skip('the thread sanitizer does not run on this system')
    assert done.returncode == 0 and done.stdout == 'fine\n', done.stdout + done.stderr


@pytest.mark.parametrize('command', [['aarch64-linux-gnu-gcc'], ['clang', '-march=native'], ['gcc', '-march=x86-64']])
def test_compiles_elsewhere(tmp_path, command):
    """Portable C11: no warning from another compiler, nor for another processor."""
    if not shutil.which(command[0]):
        pytest.skip(f'{command[0]} is not installed')
    done = subprocess.run([*command, '-std=c11', '-O2', '-Wall', '-Wextra', '-Werror', '-Wno-unknown-pragmas', '-c', str(SOURCE),
                           '-o', str(tmp_path / 'kernel.o')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
