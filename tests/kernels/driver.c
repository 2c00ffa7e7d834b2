/* The kernels without torch: a program that reads operations from its input and writes their results, so that a build
   for any instruction set can be tested, under an emulator too.

   Everything is an int64 or an array of bytes, in the machine's order:

       operation, threads, N, A, numbers [N], then A times: length, bytes       a request
       R, then R times: length, bytes                                          its answer

   Every array lies in memory of its very size, so that the address sanitizer sees a read past its end. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { PRODUCT, NUMBERS, PIECES, ATTENTION_FLOAT, ATTENTION_DOUBLE, RMS_NORM, ROTATE, SWIGLU };
#define MOST 32

typedef struct {
    int64_t length;
    void *bytes;
} Array;

typedef struct {
    struct {
        int64_t operation, threads, numbers, arrays;
    } head;
    int64_t number[MOST];
    Array array[MOST], result[2];
    int results;
} Request;

static void stop(const char *why) {
    fprintf(stderr, "driver: %s\n", why);
    exit(1);
}

static void take(void *to, size_t bytes) {
    if (bytes && fread(to, 1, bytes, stdin) != bytes) stop("the request ends too early");
}

static void *room(int64_t bytes) {
    void *made = malloc(bytes ? (size_t)bytes : 1);
    if (!made) stop("memory ran out");
    return made;
}

/* Another result, of so many bytes. */
static void *give(Request *request, int64_t bytes) {
    Array *made = &request->result[request->results++];
    *made = (Array){bytes, room(bytes)};
    return made->bytes;
}

static double real(int64_t bits) {
    double found;
    memcpy(&found, &bits, sizeof(found));
    return found;
}

/* numbers: format, rows, in, out; arrays: panels, their scales, x [rows, in], for int8 as numbers, whole pairs of them,
   and the rows' scales; for uint8 as pieces */
static void product(Request *request) {
    const int64_t *number = request->number, rows = number[1], in = number[2], out = number[3];
    const Array *array = request->array;
    const int int8 = number[0] == INT8;
    Weights w = {array[0].bytes, array[1].bytes, in, out, (int)number[0]};
    const int64_t row_bytes = array[2].length / rows;
    void **x = room(rows * (int64_t)sizeof(*x));
    float **y = room(rows * (int64_t)sizeof(*y)), *to = give(request, rows * out * 4);
    for (int64_t row = 0; row < rows; row++) { /* rows lie apart */
        x[row] = memcpy(room(row_bytes), (char *)array[2].bytes + row * row_bytes, (size_t)row_bytes);
        y[row] = to + row * out;
    }
    multiply(&(Product){&w, (const void *const *)x, int8 ? array[3].bytes : NULL, y, rows}, (int)request->head.threads);
    for (int64_t row = 0; row < rows; row++) free(x[row]);
    free(x), free(y);
}

/* arrays: x [size]; results: 16-bit numbers, whole pairs of them, and their scale */
static void numbers(Request *request) {
    int64_t size = request->array[0].length / 4;
    int16_t *to = give(request, (size + 1) / 2 * 4);
    *(float *)give(request, 4) = to_numbers(request->array[0].bytes, to, size);
}

/* arrays: x [size]; results: its pieces */
static void pieces(Request *request) {
    int64_t size = request->array[0].length / 4;
    to_pieces(request->array[0].bytes, give(request, (size + GROUP - 1) / GROUP * (int64_t)sizeof(Piece)), size);
}

/* numbers: as below; arrays: query, key, value, pages, rows, table, lengths, visible, ends, either of these empty;
   results: what is mixed, and the pages */
static void attention(Request *request) {
    const int64_t *n = request->number;
    const Array *a = request->array;
    Attention job = {
        .query = a[0].bytes, .key = a[1].bytes, .value = a[2].bytes, .pages = a[3].bytes,
        .rows = a[4].bytes, .table = a[5].bytes, .lengths = a[6].bytes,
        .visible = a[7].length ? a[7].bytes : NULL, .ends = a[8].length ? a[8].bytes : NULL,
        .batch = n[0], .total = n[1], .real = n[2], .masks = n[3], .heads = n[4], .groups = n[5], .size = n[6],
        .page = n[7], .columns = n[8], .half = n[9], .query_row = n[4] * n[6], .query_head = n[6],
        .key_row = n[5] * n[6], .key_group = n[6], .value_row = n[5] * n[6], .value_group = n[6], .scale = real(n[10]),
    };
    job.out = give(request, a[0].length);
    memset(job.out, 0xff, (size_t)a[0].length); /* NaN */
    int (*call)(const Attention *, int) = request->head.operation == ATTENTION_FLOAT ? attend_float : attend_double;
    if (call(&job, (int)request->head.threads)) stop("memory ran out");
    memcpy(give(request, a[3].length), a[3].bytes, (size_t)a[3].length);
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
    rms_norm(&rows, request->array[1].bytes, give(request, 4 * n[0] * n[1]), real(n[2]));
}

/* numbers: rows, heads, size; arrays: heads [rows, heads, size], cosine [rows, size], sine */
static void turn(Request *request) {
    const int64_t *n = request->number;
    const Array *a = request->array;
    float *to = give(request, 4 * n[0] * n[1] * n[2]);
    rotate(a[0].bytes, a[1].bytes, a[2].bytes, to, n[0], n[1], n[2], n[1] * n[2], n[2]);
}

/* numbers: rows, size; arrays: gate, up */
static void gated(Request *request) {
    const int64_t *n = request->number;
    Rows gate = rows_of(request, 0, n[0], n[1]), up = rows_of(request, 1, n[0], n[1]);
    swiglu(&gate, &up, give(request, 4 * n[0] * n[1]));
}

static void (*const CALLS[])(Request *) = {
    [PRODUCT] = product, [NUMBERS] = numbers, [PIECES] = pieces, [ATTENTION_FLOAT] = attention, [ATTENTION_DOUBLE] = attention,
    [RMS_NORM] = norm, [ROTATE] = turn, [SWIGLU] = gated,
};

static void put(const void *from, int64_t bytes) {
    if (fwrite(from, 1, (size_t)bytes, stdout) != (size_t)bytes) stop("nobody reads the answer");
}

static void answer(const Request *request) {
    int64_t results = request->results;
    put(&results, sizeof(results));
    for (int i = 0; i < request->results; i++) {
        put(&request->result[i].length, sizeof(int64_t));
        put(request->result[i].bytes, request->result[i].length);
    }
    fflush(stdout);
}

int main(void) {
    Request request;
    while (fread(&request.head, sizeof(request.head), 1, stdin) == 1) {
        int64_t operation = request.head.operation, arrays = request.head.arrays;
        if (operation < PRODUCT || operation > SWIGLU || request.head.numbers > MOST || arrays > MOST)
            stop("this is no request");
        take(request.number, (size_t)request.head.numbers * sizeof(int64_t));
        for (int i = 0; i < arrays; i++) {
            take(&request.array[i].length, sizeof(int64_t));
            request.array[i].bytes = room(request.array[i].length);
            take(request.array[i].bytes, (size_t)request.array[i].length);
        }
        request.results = 0;
        CALLS[operation](&request);
        answer(&request);
        for (int i = 0; i < arrays; i++) free(request.array[i].bytes);
        for (int i = 0; i < request.results; i++) free(request.result[i].bytes);
    }
    return 0;
}
