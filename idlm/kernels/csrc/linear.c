/* y [rows, N] = x [rows, K] w for the few rows of a decode step, where a general matrix product is slow.

   w lies in panels of PANEL columns, read from end to end:

       panels[n / PANEL][k / group][n % PANEL][k % group]       group 1: float32; 2: bfloat16, int8; 4: uint8

   A tile is some rows by some vectors of columns; its sums stay in registers over a block of K:

       sum[row][v] += x[row][k] * w[k][v]

   While the tiles of a block of a panel are computed, the block that follows it in memory is asked for, a part by each
   tile. The order of a sum does not depend on the rows beside it.

   bfloat16: two of them side by side are a 32-bit lane, and each is the upper half of a float32, so shifting and masking
   make two vectors of weights; products and sums are float32's.

   int8: w[k][n] = scales[k / GROUP][n] code[k][n], and a row of x is rounded to 16 bits, x[k] = scale number[k]. Two
   products of 16 bits a lane are added as integers, exactly, a group at a time.

   uint8, for MASK rows: the codes plus 128, by activations that are rounded to 8 bits, with a scale for each row and
   group. Four products a lane are one instruction where there is VNNI; it wants one factor without a sign. What 128 adds
   to a sum is known once the row is rounded, and sums start from its negative. */

#include <float.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LANES (VECTOR_BYTES / 4)
#define WHOLE (PANEL / LANES)   /* vectors of a panel */
#define BLOCK 1024              /* inputs at a time, at most */
#define MOST_ROWS 256           /* at a time */
#define X_BYTES (512 << 10)     /* of rows at a time: they stay in the second-level cache from panel to panel */
#define LEAST 1e-30f
#define MOST_PARTS 8            /* tiles that ask for the next block: with more of them there is time enough */

typedef float floats __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int16_t shorts __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));
typedef uint8_t codes __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
typedef int8_t bytes __attribute__((vector_size(VECTOR_BYTES / 2), aligned(1), may_alias));

/* Keeps a product from being fused with the sum it is added to: some processors cannot, and int8 gives the same bits on
   all of them. */
#if defined(__AVX512F__)
#define UNFUSED(product) __asm__("" : "+v"(product))
#elif defined(__x86_64__)
#define UNFUSED(product) __asm__("" : "+x"(product))
#elif defined(__aarch64__)
#define UNFUSED(product) __asm__("" : "+w"(product))
#else
#define UNFUSED(product) (void)(product)
#endif

/* sum += w * x for two pairs of 16 bits a lane; of a group's codes it is exact, since GROUP * 127 * 32767 < 2^31 */
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
    ints both = (ints)w; /* the lower half is the first: little-endian */
    return sum + (both << 16 >> 16) * (int32_t)(int16_t)pair + (both >> 16) * (pair >> 16);
#endif
}

/* sum += w * x for four pairs of 8 bits a lane; without VNNI it is right, but slower than int8 */
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

/* One block of one panel by some rows of x. */
typedef struct {
    const char *block;
    const void *const *x;
    int64_t start, end;  /* inputs */
    const float *scales; /* [groups, PANEL], int8 and uint8 */
    float *sums;        /* [rows, PANEL], so far */
    const char *next;   /* what to ask for from memory, `stride` bytes more with each step */
    int64_t stride;
} Job;

/* `lines` cache lines from where this step of the tile `at` has come to. */
INLINE void ask(const Job *job, int64_t step, const int lines) {
    for (int line = 0; line < lines; line++) __builtin_prefetch(job->next + step * job->stride + 64 * line, 0, 2);
}

INLINE void load(const Job *job, floats sum[TILE_ROWS][WHOLE], const int rows, const int vectors, const int first) {
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = ((const floats *)(job->sums + r * PANEL))[first + v];
}

INLINE void keep(const Job *job, floats sum[TILE_ROWS][WHOLE], const int rows, const int vectors, const int first) {
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) ((floats *)(job->sums + r * PANEL))[first + v] = sum[r][v];
}

