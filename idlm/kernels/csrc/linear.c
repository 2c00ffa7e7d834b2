/* y [rows, N] = x [rows, K] w for the few rows of a decode step. A general matrix product is slow
   there: reading w takes the time, so each weight is read once, in the order of memory.

   w is stored in panels of PANEL columns:

       panels[n / PANEL][k / side][n % PANEL][k % side]

   where `side` inputs are side by side: 1 for float32, 2 for bfloat16 and int8, 4 for uint8.

   A tile is a few rows by a few vectors of columns. Its sums stay in registers for a block of K:

       sum[row][v] += x[row][k] * w[k][v]

   While the tiles of a block are computed, each prefetches a part of the block that follows it in
   memory. The order of a sum does not depend on the rows beside it.

   bfloat16: two numbers are a 32-bit lane. A bfloat16 is the upper half of a float32, so a shift
   and a mask make two vectors of float32 weights. Products and sums are float32.

   int8: w[k][n] = scales[k / GROUP][n] code[k][n]. A row of x is rounded to 16 bits with one scale.
   Two 16-bit products per lane are added as integers, exactly, within a group.

   uint8, for MASK rows: the int8 codes plus 128. Activations are rounded to 8 bits, with a scale
   for each row and group. With VNNI, four products per lane are one instruction, which needs an
   unsigned factor. The 128 adds 128 times the sum of the row's codes, so a sum starts from minus
   that. */

#include <float.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LANES (VECTOR_BYTES / 4)
#define PANEL_VECTORS (PANEL / LANES)
#define BLOCK 1024           /* most inputs of a block */
#define MAX_ROWS 256         /* most rows of a chunk, see chunk_rows */
#define X_BYTES (512 << 10)  /* bytes of a chunk of rows: it stays in the second-level cache */
#define SMALLEST 1e-30f      /* smaller activations are rounded to 0 */
#define MAX_PREFETCH_TILES 8 /* so many tiles leave enough time to prefetch a block */

typedef float floats __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int16_t shorts __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));
typedef uint8_t codes __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
typedef int8_t bytes __attribute__((vector_size(VECTOR_BYTES / 2), aligned(1), may_alias));

/* Keep the compiler from fusing a product with the sum that it is added to. Not all processors can,
   and int8 gives the same bits on all of them. */
#if defined(__AVX512F__)
#define UNFUSED(product) __asm__("" : "+v"(product))
#elif defined(__x86_64__)
#define UNFUSED(product) __asm__("" : "+x"(product))
#elif defined(__aarch64__)
#define UNFUSED(product) __asm__("" : "+w"(product))
#else
#define UNFUSED(product) (void)(product)
#endif

/* sum += w * x for two pairs of 16 bits per lane. It is exact within a group, since
   GROUP * 127 * 32767 < 2^31. */
INLINE ints dot(ints sum, shorts w, int32_t pair) {
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(pair));
#elif defined(__AVX512BW__)
    return sum + (ints)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(pair));
#elif defined(__AVXVNNI__)
    return (ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(pair));
#elif defined(__AVX2__)
    return sum + (ints)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(pair));
#elif defined(__SSE2__)
    return sum + (ints)_mm_madd_epi16((__m128i)w, _mm_set1_epi32(pair));
#else
    ints both = (ints)w; /* little-endian: the lower half is w[0] */
    return sum + (both << 16 >> 16) * (int32_t)(int16_t)pair + (both >> 16) * (pair >> 16);
#endif
}

/* sum += w * x for four pairs of 8 bits per lane. Without VNNI this is correct, but slower than
   int8. */
INLINE ints dot4(ints sum, codes w, int32_t quad) {
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(quad));
#elif defined(__AVXVNNI__)
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(quad));
#else
    int32_t even = (int8_t)(quad >> 16) * 65536 + ((int8_t)quad & 0xffff);
    int32_t odd = (quad >> 24) * 65536 + ((int8_t)(quad >> 8) & 0xffff);
    sum = dot(sum, (shorts)((bits)w & 0x00ff00ffu), even);
    return dot(sum, (shorts)((bits)w >> 8 & 0x00ff00ffu), odd);
#endif
}

