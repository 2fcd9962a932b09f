"""sparse_kernel.c against PyTorch in eval mode, against sums written out in numpy, and against the sanitizers."""

import itertools
import platform
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import build_kernel
from cwic import Neurons, StripedLinear
from decoder import FORMATS, PackedMatrix

SOURCE = build_kernel.SOURCE


# flags for a build that any processor of this kind can run, without intrinsics
PORTABLE = ['-march=x86-64'] if platform.machine() == 'x86_64' else ['-march=armv8-a']


@pytest.fixture(scope='module', params=['native', 'portable'])
def kernel(request):
    """The kernel as it is built here, and one for any processor of this kind."""
    return build_kernel.load(PORTABLE if request.param == 'portable' else ())


def with_thresholds(layer, share):
    """The layer in eval mode, with thresholds that leave about this share of its inputs active."""
    with torch.no_grad():
        layer.sigma.uniform_(0.5, 2)
        t = {0: 1e9, 1: 0}.get(share, torch.rand(layer.theta.shape) * 1.4)
        layer.theta.copy_(t / layer.scale * torch.ones_like(layer.theta))
    return layer.eval()


def random_linear(n_in, n_out, stripe, bias, share):
    torch.manual_seed(0)
    layer = StripedLinear(n_in, n_out, stripe, bias)
    layer.mu.normal_()
    if bias:
        torch.nn.init.normal_(layer.bias)
    return with_thresholds(layer, share)


def random_neurons(n_embd, n_hidden, share):
    torch.manual_seed(0)
    return with_thresholds(Neurons(n_embd, n_hidden), share)


def multiply(kernel, layer, x, dtype='f32', threads=2, h=None, packed=None, **wrong):
    """
    x (count, in) -> y (count, out), active (count) through the kernel, or None if it refuses. h (count, out): the input
    of neurons' up. wrong: sizes to give the kernel instead of the true ones.
    """
    lib, ffi, packed = kernel.lib, kernel.ffi, packed or PackedMatrix(layer, dtype)
    team = ffi.gc(lib.team_new(threads, layer.n_in, packed.sums), lib.team_free)
    x, y = x.numpy().copy(), np.full((len(x), packed.sizes['n_out']), 7, np.float32)
    active = np.zeros(len(x), np.int64)
    floats = [ffi.from_buffer('float[]', a) if a is not None else ffi.NULL for a in (x, h if h is None else h.numpy(), y)]
    refused = lib.multiply_alone(team, ffi.new('Matrix *', {**packed.struct(ffi), **wrong}), list(FORMATS).index(dtype),
                                 len(x), *floats, ffi.from_buffer('int64_t[]', active))
    return None if refused else (y, active)


@pytest.mark.parametrize('n_in, n_out, stripe', [
    (4, 4, 2), (1, 1, 1), (7, 1, 1), (1, 1000, 1000), (17, 23, 5), (64, 96, 96), (1000, 7, 7), (193, 37, 37), (130, 130, 1),
    (96, 4100, 4100), (300, 500, 192)])
def test_matrix_equals_pytorch(kernel, n_in, n_out, stripe):
    """
    With and without a bias, for each share of active inputs and each dtype, for one token and for several: equal counts,
    and outputs within 1e-4 of the largest in f32, or within what rounding of every weight can change in bf16 and int8.
    Prints the largest difference.
    """
    for bias, share, dtype in itertools.product((True, False), (0, 0.5, 1), FORMATS):
        layer = random_linear(n_in, n_out, stripe, bias, share)
        x = torch.randn(3, n_in) * 2
        with torch.no_grad():
            want, count = layer(x[None])
        c, weight = (x - layer.mu).abs(), layer.weight.detach().abs()
        columns = weight.amax(0)                                        # int8: rows are scaled after columns are
        half_a_step = (weight / columns).amax(1, keepdim=True) * columns / 254
        rounding = {'f32': 0, 'bf16': c @ weight / 2 ** 8, 'int8': c @ half_a_step}[dtype]
        bound = rounding + 1e-4 * want[0].abs().max().clamp_min(1e-2) + torch.zeros_like(want[0])
        for tokens in (1, 3):
            y, active = multiply(kernel, layer, x[:tokens], dtype)
            error = np.abs(y - want[0, :tokens].numpy())
            print(f'{n_in}x{n_out}/{stripe} bias {bias} share {share} {dtype} tokens {tokens}: {error.max():.1e}')
            assert (active == count[0, :tokens].numpy()).all()
            assert (error <= bound[:tokens].numpy()).all()


