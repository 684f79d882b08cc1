/* Linear layers of one input with low-rank changes, in bfloat16, for segments of tokens that have an adapter each.

       h = s·x [A1; A2; …]T      yi = x WiT + bi + hi BiT                        for each segment and projection i
       dh = [s·gi Bi]            dx = Σ gi Wi + dh [A1; A2; …]     dA = dhT x     dBi = giT hi

   A and B are float32 or bfloat16 where they lie, their gradients float32 where they will lie; W and b are bfloat16.
   Sums are float32; h and dh are rounded to bfloat16, and y and dx once. Each number is summed in an order of its
   segment alone: neither its neighbours nor the number of threads change a bit of it. */

#include "tile.h"
#include "layout.h"
#include "factors.h"
#include "panels.h"

#include <omp.h>
#include <stdlib.h>

enum { CHUNK = 256, COLUMNS = 64,       /* tokens, or columns of gradients, that are a task at most */
       LEAST = 48, MOST = 512 };        /* tokens of a panel's task */

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
    const half *W, *b;                  /* W may be none, and is in y and dx already then; b may be none */
    int64_t by_output, by_input;        /* strides */
} Frozen;

typedef struct {
    int64_t tokens, segments, projections, threads;
    int64_t wide, onto_dx;              /* whether factors are float32; whether dx has numbers to add to */
    const Segment *segment;
    const Part *part;
    const Frozen *frozen;
    Rows x, dx, h;                      /* h has room for the widest segment, in whole 32 columns; dx may be none */
    const Rows *y;                      /* of each projection: y forward, g backward, which may be none */
} Job;

static long columns_of(const Job *job, const Segment *s)
{
    long sum = 0;
    for (long i = 0; i < s->parts; i++) sum += EVEN(job->part[s->first + i].rank);
    return sum;
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

typedef struct {
    long which, start, stop, column, width;     /* the projection, of y; tokens and columns */
} Piece;

/* Rows of `tokens` in pieces: a panel of columns each, and so many tokens that every thread has several. */
static void pieces_of(const Job *job, long which, long width, long panels, Piece *piece, long *count)
{
    const long ranges = MAX((job->tokens + MOST - 1) / MOST, (8 * job->threads + panels - 1) / panels);
    const long size = MIN(MOST, MAX(LEAST, UP((job->tokens + ranges - 1) / ranges, ROWS)));
    for (long column = 0; column < width; column += PANEL)
        for (long start = 0; start < job->tokens; start += size, ++*count)
            if (piece)
                piece[*count] = (Piece){which, start, MIN(start + size, job->tokens), column, MIN(PANEL, width - column)};
}

/* All pieces of every y, or of dx. */
static Piece *all_pieces(const Job *job, bool backward, long *count)
{
    Piece *piece = NULL;
    long panels = 0;
    for (long i = 0; i < job->projections; i++) panels += UP(job->y[i].width, PANEL) / PANEL;
    for (int pass = 0; pass < 2; pass++) {
        *count = 0;
        if (backward && job->dx.data) pieces_of(job, 0, job->dx.width, UP(job->dx.width, PANEL) / PANEL, piece, count);
        for (long i = 0; !backward && i < job->projections; i++)
            pieces_of(job, i, job->y[i].width, panels, piece, count);
        if (!pass && !(piece = malloc(MAX(*count, 1) * sizeof(Piece)))) break;
    }
    return piece;
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
    if (f->W)
        add_product(job->x, piece->start, piece->stop, (Weight){f->W, f->by_input, f->by_output}, piece->column,
                    piece->width, panel, sums, false);
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
    write_sums(sums, f->W ? f->b : NULL, y, piece->start, piece->stop, piece->column, piece->width);
}

static void write_dx(const Job *job, const Piece *piece, const half *dh, pair *panel, float *sums)
{
    bool any = job->onto_dx;
    long a, b;
    if (any) read_sums(job->dx, piece->start, piece->stop, piece->column, piece->width, sums);
    for (long i = 0; i < job->projections; i++) {
        const Frozen *f = job->frozen + i;
        if (!f->W || !job->y[i].data) continue;
        add_product(job->y[i], piece->start, piece->stop, (Weight){f->W, f->by_output, f->by_input}, piece->column,
                    piece->width, panel, sums, any);
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
static void gradient(const Segment *segment, Rows of, long column, long width, const half *h_t, long wide, long rows,
                     pair *neighbours, float *sums)
{
    const long tokens = segment->stop - segment->start;
    for (long t = 0; t < tokens; t += BLOCK) {
        const long count = MIN(BLOCK, tokens - t);
        paired(of.data + (segment->start + t) * of.stride + column, of.stride, count, width, neighbours);
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

/* The columns of a target, from the transposed h and dh. */
static void write_target(const Job *job, const Target *t, const half *dh_t, const half *h_t, long wide, pair *neighbours,
                         float *sums)
{
    const Rows of = t->part ? job->y[t->part->which] : job->x;
    const half *left = (t->part ? h_t : dh_t) + t->at * wide + t->place;
    const long width = MIN(COLUMNS, of.width - t->column);
    gradient(t->segment, of, t->column, width, left, wide, t->part ? t->part->rank : columns_of(job, t->segment),
             neighbours, sums);
    if (t->part) write_dB(t->part, sums, width, t->column);
    else write_dA(job, t->segment, sums, width, t->column);
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
