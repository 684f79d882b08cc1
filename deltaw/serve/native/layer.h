/* The parts of a layer that are done row by row, for a run of rows that share an adapter. */

static const Factors *factors_of(const Job *job, const Matrix *w, int row)
{
    int bank = job->s->bank[row];
    const Factors *found = bank < 0 ? NULL : job->s->factors + (size_t)w->site * job->s->banks + bank;
    return found && found->A_PRI ? found : NULL;
}

/* Where the h (rank) of a row begins that an A made, in slot 0, 1 or 2 of its room; the rows' lie `room` apart. */
static size_t room(const Job *job) { return (size_t)3 * job->max_rank; }
static float *h_of(const Job *job, int row, int slot) { return job->h + row * room(job) + (size_t)slot * job->max_rank; }

/* An entry of a stack, each of `numbers` for every rank. */
static const void *entry_of(const Job *job, const void *stack, int row, int numbers)
{
    const Step *s = job->s;
    return (const char *)stack + (size_t)s->entry[row] * s->rank[s->bank[row]] * numbers * (s->narrow ? 2 : 4);
}

/* What the A of the rows' adapter makes of their inputs. */
static void shrink(const Job *job, const Matrix *w, int slot, Run run, const float *x)
{
    const Factors *f = factors_of(job, w, run.first);
    if (!f) return;
    int rank = job->s->rank[job->s->bank[run.first]];
    const void *A = entry_of(job, f->A_PRI, run.first, w->in);
    float *h = h_of(job, run.first, slot);
    if (job->s->narrow) shrink_rows(1, A, rank, w->in, x, w->in, run.count, h, room(job));
    else shrink_rows(0, A, rank, w->in, x, w->in, run.count, h, room(job));
}

/* The rest of a linear layer's output: its bias, and what the adapter's B makes of h. */
static void expand(const Job *job, const Matrix *w, int slot, Run run, float *y, size_t stride)
{
    for (int t = 0; w->bias && t < run.count; t++)
        for (int i = 0; i < w->out; i++) y[t * stride + i] += w->bias[i];
    const Factors *f = factors_of(job, w, run.first);
    if (!f) return;
    int rank = job->s->rank[job->s->bank[run.first]];
    const void *B = entry_of(job, f->B_PRO, run.first, w->out);
    const float *h = h_of(job, run.first, slot);
    if (job->s->narrow) expand_rows(1, B, rank, w->out, h, room(job), run.count, y, stride);
    else expand_rows(0, B, rank, w->out, h, room(job), run.count, y, stride);
}

static void to_tiles(const Job *job, Run run, const float *x, int width)
{
    for (int t = run.first; t < run.first + run.count; t++, x += width) {
        float *to = job->tiled + (size_t)(t / job->M) * job->M * width + t % job->M;
        for (int i = 0; i < width; i++) to[(size_t)i * job->M] = x[i];
    }
}

static void normalize(const Job *job, const float *weight, Run run)
{
    int n = job->m->hidden;
    float *x = job->s->x + (size_t)run.first * n, *y = job->normed + (size_t)run.first * n;
    for (int t = 0; t < run.count; t++) rms_norm(x + (size_t)t * n, weight, job->m->eps, n, y + (size_t)t * n);
    to_tiles(job, run, y, n);
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
    expand(job, &l->q, 0, run, qkv, job->width);
    expand(job, &l->k, 1, run, qkv + l->q.out, job->width);
    expand(job, &l->v, 2, run, qkv + l->q.out + l->k.out, job->width);
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

/* Add a product's outputs to the rows they continue. */
static void end_product(const Job *job, const Matrix *w, Run run)
{
    float *y = job->y + (size_t)run.first * w->out, *x = job->s->x + (size_t)run.first * w->out;
    expand(job, w, 0, run, y, w->out);
    for (int i = 0; i < run.count * w->out; i++) x[i] += y[i];
}

static void gate_rows(const Job *job, const Layer *l, Run run)
{
    int inner = job->m->inner;
    float *gate = job->gate + (size_t)run.first * inner, *up = job->up + (size_t)run.first * inner;
    expand(job, &l->gate, 0, run, gate, inner);
    expand(job, &l->up, 1, run, up, inner);
    for (int i = 0; i < run.count * inner; i += LANES) {
        V g = *(V *)(gate + i);
        *(V *)(gate + i) = g / (exp16(-g) + 1.0f) * *(V *)(up + i);
    }
    to_tiles(job, run, gate, inner);
}