@pytest.mark.parametrize('n_embd, n_hidden', [(1, 1), (8, 3), (51, 100), (64, 129), (100, 700)])
def test_neurons_equal_pytorch(kernel, n_embd, n_hidden):
    """Llama's up and down with one mask: equal counts, and outputs within 1e-4, or what rounding can change."""
    for share, dtype in itertools.product((0, 0.5, 1), FORMATS):
        layer = random_neurons(n_embd, n_hidden, share)
        h, z = torch.randn(3, n_embd), F.silu(torch.randn(3, n_hidden) * 2)
        with torch.no_grad():
            want, count = layer(z[None], h[None])
            up, down = layer.up.abs(), layer.down.abs()
            columns = down.amax(0)
            up_step, down_step = {
                'f32': (0, 0), 'bf16': (up / 2 ** 8, down / 2 ** 8),
                'int8': (up.amax(0) / 254, (down / columns).amax(1, keepdim=True) * columns / 254)}[dtype]
            largest = z.abs() * (h.abs() @ (up + up_step))
            rounding = largest @ (down + down_step) - (z.abs() * (h.abs() @ up)) @ down
        bound = (rounding + 1e-4 * want.abs().max().clamp_min(1e-3)).numpy()
        for tokens in (1, 3):
            y, active = multiply(kernel, layer, z[:tokens], dtype, h=h[:tokens])
            assert (active == count[0, :tokens].numpy()).all()
            assert (np.abs(y - want[0, :tokens].numpy()) <= bound[:tokens]).all()


def test_active_set_equals_brute_force(kernel):
    """
    The set, not only its size: weights are powers of 2, so each output tells which inputs it used. Inputs that equal their
    threshold to the bit are not active (strict >), in f32, on the same c = x - mu as in PyTorch.
    """
    layer = random_linear(24, 6, 2, False, 0.5)
    with torch.no_grad():
        layer.weight.copy_((2.0 ** torch.arange(24))[:, None].expand(24, 6))
        layer.mu.zero_()
        layer.sigma.fill_(1)
        layer.theta.copy_(torch.randint(0, 3, (3, 24)) / layer.scale)
    t = layer.thresholds().detach().numpy()                             # near 0, 1, 2
    c = np.where(np.arange(24) % 2, t[0], np.float32(1.5)).astype(np.float32)
    y, _ = multiply(kernel, layer, torch.from_numpy(c)[None])
    for stripe in range(3):
        active = np.abs(c) > t[stripe]
        assert not active[1::2].any() or stripe > 0
        want = (np.where(active, c, 0).astype(np.float64) * 2.0 ** np.arange(24)).sum()
        assert y[0, 2 * stripe] == pytest.approx(want, rel=1e-6)


def test_worked_example(kernel):
    """The one of cwic.py, by hand: 4 inputs, 2 stripes, 8 of 16 weights are active, no input is dropped by both."""
    layer = random_linear(4, 4, 2, False, 0.5)
    with torch.no_grad():
        layer.mu.zero_()
        layer.sigma.fill_(1)
        layer.theta.copy_(torch.tensor([[.5, .5, .5, .5], [1, .1, .4, 2]]) / layer.scale)
        layer.weight.copy_(torch.arange(16.).view(4, 4))
    y, active = multiply(kernel, layer, torch.tensor([[.9, -.2, .5, -1.0]]))
    assert active == [8]
    # columns 0, 1 from rows 0, 3; columns 2, 3 from rows 1, 2
    assert y[0] == pytest.approx([.9 * 0 - 12, .9 * 1 - 13, -.2 * 6 + .5 * 10, -.2 * 7 + .5 * 11], rel=1e-5)


