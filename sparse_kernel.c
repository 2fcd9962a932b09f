/*
Decodes a CWIC model in C11: what cwic.py computes in eval mode, but reading only the weights that a token uses.

Decoding a token is mostly waiting for weights: each is used for one multiplication and one addition, so a token takes as
long as its weights take to arrive from memory. A weight that is not read is time saved, if memory likes the order of those
that remain. So weights are stored input by input: all weights of one input lie side by side, and a token that skips the
input skips that whole row.

Build it with: python build_kernel.py. decoder.py packs a model for it and checks all shapes before it makes a pointer.

In this order: the structs, the small maths, the product of a vector with the rows that it uses (where the time goes),
attention and the whole step, the team of threads.

Not here: more than one sequence, f16, GPUs, Windows. Threads do not survive fork(): make a new team in the child.
*/

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(PLAIN)             // PLAIN: a build without threads and intrinsics, the short way through this file
#define THREADS
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#if defined(__AVX512F__)
#define AVX512
#include <immintrin.h>
#endif
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))     // a constant dtype then leaves one loop for each format
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define INLINE static inline
#define PREFETCH(address) ((void)0)
#endif

// ---------------------------------------------------------------------------------------------------------------------
// the structs. build_kernel.py takes the declarations up to "end of interface" from here

enum { F32, BF16, INT8 };       // formats of weights; everything else is f32
enum { GPT2, LLAMA };           // kinds of models

typedef struct {                // a matrix with thresholds: a StripedLinear, or Llama's Neurons
    size_t n_in, n_out;
    size_t stripe;              // columns that share their thresholds; n = ceil(n_out / stripe), the last may be narrower
    size_t tile;                // columns computed together: a stripe is cut into tiles, its last may be narrower
    size_t splits;              // the inputs of each tile are split so often, to make tasks for all threads
    const void *weight;         // (n_in, width) for each tile in turn; Neurons (n_in, 2, n_out): a column of up, a row of down
    const float *scale;         // (n, n_in) for INT8, where a weight is scale * its byte; Neurons: the product of both scales
    const float *thresholds;    // (n, n_in)
    const float *mu;            // (n_in) the usual value of each input
    const float *base;          // (n_out) mu @ W + b: the output when every input is as usual
} Matrix;

typedef struct {
    const float *gain, *bias;   // (n_embd) each; bias may be NULL
} Norm;

typedef struct {
    Norm ln_1, ln_2;
    Matrix qkv, out, up, down;  // of Llama, up is the gate, and down are the neurons
} Block;

typedef struct {
    int arch, dtype;
    size_t vocab_size, block_size, n_layer, n_head, n_kv_head, n_embd, n_hidden;
    float norm_eps;
    const float *wpe;           // (block_size, n_embd); Llama has none
    const float *cos, *sin;     // (block_size, head_dim / 2): Llama's rotations
    const Block *blocks;        // (n_layer)
    Norm ln_f;
    Matrix head;                // its columns are the embeddings of the tokens, too
} Model;

typedef struct {                // what a sequence has left behind, and working memory
    float *k, *v;               // (n_layer, n_kv_head, block_size, head_dim)
    float *x, *h;               // (n_embd) the residual stream, and the same normalised
    float *qkv;                 // ((n_head + 2 * n_kv_head) * head_dim)
    float *mixed;               // (n_embd) what attention gathered
    float *hidden;              // (n_hidden)
} State;

typedef struct Team Team;       // threads

// longest: the largest n_in or block_size to come; sums: the largest tiles * splits * tile. NULL: no memory
Team *team_new(int threads, size_t longest, size_t sums);
int team_size(const Team *team);        // threads it really has
void team_free(Team *team);

// y (n_out) for the input x (n_in); active (1): weights used. 0, or -1 where sizes are impossible.
// neurons: x (n_in) is z, what the gate says; h (n_out) is what their up is applied to. Otherwise h is NULL
int multiply_alone(Team *team, const Matrix *matrix, int dtype, const float *x, const float *h, float *y, int64_t *active);

