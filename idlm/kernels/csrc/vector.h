/* Properties of the target machine: the width and number of its vector registers. One source serves
   AVX-512 (32 registers of 64 bytes), AVX2 (16 of 32), plain x86-64 (16 of 16) and ARM64 (32 of
   16). The sums of a tile must stay in registers, so the shape of a tile is chosen here. */

#include <stdint.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#define TILE_VECTORS 2
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#define TILE_VECTORS 2
#elif defined(__aarch64__)
#define VECTOR_BYTES 16
#define TILE_ROWS 5
#define TILE_VECTORS 4
#else
#define VECTOR_BYTES 16
#define TILE_ROWS 5
#define TILE_VECTORS 2
#endif

#define INLINE static inline __attribute__((always_inline))

/* Select lanes of two vectors by index; the lanes of b come after those of a. */
#if defined(__clang__) || __GNUC__ >= 12
#define LANES_OF(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LANES_OF(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif
