/* One step of a model of Llama's structure on a processor: new tokens of any sequences in, logits of some of them out.

   The rows of a step are of prompts and of answers alike: each attends to the keys of its place up to its own position.
   Threads go through the step together: products are shared out by blocks of outputs, everything else by rows, and
   where one kind of work needs the whole of the other they meet. */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "product.h"
#include "rows.h"

#define RUN 8               /* most rows that are worked on at once, all of one adapter */
#define PHASES 12           /* more than there are meetings in a layer */
#define SPINS 4000          /* looks at a barrier before others are let in */

typedef struct { int first, count; } Run;

typedef struct {
    const Model *m;
    const Step *s;
    int rows, M, tiles, runs, width;    /* width: of queries, keys and values together */
    int max_rank;
    Run *run;
    float *tiled;                       /* inputs of the next product, in tiles */
    float *qkv, *attended, *y, *gate, *up, *h, *last;
    atomic_int *next, arrived, meetings, threads;       /* 0 threads: not all have been made yet */
} Job;

typedef struct {
    Job *job;
    int phase;
    float *scratch;
} Worker;

static int min(int a, int b) { return a < b ? a : b; }
static int blocks(const Matrix *w) { return (w->out + LANES - 1) / LANES; }

/* The next share of this phase's work; 0 where all of it is given out. */
static int share(Worker *me, int total, int size, int *first, int *end)
{
    *first = atomic_fetch_add(&me->job->next[me->phase], size);
    *end = min(*first + size, total);
    return *first < total;
}

/* Wait for the other threads; the next phase begins. */
static void meet(Worker *me)
{
    Job *job = me->job;
    int meeting = me->phase++;
    if (atomic_fetch_add(&job->arrived, 1) + 1 == job->threads) {
        atomic_store(&job->arrived, 0);
        atomic_store(&job->meetings, meeting + 1);
        return;
    }
    for (int spins = 0; atomic_load(&job->meetings) == meeting; spins++)
        if (spins > SPINS) sched_yield();
}

/* --- low-rank changes ------------------------------------------------------------------------------------------- */

static const Factors *factors_of(const Job *job, const Matrix *w, int row)
{
    int bank = job->s->bank[row];
    const Factors *found = bank < 0 ? NULL : job->s->factors + (size_t)w->site * job->s->banks + bank;
    return found && found->A_PRI ? found : NULL;
}

/* Of rows that share an adapter: what its A makes of their inputs, kept in slot 0, 1 or 2 of `h`. */
static void shrink(const Job *job, const Matrix *w, int slot, int row, int n, const float *x, size_t stride)
{
    const Factors *f = factors_of(job, w, row);
    if (!f) return;
    const Step *s = job->s;
    int rank = s->rank[s->bank[row]];
    float *h = job->h + ((size_t)row * 3 + slot) * job->max_rank;
    size_t at = (size_t)s->entry[row] * rank * w->in;
    if (s->narrow) shrink_rows(1, (const uint16_t *)f->A_PRI + at, rank, w->in, x, stride, n, h, 3 * job->max_rank);
    else shrink_rows(0, (const float *)f->A_PRI + at, rank, w->in, x, stride, n, h, 3 * job->max_rank);
}

/* The rest of a linear layer's output: its bias, and what B makes of slot's rows. */
static void expand(const Job *job, const Matrix *w, int slot, int row, int n, float *y, size_t stride)
{
    for (int t = 0; w->bias && t < n; t++)
        for (int i = 0; i < w->out; i++) y[t * stride + i] += w->bias[i];
    const Factors *f = factors_of(job, w, row);
    if (!f) return;
    const Step *s = job->s;
    int rank = s->rank[s->bank[row]];
    const float *h = job->h + ((size_t)row * 3 + slot) * job->max_rank;
    size_t at = (size_t)s->entry[row] * rank * w->out;
    if (s->narrow) expand_rows(1, (const uint16_t *)f->B_PRO + at, rank, w->out, h, 3 * job->max_rank, n, y, stride);
    else expand_rows(0, (const float *)f->B_PRO + at, rank, w->out, h, 3 * job->max_rank, n, y, stride);
}

/* --- the parts of a layer, for the rows of one run --------------------------------------------------------------- */

