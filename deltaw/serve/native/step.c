/* One step of a model of Llama's structure on a processor: new tokens of any sequences in, logits of some of them out.

   The rows of a step are of prompts and of answers alike: each attends to the keys of its place up to its own position.
   Threads go through the step together: products are shared out by blocks of outputs, everything else by rows, and
   where one kind of work needs the whole of the other they meet. */

#include "job.h"
#include "layer.h"

typedef struct {
    const Matrix *w;
    float *y;
    size_t stride;              /* from one row of y to the next */
} Output;

/* Up to three products of the same inputs: x by rows, and in tiles.

   What the A of each run's adapter makes of x is shared out evenly among the blocks: reading many adapters' factors
   keeps the memory busy and the processor idle, and a product of many rows the other way round. */
static void products(Worker *me, const float *x, const Output *to, int count)
{
    Job *job = me->job;
    int lows = job->max_rank ? job->runs * count : 0, total = lows, a, b;
    for (int i = 0; i < count; i++) total += blocks(to[i].w);
    int size = total / (8 * job->threads) + 1;
    while (share(me, total, size, &a, &b))
        for (int at = a; at < b; at++) {
            int low = (int)((long)at * lows / total), block = at - low, i = 0;
            if ((long)(at + 1) * lows / total > low) {
                Run run = job->run[low / count];
                const Matrix *w = to[low % count].w;
                shrink(job, w, low % count, run, x + (size_t)run.first * w->in);
                continue;
            }
            while (block >= blocks(to[i].w)) block -= blocks(to[i++].w);
            product(to[i].w, block, job->tiled, job->tiles, job->M, to[i].y, to[i].stride);
        }
    meet(me);
}

#define EACH_RUN(me, call)                                                         \
    do {                                                                           \
        for (int i = first_run(me), end = end_run(me); i < end; i++) {             \
            Run run = (me)->job->run[i];                                           \
            call;                                                                  \
        }                                                                          \
        meet(me);                                                                  \
    } while (0)

static void layer(Worker *me, const Layer *l, const Layer *previous)
{
    Job *job = me->job;
    const Model *m = job->m;
    float *q = job->qkv, *k = q + l->q.out, *v = k + l->k.out;
    size_t width = job->width, inner = m->inner;
    EACH_RUN(me, {
        if (previous) end_product(job, &previous->down, run);
        normalize(job, l->norm, run);
    });
    products(me, job->normed, (Output[]){{&l->q, q, width}, {&l->k, k, width}, {&l->v, v, width}}, 3);
    EACH_RUN(me, store_keys(job, l, run));
    for (int a, b; share(me, job->s->rows * m->groups, 1, &a, &b);)
        attend_group(job, l, a / m->groups, a % m->groups, me->scratch);
    meet(me);
    EACH_RUN(me, to_tiles(job, run, job->attended + (size_t)run.first * l->o.in, l->o.in));
    products(me, job->attended, (Output[]){{&l->o, job->y, l->o.out}}, 1);
    EACH_RUN(me, {
        end_product(job, &l->o, run);
        normalize(job, l->mlp_norm, run);
    });
    products(me, job->normed, (Output[]){{&l->gate, job->gate, inner}, {&l->up, job->up, inner}}, 2);
    EACH_RUN(me, gate_rows(job, l, run));
    products(me, job->gate, (Output[]){{&l->down, job->y, l->down.out}}, 1);
}

