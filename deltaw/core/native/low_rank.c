/* Linear layers of one input with low-rank changes, in bfloat16, for segments of tokens that have an adapter each.

       h = s·x [A1; A2; …]T      yi = x WiT + bi + hi BiT                        for each segment and projection i
       dh = [s·gi Bi]            dx = Σ gi Wi + dh [A1; A2; …]     dA = dhT x     dBi = giT hi

   A and B are float32 or bfloat16 where they lie, their gradients float32 where they will lie; b is bfloat16, and so
   is W, or it is in codes. Sums are float32; h and dh are rounded to bfloat16, and y and dx once. Each number is summed
   in an order of its segment alone: neither its neighbours nor the number of threads change a bit of it. */

#include "tile.h"
#include "layout.h"
#include "vectors.h"
#include "factors.h"
#include "codes.h"
#include "panels.h"
#include "job.h"
#include "targets.h"

#include <omp.h>

/* Bytes of a thread's buffers: a panel or a factor of the widest layer, paired, and the sums of a task. */
static size_t buffer_size(const Job *job, size_t *at_sums)
{
    size_t most = DEPTH / 2 * PANEL, columns = 16;
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
    return *at_sums + UP(MAX(MAX(CHUNK, COLUMNS) * columns, MOST * PANEL) * sizeof(float), 64);
}

static void write_h_of(const Job *job, const Task *task, pair *factor, float *sums)
{
    const Segment *segment = task->segment;
    const long count = task->stop - task->start, ld = UP(columns_of(job, segment), 16), I = job->x.width;
    const Part *end = job->part + segment->first + segment->parts, *p;
    half *h = job->h.data + task->start * job->h.stride;
    long c;
    memset(factor, 0, I / 2 * ld * sizeof(pair));
    for (p = end - segment->parts, c = 0; p < end; c += EVEN(p->rank), p++)
        pair_rows(p->A, job->wide, p->rank, I, factor + c, ld);
    product(count, ld / 16, I / 2, job->x.data + task->start * job->x.stride, job->x.stride, factor, ld, sums, ld,
            false);
    for (p = end - segment->parts, c = 0; p < end; c += EVEN(p->rank), p++)
        write_h(sums + c, ld, count, EVEN(p->rank), (float)p->scale, h + c, job->h.stride);
}

/* dh, and both h and dh transposed. */
static void write_dh_of(const Job *job, const Task *task, pair *factor, float *sums, half *all_dh, half *dh_t, half *h_t,
                        long wide)
{
    const Segment *segment = task->segment;
    const long count = task->stop - task->start, W = columns_of(job, segment), stride = job->h.stride;
    const Part *end = job->part + segment->first + segment->parts, *p;
    half *dh = all_dh + task->start * stride;
    long c;
    memset(dh, 0, count * stride * sizeof(half));
    for (p = end - segment->parts, c = 0; p < end; c += EVEN(p->rank), p++) {
        const Rows g = job->y[p->which];
        const long ld = UP(p->rank, 16);
        if (!g.data) continue;
        pair_columns(p->B, job->wide, p->rank, g.width, p->rank, factor, ld);
        product(count, ld / 16, g.width / 2, g.data + task->start * g.stride, g.stride, factor, ld, sums, ld, false);
        write_h(sums, ld, count, EVEN(p->rank), (float)p->scale, dh + c, stride);
    }
    transposed(dh, stride, count, UP(W, 32), dh_t, wide);
    transposed(job->h.data + task->start * stride, stride, count, UP(W, 32), h_t, wide);
}

/* The tokens that a segment and a piece have in common. */
INLINE bool common(const Segment *s, const Piece *piece, long *start, long *stop)
{
    *start = MAX(s->start, piece->start), *stop = MIN(s->stop, piece->stop);
    return *start < *stop;
}

static void write_y(const Job *job, const Piece *piece, pair *panel, float *sums)
{
    const Frozen *f = job->frozen + piece->which;
    const Rows y = job->y[piece->which];
    long a, b;
    if (f->W.data)
        add_product(job->x, piece->start, piece->stop, &f->W, true, piece->column, piece->width, panel, sums, false);
    else read_sums(y, piece->start, piece->stop, piece->column, piece->width, sums);
    for (const Segment *s = job->segment; s < job->segment + job->segments; s++) {
        if (!common(s, piece, &a, &b)) continue;
        const Part *p = job->part + s->first;
        for (long i = 0, c = 0; i < s->parts; i++, c += EVEN(p->rank), p++) {
            if (p->which != piece->which) continue;
            pair_rows(from(p->B, job->wide, piece->column * p->rank), job->wide, piece->width, p->rank, panel,
                      piece->width);
            product(b - a, piece->width / 16, EVEN(p->rank) / 2, job->h.data + a * job->h.stride + c, job->h.stride,
                    panel, piece->width, sums + (a - piece->start) * PANEL, PANEL, true);
        }
    }
    write_sums(sums, f->W.data ? f->b : NULL, y, piece->start, piece->stop, piece->column, piece->width);
}

