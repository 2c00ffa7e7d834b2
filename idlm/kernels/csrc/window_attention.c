/* The kernel of idlm.attention.cpu: writes a segment's real rows to the pages, then attends. Shapes are explained in
   idlm.attention.base. Compiled once for each REAL.

   One tile is TILE query rows (window row x head) of one slot's key/value head. Keys come in blocks of BLOCK tokens,
   transposed, so that a row's scores against a block are PARTS whole vectors and need no horizontal sum:

       keys[e][token]     e = 0 .. E-1       score[token] += query[e] * keys[e][token]

   A row's scores lie side by side: the prefix, then those window rows that it sees, in the order of their positions.
   What it does not see leaves no gap, so a row's result depends on its keys alone, not on the window they came in. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "vector.h"

#define LANES (VECTOR_BYTES / REAL_BYTES)
#define PARTS (64 / VECTOR_BYTES)
#define BLOCK (LANES * PARTS)
#define TILE 32
#define STRIP 32

/* Query rows that one pass over a block takes: their sums, ABREAST * PARTS of them, stay in registers. */
#if VECTOR_BYTES == 16 && !defined(__aarch64__)
#define ABREAST 2
#else
#define ABREAST 4
#endif

typedef REAL vector __attribute__((vector_size(VECTOR_BYTES), aligned(REAL_BYTES), may_alias));
#if REAL_BYTES == 4
typedef int32_t places __attribute__((vector_size(VECTOR_BYTES)));
#else
typedef int64_t places __attribute__((vector_size(VECTOR_BYTES)));
#endif

typedef struct {
    REAL *keys;      /* [E, BLOCK] one block, transposed */
    int64_t *places, item; /* where each token of a slot's prefix lies in the pages; whose, slot x groups + group */
    int64_t *coming, next; /* the same of the item that comes next */
    int64_t ahead;         /* how many of its tokens to ask for meanwhile */
    REAL *query;     /* [TILE, E] times scale */
    REAL *scores;    /* [TILE, room] */
    REAL *mixed;     /* [TILE, E] */
    int32_t *seen;   /* [TILE, W] window rows that a row sees */
    int64_t count[TILE], room;
} Tile;

/* Rows of a window. Pieces of prompts may differ in length; then each says where its rows end, and has no masks. */
static inline int64_t width(const Attention *job, int64_t slot) {
    if (job->ends) return job->ends[slot] - (slot ? job->ends[slot - 1] : 0);
    return job->real + job->masks;
}

/* Where a window row lies among the flat rows: all real ones, slot by slot, then all masks. */
static inline int64_t flat(const Attention *job, int64_t slot, int64_t row) {
    if (job->ends) return (slot ? job->ends[slot - 1] : 0) + row;
    if (row < job->real) return slot * job->real + row;
    return job->batch * job->real + slot * job->masks + row - job->real;
}

static void write_pages(const Attention *job) {
    for (int64_t row = 0; row < job->total; row++)
        for (int64_t group = 0; group < job->groups; group++) {
            REAL *to = (REAL *)job->pages + (job->rows[row] * job->groups + group) * job->size;
            memcpy(to, (const REAL *)job->key + row * job->key_row + group * job->key_group, sizeof(REAL) * job->size);
            memcpy(to + job->half, (const REAL *)job->value + row * job->value_row + group * job->value_group, sizeof(REAL) * job->size);
        }
}

static void find_places(const Attention *job, int64_t *places, int64_t slot, int64_t group) {
    int64_t step = job->groups * job->size, length = job->lengths[slot];
    for (int64_t start = 0, column = slot * job->columns; start < length; start += job->page, column++) {
        int64_t place = job->table[column] * job->page * step + group * job->size;
        int64_t end = start + job->page < length ? start + job->page : length;
        for (int64_t token = start; token < end; token++, place += step) places[token] = place;
    }
}

INLINE vector part_of(const REAL *from, int part) {
    vector to = {0};
    if (part == LANES) return *(const vector *)from;
    memcpy(&to, from, sizeof(REAL) * part);
    return to;
}

/* a's lane, b's lane, a's next, ...: from the lower halves of both, and from the upper ones. The processors' own zips stay
   within 16 bytes, so the lanes are named here. */
