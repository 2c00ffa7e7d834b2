/* The kernel of idlm.attention.cpu: it writes a segment's real rows to the pages, then attends.
   idlm.attention.base explains the shapes. It is compiled for each REAL.

   A tile is TILE query rows (window row x head) of one slot's key/value head. Keys are read in
   blocks of BLOCK tokens and transposed, so that the scores of a row against a block are PARTS
   vectors, without a horizontal sum:

       keys[e][token]     e = 0 .. E-1       score[token] += query[e] * keys[e][token]

   The scores of a row are dense: the prefix, then the window rows that it sees, in the order of
   their positions. Rows that it does not see leave no gap, so the result depends on the keys alone,
   not on the window that they are in. A sliding window leaves a row the last of its scores: those
   from `first` on. */

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

/* Query rows per pass over a block. Their ABREAST * PARTS sums stay in registers. */
#if VECTOR_BYTES == 16 && !defined(__aarch64__)
#define ABREAST 2
#else
#define ABREAST 4
#endif

typedef REAL vector __attribute__((vector_size(VECTOR_BYTES), aligned(REAL_BYTES), may_alias));
#if REAL_BYTES == 4
typedef int32_t lane_index __attribute__((vector_size(VECTOR_BYTES)));
#else
typedef int64_t lane_index __attribute__((vector_size(VECTOR_BYTES)));
#endif

/* The work space of a thread. An item is a slot and a key/value head: slot x groups + group. */
typedef struct {
    REAL *keys;       /* [E, BLOCK] one block, transposed */
    int64_t *offsets; /* [prefix] of `item`: where each token is in the pages, in elements */
    int64_t item;
    int64_t *next_offsets; /* the same of `next_item` */
    int64_t next_item;
    int64_t to_prefetch;   /* prefix tokens of `next_item` to prefetch during this tile, */
    int64_t prefetch_from; /* and the first of them */
    REAL *query;           /* [TILE, E] times scale */
    REAL *scores;          /* [TILE, room] */
    REAL *mixed;           /* [TILE, E] weighted sums of the values */
    int32_t *seen;         /* [TILE, W] the window rows that each row sees */
    int64_t count[TILE];   /* the keys up to the last that each row sees, with the prefix */
    int64_t first[TILE];   /* the first of them that it sees */
    int64_t from;          /* the first prefix token that any row of the tile sees */
    int64_t room;          /* scores that a row can hold: longest prefix and widest window */
} Tile;

/* Rows of a window, or of a chunk: chunks differ in length, and `ends` says where each ends. */
static inline int64_t width(const Attention *job, int64_t slot) {
    if (job->ends) return job->ends[slot] - (slot ? job->ends[slot - 1] : 0);
    return job->real + job->masks;
}

/* The flat row of a window row: the real rows of all slots come before the MASK rows of all. */
static inline int64_t flat(const Attention *job, int64_t slot, int64_t row) {
    if (job->ends) return (slot ? job->ends[slot - 1] : 0) + row;
    if (row < job->real) return slot * job->real + row;
    return job->batch * job->real + slot * job->masks + row - job->real;
}

static void write_pages(const Attention *job) {
    for (int64_t row = 0; row < job->total; row++)
        for (int64_t group = 0; group < job->groups; group++) {
            REAL *to = (REAL *)job->pages + (job->rows[row] * job->groups + group) * job->size;
            memcpy(to, (const REAL *)job->key + row * job->key_row + group * job->key_group,
                   sizeof(REAL) * job->size);
            memcpy(to + job->half,
                   (const REAL *)job->value + row * job->value_row + group * job->value_group,
                   sizeof(REAL) * job->size);
        }
}

/* The first prefix token that a row of the slot may see. A row has as many keys as the prefix, or
   more. */
static inline int64_t oldest(const Attention *job, int64_t slot) {
    int64_t length = job->lengths[slot];
    return job->window && job->window < length ? length - job->window : 0;
}

