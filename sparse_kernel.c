/*
Decodes a CWIC model in C11: what cwic.py computes in eval mode, but reading only the weights a token uses.

Decoding a token is mostly waiting for weights: each takes part in one multiplication and one addition, so a
token takes as long as its weights take to arrive from memory. A weight that is not read is time saved, if
memory likes the order of those that are. So the weights that one input is multiplied with lie side by side,
in a row, and a token that skips the input skips the whole row.

Build it with: python build_kernel.py. decoder.py packs models for it, and checks them first.

In this order: the structs; small maths; rows, where the time goes; a matrix for one token; a matrix for the
many tokens of a prompt; attention, and the whole step; the team of threads.

Not here: more than one sequence, f16, GPUs, Windows, compilers other than gcc and clang. Threads do not
survive fork(): make a new team there.
*/

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

// -----------------------------------------------------------------------------
// the structs. build_kernel.py takes the declarations up to "end of interface" from here

enum { F32, BF16, INT8 };       // formats of weights; everything else is f32
enum { GPT2, LLAMA };           // architectures
enum { BATCH = 64 };            // tokens that can be read at once
enum { BLOCK = 64 };            // numbers that are added up in registers
enum { SPLITS = 4 };            // pieces that the inputs of a matrix are cut into, at most

typedef struct {                // a matrix with thresholds: a StripedLinear, or Llama's Neurons
    size_t n_in, n_out;
    size_t stripe;              // columns that share thresholds; n = ceil(n_out / stripe), the last narrower
    size_t tile;                // columns computed together: stripes are cut into tiles, the last narrower,
    size_t splits;              // and each tile's inputs into splits, to make tasks for all threads
    const void *weight;         // (n_in, width) for each tile in turn; Neurons (n_in, 2, n_out), see add_rows
    const float *thresholds;    // (n, n_in)
    const float *mu;            // (n_in) the usual value of each input
    const float *row_scale;     // (n, n_in) and (n_out) for INT8, where a weight is row_scale * column_scale
    const float *column_scale;  //   * byte; otherwise NULL
    const float *base;          // (n_out) mu @ W + b: the output when every input is as usual
} Matrix;                       // for decode(), thresholds to base must be side by side, in this order: they
                                // are prefetched together

typedef struct {
    const float *gain, *bias;   // (n_embd) each; bias may be NULL
} Norm;

typedef struct {
    Norm ln_1, ln_2;
    Matrix qkv, out, up, down;  // Llama: up is the gate, down are the neurons
} Layer;

typedef struct {
    int arch, dtype;
    size_t vocab_size, block_size, n_layer, n_head, n_kv_head, n_embd, n_hidden;
    float norm_eps;
    const float *wpe;           // (block_size, n_embd) GPT-2's positions
    const float *cos, *sin;     // (block_size, head_dim / 2) Llama's
    const Layer *layers;        // (n_layer)
    Norm ln_f;
    Matrix head;                // its columns are also the embeddings of the tokens, unless it has a basis:
    Matrix basis;               // (n_embd, n_embd) what its input is multiplied with first; or n_in is 0
    const void *embedding;      // (vocab_size, n_embd) in the format of weights, or NULL
    const float *embedding_row_scale, *embedding_column_scale;  // (vocab_size), (n_embd) for INT8, else NULL
    float margin;               // so far below the largest logit the shortlist ends; 0: there is none
} Model;

typedef struct {                // what a sequence has left behind, and where its next tokens are worked on
    void *k;                    // (n_layer, n_kv_head, ceil(block_size / BLOCK), head_dim, BLOCK)
    void *v;                    // (n_layer, n_kv_head, block_size, ceil(head_dim / BLOCK) * BLOCK)
                                // both f32 where weights are, else bf16
    float *x, *h;               // (BATCH, n_embd) the residual stream, and what a norm makes of it
    float *qkv;                 // (BATCH, (n_head + 2 * n_kv_head) * head_dim)
    float *mixed;               // (BATCH, n_embd) what attention gathered
    float *hidden;              // (BATCH, n_hidden)
} State;

typedef struct Team Team;       // threads

// longest: the largest n_in or block_size to come; sums: the largest tiles * splits * tile. NULL: no memory
Team *team_new(int threads, size_t longest, size_t sums);
int team_size(const Team *team);        // threads it really has
void team_free(Team *team);

// Reads count tokens, 1 to BATCH, the first at this position: logits (vocab_size) of the last one, and active
// (count, 4 * n_layer + 1), the weights that each token used of each matrix but the basis; a shortlist is
// counted for the last one. Many at once are read faster than one after the other, and give the same numbers,
// to the bit. 0, or -1 where a size, token or position is impossible
int decode(Team *team, const Model *model, const State *state, const uint32_t *tokens, size_t count,
           size_t position, float *logits, int64_t *active);

// One matrix alone, for tests and measurements: x (count, n_in) -> y (count, n_out), active (count). Neurons:
// x is what the gate says, and is overwritten; h (count, n_out) is what up is multiplied with, otherwise
// NULL. 0, or -1
int multiply_alone(Team *team, const Matrix *matrix, int dtype, size_t count, float *x, const float *h,
                   float *y, int64_t *active);

// end of interface

enum { COLUMNS = 2 * BLOCK };   // that are computed together for many tokens
enum { SHARING = 4 };           // heads that read keys and values together, at most

typedef struct {                // what each thread has for itself
    Team *team;
    pthread_t thread;
    uint32_t *index;            // (longest) rows that are active
    float *value;               // (longest) what they are multiplied with; or (SHARING, longest) scores
    float (*sums)[SPLITS][COLUMNS];     // (BATCH)
    int64_t active[BATCH];      // weights that each token used
} Worker;

typedef void Task(const void *argument, Worker *me, size_t task);

