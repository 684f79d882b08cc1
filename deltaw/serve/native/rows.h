/* What is done to rows by themselves: norms, rotary positions, attention, low-rank changes. */

#include <math.h>
#include <string.h>

typedef struct {
    const void *A_PRI, *B_PRO;  /* stacks of all adapters' factors at one site; NULL where no adapter has any */
} Factors;

typedef struct {
    Matrix q, k, v, o, gate, up, down;
    const float *norm, *mlp_norm;
    const float *q_norm, *k_norm;       /* or NULL */
    float *keys, *values;               /* (places, capacity, groups, head_dim) */
} Layer;

typedef struct {
    int32_t layers, hidden, inner, heads, groups, head_dim, rotary, capacity;
    float eps, scale;
    const float *cos, *sin;             /* (capacity, rotary) */
    const float *last_norm;
    Matrix head;
    const Layer *layer;
} Model;

typedef struct {
    int32_t rows, kept, banks, narrow, threads;     /* narrow: factors are bfloat16 */
    const int32_t *position, *place;                /* of each row */
    const int32_t *bank, *entry;                    /* whose factors a row takes; bank -1 for none */
    const int32_t *keep;                            /* rows whose logits are asked for */
    const int32_t *rank;                            /* of each bank */
    const Factors *factors;                         /* (sites, banks) */
    float *x;                                       /* (rows, hidden): embeddings; overwritten */
    float *logits;                                  /* (tiles of kept rows, outputs of the head) */
} Step;

/* e^x, to 2 units in the last place (Cody and Waite's reduction, Taylor to the seventh power). */
INLINE V exp16(V x)
{
    I low = x < -87.0f, high = x > 88.0f;
    x = (V)(((I)x & ~(low | high)) | (low & (I)((V){0} - 87.0f)) | (high & (I)((V){0} + 88.0f)));
    V shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    V r = x - n * 0.693359375f + n * 2.12194440e-4f;
    V p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120, p = p * r + 1.0f / 24, p = p * r + 1.0f / 6, p = p * r + 0.5f;
    p = p * r + 1.0f, p = p * r + 1.0f;
    return (V)((I)p + ((I)shifted << 23));
}

INLINE float wide(const void *numbers, size_t i, const int narrow)
{
    if (!narrow) return ((const float *)numbers)[i];
    union { uint32_t bits; float f; } number = {(uint32_t)((const uint16_t *)numbers)[i] << 16};
    return number.f;
}

static float dot(const float *a, const float *b, int n)
{
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void rms_norm(const float *x, const float *weight, float eps, int n, float *y)
{
    float factor = 1.0f / sqrtf(dot(x, x, n) / n + eps);
    #pragma omp simd
    for (int i = 0; i < n; i++) y[i] = weight[i] * (x[i] * factor);
}

/* Rotate the first `rotary` numbers of a head by its position, first half against second half. */
static void rotate(float *head, const float *cos, const float *sin, int rotary)
{
    int half = rotary / 2;
    #pragma omp simd
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* One row's heads of one group over the keys of its sequence, up to itself; `scores` has room for heads x capacity. */
static void attend(const Model *m, const float *q, const float *keys, const float *values, int length, float *scores,
                   float *out)
{
    int heads = m->heads / m->groups, d = m->head_dim, step = m->groups * d;
    for (int h = 0; h < heads; h++, q += d, out += d) {
        float top = -INFINITY, total = 0;
        for (int j = 0; j < length; j++) {
            scores[j] = dot(q, keys + (size_t)j * step, d) * m->scale;
            top = scores[j] > top ? scores[j] : top;
        }
        for (int j = length; j % LANES; j++) scores[j] = -INFINITY;
        for (int j = 0; j < length; j += LANES) *(V *)(scores + j) = exp16(*(V *)(scores + j) - top);
        for (int j = 0; j < length; j++) total += scores[j];
        memset(out, 0, d * sizeof *out);
        for (int j = 0; j < length; j++) {
            float weight = scores[j] / total;
            const float *value = values + (size_t)j * step;
            #pragma omp simd
            for (int i = 0; i < d; i++) out[i] += weight * value[i];
        }
    }
}

/* h (n, R) = x (n, I) · Aᵀ */
INLINE void shrink_rows(const int narrow, const void *A_RI, int rank, int inputs, const float *x, size_t x_stride, int n,
                        float *h, size_t h_stride)
{
    for (int r = 0; r < rank; r++)
        for (int t = 0; t < n; t++) {
            const float *row = x + t * x_stride;
            float sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (int i = 0; i < inputs; i++) sum += row[i] * wide(A_RI, (size_t)r * inputs + i, narrow);
            h[t * h_stride + r] = sum;
        }
}

/* y (n, O) += h (n, R) · B */
INLINE void expand_rows(const int narrow, const void *B_RO, int rank, int outputs, const float *h, size_t h_stride, int n,
                        float *y, size_t y_stride)
{
    for (int r = 0; r < rank; r++)
        for (int t = 0; t < n; t++) {
            float factor = h[t * h_stride + r], *row = y + t * y_stride;
            #pragma omp simd
            for (int i = 0; i < outputs; i++) row[i] += factor * wide(B_RO, (size_t)r * outputs + i, narrow);
        }
}
