/* Products with a frozen weight as it lies, which is laid out anew a panel of columns at a time.

   A panel stays in the second cache while all rows go by; laying it out takes a hundredth of a product with a thousand
   rows. Depths and widths are multiples of 32. */

enum { PANEL = 64, DEPTH = 1024 };      /* columns, and numbers that are summed over, of a panel */

typedef struct {
    half *data;
    int64_t stride, width;
} Rows;

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

/* A panel of W: what is summed over, its inputs forward and its outputs back, from `k` on; columns from `column` on. */
static void lay_out(const Weight *W, bool forward, long k, long depth, long column, long width, pair *panel)
{
    const long output = forward ? column : k, input = forward ? k : column;
    const half *at = (const half *)W->data + output * W->by_output + input * W->by_input;
    switch (W->bits) {
    case 4: (forward ? rows_of_4_bits : columns_of_4_bits)(W, output, input, depth, width, panel); break;
    case 8: (forward ? rows_of_8_bits : columns_of_8_bits)(W, output, input, depth, width, panel); break;
    default:
        if ((forward ? W->by_input : W->by_output) == 1)
            rows_as_columns(at, forward ? W->by_output : W->by_input, depth, width, panel);
        else paired(at, forward ? W->by_input : W->by_output, depth, width, panel);
    }
}

/* sums (rows, width ≤ PANEL) (+)= A·WT forward, A·W back, columns from `column` on; their rows lie PANEL apart. */
static void add_product(Rows A, long start, long stop, const Weight *W, bool forward, long column, long width,
                        pair *panel, float *sums, bool add)
{
    for (long k = 0; k < A.width; k += DEPTH) {
        const long depth = MIN(DEPTH, A.width - k);
        lay_out(W, forward, k, depth, column, width, panel);
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