// one token at a position: logits (vocab_size), active (4 * n_layer + 1): weights used by each matrix. 0, or -1 where sizes
// are impossible, or token or position out of range
int decode_token(Team *team, const Model *model, const State *state, size_t token, size_t position,
                 float *logits, int64_t *active);

// reads every number once, on all threads: how fast memory is now. Returns their sum, so that no compiler skips the reading
uint64_t read_all(Team *team, const uint64_t *data, size_t count);

// end of interface

typedef struct {                // what each thread has for itself
    uint32_t *index;            // (longest) which rows are active
    float *value;               // (longest) and what they are multiplied by; or attention's scores
} Worker;

typedef struct Threads Threads; // how they wait for tasks and share them: at the end of this file

struct Team {
    int size, n_workers;        // threads; workers, of whom a system short of threads may leave some without one
    Worker *workers;            // (n_workers)
    Threads *threads;
    size_t longest, n_sums;
    float *sums;                // (n_sums) what the tasks of one matrix add up to
};

// does tasks 0, 1, ... in any order, each by whichever thread is free, and returns when all are done. A task returns how many
// weights it used, run_tasks their total
typedef int64_t Task(const void *argument, Worker *worker, size_t task);
static int64_t run_tasks(Team *team, size_t tasks, Task *function, const void *argument);

// ---------------------------------------------------------------------------------------------------------------------
// the small maths. Loops are written so that compilers vectorise them: a sum needs leave to be reordered (omp simd), and
// exp, which libm computes one at a time, is written out

static float sum(const float *x, size_t n)
{
    float s = 0;
    #pragma omp simd reduction(+:s)
    for (size_t i = 0; i < n; i++) s += x[i];
    return s;
}

static float sum_of_squares(const float *x, float mean, size_t n)
{
    float s = 0;
    #pragma omp simd reduction(+:s)
    for (size_t i = 0; i < n; i++) s += (x[i] - mean) * (x[i] - mean);
    return s;
}

// GPT-2's LayerNorm, or Llama's RMSNorm, which does not centre
static void normalise(float *restrict y, const float *restrict x, Norm norm, const Model *m)
{
    size_t n = m->n_embd;
    float mean = m->arch == GPT2 ? sum(x, n) / (float)n : 0;
    float scale = 1 / sqrtf(sum_of_squares(x, mean, n) / (float)n + m->norm_eps);
    for (size_t i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * norm.gain[i] + (norm.bias ? norm.bias[i] : 0);
}

// e^x to 2 units in the last place: 2^n * e^r, where r, at most half of ln 2, is what n leaves. Adding 1.5 * 2^23 rounds
// x / ln 2 to the integer n and leaves n in the low bits of the sum
static inline float exponential(float x)
{
    union { float f; uint32_t u; } n, power;
    x = x < -87 ? -87 : x > 88 ? 88 : x;                    // NaN passes through
    n.f = x * 1.44269504f + 12582912;
    float whole = n.f - 12582912;
    float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;        // ln 2 in two parts, the first exact in any product
    power.u = (n.u + 127) << 23;
    float tail = 0.166666655f + r * (0.0416665792f + r * (0.00833345205f + r * 0.00138888f));
    return power.f * (1 + r * (1 + r * (0.5f + r * tail)));
}

// GPT-2's: x / 2 (1 + tanh u), which is x / (1 + e^-2u)
static void gelu(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = x[i] / (1 + exponential(-1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
}

static void silu(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) x[i] = x[i] / (1 + exponential(-x[i]));
}

static void softmax(float *x, size_t n)
{
    float largest = x[0];
    for (size_t i = 1; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    for (size_t i = 0; i < n; i++) x[i] = exponential(x[i] - largest);
    float scale = 1 / sum(x, n);
    for (size_t i = 0; i < n; i++) x[i] *= scale;
}

// number j of the first half of a head and number j of its second half turn together
static void rotate(float *restrict head, const float *restrict cos, const float *restrict sin, size_t half)
{
    for (size_t j = 0; j < half; j++) {
        float a = head[j], b = head[half + j];
        head[j] = a * cos[j] - b * sin[j];
        head[half + j] = b * cos[j] + a * sin[j];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// the product of a vector with the rows that it uses

// the inputs from first to last that a stripe uses, centred: those with |x - mu| > t. A NaN is used too, so that it spreads
// (as in PyTorch, where a masked NaN is 0 * NaN) and does not pass for an input that is as usual. Returns how many
static size_t find_active(const Matrix *m, size_t stripe, const float *restrict x, size_t first, size_t last,
                          uint32_t *restrict index, float *restrict value)
{
    const float *restrict mu = m->mu, *restrict t = m->thresholds + stripe * m->n_in;
    const float *restrict scale = m->scale ? m->scale + stripe * m->n_in : NULL;
    size_t n = 0, i = first;
#ifdef AVX512
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= last; i += 16) {       // 16 are stored, however many are active: what comes next overwrites the rest
        __m512 c = _mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(mu + i));
        __mmask16 used = _mm512_cmp_ps_mask(_mm512_abs_ps(c), _mm512_loadu_ps(t + i), _CMP_NLE_UQ);
        if (scale) c = _mm512_mul_ps(c, _mm512_loadu_ps(scale + i));
        _mm512_storeu_ps(value + n, _mm512_maskz_compress_ps(used, c));
        __m512i numbers = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)i));
        _mm512_storeu_si512(index + n, _mm512_maskz_compress_epi32(used, numbers));
        n += (size_t)__builtin_popcount(used);
    }
#endif
    for (; i < last; i++) {                 // no branch to mispredict: always written, kept by moving on
        float c = x[i] - mu[i];
        index[n] = (uint32_t)i;
        value[n] = scale ? c * scale[i] : c;
        n += !(fabsf(c) <= t[i]);
    }
    return n;
}

