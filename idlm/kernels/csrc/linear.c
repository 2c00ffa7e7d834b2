/* y [rows, N] = x [rows, K] w [K, N] for the few rows of a decode step, where a general matrix product is slow.

   A block of rows takes some columns of w at a time; its sums stay in registers over the whole of K:

       sum[row][v] += x[row][k] * w[k][column + v]

   The first block of rows brings a panel of w into the second-level cache, where the others find it. */

#include "kernels.h"

#define LANES 16
#define PANEL (16 * LANES)
#define AHEAD 64 /* rows of w to ask for in advance: their pieces lie too far apart for the processor to guess */

typedef float vector __attribute__((vector_size(64), aligned(4), may_alias));

static inline __attribute__((always_inline)) void
block(const float *const *x, const float *w, float *y, int64_t in, int64_t out, const int rows, const int vectors, const int fetch) {
    vector sum[8][16];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = (vector){0};
    for (int64_t k = 0; k < in; k++, w += out) {
        for (int v = 0; fetch && v < vectors; v++) __builtin_prefetch((const vector *)(w + AHEAD * out) + v, 0, 2);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) sum[r][v] += x[r][k] * ((const vector *)w)[v];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) ((vector *)(y + r * out))[v] = sum[r][v];
}

/* The columns that fill no vector. */
static void edge(const float *const *x, const float *w, float *y, int64_t in, int64_t out, int rows, int64_t column) {
    for (int r = 0; r < rows; r++)
        for (int64_t n = column; n < out; n++) {
            float sum = 0;
            for (int64_t k = 0; k < in; k++) sum += x[r][k] * w[k * out + n];
            y[r * out + n] = sum;
        }
}

#define SWEEP(ROWS, VECTORS)                                                                           \
    for (; x->rows - row >= ROWS; row += ROWS) {                                                       \
        const float *from[ROWS];                                                                       \
        float *to = y + row * out;                                                                     \
        for (int r = 0; r < ROWS; r++) from[r] = row_of(x, row + r);                                   \
        int64_t at = column;                                                                           \
        for (; end - at >= (VECTORS) * LANES; at += (VECTORS) * LANES)                                 \
            if (row)                                                                                   \
                block(from, w + at, to + at, x->size, out, ROWS, VECTORS, 0);                          \
            else                                                                                       \
                block(from, w + at, to + at, x->size, out, ROWS, VECTORS, 1);                          \
        for (; end - at >= LANES; at += LANES) block(from, w + at, to + at, x->size, out, ROWS, 1, 0); \
        if (at < end) edge(from, w, to, x->size, out, ROWS, at);                                       \
    }

/* Columns `column` to `end` of all rows. */
static void panel(const Rows *x, const float *w, float *y, int64_t out, int64_t column, int64_t end) {
    int64_t row = 0;
    SWEEP(8, 2)
    SWEEP(4, 4)
    SWEEP(2, 8)
    SWEEP(1, 16)
}

void linear(const Rows *x, const float *w, float *y, int64_t out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t column = 0; column < out; column += PANEL)
        panel(x, w, y, out, column, column + PANEL < out ? column + PANEL : out);
}