/* One block of a panel times a few rows of x. */
typedef struct {
    const char *block;
    const void *const *x;
    int64_t start, end;  /* the block's inputs */
    const float *scales; /* [groups, PANEL], int8 and uint8 */
    float *sums;         /* [rows, PANEL], of the blocks before and this one */
    const char *next;    /* the address to prefetch; each step adds `stride` bytes */
    int64_t stride;
} Job;

/* Prefetch `lines` cache lines for a step of a tile. */
INLINE void prefetch(const Job *job, int64_t step, const int lines) {
    for (int line = 0; line < lines; line++)
        __builtin_prefetch(job->next + step * job->stride + 64 * line, 0, 2);
}

INLINE void load_sums(const Job *job, floats sum[TILE_ROWS][PANEL_VECTORS], const int rows,
                      const int vectors, const int first_vector) {
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = ((const floats *)(job->sums + r * PANEL))[first_vector + v];
}

INLINE void store_sums(const Job *job, floats sum[TILE_ROWS][PANEL_VECTORS], const int rows,
                       const int vectors, const int first_vector) {
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            ((floats *)(job->sums + r * PANEL))[first_vector + v] = sum[r][v];
}

INLINE void tile_float32(const Job *job, const int rows, const int vectors, const int first_vector,
                         const int lines) {
    const floats *panel = (const floats *)job->block + first_vector;
    floats sum[TILE_ROWS][PANEL_VECTORS];
    load_sums(job, sum, rows, vectors, first_vector);
    for (int64_t k = job->start; k < job->end; k++, panel += PANEL_VECTORS) {
        floats w[PANEL_VECTORS];
        prefetch(job, k - job->start, lines);
        for (int v = 0; v < vectors; v++) w[v] = panel[v];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) sum[r][v] += ((const float *)job->x[r])[k] * w[v];
    }
    store_sums(job, sum, rows, vectors, first_vector);
}

INLINE void tile_bfloat16(const Job *job, const int rows, const int vectors, const int first_vector,
                          const int lines) {
    const bits *panel = (const bits *)job->block + first_vector;
    floats sum[TILE_ROWS][PANEL_VECTORS];
    load_sums(job, sum, rows, vectors, first_vector);
    for (int64_t k = job->start; k < job->end; k += 2, panel += PANEL_VECTORS) {
        const int64_t second = k + 1 < job->end ? k + 1 : k; /* after an odd end the weight is 0 */
        prefetch(job, (k - job->start) / 2, lines);
        floats w[PANEL_VECTORS]; /* the lower halves, then the upper: registers are few */
        for (int v = 0; v < vectors; v++) w[v] = (floats)(panel[v] << 16);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) sum[r][v] += ((const float *)job->x[r])[k] * w[v];
        for (int v = 0; v < vectors; v++) w[v] = (floats)(panel[v] & 0xffff0000u);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                sum[r][v] += ((const float *)job->x[r])[second] * w[v];
    }
    store_sums(job, sum, rows, vectors, first_vector);
}

INLINE void tile_int8(const Job *job, const int rows, const int vectors, const int first_vector,
                      const int lines) {
    const bytes *panel = (const bytes *)job->block + first_vector;
    floats sum[TILE_ROWS][PANEL_VECTORS];
    load_sums(job, sum, rows, vectors, first_vector);
    for (int64_t start = job->start; start < job->end; start += GROUP) {
        const floats *scales = (const floats *)(job->scales + start / GROUP * PANEL) + first_vector;
        const int64_t end = start + GROUP < job->end ? start + GROUP : job->end;
        ints exact[TILE_ROWS][PANEL_VECTORS];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) exact[r][v] = (ints){0};
        for (int64_t k = start; k < end; k += 2, panel += PANEL_VECTORS) {
            shorts w[PANEL_VECTORS];
            prefetch(job, (k - job->start) / 2, lines);
            for (int v = 0; v < vectors; v++) w[v] = __builtin_convertvector(panel[v], shorts);
            for (int r = 0; r < rows; r++) {
                int32_t pair;
                memcpy(&pair, (const int16_t *)job->x[r] + k, 4);
                for (int v = 0; v < vectors; v++) exact[r][v] = dot(exact[r][v], w[v], pair);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) {
                floats part = __builtin_convertvector(exact[r][v], floats) * scales[v];
                UNFUSED(part);
                sum[r][v] += part;
            }
    }
    store_sums(job, sum, rows, vectors, first_vector);
}

