/*
One token through a CWIC model, in C11: what cwic.py does in eval mode, reading only the weights that the token uses.

Decoding one token is reading weights: each is used once, for one multiply and one add, so a token takes as long as its
weights take to arrive from memory. A weight that is not read is time saved, but only if memory likes the order of what is
left: so the weights are packed tile by tile, every tile row by row, and a skipped input is a skipped row of a tile.

To build it: python build_kernel.py. decoder.py packs a model for it, and every pointer it is given was checked there.

Top to bottom: the structs, the team of threads, the small maths, the thresholded matvec (where the time goes), the step.

But: one sequence at a time; no batches (prefill is PyTorch's work), no f16, no GPU. NaN and infinity in an input travel on
to the outputs, as in PyTorch (see compact). A team does not survive fork(): make a new one in the child.
*/

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(_WIN32) && !defined(PLAIN)         // PLAIN: as the tests build it too, without threads and intrinsics
#define THREADS
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#endif

#if defined(__AVX512F__) && !defined(PLAIN)
#define INTRINSICS
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address, 0, 2)     // into the second-level cache, which has room for it
#else
#define PREFETCH(address) ((void)0)
#endif

#define MAX_TILE 2048           // columns of the widest tile: their sums stay in the first-level cache

// ---------------------------------------------------------------------------------------------------------------------
// the structs. build_kernel.py takes the declarations up to "end of interface" from here

enum { F32, BF16, INT8 };       // formats of weights; everything else is f32

typedef struct {                // one striped linear layer
    size_t n_in, n_out;
    size_t stripe;              // columns that share their thresholds; n = ceil(n_out / stripe), the last may be narrower
    size_t tile;                // columns stored together: a stripe is cut into tiles, its last one may be narrower
    size_t parts;               // a tile's inputs are cut into parts, so that there are pieces for all threads
    const void *weight;         // (n_in, width) for each tile in turn; the tile that starts at column j is at j * n_in
    const float *scale;         // (n, n_in) for INT8, where a weight is scale * its byte; otherwise NULL
    const float *thresholds;    // (n, n_in)
    const float *mu;            // (n_in) the usual value of each input
    const float *base;          // (n_out) mu @ W + b: the output when every input is as usual
} Linear;

typedef struct {
    const float *gain, *bias;   // (n_embd) each; bias may be NULL
} Norm;

typedef struct {
    Norm ln_1, ln_2;
    Linear qkv, out, up, down;
} Block;

typedef struct {
    int dtype;
    size_t vocab_size, block_size, n_layer, n_head, n_embd;
    const float *wte;           // (vocab_size, n_embd): the head, transposed, so that a token is one row
    const float *wpe;           // (block_size, n_embd)
    const Block *blocks;        // (n_layer)
    Norm ln_f;
    Linear head;
} Model;

typedef struct {                // what a sequence has left behind, and room for the work on its next token
    float *k, *v;               // (n_layer, n_head, block_size, head_dim)
    float *x, *mixed;           // (n_embd) the residual stream; what attention gathered
    float *qkv;                 // (3 * n_embd)
    float *hidden;              // (4 * n_embd)
} State;

typedef struct Team Team;

// widest: the largest n_in, n_embd or block_size to come; room: the largest tiles * parts * tile. NULL: no memory
Team *team_new(int threads, size_t widest, size_t room);
int team_size(const Team *team);        // threads it really has
void team_free(Team *team);

// y (n_out) for the input x (n_in); active (1): weights used. 0, or -1 where sizes are impossible
int matvec(Team *team, const Linear *linear, int dtype, const float *x, float *y, int64_t *active);

// one token at a position: logits (vocab_size), active (4 * n_layer + 1): weights used by each matrix. 0, or -1 where sizes
// are impossible, or token or position out of range
int decode_token(Team *team, const Model *model, const State *state, size_t token, size_t position,
                 float *logits, int64_t *active);

// reads every byte once, on all threads: how fast memory is now. Returns a sum, so that no compiler leaves the reading out
uint64_t read_all(Team *team, const uint64_t *data, size_t count);

// end of interface

// ---------------------------------------------------------------------------------------------------------------------
// the team. Whoever calls leads: it says what is to be done and in how many pieces, takes pieces itself, and goes on when all
// are done. The others claim pieces as long as there are any, so whoever gets cheap ones, or a core to itself, does more; and
// one that a neighbour has pushed off its core is waited for only if it holds a piece

