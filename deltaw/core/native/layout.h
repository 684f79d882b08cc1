/* Rows of bfloat16 laid out as products want them, and sums written back as rows. D is a multiple of 32. */

enum { BLOCK = 64 };            /* queries, and keys, of a block */

/* 16 x 16 numbers of 32 bits. */
INLINE void transpose(__m512i r[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int part = 0; part < 16; part += 8)
        for (int i = 0; i < 4; i++) {
            t[part + i] = _mm512_shuffle_i32x4(r[part + i], r[part + i + 4], 0x88);
            t[part + i + 4] = _mm512_shuffle_i32x4(r[part + i], r[part + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* 32 numbers of each of 16 rows, of which `count` exist and the others are zeros, as 16 vectors of pairs by column. */
INLINE void load_transposed(__m512i r[16], const half *x, long stride, long count)
{
    for (long i = 0; i < 16; i++) r[i] = i < count ? _mm512_loadu_si512(x + i * stride) : _mm512_setzero_si512();
    transpose(r);
}

/* Rows (count, D) as the paired B (D / 2, BLOCK) of their transpose. */
static void paired_transpose(const half *x, long stride, long count, long D, pair *out)
{
    __m512i r[16];
    for (long at = 0; at < count; at += 16)
        for (long d = 0; d < D; d += 32) {
            load_transposed(r, x + at * stride + d, stride, count - at);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (d / 2 + i) * BLOCK + at, r[i]);
        }
}

/* Rows (count, D) as A (D, width) of their transpose; it is zero up to the next 16 columns. */
static void transposed(const half *x, long stride, long count, long D, half *out, long width)
{
    __m512i r[16];
    for (long at = 0; at < count; at += 16)
        for (long d = 0; d < D; d += 32) {
            load_transposed(r, x + at * stride + d, stride, count - at);
            for (int i = 0; i < 16; i++) {
                half *to = out + (d + 2 * i) * width + at;
                _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(r[i]));
                _mm256_storeu_si256((__m256i *)(to + width), _mm512_cvtepi32_epi16(_mm512_srli_epi32(r[i], 16)));
            }
        }
}

/* Rows (count, D) as the paired B (BLOCK / 2, D): neighbours side by side; it is zero up to the next 16 rows. */
static void paired(const half *x, long stride, long count, long D, pair *out)
{
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16)), none = _mm512_setzero_si512();
    for (long q = 0; q < UP(count, 16); q += 2)
        for (long d = 0; d < D; d += 32) {
            const __m512i a = q < count ? _mm512_loadu_si512(x + q * stride + d) : none;
            const __m512i b = q + 1 < count ? _mm512_loadu_si512(x + (q + 1) * stride + d) : none;
            _mm512_storeu_si512(out + q / 2 * D + d, _mm512_permutex2var_epi16(a, first, b));
            _mm512_storeu_si512(out + q / 2 * D + d + 16, _mm512_permutex2var_epi16(a, second, b));
        }
}

/* A vector of each of two neighbouring rows of float32, paired. */
INLINE __m512i interleaved(__m512 even, __m512 odd)
{
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

INLINE void store(half *to, __m512 x)
{
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

/* The first `count` columns of x (D, BLOCK), each times its factor, as rows. */
static void write_columns(const float *x, const float *factor, long count, long D, half *out, long stride)
{
    __m512i r[16];
    for (long q = 0; q < count; q += 16)
        for (long d = 0; d < D; d += 16) {
            for (int i = 0; i < 16; i++)
                r[i] = (__m512i)_mm512_mul_ps(_mm512_loadu_ps(x + (d + i) * BLOCK + q), _mm512_loadu_ps(factor + q));
            transpose(r);
            for (long i = 0; i < MIN(16, count - q); i++) store(out + (q + i) * stride + d, (__m512)r[i]);
        }
}

/* x (count, D) as rows. */
static void write_rows(const float *x, long count, long D, half *out, long stride)
{
    for (long t = 0; t < count; t++)
        for (long d = 0; d < D; d += 16) store(out + t * stride + d, _mm512_loadu_ps(x + t * D + d));
}
