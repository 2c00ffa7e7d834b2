/* The kernels as torch operators, through torch's stable C interface. A call costs less than a
   microsecond, a tenth of an operator written in Python, and the build needs neither torch's
   headers nor a C++ compiler. */

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

typedef void *Tensor, *Library;
typedef uint64_t Value; /* an entry of the stack: a tensor handle, an integer or a double's bits */

extern int32_t aoti_torch_library_init_def(const char *, const char *, uint32_t, Library *);
extern int32_t aoti_torch_library_init_impl(const char *, const char *, const char *, uint32_t,
                                            Library *);
extern int32_t aoti_torch_library_def(Library, const char *);
extern int32_t aoti_torch_library_impl(Library, const char *,
                                       void (*)(Value *, uint64_t, uint64_t));
extern int32_t aoti_torch_get_data_ptr(Tensor, void **);
extern int32_t aoti_torch_get_sizes(Tensor, int64_t **);
extern int32_t aoti_torch_get_strides(Tensor, int64_t **);
extern int32_t aoti_torch_get_dim(Tensor, int64_t *);
extern int32_t aoti_torch_get_dtype(Tensor, int32_t *);
extern int32_t aoti_torch_empty_strided(int64_t, const int64_t *, const int64_t *, int32_t, int32_t,
                                        int32_t, Tensor *);
extern int32_t aoti_torch__reinterpret_tensor(Tensor, int64_t, const int64_t *, const int64_t *,
                                              int64_t, Tensor *);
extern int32_t aoti_torch_cpu_mm_out(Tensor, Tensor, Tensor);
extern int32_t aoti_torch_delete_tensor_object(Tensor);

enum { BYTE = 0, FLOAT = 6, DOUBLE = 7, BFLOAT = 15, CPU = 0 }; /* torch's ids of types, device */

/* std::__throw_runtime_error(const char *) of torch's C++ library. C itself has no exceptions. This
   one unwinds the C frames (-fexceptions) up to torch, which raises RuntimeError in Python. */
#ifdef __APPLE__
#define THROW "__ZNSt3__121__throw_runtime_errorEPKc"
#else
#define THROW "_ZSt21__throw_runtime_errorPKc"
#endif
extern void throw_runtime_error(const char *) __asm__(THROW) __attribute__((noreturn));

/* Throw if a precondition is broken, a call to torch failed, or memory ran out. What the operator
   has allocated by then is leaked. */
static void must(int32_t failed) {
    if (failed)
        throw_runtime_error(
            "idlm's C kernels: torch's C interface refused a call, or memory ran out");
}

static int64_t *sizes(Value tensor) {
    int64_t *result;
    return must(aoti_torch_get_sizes((Tensor)tensor, &result)), result;
}

static int64_t *strides(Value tensor) {
    int64_t *result;
    return must(aoti_torch_get_strides((Tensor)tensor, &result)), result;
}

static void *data(Value tensor) {
    void *result;
    return must(aoti_torch_get_data_ptr((Tensor)tensor, &result)), result;
}

static int32_t type(Value tensor) {
    int32_t result;
    return must(aoti_torch_get_dtype((Tensor)tensor, &result)), result;
}

static Rows rows_of(Value tensor) {
    Rows rows = {
        .data = data(tensor), .rows = 1, .sizes = sizes(tensor), .strides = strides(tensor)};
    must(aoti_torch_get_dim((Tensor)tensor, &rows.dim));
    for (int64_t d = 0; d < rows.dim - 1; d++) rows.rows *= rows.sizes[d];
    rows.size = rows.sizes[rows.dim - 1];
    return rows;
}

/* A new dense tensor with the shape of `like`, but `size` in the last dimension. */
static Tensor dense(Value like, int64_t size) {
    Rows rows = rows_of(like);
    int64_t shape[8], steps[8], step = 1;
    must(rows.dim > 8);
    for (int64_t d = rows.dim - 1; d >= 0; d--) {
        shape[d] = d == rows.dim - 1 ? size : rows.sizes[d];
        steps[d] = step, step *= shape[d];
    }
    Tensor result;
    return must(aoti_torch_empty_strided(rows.dim, shape, steps, type(like), CPU, 0, &result)),
           result;
}

