/* The CPU kernels of idlm.kernels.fused: what a layer does to its rows between the matrix products, in one pass each.
   Compiled once for each REAL. */

#include <math.h>
#include <stdint.h>

/* to[row][d] = from[row][d] / sqrt(mean of squares + eps) * weight[d] */
void rms_norm(const REAL *restrict from, const REAL *restrict weight, REAL *restrict to, int64_t rows, int64_t size, double eps) {
    for (int64_t row = 0; row < rows; row++, from += size, to += size) {
        REAL squares = 0;
        for (int64_t d = 0; d < size; d++) squares += from[d] * from[d];
        REAL rate = (REAL)(1 / sqrt((double)(squares / (REAL)size) + eps));
        for (int64_t d = 0; d < size; d++) to[d] = from[d] * rate * weight[d];
    }
}

/* Rotary embedding of one row of `heads` heads: the halves (a, b) become (a cos - b sin, b cos + a sin). */
void rotate(const REAL *restrict from, const REAL *restrict cosine, const REAL *restrict sine, REAL *restrict to, int64_t rows,
            int64_t heads, int64_t size, int64_t from_row, int64_t from_head) {
    int64_t half = size / 2;
    for (int64_t row = 0; row < rows; row++, cosine += size, sine += size)
        for (int64_t head = 0; head < heads; head++, to += size) {
            const REAL *a = from + row * from_row + head * from_head, *b = a + half;
            for (int64_t d = 0; d < half; d++) {
                to[d] = a[d] * cosine[d] - b[d] * sine[d];
                to[half + d] = b[d] * cosine[half + d] + a[d] * sine[half + d];
            }
        }
}

/* to = silu(gate) * up */
void swiglu(const REAL *restrict gate, const REAL *restrict up, REAL *restrict to, int64_t count) {
    for (int64_t at = 0; at < count; at++) to[at] = gate[at] / (1 + EXP(-gate[at])) * up[at];
}
