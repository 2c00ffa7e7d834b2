/* What the kernels and their registration share. Window attention is compiled once with REAL float and once with double;
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

/* Weights in panels; see linear.c. */
enum { FLOAT32, BFLOAT16, INT8, UINT8 };
#define PANEL 32
#define GROUP 128 /* inputs that share a scale */

/* GROUP inputs of a row as 8-bit codes, zeros past the row's end. */
typedef struct {
    float scale;
    int32_t shift; /* -128 times the sum of the codes */
    int8_t codes[GROUP];
} Piece;

typedef struct {
    const void *panels;
    const float *scales; /* [panels, groups, PANEL]; int8 and uint8 */
    int64_t in, out;
    int format;
} Weights;

/* Rows float32 [in]; 16-bit numbers where the weights are int8, with the rows' scales; pieces where they are uint8. */
typedef struct {
    const Weights *w;
    const void *const *x;
    const float *scales;
    float *const *y;
    int64_t rows;
} Product;

void multiply(const Product *product, int threads);
float to_numbers(const float *from, int16_t *to, int64_t size);
void to_pieces(const float *from, Piece *to, int64_t size);

void rms_norm(const Rows *from, const float *weight, float *to, double eps);
void rotate(const float *from, const float *cosine, const float *sine, float *to, int64_t rows, int64_t heads,
            int64_t size, int64_t from_row, int64_t from_head);
void swiglu(const Rows *gate, const Rows *up, float *to);
