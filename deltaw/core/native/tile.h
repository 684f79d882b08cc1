/* Products of bfloat16, summed in float32.

   Of C = A·B, A is read as it lies, row by row. B is paired: the two numbers that meet a pair of A's are side by side,
   32 bits, and a vector holds them for 16 columns. */

#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t half;          /* the bits of a bfloat16 */
typedef uint32_t pair;          /* two of them */

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define UP(n, to) (((n) + (to) - 1) / (to) * (to))
enum { ROWS = 6, VECTORS = 4 }; /* of a tile: 24 sums, with what they are made of, are the registers that there are */

/* C (+)= A·B for `rows` rows and 16·`vectors` columns, both known to the compiler; `depth` counts pairs. */
INLINE void tile(const int rows, const int vectors, long depth, const half *A, long lda, const pair *B, long ldb,
                 float *C, long ldc, bool add)
{
    __m512 sum[ROWS][VECTORS];
    __m512bh b[VECTORS];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < vectors; n++) sum[m][n] = add ? _mm512_loadu_ps(C + m * ldc + 16 * n) : _mm512_setzero_ps();
    for (long p = 0; p < depth; p++) {
        for (int n = 0; n < vectors; n++) b[n] = (__m512bh)_mm512_loadu_si512(B + p * ldb + 16 * n);
        for (int m = 0; m < rows; m++) {
            int32_t two;
            memcpy(&two, A + m * lda + 2 * p, sizeof two);
            const __m512bh a = (__m512bh)_mm512_set1_epi32(two);
            for (int n = 0; n < vectors; n++) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], a, b[n]);
        }
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < vectors; n++) _mm512_storeu_ps(C + m * ldc + 16 * n, sum[m][n]);
}

INLINE void columns(const int vectors, long rows, long depth, const half *A, long lda, const pair *B, long ldb,
                    float *C, long ldc, bool add)
{
    long m = 0;
    for (; m + ROWS <= rows; m += ROWS) tile(ROWS, vectors, depth, A + m * lda, lda, B, ldb, C + m * ldc, ldc, add);
    for (; m + 2 <= rows; m += 2) tile(2, vectors, depth, A + m * lda, lda, B, ldb, C + m * ldc, ldc, add);
    for (; m < rows; m++) tile(1, vectors, depth, A + m * lda, lda, B, ldb, C + m * ldc, ldc, add);
}

/* C (rows, 16·vectors) (+)= A (rows, 2·depth) · B (2·depth, 16·vectors); lda is in halves, ldb in pairs. */
static void product(long rows, long vectors, long depth, const half *A, long lda, const pair *B, long ldb, float *C,
                    long ldc, bool add)
{
    for (long n = 0; n < vectors; n += VECTORS, B += 16 * VECTORS, C += 16 * VECTORS)
        switch (MIN(vectors - n, VECTORS)) {
        case 1: columns(1, rows, depth, A, lda, B, ldb, C, ldc, add); break;
        case 2: columns(2, rows, depth, A, lda, B, ldb, C, ldc, add); break;
        case 3: columns(3, rows, depth, A, lda, B, ldb, C, ldc, add); break;
        default: columns(4, rows, depth, A, lda, B, ldb, C, ldc, add);
        }
}