struct Team {
    int size;                   // threads, the calling one, which is the first, among them
    Worker *workers;            // (size)
    size_t longest, n_sums;
    float *sums;                // (n_sums) what the tasks of a matrix leave behind: (tiles, splits, tile)
    Task *function;             // what is being done: these may be read by a thread that has claimed a task
    const void *argument;
    size_t tasks;
    // what all threads write, each on a cache line of its own
    _Alignas(64) atomic_uint_fast64_t open;     // tasks not yet claimed; above them, 32 bits, the run
    _Alignas(64) atomic_size_t done;            // tasks done
    _Alignas(64) atomic_int sleeping;
    atomic_int stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
};

// does tasks 0, 1, ... in any order, each on whichever thread is free; returns when all are done
static void run_tasks(Team *team, size_t tasks, Task *function, const void *argument);

static size_t least(size_t a, size_t b) { return a < b ? a : b; }
static size_t pieces(size_t whole, size_t piece) { return (whole + piece - 1) / piece; }

// -----------------------------------------------------------------------------
// small maths. Loops are written so that compilers vectorise them: a sum needs leave to be reordered (omp
// simd), and exp, which libm computes one at a time, is written out

// GPT-2's LayerNorm, or Llama's RMSNorm, which does not centre
static void normalise(float *restrict y, const float *restrict x, Norm norm, const Model *m)
{
    size_t n = m->n_embd;
    float sum = 0, squares = 0, mean = 0;
    #pragma omp simd reduction(+:sum)
    for (size_t i = 0; i < n; i++) sum += x[i];
    if (m->arch == GPT2) mean = sum / (float)n;
    #pragma omp simd reduction(+:squares)
    for (size_t i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / sqrtf(squares / (float)n + m->norm_eps);
    for (size_t i = 0; i < n; i++)
        y[i] = (x[i] - mean) * scale * norm.gain[i] + (norm.bias ? norm.bias[i] : 0);
}

// e^x to 2 units in the last place: 2^n * e^r, where r, at most half of ln 2, is what n leaves. Adding 1.5 *
// 2^23 rounds x / ln 2 to the integer n and leaves n in the low bits of the sum
INLINE float exponential(float x)
{
    union { float f; uint32_t u; } n, power;
    x = x < -87 ? -87 : x > 88 ? 88 : x;                            // NaN passes through
    n.f = x * 1.44269504f + 12582912;
    float whole = n.f - 12582912;
    float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;    // ln 2 in two parts, the first one exact
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
    float largest = x[0], sum = 0;
    #pragma omp simd reduction(max:largest)
    for (size_t i = 0; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    for (size_t i = 0; i < n; i++) x[i] = exponential(x[i] - largest);
    #pragma omp simd reduction(+:sum)
    for (size_t i = 0; i < n; i++) sum += x[i];
    for (size_t i = 0; i < n; i++) x[i] /= sum;
}

// rotary positions: number j of the first half of a head and number j of its second half turn together
static void rotate(float *restrict head, const float *restrict cos, const float *restrict sin, size_t half)
{
    for (size_t j = 0; j < half; j++) {
        float a = head[j], b = head[half + j];
        head[j] = a * cos[j] - b * sin[j];
        head[half + j] = b * cos[j] + a * sin[j];
    }
}

// -----------------------------------------------------------------------------
// rows: which ones a token uses, and what they add up to

// The inputs from first to last that a stripe uses, centred (and scaled, for INT8): those with |x - mu| > t.
// A NaN is used too, so that it spreads, as in PyTorch, and does not pass for an input that is as usual.
// Returns how many
static size_t find_active(const Matrix *m, size_t stripe, const float *restrict x, size_t first, size_t last,
                          uint32_t *restrict index, float *restrict value)
{
    const float *restrict mu = m->mu, *restrict t = m->thresholds + stripe * m->n_in;
    const float *restrict scale = m->row_scale ? m->row_scale + stripe * m->n_in : NULL;
    size_t n = 0, i = first;
#ifdef __AVX512F__
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= last; i += 16) {   // 16 are stored, however few are active: the next overwrite the rest
        __m512 c = _mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(mu + i));
        __mmask16 used = _mm512_cmp_ps_mask(_mm512_abs_ps(c), _mm512_loadu_ps(t + i), _CMP_NLE_UQ);
        if (scale) c = _mm512_mul_ps(c, _mm512_loadu_ps(scale + i));
        _mm512_storeu_ps(value + n, _mm512_maskz_compress_ps(used, c));
        __m512i numbers = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)i));
        _mm512_storeu_si512(index + n, _mm512_maskz_compress_epi32(used, numbers));
        n += (size_t)__builtin_popcount(used);
    }
#endif
    for (; i < last; i++) {             // no branch to mispredict: always written, kept by moving on
        float c = x[i] - mu[i];
        index[n] = (uint32_t)i;
        value[n] = scale ? c * scale[i] : c;
        n += !(fabsf(c) <= t[i]);
    }
    return n;
}

// calls function(..., dtype) with a constant instead, so that each format gets a loop of its own
#define FOR_FORMAT(dtype, function, ...) do { \
    if (dtype == F32) function(__VA_ARGS__, F32); \
    else if (dtype == BF16) function(__VA_ARGS__, BF16); \
    else function(__VA_ARGS__, INT8); } while (0)

INLINE size_t bytes(int dtype) { return dtype == F32 ? 4 : dtype == BF16 ? 2 : 1; }

// weight j of a row
INLINE float weight(const char *row, size_t j, int dtype)
{
    if (dtype == F32) return ((const float *)row)[j];
    if (dtype == INT8) return ((const int8_t *)row)[j];
    union { uint32_t u; float f; } bits = {(uint32_t)((const uint16_t *)row)[j] << 16};     // half an f32
    return bits.f;
}

// One register of numbers. (What is wider than a register, gcc stores in pieces, at a third of the speed)
#if defined(__AVX512F__)
#define REGISTER 64
#elif defined(__AVX__)
#define REGISTER 32
#else
#define REGISTER 16
#endif
enum { LANES = REGISTER / 4 };
typedef float Floats __attribute__((vector_size(REGISTER), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(REGISTER)));
typedef uint16_t Halves __attribute__((vector_size(REGISTER / 2), aligned(2), may_alias));
typedef int16_t Shorts __attribute__((vector_size(REGISTER / 2)));
typedef int8_t Bytes __attribute__((vector_size(REGISTER / 4), aligned(1), may_alias));

// weights j to j + LANES - 1 of a row, widened step by step, as gcc only finds instructions that double a
// width; of x86's other ones, and of AVX-512's, it must be told
INLINE Floats load(const char *row, size_t j, int dtype)
{
    if (dtype == F32) return *(const Floats *)(row + 4 * j);
#if defined(__AVX512F__)
    if (dtype == BF16)
        return (Floats)_mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(row + 2 * j))), 16);
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(row + j))));
#elif defined(__AVX2__)
    if (dtype == BF16)
        return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(row + 2 * j))),
                                         16);
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(row + j))));
#else
    if (dtype == BF16) return (Floats)(__builtin_convertvector(*(const Halves *)(row + 2 * j), Ints) << 16);
    Shorts wider = __builtin_convertvector(*(const Bytes *)(row + j), Shorts);
    return __builtin_convertvector(__builtin_convertvector(wider, Ints), Floats);
#endif
}

// Asks for a cache line of weights. Eight rows of f32 would fill the first-level cache, so they go into the
// second; narrower ones into the first: on AMD's processors (SSE4A is theirs alone) past the others, as no one
// will need them again soon, and through them elsewhere. On an AMD EPYC that detour costs 2 to 8%; on an Intel
// Xeon what goes past comes at half the speed
#if defined(__SSE4A__)
enum { LOCALITY = 0 };          // as __builtin_prefetch counts: 0, the first cache alone; 3, all of them
#else
enum { LOCALITY = 3 };
#endif
INLINE void request(const char *address, int dtype)
{
    if (dtype == F32) __builtin_prefetch(address, 0, 2);
    else __builtin_prefetch(address, 0, LOCALITY);
}

typedef struct {                // n rows of weights, and what each is multiplied with
    const char *weight;
    size_t stride, width;       // bytes from one row to the next; columns
    const uint32_t *index;      // (n) which rows
    float *value;               // (n)
    size_t n;
    const char *soon;           // (n_soon) bytes, some of what the next matrix needs before its rows
    size_t n_soon;
} Rows;

// Eight rows, so that sums are read and written once for eight weights. And rows are asked for before it is
// their turn: no prefetcher of the hardware can guess which one comes next, but we know. With every cache line
// of a row goes a request for the same line of the row eight further on
typedef struct {
    const char *row[8], *later[8];
    float value[8];
} Eight;

INLINE Eight take_eight(Rows rows, size_t k)
{
    Eight e;
    for (size_t r = 0; r < 8; r++) {    // past the end: the last row again, times nothing
        e.row[r] = rows.weight + rows.index[least(k + r, rows.n - 1)] * rows.stride;
        e.later[r] = rows.weight + rows.index[least(k + 8 + r, rows.n - 1)] * rows.stride;
        e.value[r] = k + r < rows.n ? rows.value[k + r] : 0;
    }
    return e;
}

// sums (width) += value[k] * row k, for up to eight rows from the k-th on: this is where a model's time goes
INLINE void add_eight(float *restrict sums, Rows rows, size_t k, int dtype)
{
    Eight e = take_eight(rows, k);
    for (size_t start = 0, line = 64 / bytes(dtype); start < rows.width; start += line) {
        size_t j = start, end = least(start + line, rows.width);
        for (size_t r = 0; r < 8; r++) request(e.later[r] + start * bytes(dtype), dtype);
        for (; j + LANES <= end; j += LANES) {
            Floats sum = *(Floats *)(sums + j);
            for (size_t r = 0; r < 8; r++) sum += e.value[r] * load(e.row[r], j, dtype);
            *(Floats *)(sums + j) = sum;
        }
        for (; j < end; j++)
            for (size_t r = 0; r < 8; r++) sums[j] += e.value[r] * weight(e.row[r], j, dtype);
    }
}

// value[k] *= row k . h (width), for up to eight rows from the k-th on
INLINE void dot_eight(Rows rows, size_t k, const float *restrict h, int dtype)
{
    Eight e = take_eight(rows, k);
    Floats sum[8] = {0};
    size_t j = 0, line = 64 / bytes(dtype);
    for (; j + LANES <= rows.width; j += LANES) {
        for (size_t r = 0; j % line == 0 && r < 8; r++) request(e.later[r] + j * bytes(dtype), dtype);
        for (size_t r = 0; r < 8; r++) sum[r] += load(e.row[r], j, dtype) * *(const Floats *)(h + j);
    }
    for (size_t r = 0; r < 8 && k + r < rows.n; r++) {
        float dot = 0;
        #pragma omp simd reduction(+:dot)
        for (size_t i = 0; i < LANES; i++) dot += sum[r][i];
        for (size_t i = j; i < rows.width; i++) dot += weight(e.row[r], i, dtype) * h[i];
        rows.value[k + r] *= dot;
    }
}

// sums (width) += value[k] * row k, for all rows. A row of neurons is a column of up and, next to it, a row
// of down: what the first makes of h multiplies the value before the second is added. With every eight rows a
// part of what the next matrix begins with is asked for
INLINE void add_rows(float *restrict sums, Rows rows, const float *restrict h, int dtype)
{
    Rows down = rows;
    size_t part = rows.n ? rows.n_soon / pieces(rows.n, 8) : 0;
    if (h) down.weight += rows.width * bytes(dtype);
    for (size_t k = 0; k < rows.n; k += 8) {
        for (size_t i = 0; i < part; i += 64) __builtin_prefetch(rows.soon + k / 8 * part + i, 0, 2);
        if (h) dot_eight(rows, k, h, dtype);
        add_eight(sums, down, k, dtype);
    }
}