INLINE vector zip_low(vector a, vector b) {
#if VECTOR_BYTES == 64 && REAL_BYTES == 4
    return LANES_OF(places, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif VECTOR_BYTES / REAL_BYTES == 8
    return LANES_OF(places, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#elif VECTOR_BYTES / REAL_BYTES == 4
    return LANES_OF(places, a, b, 0, 4, 1, 5);
#else
    return LANES_OF(places, a, b, 0, 2);
#endif
}

INLINE vector zip_high(vector a, vector b) {
#if VECTOR_BYTES == 64 && REAL_BYTES == 4
    return LANES_OF(places, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif VECTOR_BYTES / REAL_BYTES == 8
    return LANES_OF(places, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif VECTOR_BYTES / REAL_BYTES == 4
    return LANES_OF(places, a, b, 2, 6, 3, 7);
#else
    return LANES_OF(places, a, b, 1, 3);
#endif
}

/* Zip rows i and i + LANES / 2 together, log2(LANES) times: that is a transposition. */
INLINE void transpose(vector *rows) {
    vector other[LANES];
    for (int width = 1; width < LANES; width *= 2) {
        for (int i = 0; i < LANES / 2; i++) {
            other[2 * i] = zip_low(rows[i], rows[i + LANES / 2]);
            other[2 * i + 1] = zip_high(rows[i], rows[i + LANES / 2]);
        }
        memcpy(rows, other, sizeof(other));
    }
}

/* `some` keys of a block side by side; the places left over repeat the first. */
INLINE void place(Tile *tile, const REAL *const *keys, int some, int size) {
    for (int start = 0; start < BLOCK; start += LANES)
        for (int e = 0; e < size; e += LANES) {
            vector rows[LANES];
            int part = size - e < LANES ? size - e : LANES;
            for (int lane = 0; lane < LANES; lane++) rows[lane] = part_of(keys[start + lane < some ? start + lane : 0] + e, part);
            transpose(rows);
            for (int i = 0; i < part; i++) *(vector *)(tile->keys + (e + i) * BLOCK + start) = rows[i];
        }
}

/* Ask for what comes next from memory: `one` of the `all` parts of it. */
static inline void fetch(const Attention *job, const Tile *tile, const void *base, int64_t one, int64_t all) {
    int64_t end = tile->ahead * (one + 1) / all;
    for (int64_t token = tile->ahead * one / all; token < end; token++)
        for (int64_t e = 0; e < job->size; e += 64 / sizeof(REAL)) __builtin_prefetch((const REAL *)base + tile->coming[token] + e, 0, 2);
}

/* Scores [ABREAST, BLOCK] of the query rows from `first` on against the block. */
INLINE void score(const Tile *tile, int first, int size, REAL *to) {
    const REAL *query = tile->query + (int64_t)first * size;
    vector sum[ABREAST][PARTS] = {{{0}}};
    for (int e = 0; e < size; e++)
        for (int p = 0; p < PARTS; p++) {
            vector key = *(const vector *)(tile->keys + e * BLOCK + p * LANES);
            for (int q = 0; q < ABREAST; q++) sum[q][p] += query[q * size + e] * key;
        }
    for (int q = 0; q < ABREAST; q++)
        for (int p = 0; p < PARTS; p++) *(vector *)(to + q * BLOCK + p * LANES) = sum[q][p];
}

INLINE void score_prefix(const Attention *job, Tile *tile, int64_t length, int rows, int size) {
    for (int64_t start = 0; start < length; start += BLOCK) {
        int some = length - start < BLOCK ? (int)(length - start) : BLOCK;
        const REAL *keys[BLOCK];
        for (int i = 0; i < some; i++) keys[i] = (const REAL *)job->pages + tile->places[start + i];
        fetch(job, tile, job->pages, start / BLOCK, (length + BLOCK - 1) / BLOCK);
        place(tile, keys, some, size);
        for (int first = 0; first < rows; first += ABREAST) {
            REAL found[ABREAST * BLOCK];
            score(tile, first, size, found);
            for (int q = 0; q < ABREAST; q++) memcpy(tile->scores + (first + q) * tile->room + start, found + q * BLOCK, 64);
        }
    }
}

/* Which of the window rows `start` to `start + some` a row sees, as bits. */
static inline uint64_t word(const Attention *job, int64_t slot, int64_t row, int64_t start, int some) {
    uint64_t all = (1ull << some) - 1;
    if (job->visible) return (uint64_t)job->visible[slot * width(job, slot) + row] >> start & all;
    return row < start ? 0 : row - start >= some ? all : (2ull << (row - start)) - 1;
}

INLINE void score_window(const Attention *job, Tile *tile, int64_t slot, int64_t group, int64_t top, int rows, int size) {
    int64_t per_group = job->heads / job->groups, last = (top + rows - 1) / per_group;
    int64_t end = job->visible ? width(job, slot) : last + 1;
    for (int64_t start = 0; start < end; start += BLOCK) {
        int some = end - start < BLOCK ? (int)(end - start) : BLOCK;
        const REAL *keys[BLOCK], *key = (const REAL *)job->key + group * job->key_group;
        for (int i = 0; i < some; i++) keys[i] = key + flat(job, slot, start + i) * job->key_row;
        place(tile, keys, some, size);
        for (int first = 0; first < rows; first += ABREAST) {
            REAL found[ABREAST * BLOCK];
            score(tile, first, size, found);
            for (int q = first; q < first + ABREAST && q < rows; q++) {
                REAL *scores = tile->scores + q * tile->room;
                int32_t *seen = tile->seen + q * width(job, slot) - job->lengths[slot];
                for (uint64_t bits = word(job, slot, (top + q) / per_group, start, some); bits; bits &= bits - 1) {
                    int lane = __builtin_ctzll(bits);
                    seen[tile->count[q]] = (int32_t)(start + lane);
                    scores[tile->count[q]++] = found[(q - first) * BLOCK + lane];
                }
            }
        }
    }
}

/* Scores to weights relative to the largest; returns their sum. */
static REAL soften(REAL *scores, int64_t count) {
    REAL most = scores[0], total = 0;
    for (int64_t at = 1; at < count; at++) most = scores[at] > most ? scores[at] : most;
    for (int64_t at = 0; at < count; at++) scores[at] = EXP(scores[at] - most);
    for (int64_t at = 0; at < count; at++) total += scores[at];
    return total;
}

/* Adds the weighted values of the tokens `start` to `end` to `part` elements of ABREAST query rows. */
INLINE void mix(const Tile *tile, const REAL *values, int64_t start, int64_t end, int first, int e, int size, const int parts, int part) {
    const REAL *weights = tile->scores + first * tile->room;
    REAL *to = tile->mixed + first * size + e;
    vector sum[ABREAST][PARTS];
    for (int q = 0; q < ABREAST; q++)
        for (int p = 0; p < parts; p++) sum[q][p] = part_of(to + q * size + p * LANES, part);
    for (int64_t token = start; token < end; token++)
        for (int p = 0; p < parts; p++) {
            vector value = part_of(values + tile->places[token] + e + p * LANES, part);
            for (int q = 0; q < ABREAST; q++) sum[q][p] += weights[q * tile->room + token] * value;
        }
    for (int q = 0; q < ABREAST; q++)
        for (int p = 0; p < parts; p++) memcpy(to + q * size + p * LANES, &sum[q][p], sizeof(REAL) * part);
}

/* Values of the prefix, in strips of tokens that stay in the cache. */
INLINE void mix_prefix(const Attention *job, Tile *tile, int64_t length, int rows, int size) {
    const REAL *values = (const REAL *)job->pages + job->half;
    memset(tile->mixed, 0, sizeof(REAL) * TILE * size);
    for (int64_t start = 0; start < length; start += STRIP) {
        int64_t end = start + STRIP < length ? start + STRIP : length;
        fetch(job, tile, values, start / STRIP, (length + STRIP - 1) / STRIP);
        for (int first = 0; first < rows; first += ABREAST) {
            int e = 0;
            for (; size - e >= BLOCK; e += BLOCK) mix(tile, values, start, end, first, e, size, PARTS, LANES);
            for (; size - e >= LANES; e += LANES) mix(tile, values, start, end, first, e, size, 1, LANES);
            if (e < size) mix(tile, values, start, end, first, e, size, 1, size - e);
        }
    }
}

INLINE void mix_window(const Attention *job, Tile *tile, int64_t slot, int64_t group, int64_t length, int rows, int size) {
    const REAL *window = (const REAL *)job->value + group * job->value_group;
    for (int q = 0; q < rows; q++) {
        const REAL *weights = tile->scores + q * tile->room;
        const int32_t *seen = tile->seen + q * width(job, slot) - length;
        for (int e = 0; e < size; e += LANES) {
            int part = size - e < LANES ? size - e : LANES;
            vector sum = part_of(tile->mixed + q * size + e, part);
            for (int64_t at = length; at < tile->count[q]; at++)
                sum += weights[at] * part_of(window + flat(job, slot, seen[at]) * job->value_row + e, part);
            memcpy(tile->mixed + q * size + e, &sum, sizeof(REAL) * part);
        }
    }
}

/* Query rows `top` to `top + rows` of one slot and group, row = window row x (H / G) + head of the group. */
INLINE void run(const Attention *job, Tile *tile, int64_t slot, int64_t group, int64_t top, int rows, int size) {
    int64_t per_group = job->heads / job->groups, length = job->lengths[slot];
    for (int q = 0; q < rows; q++) {
        int64_t head = group * per_group + (top + q) % per_group, row = (top + q) / per_group;
        const REAL *from = (const REAL *)job->query + flat(job, slot, row) * job->query_row + head * job->query_head;
        for (int e = 0; e < size; e++) tile->query[q * size + e] = from[e] * (REAL)job->scale;
        tile->count[q] = length;
    }
    score_prefix(job, tile, length, rows, size);
    score_window(job, tile, slot, group, top, rows, size);
    REAL total[TILE];
    for (int q = 0; q < rows; q++) total[q] = tile->count[q] ? soften(tile->scores + q * tile->room, tile->count[q]) : 1;
    mix_prefix(job, tile, length, rows, size);
    mix_window(job, tile, slot, group, length, rows, size);
    for (int q = 0; q < rows; q++) {
        int64_t head = group * per_group + (top + q) % per_group, row = (top + q) / per_group;
        REAL *to = (REAL *)job->out + (flat(job, slot, row) * job->heads + head) * size;
        for (int e = 0; e < size; e++) to[e] = tile->mixed[q * size + e] / total[q];
    }
}

/* The usual head sizes as constants, so that the loops over them unroll. */
static void run_any(const Attention *job, Tile *tile, int64_t slot, int64_t group, int64_t top, int rows) {
    switch (job->size) {
    case 32: run(job, tile, slot, group, top, rows, 32); break;
    case 64: run(job, tile, slot, group, top, rows, 64); break;
    case 128: run(job, tile, slot, group, top, rows, 128); break;
    default: run(job, tile, slot, group, top, rows, (int)job->size);
    }
}

/* Turn to a slot and group, and look up where the next one's prefix lies. */
static void turn(const Attention *job, Tile *tile, int64_t item) {
    if (tile->item == item) {
        tile->ahead = 0;
        return;
    }
    if (tile->next == item) {
        int64_t *found = tile->coming;
        tile->coming = tile->places, tile->places = found;
    } else
        find_places(job, tile->places, item / job->groups, item % job->groups);
    tile->item = item++, tile->next = item, tile->ahead = 0;
    if (item == job->batch * job->groups) return;
    find_places(job, tile->coming, item / job->groups, item % job->groups);
    tile->ahead = job->lengths[item / job->groups];
}

static void *aligned(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

/* Returns 0, or 1 where memory ran out. */
int NAME(attend)(const Attention *job, int threads) {
    int64_t heads = job->heads / job->groups, longest = 0, widest = 0;
    for (int64_t slot = 0; slot < job->batch; slot++) {
        if (job->lengths[slot] > longest) longest = job->lengths[slot];
        if (width(job, slot) > widest) widest = width(job, slot);
    }
    int64_t tiles = (widest * heads + TILE - 1) / TILE;
    int failed = 0;
    write_pages(job);
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        Tile tile = {.item = -1, .next = -1, .room = (longest + widest + 2 * BLOCK) / BLOCK * BLOCK};
        tile.keys = aligned(sizeof(REAL) * BLOCK * job->size);
        tile.places = aligned(sizeof(int64_t) * (longest + 1));
        tile.coming = aligned(sizeof(int64_t) * (longest + 1));
        tile.query = aligned(sizeof(REAL) * TILE * job->size);
        tile.mixed = aligned(sizeof(REAL) * TILE * job->size);
        tile.scores = aligned(sizeof(REAL) * TILE * tile.room);
        tile.seen = aligned(sizeof(int32_t) * TILE * (widest + 1));
        failed = !tile.keys || !tile.places || !tile.coming || !tile.query || !tile.mixed || !tile.scores || !tile.seen;
        if (!failed) memset(tile.keys, 0, sizeof(REAL) * BLOCK * job->size), memset(tile.query, 0, sizeof(REAL) * TILE * job->size);
#pragma omp for schedule(static)
        for (int64_t one = 0; one < job->batch * job->groups * tiles; one++) {
            int64_t item = one / tiles, slot = item / job->groups, top = one % tiles * TILE;
            int64_t rows = width(job, slot) * heads - top;
            if (failed || rows <= 0) continue;
            turn(job, &tile, item);
            run_any(job, &tile, slot, item % job->groups, top, rows < TILE ? (int)rows : TILE);
        }
        free(tile.keys), free(tile.places), free(tile.coming), free(tile.query), free(tile.mixed), free(tile.scores), free(tile.seen);
    }
    return failed;
}