static size_t bytes(int dtype) { return dtype == F32 ? 4 : dtype == BF16 ? 2 : 1; }

// weight j of a row
INLINE float weight(const char *row, size_t j, int dtype)
{
    if (dtype == F32) return ((const float *)row)[j];
    if (dtype == INT8) return ((const int8_t *)row)[j];
    union { uint32_t u; float f; } bits = {(uint32_t)((const uint16_t *)row)[j] << 16};     // the upper half of an f32
    return bits.f;
}

typedef struct {                // n rows of weights, and what each is multiplied by
    const char *weight;
    size_t stride, width;       // bytes from one row to the next; columns
    const uint32_t *index;      // (n) which rows
    float *value;               // (n)
    size_t n;
} Rows;

#ifdef PLAIN

// sums (width) += value[k] * row k, for up to eight rows from the k-th on. This is where a model's time goes
static void add_eight(float *sums, Rows rows, size_t k, int dtype)
{
    for (size_t end = k + 8; k < end && k < rows.n; k++)
        for (size_t j = 0; j < rows.width; j++)
            sums[j] += rows.value[k] * weight(rows.weight + rows.index[k] * rows.stride, j, dtype);
}

// value[k] *= row k . h, for the same eight
static void dot_eight(Rows rows, size_t k, const float *h, int dtype)
{
    for (size_t end = k + 8; k < end && k < rows.n; k++) {
        float dot = 0;
        for (size_t j = 0; j < rows.width; j++) dot += h[j] * weight(rows.weight + rows.index[k] * rows.stride, j, dtype);
        rows.value[k] *= dot;
    }
}

#else

// The same, fast: sums is read and written once for eight weights, and rows are asked for before it is their turn. Which one
// comes next no prefetcher of the hardware can guess, but we know: with every cache line of a row goes a request for the same
// line of the row eight further on, and with those of the first eight a request for their own
typedef struct {
    const char *row[8], *later[8];
    float value[8];
} Eight;

INLINE Eight take_eight(Rows rows, size_t k, int dtype)
{
    Eight e;
    for (size_t r = 0; r < 8; r++) {        // past the end: the last row again, times nothing
        size_t last = rows.n - 1, now = k + r < last ? k + r : last, later = k + r + 8 < last ? k + r + 8 : last;
        e.row[r] = rows.weight + rows.index[now] * rows.stride;
        e.later[r] = rows.weight + rows.index[later] * rows.stride;
        e.value[r] = k + r < rows.n ? rows.value[k + r] : 0;
    }
    for (size_t r = 0; k == 0 && r < 8; r++)
        for (size_t i = 0; i < rows.width * bytes(dtype); i += 64) PREFETCH(e.row[r] + i);
    return e;
}

