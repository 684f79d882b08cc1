/* The narrow products of low-rank changes in bfloat16, for segments of tokens that have an adapter each.

       h = s·x [A1; A2; …]T      yi += hi BiT                                   for each segment and projection i
       dh = [s·gi Bi]            dx += dh [A1; A2; …]      dA = dhT x      dBi = giT hi

   A and B are float32 or bfloat16 where they lie, their gradients float32 where they will lie. Sums are float32; h and
   dh are rounded to bfloat16, and y and dx once. Each number is summed in an order of its segment alone: neither its
   neighbours nor the number of threads change a bit of it. */

#include "tile.h"
#include "layout.h"

#include <omp.h>
#include <stdlib.h>

enum { CHUNK = 256, COLUMNS = 64 };     /* tokens, or columns of gradients, that are a task at most */

typedef struct {
    int64_t which, rank;                /* the projection */
    const void *A, *B;                  /* (R, I), (O, R) */
    float *dA, *dB;
    double scale;
} Part;

typedef struct {
    int64_t start, stop, first, parts;  /* tokens, and which parts */
} Segment;

typedef struct {
    half *data;
    int64_t stride, width;
} Rows;

typedef struct {
    int64_t segments, threads, wide;    /* wide: whether factors are float32 */
    const Segment *segment;
    const Part *part;
    Rows x, dx, h;                      /* h has room for the widest segment, in whole 32 columns; dx may be none */
    const Rows *y;                      /* of each projection: y forward, g backward, which may be none */
} Job;

/* Ranks are even here: an odd one has a column of zeros. */
#define EVEN(rank) (((rank) + 1) & ~1L)

static long columns_of(const Job *job, const Segment *s)
{
    long sum = 0;
    for (long i = 0; i < s->parts; i++) sum += EVEN(job->part[s->first + i].rank);
    return sum;
}

/* 16 numbers of a factor from `at` on, those of them that `some` has. */
INLINE __m512 numbers(const void *factor, bool wide, long at, __mmask16 some)
{
    if (wide) return _mm512_maskz_loadu_ps(some, (const float *)factor + at);
    const __m256i low = _mm256_maskz_loadu_epi16(some, (const half *)factor + at);
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16);
}

INLINE __mmask16 first(long count)
{
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* 32 numbers as bfloat16. */
INLINE __m512i row_of_32(const void *factor, bool wide, long at, long count)
{
    return (__m512i)_mm512_cvtne2ps_pbh(numbers(factor, wide, at + 16, first(count - 16)),
                                        numbers(factor, wide, at, first(count)));
}

/* The paired transpose (width / 2, ld) of a factor (rows, width): its rows become columns, an even number of them. */
static void pair_rows(const void *factor, bool wide, long rows, long width, pair *out, long ld)
{
    __m512i r[16];
    for (long o = 0; o < rows; o += 16)
        for (long i = 0; i < width; i += 32) {
            for (long k = 0; k < 16; k++)
                r[k] = o + k < rows ? row_of_32(factor, wide, (o + k) * width + i, width - i) : _mm512_setzero_si512();
            transpose(r);
            for (long k = 0; k < MIN(16, (width - i + 1) / 2); k++)
                _mm512_mask_storeu_epi32(out + (i / 2 + k) * ld + o, first(EVEN(rows) - o), r[k]);
        }
}

/* Neighbouring rows of a factor (rows, width) side by side, (rows / 2, ld); a row that lacks its neighbour has zeros. */
static void pair_columns(const void *factor, bool wide, long rows, long width, pair *out, long ld)
{
    for (long o = 0; o < rows; o += 2)
        for (long i = 0; i < width; i += 16) {
            const __mmask16 some = first(width - i);
            const __m512 even = numbers(factor, wide, o * width + i, some);
            const __m512 odd = numbers(factor, wide, (o + 1) * width + i, o + 1 < rows ? some : 0);
            _mm512_mask_storeu_epi32(out + o / 2 * ld + i, first(ld - i), interleaved(even, odd));
        }
}

/* C (rows, 16·vectors) += A·B in bfloat16, rounded once. */
INLINE void tile_onto(const int rows, const int vectors, long depth, const half *A, long lda, const pair *B, long ldb,
                      half *C, long ldc)
{
    float sum[ROWS * VECTORS * 16];
    tile(rows, vectors, depth, A, lda, B, ldb, sum, 16 * VECTORS, false);
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < vectors; n++) {
            half *c = C + m * ldc + 16 * n;
            const __m512 before = (__m512)_mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)c)), 16);
            store(c, _mm512_add_ps(before, _mm512_loadu_ps(sum + (m * VECTORS + n) * 16)));
        }
}