@pytest.mark.parametrize('tokens', [1, 3])
def test_skipped_weights_are_not_used(kernel, tokens):
    """
    A NaN in every skipped weight must not reach an output: work was once counted as saved, but done. (This does not show
    that they are not read, which is true for one token only: for a prompt, each row is read once for 64 tokens.)
    """
    layer = random_linear(40, 90, 30, True, 1)
    with torch.no_grad():
        layer.theta[1, 3:20] = 1e9
    packed = PackedMatrix(layer)
    packed.tensors['weight'].view(3, 40, 30)[1, 3:20] = torch.nan
    y, active = multiply(kernel, layer, torch.ones(tokens, 40), packed=packed)
    assert np.isfinite(y).all() and (active == 90 * 40 - 17 * 30).all()

    layer = random_neurons(20, 90, 1)
    with torch.no_grad():
        layer.theta[0, 3:50] = 1e9
    packed = PackedMatrix(layer)
    packed.tensors['weight'][3:50] = torch.nan
    y, active = multiply(kernel, layer, torch.ones(tokens, 90), h=torch.ones(tokens, 20), packed=packed)
    assert np.isfinite(y).all() and (active == 2 * 20 * (90 - 47)).all()


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', FORMATS)
def test_nan_and_infinity_spread(kernel, bad, dtype):
    """One among the inputs reaches every output, as in PyTorch, whatever the thresholds."""
    for layer, h in ((random_linear(33, 50, 20, True, 1), None), (random_neurons(50, 33, 1), torch.ones(2, 50))):
        x = torch.randn(2, 33)
        x[1, 5] = bad
        for share in (1, 0):
            with torch.no_grad():
                layer.theta.fill_(0 if share else 1e9)
            y, _ = multiply(kernel, layer, x, dtype, h=h)
            alone, _ = multiply(kernel, layer, x[1:], dtype, h=h if h is None else h[1:])
            assert np.isfinite(y[0]).all()
            assert not np.isfinite(y[1]).any() and not np.isfinite(alone).any()


def test_same_bits_for_any_number_of_threads_and_tokens(kernel):
    """Sums are taken in the same order by 1, 2 and 3 threads, for one token or 5 at once."""
    for layer, h in ((random_linear(700, 300, 300, True, 0.5), None), (random_neurons(300, 700, 0.5), torch.randn(5, 300))):
        for dtype in FORMATS:
            x = torch.randn(5, 700)
            ones = [multiply(kernel, layer, x[i:i + 1], dtype, h=h if h is None else h[i:i + 1]) for i in range(5)]
            for threads in (1, 2, 3, 2, 3):
                y, active = multiply(kernel, layer, x, dtype, threads, h)
                first, first_active = multiply(kernel, layer, x[:1], dtype, threads, h if h is None else h[:1])
                assert np.array_equal(first, ones[0][0]) and first_active == ones[0][1]
                assert np.array_equal(y, np.concatenate([one for one, _ in ones]))
                assert np.array_equal(active, np.concatenate([one for _, one in ones]))


def test_impossible_sizes_are_refused(kernel):
    """Sizes that would reach outside a buffer give -1, and nothing is read."""
    layer, x = random_linear(64, 32, 16, True, 1), torch.zeros(1, 64)
    for wrong in (dict(n_in=0), dict(n_in=65), dict(n_out=0), dict(stripe=0), dict(stripe=33), dict(tile=0), dict(tile=17),
                  dict(splits=0), dict(splits=5), dict(stripe=32, tile=32, splits=4),
                  # tiles * splits * tile is 2 ** 64, which is 0
                  dict(n_out=2 ** 62, stripe=1, tile=1, splits=4), dict(n_out=2 ** 63 + 2, stripe=2 ** 63 - 1, tile=1)):
        assert multiply(kernel, layer, x, **wrong) is None, wrong
    assert multiply(kernel, layer, x, 'int8', row_scale=kernel.ffi.NULL) is None
    assert multiply(kernel, layer, x, 'int8', column_scale=kernel.ffi.NULL) is None
    assert multiply(kernel, layer, x[:0]) is None and multiply(kernel, layer, x.expand(65, 64)) is None
    assert multiply(kernel, random_neurons(32, 64, 1), x, h=torch.zeros(1, 32), tile=16) is None
    null = kernel.ffi.NULL
    assert kernel.lib.team_new(0, 1, 1) == null and kernel.lib.team_new(1, 0, 1) == null


