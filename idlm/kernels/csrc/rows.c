/* The operations of a layer between its matrix products, each in one pass over the rows. */

#include <math.h>

#include "kernels.h"

/* to = from / sqrt(mean of squares + eps) * weight, for each row */
void rms_norm(const Rows *rows, const float *restrict weight, float *restrict to, double eps) {
    for (int64_t row = 0; row < rows->rows; row++, to += rows->size) {
        const float *restrict from = row_of(rows, row);
        float squares = 0;
        for (int64_t d = 0; d < rows->size; d++) squares += from[d] * from[d];
        float rate = (float)(1 / sqrt((double)(squares / (float)rows->size) + eps));
        for (int64_t d = 0; d < rows->size; d++) to[d] = from[d] * rate * weight[d];
    }
}

/* Rotary embedding: the halves (a, b) of a head become (a cos - b sin, b cos + a sin). */
void rotate(const float *restrict from, const float *restrict cosine, const float *restrict sine,
            float *restrict to, int64_t rows, int64_t heads, int64_t size, int64_t from_row,
            int64_t from_head) {
    int64_t half = size / 2;
    for (int64_t row = 0; row < rows; row++, cosine += size, sine += size)
        for (int64_t head = 0; head < heads; head++, to += size) {
            const float *restrict a = from + row * from_row + head * from_head, *restrict b = a +
                                                                                              half;
            for (int64_t d = 0; d < half; d++) {
                to[d] = a[d] * cosine[d] - b[d] * sine[d];
                to[half + d] = b[d] * cosine[half + d] + a[d] * sine[half + d];
            }
        }
}

/* to = silu(gate) * up. Below SMALLEST silu rounds to 0 in float32. Without that bound expf would
   be infinite, and the approximate division of fast math would make it NaN. */
#define SMALLEST -80.0f

void swiglu(const Rows *gate, const Rows *up, float *restrict to) {
    for (int64_t row = 0; row < gate->rows; row++, to += gate->size) {
        const float *restrict a = row_of(gate, row), *restrict b = row_of(up, row);
        for (int64_t d = 0; d < gate->size; d++)
            to[d] = a[d] / (1 + expf(-fmaxf(a[d], SMALLEST))) * b[d];
    }
}
