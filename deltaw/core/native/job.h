/* What the kernel of low-rank linear layers is asked for, and how it is cut into tasks. */

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
    Weight W;                           /* its data may be none, and is in y and dx already then */
    const half *b;                      /* may be none */
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