INLINE void tile_uint8(const Job *job, const int rows, const int vectors, const int first_vector,
                       const int lines) {
    const codes *panel = (const codes *)job->block + first_vector;
    floats sum[TILE_ROWS][PANEL_VECTORS];
    load_sums(job, sum, rows, vectors, first_vector);
    for (int64_t start = job->start; start < job->end; start += GROUP) {
        const floats *scales = (const floats *)(job->scales + start / GROUP * PANEL) + first_vector;
        const int64_t end = start + GROUP < job->end ? start + GROUP : job->end;
        const QuantGroup *group[TILE_ROWS];
        ints exact[TILE_ROWS][PANEL_VECTORS];
        for (int r = 0; r < rows; r++) {
            group[r] = (const QuantGroup *)job->x[r] + start / GROUP;
            for (int v = 0; v < vectors; v++) exact[r][v] = (ints){0} + group[r]->shift;
        }
        for (int64_t k = start; k < end; k += 4, panel += PANEL_VECTORS) {
            codes w[PANEL_VECTORS];
            prefetch(job, (k - job->start) / 4, lines);
            for (int v = 0; v < vectors; v++) w[v] = panel[v];
            for (int r = 0; r < rows; r++) {
                int32_t quad;
                memcpy(&quad, group[r]->codes + (k - start), 4);
                for (int v = 0; v < vectors; v++) exact[r][v] = dot4(exact[r][v], w[v], quad);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                sum[r][v] += __builtin_convertvector(exact[r][v], floats) * scales[v] *
                             group[r]->scale;
    }
    store_sums(job, sum, rows, vectors, first_vector);
}

INLINE void tile(const int format, const Job *job, const int rows, const int vectors,
                 const int first_vector, const int lines) {
    if (format == FLOAT32) tile_float32(job, rows, vectors, first_vector, lines);
    if (format == BFLOAT16) tile_bfloat16(job, rows, vectors, first_vector, lines);
    if (format == INT8) tile_int8(job, rows, vectors, first_vector, lines);
    if (format == UINT8) tile_uint8(job, rows, vectors, first_vector, lines);
}

/* Inputs of a step of a tile: those that are side by side in a panel. */
INLINE int64_t inputs_per_step(int format) {
    return format == FLOAT32 ? 1 : format == UINT8 ? 4 : 2;
}

INLINE int64_t num_steps(int format, int64_t inputs) {
    return (inputs + inputs_per_step(format) - 1) / inputs_per_step(format);
}

/* Vectors of columns of a tile. A tile of few rows has more, so that there are enough independent
   sums to hide the latency of an addition. */
INLINE int tile_vectors(int rows) {
    int most = TILE_ROWS * TILE_VECTORS / rows;
    return most >= PANEL_VECTORS ? PANEL_VECTORS : most >= 4 ? 4 : TILE_VECTORS;
}

/* All columns of a panel, for one tile's rows. */
INLINE void tile_panel(const int format, Job *job, const int rows, const int lines) {
    for (int first_vector = 0; first_vector < PANEL_VECTORS; first_vector += tile_vectors(rows)) {
        tile(format, job, rows, tile_vectors(rows), first_vector, lines);
        job->next += num_steps(format, job->end - job->start) * job->stride;
    }
}

/* A function for each number of rows: compilers allocate registers per function, and badly in large
   ones. The suffix is the number of cache lines that a step prefetches. */
#define VARIANT(format, rows)                                             \
    static __attribute__((noinline)) void format##_##rows(Job *job) {     \
        tile_panel(format, job, rows, 0);                                 \
    }                                                                     \
    static __attribute__((noinline)) void format##_##rows##_1(Job *job) { \
        tile_panel(format, job, rows, 1);                                 \
    }                                                                     \
    static __attribute__((noinline)) void format##_##rows##_2(Job *job) { \
        tile_panel(format, job, rows, 2);                                 \
    }
#if TILE_ROWS == 8
#define SIZES(V, format)                                    \
    V(format, 1) V(format, 2) V(format, 3) V(format, 4)     \
    V(format, 5) V(format, 6) V(format, 7) V(format, 8)
#elif TILE_ROWS == 6
#define SIZES(V, format) \
    V(format, 1) V(format, 2) V(format, 3) V(format, 4) V(format, 5) V(format, 6)
#else
#define SIZES(V, format) V(format, 1) V(format, 2) V(format, 3) V(format, 4) V(format, 5)
#endif
SIZES(VARIANT, FLOAT32)
SIZES(VARIANT, BFLOAT16)
SIZES(VARIANT, INT8)
SIZES(VARIANT, UINT8)

#define ENTRY(format, rows) {format##_##rows, format##_##rows##_1, format##_##rows##_2},
/* The function for a format, rows - 1, and the cache lines that a step prefetches */
static void (*const TILES[][TILE_ROWS][3])(Job *) = {
    [FLOAT32] = {SIZES(ENTRY, FLOAT32)},
    [BFLOAT16] = {SIZES(ENTRY, BFLOAT16)},
    [INT8] = {SIZES(ENTRY, INT8)},
    [UINT8] = {SIZES(ENTRY, UINT8)},
};

/* Inputs of a block: whole groups, and blocks of nearly equal size, so that each has the time to
   prefetch the next. */
static int64_t block_inputs(int64_t in) {
    int64_t blocks = (in + BLOCK - 1) / BLOCK, even = (in + blocks - 1) / blocks;
    return (even + GROUP - 1) / GROUP * GROUP;
}

/* Bytes of a panel that a step reads. */
INLINE int64_t step_bytes(int format) { return format == INT8 ? 2 * PANEL : 4 * PANEL; }

/* Rows of the next tile, if `left` rows are left: tiles of nearly equal size. */
static int64_t tile_rows(int64_t left) {
    int64_t tiles = (left + TILE_ROWS - 1) / TILE_ROWS;
    return (left + tiles - 1) / tiles;
}

/* Tiles of a block of a panel, at most MAX_PREFETCH_TILES. */
static int64_t tiles_of(int64_t rows) {
    int64_t tiles = 0;
    for (int64_t tile; rows && tiles < MAX_PREFETCH_TILES; rows -= tile)
        tile = tile_rows(rows), tiles += PANEL_VECTORS / tile_vectors((int)tile);
    return tiles < MAX_PREFETCH_TILES ? tiles : MAX_PREFETCH_TILES;
}

/* Whether the processor's own prefetcher is better than ours. It may be where a single tile reads a
   panel in order: it can have more lines in flight. With more arithmetic per line it falls behind,
   on some processors from two rows on, on others from six. So it is measured. */
static int64_t hardware_rows[] = {[FLOAT32] = 1, [BFLOAT16] = 1, [INT8] = 0, [UINT8] = 0};

void set_hardware_rows(int format, int64_t most) { hardware_rows[format] = most; }

static int hardware_prefetches(int format, int64_t rows) {
    return rows <= hardware_rows[format] && tile_vectors((int)rows) == PANEL_VECTORS;
}

/* sums [rows, PANEL] += x[from .. to] times one panel */
static void panel(const Product *p, const char *block, const float *scales, int64_t from,
                  int64_t to, float *sums) {
    const int format = p->w->format;
    const int64_t width = step_bytes(format), tiles = tiles_of(to - from);
    const int64_t stride = width / tiles, size = block_inputs(p->w->in);
    const int hardware = hardware_prefetches(format, to - from);
    for (int64_t start = 0; start < p->w->in; start += size) {
        int64_t end = start + size < p->w->in ? start + size : p->w->in,
                steps = num_steps(format, end - start);
        const char *next = block + steps * width, *stop = next + steps * width;
        Job job = {block, NULL, start, end, scales, NULL, next, stride};
        for (int64_t row = from, rows; row < to; row += rows) {
            rows = tile_rows(to - row);
            job.x = p->x + row, job.sums = sums + (row - from) * PANEL;
            TILES[format][rows - 1][hardware || job.next >= stop ? 0 : stride > 64 ? 2 : 1](&job);
        }
        block = next;
    }
}

