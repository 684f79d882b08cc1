/* The factors of low-rank changes, float32 or bfloat16 where they lie, as products in bfloat16 want them. */

/* Ranks are even here: an odd one has a column of zeros. */
#define EVEN(rank) (((rank) + 1) & ~1L)

/* The same factor from its number `at` on. */
INLINE const void *from(const void *factor, bool wide, long at)
{
    return (const char *)factor + at * (wide ? sizeof(float) : sizeof(half));
}

/* 16 numbers of a factor from `at` on, those of them that `some` has. */
INLINE __m512 numbers(const void *factor, bool wide, long at, __mmask16 some)
{
    return wide ? _mm512_maskz_loadu_ps(some, (const float *)factor + at) : load_some(some, (const half *)factor + at);
}

/* 32 numbers as bfloat16. */
INLINE __m512i row_of_32(const void *factor, bool wide, long at, long count)
{
    return (__m512i)_mm512_cvtne2ps_pbh(numbers(factor, wide, at + 16, first_of(count - 16)),
                                        numbers(factor, wide, at, first_of(count)));
}

/* The paired transpose (width / 2, ld) of a factor (rows, width): its rows become columns, an even number of them. */
static void pair_rows(const void *factor, bool wide, long rows, long width, pair *out, long ld)
{
    __m512i r[16];
    for (long o = 0; o < rows; o += 16)
        for (long i = 0; i < width; i += 32) {
            for (long k = 0; k < 16; k++)
                r[k] = o + k < rows ? row_of_32(factor, wide, (o + k) * width + i, width - i) : _mm512_setzero_si512();
            transpose(r);
            for (long k = 0; k < MIN(16, (width - i + 1) / 2); k++)
                _mm512_mask_storeu_epi32(out + (i / 2 + k) * ld + o, first_of(EVEN(rows) - o), r[k]);
        }
}

/* Neighbouring rows of a factor's numbers (rows, width), which lie `stride` apart, side by side, (rows / 2, ld); a row
   that lacks its neighbour has zeros. */
static void pair_columns(const void *factor, bool wide, long stride, long rows, long width, pair *out, long ld)
{
    for (long o = 0; o < rows; o += 2)
        for (long i = 0; i < width; i += 16) {
            const __mmask16 some = first_of(width - i);
            const __m512 even = numbers(factor, wide, o * stride + i, some);
            const __m512 odd = numbers(factor, wide, (o + 1) * stride + i, o + 1 < rows ? some : 0);
            _mm512_mask_storeu_epi32(out + o / 2 * ld + i, first_of(ld - i), interleaved(even, odd));
        }
}

/* Sums (count, ld) times `scale`, as `width` columns of h. */
static void write_h(const float *sums, long ld, long count, long width, float scale, half *h, long stride)
{
    for (long t = 0; t < count; t++)
        for (long c = 0; c < width; c += 16)
            store_some(h + t * stride + c, first_of(width - c),
                       _mm512_mul_ps(_mm512_loadu_ps(sums + t * ld + c), _mm512_set1_ps(scale)));
}
