/* A step's memory and its threads, and how they share out the work. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "product.h"
#include "rows.h"

#define RUN 8               /* most rows that are worked on at once, all of one adapter */
#define PHASES 12           /* more than there are meetings in a layer */
#define SPINS 4000          /* looks at a barrier before a thread sleeps */

typedef struct { int first, count; } Run;

typedef struct {
    const Model *m;
    const Step *s;
    int M, tiles, runs, width;          /* width: of queries, keys and values together */
    int max_rank;
    Run *run;
    float *tiled;                       /* inputs of the next product, in tiles */
    float *normed, *qkv, *attended, *y, *gate, *up, *h, *scratch;
    atomic_int *next, arrived, meetings, threads;       /* 0 threads: not all have been made yet */
    pthread_mutex_t lock;
    pthread_cond_t met;
} Job;

typedef struct {
    Job *job;
    int number, phase;
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

/* Wait for the other threads; the next phase begins. Who waits long sleeps: beside another busy process a thread that
   spins takes the processor from the one that it waits for. */
static void meet(Worker *me)
{
    Job *job = me->job;
    int meeting = me->phase++;
    if (atomic_fetch_add(&job->arrived, 1) + 1 == job->threads) {
        atomic_store(&job->arrived, 0);
        pthread_mutex_lock(&job->lock);
        atomic_store(&job->meetings, meeting + 1);
        pthread_cond_broadcast(&job->met);
        pthread_mutex_unlock(&job->lock);
        return;
    }
    for (int spins = 0; spins < SPINS; spins++)
        if (atomic_load(&job->meetings) != meeting) return;
    pthread_mutex_lock(&job->lock);
    while (atomic_load(&job->meetings) == meeting) pthread_cond_wait(&job->met, &job->lock);
    pthread_mutex_unlock(&job->lock);
}

/* The runs of a thread. */
static int first_run(const Worker *me) { return me->job->runs * me->number / me->job->threads; }
static int end_run(const Worker *me) { return first_run(&(Worker){.job = me->job, .number = me->number + 1}); }

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

/* Floats that a thread has to itself: a normed row, or one head's scores, filled up to whole vectors. */
static size_t scratch_size(const Model *m)
{
    return (size_t)(m->hidden > m->capacity ? m->hidden : m->capacity) + 2 * LANES;
}