static void write_dx(const Job *job, const Piece *piece, const half *dh, pair *panel, float *sums)
{
    bool any = job->onto_dx;
    long a, b;
    if (any) read_sums(job->dx, piece->start, piece->stop, piece->column, piece->width, sums);
    for (long i = 0; i < job->projections; i++) {
        const Frozen *f = job->frozen + i;
        if (!f->W.data || !job->y[i].data) continue;
        add_product(job->y[i], piece->start, piece->stop, &f->W, false, piece->column, piece->width, panel, sums, any);
        any = true;
    }
    if (!any) memset(sums, 0, (piece->stop - piece->start) * PANEL * sizeof(float));
    for (const Segment *s = job->segment; s < job->segment + job->segments; s++) {
        if (!common(s, piece, &a, &b)) continue;
        const Part *p = job->part + s->first;
        long c = 0;
        for (long i = 0; i < s->parts; i++, c += EVEN(p->rank), p++)
            pair_columns(from(p->A, job->wide, piece->column), job->wide, job->x.width, p->rank, piece->width,
                         panel + c / 2 * piece->width, piece->width);
        product(b - a, piece->width / 16, c / 2, dh + a * job->h.stride, job->h.stride, panel, piece->width,
                sums + (a - piece->start) * PANEL, PANEL, true);
    }
    write_sums(sums, NULL, job->dx, piece->start, piece->stop, piece->column, piece->width);
}

/* Write h and every y; whether there was memory for it. */
bool forward(const Job *job)
{
    long tasks, pieces;
    size_t at_sums, size = buffer_size(job, &at_sums);
    Task *task = tasks_of(job, &tasks);
    Piece *piece = all_pieces(job, false, &pieces);
    char *memory = aligned_alloc(64, UP(job->threads * size, 64));
    const bool ready = task && piece && memory;
    if (ready) {
#pragma omp parallel num_threads(job->threads)
        {
            char *own = memory + omp_get_thread_num() * size;
#pragma omp for schedule(dynamic, 1)
            for (long i = 0; i < tasks; i++) write_h_of(job, task + i, (pair *)own, (float *)(own + at_sums));
#pragma omp for schedule(dynamic, 1)
            for (long i = 0; i < pieces; i++) write_y(job, piece + i, (pair *)own, (float *)(own + at_sums));
        }
    }
    free(memory), free(piece), free(task);
    return ready;
}

/* Write dx, and every dA and dB; whether there was memory for it. */
bool backward(const Job *job)
{
    long tasks, pieces, targets, wide, last = job->segments ? job->segment[job->segments - 1].stop : 0;
    const long rows = job->h.stride;
    size_t at_sums, size = buffer_size(job, &at_sums);
    Task *task = tasks_of(job, &tasks);
    Piece *piece = all_pieces(job, true, &pieces);
    Target *target = targets_of(job, &targets, &wide);
    char *memory = aligned_alloc(64, UP(job->threads * size, 64));
    half *dh = aligned_alloc(64, UP((last * rows + 2 * rows * wide) * sizeof(half), 64) + 64);
    const bool ready = task && piece && target && memory && dh;
    if (ready) {
        half *dh_t = dh + last * rows, *h_t = dh_t + rows * wide;
#pragma omp parallel num_threads(job->threads)
        {
            char *own = memory + omp_get_thread_num() * size;
            float *sums = (float *)(own + at_sums);
#pragma omp for schedule(dynamic, 1)
            for (long i = 0; i < tasks; i++) {
                const long place = place_of(job, task + i);
                write_dh_of(job, task + i, (pair *)own, sums, dh, dh_t + place, h_t + place, wide);
            }
#pragma omp for schedule(dynamic, 1) nowait
            for (long i = 0; i < pieces; i++) write_dx(job, piece + i, dh, (pair *)own, sums);
#pragma omp for schedule(dynamic, 4)
            for (long i = 0; i < targets; i++) write_target(job, target + i, dh_t, h_t, wide, (pair *)own, sums);
        }
    }
    free(dh), free(memory), free(target), free(piece), free(task);
    return ready;
}
