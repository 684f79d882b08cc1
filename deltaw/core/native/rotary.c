/* Rotary positions of heads in bfloat16, and their gradient, for processors with AVX512-BF16.

       y1 = x1·c1 - x2·s1,   y2 = x2·c2 + x1·s2        x1, x2: the halves of a head; c, s: those of cos and sin
       dx1 = g1·c1 + g2·s2,  dx2 = g2·c2 - g1·s1 */

#include "tile.h"
#include "vectors.h"

typedef struct { half *data; int64_t row, head, token; } View;          /* (rows, heads, T, D) and its strides */
typedef struct { const half *data; int64_t row, token; } Angles;        /* (rows, T, D) */

typedef struct {
    int64_t rows, heads, T, D, threads;
    View x, y;                  /* in the backward pass g and dx */
    Angles cosine, sine;
} Job;

INLINE void token(const Job *job, long row, long t, const bool back)
{
    const long H = job->D / 2;
    const half *c = job->cosine.data + row * job->cosine.row + t * job->cosine.token;
    const half *s = job->sine.data + row * job->sine.row + t * job->sine.token;
    for (long head = 0; head < job->heads; head++) {
        const half *x = job->x.data + row * job->x.row + head * job->x.head + t * job->x.token;
        half *y = job->y.data + row * job->y.row + head * job->y.head + t * job->y.token;
        for (long d = 0; d < H; d += 16) {
            const __mmask16 some = first_of(H - d);
            const __m512 x1 = load_some(some, x + d), x2 = load_some(some, x + H + d);
            const __m512 c1 = load_some(some, c + d), c2 = load_some(some, c + H + d);
            const __m512 s1 = load_some(some, s + d), s2 = load_some(some, s + H + d);
            if (back) {
                store_some(y + d, some, _mm512_fmadd_ps(x1, c1, _mm512_mul_ps(x2, s2)));
                store_some(y + H + d, some, _mm512_fmsub_ps(x2, c2, _mm512_mul_ps(x1, s1)));
            } else {
                store_some(y + d, some, _mm512_fmsub_ps(x1, c1, _mm512_mul_ps(x2, s1)));
                store_some(y + H + d, some, _mm512_fmadd_ps(x2, c2, _mm512_mul_ps(x1, s2)));
            }
        }
    }
}

INLINE bool every(const Job *job, const bool back)
{
#pragma omp parallel for collapse(2) schedule(static) num_threads((int)job->threads) \
    if (job->rows * job->T * job->heads * job->D > FEW)
    for (long row = 0; row < job->rows; row++)
        for (long t = 0; t < job->T; t++) token(job, row, t, back);
    return true;
}

/* Write y of x; it needs no memory. */
bool forward(const Job *job)
{
    return every(job, false);
}

/* Write dx, as y, of g, as x; it needs no memory. */
bool backward(const Job *job)
{
    return every(job, true);
}