// -----------------------------------------------------------------------------
// a matrix, for one token

typedef struct { size_t stripe, start, width; } Tile;      // columns start to start + width - 1

// tiles are numbered stripe by stripe; of the last stripe, which may be narrower, some may have no columns
static Tile find_tile(const Matrix *m, size_t number)
{
    size_t tiles = pieces(m->stripe, m->tile), stripe = number / tiles;
    size_t start = stripe * m->stripe + number % tiles * m->tile;
    size_t end = least((stripe + 1) * m->stripe, m->n_out);
    return (Tile){stripe, start, start < end ? least(end - start, m->tile) : 0};
}

static size_t count_tiles(const Matrix *m)
{
    return pieces(m->stripe, m->tile) * pieces(m->n_out, m->stripe);
}

static size_t split_start(const Matrix *m, size_t split) { return split * m->n_in / m->splits; }

enum { STORE, ADD, GELU, SILU };    // outputs replace y, are added to it, or replace it after a function

typedef struct {                // a matrix at work
    Team *team;
    const Matrix *matrix;
    int dtype, then;
    size_t count;               // tokens
    float *x;                   // (count, n_in)
    const float *h;             // (count, n_out) for neurons: what up is multiplied with; otherwise NULL
    float *y;                   // (count, n_out)
    const Matrix *next;         // the one after it, or NULL
} Product;

// the rows of a tile, none of them chosen yet
static Rows tile_rows(const Product *p, Tile tile, Worker *me)
{
    size_t column = bytes(p->dtype) * (p->h ? 2 : 1);
    const char *weight = (const char *)p->matrix->weight + tile.start * p->matrix->n_in * column;
    return (Rows){weight, tile.width * column, tile.width, me->index, me->value, 0, NULL, 0};
}

// adds the splits of a tile, `apart` numbers apart, into the first: in this order, whichever was done first
static void add_splits(float *sums, size_t splits, size_t apart, size_t width)
{
    for (size_t split = 1; split < splits; split++)
        for (size_t j = 0; j < width; j++) sums[j] += sums[split * apart + j];
}

// what the rows of some columns have added up to becomes the outputs of a token
static void finish(const Product *p, size_t token, float *sums, size_t start, size_t width)
{
    const Matrix *m = p->matrix;
    float *y = p->y + token * m->n_out + start;
    for (size_t j = 0; m->column_scale && j < width; j++) sums[j] *= m->column_scale[start + j];
    for (size_t j = 0; j < width; j++) sums[j] += m->base[start + j];
    if (p->then == GELU) gelu(sums, width);
    if (p->then == SILU) silu(sums, width);
    if (p->then == ADD) for (size_t j = 0; j < width; j++) y[j] += sums[j];
    else memcpy(y, sums, width * sizeof *y);
}

// a task is one split of a tile
static void multiply_task(const void *argument, Worker *me, size_t task)
{
    const Product *p = argument;
    const Matrix *m = p->matrix, *next = p->next;
    size_t split = task % m->splits;
    Tile tile = find_tile(m, task / m->splits);
    float *sums = p->team->sums + task * m->tile;
    Rows rows = tile_rows(p, tile, me);
    rows.n = find_active(m, tile.stripe, p->x, split_start(m, split), split_start(m, split + 1), me->index,
                         me->value);
    me->active[0] += (int64_t)(rows.n * tile.width * (p->h ? 2 : 1));
    if (next) {
        size_t size = (size_t)((const char *)(next->base + next->n_out) - (const char *)next->thresholds);
        rows.n_soon = size / (count_tiles(m) * m->splits);
        rows.soon = (const char *)next->thresholds + task * rows.n_soon;
    }
    for (size_t k = 0; k < least(rows.n, 8); k++)       // nobody has asked for the first eight yet
        for (size_t i = 0; i < rows.stride; i += 64)
            request(rows.weight + rows.index[k] * rows.stride + i, p->dtype);
    memset(sums, 0, tile.width * sizeof *sums);
    FOR_FORMAT(p->dtype, add_rows, sums, rows, p->h);
    if (m->splits == 1) finish(p, 0, sums, tile.start, tile.width);
}

// -----------------------------------------------------------------------------
// a matrix, for many tokens at once. A block of weights is read and widened to f32 once, and then serves each
// token that uses it from the first-level cache. Sums are taken in the same order as for one token, so they
// are the same

INLINE void widen(float *restrict block, const char *from, size_t stride, size_t rows, size_t columns,
                  int dtype)
{
    for (size_t r = 0; r < rows; r++)
        for (size_t j = 0; j < columns; j++) block[r * BLOCK + j] = weight(from + r * stride, j, dtype);
}

// sums (BLOCK) += value[k] * row index[k] - first of the block
INLINE void add_block(float *restrict sums, const float *restrict block, const uint32_t *restrict index,
                      size_t first, const float *restrict value, size_t n)
{
    Floats sum[BLOCK / LANES];
    memcpy(sum, sums, sizeof sum);
    for (size_t k = 0; k < n; k++) {
        const float *row = block + (index[k] - first) * BLOCK;
        for (size_t j = 0; j < BLOCK / LANES; j++) sum[j] += value[k] * *(const Floats *)(row + LANES * j);
    }
    memcpy(sums, sum, sizeof sum);
}

