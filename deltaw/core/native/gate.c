/* The product of a gated feed-forward with SiLU, in bfloat16, and its gradients, for processors with AVX512-BF16.

       a = g·s(g),  p = a∘u,  s(g) = 1 / (1 + exp(-g))
       dg = dp∘u·s(g)·(1 + g·(1 - s(g))),  du = dp∘a

   a and dp∘u are rounded to bfloat16 on the way, as they are where each is a result of its own. */

#include "tile.h"
#include "vectors.h"

typedef struct {
    int64_t rows, O, g_stride, u_stride, dp_stride;
    int64_t threads;
    const half *g, *u, *dp;
    half *p, *dg, *du;          /* rows side by side */
} Job;

/* 1 + exp(-g) */
INLINE __m512 one_and_exp(__m512 g)
{
    return _mm512_add_ps(_mm512_set1_ps(1.0f), exp2_(_mm512_mul_ps(g, _mm512_set1_ps(-LOG2_E))));
}

/* Write p; it needs no memory. */
bool forward(const Job *job)
{
#pragma omp parallel for schedule(static) num_threads((int)job->threads) if (job->rows * job->O > FEW)
    for (long row = 0; row < job->rows; row++)
        for (long o = 0; o < job->O; o += 16) {
            const __mmask16 some = first_of(job->O - o);
            const __m512 g = load_some(some, job->g + row * job->g_stride + o);
            const __m512 u = load_some(some, job->u + row * job->u_stride + o);
            const __m512 a = rounded(_mm512_div_ps(g, one_and_exp(g)));
            store_some(job->p + row * job->O + o, some, _mm512_mul_ps(a, u));
        }
    return true;
}

/* Write dg and du; it needs no memory. */
bool backward(const Job *job)
{
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for schedule(static) num_threads((int)job->threads) if (job->rows * job->O > FEW)
    for (long row = 0; row < job->rows; row++)
        for (long o = 0; o < job->O; o += 16) {
            const __mmask16 some = first_of(job->O - o);
            const __m512 g = load_some(some, job->g + row * job->g_stride + o);
            const __m512 u = load_some(some, job->u + row * job->u_stride + o);
            const __m512 dp = load_some(some, job->dp + row * job->dp_stride + o);
            const __m512 s = _mm512_div_ps(one, one_and_exp(g)), a = rounded(_mm512_mul_ps(g, s));
            const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
            store_some(job->dg + row * job->O + o, some, _mm512_mul_ps(rounded(_mm512_mul_ps(dp, u)), slope));
            store_some(job->du + row * job->O + o, some, _mm512_mul_ps(dp, a));
        }
    return true;
}