DRIVER = r'''
#include "sparse_kernel.c"
#include <stdio.h>

static size_t below(size_t n) { return (size_t)rand() % n; }
static float *floats(size_t n)
{
    float *p = malloc(n * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = (float)rand() / (float)RAND_MAX * 2 - 1;
    return p;
}

// weights in memory that ends where they end, so that a read beyond them is noticed
static void *pack(const float *w, size_t n, int dtype)
{
    char *packed = malloc(n * bytes(dtype));
    for (size_t i = 0; i < n; i++) {
        if (dtype == F32) ((float *)packed)[i] = w[i];
        if (dtype == BF16) { uint32_t u; memcpy(&u, &w[i], 4); ((uint16_t *)packed)[i] = (uint16_t)(u >> 16); }
        if (dtype == INT8) ((int8_t *)packed)[i] = (int8_t)(w[i] * 127);
    }
    return packed;
}

// the outputs of one token in double, and how many weights it used
static int64_t expect(const Matrix *m, int dtype, const float *x, const float *h, double *y)
{
    int64_t active = 0;
    for (size_t j = 0; j < m->n_out; j++) y[j] = m->base[j];
    for (size_t number = 0; number < count_tiles(m); number++)
        for (size_t i = 0; i < m->n_in; i++) {
            Tile tile = find_tile(m, number);
            size_t at = tile.stripe * m->n_in + i, width = tile.width * (h ? 2 : 1);
            double c = x[i] - m->mu[i], up = 0;
            if (!tile.width || fabs(c) <= m->thresholds[at]) continue;
            const char *row = (const char *)m->weight + (tile.start * m->n_in * (h ? 2 : 1) + i * width) * bytes(dtype);
            for (size_t j = 0; h && j < m->n_out; j++) up += weight(row, j, dtype) * (double)h[j];
            if (h) { c *= up; row += m->n_out * bytes(dtype); }
            if (dtype == INT8) c *= m->row_scale[at];
            for (size_t j = 0; j < tile.width; j++)
                y[tile.start + j] += c * weight(row, j, dtype) * (dtype == INT8 ? m->column_scale[tile.start + j] : 1);
            active += (int64_t)width;
        }
    return active;
}

// at any address and in any lane, every byte and every half becomes the f32 that it stands for
static int try_widening(void)
{
    uint16_t halves[65536 + LANES];
    int8_t integers[256 + LANES];
    for (size_t i = 0; i < 65536 + LANES; i++) halves[i] = (uint16_t)i;
    for (size_t i = 0; i < 256 + LANES; i++) integers[i] = (int8_t)(i % 256 < 128 ? (int)(i % 256) : (int)(i % 256) - 256);
    for (size_t i = 0; i < 65536; i++) {
        Floats wide = load((const char *)halves, i, BF16), small = load((const char *)integers, i % 256, INT8);
        for (size_t lane = 0; lane < LANES; lane++) {
            uint32_t want = (uint32_t)halves[i + lane] << 16;
            if (memcmp((char *)&wide + 4 * lane, &want, 4)) return printf("half %zu, lane %zu\n", i, lane);
            if (small[lane] != (float)integers[i % 256 + lane]) return printf("byte %zu, lane %zu\n", i, lane);
        }
    }
    return 0;
}

// one random matrix, or neurons; one token, then several
static int try_matrix(int trial)
{
    static const size_t widths[] = {1, 7, 500, 2, 16, 63, 64, 65, 129, 200};
    enum { COUNT = 3 };
    int neurons = trial % 3 == 0, dtype = (int)below(3), kind = (int)below(4);
    Matrix m = {.n_in = widths[below(10)], .n_out = widths[below(10)]};
    size_t stripes[] = {1, m.n_out, 1 + below(m.n_out)};
    m.stripe = neurons ? m.n_out : stripes[below(3)];
    m.tile = neurons ? m.n_out : 1 + below(m.stripe);
    m.splits = 1 + below(min(m.n_in, SPLITS));
    size_t n = ceil_div(m.n_out, m.stripe) * m.n_in, weights = m.n_in * m.n_out * (neurons ? 2 : 1);
    float *w = floats(weights), *scale = floats(n), *t = floats(n), *mu = floats(m.n_in), *base = floats(m.n_out), *columns = floats(m.n_out);
    float *x = floats(COUNT * m.n_in), *h = floats(COUNT * m.n_out), *y = floats(COUNT * m.n_out);
    float *changed = malloc(COUNT * m.n_in * sizeof *x);
    double *want = malloc(m.n_out * sizeof *want), bound = (dtype == INT8 ? 127 * 127 : 1) * 1e-4 * (double)m.n_in;
    for (size_t i = 0; i < n; i++) t[i] = kind == 0 ? 1e9f : kind == 1 ? -1 : fabsf(t[i]);
    for (size_t i = 0; neurons && i < m.n_in; i++) mu[i] = 0;
    if (kind == 3) x[below(COUNT * m.n_in)] = below(2) ? NAN : INFINITY;
    void *packed = pack(w, weights, dtype);
    m.weight = packed; m.thresholds = t; m.mu = mu; m.base = base;
    if (dtype == INT8) { m.row_scale = scale; m.column_scale = columns; }
    Team *team = team_new(1 + (int)below(3), m.n_in, count_tiles(&m) * m.splits * m.tile);
    for (size_t count = 1; count <= COUNT; count += COUNT - 1) {
        int64_t active[COUNT];
        memcpy(changed, x, COUNT * m.n_in * sizeof *x);
        if (!team || multiply_alone(team, &m, dtype, count, changed, neurons ? h : NULL, y, active)) return puts("refused");
        for (size_t token = 0; token < count; token++) {
            const float *its_h = neurons ? h + token * m.n_out : NULL, *got = y + token * m.n_out;
            if (expect(&m, dtype, x + token * m.n_in, its_h, want) != active[token]) return printf("%d: active\n", trial);
            for (size_t j = 0; j < m.n_out; j++)
                if (isfinite(want[j]) ? !(fabs(want[j] - got[j]) < bound) : isfinite(got[j]))
                    return printf("%d, column %zu: %g, not %g\n", trial, j, got[j], want[j]);
        }
    }
    team_free(team);
    free(w); free(scale); free(t); free(mu); free(base); free(columns); free(x); free(changed); free(h); free(y); free(want); free(packed);
    return 0;
}

static Matrix resize(Matrix m, size_t n_in, size_t n_out, size_t stripe, size_t tile, size_t splits)
{
    m.n_in = n_in; m.n_out = n_out; m.stripe = stripe; m.tile = tile; m.splits = splits;
    return m;
}

// a whole model, as small as can be: a prompt, then a step at each position, and some that must be refused
static int try_model(int arch, int dtype, int shortlist)
{
    enum { D = 6, V = 11, T = 70, H = 10 };
    size_t kv = arch == GPT2 ? 3 : 1, qkv = D + 2 * kv * 2;
    float *numbers = floats(1000), *z = calloc(1000, 4), *tables = floats(T * D), *logits = floats(V);
    void *w = pack(numbers, 1000, dtype);
    Norm norm = {.gain = tables};
    Matrix zeros = {.weight = w, .thresholds = z, .mu = z, .row_scale = z, .column_scale = z, .base = z};
    Layer layer = {.ln_1 = norm, .ln_2 = norm, .qkv = resize(zeros, D, qkv, qkv, qkv, 2), .out = resize(zeros, D, D, 4, 2, 1),
                   .up = resize(zeros, D, H, 7, 7, 1), .down = resize(zeros, H, D, D, D, 3)};
    Model model = {.arch = arch, .dtype = dtype, .vocab_size = V, .block_size = T, .n_layer = 1, .n_head = 3, .n_kv_head = kv,
                   .n_embd = D, .n_hidden = H, .norm_eps = 1e-5f, .wpe = tables, .cos = tables, .sin = tables,
                   .layers = &layer, .ln_f = norm, .head = resize(zeros, D, V, 3, 3, 1)};
    size_t size = dtype == F32 ? 4 : 2;
    State state = {.k = calloc(kv * 2 * 2 * BLOCK, size), .v = calloc(kv * T * BLOCK, size), .x = floats(CHUNK * D),
                   .h = floats(CHUNK * D), .qkv = floats(CHUNK * qkv), .attn_out = floats(CHUNK * D), .hidden = floats(CHUNK * H)};
    if (shortlist) {
        model.embedding = pack(numbers, V * D, dtype);
        model.margin = 0.01f;
        if (dtype == INT8) model.embedding_row_scale = model.embedding_column_scale = tables;
    }
    int64_t active[5 * CHUNK];
    uint32_t tokens[CHUNK] = {3, 1, 4, 1, 5, 9, 2, 6}, unknown = V;
    Team *team = team_new(2, T, 256);
    if (decode(team, &model, &state, tokens, CHUNK, 0, logits, active)) return puts("refused");
    for (size_t position = CHUNK; position < T; position++) {
        if (decode(team, &model, &state, tokens, 1, position, logits, active)) return puts("refused");
        for (int i = 0; i < V; i++) if (!isfinite(logits[i])) return puts("logits");
        if (active[4] % D || (active[4] > V * D) != shortlist) return puts("active");
    }
    if (!decode(team, &model, &state, &unknown, 1, 0, logits, active)) return puts("not refused: a token");
    // four tokens past the end; near 2^64, position + 4 wrapped to a small number, and memory far away was written
    size_t outside[] = {T, T - 3, SIZE_MAX - 2, SIZE_MAX - 3};
    for (int i = 0; i < 4; i++)
        if (!decode(team, &model, &state, tokens, 4, outside[i], logits, active)) return puts("not refused: a position");
    if (!decode(team, &model, &state, tokens, 0, 0, logits, active)) return puts("not refused: no tokens");
    if (shortlist && dtype == INT8) {
        model.embedding_column_scale = NULL;
        if (!decode(team, &model, &state, tokens, 1, 0, logits, active)) return puts("not refused: no scale");
    }
    free((void *)model.embedding);
    model.embedding = NULL;
    if (shortlist && !decode(team, &model, &state, tokens, 1, 0, logits, active)) return puts("not refused: no embedding");
    // thresholds to base are prefetched: a range of less than 0 bytes, then one of petabytes, took for ever
    layer.up.thresholds = z + 100;
    if (!decode(team, &model, &state, tokens, 1, 0, logits, active)) return puts("not refused: base before thresholds");
    layer.up.thresholds = z;
    layer.up.base = (const float *)((uintptr_t)z + ((uintptr_t)1 << 50));
    if (!decode(team, &model, &state, tokens, 1, 0, logits, active)) return puts("not refused: base far from thresholds");
    layer.up.base = z;
    layer.up.n_out++;
    if (!decode(team, &model, &state, tokens, 1, 0, logits, active)) return puts("not refused: a size");
    team_free(team);
    free(numbers); free(w); free(z); free(tables); free(logits);
    free(state.k); free(state.v); free(state.x); free(state.h); free(state.qkv); free(state.attn_out); free(state.hidden);
    return 0;
}

int main(void)
{
    if (try_widening()) return 1;
    for (int trial = 0; trial < TRIALS; trial++) { srand((unsigned)trial); if (try_matrix(trial)) return 1; }
    for (int dtype = F32; dtype <= INT8; dtype++)
        for (int list = 0; list < 2; list++) if (try_model(GPT2, dtype, list) || try_model(LLAMA, dtype, list)) return 1;
    puts("fine");
    return 0;
}
'''


