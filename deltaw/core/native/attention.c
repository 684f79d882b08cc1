/* Causal attention of examples in bfloat16, forward and backward, for processors with AVX512-BF16.

       S = s·q kT,  P = softmax(S),  y = P v
       dv = PT g,  dP = g vT,  dS = s·P∘(dP - rowsum(y∘g)),  dq = dS k,  dk = dST q

   A block of queries meets a block of keys at a time, and its scores never leave the first cache. They are made
   transposed, (keys, queries): a vector holds 16 queries, so that a softmax's maxima and sums need no shuffling, and PT
   and dST lie as their products want them. S, P, dP and all sums are float32. */

#include "tile.h"
#include "layout.h"
#include "vectors.h"

#include <math.h>
#include <stdlib.h>

typedef struct { int64_t row, start, length; } Span;                    /* an example: a stretch of a row */
typedef struct { half *data; int64_t row, head, token; } View;          /* (rows, heads, T, D) and its strides */
typedef struct { float *data; int64_t row, head, token; } Sums;         /* (rows, heads, T) */

typedef struct {
    int64_t examples, heads, kv_heads, D;
    float scale;
    int32_t threads;
    const Span *span;           /* the longest first */
    View g, q, k, v, y, dq, dk, dv;
    Sums lse;                   /* log-sum-exp of each row of S */
} Job;

typedef struct {                /* what a thread has to itself */
    pair *q_t, *g_t, *q_p, *g_p, *P_p, *dS_p;
    half *P, *dS, *k_t;
    float *S, *dP, *sum_t, *dk, *dv;
    char *memory;
} Work;

#define AT(view, span, h, t) \
    ((view).data + (span).row * (view).row + (h) * (view).head + ((span).start + (t)) * (view).token)
#define LN_2 0.69314718055994531f

static void *take(char **memory, size_t bytes)
{
    void *taken = *memory;
    *memory += UP(bytes, 64);
    return taken;
}

static bool prepare(Work *w, const Job *job, bool backward)
{
    const size_t D = job->D, square = BLOCK * BLOCK, wide = UP(job->span[0].length, BLOCK);
    size_t bytes = sizeof(float) * (square * 4 + D * BLOCK * 4 + 2 * D * wide) + sizeof(half) * (2 * square + D * wide);
    char *at = w->memory = aligned_alloc(64, UP(bytes + 16 * 64, 64));
    if (!at) return false;
    w->q_t = take(&at, D / 2 * BLOCK * sizeof(pair)), w->P_p = take(&at, square / 2 * sizeof(pair));
    w->S = take(&at, square * sizeof(float)), w->sum_t = take(&at, D * BLOCK * sizeof(float));
    w->k_t = take(&at, D * wide * sizeof(half));
    if (!backward) return true;
    w->g_t = take(&at, D / 2 * BLOCK * sizeof(pair)), w->q_p = take(&at, D / 2 * BLOCK * sizeof(pair));
    w->g_p = take(&at, D / 2 * BLOCK * sizeof(pair)), w->dS_p = take(&at, square / 2 * sizeof(pair));
    w->P = take(&at, square * sizeof(half)), w->dS = take(&at, square * sizeof(half));
    w->dP = take(&at, square * sizeof(float));
    w->dk = take(&at, D * wide * sizeof(float)), w->dv = take(&at, D * wide * sizeof(float));
    return true;
}

INLINE __m512 counted_from(long first)
{
    const __m512i up = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(up, _mm512_set1_epi32((int)first)));
}

INLINE __mmask16 is_after(long key, __m512 query)
{
    return _mm512_cmp_ps_mask(_mm512_set1_ps((float)key), query, _CMP_GT_OQ);
}

/* One step of a softmax over blocks of keys, for 16 queries: PT from ST, paired; sum_t is brought to the new maxima. */
INLINE void softmax_of_16(Work *w, int n, long keys, long first_key, long first_query, float scale, long D,
                          float *highest, float *sums)
{
    const bool masked = first_key + keys - 1 > first_query;
    const __m512 query = counted_from(first_query + 16 * n), by = _mm512_set1_ps(scale);
    const __m512 before = _mm512_loadu_ps(highest + 16 * n), never = _mm512_set1_ps(-INFINITY);
    float *s = w->S + 16 * n;
    __m512 most = before;
    for (long k = 0; k < keys; k++) {
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(s + k * BLOCK), by);
        if (masked)
            x = _mm512_mask_mov_ps(x, is_after(first_key + k, query), never);
        _mm512_storeu_ps(s + k * BLOCK, x);
        most = _mm512_max_ps(x, most);
    }
    const __m512 fix = exp2_(_mm512_sub_ps(before, most));
    __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(sums + 16 * n), fix);
    for (long k = 0; k < keys; k += 2) {
        const __m512 even = exp2_(_mm512_sub_ps(_mm512_loadu_ps(s + k * BLOCK), most));
        const __m512 odd = k + 1 == keys ? _mm512_setzero_ps()
                                         : exp2_(_mm512_sub_ps(_mm512_loadu_ps(s + (k + 1) * BLOCK), most));
        sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
        _mm512_storeu_si512(w->P_p + k / 2 * BLOCK + 16 * n, interleaved(even, odd));
    }
    _mm512_storeu_ps(highest + 16 * n, most);
    _mm512_storeu_ps(sums + 16 * n, sum);
    if (first_key && _mm512_cmp_ps_mask(fix, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ))
        for (float *x = w->sum_t + 16 * n, *end = x + D * BLOCK; x < end; x += BLOCK)
            _mm512_storeu_ps(x, _mm512_mul_ps(_mm512_loadu_ps(x), fix));
}

