/* What this core can do at best, with the instruction set it is compiled for: prints GFLOP/s of multiply-adds between
   registers, and GB/s of reading and of copying memory (both directions counted), in huge pages where there are any. */

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
#define ROUNDS 10000000
#define BYTES (256 << 20)

typedef float floats __attribute__((vector_size(VECTOR_BYTES), may_alias));

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static double arithmetic(void) {
    floats sum[SUMS], factor = (floats){0} + 0.999999f, term = (floats){0} + 1e-9f;
    for (int i = 0; i < SUMS; i++) sum[i] = (floats){0} + (float)i;
    double started = now();
    for (int round = 0; round < ROUNDS; round++)
        for (int i = 0; i < SUMS; i++) sum[i] = sum[i] * factor + term;
    double seconds = now() - started;
    for (int i = 1; i < SUMS; i++) sum[0] += sum[i];
    volatile float kept = sum[0][0];
    (void)kept;
    return 2.0 * ROUNDS * SUMS * LANES / seconds / 1e9;
}

static double reading(const floats *from) {
    floats sum[4] = {{0}};
    double started = now();
    for (int64_t i = 0; i < BYTES / VECTOR_BYTES; i += 4)
        for (int j = 0; j < 4; j++) sum[j] += from[i + j];
    double seconds = now() - started;
    volatile float kept = (sum[0] + sum[1] + sum[2] + sum[3])[0];
    (void)kept;
    return BYTES / seconds / 1e9;
}

static double copying(floats *to, const floats *from) {
    double started = now();
    memcpy(to, from, BYTES);
    return 2.0 * BYTES / (now() - started) / 1e9;
}

int main(void) {
    double best[3] = {0};
    floats *memory = aligned_alloc(2 << 20, 2L * BYTES);
    if (!memory) return 1;
    madvise(memory, 2L * BYTES, MADV_HUGEPAGE);
    memset(memory, 1, 2L * BYTES);
    for (int round = 0; round < 7; round++) {
        double found[3] = {arithmetic(), reading(memory), copying(memory + BYTES / VECTOR_BYTES, memory)};
        for (int i = 0; i < 3; i++) best[i] = found[i] > best[i] ? found[i] : best[i];
    }
    printf("%.2f %.2f %.2f\n", best[0], best[1], best[2]);
    return 0;
}