typedef struct {
    float *value;               // (widest) the active part of an input, packed together
    uint32_t *index;            // (widest) where it was
    float *scores;              // (widest) attention's
    int64_t active;             // weights used since somebody asked
} Worker;

typedef struct Job {
    void (*function)(const struct Job *, Worker *, size_t piece);
    Team *team;
    size_t pieces;
    const void *argument;
} Job;

#ifdef THREADS
typedef atomic_size_t Counter;
#else
typedef size_t Counter;
#endif

struct Team {
    int size, hired;
    size_t widest, room;
    Worker *workers;            // (hired), of whom size have a thread
    float *h;                   // (widest) a normalised input
    float *partial;             // (room) what each part of each tile adds up to
    Counter *finished;          // (room) parts of each tile that are done
#ifdef THREADS
    Job job;                    // may be read by who holds a piece of it
    // what all threads write, each on a cache line of its own
    _Alignas(64) atomic_uint_fast64_t open; // pieces not yet claimed; above them, in 32 bits, the number of the job
    _Alignas(64) Counter done;              // pieces done
    _Alignas(64) atomic_int sleeping;
    atomic_int stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    pthread_t *threads;         // (size - 1): the caller is one of the team
#endif
};

#ifdef THREADS

static size_t count_up(Counter *counter) { return atomic_fetch_add_explicit(counter, 1, memory_order_acq_rel); }

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

// claims pieces and does them until none are left
static void work(Team *team, int id)
{
    uint_fast64_t open = atomic_load_explicit(&team->open, memory_order_acquire);
    while (open & UINT32_MAX) {
        if (!atomic_compare_exchange_weak(&team->open, &open, open - 1)) continue;          // another was faster
        team->job.function(&team->job, &team->workers[id], team->job.pieces - (size_t)(open & UINT32_MAX));
        count_up(&team->done);
        open = atomic_load_explicit(&team->open, memory_order_acquire);
    }
}

static void share_out(Team *team, size_t pieces, void (*function)(const Job *, Worker *, size_t), const void *argument)
{
    uint_fast64_t number = (atomic_load_explicit(&team->open, memory_order_relaxed) >> 32) + 1;
    team->job = (Job){function, team, pieces, argument};
    atomic_store_explicit(&team->done, 0, memory_order_relaxed);
    atomic_store(&team->open, number << 32 | pieces);
    if (atomic_load(&team->sleeping)) {
        pthread_mutex_lock(&team->mutex);
        pthread_cond_broadcast(&team->wake);
        pthread_mutex_unlock(&team->mutex);
    }
    work(team, 0);
    for (unsigned tries = 0; atomic_load_explicit(&team->done, memory_order_acquire) < pieces; tries++)
        pause_a_moment(tries);
}

typedef struct { Team *team; int id; } Start;

static void *worker_main(void *argument)
{
    Start start = *(Start *)argument;
    Team *team = start.team;
    free(argument);
    for (unsigned tries = 0; !atomic_load(&team->stop); tries++) {
        if (atomic_load_explicit(&team->open, memory_order_relaxed) & UINT32_MAX) {
            work(team, start.id);
            tries = 0;
        } else if (tries < 6000) {
            pause_a_moment(tries);
        } else {                                            // nothing to do for a while: sleep
            pthread_mutex_lock(&team->mutex);
            atomic_fetch_add(&team->sleeping, 1);
            while (!(atomic_load(&team->open) & UINT32_MAX) && !atomic_load(&team->stop))
                pthread_cond_wait(&team->wake, &team->mutex);
            atomic_fetch_sub(&team->sleeping, 1);
            pthread_mutex_unlock(&team->mutex);
        }
    }
    return NULL;
}

static void start_threads(Team *team, int threads)
{
    team->size = 1;
    team->threads = calloc((size_t)threads, sizeof *team->threads);
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->wake, NULL);
    while (team->threads && team->size < threads) {         // a system short of threads gives a smaller team
        Start *start = malloc(sizeof *start);
        if (!start) break;
        *start = (Start){team, team->size};
        if (pthread_create(&team->threads[team->size - 1], NULL, worker_main, start)) { free(start); break; }
        team->size++;
    }
}

