/* Gradients of factors: some columns of dA, or rows of dB, are a task that sums over all tokens of a segment. */

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
                _mm512_mask_storeu_ps(p->dB + (column + i + k) * p->rank + r, first_of(p->rank - r), (__m512)rows[k]);
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
