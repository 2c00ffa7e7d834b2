/* The kernels without torch: a program that reads operations from stdin and writes their results to
   stdout. So a build for any instruction set can be tested, under an emulator too.

   Everything is an int64 or an array of bytes, in the machine's order:

       operation, threads, N, A, numbers [N], then A times: length, bytes       a request
       R, then R times: length, bytes                                          its answer

   Every array has an allocation of exactly its size, so that the address sanitizer reports a read
   past its end. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { PRODUCT, NUMBERS, GROUPS, ATTENTION_FLOAT, ATTENTION_DOUBLE, RMS_NORM, ROTATE, SWIGLU };
#define MAX_ARGUMENTS 32

typedef struct {
    int64_t length;
    void *bytes;
} Array;

typedef struct {
    struct {
        int64_t operation, threads, numbers, arrays;
    } head;
    int64_t number[MAX_ARGUMENTS];
    Array array[MAX_ARGUMENTS], result[2];
    int results;
} Request;

static void stop(const char *why) {
    fprintf(stderr, "driver: %s\n", why);
    exit(1);
}

static void read_input(void *to, size_t bytes) {
    if (bytes && fread(to, 1, bytes, stdin) != bytes) stop("the request ends too early");
}

static void *allocate(int64_t bytes) {
    void *result = malloc(bytes ? (size_t)bytes : 1);
    if (!result) stop("memory ran out");
    return result;
}

/* Append a result of `bytes` bytes to the answer; returns its memory. */
static void *add_result(Request *request, int64_t bytes) {
    Array *result = &request->result[request->results++];
    *result = (Array){bytes, allocate(bytes)};
    return result->bytes;
}