/* C (rows, width) += A (rows, 2·depth) · B (2·depth, width), each number rounded once. */
static void product_onto(long rows, long width, long depth, const half *A, long lda, const pair *B, half *C, long ldc)
{
    long m = 0, n;
    for (; m + ROWS <= rows; m += ROWS) {
        for (n = 0; n + 64 <= width; n += 64)
            tile_onto(ROWS, 4, depth, A + m * lda, lda, B + n, width, C + m * ldc + n, ldc);
        for (; n < width; n += 32) tile_onto(ROWS, 2, depth, A + m * lda, lda, B + n, width, C + m * ldc + n, ldc);
    }
    for (; m < rows; m++)
        for (n = 0; n < width; n += 32) tile_onto(1, 2, depth, A + m * lda, lda, B + n, width, C + m * ldc + n, ldc);
}

/* Sums (count, ld) times `scale`, as `width` columns of h. */
static void write_h(const float *sums, long ld, long count, long width, float scale, half *h, long stride)
{
    for (long t = 0; t < count; t++)
        for (long c = 0; c < width; c += 16)
            _mm256_mask_storeu_epi16(h + t * stride + c, first(width - c), (__m256i)_mm512_cvtneps_pbh(
                _mm512_mul_ps(_mm512_loadu_ps(sums + t * ld + c), _mm512_set1_ps(scale))));
}

typedef struct {
    const Segment *segment;
    long start, stop;           /* tokens */
} Task;

/* Segments in pieces of like size, several for each thread. */
static Task *tasks_of(const Job *job, long *count)
{
    long tokens = 0, most = 0;
    for (long s = 0; s < job->segments; s++) tokens += job->segment[s].stop - job->segment[s].start;
    const long size = MAX(64, MIN(CHUNK, UP(tokens / (3 * job->threads) + 1, 16)));
    for (long s = 0; s < job->segments; s++) most += UP(job->segment[s].stop - job->segment[s].start, size) / size;
    Task *task = malloc(MAX(most, 1) * sizeof(Task));
    *count = 0;
    for (long s = 0; task && s < job->segments; s++)
        for (long t = job->segment[s].start; t < job->segment[s].stop; t += size)
            task[(*count)++] = (Task){job->segment + s, t, MIN(t + size, job->segment[s].stop)};
    return task;
}

/* Bytes of a thread's buffers: a factor of the widest layer, paired, and the sums of a task. */
static size_t buffer_size(const Job *job, size_t *at_sums)
{
    size_t most = BLOCK / 2 * COLUMNS, columns = 16;
    for (long s = 0; s < job->segments; s++) {
        const Segment *segment = job->segment + s;
        const long W = UP(columns_of(job, segment), 16);
        columns = MAX(columns, (size_t)W);
        most = MAX(most, (size_t)(job->x.width / 2 * W));
        for (long i = 0; i < segment->parts; i++) {
            const Part *p = job->part + segment->first + i;
            most = MAX(most, (size_t)(job->y[p->which].width / 2 * UP(p->rank, 16)));
        }
    }
    *at_sums = UP(most * sizeof(pair), 64);
    return *at_sums + UP(MAX(CHUNK, COLUMNS) * columns * sizeof(float), 64);
}

