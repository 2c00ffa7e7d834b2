/* What this core can do at best, with the instruction set it is compiled for: prints GFLOP/s of multiply-adds between
   registers, and GB/s of reading and of copying memory (both directions counted), in huge pages where there are any.
   Times are CPU time of the thread. Each piece of the work counts with its best round. */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "vector.h"

#define LANES (VECTOR_BYTES / 4)
#define SUMS 10
#define MULTIPLIES 200000
#define BYTES (256 << 20)
#define PIECE (8 << 20)
#define PIECES (BYTES / PIECE)
#define ROUNDS 10

typedef float floats __attribute__((vector_size(VECTOR_BYTES), may_alias));

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static double arithmetic(void) {
    floats sum[SUMS], factor = (floats){0} + 0.999999f, term = (floats){0} + 1e-9f;
    for (int i = 0; i < SUMS; i++) sum[i] = (floats){0} + (float)i;
    double started = now();
    for (int round = 0; round < MULTIPLIES; round++)
        for (int i = 0; i < SUMS; i++) sum[i] = sum[i] * factor + term;
    double seconds = now() - started;
    for (int i = 1; i < SUMS; i++) sum[0] += sum[i];
    volatile float kept = sum[0][0];
    (void)kept;
    return seconds;
}

static double reading(const floats *from) {
    floats sum[4] = {{0}};
    double started = now();
    for (int64_t i = 0; i < PIECE / VECTOR_BYTES; i += 4)
        for (int j = 0; j < 4; j++) sum[j] += from[i + j];
    double seconds = now() - started;
    volatile float kept = (sum[0] + sum[1] + sum[2] + sum[3])[0];
    (void)kept;
    return seconds;
}

static double copying(char *to, const char *from) {
    double started = now();
    memcpy(to, from, PIECE);
    return now() - started;
}

static void keep_least(double *least, double seconds) {
    if (*least == 0 || seconds < *least) *least = seconds;
}

static double sum(const double *seconds) {
    double total = 0;
    for (int i = 0; i < PIECES; i++) total += seconds[i];
    return total;
}

int main(void) {
    double multiplied = 0, read[PIECES] = {0}, copied[PIECES] = {0};
    char *memory = aligned_alloc(2 << 20, 2L * BYTES);
    if (!memory) return 1;
    madvise(memory, 2L * BYTES, MADV_HUGEPAGE);
    memset(memory, 1, 2L * BYTES);
    for (int round = 0; round < ROUNDS; round++)
        for (int i = 0; i < PIECES; i++) {
            int other = (i + PIECES / 2) % PIECES; /* not in a cache */
            char *piece = memory + (int64_t)i * PIECE, *away = memory + (int64_t)other * PIECE;
            keep_least(&multiplied, arithmetic());
            keep_least(&copied[i], copying(piece + BYTES, piece));
            keep_least(&read[other], reading((const floats *)away));
        }
    printf("%.2f %.2f %.2f\n", 2e-9 * MULTIPLIES * SUMS * LANES / multiplied, 1e-9 * BYTES / sum(read),
           2e-9 * BYTES / sum(copied));
    return 0;
}