// a task is some columns of a tile
static void multiply_many_task(const void *argument, Worker *me, size_t task)
{
    const Product *p = argument;
    const Matrix *m = p->matrix;
    Tile tile = find_tile(m, task / pieces(m->tile, COLUMNS));
    Rows rows = tile_rows(p, tile, me);
    size_t column = task % pieces(m->tile, COLUMNS) * COLUMNS, n[BATCH], last;
    if (column >= tile.width) return;
    size_t columns = least(COLUMNS, tile.width - column);
    float block[BLOCK * BLOCK] = {0}, value[BATCH][BLOCK];
    uint32_t index[BATCH][BLOCK];
    memset(me->sums, 0, p->count * sizeof *me->sums);
    for (size_t split = 0; split < m->splits; split++)
        for (size_t first = split_start(m, split); first < split_start(m, split + 1); first = last) {
            last = least(first + BLOCK, split_start(m, split + 1));
            for (size_t token = 0; token < p->count; token++) {
                const float *x = p->x + token * m->n_in;
                n[token] = find_active(m, tile.stripe, x, first, last, index[token], value[token]);
                if (!p->h) me->active[token] += (int64_t)(n[token] * columns);
            }
            for (size_t c = 0; c < columns; c += BLOCK) {
                const char *from = rows.weight + first * rows.stride + (column + c) * bytes(p->dtype);
                FOR_FORMAT(p->dtype, widen, block, from, rows.stride, last - first,
                           least(BLOCK, columns - c));
                for (size_t token = 0; token < p->count; token++)
                    add_block(me->sums[token][split] + c, block, index[token], first, value[token], n[token]);
            }
        }
    for (size_t token = 0; token < p->count; token++) {
        add_splits(me->sums[token][0], m->splits, COLUMNS, COLUMNS);
        finish(p, token, me->sums[token][0], tile.start + column, columns);
    }
}

INLINE void dot_rows(Rows rows, const float *h, int dtype)
{
    for (size_t k = 0; k < rows.n; k += 8) dot_eight(rows, k, h, dtype);
}

// The first half of BLOCK neurons: x, what the gate says, becomes what down is multiplied with, 0 where a
// neuron is not active. Then down is a matrix like any other, of which a token uses what is not 0
static void multiply_up_task(const void *argument, Worker *me, size_t task)
{
    const Product *p = argument;
    const Matrix *m = p->matrix;
    size_t first = task * BLOCK, last = least(first + BLOCK, m->n_in);
    Rows rows = tile_rows(p, find_tile(m, 0), me);
    for (size_t token = 0; token < p->count; token++) {
        float *x = p->x + token * m->n_in;
        rows.n = find_active(m, 0, x, first, last, me->index, me->value);
        FOR_FORMAT(p->dtype, dot_rows, rows, p->h + token * m->n_out);
        memset(x + first, 0, (last - first) * sizeof *x);
        for (size_t k = 0; k < rows.n; k++) x[me->index[k]] = me->value[k];
        me->active[token] += (int64_t)(2 * rows.n * m->n_out);
    }
}

// one token or many. The weights that each of them used go to every `step`-th number of active
static void multiply(Product p, int64_t *active, size_t step)
{
    Team *team = p.team;
    const Matrix *m = p.matrix;
    Matrix down = *m;
    size_t tiles = count_tiles(m);
    if (p.count == 1) {
        run_tasks(team, tiles * m->splits, multiply_task, &p);
        for (size_t i = 0; m->splits > 1 && i < tiles; i++) {
            Tile tile = find_tile(m, i);
            float *sums = team->sums + i * m->splits * m->tile;
            add_splits(sums, m->splits, m->tile, tile.width);
            finish(&p, 0, sums, tile.start, tile.width);
        }
    } else {
        if (p.h) {
            run_tasks(team, pieces(m->n_in, BLOCK), multiply_up_task, &p);
            down.weight = (const char *)m->weight + m->n_out * bytes(p.dtype);
            down.thresholds = m->mu;                        // which are 0
            down.row_scale = NULL;
            p.matrix = &down;
        }
        run_tasks(team, tiles * pieces(m->tile, COLUMNS), multiply_many_task, &p);
    }
    for (size_t token = 0; token < p.count; token++) {
        active[token * step] = 0;
        for (int i = 0; i < team->size; i++) {
            active[token * step] += team->workers[i].active[token];
            team->workers[i].active[token] = 0;
        }
    }
}

// how many weights a token would use
static int64_t count_active(const Matrix *m, const float *x, Worker *me)
{
    size_t active = 0;
    for (size_t stripe = 0, start = 0; start < m->n_out; stripe++, start += m->stripe)
        active += least(m->stripe, m->n_out - start)
            * find_active(m, stripe, x, 0, m->n_in, me->index, me->value);
    return (int64_t)active;
}

// whether the sizes of a matrix agree with each other and with the team. Divisions cannot overflow, and each
// size is known to be small when it is multiplied
static int fits(const Team *team, const Matrix *m, int dtype, size_t n_in, size_t n_out)
{
    return n_in && n_out && m->n_in == n_in && m->n_out == n_out && n_in <= team->longest
        && n_out <= team->n_sums && m->stripe && m->stripe <= n_out && m->tile && m->tile <= m->stripe
        && m->splits && m->splits <= least(n_in, SPLITS)
        && count_tiles(m) <= team->n_sums / m->splits / m->tile
        && (dtype == F32 || dtype == BF16 || (dtype == INT8 && m->row_scale && m->column_scale));
}

// and whether what is prefetched is side by side: at most 63 bytes between one and the next, to align them
static int possible(const Team *team, const Matrix *m, int dtype, size_t n_in, size_t n_out)
{
    if (!fits(team, m, dtype, n_in, n_out)) return 0;
    size_t most = sizeof(float) * (2 * pieces(n_out, m->stripe) * n_in + n_in + n_out) + 4 * 63;
    uintptr_t thresholds = (uintptr_t)m->thresholds, base = (uintptr_t)m->base;
    return thresholds <= base && base - thresholds <= most;
}

int multiply_alone(Team *team, const Matrix *m, int dtype, size_t count, float *x, const float *h, float *y,
                   int64_t *active)
{
    if (!count || count > BATCH || !fits(team, m, dtype, m->n_in, m->n_out)) return -1;
    if (h && m->tile < m->n_out) return -1;
    multiply((Product){team, m, dtype, STORE, count, x, h, y, NULL}, active, 1);
    return 0;
}

