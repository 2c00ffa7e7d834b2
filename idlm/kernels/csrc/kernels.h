/* What the kernels and their registration share. The kernels are compiled once with REAL float and once with double;
   NAME(f) is then f_float and f_double. */

#include <stdint.h>

#define JOIN(a, b) a##_##b
#define JOINED(a, b) JOIN(a, b)
#define NAME(f) JOINED(f, REAL)

/* Window attention; see window_attention.c. Strides are in elements. */
typedef struct {
    const void *query, *key, *value;
    void *pages, *out; /* pages: the keys; the values lie `half` elements further on */
    const int64_t *table, *lengths, *visible, *rows, *ends;
    int64_t batch, total, real, masks, heads, groups, size, page, columns, half;
    int64_t query_row, query_head, key_row, key_group, value_row, value_group;
    double scale;
} Attention;

int attend_float(const Attention *job, int threads);
int attend_double(const Attention *job, int threads);

/* A tensor as rows along its last dimension, which has to be dense. */
typedef struct {
    float *data;
    int64_t dim, rows, size;
    const int64_t *sizes, *strides;
} Rows;

static inline float *row_of(const Rows *rows, int64_t row) {
    int64_t offset = 0;
    for (int64_t d = rows->dim - 2; d >= 0; d--) {
        offset += row % rows->sizes[d] * rows->strides[d];
        row /= rows->sizes[d];
    }
    return rows->data + offset;
}

void linear(const Rows *x, const float *w, float *y, int64_t out, int threads);
void linear_by_rows(const Rows *x, const float *w, float *y, int64_t out, int threads);

/* Columns of a panel of weights, `bytes` a column: as many as stay in the second-level cache from one block of rows to
   the next, but no more than one row alone takes at a time. */
static inline int64_t panel_columns(int64_t rows, int64_t bytes) {
    int64_t fitting = (512 << 10) / bytes / 32 * 32;
    return rows <= 8 || fitting > 256 ? 256 : fitting < 32 ? 32 : fitting;
}

/* Weights in int8, of several adapters; see draft_linear.c. `columns` is `out` rounded up to whole vectors. */
typedef struct {
    const int8_t *codes;  /* [adapters, K / 4, columns, 4] */
    const float *scales;  /* [adapters, columns] */
    const int32_t *sums;  /* [adapters, columns] */
    int64_t adapters, columns, out;
} Codes;

int draft_linear(const Rows *x, int64_t first, const Codes *w, const int64_t *adapter, float *y, int threads);
int draft_linear_pays(void);
void rms_norm(const Rows *from, const float *weight, float *to, double eps);
void rotate(const float *from, const float *cosine, const float *sine, float *to, int64_t rows, int64_t heads,
            int64_t size, int64_t from_row, int64_t from_head);
void swiglu(const Rows *gate, const Rows *up, float *to);
