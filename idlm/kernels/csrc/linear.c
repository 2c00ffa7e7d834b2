/* y [rows, N] = x [rows, K] w for the few rows of a decode step, where a general matrix product is slow.

   w as [K, N]: a block of rows takes some columns of w at a time; its sums stay in registers over the whole of K:

       sum[row][v] += x[row][k] * w[k][column + v]

   The first block of rows brings a panel of w into the second-level cache, where the others find it.

   w as [N, K], as an embedding lies that is the head too: four rows of x by four of w, 16 sums of LANES parts each.

   Either way the order of a sum does not depend on the rows beside it. */

#include <string.h>

#include "kernels.h"

#define LANES 16
#define AHEAD 64 /* rows of w to ask for in advance: their pieces lie too far apart for the processor to guess */

#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

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
    const int64_t step = panel_columns(x->rows, x->size * (int64_t)sizeof(float));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t column = 0; column < out; column += step)
        panel(x, w, y, out, column, column + step < out ? column + step : out);
}

/* The sums over the lanes of 16 vectors. Adding two vectors zipped both ways halves the parts of each; four times over,
   every vector's sum is one lane, that of vector i at the lane that has i's four bits in reverse. */
static inline __attribute__((always_inline)) vector fold(vector *parts) {
    for (int left = LANES / 2; left; left /= 2)
        for (int i = 0; i < left; i++) parts[i] = ZIP_LOW(parts[2 * i], parts[2 * i + 1]) + ZIP_HIGH(parts[2 * i], parts[2 * i + 1]);
    return parts[0];
}

/* sum[4 * row + column] += x[row] * w[column], part by part */
static inline __attribute__((always_inline)) void
add(vector *sum, const float *const *x, const float *const *w, int64_t k, const int part) {
    vector row[4] = {{0}}, column[4] = {{0}};
    for (int i = 0; i < 4; i++) {
        if (part == LANES)
            row[i] = *(const vector *)(x[i] + k), column[i] = *(const vector *)(w[i] + k);
        else
            memcpy(row + i, x[i] + k, sizeof(float) * (size_t)part), memcpy(column + i, w[i] + k, sizeof(float) * (size_t)part);
    }
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 4; c++) sum[4 * r + c] += row[r] * column[c];
}

/* x[row] . w[column], at the lane that has the bits of 4 * row + column in reverse */
static inline __attribute__((always_inline)) vector
tile(const float *const *x, const float *const *w, int64_t in, const int fetch) {
    vector sum[16] = {{0}};
    int64_t k = 0;
    for (; in - k >= LANES; k += LANES) {
        for (int i = 0; fetch && i < 4; i++) __builtin_prefetch(w[i] + 4 * in + k, 0, 2);
        add(sum, x, w, k, LANES);
    }
    if (k < in) add(sum, x, w, k, (int)(in - k));
    return fold(sum);
}

static void four_columns(const Rows *x, const float *w, float *y, int64_t out, int64_t first) {
    static const int reversed[16] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
    const float *columns[4], *rows[4];
    for (int64_t i = 0; i < 4; i++) columns[i] = w + (first + i < out ? first + i : out - 1) * x->size;
    for (int64_t row = 0; row < x->rows; row += 4) {
        for (int64_t i = 0; i < 4; i++) rows[i] = row_of(x, row + i < x->rows ? row + i : x->rows - 1);
        vector sums = row ? tile(rows, columns, x->size, 0) : tile(rows, columns, x->size, 1);
        for (int64_t i = 0; i < 16; i++)
            if (row + i / 4 < x->rows && first + i % 4 < out) y[(row + i / 4) * out + first + i % 4] = sums[reversed[i]];
    }
}

/* The same with w as [N, K]. */
void linear_by_rows(const Rows *x, const float *w, float *y, int64_t out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t first = 0; first < out; first += 4) four_columns(x, w, y, out, first);
}