@pytest.mark.parametrize('sanitizer, portable', [('address,undefined', False), ('address,undefined', True), ('thread', False)])
def test_sanitizers_on_random_shapes(tmp_path, sanitizer, portable):
    """Random shapes; all, some or no inputs active; NaN and infinity: the right sums, nothing out of bounds, no race."""
    (tmp_path / 'driver.c').write_text(DRIVER, encoding='utf-8')
    command = [*build_kernel.compiler(), '-std=gnu11', '-O1', '-g', '-march=native', '-fopenmp-simd',
               f'-fsanitize={sanitizer}', '-fno-sanitize-recover=all', f'-DTRIALS={40 if sanitizer == "thread" else 150}', f'-I{SOURCE.parent}', 'driver.c', '-o', 'driver',
               '-pthread', '-lm'] + PORTABLE * portable
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    # the thread sanitizer cannot start if the system randomises addresses too much
    fixed = ['setarch', '-R'] if shutil.which('setarch') else []
    done = subprocess.run([*fixed, str(tmp_path / 'driver')], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == 'fine\n', done.stdout + done.stderr


def test_driver_passes_on_emulated_aarch64(tmp_path):
    """NEON instructions widen weights there, which tests on other processors never run."""
    compiler, emulator = 'aarch64-linux-gnu-gcc', 'qemu-aarch64'
    if not shutil.which(compiler) or not shutil.which(emulator):
        pytest.skip('not tested: install gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user')
    (tmp_path / 'driver.c').write_text(DRIVER, encoding='utf-8')
    built = subprocess.run([compiler, '-std=gnu11', '-O1', '-fopenmp-simd', '-DTRIALS=40', f'-I{SOURCE.parent}', 'driver.c',
                            '-o', 'driver', '-static', '-pthread', '-lm'], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([emulator, str(tmp_path / 'driver')], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == 'fine\n', done.stdout + done.stderr


@pytest.mark.parametrize('flags', [[], ['-march=native'], PORTABLE])
def test_compiles_without_a_warning(tmp_path, flags):
    """As standard C11, for this processor and for any of its kind."""
    done = subprocess.run([*build_kernel.compiler(), '-std=c11', '-O2', '-Wall', '-Wextra', '-Werror', '-Wno-unknown-pragmas',
                           *flags, '-c', str(SOURCE), '-o', str(tmp_path / 'kernel.o')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