#ifdef AVX512       // gcc widens bytes by way of 16 bits, which costs a third of int8's speed: so we say how
INLINE __m512 load16(const char *row, size_t j, int dtype)
{
    if (dtype == F32) return _mm512_loadu_ps(row + 4 * j);
    if (dtype == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(row + j))));
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(row + 2 * j)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
#endif

INLINE void add_eight(float *restrict sums, Rows rows, size_t k, int dtype)
{
    Eight e = take_eight(rows, k, dtype);
    size_t line = 64 / bytes(dtype);
    for (size_t start = 0; start < rows.width; start += line) {
        size_t j = start, end = start + line < rows.width ? start + line : rows.width;
        for (size_t r = 0; r < 8; r++) PREFETCH(e.later[r] + start * bytes(dtype));
#ifdef AVX512
        for (; j + 16 <= end; j += 16) {
            __m512 sum = _mm512_loadu_ps(sums + j);
            for (size_t r = 0; r < 8; r++) sum = _mm512_fmadd_ps(_mm512_set1_ps(e.value[r]), load16(e.row[r], j, dtype), sum);
            _mm512_storeu_ps(sums + j, sum);
        }
#endif
        for (; j < end; j++)
            for (size_t r = 0; r < 8; r++) sums[j] += e.value[r] * weight(e.row[r], j, dtype);
    }
}

INLINE void dot_eight(Rows rows, size_t k, const float *restrict h, int dtype)
{
    Eight e = take_eight(rows, k, dtype);
    size_t line = 64 / bytes(dtype), j = 0;
    float dot[8] = {0};
#ifdef AVX512
    __m512 sum[8] = {0};
    for (; j + 16 <= rows.width; j += 16) {
        if (j % line == 0) for (size_t r = 0; r < 8; r++) PREFETCH(e.later[r] + j * bytes(dtype));
        for (size_t r = 0; r < 8; r++) sum[r] = _mm512_fmadd_ps(load16(e.row[r], j, dtype), _mm512_loadu_ps(h + j), sum[r]);
    }
    for (size_t r = 0; r < 8; r++) dot[r] = _mm512_reduce_add_ps(sum[r]);
    for (; j < rows.width; j++)
        for (size_t r = 0; r < 8; r++) dot[r] += weight(e.row[r], j, dtype) * h[j];
#else
    for (size_t r = 0; r < 8; r++) {
        const char *row = e.row[r];
        float s = 0;
        for (j = 0; j < rows.width; j += line) PREFETCH(e.later[r] + j * bytes(dtype));
        #pragma omp simd reduction(+:s)
        for (size_t i = 0; i < rows.width; i++) s += weight(row, i, dtype) * h[i];
        dot[r] = s;
    }
#endif
    for (size_t r = 0; r < 8 && k + r < rows.n; r++) rows.value[k + r] *= dot[r];
}

#endif

