/* Products of MASK rows by weights in int8. What they give are drafts, which verification checks, so rounding costs
   acceptance and never a byte of output; a row takes some 0.4 of the time of one in float32, and the weights a quarter.

   w[k][n] = scales[n] code[k][n], and a row is x[k] = scale (byte[k] - ZERO), so

       y[n] = scale scales[n] (sum over k of byte[k] code[k][n] - ZERO sums[n]),   sums[n] = sum over k of code[k][n]

   exactly but for the last product. Four codes of one column lie side by side, [K / 4, N, 4]: the processor multiplies
   and adds four bytes a lane at once. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define LANES 16
#define AHEAD 32 /* steps of w to ask for in advance */
#define ZERO 128

typedef int32_t vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));

#ifdef __AVX512VNNI__
#include <immintrin.h>

static inline __attribute__((always_inline)) vector dot(vector sum, const uint8_t *bytes, const int8_t *codes) {
    int32_t four;
    memcpy(&four, bytes, 4);
    return (vector)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), _mm512_loadu_si512(codes));
}

int draft_linear_pays(void) { return 1; }
#else
static inline vector dot(vector sum, const uint8_t *bytes, const int8_t *codes) {
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < 4; i++) sum[lane] += bytes[i] * codes[4 * lane + i];
    return sum;
}

int draft_linear_pays(void) { return 0; }
#endif

/* Rows as bytes, `size` of them a row. */
typedef struct {
    uint8_t *bytes;
    float *scales;
    int64_t size;
} Bytes;

/* The rows from `first` on; returns 1 where memory ran out. */
static int to_bytes(const Rows *x, int64_t first, Bytes *to) {
    int64_t rows = x->rows - first, size = x->size, whole = (size + 3) / 4 * 4; /* a byte written could be x->size */
    to->size = whole;
    to->bytes = malloc((size_t)(rows * whole + 64)), to->scales = malloc(sizeof(float) * (size_t)(rows + 1));
    if (!to->bytes || !to->scales) return 1;
    for (int64_t row = 0; row < rows; row++) {
        const float *restrict from = row_of(x, first + row);
        uint8_t *restrict bytes = to->bytes + row * whole;
        float most = 0;
        for (int64_t k = 0; k < size; k++) most = fmaxf(most, fabsf(from[k]));
        float rate = most > 0 ? 127 / most : 0;
        for (int64_t k = 0; k < size; k++) bytes[k] = (uint8_t)(int32_t)(from[k] * rate + (ZERO + 0.5f));
        for (int64_t k = size; k < whole; k++) bytes[k] = ZERO;
        to->scales[row] = most / 127;
    }
    return 0;
}

static inline __attribute__((always_inline)) void
block(const Bytes *x, const int64_t *rows, const Codes *w, int64_t adapter, int64_t column, float *y, const int number,
      const int vectors, const int fetch) {
    const int8_t *codes = w->codes + (adapter * x->size * w->columns) + 4 * column;
    const uint8_t *from[8];
    const int64_t size = x->size, step = 4 * w->columns;
    vector sum[8][16];
    for (int r = 0; r < number; r++) {
        from[r] = x->bytes + rows[r] * size;
        for (int v = 0; v < vectors; v++) sum[r][v] = (vector){0};
    }
    for (int64_t k = 0; k < size; k += 4, codes += step) {
        for (int v = 0; fetch && v < vectors; v++) __builtin_prefetch(codes + AHEAD * step + 4 * v * LANES, 0, 2);
        for (int r = 0; r < number; r++)
            for (int v = 0; v < vectors; v++) sum[r][v] = dot(sum[r][v], from[r] + k, codes + 4 * v * LANES);
    }
    for (int v = 0; v < vectors; v++, column += LANES) {
        const floats *scales = (const floats *)(w->scales + adapter * w->columns + column);
        const vector *sums = (const vector *)(w->sums + adapter * w->columns + column);
        int64_t part = w->out - column < LANES ? w->out - column : LANES;
        for (int r = 0; r < number; r++) {
            floats found = __builtin_convertvector(sum[r][v] - ZERO * *sums, floats) * x->scales[rows[r]] * *scales;
            if (part == LANES)
                *(floats *)(y + rows[r] * w->out + column) = found;
            else
                memcpy(y + rows[r] * w->out + column, &found, sizeof(float) * (size_t)part);
        }
    }
}

#define SWEEP(NUMBER, VECTORS)                                                                         \
    for (; number - at >= NUMBER; at += NUMBER) {                                                      \
        int64_t n = column;                                                                            \
        for (; end - n >= (VECTORS) * LANES; n += (VECTORS) * LANES)                                   \
            if (at)                                                                                    \
                block(x, rows + at, w, adapter, n, y, NUMBER, VECTORS, 0);                             \
            else                                                                                       \
                block(x, rows + at, w, adapter, n, y, NUMBER, VECTORS, 1);                             \
        for (; n < end; n += LANES) block(x, rows + at, w, adapter, n, y, NUMBER, 1, 0);               \
    }

/* Columns `column` to `end` of `number` rows that draft with one adapter. */
static void panel(const Bytes *x, const int64_t *rows, int64_t number, const Codes *w, int64_t adapter, int64_t column,
                  int64_t end, float *y) {
    int64_t at = 0;
    SWEEP(8, 2)
    SWEEP(4, 4)
    SWEEP(2, 8)
    SWEEP(1, 16)
}

/* The rows from `first` on; y is dense. Returns 1 where memory ran out. */
int draft_linear(const Rows *x, int64_t first, const Codes *w, const int64_t *adapter, float *y, int threads) {
    int64_t number = x->rows - first;
    Bytes bytes = {0};
    int64_t *order = malloc(sizeof(int64_t) * (size_t)(number + 1));
    int64_t *ends = calloc((size_t)w->adapters + 1, sizeof(int64_t));
    int failed = !order || !ends || to_bytes(x, first, &bytes);
    for (int64_t one = 0, at = 0; one < w->adapters && !failed; one++) {
        for (int64_t row = 0; row < number; row++)
            if (w->adapters == 1 || adapter[row] == one) order[at++] = row;
        ends[one + 1] = at;
    }
    y += first * w->out;
    const int64_t step = panel_columns(number, x->size);
    if (!failed) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int64_t column = 0; column < w->columns; column += step)
            for (int64_t one = 0; one < w->adapters; one++)
                panel(&bytes, order + ends[one], ends[one + 1] - ends[one], w, one, column,
                      column + step < w->columns ? column + step : w->columns, y);
    }
    free(order), free(ends), free(bytes.bytes), free(bytes.scales);
    return failed;
}