static void stop_threads(Team *team)
{
    pthread_mutex_lock(&team->mutex);
    atomic_store(&team->stop, 1);
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->mutex);
    for (int i = 0; i < team->size - 1; i++) pthread_join(team->threads[i], NULL);
    free(team->threads);
    pthread_cond_destroy(&team->wake);
    pthread_mutex_destroy(&team->mutex);
}

#else

static size_t count_up(Counter *counter) { return (*counter)++; }

static void share_out(Team *team, size_t pieces, void (*function)(const Job *, Worker *, size_t), const void *argument)
{
    Job job = {function, team, pieces, argument};
    for (size_t piece = 0; piece < pieces; piece++) function(&job, team->workers, piece);
}

static void start_threads(Team *team, int threads) { (void)threads; team->size = 1; }
static void stop_threads(Team *team) { (void)team; }

#endif

int team_size(const Team *team) { return team->size; }

void team_free(Team *team)
{
    if (!team) return;
    if (team->size) stop_threads(team);
    for (int i = 0; team->workers && i < team->hired; i++) free(team->workers[i].value);
    free(team->workers);
    free(team->h);
    free(team->partial);
    free(team->finished);
    free(team);
}

Team *team_new(int threads, size_t widest, size_t room)
{
    if (threads < 1 || threads > 1024 || widest < 1 || widest > UINT32_MAX || room < 1 || room > UINT32_MAX) return NULL;
    Team *team = aligned_alloc(64, (sizeof *team + 63) / 64 * 64);
    if (!team) return NULL;
    memset(team, 0, sizeof *team);
    team->widest = widest;
    team->room = room;
    team->h = malloc(widest * sizeof *team->h);
    team->partial = malloc(room * sizeof *team->partial);
    team->finished = calloc(room, sizeof *team->finished);
    size_t width = (widest + 7) / 8 * 8;
    team->workers = calloc((size_t)threads, sizeof *team->workers);
    for (team->hired = 0; team->workers && team->hired < threads; team->hired++) {
        Worker *w = &team->workers[team->hired];
        if (!(w->value = malloc(3 * width * sizeof *w->value))) break;
        w->scores = w->value + width;
        w->index = (uint32_t *)(w->scores + width);
    }
    if (team->hired < threads || !team->h || !team->partial || !team->finished) { team_free(team); return NULL; }
    start_threads(team, threads);
    return team;
}

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

static float dot(const float *restrict a, const float *restrict b, size_t n)
{
    float s = 0;
    #pragma omp simd reduction(+:s)
    for (size_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}

static float sum_of_squares(const float *x, float mean, size_t n)
{
    float s = 0;
    #pragma omp simd reduction(+:s)
    for (size_t i = 0; i < n; i++) s += (x[i] - mean) * (x[i] - mean);
    return s;
}

static void normalise(float *restrict y, const float *restrict x, Norm norm, size_t n)
{
    float mean = sum(x, n) / (float)n;
    float scale = 1 / sqrtf(sum_of_squares(x, mean, n) / (float)n + 1e-5f);
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

static void softmax(float *x, size_t n)
{
    float largest = x[0];
    for (size_t i = 1; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    for (size_t i = 0; i < n; i++) x[i] = exponential(x[i] - largest);
    float scale = 1 / sum(x, n);
    for (size_t i = 0; i < n; i++) x[i] *= scale;
}

// ---------------------------------------------------------------------------------------------------------------------
// the thresholded matvec: by far the most time is spent inside add_rows, waiting for rows of weights to arrive

// the inputs from first to last that a stripe uses, centred and packed together: those with |x - mu| > t. A NaN is taken
// along, so that it spreads (as it does in PyTorch, where a masked NaN is 0 * NaN) and does not pass for an input that is
// as usual. Returns how many
static size_t compact(uint32_t *restrict index, float *restrict value, const float *restrict x,
                      const float *restrict mu, const float *restrict t, size_t first, size_t last)
{
    size_t n = 0, i = first;
#ifdef INTRINSICS
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= last; i += 16) {       // 16 are stored, however many are active: what comes next overwrites the rest
        __m512 c = _mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(mu + i));
        __mmask16 m = _mm512_cmp_ps_mask(_mm512_abs_ps(c), _mm512_loadu_ps(t + i), _CMP_NLE_UQ);
        _mm512_storeu_ps(value + n, _mm512_maskz_compress_ps(m, c));
        __m512i where = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)i));
        _mm512_storeu_si512(index + n, _mm512_maskz_compress_epi32(m, where));
        n += (size_t)__builtin_popcount(m);
    }