static void forward_of(const Job *job, const Task *task, pair *factor, float *sums)
{
    const Segment *segment = task->segment;
    const long count = task->stop - task->start, W = columns_of(job, segment), ld = UP(W, 16), I = job->x.width;
    const Part *end = job->part + segment->first + segment->parts, *p;
    half *h = job->h.data + task->start * job->h.stride;
    long c;
    memset(factor, 0, I / 2 * ld * sizeof(pair));
    for (p = end - segment->parts, c = 0; p < end; c += EVEN(p->rank), p++)
        pair_rows(p->A, job->wide, p->rank, I, factor + c, ld);
    product(count, ld / 16, I / 2, job->x.data + task->start * job->x.stride, job->x.stride, factor, ld, sums, ld,
            false);
    for (p = end - segment->parts, c = 0; p < end; c += EVEN(p->rank), p++) {
        const Rows y = job->y[p->which];
        write_h(sums + c, ld, count, EVEN(p->rank), (float)p->scale, h + c, job->h.stride);
        pair_rows(p->B, job->wide, y.width, p->rank, factor, y.width);
        product_onto(count, y.width, EVEN(p->rank) / 2, h + c, job->h.stride, factor, y.data + task->start * y.stride,
                     y.stride);
    }
}

/* dh, what of it reaches x, and both h and dh transposed. */
static void backward_of(const Job *job, const Task *task, pair *factor, float *sums, half *all_dh, half *dh_t,
                        half *h_t, long wide)
{
    const Segment *segment = task->segment;
    const long count = task->stop - task->start, W = columns_of(job, segment), I = job->x.width, stride = job->h.stride;
    const Part *end = job->part + segment->first + segment->parts, *p;
    half *dh = all_dh + task->start * stride;
    long c;
    memset(dh, 0, count * stride * sizeof(half));
    for (p = end - segment->parts, c = 0; p < end; c += EVEN(p->rank), p++) {
        const Rows g = job->y[p->which];
        const long ld = UP(p->rank, 16);
        if (!g.data) continue;
        pair_columns(p->B, job->wide, g.width, p->rank, factor, ld);
        product(count, ld / 16, g.width / 2, g.data + task->start * g.stride, g.stride, factor, ld, sums, ld, false);
        write_h(sums, ld, count, EVEN(p->rank), (float)p->scale, dh + c, stride);
    }
    transposed(dh, stride, count, UP(W, 32), dh_t, wide);
    transposed(job->h.data + task->start * stride, stride, count, UP(W, 32), h_t, wide);
    if (!job->dx.data) return;
    for (p = end - segment->parts, c = 0; p < end; c += EVEN(p->rank), p++)
        pair_columns(p->A, job->wide, p->rank, I, factor + c / 2 * I, I);
    product_onto(count, I, W / 2, dh, stride, factor, job->dx.data + task->start * job->dx.stride, job->dx.stride);
}

/* Some columns of dA of all parts: rows of h's columns, from x. */
static void write_dA(const Job *job, const Segment *segment, const float *sums, long ld, long column)
{
    const Part *end = job->part + segment->first + segment->parts, *p;
    for (p = end - segment->parts; p < end; sums += EVEN(p->rank) * ld, p++)
        for (long r = 0; r < p->rank && job->y[p->which].data; r++)
            for (long i = 0; i < ld; i += 16)
                _mm512_storeu_ps(p->dA + r * job->x.width + column + i, _mm512_loadu_ps(sums + r * ld + i));
}

/* Some rows of dB of one part, from their transpose. */
static void write_dB(const Part *p, const float *sums, long ld, long column)
{
    __m512i rows[16];
    for (long i = 0; i < ld; i += 16)
        for (long r = 0; r < p->rank; r += 16) {
            for (long k = 0; k < 16; k++)
                rows[k] = r + k < p->rank ? _mm512_loadu_si512(sums + (r + k) * ld + i) : _mm512_setzero_si512();
            transpose(rows);
            for (long k = 0; k < 16; k++)
                _mm512_mask_storeu_ps(p->dB + (column + i + k) * p->rank + r, first(p->rank - r), (__m512)rows[k]);
        }
}

/* Some columns of what the transposed h (rows, tokens) makes of x or g: their product, in `sums`. */
static void gradient(const Segment *segment, Rows from, long column, long width, const half *h_t, long wide, long rows,
                     pair *neighbours, float *sums)
{
    const long tokens = segment->stop - segment->start;
    for (long t = 0; t < tokens; t += BLOCK) {
        const long count = MIN(BLOCK, tokens - t);
        paired(from.data + (segment->start + t) * from.stride + column, from.stride, count, width, neighbours);
        product(rows, width / 16, UP(count, 16) / 2, h_t + t, wide, neighbours, width, sums, width, t > 0);
    }
}