// -----------------------------------------------------------------------------
// attention, and the whole step

typedef struct {
    const Model *model;
    const State *state;
    size_t count, position, layer;
    int dtype;                  // of keys and values
} Attention;

// a token's embedding, mostly its column of the head; GPT-2 adds one for its position
static void embed(const Model *m, float *x, size_t token, size_t position)
{
    const Matrix *head = &m->head;
    size_t stripe = token / head->stripe, tiles = pieces(head->stripe, head->tile);
    Tile tile = find_tile(head, stripe * tiles + token % head->stripe / head->tile);
    const char *tile_start = (const char *)head->weight + tile.start * head->n_in * bytes(m->dtype);
    for (size_t i = 0; i < m->n_embd; i++) {
        if (m->embedding) {
            x[i] = weight(m->embedding, token * m->n_embd + i, m->dtype);
            if (m->dtype == INT8) x[i] *= m->embedding_row_scale[token] * m->embedding_column_scale[i];
        } else {
            x[i] = weight(tile_start, i * tile.width + token - tile.start, m->dtype);
            if (m->dtype == INT8)
                x[i] *= head->row_scale[stripe * head->n_in + i] * head->column_scale[token];
        }
        if (m->arch == GPT2) x[i] += m->wpe[position * m->n_embd + i];
    }
}

// where the cache has what a head remembers of a position: of its key a number in each of head_dim rows; its
// value
static char *cached_key(const Attention *now, size_t head, size_t position)
{
    const Model *m = now->model;
    size_t of_block = m->n_embd / m->n_head * BLOCK, blocks = pieces(m->block_size, BLOCK);
    size_t block = (now->layer * m->n_kv_head + head) * blocks + position / BLOCK;
    return (char *)now->state->k + (block * of_block + position % BLOCK) * bytes(now->dtype);
}

static char *cached_value(const Attention *now, size_t head, size_t position)
{
    const Model *m = now->model;
    size_t width = pieces(m->n_embd / m->n_head, BLOCK) * BLOCK;
    size_t row = (now->layer * m->n_kv_head + head) * m->block_size + position;
    return (char *)now->state->v + row * width * bytes(now->dtype);
}

static void put(char *to, size_t i, float x, int dtype)
{
    union { float f; uint32_t u; } bits = {x};
    if (dtype == F32) ((float *)to)[i] = x;
    else ((uint16_t *)to)[i] = (uint16_t)(x != x ? 0x7fc0 : (bits.u + 0x7fff + (bits.u >> 16 & 1)) >> 16);
}

// Llama's queries and keys are turned to their position; keys and values join the cache
static void remember(const Attention *now, float *qkv, size_t position)
{
    const Model *m = now->model;
    size_t size = m->n_embd / m->n_head, half = size / 2;
    for (size_t i = 0; m->arch == LLAMA && i < m->n_head + m->n_kv_head; i++)
        rotate(qkv + i * size, m->cos + position * half, m->sin + position * half, half);
    for (size_t i = 0; i < m->n_kv_head; i++) {
        const float *k = qkv + (m->n_head + i) * size, *v = k + m->n_kv_head * size;
        char *key = cached_key(now, i, position), *value = cached_value(now, i, position);
        for (size_t j = 0; j < size; j++) put(key, j * BLOCK, k[j], now->dtype);
        for (size_t j = 0; j < size; j++) put(value, j, v[j], now->dtype);
    }
}

// sums (heads, BLOCK) += value[head][k] * row k, for n rows, each widened once for all heads; the values of one
// head begin `apart` numbers after those of the last
INLINE void add_shared(size_t heads, float (*restrict sums)[BLOCK], const char *restrict rows, size_t stride,
                       const float *restrict value, size_t apart, size_t n, int dtype)
{
    // registers for each head at once: there are 32 with AVX-512, else 16
    const size_t wide = REGISTER == 64 ? 4 : heads == 1 ? 8 : heads == 2 ? 4 : 2;
    for (size_t start = 0; start < BLOCK; start += wide * LANES) {
        Floats sum[SHARING][8];
        for (size_t h = 0; h < heads; h++) memcpy(sum[h], sums[h] + start, wide * sizeof *sum[h]);
        for (size_t k = 0; k < n; k++)
            for (size_t j = 0; j < wide; j++) {
                Floats numbers = load(rows + k * stride * bytes(dtype), start + j * LANES, dtype);
                for (size_t h = 0; h < heads; h++) sum[h][j] += value[h * apart + k] * numbers;
            }
        for (size_t h = 0; h < heads; h++) memcpy(sums[h] + start, sum[h], wide * sizeof *sum[h]);
    }
}

// add_shared with constants, so that each number of heads and each format gets a loop of its own
static void add_heads(size_t heads, float (*sums)[BLOCK], const char *rows, size_t stride, const float *value,
                      size_t apart, size_t n, int dtype)
{
    switch (heads) {
    case 1: FOR_FORMAT(dtype, add_shared, 1, sums, rows, stride, value, apart, n); break;
    case 2: FOR_FORMAT(dtype, add_shared, 2, sums, rows, stride, value, apart, n); break;
    case 3: FOR_FORMAT(dtype, add_shared, 3, sums, rows, stride, value, apart, n); break;
    default: FOR_FORMAT(dtype, add_shared, SHARING, sums, rows, stride, value, apart, n);
    }
}