#endif
    for (; i < last; i++) {                 // no branch to mispredict: always written, kept by moving on
        float c = x[i] - mu[i];
        index[n] = (uint32_t)i;
        value[n] = c;
        n += !(fabsf(c) <= t[i]);
    }
    for (i = n; i % 8; i++) {               // add_rows takes eights: the last row again, times nothing
        index[i] = index[n - 1];
        value[i] = 0;
    }
    return n;
}

static inline float widen_f32(float w) { return w; }
static inline float widen_bf16(uint16_t w) { union { uint32_t u; float f; } x = {(uint32_t)w << 16}; return x.f; }
static inline float widen_int8(int8_t w) { return w; }

// a cache line's worth of columns of eight rows
#ifdef INTRINSICS   // gcc widens bytes by way of 16 bits, which costs a third of int8's speed: so we say it
static inline __m512 load_f32(const float *w) { return _mm512_loadu_ps(w); }
static inline __m512 load_bf16(const uint16_t *w)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)w)), 16));
}
static inline __m512 load_int8(const int8_t *w)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
}
#define ADD_LINE(LINE, widen, load)                                                                                    \
    for (size_t j = i; j < i + LINE; j += 16) {                                                                        \
        __m512 sum = _mm512_loadu_ps(y + j);                                                                           \
        for (size_t r = 0; r < 8; r++) sum = _mm512_fmadd_ps(_mm512_set1_ps(v[r]), load(w[r] + j), sum);               \
        _mm512_storeu_ps(y + j, sum);                                                                                  \
    }
#else
#define ADD_LINE(LINE, widen, load)                                                                                    \
    for (size_t j = i; j < i + LINE; j++)                                                                              \
        y[j] += v[0] * widen(w[0][j]) + v[1] * widen(w[1][j]) + v[2] * widen(w[2][j]) + v[3] * widen(w[3][j])          \
              + v[4] * widen(w[4][j]) + v[5] * widen(w[5][j]) + v[6] * widen(w[6][j]) + v[7] * widen(w[7][j]);
#endif

// y (width) += value (n) @ rows index (n) of W (n_in, width), n a multiple of 8. Eight rows at a time, so that y is read
// and written once for eight weights. What no prefetcher of the hardware can guess is which row comes next; we know, so with
// every cache line of each row we ask for the same line of the row eight further on, and for the first eight at once
#define ADD_ROWS(name, type, widen, load)                                                                              \
static void name(float *restrict y, const type *restrict W, size_t width,                                              \
                 const uint32_t *restrict index, const float *restrict value, size_t n)                                \
{                                                                                                                      \
    enum { LINE = 64 / sizeof(type) };                                                                                 \
    for (size_t r = 0; r < 8 && r < n; r++)                                                                            \
        for (size_t i = 0; i < width; i += LINE) PREFETCH(W + index[r] * width + i);                                   \
    for (size_t k = 0; k < n; k += 8) {                                                                                \
        const type *w[8], *soon[8];                                                                                    \
        const float *v = value + k;                                                                                    \
        for (size_t r = 0; r < 8; r++) {                                                                               \
            w[r] = W + index[k + r] * width;                                                                           \
            soon[r] = W + index[k + 8 < n ? k + 8 + r : n - 1] * width;                                                \
        }                                                                                                              \
        size_t i = 0;                                                                                                  \
        for (; i + LINE <= width; i += LINE) {                                                                         \
            for (size_t r = 0; r < 8; r++) PREFETCH(soon[r] + i);                                                      \
            ADD_LINE(LINE, widen, load)                                                                                \
        }                                                                                                              \
        for (; i < width; i++)                                                                                         \
            for (size_t r = 0; r < 8; r++) y[i] += v[r] * widen(w[r][i]);                                              \
    }                                                                                                                  \
}