static double real(int64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

/* numbers: format, rows, in, out; arrays: panels, their scales, x [rows, in], the scales of x. x is
   float32; for int8 16-bit integers, padded to pairs; for uint8 QuantGroups. */
static void product(Request *request) {
    const int64_t *number = request->number, rows = number[1], in = number[2], out = number[3];
    const Array *array = request->array;
    const int int8 = number[0] == INT8;
    Weights w = {array[0].bytes, array[1].bytes, in, out, (int)number[0]};
    const int64_t row_bytes = array[2].length / rows;
    void **x = allocate(rows * (int64_t)sizeof(*x));
    float **y = allocate(rows * (int64_t)sizeof(*y)), *to = add_result(request, rows * out * 4);
    for (int64_t row = 0; row < rows; row++) { /* each row has its own allocation */
        x[row] = memcpy(allocate(row_bytes), (char *)array[2].bytes + row * row_bytes,
                        (size_t)row_bytes);
        y[row] = to + row * out;
    }
    multiply(&(Product){&w, (const void *const *)x, int8 ? array[3].bytes : NULL, y, rows},
             (int)request->head.threads);
    for (int64_t row = 0; row < rows; row++) free(x[row]);
    free(x), free(y);
}

/* arrays: x [size]; results: 16-bit integers, padded to pairs, and their scale */
static void numbers(Request *request) {
    int64_t size = request->array[0].length / 4;
    int16_t *to = add_result(request, (size + 1) / 2 * 4);
    *(float *)add_result(request, 4) = quantise_row(request->array[0].bytes, to, size);
}

/* arrays: x [size]; results: its QuantGroups */
static void groups(Request *request) {
    int64_t size = request->array[0].length / 4;
    quantise_groups(request->array[0].bytes,
                    add_result(request, (size + GROUP - 1) / GROUP * (int64_t)sizeof(QuantGroup)),
                    size);
}

/* numbers: as below; arrays: query, key, value, pages, rows, table, lengths, visible, ends, sinks,
   where `visible` or `ends` is empty, and `sinks` may be; results: the output and the pages */
static void attention(Request *request) {
    const int64_t *n = request->number;
    const Array *a = request->array;
    Attention job = {
        .query = a[0].bytes,
        .key = a[1].bytes,
        .value = a[2].bytes,
        .pages = a[3].bytes,
        .rows = a[4].bytes,
        .table = a[5].bytes,
        .lengths = a[6].bytes,
        .visible = a[7].length ? a[7].bytes : NULL,
        .ends = a[8].length ? a[8].bytes : NULL,
        .sinks = a[9].length ? a[9].bytes : NULL,
        .batch = n[0],
        .total = n[1],
        .real = n[2],
        .masks = n[3],
        .heads = n[4],
        .groups = n[5],
        .size = n[6],
        .page = n[7],
        .columns = n[8],
        .half = n[9],
        .query_row = n[4] * n[6],
        .query_head = n[6],
        .key_row = n[5] * n[6],
        .key_group = n[6],
        .value_row = n[5] * n[6],
        .value_group = n[6],
        .window = n[10],
        .scale = real(n[11]),
        .softcap = real(n[12]),
    };
    job.out = add_result(request, a[0].length);
    memset(job.out, 0xff, (size_t)a[0].length); /* NaN */
    int (*call)(const Attention *,
                int) = request->head.operation == ATTENTION_FLOAT ? attend_float : attend_double;
    if (call(&job, (int)request->head.threads)) stop("memory ran out");
    memcpy(add_result(request, a[3].length), a[3].bytes, (size_t)a[3].length);
}

static Rows rows_of(Request *request, int array, int64_t rows, int64_t size) {
    static int64_t sizes[2], strides[2];
    sizes[0] = rows, sizes[1] = size;
    strides[0] = size, strides[1] = 1;
    return (Rows){request->array[array].bytes, 2, rows, size, sizes, strides};
}

/* numbers: rows, size, eps; arrays: rows, weight */
static void norm(Request *request) {
    const int64_t *n = request->number;
    Rows rows = rows_of(request, 0, n[0], n[1]);
    rms_norm(&rows, request->array[1].bytes, add_result(request, 4 * n[0] * n[1]), real(n[2]));
}

/* numbers: rows, heads, size; arrays: heads [rows, heads, size], cosine [rows, size], sine */
static void rotation(Request *request) {
    const int64_t *n = request->number;
    const Array *a = request->array;
    float *to = add_result(request, 4 * n[0] * n[1] * n[2]);
    rotate(a[0].bytes, a[1].bytes, a[2].bytes, to, n[0], n[1], n[2], n[1] * n[2], n[2]);
}

/* numbers: rows, size; arrays: gate, up */
static void gated(Request *request) {
    const int64_t *n = request->number;
    Rows gate = rows_of(request, 0, n[0], n[1]), up = rows_of(request, 1, n[0], n[1]);
    swiglu(&gate, &up, add_result(request, 4 * n[0] * n[1]));
}

static void (*const CALLS[])(Request *) = {
    [PRODUCT] = product,
    [NUMBERS] = numbers,
    [GROUPS] = groups,
    [ATTENTION_FLOAT] = attention,
    [ATTENTION_DOUBLE] = attention,
    [RMS_NORM] = norm,
    [ROTATE] = rotation,
    [SWIGLU] = gated,
};

static void write_output(const void *from, int64_t bytes) {
    if (fwrite(from, 1, (size_t)bytes, stdout) != (size_t)bytes) stop("nobody reads the answer");
}

static void answer(const Request *request) {
    int64_t results = request->results;
    write_output(&results, sizeof(results));
    for (int i = 0; i < request->results; i++) {
        write_output(&request->result[i].length, sizeof(int64_t));
        write_output(request->result[i].bytes, request->result[i].length);
    }
    fflush(stdout);
}

int main(void) {
    Request request;
    while (fread(&request.head, sizeof(request.head), 1, stdin) == 1) {
        int64_t operation = request.head.operation, arrays = request.head.arrays;
        if (operation < PRODUCT || operation > SWIGLU || request.head.numbers > MAX_ARGUMENTS ||
            arrays > MAX_ARGUMENTS)
            stop("this is no request");
        read_input(request.number, (size_t)request.head.numbers * sizeof(int64_t));
        for (int i = 0; i < arrays; i++) {
            read_input(&request.array[i].length, sizeof(int64_t));
            request.array[i].bytes = allocate(request.array[i].length);
            read_input(request.array[i].bytes, (size_t)request.array[i].length);
        }
        request.results = 0;
        CALLS[operation](&request);
        answer(&request);
        for (int i = 0; i < arrays; i++) free(request.array[i].bytes);
        for (int i = 0; i < request.results; i++) free(request.result[i].bytes);
    }
    return 0;
}
