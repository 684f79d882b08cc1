/* Cross entropy of rows of bfloat16 logits and its gradient, for processors with AVX512-BF16.

       l = (1-e)·(lse - z_t) + e·(lse - mean z) + k·lse^2      lse = log Σ exp z, e smoothing, k the weight of z-loss
       dz = c·p - (1-e)·1_t - e/V                              p = exp(z - lse), c = 1 + 2·k·lse

   Each row is one thread's, and stays in its cache between three passes: the largest logit, the exponentials, dz. The
   target is left out of the sum of exponentials, so that neither l nor dz_t = -Σ dz of a word that is nearly certain
   is what rounding left of a difference. Vectors are float32; what is done once a row is double. */

#include "tile.h"
#include "vectors.h"

#include <float.h>
#include <math.h>

enum { BLOCK = 2048 };          /* logits whose sum is float32: few enough a lane for equal errors not to pile up */
static const half NOTHING = 0xff80;     /* -inf, whose exponential is 0 */

typedef struct {
    int64_t rows, V, stride, threads;
    double smoothing, z_loss;
    half *z;                    /* dz takes its place */
    const int64_t *target;
    float *loss;
} Job;

typedef struct {
    float most;                             /* the largest logit, from which the others here are counted */
    double target, mean, others, lse;       /* others: log Σ exp z of all words but the target */
} Row;

INLINE float total(const __m512 sum[4])
{
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

/* The largest of z, numbers of which NaN is none, and more than -inf. */
INLINE float largest(long V, const half *z)
{
    __m512 most[4];
    for (int i = 0; i < 4; i++) most[i] = _mm512_set1_ps(-FLT_MAX);
    for (long v = 0; v < V; v += 64)
        for (int i = 0; i < 4; i++) {
            const __mmask16 some = first_of(V - v - 16 * i);
            most[i] = _mm512_mask_max_ps(most[i], some, load_some(some, z + v + 16 * i), most[i]);
        }
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])));
}

/* Σ exp(z - most), or Σ z. */
INLINE double sum_of(const bool exponentials, long V, const half *z, float most)
{
    double sum = 0;
    for (long start = 0; start < V; start += BLOCK) {
        const long stop = MIN(V, start + BLOCK);
        __m512 part[4] = {};
        for (long v = start; v < stop; v += 64)
            for (int i = 0; i < 4; i++) {
                const __mmask16 some = first_of(stop - v - 16 * i);
                __m512 x = load_some(some, z + v + 16 * i);
                if (exponentials)
                    x = exp2_(_mm512_mul_ps(_mm512_sub_ps(x, _mm512_set1_ps(most)), _mm512_set1_ps(LOG2_E)));
                part[i] = _mm512_mask_add_ps(part[i], some, part[i], x);
            }
        sum += total(part);
    }
    return sum;
}

INLINE Row row_of(const Job *job, half *z, half *target)
{
    const long V = job->V;
    const half kept = *target;
    const float most = largest(V, z), z_target = _mm512_cvtss_f32(load_some(1, target));
    Row row = { .most = most, .target = (double)z_target - most };
    if (job->smoothing) row.mean = sum_of(false, V, z, 0) / (double)V - most;
    *target = NOTHING;
    row.others = log(sum_of(true, V, z, most));
    *target = kept;
    row.lse = fmax(row.others, row.target) + log1p(exp(-fabs(row.others - row.target)));
    return row;
}

INLINE float loss_of(const Job *job, Row row)
{
    const double lse = row.most + row.lse;
    double loss = (1 - job->smoothing) * (row.lse - row.target);
    if (job->smoothing) loss += job->smoothing * (row.lse - row.mean);
    if (job->z_loss) loss += job->z_loss * lse * lse;
    return (float)loss;
}

INLINE void write_gradient(const Job *job, Row row, half *z, half *target)
{
    const double share = job->smoothing / (double)job->V;
    const double more = job->z_loss ? 2 * job->z_loss * (row.most + row.lse) : 0;
    const double dz_target = more + job->smoothing - share - (1 + more) * exp(row.others - row.lse);
    const __m512 most = _mm512_set1_ps(row.most), log2_e = _mm512_set1_ps(LOG2_E);
    const __m512 log2_sum = _mm512_set1_ps((float)(row.lse * M_LOG2E));
    const __m512 c = _mm512_set1_ps((float)(1 + more)), less = _mm512_set1_ps((float)share);
    for (long v = 0; v < job->V; v += 16) {
        const __mmask16 some = first_of(job->V - v);
        const __m512 below = _mm512_sub_ps(load_some(some, z + v), most);
        store_some(z + v, some, _mm512_fmsub_ps(c, exp2_(_mm512_fmsub_ps(below, log2_e, log2_sum)), less));
    }
    store_some(target, 1, _mm512_set1_ps((float)dz_target));
}

INLINE bool every(const Job *job, const bool back)
{
    for (long row = 0; row < job->rows; row++)
        if (job->target[row] < 0 || job->target[row] >= job->V) return false;
#pragma omp parallel for schedule(static) num_threads((int)job->threads) if (job->rows * job->V > FEW)
    for (long i = 0; i < job->rows; i++) {
        half *z = job->z + i * job->stride, *target = z + job->target[i];
        const Row row = row_of(job, z, target);
        job->loss[i] = loss_of(job, row);
        if (back) write_gradient(job, row, z, target);
    }
    return true;
}

/* Write the losses; false where a target is no word. */
bool forward(const Job *job)
{
    return every(job, false);
}

/* Write the losses, and dz in the place of z; false where a target is no word. */
bool backward(const Job *job)
{
    return every(job, true);
}