typedef struct {
    const Segment *segment;
    const Part *part;           /* whose dB, or none for dA of all */
    long place, at, column;     /* of the segment's tokens and of the part's columns in the transposed h */
} Target;

static Target *targets_of(const Job *job, long *count, long *wide)
{
    long most = 0;
    for (long s = 0; s < job->segments; s++) {
        most += UP(job->x.width, COLUMNS) / COLUMNS;
        for (long i = 0; i < job->segment[s].parts; i++)
            most += UP(job->y[job->part[job->segment[s].first + i].which].width, COLUMNS) / COLUMNS;
    }
    Target *target = malloc(MAX(most, 1) * sizeof(Target));
    *count = *wide = 0;
    for (const Segment *s = job->segment; target && s < job->segment + job->segments; s++) {
        for (long column = 0; column < job->x.width; column += COLUMNS)
            target[(*count)++] = (Target){s, NULL, *wide, 0, column};
        const Part *p = job->part + s->first;
        for (long i = 0, at = 0; i < s->parts; i++, at += EVEN(p->rank), p++)
            for (long column = 0; job->y[p->which].data && column < job->y[p->which].width; column += COLUMNS)
                target[(*count)++] = (Target){s, p, *wide, at, column};
        *wide += UP(s->stop - s->start, 16);
    }
    return target;
}

static long place_of(const Job *job, const Task *task)
{
    long place = task->start - task->segment->start;
    for (const Segment *s = job->segment; s < task->segment; s++) place += UP(s->stop - s->start, 16);
    return place;
}

/* Write h and add to every y; whether there was memory for it. */
bool forward(const Job *job)
{
    long count;
    size_t at_sums, size = buffer_size(job, &at_sums);
    Task *task = tasks_of(job, &count);
    char *memory = aligned_alloc(64, UP(job->threads * size, 64));
    if (task && memory) {
#pragma omp parallel num_threads(job->threads)
        {
            char *own = memory + omp_get_thread_num() * size;
#pragma omp for schedule(dynamic, 1)
            for (long i = 0; i < count; i++) forward_of(job, task + i, (pair *)own, (float *)(own + at_sums));
        }
    }
    const bool done = task && memory;
    free(memory), free(task);
    return done;
}

/* Write every dA and dB, and add to dx; whether there was memory for it. */
bool backward(const Job *job)
{
    long tasks, targets, wide, last = job->segment[job->segments - 1].stop, rows = job->h.stride;
    size_t at_sums, size = buffer_size(job, &at_sums);
    Task *task = tasks_of(job, &tasks);
    Target *target = targets_of(job, &targets, &wide);
    char *memory = aligned_alloc(64, UP(job->threads * size, 64));
    half *dh = aligned_alloc(64, UP((last * rows + 2 * rows * wide) * sizeof(half), 64));
    const bool ready = task && target && memory && dh;
    if (ready) {
        half *dh_t = dh + last * rows, *h_t = dh_t + rows * wide;
#pragma omp parallel num_threads(job->threads)
        {
            char *own = memory + omp_get_thread_num() * size;
            float *sums = (float *)(own + at_sums);
#pragma omp for schedule(dynamic, 1)
            for (long i = 0; i < tasks; i++) {
                const long place = place_of(job, task + i);
                backward_of(job, task + i, (pair *)own, sums, dh, dh_t + place, h_t + place, wide);
            }
#pragma omp for schedule(dynamic, 4)
            for (long i = 0; i < targets; i++) {
                const Target t = target[i];
                const Rows from = t.part ? job->y[t.part->which] : job->x;
                const half *left = (t.part ? h_t : dh_t) + t.at * wide + t.place;
                const long width = MIN(COLUMNS, from.width - t.column);
                gradient(t.segment, from, t.column, width, left, wide,
                         t.part ? t.part->rank : columns_of(job, t.segment), (pair *)own, sums);
                if (t.part) write_dB(t.part, sums, width, t.column);
                else write_dA(job, t.segment, sums, width, t.column);
            }
        }
    }
    free(dh), free(memory), free(target), free(task);
    return ready;
}
