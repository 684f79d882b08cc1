/* RMSNorm of rows of bfloat16 and the gradient of its input, for processors with AVX512-BF16.

       r = 1 / sqrt(mean(x^2) + eps),  y = w·(r x)
       dx = r·(w∘g - x·r^2·mean(x∘w∘g))

   Each row is one thread's, in float32, so that a row's numbers do not depend on how many rows or threads there are. */

#include "tile.h"
#include "vectors.h"

#include <math.h>

enum { NORMED_ROUNDED, PRODUCT_ROUNDED, ONE_MORE };     /* the last: (1 + w) in place of w */

typedef struct {
    int64_t rows, D, x_stride, g_stride;
    int32_t threads, form;
    float eps;
    const half *x, *g, *w;
    half *out;                  /* y or dx: rows side by side */
    float *r;                   /* of each row */
} Job;

INLINE __m512 weight(const Job *job, const int form, __mmask16 some, long d)
{
    const __m512 w = load_some(some, job->w + d);
    return form == ONE_MORE ? _mm512_add_ps(w, _mm512_set1_ps(1.0f)) : w;
}

INLINE float total(const __m512 sum[4])
{
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

INLINE void row_forward(const Job *job, const int form, long row)
{
    const long D = job->D;
    const half *x = job->x + row * job->x_stride;
    half *y = job->out + row * D;
    __m512 sum[4] = {};
    for (long d = 0; d < D; d += 64)
        for (int i = 0; i < 4; i++) {
            const __m512 a = load_some(first_of(D - d - 16 * i), x + d + 16 * i);
            sum[i] = _mm512_fmadd_ps(a, a, sum[i]);
        }
    job->r[row] = 1.0f / sqrtf(total(sum) / (float)D + job->eps);
    const __m512 r = _mm512_set1_ps(job->r[row]);
    for (long d = 0; d < D; d += 16) {
        const __mmask16 some = first_of(D - d);
        const __m512 normed = _mm512_mul_ps(load_some(some, x + d), r);
        store_some(y + d, some, _mm512_mul_ps(form == NORMED_ROUNDED ? rounded(normed) : normed,
                                              weight(job, form, some, d)));
    }
}

INLINE void row_backward(const Job *job, const int form, long row)
{
    const long D = job->D;
    const half *x = job->x + row * job->x_stride, *g = job->g + row * job->g_stride;
    half *dx = job->out + row * D;
    __m512 sum[4] = {};
    for (long d = 0; d < D; d += 64)
        for (int i = 0; i < 4; i++) {
            const long at = d + 16 * i;
            const __mmask16 some = first_of(D - at);
            const __m512 wg = _mm512_mul_ps(load_some(some, g + at), weight(job, form, some, at));
            sum[i] = _mm512_fmadd_ps(load_some(some, x + at), wg, sum[i]);
        }
    const float once = job->r[row];
    const __m512 r = _mm512_set1_ps(once), less = _mm512_set1_ps(once * once * once * (total(sum) / (float)D));
    for (long d = 0; d < D; d += 16) {
        const __mmask16 some = first_of(D - d);
        const __m512 wg = _mm512_mul_ps(load_some(some, g + d), weight(job, form, some, d));
        store_some(dx + d, some, _mm512_fmsub_ps(r, wg, _mm512_mul_ps(less, load_some(some, x + d))));
    }
}

INLINE void rows(const Job *job, const int form, const bool back)
{
#pragma omp parallel for schedule(static) num_threads(job->threads) if (job->rows * job->D > FEW)
    for (long row = 0; row < job->rows; row++)
        if (back)
            row_backward(job, form, row);
        else
            row_forward(job, form, row);
}

INLINE bool every(const Job *job, const bool back)
{
    switch (job->form) {
    case NORMED_ROUNDED: rows(job, NORMED_ROUNDED, back); break;
    case PRODUCT_ROUNDED: rows(job, PRODUCT_ROUNDED, back); break;
    default: rows(job, ONE_MORE, back);
    }
    return true;
}

/* Write y and r; it needs no memory. */
bool forward(const Job *job)
{
    return every(job, false);
}

/* Write dx; it needs no memory. */
bool backward(const Job *job)
{
    return every(job, true);
}