static void to_tiles(const Job *job, int row, int n, const float *x, size_t stride, int width)
{
    for (int t = row; t < row + n; t++, x += stride) {
        float *to = job->tiled + (size_t)(t / job->M) * job->M * width + t % job->M;
        for (int i = 0; i < width; i++) to[(size_t)i * job->M] = x[i];
    }
}

static void begin_attention(const Job *job, const Layer *l, Run run, float *scratch)
{
    const Model *m = job->m;
    for (int t = 0; t < run.count; t++)
        rms_norm(job->s->x + (size_t)(run.first + t) * m->hidden, l->norm, m->eps, m->hidden, scratch + t * m->hidden);
    const Matrix *w[3] = {&l->q, &l->k, &l->v};
    for (int i = 0; i < 3; i++) shrink(job, w[i], i, run.first, run.count, scratch, m->hidden);
    to_tiles(job, run.first, run.count, scratch, m->hidden, m->hidden);
}

static void place_heads(const Job *job, float *x, int heads, const float *norm, int position)
{
    const Model *m = job->m;
    for (int h = 0; h < heads; h++, x += m->head_dim) {
        if (norm) rms_norm(x, norm, m->eps, m->head_dim, x);
        rotate(x, m->cos + (size_t)position * m->rotary, m->sin + (size_t)position * m->rotary, m->rotary);
    }
}

static size_t slot_of(const Model *m, const Step *s, int row, int position)
{
    return ((size_t)s->place[row] * m->capacity + position) * m->groups * m->head_dim;
}

static void store_keys(const Job *job, const Layer *l, Run run)
{
    const Model *m = job->m;
    float *qkv = job->qkv + (size_t)run.first * job->width;
    expand(job, &l->q, 0, run.first, run.count, qkv, job->width);
    expand(job, &l->k, 1, run.first, run.count, qkv + l->q.out, job->width);
    expand(job, &l->v, 2, run.first, run.count, qkv + l->q.out + l->k.out, job->width);
    for (int t = run.first; t < run.first + run.count; t++, qkv += job->width) {
        int position = job->s->position[t];
        place_heads(job, qkv, m->heads, l->q_norm, position);
        place_heads(job, qkv + l->q.out, m->groups, l->k_norm, position);
        size_t slot = slot_of(m, job->s, t, position);
        memcpy(l->keys + slot, qkv + l->q.out, l->k.out * sizeof(float));
        memcpy(l->values + slot, qkv + l->q.out + l->k.out, l->v.out * sizeof(float));
    }
}

static void attend_group(const Job *job, const Layer *l, int row, int group, float *scratch)
{
    const Model *m = job->m;
    int heads = m->heads / m->groups * m->head_dim;
    size_t slot = slot_of(m, job->s, row, 0) + (size_t)group * m->head_dim;
    attend(m, job->qkv + (size_t)row * job->width + group * heads, l->keys + slot, l->values + slot,
           job->s->position[row] + 1, scratch, job->attended + (size_t)row * l->q.out + group * heads);
}

static void begin_output(const Job *job, const Layer *l, Run run)
{
    const float *x = job->attended + (size_t)run.first * l->o.in;
    shrink(job, &l->o, 0, run.first, run.count, x, l->o.in);
    to_tiles(job, run.first, run.count, x, l->o.in, l->o.in);
}

/* Add a product's outputs to the rows they continue. */
static void end_product(const Job *job, const Matrix *w, Run run)
{
    float *y = job->y + (size_t)run.first * w->out, *x = job->s->x + (size_t)run.first * w->out;
    expand(job, w, 0, run.first, run.count, y, w->out);
    for (int i = 0; i < run.count * w->out; i++) x[i] += y[i];
}

static void begin_mlp(const Job *job, const Layer *l, Run run, float *scratch)
{
    const Model *m = job->m;
    end_product(job, &l->o, run);
    for (int t = 0; t < run.count; t++)
        rms_norm(job->s->x + (size_t)(run.first + t) * m->hidden, l->mlp_norm, m->eps, m->hidden,
                 scratch + t * m->hidden);
    shrink(job, &l->gate, 0, run.first, run.count, scratch, m->hidden);
    shrink(job, &l->up, 1, run.first, run.count, scratch, m->hidden);
    to_tiles(job, run.first, run.count, scratch, m->hidden, m->hidden);
}