/* Release the input tensors and return `result`: an operator owns its inputs. */
static void finish(Value *stack, int tensors, Tensor result) {
    for (int i = 0; i < tensors; i++) must(aoti_torch_delete_tensor_object((Tensor)stack[i]));
    stack[0] = (Value)result;
}

/* Attention. Inputs 0 to 6 are query, key, value, pages, rows, table, lengths; input 7 is `visible`
   or `ends`, 8 the sinks (empty: none). `numbers` are scale, window and softcap (0: none). */
static void attend(Value *stack, const int64_t *visible, const int64_t *ends, int64_t masks,
                   const Value *numbers) {
    int64_t *query = strides(stack[0]), *key = strides(stack[1]), *value = strides(stack[2]),
            *rows = sizes(stack[4]);
    Tensor out = dense(stack[0], sizes(stack[0])[2]);
    Attention job = {
        .query = data(stack[0]),
        .key = data(stack[1]),
        .value = data(stack[2]),
        .sinks = sizes(stack[8])[0] ? data(stack[8]) : NULL,
        .pages = data(stack[3]),
        .out = data((Value)out),
        .rows = data(stack[4]),
        .table = data(stack[5]),
        .lengths = data(stack[6]),
        .visible = visible,
        .ends = ends,
        .batch = sizes(stack[6])[0],
        .total = ends ? rows[0] : rows[0] * rows[1],
        .real = ends ? 0 : rows[1],
        .masks = masks,
        .heads = sizes(stack[0])[1],
        .groups = sizes(stack[1])[1],
        .size = sizes(stack[0])[2],
        .page = sizes(stack[3])[2],
        .columns = sizes(stack[5])[1],
        .half = strides(stack[3])[0],
        .query_row = query[0],
        .query_head = query[1],
        .key_row = key[0],
        .key_group = key[1],
        .value_row = value[0],
        .value_group = value[1],
        .window = (int64_t)numbers[1],
    };
    memcpy(&job.scale, &numbers[0], sizeof(double));
    memcpy(&job.softcap, &numbers[2], sizeof(double));
    must((type(stack[0]) == FLOAT ? attend_float : attend_double)(&job, omp_get_max_threads()));
    finish(stack, 9, out);
}

/* (query, key, value, pages, rows [B, R], table, lengths, visible [B, W], sinks, masks, scale,
   window, softcap) */
static void window_attention(Value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    attend(stack, data(stack[7]), NULL, (int64_t)stack[9], stack + 10);
}

/* (query, key, value, pages, rows [T], table, lengths, ends [B], sinks, scale, window, softcap):
   causal chunks */
static void prefill_attention(Value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    attend(stack, NULL, data(stack[7]), 0, stack + 9);
}

/* Weights from panels [P, steps, PANEL, 1, 2 or 4] and scales [P, groups, PANEL]; the type of the
   panels is the format. */
static Weights weights_of(Value panels, Value scales, int64_t in, int64_t out) {
    int32_t dtype = type(panels);
    return (Weights){
        .panels = data(panels),
        .scales = data(scales),
        .in = in,
        .out = out,
        .format = dtype == FLOAT    ? FLOAT32
                  : dtype == BFLOAT ? BFLOAT16
                  : dtype == BYTE   ? UINT8
                                    : INT8,
    };
}

/* Bytes of a row of x in the format that the weights need; 0 if that is float32, as it is. */
static int64_t row_bytes(const Weights *w) {
    int64_t pairs = (w->in + 1) / 2, groups = (w->in + GROUP - 1) / GROUP;
    if (w->format == INT8) return pairs * 4;
    return w->format == UINT8 ? groups * (int64_t)sizeof(QuantGroup) : 0;
}

/* Multiply the rows `indices` of x (NULL: rows 0 to `rows`) by w, into the same rows of the dense
   y [x->rows, out]. */