/* The rows that are asked for: the last norm and the output layer, whose inputs are few and have tiles of their own. */
static void head(Worker *me)
{
    Job *job = me->job;
    const Model *m = job->m;
    const Step *s = job->s;
    EACH_RUN(me, end_product(job, &m->layer[m->layers - 1].down, run));
    int M = tile_rows(s->kept), size = M * m->hidden;
    for (int i, end; share(me, s->kept, 1, &i, &end);) {
        float *x = me->scratch, *to = job->tiled + (size_t)(i / M) * size + i % M;
        rms_norm(s->x + (size_t)s->keep[i] * m->hidden, m->last_norm, m->eps, m->hidden, x);
        shrink(job, &m->head, 0, (Run){s->keep[i], 1}, x);
        for (int k = 0; k < m->hidden; k++) to[(size_t)k * M] = x[k];
    }
    meet(me);
    size_t stride = (size_t)blocks(&m->head) * LANES;
    for (int a, b; s->kept && share(me, blocks(&m->head), 16, &a, &b);)
        for (int at = a; at < b; at++)
            product(&m->head, at, job->tiled, (s->kept + M - 1) / M, M, s->logits, stride);
    meet(me);
    for (int i, end; share(me, s->kept, 1, &i, &end);)
        expand(job, &m->head, 0, (Run){s->keep[i], 1}, s->logits + i * stride, stride);
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

/* Room for everything of a step, in one piece of memory; NULL where there is not enough. */
static float *make_room(Job *job)
{
    const Model *m = job->m;
    size_t rows = (size_t)job->tiles * job->M, queries = m->layer->q.out, widest = m->hidden;
    if (m->inner > m->hidden) widest = m->inner;
    if (queries > widest) widest = queries;
    size_t sizes[] = {rows * widest, rows * m->hidden, rows * job->width, rows * queries, rows * m->hidden,
                      rows * m->inner, rows * m->inner, rows * 3 * job->max_rank, job->s->threads * scratch_size(m)};
    float **parts[] = {&job->tiled, &job->normed, &job->qkv, &job->attended, &job->y, &job->gate, &job->up, &job->h,
                       &job->scratch};
    size_t total = 0;
    for (int i = 0; i < 9; i++) total += (sizes[i] + LANES - 1) / LANES * LANES;
    float *memory = aligned_alloc(64, total * sizeof(float)), *at = memory;
    for (int i = 0; memory && i < 9; at += (sizes[i] + LANES - 1) / LANES * LANES, i++) *parts[i] = at;
    return memory;
}

/* Run the step in threads, as many as can be had. */
static void run_threads(Job *job, Worker *workers, pthread_t *threads)
{
    int started = 1, asked = job->s->threads;
    for (int i = 0; i < asked; i++)
        workers[i] = (Worker){.job = job, .number = i, .scratch = job->scratch + i * scratch_size(job->m)};
    while (started < asked && !pthread_create(threads + started, NULL, work, workers + started)) started++;
    atomic_store(&job->threads, started);
    work(workers);
    for (int i = 1; i < started; i++) pthread_join(threads[i], NULL);
}

/* 0, or 1 where there is not enough memory. */
int step(const Model *m, const Step *s)
{
    Job job = {.m = m, .s = s, .M = tile_rows(s->rows), .lock = PTHREAD_MUTEX_INITIALIZER,
               .met = PTHREAD_COND_INITIALIZER};
    job.tiles = (s->rows + job.M - 1) / job.M;
    job.width = m->layer->q.out + m->layer->k.out + m->layer->v.out;
    for (int b = 0; b < s->banks; b++) job.max_rank = s->rank[b] > job.max_rank ? s->rank[b] : job.max_rank;
    float *memory = make_room(&job);
    job.next = calloc((size_t)(m->layers + 1) * PHASES, sizeof *job.next);
    job.run = malloc(s->rows * sizeof *job.run);
    Worker *workers = calloc(s->threads, sizeof *workers);
    pthread_t *threads = calloc(s->threads, sizeof *threads);
    int failed = !memory || !job.next || !job.run || !workers || !threads;
    if (!failed) {
        find_runs(&job);
        run_threads(&job, workers, threads);
    }
    free(memory), free(job.next), free(job.run), free(workers), free(threads);
    return failed;
}

/* For whoever describes these elsewhere. */
size_t size_of_Matrix(void) { return sizeof(Matrix); }
size_t size_of_Layer(void) { return sizeof(Layer); }
size_t size_of_Model(void) { return sizeof(Model); }
size_t size_of_Step(void) { return sizeof(Step); }