static void gate_rows(const Job *job, const Layer *l, Run run)
{
    int inner = job->m->inner;
    float *gate = job->gate + (size_t)run.first * inner, *up = job->up + (size_t)run.first * inner;
    expand(job, &l->gate, 0, run.first, run.count, gate, inner);
    expand(job, &l->up, 1, run.first, run.count, up, inner);
    for (int i = 0; i < run.count * inner; i += LANES) {
        V g = *(V *)(gate + i);
        *(V *)(gate + i) = g / (exp16(-g) + 1.0f) * *(V *)(up + i);
    }
    shrink(job, &l->down, 0, run.first, run.count, gate, inner);
    to_tiles(job, run.first, run.count, gate, inner, inner);
}

/* --- the step ----------------------------------------------------------------------------------------------------- */

/* Each thread's blocks of up to three products of the same inputs; the outputs lie `stride` apart. */
static void products(Worker *me, const Matrix *const *w, float *const *y, const size_t *stride, int count)
{
    Job *job = me->job;
    int total = 0, a, b;
    for (int i = 0; i < count; i++) total += blocks(w[i]);
    int size = total / (8 * job->s->threads) + 1;
    while (share(me, total, size, &a, &b))
        for (int at = a; at < b; at++) {
            int block = at, i = 0;
            while (block >= blocks(w[i])) block -= blocks(w[i++]);
            product(w[i], block, job->tiled, job->tiles, job->M, y[i], stride[i]);
        }
    meet(me);
}

#define EACH_RUN(me, job, call)                                                    \
    do {                                                                           \
        for (int a, b; share(me, (job)->runs, 1, &a, &b);) {                       \
            Run run = (job)->run[a];                                               \
            call;                                                                  \
        }                                                                          \
        meet(me);                                                                  \
    } while (0)

static void one_product(Worker *me, const Matrix *w, float *y, size_t stride)
{
    products(me, &w, &y, &stride, 1);
}

static void layer(Worker *me, const Layer *l, const Layer *previous)
{
    Job *job = me->job;
    const Model *m = job->m;
    size_t width = job->width, inner = m->inner;
    EACH_RUN(me, job, {
        if (previous) end_product(job, &previous->down, run);
        begin_attention(job, l, run, me->scratch);
    });
    products(me, (const Matrix *[]){&l->q, &l->k, &l->v},
             (float *[]){job->qkv, job->qkv + l->q.out, job->qkv + l->q.out + l->k.out},
             (size_t[]){width, width, width}, 3);
    EACH_RUN(me, job, store_keys(job, l, run));
    for (int a, b; share(me, job->rows * m->groups, 1, &a, &b);)
        attend_group(job, l, a / m->groups, a % m->groups, me->scratch);
    meet(me);
    EACH_RUN(me, job, begin_output(job, l, run));
    one_product(me, &l->o, job->y, l->o.out);
    EACH_RUN(me, job, begin_mlp(job, l, run, me->scratch));
    products(me, (const Matrix *[]){&l->gate, &l->up}, (float *[]){job->gate, job->up}, (size_t[]){inner, inner}, 2);
    EACH_RUN(me, job, gate_rows(job, l, run));
    one_product(me, &l->down, job->y, l->down.out);
}

/* The rows that are asked for: the last norm and the output layer, whose inputs are few and have tiles of their own. */
static void head(Worker *me)
{
    Job *job = me->job;
    const Model *m = job->m;
    const Step *s = job->s;
    EACH_RUN(me, job, end_product(job, &m->layer[m->layers - 1].down, run));
    int M = tile_rows(s->kept), size = M * m->hidden;
    for (int i, end; share(me, s->kept, 1, &i, &end);) {
        float *x = me->scratch, *to = job->tiled + (size_t)(i / M) * size + i % M;
        rms_norm(s->x + (size_t)s->keep[i] * m->hidden, m->last_norm, m->eps, m->hidden, x);
        shrink(job, &m->head, 0, s->keep[i], 1, x, m->hidden);
        for (int k = 0; k < m->hidden; k++) to[(size_t)k * M] = x[k];
    }
    meet(me);
    size_t stride = (size_t)blocks(&m->head) * LANES;
    for (int a, b; s->kept && share(me, blocks(&m->head), 16, &a, &b);)
        for (int at = a; at < b; at++)
            product(&m->head, at, job->tiled, (s->kept + M - 1) / M, M, s->logits, stride);
    meet(me);
    for (int i, end; share(me, s->kept, 1, &i, &end);)
        expand(job, &m->head, 0, s->keep[i], 1, s->logits + i * stride, stride);
}