static void multiply_rows(const Rows *x, const int64_t *indices, int64_t rows, const Weights *w,
                          float *y) {
    int64_t bytes = row_bytes(w);
    size_t capacity = (size_t)rows + 1;
    const void **from = malloc(sizeof(*from) * capacity);
    float **to = malloc(sizeof(*to) * capacity), *scales = malloc(sizeof(*scales) * capacity);
    char *rounded = malloc(capacity * (size_t)bytes + 1);
    must(!from || !to || !scales || !rounded);
    for (int64_t row = 0; row < rows; row++) {
        int64_t index = indices ? indices[row] : row;
        const float *source = row_of(x, index);
        void *quantised = rounded + row * bytes;
        if (w->format == INT8) scales[row] = quantise_row(source, quantised, x->size);
        if (w->format == UINT8) quantise_groups(source, quantised, x->size);
        from[row] = bytes ? quantised : source, to[row] = y + index * w->out;
    }
    multiply(&(Product){w, from, scales, to, rows}, omp_get_max_threads());
    free(from), free(to), free(scales), free(rounded);
}

/* The bit of `choice` for a number of rows: 1, 2, 3-4, 5-8, ... are bits 0, 1, 2, 3, ... */
static int bucket(int64_t rows) {
    int bit = 0;
    while (1ll << bit < rows) bit++;
    return bit;
}

/* The leading rows of a tensor as a matrix; its other dimensions must have size 1. */
static Tensor as_matrix(Value tensor, const Rows *rows, int64_t count) {
    int64_t shape[2] = {count, rows->size},
            steps[2] = {rows->dim > 1 ? rows->strides[rows->dim - 2] : rows->size, 1};
    Tensor result;
    return must(aoti_torch__reinterpret_tensor((Tensor)tensor, 2, shape, steps, 0, &result)),
           result;
}

static int is_matrix(const Rows *rows) {
    for (int64_t d = 0; d < rows->dim - 2; d++)
        if (rows->sizes[d] != 1) return 0;
    return 1;
}

/* Multiply the leading `count` rows of x by weight [out, in] with PyTorch's matrix product. */
static void multiply_torch(Value x, const Rows *rows, int64_t count, Value weight, Tensor y) {
    Rows result = rows_of((Value)y);
    int64_t *shape = sizes(weight), *steps = strides(weight);
    int64_t shape_t[2] = {shape[1], shape[0]}, strides_t[2] = {steps[1], steps[0]}; /* transposed */
    Tensor from = as_matrix(x, rows, count), to = as_matrix((Value)y, &result, count), w;
    must(aoti_torch__reinterpret_tensor((Tensor)weight, 2, shape_t, strides_t, 0, &w));
    must(aoti_torch_cpu_mm_out(to, from, w));
    must(aoti_torch_delete_tensor_object(from));
    must(aoti_torch_delete_tensor_object(to));
    must(aoti_torch_delete_tensor_object(w));
}

/* Multiply the leading `count` rows of x by the panels or with PyTorch: `choice` says which. */
static void multiply_chosen(Value *stack, const Rows *x, int64_t count, int64_t out, int64_t choice,
                            Tensor y) {
    if (!count) return;
    if (choice >> bucket(count) & 1 || !is_matrix(x)) {
        Weights w = weights_of(stack[2], stack[3], x->size, out);
        multiply_rows(x, NULL, count, &w, data((Value)y));
    } else multiply_torch(stack[0], x, count, stack[1], y);
}

/* (x, weight, panels, scales, out, choice). If bit b of `choice` is set, the panels are used for
   the numbers of rows of `bucket` b. If all are set, `weight` [out, in] is not read. */
static void linear_op(Value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    Rows x = rows_of(stack[0]);
    Tensor y = dense(stack[0], (int64_t)stack[4]);
    multiply_chosen(stack, &x, x.rows, (int64_t)stack[4], (int64_t)stack[5], y);
    finish(stack, 4, y);
}

/* (x, weight, panels, scales, codes, code_scales, adapter, out, choice). The last rows are MASK
   rows, as many as `adapter` has entries: each is multiplied by the codes [A, ..] of its adapter.
   The rows before them are multiplied as by `linear`. */