ADD_ROWS(add_rows_f32, float, widen_f32, load_f32)
ADD_ROWS(add_rows_bf16, uint16_t, widen_bf16, load_bf16)
ADD_ROWS(add_rows_int8, int8_t, widen_int8, load_int8)

enum { STORE, ADD, GELU };      // what becomes of a matrix's outputs: they replace y, are added to it, or pass through GELU

typedef struct {
    const Linear *linear;
    int dtype, then;
    const float *x;             // (n_in)
    float *y;                   // (n_out)
    size_t tiles;               // in each stripe but a narrower last one, which may have fewer
    size_t stripes;
} Product;

// one piece of a matrix: a part of a tile's inputs. Whoever does the last part of a tile adds all its parts up, always in
// the same order
static void product_piece(const Job *job, Worker *me, size_t piece)
{
    const Product *product = job->argument;
    const Linear *l = product->linear;
    Team *team = job->team;
    size_t tile = piece / l->parts, part = piece % l->parts, stripe = tile / product->tiles;
    size_t start = stripe * l->stripe + tile % product->tiles * l->tile;
    size_t end = stripe + 1 < product->stripes ? (stripe + 1) * l->stripe : l->n_out;
    if (start >= end) return;
    size_t width = end - start < l->tile ? end - start : l->tile;
    size_t n = compact(me->index, me->value, product->x, l->mu, l->thresholds + stripe * l->n_in,
                       part * l->n_in / l->parts, (part + 1) * l->n_in / l->parts);
    me->active += (int64_t)(n * width);

    _Alignas(64) float sums[MAX_TILE];
    memset(sums, 0, width * sizeof *sums);
    if (product->dtype == F32) {
        add_rows_f32(sums, (const float *)l->weight + start * l->n_in, width, me->index, me->value, n);
    } else if (product->dtype == BF16) {
        add_rows_bf16(sums, (const uint16_t *)l->weight + start * l->n_in, width, me->index, me->value, n);
    } else {
        const float *scale = l->scale + stripe * l->n_in;
        for (size_t k = 0; k < n; k++) me->value[k] *= scale[me->index[k]];
        add_rows_int8(sums, (const int8_t *)l->weight + start * l->n_in, width, me->index, me->value, n);
    }
    if (l->parts > 1) {
        memcpy(team->partial + piece * l->tile, sums, width * sizeof *sums);
        if (count_up(&team->finished[tile]) + 1 < l->parts) return;
        team->finished[tile] = 0;
        memset(sums, 0, width * sizeof *sums);
        for (size_t p = 0; p < l->parts; p++)
            for (size_t j = 0; j < width; j++) sums[j] += team->partial[(tile * l->parts + p) * l->tile + j];
    }
    float *y = product->y + start;
    for (size_t j = 0; j < width; j++) sums[j] += l->base[start + j];
    if (product->then == GELU) gelu(sums, width);
    if (product->then == ADD) for (size_t j = 0; j < width; j++) y[j] += sums[j];
    else memcpy(y, sums, width * sizeof *sums);
}

// the whole matrix. Returns the number of weights it used
static int64_t multiply(Team *team, const Linear *l, int dtype, const float *x, float *y, int then)
{
    size_t tiles = (l->stripe + l->tile - 1) / l->tile, stripes = (l->n_out + l->stripe - 1) / l->stripe;
    Product product = {l, dtype, then, x, y, tiles, stripes};
    share_out(team, stripes * tiles * l->parts, product_piece, &product);
    int64_t active = 0;
    for (int i = 0; i < team->size; i++) {
        active += team->workers[i].active;
        team->workers[i].active = 0;
    }
    return active;
}

// ---------------------------------------------------------------------------------------------------------------------
// the step

typedef struct {
    const Model *model;
    const State *state;
    size_t layer, position;
} Attention;

