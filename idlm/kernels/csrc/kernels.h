/* Types and functions that the kernels share with their registration. Window attention is compiled
   with REAL float and with REAL double; NAME(f) is f_float and f_double. */

#include <stdint.h>

#define JOIN(a, b) a##_##b
#define JOINED(a, b) JOIN(a, b)
#define NAME(f) JOINED(f, REAL)

/* The arguments of window attention; see window_attention.c. Strides are in elements. A row sees the
   last `window` of its keys, or all if `window` is 0. Scores are capped if `softcap` is not 0. */
typedef struct {
    const void *query, *key, *value, *sinks; /* sinks: [heads], or NULL */
    void *pages, *out; /* pages: the keys; the values are `half` elements after them */
    const int64_t *table, *lengths, *visible, *rows, *ends;
    int64_t batch, total, real, masks, heads, groups, size, page, columns, half;
    int64_t query_row, query_head, key_row, key_group, value_row, value_group;
    int64_t window;
    double scale, softcap;
} Attention;

int attend_float(const Attention *job, int threads);
int attend_double(const Attention *job, int threads);

/* A tensor as rows of its last dimension, which must be dense. */
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

/* Weights in panels; see linear.c. */
enum { FLOAT32, BFLOAT16, INT8, UINT8 };
#define PANEL 32
#define GROUP 128 /* inputs that share a scale */

/* GROUP inputs of a row as 8-bit codes; 0 past the end of the row. */
typedef struct {
    float scale;
    int32_t shift; /* -128 times the sum of the codes */
    int8_t codes[GROUP];
} QuantGroup;

typedef struct {
    const void *panels;
    const float *scales; /* [panels, groups, PANEL]; int8 and uint8 */
    int64_t in, out;
    int format;
} Weights;

/* y = x w for `rows` rows. The rows of x are float32 [in]; 16-bit integers with a scale for each
   row if the weights are int8; QuantGroups if the weights are uint8. */
typedef struct {
    const Weights *w;
    const void *const *x;
    const float *scales;
    float *const *y;
    int64_t rows;
} Product;

void multiply(const Product *product, int threads);
void set_hardware_rows(int format, int64_t most); /* see linear.c; for the whole process */
float quantise_row(const float *from, int16_t *to, int64_t size);
void quantise_groups(const float *from, QuantGroup *to, int64_t size);

void rms_norm(const Rows *from, const float *weight, float *to, double eps);
void rotate(const float *from, const float *cosine, const float *sine, float *to, int64_t rows,
            int64_t heads, int64_t size, int64_t from_row, int64_t from_head);
void swiglu(const Rows *gate, const Rows *up, float *to);
