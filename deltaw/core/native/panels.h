/* Products with a weight of bfloat16 as it lies, which is laid out anew a panel of columns at a time.

   A panel stays in the second cache while all rows go by; laying it out takes a hundredth of a product with a thousand
   rows. Depths and widths are multiples of 32. */

enum { PANEL = 64, DEPTH = 1024 };      /* columns, and numbers that are summed over, of a panel */

typedef struct {
    half *data;
    int64_t stride, width;
} Rows;

typedef struct {
    const half *data;
    int64_t by_depth, by_column;        /* strides, one of which is 1 */
} Weight;

/* Rows (width, depth) as the paired B (depth / 2, width) of their transpose. */
static void rows_as_columns(const half *x, long stride, long depth, long width, pair *out)
{
    __m512i r[16];
    for (long n = 0; n < width; n += 16)
        for (long k = 0; k < depth; k += 32) {
            load_transposed(r, x + n * stride + k, stride, 16);
            for (long i = 0; i < 16; i++) _mm512_storeu_si512(out + (k / 2 + i) * width + n, r[i]);
        }
}

/* sums (rows, width ≤ PANEL) (+)= A·W[:, column : column + width]; their rows lie PANEL apart. */
static void add_product(Rows A, long start, long stop, Weight W, long column, long width, pair *panel, float *sums,
                        bool add)
{
    for (long k = 0; k < A.width; k += DEPTH) {
        const long depth = MIN(DEPTH, A.width - k);
        const half *at = W.data + k * W.by_depth + column * W.by_column;
        if (W.by_depth == 1) rows_as_columns(at, W.by_column, depth, width, panel);
        else paired(at, W.by_depth, depth, width, panel);
        product(stop - start, width / 16, depth / 2, A.data + start * A.stride + k, A.stride, panel, width, sums, PANEL,
                add || k);
    }
}

/* Some columns of rows, as sums. */
static void read_sums(Rows from, long start, long stop, long column, long width, float *sums)
{
    for (long t = start; t < stop; t++, sums += PANEL)
        for (long n = 0; n < width; n += 16)
            _mm512_storeu_ps(sums + n, load(from.data + t * from.stride + column + n));
}

/* Sums as some columns of rows, with what is added to each column, if anything. */
static void write_sums(const float *sums, const half *bias, Rows to, long start, long stop, long column, long width)
{
    for (long t = start; t < stop; t++, sums += PANEL)
        for (long n = 0; n < width; n += 16) {
            const __m512 sum = _mm512_loadu_ps(sums + n);
            store(to.data + t * to.stride + column + n, bias ? _mm512_add_ps(sum, load(bias + column + n)) : sum);
        }
}