static void *work(void *worker)
{
    Worker *me = worker;
    const Model *m = me->job->m;
    while (!atomic_load(&me->job->threads)) sched_yield();
    for (int i = 0; i < m->layers; i++) layer(me, m->layer + i, i ? m->layer + i - 1 : NULL);
    head(me);
    return NULL;
}

/* Rows that follow each other and take the same factors, so many that every thread has some. */
static void find_runs(Job *job)
{
    const Step *s = job->s;
    int most = min(RUN, (s->rows + s->threads - 1) / s->threads);
    for (int t = 0; t < s->rows; t++) {
        Run *last = job->run + job->runs - 1;
        if (job->runs && last->count < most && s->bank[t] == s->bank[t - 1] && s->entry[t] == s->entry[t - 1])
            last->count++;
        else job->run[job->runs++] = (Run){t, 1};
    }
}

/* 0, or 1 where there is not enough memory. */
int step(const Model *m, const Step *s)
{
    Job job = {.m = m, .s = s, .rows = s->rows, .M = tile_rows(s->rows)};
    job.tiles = (s->rows + job.M - 1) / job.M;
    job.width = m->layer->q.out + m->layer->k.out + m->layer->v.out;
    for (int b = 0; b < s->banks; b++) job.max_rank = s->rank[b] > job.max_rank ? s->rank[b] : job.max_rank;
    size_t rows = (size_t)job.tiles * job.M, queries = m->layer->q.out;
    size_t widest = m->hidden > m->inner ? m->hidden : m->inner;
    if (queries > widest) widest = queries;
    size_t scratch = (size_t)RUN * m->hidden + (size_t)m->capacity + 2 * LANES;
    size_t sizes[] = {rows * widest + (size_t)LANES * m->hidden, rows * job.width, rows * queries, rows * m->hidden,
                      rows * m->inner, rows * m->inner, rows * 3 * job.max_rank, s->threads * scratch};
    float **parts[] = {&job.tiled, &job.qkv, &job.attended, &job.y, &job.gate, &job.up, &job.h, &job.last};
    size_t total = 0;
    for (int i = 0; i < 8; i++) total += (sizes[i] + LANES - 1) / LANES * LANES;
    float *memory = aligned_alloc(64, total * sizeof(float)), *at = memory;
    job.next = calloc((size_t)(m->layers + 1) * PHASES, sizeof *job.next);
    job.run = malloc(s->rows * sizeof *job.run);
    Worker *workers = calloc(s->threads, sizeof *workers);
    pthread_t *threads = calloc(s->threads, sizeof *threads);
    int failed = !memory || !job.next || !job.run || !workers || !threads;
    if (!failed) {
        for (int i = 0; i < 8; at += (sizes[i] + LANES - 1) / LANES * LANES, i++) *parts[i] = at;
        find_runs(&job);
        for (int i = 0; i < s->threads; i++) workers[i] = (Worker){&job, 0, job.last + i * scratch};
        int started = 1;
        while (started < s->threads && !pthread_create(threads + started, NULL, work, workers + started)) started++;
        atomic_store(&job.threads, started);
        work(workers);
        for (int i = 1; i < started; i++) pthread_join(threads[i], NULL);
    }
    free(memory), free(job.next), free(job.run), free(workers), free(threads);
    return failed;
}

/* For whoever describes these elsewhere. */
size_t size_of_Matrix(void) { return sizeof(Matrix); }
size_t size_of_Layer(void) { return sizeof(Layer); }
size_t size_of_Model(void) { return sizeof(Model); }
size_t size_of_Step(void) { return sizeof(Step); }