// Heads of one token that share keys and values, SHARING at most: each query is compared with all keys up to
// its position, and gathers their values
static void attend_task(const void *argument, Worker *me, size_t task)
{
    const Attention *now = argument;
    const Model *m = now->model;
    size_t size = m->n_embd / m->n_head, sharing = m->n_head / m->n_kv_head, parts = pieces(sharing, SHARING);
    size_t shared = task / now->count / parts, part = task / now->count % parts, token = task % now->count;
    size_t head = shared * sharing + part * SHARING, heads = least(SHARING, sharing - part * SHARING);
    size_t length = now->position + token + 1, width = pieces(size, BLOCK) * BLOCK;
    size_t longest = me->team->longest;
    const float *q = now->state->qkv + (token * (m->n_head + 2 * m->n_kv_head) + head) * size;
    float *y = now->state->mixed + (token * m->n_head + head) * size, *scores = me->value;
    float sums[SHARING][BLOCK];
    for (size_t t = 0; t < length; t += BLOCK) {
        memset(sums, 0, sizeof sums);
        add_heads(heads, sums, cached_key(now, shared, t), BLOCK, q, size, size, now->dtype);
        for (size_t h = 0; h < heads; h++)
            memcpy(scores + h * longest + t, sums[h], least(BLOCK, length - t) * sizeof *scores);
    }
    for (size_t h = 0; h < heads; h++) {
        for (size_t t = 0; t < length; t++) scores[h * longest + t] /= sqrtf((float)size);
        softmax(scores + h * longest, length);
    }
    for (size_t j = 0; j < size; j += BLOCK) {
        const char *values = cached_value(now, shared, 0) + j * bytes(now->dtype);
        memset(sums, 0, sizeof sums);
        add_heads(heads, sums, values, width, scores, longest, length, now->dtype);
        for (size_t h = 0; h < heads; h++)
            memcpy(y + h * size + j, sums[h], least(BLOCK, size - j) * sizeof *y);
    }
}

typedef struct {
    const Model *model;
    const float *h;             // (n_embd) what the head reads, not along its basis; scaled, for INT8
    float *logits;              // (vocab_size)
    float largest;              // of the logits, all of which are rough at first
} Shortlist;

// The logits of n_embd tokens: those of the likely ones become the products of h with their embeddings, which
// lie in one piece each, as columns of the head do not
static void shortlist_task(const void *argument, Worker *me, size_t task)
{
    const Shortlist *list = argument;
    const Model *m = list->model;
    size_t d = m->n_embd, first = task * d, last = least(first + d, m->vocab_size);
    Rows rows = {m->embedding, d * bytes(m->dtype), d, me->index, me->value, 0, NULL, 0};
    for (size_t i = first; i < last; i++) {
        me->index[rows.n] = (uint32_t)i;
        me->value[rows.n] = m->dtype == INT8 ? m->embedding_row_scale[i] : 1;
        rows.n += list->largest - list->logits[i] < m->margin;
    }
    FOR_FORMAT(m->dtype, dot_rows, rows, list->h);
    for (size_t k = 0; k < rows.n; k++) list->logits[me->index[k]] = me->value[k];
    me->active[0] += (int64_t)(rows.n * d);
}

// What is likely by its rough logit is computed again, with every weight. Returns how many these were. For
// INT8, h is scaled in place
static int64_t shortlist(Team *team, const Model *m, float *h, float *logits)
{
    for (size_t i = 0; m->dtype == INT8 && i < m->n_embd; i++) h[i] *= m->embedding_column_scale[i];
    float largest = logits[0];
    #pragma omp simd reduction(max:largest)
    for (size_t i = 0; i < m->vocab_size; i++) largest = logits[i] > largest ? logits[i] : largest;
    Shortlist list = {m, h, logits, largest};
    run_tasks(team, pieces(m->vocab_size, m->n_embd), shortlist_task, &list);
    int64_t used = 0;
    for (int i = 0; i < team->size; i++) {
        used += team->workers[i].active[0];
        team->workers[i].active[0] = 0;
    }
    return used;
}

int decode(Team *team, const Model *m, const State *s, const uint32_t *tokens, size_t count, size_t position,
           float *logits, int64_t *active)
{
    size_t d = m->n_embd, qkv = m->n_head && m->n_kv_head ? d + 2 * m->n_kv_head * (d / m->n_head) : 0;
    size_t row = 4 * m->n_layer + 1;        // numbers of active that each token has
    int gpt2 = m->arch == GPT2, dtype = m->dtype;
    if (!count || count > BATCH || position + count > m->block_size) return -1;
    if (m->block_size > team->longest) return -1;
    if (!m->n_layer || !qkv || d % m->n_head || m->n_head % m->n_kv_head) return -1;
    if (!possible(team, &m->head, dtype, d, m->vocab_size)) return -1;
    if (m->margin != 0 && !m->embedding) return -1;
    if (m->embedding && dtype == INT8 && !(m->embedding_row_scale && m->embedding_column_scale)) return -1;
    if (m->basis.n_in && (!m->embedding || !possible(team, &m->basis, dtype, d, d))) return -1;
    for (const Layer *l = m->layers; l < m->layers + m->n_layer; l++)
        if (!possible(team, &l->qkv, dtype, d, qkv) || !possible(team, &l->out, dtype, d, d)
            || !possible(team, &l->up, dtype, d, m->n_hidden)
            || !possible(team, &l->down, dtype, m->n_hidden, d) || (!gpt2 && l->down.tile < d)) return -1;
    for (size_t i = 0; i < count; i++) if (tokens[i] >= m->vocab_size) return -1;

    Attention now = {m, s, count, position, 0, dtype == F32 ? F32 : BF16};
    size_t groups = m->n_kv_head * pieces(m->n_head / m->n_kv_head, SHARING);       // of heads
    for (size_t i = 0; i < count; i++) embed(m, s->x + i * d, tokens[i], position + i);
    for (; now.layer < m->n_layer; now.layer++) {
        const Layer *l = &m->layers[now.layer];
        int64_t *used = active + 4 * now.layer;
        for (size_t i = 0; i < count; i++) normalise(s->h + i * d, s->x + i * d, l->ln_1, m);
        multiply((Product){team, &l->qkv, dtype, STORE, count, s->h, NULL, s->qkv, &l->out}, used, row);
        for (size_t i = 0; i < count; i++) remember(&now, s->qkv + i * qkv, position + i);
        run_tasks(team, groups * count, attend_task, &now);
        multiply((Product){team, &l->out, dtype, ADD, count, s->mixed, NULL, s->x, &l->up}, used + 1, row);
        for (size_t i = 0; i < count; i++) normalise(s->h + i * d, s->x + i * d, l->ln_2, m);
        int then = gpt2 ? GELU : SILU;
        multiply((Product){team, &l->up, dtype, then, count, s->h, NULL, s->hidden, &l->down}, used + 2, row);
        const float *h = gpt2 ? NULL : s->h;
        const Matrix *next = now.layer + 1 < m->n_layer ? &l[1].qkv : m->basis.n_in ? &m->basis : &m->head;
        multiply((Product){team, &l->down, dtype, ADD, count, s->hidden, h, s->x, next}, used + 3, row);
    }
    for (size_t i = 0; i < count; i++) normalise(s->h + i * d, s->x + i * d, m->ln_f, m);
    int64_t *used = active + row - 1;
    float *h = s->h;
    if (m->basis.n_in) {
        h = s->mixed;
        multiply((Product){team, &m->basis, dtype, STORE, count, s->h, NULL, h, &m->head}, used, row);
    }
    for (size_t i = 0; i < count; i++, h += d, used += row) {
        if (i + 1 < count) *used = count_active(&m->head, h, team->workers);        // no logits are asked for
        else multiply((Product){team, &m->head, dtype, STORE, 1, h, NULL, logits, &m->layers->qkv}, used, 1);
    }
    if (m->margin != 0) active[count * row - 1] += shortlist(team, m, s->h + (count - 1) * d, logits);
    return 0;
}