// sums (width) += every row times its value. Of neurons a row is one column of up and then one row of down, and its value is first multiplied
// by what that column of up makes of h
INLINE void add_rows(float *restrict sums, Rows rows, const float *restrict h, int dtype)
{
    Rows down = rows;
    if (h) down.weight += rows.width * bytes(dtype);
    for (size_t k = 0; k < rows.n; k += 8) {
        if (h) dot_eight(rows, k, h, dtype);
        add_eight(sums, down, k, dtype);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// a whole matrix

typedef struct { size_t stripe, start, width; } Tile;      // columns start to start + width - 1 of a stripe

// tiles are numbered stripe by stripe; of the last stripe, which may be narrower, some may have no columns
static Tile find_tile(const Matrix *m, size_t number)
{
    size_t per_stripe = (m->stripe + m->tile - 1) / m->tile, stripe = number / per_stripe;
    size_t start = stripe * m->stripe + number % per_stripe * m->tile;
    size_t end = (stripe + 1) * m->stripe < m->n_out ? (stripe + 1) * m->stripe : m->n_out;
    size_t rest = start < end ? end - start : 0;
    return (Tile){stripe, start, rest < m->tile ? rest : m->tile};
}

static size_t count_tiles(const Matrix *m)
{
    return (m->stripe + m->tile - 1) / m->tile * ((m->n_out + m->stripe - 1) / m->stripe);
}

enum { STORE, ADD, GELU, SILU };    // what becomes of the outputs: they replace y, are added to it, or pass through a function

typedef struct {
    const Matrix *matrix;
    int dtype, then;
    const float *x;             // (n_in)
    const float *h;             // neurons: (n_out) what up is applied to; otherwise NULL
    float *y;                   // (n_out)
    float *sums;                // (tiles, splits, tile)
} Product;

static void finish_tile(const Product *p, size_t number)
{
    const Matrix *m = p->matrix;
    Tile tile = find_tile(m, number);
    float *sums = p->sums + number * m->splits * m->tile, *y = p->y + tile.start;
    for (size_t split = 1; split < m->splits; split++)
        for (size_t j = 0; j < tile.width; j++) sums[j] += sums[split * m->tile + j];
    for (size_t j = 0; j < tile.width; j++) sums[j] += m->base[tile.start + j];
    if (p->then == GELU) gelu(sums, tile.width);
    if (p->then == SILU) silu(sums, tile.width);
    if (p->then == ADD) for (size_t j = 0; j < tile.width; j++) y[j] += sums[j];
    else memcpy(y, sums, tile.width * sizeof *y);
}

static int64_t multiply_task(const void *argument, Worker *me, size_t task)
{
    const Product *p = argument;
    const Matrix *m = p->matrix;
    size_t split = task % m->splits;
    Tile tile = find_tile(m, task / m->splits);
    float *sums = p->sums + task * m->tile;
    size_t n = find_active(m, tile.stripe, p->x, split * m->n_in / m->splits, (split + 1) * m->n_in / m->splits,
                           me->index, me->value);
    size_t per_input = p->h ? 2 * tile.width : tile.width;
    Rows rows = {(const char *)m->weight + tile.start * m->n_in * bytes(p->dtype) * (p->h ? 2 : 1),
                 per_input * bytes(p->dtype), tile.width, me->index, me->value, n};
    memset(sums, 0, tile.width * sizeof *sums);
    if (p->dtype == F32) add_rows(sums, rows, p->h, F32);
    else if (p->dtype == BF16) add_rows(sums, rows, p->h, BF16);
    else add_rows(sums, rows, p->h, INT8);
    if (m->splits == 1) finish_tile(p, task);
    return (int64_t)(n * per_input);
}

// y (n_out) for the input x (n_in). Returns the number of weights used
static int64_t multiply(Team *team, const Matrix *m, int dtype, const float *x, const float *h, float *y, int then)
{
    Product product = {m, dtype, then, x, h, y, team->sums};
    size_t tiles = count_tiles(m);
    int64_t active = run_tasks(team, tiles * m->splits, multiply_task, &product);
    for (size_t i = 0; m->splits > 1 && i < tiles; i++) finish_tile(&product, i);   // splits are added in one order always
    return active;
}

static int possible(const Team *team, const Matrix *m, int dtype, size_t n_in, size_t n_out)
{
    return m->n_in == n_in && m->n_out == n_out && n_in && n_in <= team->longest && n_out
        && m->stripe && m->stripe <= n_out && m->tile && m->tile <= m->stripe && m->splits && m->splits <= n_in
        && count_tiles(m) * m->splits * m->tile <= team->n_sums
        && (dtype == F32 || dtype == BF16 || (dtype == INT8 && m->scale));
}

int multiply_alone(Team *team, const Matrix *m, int dtype, const float *x, const float *h, float *y, int64_t *active)
{
    if (!possible(team, m, dtype, m->n_in, m->n_out) || (h && m->tile < m->n_out)) return -1;
    *active = multiply(team, m, dtype, x, h, y, STORE);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// attention, and the step

typedef struct {
    const Model *model;
    const State *state;
    size_t layer, position;
} Attention;

// where the cache has the keys of one head at this layer, or the values
static float *cached(float *cache, const Model *m, size_t layer, size_t head)
{
    return cache + (layer * m->n_kv_head + head) * m->block_size * (m->n_embd / m->n_head);
}

// positions are turned into the queries and keys of this token, and its keys and values join the cache
static void remember(const Attention *now)
{
    const Model *m = now->model;
    size_t size = m->n_embd / m->n_head;
    float *q = now->state->qkv, *k = q + m->n_embd, *v = k + m->n_kv_head * size;
    for (size_t i = 0; m->arch == LLAMA && i < m->n_head + m->n_kv_head; i++)
        rotate(q + i * size, m->cos + now->position * size / 2, m->sin + now->position * size / 2, size / 2);
    for (size_t i = 0; i < m->n_kv_head; i++) {
        memcpy(cached(now->state->k, m, now->layer, i) + now->position * size, k + i * size, size * sizeof *k);
        memcpy(cached(now->state->v, m, now->layer, i) + now->position * size, v + i * size, size * sizeof *v);
    }
}

// one head: its query is compared with all keys so far, and gathers their values. Neighbouring heads may share these
static int64_t attend(const void *argument, Worker *me, size_t head)
{
    const Attention *now = argument;
    const Model *m = now->model;
    size_t size = m->n_embd / m->n_head, length = now->position + 1, kv = head / (m->n_head / m->n_kv_head);
    Rows keys = {(char *)cached(now->state->k, m, now->layer, kv), size * sizeof(float), size, me->index, me->value, length};
    Rows values = keys;
    values.weight = (char *)cached(now->state->v, m, now->layer, kv);
    for (size_t t = 0; t < length; t++) {
        me->index[t] = (uint32_t)t;
        me->value[t] = 1 / sqrtf((float)size);
    }
    for (size_t t = 0; t < length; t += 8) dot_eight(keys, t, now->state->qkv + head * size, F32);
    softmax(me->value, length);
    memset(now->state->mixed + head * size, 0, size * sizeof(float));
    add_rows(now->state->mixed + head * size, values, NULL, F32);
    return 0;
}

// a token's embedding is its column of the head
static void embed(float *x, const Matrix *head, int dtype, size_t token)
{
    size_t per_stripe = (head->stripe + head->tile - 1) / head->tile, stripe = token / head->stripe;
    Tile tile = find_tile(head, stripe * per_stripe + token % head->stripe / head->tile);
    for (size_t i = 0; i < head->n_in; i++) {
        x[i] = weight((const char *)head->weight, tile.start * head->n_in + i * tile.width + token - tile.start, dtype);
        if (dtype == INT8) x[i] *= head->scale[stripe * head->n_in + i];
    }
}

int decode_token(Team *team, const Model *model, const State *state, size_t token, size_t position,
                 float *logits, int64_t *active)
{
    const Model *m = model;
    const State *s = state;
    size_t d = m->n_embd, qkv = m->n_head && m->n_kv_head ? d + 2 * m->n_kv_head * (d / m->n_head) : 0;
    int gpt2 = m->arch == GPT2;
    if (token >= m->vocab_size || position >= m->block_size || m->block_size > team->longest) return -1;
    if (!qkv || d % m->n_head || m->n_head % m->n_kv_head || !possible(team, &m->head, m->dtype, d, m->vocab_size)) return -1;
    for (const Block *b = m->blocks; b < m->blocks + m->n_layer; b++)
        if (!possible(team, &b->qkv, m->dtype, d, qkv) || !possible(team, &b->out, m->dtype, d, d)
            || !possible(team, &b->up, m->dtype, d, m->n_hidden) || !possible(team, &b->down, m->dtype, m->n_hidden, d)
            || (!gpt2 && b->down.tile < d)) return -1;

    embed(s->x, &m->head, m->dtype, token);
    for (size_t i = 0; gpt2 && i < d; i++) s->x[i] += m->wpe[position * d + i];
    for (size_t layer = 0; layer < m->n_layer; layer++) {
        const Block *b = &m->blocks[layer];
        Attention attention = {m, s, layer, position};
        normalise(s->h, s->x, b->ln_1, m);
        *active++ = multiply(team, &b->qkv, m->dtype, s->h, NULL, s->qkv, STORE);
        remember(&attention);
        run_tasks(team, m->n_head, attend, &attention);
        *active++ = multiply(team, &b->out, m->dtype, s->mixed, NULL, s->x, ADD);
        normalise(s->h, s->x, b->ln_2, m);
        *active++ = multiply(team, &b->up, m->dtype, s->h, NULL, s->hidden, gpt2 ? GELU : SILU);
        *active++ = multiply(team, &b->down, m->dtype, s->hidden, gpt2 ? NULL : s->h, s->x, ADD);
    }
    normalise(s->h, s->x, m->ln_f, m);
    *active = multiply(team, &m->head, m->dtype, s->h, NULL, logits, STORE);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// memory alone, for bench.py

enum { CHUNK = 1 << 15 };       // 256 KiB

typedef struct { const uint64_t *data; size_t count; } Reading;

static int64_t read_chunk(const void *argument, Worker *me, size_t chunk)
{
    const Reading *r = argument;
    size_t end = (chunk + 1) * CHUNK < r->count ? (chunk + 1) * CHUNK : r->count;
    uint64_t sum = 0;
    for (size_t i = chunk * CHUNK; i < end; i++) sum += r->data[i];
    (void)me;
    return (int64_t)(sum & UINT32_MAX);
}

uint64_t read_all(Team *team, const uint64_t *data, size_t count)
{
    Reading reading = {data, count};
    return (uint64_t)run_tasks(team, (count + CHUNK - 1) / CHUNK, read_chunk, &reading);
}

// ---------------------------------------------------------------------------------------------------------------------
// the team of threads. The calling thread says what is to be done and in how many tasks, takes tasks itself, and goes on when
// all are done. The others claim tasks as long as there are any, so a thread that gets cheap ones, or a core to itself, does
// more of them; and one that a neighbour has pushed off its core is waited for only if it holds a task

#ifdef THREADS

struct Threads {
    Task *function;             // these four may be read by who has claimed a task
    Team *team;
    size_t tasks;
    const void *argument;
    // what all threads write, each on a cache line of its own
    _Alignas(64) atomic_uint_fast64_t open; // tasks not yet claimed; above them, in 32 bits, the number of the run
    _Alignas(64) atomic_size_t done;        // tasks done, and the sum of what they returned
    atomic_int_fast64_t active;
    _Alignas(64) atomic_int sleeping;
    atomic_int stop;
    int started;                // threads besides the caller's
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    pthread_t *thread;          // (started)
};

static void pause_a_moment(unsigned tries)
{
    // on a core of one's own the wait is short; if not, whoever we wait for may need this core
    if (tries > 2000) { sched_yield(); return; }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// claims tasks and does them until none are left
static void work(Threads *t, Worker *me)
{
    uint_fast64_t open = atomic_load_explicit(&t->open, memory_order_acquire);
    while (open & UINT32_MAX) {
        if (!atomic_compare_exchange_weak(&t->open, &open, open - 1)) continue;             // another was faster
        int64_t active = t->function(t->argument, me, t->tasks - (size_t)(open & UINT32_MAX));
        atomic_fetch_add_explicit(&t->active, active, memory_order_relaxed);
        atomic_fetch_add_explicit(&t->done, 1, memory_order_acq_rel);
        open = atomic_load_explicit(&t->open, memory_order_acquire);
    }
}

static int64_t run_tasks(Team *team, size_t tasks, Task *function, const void *argument)
{
    Threads *t = team->threads;
    uint_fast64_t number = (atomic_load_explicit(&t->open, memory_order_relaxed) >> 32) + 1;
    t->function = function;
    t->tasks = tasks;
    t->argument = argument;
    atomic_store_explicit(&t->done, 0, memory_order_relaxed);
    atomic_store_explicit(&t->active, 0, memory_order_relaxed);
    atomic_store(&t->open, number << 32 | tasks);
    if (atomic_load(&t->sleeping)) {
        pthread_mutex_lock(&t->mutex);
        pthread_cond_broadcast(&t->wake);
        pthread_mutex_unlock(&t->mutex);
    }
    work(t, &team->workers[0]);
    for (unsigned tries = 0; atomic_load_explicit(&t->done, memory_order_acquire) < tasks; tries++) pause_a_moment(tries);
    return atomic_load_explicit(&t->active, memory_order_relaxed);
}

typedef struct { Threads *threads; Worker *worker; } Start;

static void *thread_main(void *argument)
{
    Start start = *(Start *)argument;
    Threads *t = start.threads;
    free(argument);
    for (unsigned tries = 0; !atomic_load(&t->stop); tries++) {
        if (atomic_load_explicit(&t->open, memory_order_relaxed) & UINT32_MAX) {
            work(t, start.worker);
            tries = 0;
        } else if (tries < 6000) {
            pause_a_moment(tries);
        } else {                                            // nothing to do for a while: sleep
            pthread_mutex_lock(&t->mutex);
            atomic_fetch_add(&t->sleeping, 1);
            while (!(atomic_load(&t->open) & UINT32_MAX) && !atomic_load(&t->stop)) pthread_cond_wait(&t->wake, &t->mutex);
            atomic_fetch_sub(&t->sleeping, 1);
            pthread_mutex_unlock(&t->mutex);
        }
    }
    return NULL;
}

// returns the number of threads there are, the caller's among them: a system short of threads gives fewer. 0: no memory
static int start_threads(Team *team, int size)
{
    Threads *t = team->threads = aligned_alloc(64, sizeof *t);
    if (!t) return 0;
    memset(t, 0, sizeof *t);
    pthread_mutex_init(&t->mutex, NULL);
    pthread_cond_init(&t->wake, NULL);
    t->thread = calloc((size_t)size, sizeof *t->thread);
    while (t->thread && t->started + 1 < size) {
        Start *start = malloc(sizeof *start);
        if (!start) break;
        *start = (Start){t, &team->workers[t->started + 1]};
        if (pthread_create(&t->thread[t->started], NULL, thread_main, start)) { free(start); break; }
        t->started++;
    }
    return t->started + 1;
}

static void stop_threads(Threads *t)
{
    pthread_mutex_lock(&t->mutex);
    atomic_store(&t->stop, 1);
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->mutex);
    for (int i = 0; i < t->started; i++) pthread_join(t->thread[i], NULL);
    pthread_cond_destroy(&t->wake);
    pthread_mutex_destroy(&t->mutex);
    free(t->thread);
    free(t);
}

#else

static int64_t run_tasks(Team *team, size_t tasks, Task *function, const void *argument)
{
    int64_t active = 0;
    for (size_t task = 0; task < tasks; task++) active += function(argument, team->workers, task);
    return active;
}

static int start_threads(Team *team, int size) { (void)team; (void)size; return 1; }
static void stop_threads(Threads *threads) { (void)threads; }

#endif

int team_size(const Team *team) { return team->size; }

void team_free(Team *team)
{
    if (!team) return;
    if (team->threads) stop_threads(team->threads);
    for (int i = 0; team->workers && i < team->n_workers; i++) {
        free(team->workers[i].index);
        free(team->workers[i].value);
    }
    free(team->workers);
    free(team->sums);
    free(team);
}

Team *team_new(int threads, size_t longest, size_t sums)
{
    if (threads < 1 || threads > 1024 || longest < 1 || longest > UINT32_MAX || sums < 1 || sums > UINT32_MAX) return NULL;
    Team *team = calloc(1, sizeof *team);
    if (!team) return NULL;
    team->longest = longest;
    team->n_sums = sums;
    team->sums = malloc(sums * sizeof *team->sums);
    team->workers = calloc((size_t)threads, sizeof *team->workers);
    team->n_workers = threads;
    int fine = team->sums && team->workers;
    for (int i = 0; fine && i < threads; i++) {
        team->workers[i].index = malloc(longest * sizeof(uint32_t));
        team->workers[i].value = malloc(longest * sizeof(float));
        fine = team->workers[i].index && team->workers[i].value;
    }
    if (!fine || !(team->size = start_threads(team, threads))) { team_free(team); return NULL; }
    return team;
}