INLINE void tile_float32(const Job *job, const int rows, const int vectors, const int first, const int lines) {
    const floats *panel = (const floats *)job->block + first;
    floats sum[TILE_ROWS][WHOLE];
    load(job, sum, rows, vectors, first);
    for (int64_t k = job->start; k < job->end; k++, panel += WHOLE) {
        floats w[WHOLE];
        ask(job, k - job->start, lines);
        for (int v = 0; v < vectors; v++) w[v] = panel[v];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) sum[r][v] += ((const float *)job->x[r])[k] * w[v];
    }
    keep(job, sum, rows, vectors, first);
}

INLINE void tile_bfloat16(const Job *job, const int rows, const int vectors, const int first, const int lines) {
    const bits *panel = (const bits *)job->block + first;
    floats sum[TILE_ROWS][WHOLE];
    load(job, sum, rows, vectors, first);
    for (int64_t k = job->start; k < job->end; k += 2, panel += WHOLE) {
        const int64_t second = k + 1 < job->end ? k + 1 : k; /* past an odd end the weight is 0 */
        ask(job, (k - job->start) / 2, lines);
        floats w[WHOLE]; /* one of the two at a time: registers are few */
        for (int v = 0; v < vectors; v++) w[v] = (floats)(panel[v] << 16);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) sum[r][v] += ((const float *)job->x[r])[k] * w[v];
        for (int v = 0; v < vectors; v++) w[v] = (floats)(panel[v] & 0xffff0000u);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) sum[r][v] += ((const float *)job->x[r])[second] * w[v];
    }
    keep(job, sum, rows, vectors, first);
}