// -----------------------------------------------------------------------------
// the team of threads. The calling thread says what is to be done and in how many tasks, takes tasks itself,
// and goes on when all are done. The others claim tasks as long as there are any, so a thread that gets cheap
// ones, or a core to itself, does more; and one that a neighbour has pushed off its core is waited for only
// if it holds a task

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
static void work(Worker *me)
{
    Team *t = me->team;
    uint_fast64_t open = atomic_load_explicit(&t->open, memory_order_acquire);
    while (open & UINT32_MAX) {
        if (!atomic_compare_exchange_weak(&t->open, &open, open - 1)) continue;     // another was faster
        t->function(t->argument, me, t->tasks - (size_t)(open & UINT32_MAX));
        atomic_fetch_add_explicit(&t->done, 1, memory_order_acq_rel);
        open = atomic_load_explicit(&t->open, memory_order_acquire);
    }
}

static void run_tasks(Team *t, size_t tasks, Task *function, const void *argument)
{
    uint_fast64_t number = (atomic_load_explicit(&t->open, memory_order_relaxed) >> 32) + 1;
    t->function = function;
    t->argument = argument;
    t->tasks = tasks;
    atomic_store_explicit(&t->done, 0, memory_order_relaxed);
    atomic_store(&t->open, number << 32 | tasks);
    if (atomic_load(&t->sleeping)) {
        pthread_mutex_lock(&t->mutex);
        pthread_cond_broadcast(&t->wake);
        pthread_mutex_unlock(&t->mutex);
    }
    work(t->workers);
    for (unsigned tries = 0; atomic_load_explicit(&t->done, memory_order_acquire) < tasks; tries++)
        pause_a_moment(tries);
}

static void *thread_main(void *argument)
{
    Worker *me = argument;
    Team *t = me->team;
    for (unsigned tries = 0; !atomic_load(&t->stop); tries++) {
        if (atomic_load_explicit(&t->open, memory_order_relaxed) & UINT32_MAX) {
            work(me);
            tries = 0;
        } else if (tries < 6000) {
            pause_a_moment(tries);
        } else {                                            // nothing to do for a while: sleep
            pthread_mutex_lock(&t->mutex);
            atomic_fetch_add(&t->sleeping, 1);
            while (!(atomic_load(&t->open) & UINT32_MAX) && !atomic_load(&t->stop))
                pthread_cond_wait(&t->wake, &t->mutex);
            atomic_fetch_sub(&t->sleeping, 1);
            pthread_mutex_unlock(&t->mutex);
        }
    }
    return NULL;
}

int team_size(const Team *team) { return team->size; }

void team_free(Team *team)
{
    if (!team) return;
    pthread_mutex_lock(&team->mutex);
    atomic_store(&team->stop, 1);
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->mutex);
    for (int i = 0; i < team->size; i++) {
        if (i > 0) pthread_join(team->workers[i].thread, NULL);
        free(team->workers[i].sums);
    }
    pthread_cond_destroy(&team->wake);
    pthread_mutex_destroy(&team->mutex);
    free(team->workers);
    free(team->sums);
    free(team);
}

Team *team_new(int threads, size_t longest, size_t sums)
{
    if (threads < 1 || threads > 1024 || !longest || longest > UINT32_MAX) return NULL;
    if (!sums || sums > UINT32_MAX) return NULL;
    Team *team = aligned_alloc(64, sizeof *team);
    if (!team) return NULL;
    memset(team, 0, sizeof *team);
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->wake, NULL);
    team->longest = longest;
    team->n_sums = sums;
    team->sums = malloc(sums * sizeof *team->sums);
    team->workers = calloc((size_t)threads, sizeof *team->workers);
    for (; team->sums && team->workers && team->size < threads; team->size++) {
        Worker *w = &team->workers[team->size];
        w->sums = malloc(BATCH * sizeof *w->sums
                         + longest * (SHARING * sizeof *w->value + sizeof *w->index));
        if (!w->sums) break;
        w->team = team;
        w->value = (float *)(w->sums + BATCH);
        w->index = (uint32_t *)(w->value + SHARING * longest);
        if (team->size > 0 && pthread_create(&w->thread, NULL, thread_main, w)) {
            free(w->sums);              // a system short of threads gives fewer
            break;
        }
    }
    if (team->size) return team;
    team_free(team);
    return NULL;
}
