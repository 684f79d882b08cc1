/* Products of rows with a matrix whose numbers were put in the order in which they are read.

   A matrix W (N, K) lies in blocks of 16 outputs; in a block, the 16 numbers of each input follow each other. Numbers
   that 16 bits hold exactly (bfloat16) take 16: two inputs share a word, the even one below, so that a shift or a mask
   makes floats of them. Inputs lie in tiles of M rows, (K, M). Sums are in fp32 always. */

#include <stdint.h>
#include <stddef.h>

#define LANES 16

typedef float V __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t U __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t I __attribute__((vector_size(4 * LANES), aligned(4)));

typedef struct {
    const void *packed;
    const float *bias;          /* or NULL */
    int32_t out, in, narrow;    /* narrow: 16 bits a number */
    int32_t site;               /* where in the table of low-rank factors */
} Matrix;

#define INLINE static inline __attribute__((always_inline))

INLINE size_t block_bytes(const Matrix *w) { return (size_t)LANES * w->in * (w->narrow ? 2 : 4); }

/* y (M, 16) = x (M, K) · a block (16, K); in S sums for each row, since a processor adds faster than one sum can grow. */
INLINE void tile(const int M, const int S, const int narrow, const void *block, const float *x_KM, int inputs,
                 float *y, size_t stride)
{
    V sum[M * S];
    for (int i = 0; i < M * S; i++) sum[i] = (V){0};
    const int step = S > 2 ? S : 2;
    for (int k = 0; k < inputs; k += step)
        for (int j = 0; j < step; j += 2) {
            V even, odd;
            if (narrow) {
                U pair = ((const U *)block)[(k + j) / 2];
                even = (V)(pair << 16), odd = (V)(pair & 0xffff0000u);
            } else
                even = ((const V *)block)[k + j], odd = ((const V *)block)[k + j + 1];
            const float *x = x_KM + (size_t)(k + j) * M;
            for (int m = 0; m < M; m++) sum[m * S + j % S] += even * x[m];
            for (int m = 0; m < M; m++) sum[m * S + (j + 1) % S] += odd * x[M + m];
        }
    for (int m = 0; m < M; m++) {
        V total = sum[m * S];
        for (int s = 1; s < S; s++) total += sum[m * S + s];
        *(V *)(y + m * stride) = total;
    }
}

/* The rows of a tile: enough for all, and at most 16. */
static int tile_rows(int rows)
{
    int m = 1;
    while (m < rows && m < LANES) m *= 2;
    return m;
}

INLINE void tiles_of(const int narrow, const Matrix *w, const char *block, const float *x, int tiles, int M, float *y,
                     size_t stride)
{
    for (int i = 0; i < tiles; i++, x += (size_t)M * w->in, y += M * stride)
        switch (M) {
        case 1: tile(1, 8, narrow, block, x, w->in, y, stride); break;
        case 2: tile(2, 8, narrow, block, x, w->in, y, stride); break;
        case 4: tile(4, 4, narrow, block, x, w->in, y, stride); break;
        case 8: tile(8, 2, narrow, block, x, w->in, y, stride); break;
        default: tile(16, 1, narrow, block, x, w->in, y, stride);
        }
}

/* Outputs 16·b to 16·b + 15 of all rows. */
static void product(const Matrix *w, int b, const float *x, int tiles, int M, float *y, size_t stride)
{
    const char *block = (const char *)w->packed + b * block_bytes(w);
    if (w->narrow) tiles_of(1, w, block, x, tiles, M, y + b * LANES, stride);
    else tiles_of(0, w, block, x, tiles, M, y + b * LANES, stride);
}

/* W (N, K) in the order of `product`; outputs are filled up to a multiple of 16 with zeros. */
void pack(const float *w_NK, int outputs, int inputs, int narrow, void *packed)
{
    for (int n = 0; n < outputs; n += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            const float *row = n + lane < outputs ? w_NK + (size_t)(n + lane) * inputs : NULL;
            for (int k = 0; k < inputs; k++) {
                union { float f; uint32_t bits; } number = {row ? row[k] : 0.0f};
                size_t block = (size_t)n * inputs;
                if (narrow) ((uint16_t *)packed)[block + (k / 2 * LANES + lane) * 2 + k % 2] = number.bits >> 16;
                else ((float *)packed)[block + (size_t)k * LANES + lane] = number.f;
            }
        }
}