INLINE void tile_int8(const Job *job, const int rows, const int vectors, const int first, const int lines) {
    const bytes *panel = (const bytes *)job->block + first;
    floats sum[TILE_ROWS][WHOLE];
    load(job, sum, rows, vectors, first);
    for (int64_t start = job->start; start < job->end; start += GROUP) {
        const floats *scales = (const floats *)(job->scales + start / GROUP * PANEL) + first;
        const int64_t end = start + GROUP < job->end ? start + GROUP : job->end;
        ints exact[TILE_ROWS][WHOLE];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) exact[r][v] = (ints){0};
        for (int64_t k = start; k < end; k += 2, panel += WHOLE) {
            shorts w[WHOLE];
            ask(job, (k - job->start) / 2, lines);
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
    keep(job, sum, rows, vectors, first);
}

INLINE void tile_uint8(const Job *job, const int rows, const int vectors, const int first, const int lines) {
    const codes *panel = (const codes *)job->block + first;
    floats sum[TILE_ROWS][WHOLE];
    load(job, sum, rows, vectors, first);
    for (int64_t start = job->start; start < job->end; start += GROUP) {
        const floats *scales = (const floats *)(job->scales + start / GROUP * PANEL) + first;
        const int64_t end = start + GROUP < job->end ? start + GROUP : job->end;
        const Piece *piece[TILE_ROWS];
        ints exact[TILE_ROWS][WHOLE];
        for (int r = 0; r < rows; r++) {
            piece[r] = (const Piece *)job->x[r] + start / GROUP;
            for (int v = 0; v < vectors; v++) exact[r][v] = (ints){0} + piece[r]->shift;
        }
        for (int64_t k = start; k < end; k += 4, panel += WHOLE) {
            codes w[WHOLE];
            ask(job, (k - job->start) / 4, lines);
            for (int v = 0; v < vectors; v++) w[v] = panel[v];
            for (int r = 0; r < rows; r++) {
                int32_t quad;
                memcpy(&quad, piece[r]->codes + (k - start), 4);
                for (int v = 0; v < vectors; v++) exact[r][v] = dot4(exact[r][v], w[v], quad);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                sum[r][v] += __builtin_convertvector(exact[r][v], floats) * scales[v] * piece[r]->scale;
    }
    keep(job, sum, rows, vectors, first);
}

INLINE void tile(const int format, const Job *job, const int rows, const int vectors, const int first, const int lines) {
    if (format == FLOAT32) tile_float32(job, rows, vectors, first, lines);
    if (format == BFLOAT16) tile_bfloat16(job, rows, vectors, first, lines);
    if (format == INT8) tile_int8(job, rows, vectors, first, lines);
    if (format == UINT8) tile_uint8(job, rows, vectors, first, lines);
}

/* Inputs that lie side by side, and are a step of a tile. */
INLINE int64_t inputs_of_step(int format) { return format == FLOAT32 ? 1 : format == UINT8 ? 4 : 2; }

/* Steps of so many inputs. */
INLINE int64_t steps_of(int format, int64_t inputs) {
    return (inputs + inputs_of_step(format) - 1) / inputs_of_step(format);
}

/* Vectors that a tile of so many rows takes: few rows take more, so that there are sums enough to hide their latency. */
INLINE int vectors_of(int rows) {
    int most = TILE_ROWS * TILE_VECTORS / rows;
    return most >= WHOLE ? WHOLE : most >= 4 ? 4 : TILE_VECTORS;
}

/* All columns of the panel. */
INLINE void columns(const int format, Job *job, const int rows, const int lines) {
    for (int first = 0; first < WHOLE; first += vectors_of(rows)) {
        tile(format, job, rows, vectors_of(rows), first, lines);
        job->next += steps_of(format, job->end - job->start) * job->stride;
    }
}

/* One function for each number of rows: compilers assign registers by the function, and badly in large ones. */
#define VARIANT(format, rows)                                                                            \
    static __attribute__((noinline)) void format##_##rows(Job *job) { columns(format, job, rows, 0); }   \
    static __attribute__((noinline)) void format##_##rows##_1(Job *job) { columns(format, job, rows, 1); } \
    static __attribute__((noinline)) void format##_##rows##_2(Job *job) { columns(format, job, rows, 2); }
#if TILE_ROWS == 8
#define SIZES(V, format) V(format, 1) V(format, 2) V(format, 3) V(format, 4) V(format, 5) V(format, 6) V(format, 7) V(format, 8)
#elif TILE_ROWS == 6
#define SIZES(V, format) V(format, 1) V(format, 2) V(format, 3) V(format, 4) V(format, 5) V(format, 6)
#else
#define SIZES(V, format) V(format, 1) V(format, 2) V(format, 3) V(format, 4) V(format, 5)
#endif
SIZES(VARIANT, FLOAT32)
SIZES(VARIANT, BFLOAT16)
SIZES(VARIANT, INT8)
SIZES(VARIANT, UINT8)

#define ENTRY(format, rows) {format##_##rows, format##_##rows##_1, format##_##rows##_2},
static void (*const TILES[][TILE_ROWS][3])(Job *) = {
    [FLOAT32] = {SIZES(ENTRY, FLOAT32)}, [BFLOAT16] = {SIZES(ENTRY, BFLOAT16)},
    [INT8] = {SIZES(ENTRY, INT8)}, [UINT8] = {SIZES(ENTRY, UINT8)}};

/* Inputs at a time: whole groups, and as even as they go, so that each block has the time to ask for the next. */
static int64_t block_of(int64_t in) {
    int64_t blocks = (in + BLOCK - 1) / BLOCK, even = (in + blocks - 1) / blocks;
    return (even + GROUP - 1) / GROUP * GROUP;
}

/* Bytes of a panel from one step to the next. */
INLINE int64_t step_bytes(int format) { return format == INT8 ? 2 * PANEL : 4 * PANEL; }

/* Rows of the next tile, of those that are left: as even as they go. */
static int64_t rows_of_tile(int64_t left) {
    int64_t tiles = (left + TILE_ROWS - 1) / TILE_ROWS;
    return (left + tiles - 1) / tiles;
}

/* Tiles that a block of a panel takes, as far as they count. */
static int64_t parts_of(int64_t rows) {
    int64_t parts = 0;
    for (int64_t tile; rows && parts < MOST_PARTS; rows -= tile)
        tile = rows_of_tile(rows), parts += WHOLE / vectors_of((int)tile);
    return parts < MOST_PARTS ? parts : MOST_PARTS;
}

/* Whether the processor, which sees one tile read a panel from end to end, fetches ahead better than we would: it can
   have more on their way than we can ask for. With more arithmetic than memory to wait for it falls behind. */
static int left_alone(int format, int64_t rows) {
    return format == FLOAT32 ? rows <= 5 && vectors_of((int)rows) == WHOLE : format == BFLOAT16 && rows == 1;
}

/* sums [rows, PANEL] += the rows `from` to `to` by one panel. */
static void panel(const Product *p, const char *block, const float *scales, int64_t from, int64_t to, float *sums) {
    const int format = p->w->format;
    const int64_t width = step_bytes(format), parts = parts_of(to - from);
    const int64_t stride = width / parts, size = block_of(p->w->in);
    const int alone = left_alone(format, to - from);
    for (int64_t start = 0; start < p->w->in; start += size) {
        int64_t end = start + size < p->w->in ? start + size : p->w->in, steps = steps_of(format, end - start);
        const char *next = block + steps * width, *stop = next + steps * width;
        Job job = {block, NULL, start, end, scales, NULL, next, stride};
        for (int64_t row = from, rows; row < to; row += rows) {
            rows = rows_of_tile(to - row);
            job.x = p->x + row, job.sums = sums + (row - from) * PANEL;
            TILES[format][rows - 1][alone || job.next >= stop ? 0 : stride > 64 ? 2 : 1](&job);
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

/* Rows at a time: they stay in the second-level cache from one panel to the next. */
static int64_t rows_at_once(int64_t in) {
    int64_t fitting = X_BYTES / 4 / in / TILE_ROWS * TILE_ROWS;
    return fitting < TILE_ROWS ? TILE_ROWS : fitting < MOST_ROWS ? fitting : MOST_ROWS;
}

void multiply(const Product *p, int threads) {
    const int64_t step = rows_at_once(p->w->in);
    const int64_t bytes_of_panel = steps_of(p->w->format, p->w->in) * step_bytes(p->w->format);
    for (int64_t from = 0; from < p->rows; from += step) {
        int64_t to = from + step < p->rows ? from + step : p->rows;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int64_t column = 0; column < p->w->out; column += PANEL) {
            float sums[MOST_ROWS * PANEL] __attribute__((aligned(64)));
            memset(sums, 0, sizeof(float) * PANEL * (size_t)(to - from));
            const float *scales = p->w->scales + column * ((p->w->in + GROUP - 1) / GROUP);
            panel(p, (const char *)p->w->panels + column / PANEL * bytes_of_panel, scales, from, to, sums);
            finish(p, sums, column, from, to);
        }
    }
}

/* The largest absolute value; NaN where there is one. */
INLINE float most_of(const float *restrict from, int64_t size) {
    uint32_t top = 0; /* absolute values are ordered as their bits are; NaN is above all */
    for (int64_t k = 0; k < size; k++) {
        uint32_t bits;
        memcpy(&bits, from + k, 4);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float most;
    memcpy(&most, &top, 4);
    return most;
}

/* What makes whole numbers up to `limit`, twice, of values up to `most`. Below LEAST it would be infinite: all count as 0. */
INLINE float twice_rate(float most, float limit) { return most > LEAST && most <= FLT_MAX ? 2 * limit / most : 0; }

/* Halves are rounded away from 0, in integers: as floats, x rate + 0.5 would be rounded once where there is a fused
   multiply-add and twice elsewhere, and instruction sets would disagree. */
INLINE int32_t nearest(float twice_number) {
    int32_t twice = (int32_t)twice_number;
    return (twice + (twice >= 0)) >> 1;
}

/* A row as 16-bit numbers times what it returns; `to` has room for `size` of them, rounded up to even. One with a NaN or
   an infinity becomes NaN, by what is returned. */
float to_numbers(const float *restrict from, int16_t *restrict to, int64_t size) {
    float most = most_of(from, size), rate = twice_rate(most, 32767);
    for (int64_t k = 0; k < size; k++) to[k] = (int16_t)nearest(from[k] * rate);
    if (size % 2) to[size] = 0;
    return most / 32767;
}

/* A row as pieces; one with a NaN or an infinity has a scale that makes NaN of the row's products. */
void to_pieces(const float *restrict from, Piece *restrict to, int64_t size) {
    for (; size > 0; from += GROUP, size -= GROUP, to++) {
        const int64_t some = size < GROUP ? size : GROUP;
        float most = most_of(from, some), rate = twice_rate(most, 127);
        int32_t sum = 0;
        for (int64_t k = 0; k < some; k++) {
            int32_t code = nearest(from[k] * rate);
            to->codes[k] = (int8_t)code;
            sum += code;
        }
        memset(to->codes + some, 0, (size_t)(GROUP - some));
        to->scale = most / 127;
        to->shift = -128 * sum;
    }
}