/* y and lse of a head of an example. */
static void head_forward(Work *w, const Job *job, Span span, long head, long kv_head)
{
    const long D = job->D, wide = UP(span.length, BLOCK);
    float highest[BLOCK], sums[BLOCK];
    for (long at = 0; at < span.length; at += BLOCK) {
        const long count = MIN(BLOCK, span.length - at), vectors = UP(count, 16) / 16;
        paired_transpose(AT(job->q, span, head, at), job->q.token, count, D, w->q_t);
        for (long i = 0; i < BLOCK; i++) highest[i] = -INFINITY, sums[i] = 0.0f;
        for (long first = 0; first < at + count; first += BLOCK) {
            const long keys = MIN(BLOCK, at + count - first);
            product(keys, vectors, D / 2, AT(job->k, span, kv_head, first), job->k.token, w->q_t, BLOCK, w->S, BLOCK,
                    false);
            for (int n = 0; n < vectors; n++)
                softmax_of_16(w, n, keys, first, at, job->scale * LOG2_E, D, highest, sums);
            product(D, vectors, (keys + 1) / 2, w->k_t + first, wide, w->P_p, BLOCK, w->sum_t, BLOCK, first > 0);
        }
        for (long i = 0; i < count; i++) {
            *AT(job->lse, span, head, at + i) = LN_2 * (highest[i] + log2f(sums[i]));
            sums[i] = 1.0f / sums[i];
        }
        write_columns(w->sum_t, sums, count, D, AT(job->y, span, head, at), job->y.token);
    }
}

/* PT and dST of a block for 16 queries, as rows and dST paired as well. */
INLINE void gradients_of_16(Work *w, int n, long keys, long first_key, long first_query, float scale, const float *lse,
                            const float *delta)
{
    const bool masked = first_key + keys - 1 > first_query;
    const __m512 by = _mm512_set1_ps(scale * LOG2_E), query = counted_from(first_query + 16 * n);
    const __m512 less = _mm512_loadu_ps(lse + 16 * n), mean = _mm512_loadu_ps(delta + 16 * n);
    for (long k = 0; k < keys; k += 2) {
        __m512 dS[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (long i = 0; i < 2 && k + i < keys; i++) {
            const long place = (k + i) * BLOCK + 16 * n;
            __m512 P = exp2_(_mm512_fmsub_ps(_mm512_loadu_ps(w->S + place), by, less));
            if (masked)
                P = _mm512_mask_mov_ps(P, is_after(first_key + k + i, query), _mm512_setzero_ps());
            dS[i] = _mm512_mul_ps(_mm512_mul_ps(P, _mm512_set1_ps(scale)),
                                  _mm512_sub_ps(_mm512_loadu_ps(w->dP + place), mean));
            store(w->P + place, P);
            store(w->dS + place, dS[i]);
        }
        _mm512_storeu_si512(w->dS_p + k / 2 * BLOCK + 16 * n, interleaved(dS[0], dS[1]));
    }
}

/* dq of a head of an example, and what it adds to dk and dv. */
static void head_backward(Work *w, const Job *job, Span span, long head, long kv_head, float *dk, float *dv)
{
    const long D = job->D, wide = UP(span.length, BLOCK);
    float lse[BLOCK], delta[BLOCK], ones[BLOCK];
    for (long at = 0; at < span.length; at += BLOCK) {
        const long count = MIN(BLOCK, span.length - at), vectors = UP(count, 16) / 16;
        const half *q = AT(job->q, span, head, at), *g = AT(job->g, span, head, at);
        paired_transpose(q, job->q.token, count, D, w->q_t), paired_transpose(g, job->g.token, count, D, w->g_t);
        paired(q, job->q.token, count, D, w->q_p), paired(g, job->g.token, count, D, w->g_p);
        for (long i = 0; i < BLOCK; i++) {
            __m512 sum = _mm512_setzero_ps();
            for (long d = 0; i < count && d < D; d += 32)
                sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(AT(job->y, span, head, at + i) + d),
                                       (__m512bh)_mm512_loadu_si512(g + i * job->g.token + d));
            delta[i] = _mm512_reduce_add_ps(sum), ones[i] = 1.0f;
            lse[i] = i < count ? LOG2_E * *AT(job->lse, span, head, at + i) : INFINITY;      /* P of no query is zero */
        }
        for (long first = 0; first < at + count; first += BLOCK) {
            const long keys = MIN(BLOCK, at + count - first);
            product(keys, vectors, D / 2, AT(job->k, span, kv_head, first), job->k.token, w->q_t, BLOCK, w->S, BLOCK,
                    false);
            product(keys, vectors, D / 2, AT(job->v, span, kv_head, first), job->v.token, w->g_t, BLOCK, w->dP, BLOCK,
                    false);
            for (int n = 0; n < vectors; n++) gradients_of_16(w, n, keys, first, at, job->scale, lse, delta);
            product(keys, D / 16, vectors * 8, w->P, BLOCK, w->g_p, D, dv + first * D, D, true);
            product(keys, D / 16, vectors * 8, w->dS, BLOCK, w->q_p, D, dk + first * D, D, true);
            product(D, vectors, (keys + 1) / 2, w->k_t + first, wide, w->dS_p, BLOCK, w->sum_t, BLOCK, first > 0);
        }
        write_columns(w->sum_t, ones, count, D, AT(job->dq, span, head, at), job->dq.token);
    }
}