static void finish(const Product *p, const float *sums, int64_t column, int64_t from, int64_t to) {
    int64_t width = p->w->out - column < PANEL ? p->w->out - column : PANEL;
    for (int64_t row = from; row < to; row++, sums += PANEL) {
        float *y = p->y[row] + column;
        if (p->w->format != INT8) {
            memcpy(y, sums, sizeof(float) * (size_t)width);
            continue;
        }
        for (int64_t n = 0; n < width; n++) y[n] = sums[n] * p->scales[row];
    }
}

/* Rows of a chunk: they stay in the second-level cache from one panel to the next. */
static int64_t chunk_rows(int64_t in) {
    int64_t fitting = X_BYTES / 4 / in / TILE_ROWS * TILE_ROWS;
    return fitting < TILE_ROWS ? TILE_ROWS : fitting < MAX_ROWS ? fitting : MAX_ROWS;
}

void multiply(const Product *p, int threads) {
    const int64_t step = chunk_rows(p->w->in);
    const int64_t panel_bytes = num_steps(p->w->format, p->w->in) * step_bytes(p->w->format);
    for (int64_t from = 0; from < p->rows; from += step) {
        int64_t to = from + step < p->rows ? from + step : p->rows;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int64_t column = 0; column < p->w->out; column += PANEL) {
            float sums[MAX_ROWS * PANEL] __attribute__((aligned(64)));
            memset(sums, 0, sizeof(float) * PANEL * (size_t)(to - from));
            const float *scales = p->w->scales + column * ((p->w->in + GROUP - 1) / GROUP);
            panel(p, (const char *)p->w->panels + column / PANEL * panel_bytes, scales, from, to,
                  sums);
            finish(p, sums, column, from, to);
        }
    }
}

/* The largest absolute value; NaN if there is a NaN. */
INLINE float largest_magnitude(const float *restrict from, int64_t size) {
    uint32_t top =
        0; /* the bits of absolute values are ordered as the values; NaN is the largest */
    for (int64_t k = 0; k < size; k++) {
        uint32_t bits;
        memcpy(&bits, from + k, 4);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float largest;
    memcpy(&largest, &top, 4);
    return largest;
}

/* The factor that maps values up to `largest` to numbers up to 2 * `limit`. Below SMALLEST it would
   be infinite; then it is 0, and all values are rounded to 0. */
INLINE float twice_rate(float largest, float limit) {
    return largest > SMALLEST && largest <= FLT_MAX ? 2 * limit / largest : 0;
}

/* Half of a number, rounded to the nearest integer; halves away from 0. It is done in integers:
   in floats, x * rate + 0.5 would be rounded once with a fused multiply-add and twice without, so
   instruction sets would disagree. */
INLINE int32_t nearest(float twice_number) {
    int32_t twice = (int32_t)twice_number;
    return (twice + (twice >= 0)) >> 1;
}

/* Round a row to 16-bit integers; returns their scale. `to` has room for `size` of them, rounded up
   to even. For a row with a NaN or an infinity the scale makes all products NaN. */
float quantise_row(const float *restrict from, int16_t *restrict to, int64_t size) {
    float largest = largest_magnitude(from, size), rate = twice_rate(largest, 32767);
    for (int64_t k = 0; k < size; k++) to[k] = (int16_t)nearest(from[k] * rate);
    if (size % 2) to[size] = 0;
    return largest / 32767;
}

/* Round a row to 8-bit groups. For a group with a NaN or an infinity the scale makes the row's
   products NaN. */
void quantise_groups(const float *restrict from, QuantGroup *restrict to, int64_t size) {
    for (; size > 0; from += GROUP, size -= GROUP, to++) {
        const int64_t count = size < GROUP ? size : GROUP;
        float largest = largest_magnitude(from, count), rate = twice_rate(largest, 127);
        int32_t sum = 0;
        for (int64_t k = 0; k < count; k++) {
            int32_t code = nearest(from[k] * rate);
            to->codes[k] = (int8_t)code;
            sum += code;
        }
        memset(to->codes + count, 0, (size_t)(GROUP - count));
        to->scale = largest / 127;
        to->shift = -128 * sum;
    }
}
