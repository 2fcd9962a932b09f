/*
Decodes a CWIC model, in C11. It computes the same as cwic.py in eval mode, but reads only the weights that a
token uses. For each matrix, with the mu and the thresholds found in training, it computes

    y = mu @ W + b + the sum of (x[i] - mu[i]) * W[i] over all inputs i with |x[i] - mu[i]| > threshold[i]

Each weight takes part in only one multiplication and one addition, so decoding a token takes as long as its
weights take to arrive from memory. A weight that is not read saves time, as long as the others can be read in
long runs. So the weights of one input lie side by side, in a row, and a token that skips an input does not
read its row. The tokens of a prompt are read 64 at a time, and each row once for all of them: there, skipped
weights are read, but not used.

Build it with: python build_kernel.py. decoder.py packs models for it, and checks tokens first.

In this order: the structs; small maths; rows, where the time goes; a matrix, for one token and for many;
attention; the whole step; the team of threads.

Not here: more than one sequence, f16, GPUs, Windows, compilers other than gcc and clang. Threads do not
survive fork(): make a new team in the child.
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
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

// -----------------------------------------------------------------------------
// the structs. build_kernel.py takes the declarations up to "end of interface" from here

enum { F32, BF16, INT8 };       // formats of weights; everything else is f32
enum { GPT2, LLAMA };           // architectures
enum { CHUNK = 64 };            // tokens of a prompt that are read together, at most
enum { BLOCK = 64 };            // numbers that are summed in registers
enum { SPLITS = 4 };            // splits of a matrix, at most

// How a matrix is cut. The columns of a stripe share thresholds. A stripe is cut into tiles, narrow enough
// for the sums of one to stay in the first-level cache; each is stored as a matrix (n_in, width) of its own.
// The inputs are cut into splits, to make enough tasks for all threads:
//
//                 stripe 0           stripe 1
//             tile 0 | tile 1    tile 2 | tile 3
//   split 0   task 0 | task 2    task 4 | task 6
//   split 1   task 1 | task 3    task 5 | task 7
typedef struct {                // a StripedLinear, or Llama's Neurons
    size_t n_in, n_out;
    size_t stripe, tile;        // columns of each; the last stripe, and a stripe's last tile, may be narrower
    size_t splits;
    const void *weight;         // (n_in, width) for each tile in turn; Neurons: (n_in, 2, n_out), up and down
    // for decode(), thresholds to base must lie side by side in this order: they are prefetched as one range
    const float *thresholds;    // (n, n_in), n = ceil(n_out / stripe)
    const float *mu;            // (n_in) the usual value of each input; Neurons: zeros
    const float *row_scale;     // (n, n_in) for INT8, where a weight is row_scale * column_scale * integer;
    const float *column_scale;  // (n_out)   otherwise NULL
    const float *base;          // (n_out) mu @ W + b: the outputs if every input has its usual value
} Matrix;

typedef struct {
    const float *gain, *bias;   // (n_embd) each; bias may be NULL
} Norm;

typedef struct {
    Norm ln_1, ln_2;
    Matrix qkv, out, up, down;  // Llama: up is the gate, down holds the neurons
} Layer;

typedef struct {
    int arch, dtype;
    size_t vocab_size, block_size, n_layer, n_head, n_kv_head, n_embd, n_hidden;
    float norm_eps;
    const float *wpe;           // (block_size, n_embd) positions of GPT-2
    const float *cos, *sin;     // (block_size, head_dim / 2) positions of Llama
    const Layer *layers;        // (n_layer)
    Norm ln_f;
    Matrix head;                // without an embedding below, its columns are also the tokens' embeddings
    Matrix basis;               // (n_embd, n_embd) a rotation of the head's input; n_in is 0 if there is none
    const void *embedding;      // (vocab_size, n_embd) in the format of weights, for a basis or a shortlist
    const float *embedding_row_scale, *embedding_column_scale;  // (vocab_size), (n_embd) for INT8, else NULL
    float margin;               // the shortlist: logits less than this below the largest; 0: there is none
} Model;

typedef struct {                // the KV cache of a sequence, and scratch memory for its next tokens
    void *k;                    // (n_layer, n_kv_head, ceil(block_size / BLOCK), head_dim, BLOCK)
    void *v;                    // (n_layer, n_kv_head, block_size, ceil(head_dim / BLOCK) * BLOCK)
                                // both f32 if weights are, else bf16
    float *x, *h;               // (CHUNK, n_embd) the residual stream, and its norm
    float *qkv;                 // (CHUNK, (n_head + 2 * n_kv_head) * head_dim)
    float *attn_out;            // (CHUNK, n_embd)
    float *hidden;              // (CHUNK, n_hidden)
} State;

typedef struct Team Team;       // threads

// longest: the largest n_in or block_size; sums: the largest tiles * splits * tile. NULL if out of memory
Team *team_new(int threads, size_t longest, size_t sums);
int team_size(const Team *team);        // threads it really has
void team_free(Team *team);

// Reads 1 to CHUNK tokens (count), the first of them at `position`. Writes the logits (vocab_size) of the
// last token, and active (count, 4 * n_layer + 1): the weights that each token used of each matrix but the
// basis; a shortlist is counted for the last token only. Reading tokens together takes less time than one by
// one, and gives the same numbers, to the bit. Returns 0, or -1 if a size, token or position is impossible
int decode(Team *team, const Model *model, const State *state, const uint32_t *tokens, size_t count,
           size_t position, float *logits, int64_t *active);

// One matrix alone, for tests and measurements: x (count, n_in) -> y (count, n_out), active (count). Neurons:
// x is the output of the gate, and is overwritten; h (count, n_out) is the input of up. Otherwise h is NULL.
// Returns 0 or -1, as above
int multiply_alone(Team *team, const Matrix *matrix, int dtype, size_t count, float *x, const float *h,
                   float *y, int64_t *active);

// end of interface

enum { PANEL = 2 * BLOCK };     // columns of a task, if there are many tokens
enum { GROUP = 4 };             // query heads that read the same keys and values together, at most

typedef struct {                // what each thread has for itself
    Team *team;
    pthread_t thread;
    uint32_t *index;            // (longest) active rows
    float *value;               // (longest) their factors; in attention: (GROUP, longest) scores
    float (*sums)[SPLITS][PANEL];       // (CHUNK)
    int64_t active[CHUNK];      // weights that each token used
} Worker;

typedef void Task(const void *argument, Worker *me, size_t task);

struct Team {
    int size;                   // threads, including the calling thread, which is the first
    Worker *workers;            // (size)
    size_t longest, n_sums;
    float *sums;                // (n_sums) results of the tasks of a matrix: (tiles, splits, tile)
    Task *function;             // the work to do: only a thread that has claimed a task may read these
    const void *argument;
    size_t tasks;
    // written by all threads, so each has a cache line of its own
    _Alignas(64) atomic_uint_fast64_t open;     // low 32 bits: tasks not yet claimed; high: number of the run
    _Alignas(64) atomic_size_t done;            // tasks done
    _Alignas(64) atomic_int sleeping;
    atomic_int stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
};

// does tasks 0, 1, ... in any order, each on whichever thread is free; returns when all are done
static void run_tasks(Team *team, size_t tasks, Task *function, const void *argument);

static size_t min(size_t a, size_t b) { return a < b ? a : b; }
static size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
static size_t head_dim(const Model *m) { return m->n_embd / m->n_head; }

// -----------------------------------------------------------------------------
// small maths, written so that compilers vectorise it: sums may be reordered (omp simd), and exp is written
// out, as libm's takes one number at a time

// x (count, n_embd) -> y: GPT-2's LayerNorm, or Llama's RMSNorm, which does not centre
static void normalise(float *restrict y, const float *restrict x, size_t count, Norm norm, const Model *m) {
    size_t n = m->n_embd;
    for (size_t token = 0; token < count; token++, x += n, y += n) {
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
}

// e^x to 2 units in the last place, as 2^n * e^r with the integer n nearest to x / ln 2, so that r is at most
// half of ln 2. Adding 1.5 * 2^23 does the rounding, and leaves n in the low bits of the sum
INLINE float exponential(float x) {
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
static void gelu(float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        x[i] = x[i] / (1 + exponential(-1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
}

static void silu(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = x[i] / (1 + exponential(-x[i]));
}

// 16 maxima side by side, as clang does not vectorise a single one
static float maximum(const float *x, size_t n) {
    float lane[16], largest = x[0];
    size_t i = 0;
    for (size_t j = 0; j < 16; j++) lane[j] = x[0];
    for (; i + 16 <= n; i += 16) {
        #pragma omp simd
        for (size_t j = 0; j < 16; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    }
    for (; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    for (size_t j = 0; j < 16; j++) largest = lane[j] > largest ? lane[j] : largest;
    return largest;
}

static void softmax(float *x, size_t n) {
    float largest = maximum(x, n), sum = 0;
    for (size_t i = 0; i < n; i++) x[i] = exponential(x[i] - largest);
    #pragma omp simd reduction(+:sum)
    for (size_t i = 0; i < n; i++) sum += x[i];
    for (size_t i = 0; i < n; i++) x[i] /= sum;
}

// rotary positions: numbers j and half + j of a head are rotated together
static void rotate(float *restrict head, const float *restrict cos, const float *restrict sin, size_t half) {
    for (size_t j = 0; j < half; j++) {
        float a = head[j], b = head[half + j];
        head[j] = a * cos[j] - b * sin[j];
        head[half + j] = b * cos[j] + a * sin[j];
    }
}

// -----------------------------------------------------------------------------
// rows: which of them a token uses, and their sum

// Finds the inputs, from first to last - 1, that a stripe uses: those with |x - mu| > t. Writes their numbers
// to index, and x - mu (times the row's scale, for INT8) to value. Returns how many there are. A NaN counts
// as used, so that it spreads, as in PyTorch
static size_t find_active(const Matrix *m, size_t stripe, const float *restrict x, size_t first, size_t last,
                          uint32_t *restrict index, float *restrict value) {
    const float *restrict mu = m->mu, *restrict t = m->thresholds + stripe * m->n_in;
    const float *restrict scale = m->row_scale ? m->row_scale + stripe * m->n_in : NULL;
    size_t n = 0, i = first;
#ifdef __AVX512F__
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= last; i += 16) {   // stores 16, active or not; the next store overwrites the rest
        __m512 c = _mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(mu + i));
        __mmask16 used = _mm512_cmp_ps_mask(_mm512_abs_ps(c), _mm512_loadu_ps(t + i), _CMP_NLE_UQ);
        if (scale) c = _mm512_mul_ps(c, _mm512_loadu_ps(scale + i));
        _mm512_storeu_ps(value + n, _mm512_maskz_compress_ps(used, c));
        __m512i numbers = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)i));
        _mm512_storeu_si512(index + n, _mm512_maskz_compress_epi32(used, numbers));
        n += (size_t)__builtin_popcount(used);
    }
#endif
    for (; i < last; i++) {             // no branch to mispredict: stores each, and n decides if it stays
        float c = x[i] - mu[i];
        index[n] = (uint32_t)i;
        value[n] = scale ? c * scale[i] : c;
        n += !(fabsf(c) <= t[i]);
    }
    return n;
}

// calls function(..., dtype) with a constant dtype, so that the compiler makes a loop for each format
#define FOR_FORMAT(dtype, function, ...) do { \
    if (dtype == F32) function(__VA_ARGS__, F32); \
    else if (dtype == BF16) function(__VA_ARGS__, BF16); \
    else function(__VA_ARGS__, INT8); } while (0)

INLINE size_t bytes(int dtype) { return dtype == F32 ? 4 : dtype == BF16 ? 2 : 1; }

// weight j of a row
INLINE float weight(const char *row, size_t j, int dtype) {
    if (dtype == F32) return ((const float *)row)[j];
    if (dtype == INT8) return ((const int8_t *)row)[j];
    union { uint32_t u; float f; } bits = {(uint32_t)((const uint16_t *)row)[j] << 16};     // half an f32
    return bits.f;
}

// One register of numbers. (gcc stores a vector wider than a register in pieces, at a third of the speed)
#if defined(__AVX512F__)
#define REGISTER 64
#elif defined(__AVX__)
#define REGISTER 32
#else
#define REGISTER 16
#endif
enum { LANES = REGISTER / 4 };
typedef float Floats __attribute__((vector_size(REGISTER), aligned(4), may_alias));

// Weights j to j + LANES - 1 of a row. The loop at the end would do for every processor, but gcc turns it
// into several times as many instructions as necessary
INLINE Floats load(const char *row, size_t j, int dtype) {
    const void *p = row + j * bytes(dtype);
    if (dtype == F32) return *(const Floats *)p;
#if defined(__AVX512F__)
    if (dtype == BF16) return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16);
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
#elif defined(__AVX2__)
    if (dtype == BF16) return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16);
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
#elif defined(__aarch64__)
    if (dtype == BF16) return (Floats)vshll_n_u16(vld1_u16(p), 16);
    // each byte goes to the top of a lane, above zeros (there is no byte 255); then lanes are divided by 2^24
    const uint8x16_t top = {255, 255, 255, 0, 255, 255, 255, 1, 255, 255, 255, 2, 255, 255, 255, 3};
    uint32_t four;
    memcpy(&four, p, sizeof four);
    uint8x16_t lanes = vqtbl1q_u8(vreinterpretq_u8_u32(vdupq_n_u32(four)), top);
    return (Floats)vcvtq_n_f32_s32(vreinterpretq_s32_u8(lanes), 24);
#else
    Floats lanes = {0};
    for (size_t i = 0; i < LANES; i++) lanes[i] = weight(row, j + i, dtype);
    return lanes;
#endif
}

// Prefetches a cache line of weights. On an AMD EPYC (only AMD has SSE4A) int8 was decoded up to 1.6 times as
// fast if the second-level cache gets it, and not the first. Elsewhere that is only for f32, as eight rows of
// it would fill the first
#if defined(__SSE4A__)
enum { LOCALITY = 2 };          // __builtin_prefetch's: 2, the second level; 3, the first, too
#else
enum { LOCALITY = 3 };
#endif
INLINE void prefetch(const char *address, int dtype) {
    if (dtype == F32) __builtin_prefetch(address, 0, 2);
    else __builtin_prefetch(address, 0, LOCALITY);
}

typedef struct {                // the active rows of a matrix, and their factors
    const char *weight;
    size_t stride, width;       // bytes from one row to the next; columns
    const uint32_t *index;      // (n) numbers of the rows
    float *value;               // (n) factors
    size_t n;
    const char *ahead;          // (n_ahead) bytes to prefetch for the next matrix; may be none
    size_t n_ahead;
} Rows;

// Eight rows are added at a time, so that sums are loaded and stored once for eight weights. With each cache
// line of a row, the same line of the row eight further on is prefetched: the hardware cannot guess which
// rows come next, but we know
typedef struct {
    const char *row[8], *later[8];
    float value[8];
} Eight;

INLINE Eight take_eight(Rows rows, size_t k) {
    Eight e;
    for (size_t r = 0; r < 8; r++) {    // past the end, the last row again, times 0
        e.row[r] = rows.weight + rows.index[min(k + r, rows.n - 1)] * rows.stride;
        e.later[r] = rows.weight + rows.index[min(k + 8 + r, rows.n - 1)] * rows.stride;
        e.value[r] = k + r < rows.n ? rows.value[k + r] : 0;
    }
    return e;
}

// sums (width) += value[k] * row k, for eight rows from the k-th on: this is where a model's time goes
INLINE void add_eight(float *restrict sums, Rows rows, size_t k, int dtype) {
    Eight e = take_eight(rows, k);
    for (size_t start = 0, line = 64 / bytes(dtype); start < rows.width; start += line) {
        size_t j = start, end = min(start + line, rows.width);
        for (size_t r = 0; r < 8; r++) prefetch(e.later[r] + start * bytes(dtype), dtype);
        for (; j + LANES <= end; j += LANES) {
            Floats sum = *(Floats *)(sums + j);
            for (size_t r = 0; r < 8; r++) sum += e.value[r] * load(e.row[r], j, dtype);
            *(Floats *)(sums + j) = sum;
        }
        for (; j < end; j++)
            for (size_t r = 0; r < 8; r++) sums[j] += e.value[r] * weight(e.row[r], j, dtype);
    }
}

// value[k] *= the dot product of row k and h (width), for eight rows from the k-th on
INLINE void dot_eight(Rows rows, size_t k, const float *restrict h, int dtype) {
    Eight e = take_eight(rows, k);
    Floats sum[8] = {0};
    size_t j = 0, line = 64 / bytes(dtype);
    for (; j + LANES <= rows.width; j += LANES) {
        if (j % line == 0)
            for (size_t r = 0; r < 8; r++) prefetch(e.later[r] + j * bytes(dtype), dtype);
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

INLINE void dot_rows(Rows rows, const float *h, int dtype) {
    for (size_t k = 0; k < rows.n; k += 8) dot_eight(rows, k, h, dtype);
}

// sums (width) += value[k] * row k, for all rows. A row of Neurons is a column of up, then a row of down: the
// dot product of the first and h multiplies the value, and the second is added. On the way, `ahead` is
// prefetched, an equal part with every eight rows
INLINE void add_rows(float *restrict sums, Rows rows, const float *restrict h, int dtype) {
    Rows down = rows;
    size_t part = rows.n ? rows.n_ahead / ceil_div(rows.n, 8) : 0;
    if (h) down.weight += rows.width * bytes(dtype);
    for (size_t k = 0; k < rows.n; k += 8) {
        for (size_t i = 0; i < part; i += 64) __builtin_prefetch(rows.ahead + k / 8 * part + i, 0, 2);
        if (h) dot_eight(rows, k, h, dtype);
        add_eight(sums, down, k, dtype);
    }
}

// -----------------------------------------------------------------------------
// a matrix, for one token

typedef struct { size_t stripe, start, width; } Tile;      // columns start to start + width - 1

// tiles are numbered stripe by stripe; if the last stripe is narrow, its last tiles have no columns
static Tile find_tile(const Matrix *m, size_t number) {
    size_t tiles = ceil_div(m->stripe, m->tile), stripe = number / tiles;
    size_t start = stripe * m->stripe + number % tiles * m->tile;
    size_t end = min((stripe + 1) * m->stripe, m->n_out);
    return (Tile){stripe, start, start < end ? min(end - start, m->tile) : 0};
}

static size_t count_tiles(const Matrix *m) {
    return ceil_div(m->stripe, m->tile) * ceil_div(m->n_out, m->stripe);
}

static size_t split_start(const Matrix *m, size_t split) { return split * m->n_in / m->splits; }

enum { STORE, ADD, GELU, SILU };    // y = sums; y += sums; y = gelu(sums); y = silu(sums)

typedef struct {                // a multiplication: x -> y and active
    Team *team;
    const Matrix *matrix;
    int dtype, epilogue;        // the epilogue is one of STORE to SILU
    size_t count;               // tokens
    float *x;                   // (count, n_in)
    const float *h;             // (count, n_out) Neurons: the input of up; otherwise NULL
    float *y;                   // (count, n_out)
    int64_t *active;            // (count) weights that each token used,
    size_t stride;              //         so many numbers apart
    const Matrix *next;         // the next matrix to be multiplied, or NULL
} Product;

// all rows of a tile, none of them active yet
static Rows tile_rows(const Product *p, Tile tile, Worker *me) {
    size_t column_bytes = bytes(p->dtype) * (p->h ? 2 : 1);
    const char *weight = (const char *)p->matrix->weight + tile.start * p->matrix->n_in * column_bytes;
    return (Rows){.weight = weight, .stride = tile.width * column_bytes, .width = tile.width,
                  .index = me->index, .value = me->value};
}

// Adds the sums of all splits, which are `apart` numbers apart, to those of the first: always in this order,
// so the bits do not depend on which thread was faster
static void add_splits(float *sums, size_t splits, size_t apart, size_t width) {
    for (size_t split = 1; split < splits; split++)
        for (size_t j = 0; j < width; j++) sums[j] += sums[split * apart + j];
}

// turns the sums of some columns into a token's outputs; changes sums
static void finish(const Product *p, size_t token, float *sums, size_t start, size_t width) {
    const Matrix *m = p->matrix;
    float *y = p->y + token * m->n_out + start;
    if (m->column_scale)
        for (size_t j = 0; j < width; j++) sums[j] *= m->column_scale[start + j];
    for (size_t j = 0; j < width; j++) sums[j] += m->base[start + j];
    if (p->epilogue == GELU) gelu(sums, width);
    if (p->epilogue == SILU) silu(sums, width);
    if (p->epilogue == ADD) for (size_t j = 0; j < width; j++) y[j] += sums[j];
    else memcpy(y, sums, width * sizeof *y);
}

// task = tile * splits + split
static void multiply_task(const void *argument, Worker *me, size_t task) {
    const Product *p = argument;
    const Matrix *m = p->matrix, *next = p->next;
    size_t split = task % m->splits;
    Tile tile = find_tile(m, task / m->splits);
    float *sums = p->team->sums + task * m->tile;
    Rows rows = tile_rows(p, tile, me);
    rows.n = find_active(m, tile.stripe, p->x, split_start(m, split), split_start(m, split + 1), me->index,
                         me->value);
    me->active[0] += (int64_t)(rows.n * tile.width * (p->h ? 2 : 1));
    if (next) {                 // this task's part of the thresholds to base of the next matrix
        size_t size = (size_t)((const char *)(next->base + next->n_out) - (const char *)next->thresholds);
        rows.n_ahead = size / (count_tiles(m) * m->splits);
        rows.ahead = (const char *)next->thresholds + task * rows.n_ahead;
    }
    for (size_t k = 0; k < min(rows.n, 8); k++)         // add_eight prefetches only the rows after these
        for (size_t i = 0; i < rows.stride; i += 64)
            prefetch(rows.weight + rows.index[k] * rows.stride + i, p->dtype);
    memset(sums, 0, tile.width * sizeof *sums);
    FOR_FORMAT(p->dtype, add_rows, sums, rows, p->h);
    if (m->splits == 1) finish(p, 0, sums, tile.start, tile.width);
}

static void multiply_one(const Product *p) {
    const Matrix *m = p->matrix;
    size_t tiles = count_tiles(m);
    run_tasks(p->team, tiles * m->splits, multiply_task, p);
    if (m->splits == 1) return;
    for (size_t i = 0; i < tiles; i++) {
        Tile tile = find_tile(m, i);
        float *sums = p->team->sums + i * m->splits * m->tile;
        add_splits(sums, m->splits, m->tile, tile.width);
        finish(p, 0, sums, tile.start, tile.width);
    }
}

// -----------------------------------------------------------------------------
// a matrix, for many tokens. A block of weights is read and widened to f32 once, and stays in the first-level
// cache while each token adds the rows that it uses, in the same order as add_rows, so the sums are the same

INLINE void widen(float *restrict block, const char *from, size_t stride, size_t rows, size_t columns,
                  int dtype) {
    for (size_t r = 0; r < rows; r++)
        for (size_t j = 0; j < columns; j++) block[r * BLOCK + j] = weight(from + r * stride, j, dtype);
}

// sums (BLOCK) += value[k] * row index[k], for n rows of a block that begins with row `first`
INLINE void add_block(float *restrict sums, const float *restrict block, const uint32_t *restrict index,
                      size_t first, const float *restrict value, size_t n) {
    Floats sum[BLOCK / LANES];
    memcpy(sum, sums, sizeof sum);
    for (size_t k = 0; k < n; k++) {
        const float *row = block + (index[k] - first) * BLOCK;
        for (size_t j = 0; j < BLOCK / LANES; j++) sum[j] += value[k] * *(const Floats *)(row + LANES * j);
    }
    memcpy(sums, sum, sizeof sum);
}

// task = tile * panels + panel: some columns of a tile
static void multiply_many_task(const void *argument, Worker *me, size_t task) {
    const Product *p = argument;
    const Matrix *m = p->matrix;
    size_t panels = ceil_div(m->tile, PANEL), start = task % panels * PANEL, n[CHUNK], last;
    Tile tile = find_tile(m, task / panels);
    if (start >= tile.width) return;
    size_t width = min(PANEL, tile.width - start);
    Rows rows = tile_rows(p, tile, me);
    _Alignas(64) float block[BLOCK * BLOCK] = {0};      // else loads of 64 bytes straddle two cache lines
    float value[CHUNK][BLOCK];
    uint32_t index[CHUNK][BLOCK];
    memset(me->sums, 0, p->count * sizeof *me->sums);
    for (size_t split = 0; split < m->splits; split++)
        for (size_t first = split_start(m, split); first < split_start(m, split + 1); first = last) {
            last = min(first + BLOCK, split_start(m, split + 1));
            for (size_t token = 0; token < p->count; token++) {
                const float *x = p->x + token * m->n_in;
                n[token] = find_active(m, tile.stripe, x, first, last, index[token], value[token]);
                if (!p->h) me->active[token] += (int64_t)(n[token] * width);
            }
            for (size_t c = 0; c < width; c += BLOCK) {
                const char *from = rows.weight + first * rows.stride + (start + c) * bytes(p->dtype);
                FOR_FORMAT(p->dtype, widen, block, from, rows.stride, last - first, min(BLOCK, width - c));
                for (size_t token = 0; token < p->count; token++)
                    add_block(me->sums[token][split] + c, block, index[token], first, value[token], n[token]);
            }
        }
    for (size_t token = 0; token < p->count; token++) {
        add_splits(me->sums[token][0], m->splits, PANEL, PANEL);
        finish(p, token, me->sums[token][0], tile.start + start, width);
    }
}

// Up, for BLOCK neurons. Replaces x, the output of the gate, by the input of down: 0 for neurons that are not
// active. The rows of up are read for each token that uses them, and skipped by the others
static void multiply_up_task(const void *argument, Worker *me, size_t task) {
    const Product *p = argument;
    const Matrix *m = p->matrix;
    size_t first = task * BLOCK, last = min(first + BLOCK, m->n_in);
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

static void multiply_many(const Product *p) {
    const Matrix *m = p->matrix;
    Matrix down = *m;
    Product last = *p;
    if (p->h) {                 // up first; then down, which uses all inputs that are not 0
        run_tasks(p->team, ceil_div(m->n_in, BLOCK), multiply_up_task, p);
        const float *zeros = m->mu;
        down.weight = (const char *)m->weight + m->n_out * bytes(p->dtype);
        down.thresholds = zeros;
        down.row_scale = NULL;  // up has multiplied x by it
        last.matrix = &down;
    }
    run_tasks(p->team, count_tiles(m) * ceil_div(m->tile, PANEL), multiply_many_task, &last);
}

// -----------------------------------------------------------------------------
// a matrix, for any number of tokens: counts, checks, and the two ways above in one

// how many weights a token used: the sum of all threads' counts, which are set back to 0
static int64_t collect_active(Team *team, size_t token) {
    int64_t active = 0;
    for (int i = 0; i < team->size; i++) {
        active += team->workers[i].active[token];
        team->workers[i].active[token] = 0;
    }
    return active;
}

static void multiply(Product p) {
    if (p.count == 1) multiply_one(&p);
    else multiply_many(&p);
    for (size_t token = 0; token < p.count; token++)
        p.active[token * p.stride] = collect_active(p.team, token);
}

// how many weights a token would use
static int64_t count_active(const Matrix *m, const float *x, Worker *me) {
    size_t active = 0;
    for (size_t stripe = 0, start = 0; start < m->n_out; stripe++, start += m->stripe)
        active += min(m->stripe, m->n_out - start)
            * find_active(m, stripe, x, 0, m->n_in, me->index, me->value);
    return (int64_t)active;
}

// Whether the sizes of a matrix agree with each other and with the team. Nothing overflows: each size is
// known to be small before it is multiplied, and the rest is divisions
static int fits(const Team *team, const Matrix *m, int dtype, size_t n_in, size_t n_out) {
    return n_in && n_out && m->n_in == n_in && m->n_out == n_out && n_in <= team->longest
        && n_out <= team->n_sums && m->stripe && m->stripe <= n_out && m->tile && m->tile <= m->stripe
        && m->splits && m->splits <= min(n_in, SPLITS)
        && count_tiles(m) <= team->n_sums / m->splits / m->tile
        && (dtype == F32 || dtype == BF16 || (dtype == INT8 && m->row_scale && m->column_scale));
}

// Also whether thresholds to base, which are prefetched as one range, lie side by side: to be aligned, each
// starts at most 63 bytes after the end of the one before
static int valid(const Team *team, const Matrix *m, int dtype, size_t n_in, size_t n_out) {
    if (!fits(team, m, dtype, n_in, n_out)) return 0;
    size_t most = sizeof(float) * (2 * ceil_div(n_out, m->stripe) * n_in + n_in + n_out) + 4 * 63;
    uintptr_t thresholds = (uintptr_t)m->thresholds, base = (uintptr_t)m->base;
    return thresholds <= base && base - thresholds <= most;
}

int multiply_alone(Team *team, const Matrix *m, int dtype, size_t count, float *x, const float *h, float *y,
                   int64_t *active) {
    if (!count || count > CHUNK || !fits(team, m, dtype, m->n_in, m->n_out)) return -1;
    if (h && m->tile < m->n_out) return -1;
    multiply((Product){.team = team, .matrix = m, .dtype = dtype, .count = count, .x = x, .h = h, .y = y,
                       .epilogue = STORE, .active = active, .stride = 1});
    return 0;
}

// -----------------------------------------------------------------------------
// attention

typedef struct {                // tokens position to position + count - 1, in one layer
    const Model *model;
    const State *state;
    size_t count, position, layer;
    int kv_dtype;
} Step;

// The address of a position's key in the cache, one number in each of head_dim rows. The rows of a block
// belong to 64 positions, so that a query is compared with all of them at once
static char *cached_key(const Step *step, size_t kv_head, size_t position) {
    const Model *m = step->model;
    size_t block_size = head_dim(m) * BLOCK, blocks = ceil_div(m->block_size, BLOCK);
    size_t block = (step->layer * m->n_kv_head + kv_head) * blocks + position / BLOCK;
    return (char *)step->state->k + (block * block_size + position % BLOCK) * bytes(step->kv_dtype);
}

// the address of its value, a row
static char *cached_value(const Step *step, size_t kv_head, size_t position) {
    const Model *m = step->model;
    size_t width = ceil_div(head_dim(m), BLOCK) * BLOCK;
    size_t row = (step->layer * m->n_kv_head + kv_head) * m->block_size + position;
    return (char *)step->state->v + row * width * bytes(step->kv_dtype);
}

// to[i] = x, rounded to nearest for bf16
static void store(char *to, size_t i, float x, int dtype) {
    union { float f; uint32_t u; } bits = {x};
    if (dtype == F32) ((float *)to)[i] = x;
    else ((uint16_t *)to)[i] = (uint16_t)(x != x ? 0x7fc0 : (bits.u + 0x7fff + (bits.u >> 16 & 1)) >> 16);
}

// rotates a token's queries and keys to its position (Llama), and stores its keys and values in the cache
static void cache_kv(const Step *step, float *qkv, size_t position) {
    const Model *m = step->model;
    size_t size = head_dim(m), half = size / 2;
    if (m->arch == LLAMA)
        for (size_t i = 0; i < m->n_head + m->n_kv_head; i++)
            rotate(qkv + i * size, m->cos + position * half, m->sin + position * half, half);
    for (size_t i = 0; i < m->n_kv_head; i++) {
        const float *k = qkv + (m->n_head + i) * size, *v = k + m->n_kv_head * size;
        char *key = cached_key(step, i, position), *value = cached_value(step, i, position);
        for (size_t j = 0; j < size; j++) store(key, j * BLOCK, k[j], step->kv_dtype);
        for (size_t j = 0; j < size; j++) store(value, j, v[j], step->kv_dtype);
    }
}

// sums (heads, BLOCK) += value[head][k] * row k, for n rows, each widened once for all heads. The values of
// the heads are `apart` numbers apart
INLINE void add_shared(size_t heads, float (*restrict sums)[BLOCK], const char *restrict rows, size_t stride,
                       const float *restrict value, size_t apart, size_t n, int dtype) {
    // how many sums of each head stay in registers, of which there are 32 with AVX-512, else 16
    const size_t wide = REGISTER == 64 ? 4 : heads == 1 ? 8 : heads == 2 ? 4 : 2;
    for (size_t start = 0; start < BLOCK; start += wide * LANES) {
        Floats sum[GROUP][8];
        for (size_t h = 0; h < heads; h++) memcpy(sum[h], sums[h] + start, wide * sizeof *sum[h]);
        for (size_t k = 0; k < n; k++)
            for (size_t j = 0; j < wide; j++) {
                Floats numbers = load(rows + k * stride * bytes(dtype), start + j * LANES, dtype);
                for (size_t h = 0; h < heads; h++) sum[h][j] += value[h * apart + k] * numbers;
            }
        for (size_t h = 0; h < heads; h++) memcpy(sums[h] + start, sum[h], wide * sizeof *sum[h]);
    }
}

// add_shared with a constant number of heads, so that the compiler makes a loop for each
static void add_heads(size_t heads, float (*sums)[BLOCK], const char *rows, size_t stride, const float *value,
                      size_t apart, size_t n, int dtype) {
    switch (heads) {
    case 1: FOR_FORMAT(dtype, add_shared, 1, sums, rows, stride, value, apart, n); break;
    case 2: FOR_FORMAT(dtype, add_shared, 2, sums, rows, stride, value, apart, n); break;
    case 3: FOR_FORMAT(dtype, add_shared, 3, sums, rows, stride, value, apart, n); break;
    default: FOR_FORMAT(dtype, add_shared, GROUP, sums, rows, stride, value, apart, n);
    }
}

// task = (kv_head * parts + part) * count + token: GROUP or fewer of the query heads that share a key head
static void attend_task(const void *argument, Worker *me, size_t task) {
    const Step *step = argument;
    const Model *m = step->model;
    size_t size = head_dim(m), queries = m->n_head / m->n_kv_head, parts = ceil_div(queries, GROUP);
    size_t token = task % step->count;
    size_t part = task / step->count % parts;
    size_t kv_head = task / step->count / parts;
    size_t head = kv_head * queries + part * GROUP, heads = min(GROUP, queries - part * GROUP);
    size_t length = step->position + token + 1;         // positions that the token sees
    size_t width = ceil_div(size, BLOCK) * BLOCK, longest = me->team->longest;
    const float *q = step->state->qkv + (token * (m->n_head + 2 * m->n_kv_head) + head) * size;
    float *y = step->state->attn_out + (token * m->n_head + head) * size;
    float *scores = me->value, sums[GROUP][BLOCK];      // scores (heads, longest)
    for (size_t t = 0; t < length; t += BLOCK) {        // scores = q . keys
        memset(sums, 0, sizeof sums);
        add_heads(heads, sums, cached_key(step, kv_head, t), BLOCK, q, size, size, step->kv_dtype);
        for (size_t h = 0; h < heads; h++)
            memcpy(scores + h * longest + t, sums[h], min(BLOCK, length - t) * sizeof *scores);
    }
    for (size_t h = 0; h < heads; h++) {
        for (size_t t = 0; t < length; t++) scores[h * longest + t] /= sqrtf((float)size);
        softmax(scores + h * longest, length);
    }
    for (size_t j = 0; j < size; j += BLOCK) {          // y = scores @ values
        const char *values = cached_value(step, kv_head, 0) + j * bytes(step->kv_dtype);
        memset(sums, 0, sizeof sums);
        add_heads(heads, sums, values, width, scores, longest, length, step->kv_dtype);
        for (size_t h = 0; h < heads; h++)
            memcpy(y + h * size + j, sums[h], min(BLOCK, size - j) * sizeof *y);
    }
}

// -----------------------------------------------------------------------------
// the whole step

// x (n_embd) = a token's embedding, plus that of its position for GPT-2
static void embed(const Model *m, float *x, size_t token, size_t position) {
    const Matrix *head = &m->head;
    size_t stripe = token / head->stripe, tiles = ceil_div(head->stripe, head->tile);
    Tile tile = find_tile(head, stripe * tiles + token % head->stripe / head->tile);
    const char *tile_start = (const char *)head->weight + tile.start * head->n_in * bytes(m->dtype);
    for (size_t i = 0; i < m->n_embd; i++) {
        if (m->embedding) {
            x[i] = weight(m->embedding, token * m->n_embd + i, m->dtype);
            if (m->dtype == INT8) x[i] *= m->embedding_row_scale[token] * m->embedding_column_scale[i];
        } else {                // the token's column of the head
            x[i] = weight(tile_start, i * tile.width + token - tile.start, m->dtype);
            if (m->dtype == INT8)
                x[i] *= head->row_scale[stripe * head->n_in + i] * head->column_scale[token];
        }
        if (m->arch == GPT2) x[i] += m->wpe[position * m->n_embd + i];
    }
}

typedef struct {
    const Model *model;
    const float *h;             // (n_embd) the head's input, before the basis; times column scales, for INT8
    float *logits;              // (vocab_size)
    float largest;              // of the rough logits
} Shortlist;

// for n_embd tokens of the vocabulary: makes the logits of the likely ones exact, as dot products of h and
// their embeddings, each of which is a row that can be read alone
static void shortlist_task(const void *argument, Worker *me, size_t task) {
    const Shortlist *list = argument;
    const Model *m = list->model;
    size_t d = m->n_embd, first = task * d, last = min(first + d, m->vocab_size);
    Rows rows = {.weight = m->embedding, .stride = d * bytes(m->dtype), .width = d, .index = me->index,
                 .value = me->value};
    for (size_t i = first; i < last; i++) {
        me->index[rows.n] = (uint32_t)i;
        me->value[rows.n] = m->dtype == INT8 ? m->embedding_row_scale[i] : 1;
        rows.n += list->largest - list->logits[i] < m->margin;
    }
    FOR_FORMAT(m->dtype, dot_rows, rows, list->h);
    for (size_t k = 0; k < rows.n; k++) list->logits[me->index[k]] = me->value[k];
    me->active[0] += (int64_t)(rows.n * d);
}

// makes the logits of all likely tokens exact; returns how many weights that took. Changes h, for INT8
static int64_t shortlist(Team *team, const Model *m, float *h, float *logits) {
    if (m->dtype == INT8)
        for (size_t i = 0; i < m->n_embd; i++) h[i] *= m->embedding_column_scale[i];
    Shortlist list = {.model = m, .h = h, .logits = logits, .largest = maximum(logits, m->vocab_size)};
    run_tasks(team, ceil_div(m->vocab_size, m->n_embd), shortlist_task, &list);
    return collect_active(team, 0);
}

// whether all sizes fit each other and the team
static int valid_model(const Team *team, const Model *m) {
    int dtype = m->dtype, int8 = dtype == INT8;
    size_t d = m->n_embd;
    if (!m->n_layer || !m->n_head || !m->n_kv_head || d % m->n_head || m->n_head % m->n_kv_head) return 0;
    if (m->block_size > team->longest || !valid(team, &m->head, dtype, d, m->vocab_size)) return 0;
    if ((m->margin != 0 || m->basis.n_in) && !m->embedding) return 0;
    if (m->embedding && int8 && !(m->embedding_row_scale && m->embedding_column_scale)) return 0;
    if (m->basis.n_in && !valid(team, &m->basis, dtype, d, d)) return 0;
    for (const Layer *l = m->layers; l < m->layers + m->n_layer; l++)
        if (!valid(team, &l->qkv, dtype, d, d + 2 * m->n_kv_head * head_dim(m))
            || !valid(team, &l->out, dtype, d, d) || !valid(team, &l->up, dtype, d, m->n_hidden)
            || !valid(team, &l->down, dtype, m->n_hidden, d)
            || (m->arch != GPT2 && l->down.tile < d)) return 0;
    return 1;
}

// a multiplication for all tokens of a step: arguments are the fields of Product that change
#define MULTIPLY(...) \
    multiply((Product){.team = team, .dtype = m->dtype, .count = count, .stride = row, __VA_ARGS__})

int decode(Team *team, const Model *m, const State *s, const uint32_t *tokens, size_t count, size_t position,
           float *logits, int64_t *active) {
    if (!count || count > CHUNK || !valid_model(team, m)) return -1;
    if (position > m->block_size || count > m->block_size - position) return -1;
    for (size_t i = 0; i < count; i++) if (tokens[i] >= m->vocab_size) return -1;

    size_t d = m->n_embd, n_qkv = d + 2 * m->n_kv_head * head_dim(m), row = 4 * m->n_layer + 1;
    size_t groups = m->n_kv_head * ceil_div(m->n_head / m->n_kv_head, GROUP);       // of query heads
    const Matrix *last = m->basis.n_in ? &m->basis : &m->head;
    int gpt2 = m->arch == GPT2;
    Step step = {.model = m, .state = s, .count = count, .position = position,
                 .kv_dtype = m->dtype == F32 ? F32 : BF16};
    for (size_t i = 0; i < count; i++) embed(m, s->x + i * d, tokens[i], position + i);

    for (; step.layer < m->n_layer; step.layer++) {
        const Layer *l = &m->layers[step.layer];
        const Matrix *after = step.layer + 1 < m->n_layer ? &l[1].qkv : last;
        int64_t *used = active + 4 * step.layer;        // (count, 4), `row` numbers apart

        // x += attention(norm(x))
        normalise(s->h, s->x, count, l->ln_1, m);
        MULTIPLY(.matrix = &l->qkv, .x = s->h, .y = s->qkv, .epilogue = STORE, .active = used,
                 .next = &l->out);
        for (size_t i = 0; i < count; i++) cache_kv(&step, s->qkv + i * n_qkv, position + i);
        run_tasks(team, groups * count, attend_task, &step);
        MULTIPLY(.matrix = &l->out, .x = s->attn_out, .y = s->x, .epilogue = ADD, .active = used + 1,
                 .next = &l->up);

        // x += mlp(norm(x)). Llama: up is the gate, and the neurons read the norm, too
        normalise(s->h, s->x, count, l->ln_2, m);
        MULTIPLY(.matrix = &l->up, .x = s->h, .y = s->hidden, .epilogue = gpt2 ? GELU : SILU,
                 .active = used + 2, .next = &l->down);
        MULTIPLY(.matrix = &l->down, .x = s->hidden, .h = gpt2 ? NULL : s->h, .y = s->x, .epilogue = ADD,
                 .active = used + 3, .next = after);
    }

    // the head: logits of the last token; for the others, how many weights they would use
    normalise(s->h, s->x, count, m->ln_f, m);
    int64_t *used = active + 4 * m->n_layer;
    float *h = s->h;
    if (m->basis.n_in) {        // its weights are not counted here: the count of the head replaces theirs
        h = s->attn_out;
        MULTIPLY(.matrix = &m->basis, .x = s->h, .y = h, .epilogue = STORE, .active = used, .next = &m->head);
    }
    for (size_t i = 0; i + 1 < count; i++) used[i * row] = count_active(&m->head, h + i * d, team->workers);
    used += (count - 1) * row;
    multiply((Product){.team = team, .dtype = m->dtype, .count = 1, .stride = 1, .matrix = &m->head,
                       .x = h + (count - 1) * d, .y = logits, .epilogue = STORE, .active = used,
                       .next = &m->layers->qkv});
    if (m->margin != 0) *used += shortlist(team, m, s->h + (count - 1) * d, logits);
    return 0;
}

// -----------------------------------------------------------------------------
// the team of threads. The calling thread sets the tasks, does some itself, and returns when all are done.
// Threads claim one task at a time. So a thread whose tasks are cheap, or that has a core to itself, does
// more of them, and a thread that has lost its core delays the others only if it holds a task

static void pause_a_moment(unsigned tries) {
    // with a core for each thread the wait is short; otherwise the thread we wait for may need this core
    if (tries > 2000) { sched_yield(); return; }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// claims tasks and does them until none are left
static void work(Worker *me) {
    Team *t = me->team;
    uint_fast64_t open = atomic_load_explicit(&t->open, memory_order_acquire);
    while (open & UINT32_MAX) {
        if (!atomic_compare_exchange_weak(&t->open, &open, open - 1)) continue;     // another was faster
        t->function(t->argument, me, t->tasks - (size_t)(open & UINT32_MAX));
        atomic_fetch_add_explicit(&t->done, 1, memory_order_acq_rel);
        open = atomic_load_explicit(&t->open, memory_order_acquire);
    }
}

static void run_tasks(Team *t, size_t tasks, Task *function, const void *argument) {
    uint_fast64_t run = (atomic_load_explicit(&t->open, memory_order_relaxed) >> 32) + 1;
    t->function = function;
    t->argument = argument;
    t->tasks = tasks;
    atomic_store_explicit(&t->done, 0, memory_order_relaxed);
    atomic_store(&t->open, run << 32 | tasks);
    if (atomic_load(&t->sleeping)) {
        pthread_mutex_lock(&t->mutex);
        pthread_cond_broadcast(&t->wake);
        pthread_mutex_unlock(&t->mutex);
    }
    work(t->workers);
    for (unsigned tries = 0; atomic_load_explicit(&t->done, memory_order_acquire) < tasks; tries++)
        pause_a_moment(tries);
}

static void *thread_main(void *argument) {
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

void team_free(Team *team) {
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

Team *team_new(int threads, size_t longest, size_t sums) {
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
        // one block of memory: sums, value, index
        w->sums = malloc(CHUNK * sizeof *w->sums + longest * (GROUP * sizeof *w->value + sizeof *w->index));
        if (!w->sums) break;
        w->team = team;
        w->value = (float *)(w->sums + CHUNK);
        w->index = (uint32_t *)(w->value + GROUP * longest);
        if (team->size > 0 && pthread_create(&w->thread, NULL, thread_main, w)) {
            free(w->sums);              // a system short of threads gives fewer
            break;
        }
    }
    if (team->size) return team;
    team_free(team);
    return NULL;
}