static void split_linear_op(Value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    Rows x = rows_of(stack[0]);
    int64_t out = (int64_t)stack[7], masks = sizes(stack[6])[0], real_rows = x.rows - masks,
            adapters = sizes(stack[4])[0];
    const int64_t *adapter = data(stack[6]);
    Tensor y = dense(stack[0], out);
    multiply_chosen(stack, &x, real_rows, out, (int64_t)stack[8], y);
    int64_t *indices = malloc(sizeof(*indices) * (size_t)(masks + 1));
    must(!indices);
    Weights w = weights_of(stack[4], stack[5], x.size, out);
    for (int64_t a = 0; a < adapters; a++) {
        int64_t rows = 0;
        for (int64_t row = 0; row < masks; row++)
            if (adapters == 1 || adapter[row] == a) indices[rows++] = real_rows + row;
        if (rows) multiply_rows(&x, indices, rows, &w, data((Value)y));
        w.panels = (const char *)w.panels + strides(stack[4])[0]; /* codes have a byte an element */
        w.scales += strides(stack[5])[0];
    }
    free(indices);
    finish(stack, 7, y);
}

/* (rows, weight, eps) */
static void rms_norm_op(Value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    Rows rows = rows_of(stack[0]);
    Tensor to = dense(stack[0], rows.size);
    double eps;
    memcpy(&eps, stack + 2, sizeof(double));
    rms_norm(&rows, data(stack[1]), data((Value)to), eps);
    finish(stack, 2, to);
}

/* (heads [1, H, T, E], cosine [1, 1, T, E], sine); the result is stored as [1, T, H, E] */
static void rotate_op(Value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    int64_t *shape = sizes(stack[0]), *from = strides(stack[0]), heads = shape[1], size = shape[3];
    int64_t steps[4] = {shape[2] * heads * size, size, heads * size, 1};
    Tensor to;
    must(aoti_torch_empty_strided(4, shape, steps, FLOAT, CPU, 0, &to));
    rotate(data(stack[0]), data(stack[1]), data(stack[2]), data((Value)to), shape[2], heads, size,
           from[2], from[1]);
    finish(stack, 3, to);
}

/* (gate, up) */
static void swiglu_op(Value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    Rows gate = rows_of(stack[0]), up = rows_of(stack[1]);
    Tensor to = dense(stack[0], gate.size);
    swiglu(&gate, &up, data((Value)to));
    finish(stack, 2, to);
}

/* Register all operators, once for the process, which keeps the handles. Returns 0 on success. */
int idlm_register(void) {
    static int done;
    if (done) return 0;
    static const struct {
        const char *name, *schema;
        void (*call)(Value *, uint64_t, uint64_t);
    } ops[] = {
        {"window_attention",
         "window_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) pages, Tensor rows, "
         "Tensor table, "
         "Tensor lengths, Tensor visible, Tensor sinks, int masks, float scale, int window, "
         "float softcap) -> Tensor",
         window_attention},
        {"prefill_attention",
         "prefill_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) pages, Tensor rows, "
         "Tensor table, "
         "Tensor lengths, Tensor ends, Tensor sinks, float scale, int window, float softcap) -> "
         "Tensor",
         prefill_attention},
        {"linear",
         "linear(Tensor x, Tensor weight, Tensor panels, Tensor scales, int out, int choice) -> "
         "Tensor",
         linear_op},
        {"split_linear",
         "split_linear(Tensor x, Tensor weight, Tensor panels, Tensor scales, Tensor codes, Tensor "
         "code_scales, "
         "Tensor adapter, int out, int choice) -> Tensor",
         split_linear_op},
        {"rms_norm", "rms_norm(Tensor rows, Tensor weight, float eps) -> Tensor", rms_norm_op},
        {"rotate", "rotate(Tensor heads, Tensor cosine, Tensor sine) -> Tensor", rotate_op},
        {"swiglu", "swiglu(Tensor gate, Tensor up) -> Tensor", swiglu_op},
    };
    Library names, calls;
    if (aoti_torch_library_init_def("idlm", __FILE__, __LINE__, &names)) return 1;
    if (aoti_torch_library_init_impl("idlm", "CPU", __FILE__, __LINE__, &calls)) return 1;
    for (unsigned i = 0; i < sizeof(ops) / sizeof(*ops); i++)
        if (aoti_torch_library_def(names, ops[i].schema) ||
            aoti_torch_library_impl(calls, ops[i].name, ops[i].call))
            return 1;
    done = 1;
    return 0;
}