/* Tasks of an example and a head of keys, or of one of its heads of queries where those are too few for the threads. */
static long parts_of(const Job *job)
{
    return job->examples * job->kv_heads < 4 * job->threads ? job->heads / job->kv_heads : 1;
}

/* Write y and lse; whether there was memory for it. */
bool forward(const Job *job)
{
    const long parts = parts_of(job), shared = job->heads / job->kv_heads / parts, all = job->kv_heads * parts;
    bool failed = false;
#pragma omp parallel num_threads(job->threads) reduction(||: failed)
    {
        Work w;
        const bool ready = prepare(&w, job, false);
        failed = !ready;
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < job->examples * all; task++) {
            const Span span = job->span[task / all];
            const long first = task % all * shared, kv_head = task % all / parts;
            if (!ready) continue;
            transposed(AT(job->v, span, kv_head, 0), job->v.token, span.length, job->D, w.k_t, UP(span.length, BLOCK));
            for (long head = first; head < first + shared; head++) head_forward(&w, job, span, head, kv_head);
        }
        free(w.memory);
    }
    return !failed;
}

/* Write dq, dk and dv; whether there was memory for it. */
bool backward(const Job *job)
{
    const long parts = parts_of(job), shared = job->heads / job->kv_heads / parts, all = job->kv_heads * parts;
    const long D = job->D, wide = UP(job->span[0].length, BLOCK) * D, tasks = job->examples * all;
    /* of each task: dk, dv */
    float *sums = parts > 1 ? aligned_alloc(64, 2 * tasks * wide * sizeof(float)) : NULL;
    bool failed = parts > 1 && !sums;
    if (failed) return false;
#pragma omp parallel num_threads(job->threads) reduction(||: failed)
    {
        Work w;
        const bool ready = prepare(&w, job, true);
        failed = !ready;
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < tasks; task++) {
            const Span span = job->span[task / all];
            const long first = task % all * shared, kv_head = task % all / parts;
            float *dk = sums ? sums + 2 * task * wide : w.dk, *dv = sums ? dk + wide : w.dv;
            if (!ready) continue;
            transposed(AT(job->k, span, kv_head, 0), job->k.token, span.length, D, w.k_t, UP(span.length, BLOCK));
            memset(dk, 0, span.length * D * sizeof(float)), memset(dv, 0, span.length * D * sizeof(float));
            for (long head = first; head < first + shared; head++) head_backward(&w, job, span, head, kv_head, dk, dv);
            if (sums) continue;
            write_rows(dk, span.length, D, AT(job->dk, span, kv_head, 0), job->dk.token);
            write_rows(dv, span.length, D, AT(job->dv, span, kv_head, 0), job->dv.token);
        }
#pragma omp for schedule(dynamic, 1)
        for (long some = 0; some < (sums ? job->examples * job->kv_heads : 0); some++) {
            const Span span = job->span[some / job->kv_heads];
            const long kv_head = some % job->kv_heads, count = span.length * D;
            float *dk = sums + 2 * some * parts * wide, *dv = dk + wide;
            for (long part = 1; part < parts; part++)
                for (long i = 0; i < count; i++) dk[i] += dk[2 * part * wide + i], dv[i] += dv[2 * part * wide + i];
            write_rows(dk, span.length, D, AT(job->dk, span, kv_head, 0), job->dk.token);
            write_rows(dv, span.length, D, AT(job->dv, span, kv_head, 0), job->dv.token);
        }
        free(w.memory);
    }
    free(sums);
    return !failed;
}