// one head: this token's key and value join the cache, then its query looks at all of them
static void attend(const Job *job, Worker *me, size_t head)
{
    const Attention *now = job->argument;
    const Model *m = now->model;
    const State *s = now->state;
    size_t d = m->n_embd, size = d / m->n_head, length = now->position + 1;
    float *k = s->k + (now->layer * m->n_head + head) * m->block_size * size;           // (block_size, size)
    float *v = s->v + (now->layer * m->n_head + head) * m->block_size * size;
    const float *q = s->qkv + head * size;
    float *y = s->mixed + head * size, scale = 1 / sqrtf((float)size);
    memcpy(k + now->position * size, q + d, size * sizeof *k);
    memcpy(v + now->position * size, q + 2 * d, size * sizeof *v);
    for (size_t t = 0; t < length; t++) me->scores[t] = dot(q, k + t * size, size) * scale;
    softmax(me->scores, length);
    memset(y, 0, size * sizeof *y);
    for (size_t t = 0; t < length; t++)
        for (size_t j = 0; j < size; j++) y[j] += me->scores[t] * v[t * size + j];
}

static int possible(const Team *team, const Linear *l, int dtype)
{
    if (!l->n_in || l->n_in > team->widest || !l->n_out || !l->stripe || l->stripe > l->n_out) return 0;
    if (!l->tile || l->tile > l->stripe || l->tile > MAX_TILE || !l->parts || l->parts > l->n_in) return 0;
    if (dtype < F32 || dtype > INT8 || (dtype == INT8 && !l->scale)) return 0;
    size_t tiles = (l->stripe + l->tile - 1) / l->tile * ((l->n_out + l->stripe - 1) / l->stripe);
    return l->parts == 1 || tiles * l->parts * l->tile <= team->room;
}

int decode_token(Team *team, const Model *model, const State *state, size_t token, size_t position,
                 float *logits, int64_t *active)
{
    const Model *m = model;
    if (token >= m->vocab_size || position >= m->block_size) return -1;
    if (m->block_size > team->widest || m->n_embd > team->widest || !m->n_head || m->n_embd % m->n_head) return -1;
    for (size_t i = 0; i < m->n_layer; i++) {
        const Block *b = &m->blocks[i];
        if (!possible(team, &b->qkv, m->dtype) || !possible(team, &b->out, m->dtype)
            || !possible(team, &b->up, m->dtype) || !possible(team, &b->down, m->dtype)) return -1;
    }
    if (!possible(team, &m->head, m->dtype)) return -1;

    size_t d = m->n_embd;
    for (size_t i = 0; i < d; i++) state->x[i] = m->wte[token * d + i] + m->wpe[position * d + i];
    for (size_t layer = 0; layer < m->n_layer; layer++) {
        const Block *b = &m->blocks[layer];
        Attention attention = {m, state, layer, position};
        normalise(team->h, state->x, b->ln_1, d);
        *active++ = multiply(team, &b->qkv, m->dtype, team->h, state->qkv, STORE);
        share_out(team, m->n_head, attend, &attention);
        *active++ = multiply(team, &b->out, m->dtype, state->mixed, state->x, ADD);
        normalise(team->h, state->x, b->ln_2, d);
        *active++ = multiply(team, &b->up, m->dtype, team->h, state->hidden, GELU);
        *active++ = multiply(team, &b->down, m->dtype, state->hidden, state->x, ADD);
    }
    normalise(team->h, state->x, m->ln_f, d);
    *active = multiply(team, &m->head, m->dtype, team->h, logits, STORE);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// one matrix alone, and memory alone: for the tests and for bench.py

int matvec(Team *team, const Linear *linear, int dtype, const float *x, float *y, int64_t *active)
{
    if (!possible(team, linear, dtype)) return -1;
    *active = multiply(team, linear, dtype, x, y, STORE);
    return 0;
}

enum { CHUNK = 1 << 15 };       // 256 KiB, claimed as pieces of matrices are

typedef struct { const uint64_t *data; size_t count; } Reading;

static void read_piece(const Job *job, Worker *me, size_t piece)
{
    const Reading *r = job->argument;
    size_t end = (piece + 1) * CHUNK < r->count ? (piece + 1) * CHUNK : r->count;
    uint64_t sum = 0;
    for (size_t i = piece * CHUNK; i < end; i++) sum += r->data[i];
    me->active += (int64_t)(sum & UINT32_MAX);
}

uint64_t read_all(Team *team, const uint64_t *data, size_t count)
{
    Reading reading = {data, count};
    share_out(team, (count + CHUNK - 1) / CHUNK, read_piece, &reading);
    uint64_t sum = 0;
    for (int i = 0; i < team->size; i++) {
        sum += (uint64_t)team->workers[i].active;
        team->workers[i].active = 0;
    }
    return sum;
}