static void find_offsets(const Attention *job, int64_t *offsets, int64_t slot, int64_t group) {
    int64_t step = job->groups * job->size, length = job->lengths[slot];
    int64_t page = oldest(job, slot) / job->page;
    for (int64_t start = page * job->page, column = slot * job->columns + page; start < length;
         start += job->page, column++) {
        int64_t offset = job->table[column] * job->page * step + group * job->size;
        int64_t end = start + job->page < length ? start + job->page : length;
        for (int64_t token = start; token < end; token++, offset += step) offsets[token] = offset;
    }
}

INLINE vector part_of(const REAL *from, int part) {
    vector to = {0};
    if (part == LANES) return *(const vector *)from;
    memcpy(&to, from, sizeof(REAL) * part);
    return to;
}

/* Interleave the lower, or the upper, halves of a and b: a[0], b[0], a[1], b[1], ... The unpack
   instructions of x86 work within 16 bytes, so the lanes are listed. */
INLINE vector zip_low(vector a, vector b) {
#if VECTOR_BYTES == 64 && REAL_BYTES == 4
    return LANES_OF(lane_index, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif VECTOR_BYTES / REAL_BYTES == 8
    return LANES_OF(lane_index, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#elif VECTOR_BYTES / REAL_BYTES == 4
    return LANES_OF(lane_index, a, b, 0, 4, 1, 5);
#else
    return LANES_OF(lane_index, a, b, 0, 2);
#endif
}

INLINE vector zip_high(vector a, vector b) {
#if VECTOR_BYTES == 64 && REAL_BYTES == 4
    return LANES_OF(lane_index, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif VECTOR_BYTES / REAL_BYTES == 8
    return LANES_OF(lane_index, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif VECTOR_BYTES / REAL_BYTES == 4
    return LANES_OF(lane_index, a, b, 2, 6, 3, 7);
#else
    return LANES_OF(lane_index, a, b, 1, 3);
#endif
}

/* Transpose [LANES, LANES]: interleave rows i and i + LANES / 2, log2(LANES) times. */
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

/* Transpose `count` keys into the block; unused columns repeat keys[0]. */
INLINE void load_keys(Tile *tile, const REAL *const *keys, int count, int size) {
    for (int start = 0; start < BLOCK; start += LANES)
        for (int e = 0; e < size; e += LANES) {
            vector rows[LANES];
            int part = size - e < LANES ? size - e : LANES;
            for (int lane = 0; lane < LANES; lane++)
                rows[lane] = part_of(keys[start + lane < count ? start + lane : 0] + e, part);
            transpose(rows);
            for (int i = 0; i < part; i++)
                *(vector *)(tile->keys + (e + i) * BLOCK + start) = rows[i];
        }
}

/* Prefetch part `part` of `parts` of the next item's rows at `base` (its keys or values). */
static inline void prefetch_next(const Attention *job, const Tile *tile, const void *base,
                                 int64_t part, int64_t parts) {
    int64_t end = tile->to_prefetch * (part + 1) / parts;
    const int64_t *offsets = tile->next_offsets + tile->prefetch_from;
    for (int64_t token = tile->to_prefetch * part / parts; token < end; token++)
        for (int64_t e = 0; e < job->size; e += 64 / sizeof(REAL))
            __builtin_prefetch((const REAL *)base + offsets[token] + e, 0, 2);
}

/* Scores [ABREAST, BLOCK] of the query rows from `query_row` on against the keys of the block. */
INLINE void score(const Tile *tile, int query_row, int size, REAL *to) {
    const REAL *query = tile->query + (int64_t)query_row * size;
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
    int64_t blocks = (length - tile->from + BLOCK - 1) / BLOCK;
    for (int64_t block = 0; block < blocks; block++) {
        int64_t start = tile->from + block * BLOCK;
        int count = length - start < BLOCK ? (int)(length - start) : BLOCK;
        const REAL *keys[BLOCK];
        for (int i = 0; i < count; i++)
            keys[i] = (const REAL *)job->pages + tile->offsets[start + i];
        prefetch_next(job, tile, job->pages, block, blocks);
        load_keys(tile, keys, count, size);
        for (int query_row = 0; query_row < rows; query_row += ABREAST) {
            REAL block_scores[ABREAST * BLOCK];
            score(tile, query_row, size, block_scores);
            for (int q = 0; q < ABREAST; q++)
                memcpy(tile->scores + (query_row + q) * tile->room + start,
                       block_scores + q * BLOCK, 64);
        }
    }
}

/* The visibility of the window rows `start` to `start + count`: bit i is set if `row` sees row
   start + i. */
static inline uint64_t visible_word(const Attention *job, int64_t slot, int64_t row, int64_t start,
                                    int count) {
    uint64_t all = (1ull << count) - 1;
    if (job->visible) return (uint64_t)job->visible[slot * width(job, slot) + row] >> start & all;
    return row < start ? 0 : row - start >= count ? all : (2ull << (row - start)) - 1;
}

INLINE void score_window(const Attention *job, Tile *tile, int64_t slot, int64_t group, int64_t top,
                         int rows, int size) {
    int64_t per_group = job->heads / job->groups, last = (top + rows - 1) / per_group;
    int64_t end = job->visible ? width(job, slot) : last + 1;
    for (int64_t start = 0; start < end; start += BLOCK) {
        int count = end - start < BLOCK ? (int)(end - start) : BLOCK;
        const REAL *keys[BLOCK], *key = (const REAL *)job->key + group * job->key_group;
        for (int i = 0; i < count; i++) keys[i] = key + flat(job, slot, start + i) * job->key_row;
        load_keys(tile, keys, count, size);
        for (int query_row = 0; query_row < rows; query_row += ABREAST) {
            REAL block_scores[ABREAST * BLOCK];
            score(tile, query_row, size, block_scores);
            for (int q = query_row; q < query_row + ABREAST && q < rows; q++) {
                REAL *scores = tile->scores + q * tile->room;
                int32_t *seen = tile->seen + q * width(job, slot) - job->lengths[slot];
                for (uint64_t bits = visible_word(job, slot, (top + q) / per_group, start, count);
                     bits; bits &= bits - 1) {
                    int lane = __builtin_ctzll(bits);
                    seen[tile->count[q]] = (int32_t)(start + lane);
                    scores[tile->count[q]++] = block_scores[(q - query_row) * BLOCK + lane];
                }
            }
        }
    }
}

/* Replace scores by cap * tanh(score / cap). */
static void cap_scores(REAL *scores, int64_t count, REAL cap) {
    for (int64_t at = 0; at < count; at++) {
        REAL size = (scores[at] < 0 ? -scores[at] : scores[at]) / cap;
        REAL shrunk = EXP(-2 * size), capped = cap * ((1 - shrunk) / (1 + shrunk));
        scores[at] = scores[at] < 0 ? -capped : capped;
    }
}

/* Replace scores by exp(score - largest); returns the sum of these weights, and of the sink's if
   there is one. */
static REAL softmax_weights(REAL *scores, int64_t count, const REAL *sink) {
    REAL largest = sink ? *sink : scores[0], total = 0;
    for (int64_t at = 0; at < count; at++) largest = scores[at] > largest ? scores[at] : largest;
    for (int64_t at = 0; at < count; at++) scores[at] = EXP(scores[at] - largest);
    for (int64_t at = 0; at < count; at++) total += scores[at];
    return sink ? total + EXP(*sink - largest) : total;
}

/* Add the weighted values of the prefix tokens `start` to `end` to elements e .. of ABREAST query
   rows: `parts` vectors of `part` elements. */
INLINE void mix(const Tile *tile, const REAL *values, int64_t start, int64_t end, int query_row,
                int e, int size, const int parts, int part) {
    const REAL *weights = tile->scores + query_row * tile->room;
    REAL *to = tile->mixed + query_row * size + e;
    vector sum[ABREAST][PARTS];
    for (int q = 0; q < ABREAST; q++)
        for (int p = 0; p < parts; p++) sum[q][p] = part_of(to + q * size + p * LANES, part);
    for (int64_t token = start; token < end; token++)
        for (int p = 0; p < parts; p++) {
            vector value = part_of(values + tile->offsets[token] + e + p * LANES, part);
            for (int q = 0; q < ABREAST; q++) sum[q][p] += weights[q * tile->room + token] * value;
        }
    for (int q = 0; q < ABREAST; q++)
        for (int p = 0; p < parts; p++)
            memcpy(to + q * size + p * LANES, &sum[q][p], sizeof(REAL) * part);
}

/* Mix the values of the prefix, in strips of tokens that stay in the cache. */
INLINE void mix_prefix(const Attention *job, Tile *tile, int64_t length, int rows, int size) {
    const REAL *values = (const REAL *)job->pages + job->half;
    int64_t strips = (length - tile->from + STRIP - 1) / STRIP;
    memset(tile->mixed, 0, sizeof(REAL) * TILE * size);
    for (int64_t strip = 0; strip < strips; strip++) {
        int64_t start = tile->from + strip * STRIP;
        int64_t end = start + STRIP < length ? start + STRIP : length;
        prefetch_next(job, tile, values, strip, strips);
        for (int query_row = 0; query_row < rows; query_row += ABREAST) {
            int e = 0;
            for (; size - e >= BLOCK; e += BLOCK)
                mix(tile, values, start, end, query_row, e, size, PARTS, LANES);
            for (; size - e >= LANES; e += LANES)
                mix(tile, values, start, end, query_row, e, size, 1, LANES);
            if (e < size) mix(tile, values, start, end, query_row, e, size, 1, size - e);
        }
    }
}

INLINE void mix_window(const Attention *job, Tile *tile, int64_t slot, int64_t group,
                       int64_t length, int rows, int size) {
    const REAL *window = (const REAL *)job->value + group * job->value_group;
    for (int q = 0; q < rows; q++) {
        const REAL *weights = tile->scores + q * tile->room;
        const int32_t *seen = tile->seen + q * width(job, slot) - length;
        for (int e = 0; e < size; e += LANES) {
            int part = size - e < LANES ? size - e : LANES;
            vector sum = part_of(tile->mixed + q * size + e, part);
            for (int64_t at = tile->first[q] > length ? tile->first[q] : length;
                 at < tile->count[q]; at++)
                sum += weights[at] *
                       part_of(window + flat(job, slot, seen[at]) * job->value_row + e, part);
            memcpy(tile->mixed + q * size + e, &sum, sizeof(REAL) * part);
        }
    }
}

/* Set the tile's `first` and `from` for the query rows from `top` on. */
static void find_first(const Attention *job, Tile *tile, int64_t slot, int64_t top, int rows) {
    int64_t per_group = job->heads / job->groups, length = job->lengths[slot];
    memset(tile->first, 0, sizeof(tile->first));
    tile->from = job->window ? length : 0;
    for (int q = 0; q < rows && job->window; q++) {
        int64_t row = (top + q) / per_group, keys = length + row + 1;
        if (job->visible)
            keys = length + __builtin_popcountll(
                                (uint64_t)job->visible[slot * width(job, slot) + row]);
        if (job->window < keys) tile->first[q] = keys - job->window;
        if (tile->first[q] < tile->from) tile->from = tile->first[q];
    }
}

/* Attend with the query rows `top` to `top + rows` of a slot and group, where
   query row = window row x (H / G) + head of the group. */
INLINE void run(const Attention *job, Tile *tile, int64_t slot, int64_t group, int64_t top,
                int rows, int size) {
    int64_t per_group = job->heads / job->groups, length = job->lengths[slot];
    for (int q = 0; q < rows; q++) {
        int64_t head = group * per_group + (top + q) % per_group, row = (top + q) / per_group;
        const REAL *from = (const REAL *)job->query + flat(job, slot, row) * job->query_row +
                           head * job->query_head;
        for (int e = 0; e < size; e++) tile->query[q * size + e] = from[e] * (REAL)job->scale;
        tile->count[q] = length;
    }
    find_first(job, tile, slot, top, rows);
    score_prefix(job, tile, length, rows, size);
    score_window(job, tile, slot, group, top, rows, size);
    REAL total[TILE];
    for (int q = 0; q < rows; q++) {
        int64_t first = tile->first[q], count = tile->count[q] - first;
        REAL *scores = tile->scores + q * tile->room;
        const REAL *sinks = (const REAL *)job->sinks;
        if (sinks) sinks += group * per_group + (top + q) % per_group;
        if (job->softcap != 0) cap_scores(scores + first, count, (REAL)job->softcap);
        total[q] = count ? softmax_weights(scores + first, count, sinks) : 1;
        /* other rows of the tile see these tokens of the prefix */
        for (int64_t at = tile->from; at < first && at < length; at++) scores[at] = 0;
    }
    mix_prefix(job, tile, length, rows, size);
    mix_window(job, tile, slot, group, length, rows, size);
    for (int q = 0; q < rows; q++) {
        int64_t head = group * per_group + (top + q) % per_group, row = (top + q) / per_group;
        REAL *to = (REAL *)job->out + (flat(job, slot, row) * job->heads + head) * size;
        for (int e = 0; e < size; e++) to[e] = tile->mixed[q * size + e] / total[q];
    }
}

/* Pass the usual head sizes as constants, so that the loops over them unroll. */
static void run_any(const Attention *job, Tile *tile, int64_t slot, int64_t group, int64_t top,
                    int rows) {
    switch (job->size) {
    case 32: run(job, tile, slot, group, top, rows, 32); break;
    case 64: run(job, tile, slot, group, top, rows, 64); break;
    case 128: run(job, tile, slot, group, top, rows, 128); break;
    default: run(job, tile, slot, group, top, rows, (int)job->size);
    }
}

/* Set the item, and find the offsets of the item after it, which this tile will prefetch. */
static void select_item(const Attention *job, Tile *tile, int64_t item) {
    if (tile->item == item) {
        tile->to_prefetch = 0;
        return;
    }
    if (tile->next_item == item) {
        int64_t *offsets = tile->next_offsets;
        tile->next_offsets = tile->offsets, tile->offsets = offsets;
    } else find_offsets(job, tile->offsets, item / job->groups, item % job->groups);
    tile->item = item++, tile->next_item = item, tile->to_prefetch = 0;
    if (item == job->batch * job->groups) return;
    find_offsets(job, tile->next_offsets, item / job->groups, item % job->groups);
    tile->prefetch_from = oldest(job, item / job->groups);
    tile->to_prefetch = job->lengths[item / job->groups] - tile->prefetch_from;
}

static void *aligned(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

/* Returns 0, or 1 if memory ran out. */
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
        Tile tile = {
            .item = -1, .next_item = -1, .room = (longest + widest + 2 * BLOCK) / BLOCK * BLOCK};
        tile.keys = aligned(sizeof(REAL) * BLOCK * job->size);
        tile.offsets = aligned(sizeof(int64_t) * (longest + 1));
        tile.next_offsets = aligned(sizeof(int64_t) * (longest + 1));
        tile.query = aligned(sizeof(REAL) * TILE * job->size);
        tile.mixed = aligned(sizeof(REAL) * TILE * job->size);
        tile.scores = aligned(sizeof(REAL) * TILE * tile.room);
        tile.seen = aligned(sizeof(int32_t) * TILE * (widest + 1));
        failed = !tile.keys || !tile.offsets || !tile.next_offsets || !tile.query || !tile.mixed ||
                 !tile.scores || !tile.seen;
        if (!failed) {
            memset(tile.keys, 0, sizeof(REAL) * BLOCK * job->size);
            memset(tile.query, 0, sizeof(REAL) * TILE * job->size);
        }
#pragma omp for schedule(static)
        for (int64_t index = 0; index < job->batch * job->groups * tiles; index++) {
            int64_t item = index / tiles, slot = item / job->groups, top = index % tiles * TILE;
            int64_t rows = width(job, slot) * heads - top;
            if (failed || rows <= 0) continue;
            select_item(job, &tile, item);
            run_any(job, &tile, slot, item % job->groups, top, rows < TILE ? (int)rows : TILE);
        }
        free(tile.keys), free(tile.offsets), free(tile.next_offsets), free(tile.query);
        free(tile.mixed), free(tile.scores), free(tile.seen);
    }
    return failed;
}
