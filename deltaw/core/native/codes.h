/* Frozen weights (O, I) in codes of 4 or 8 bits, unpacked where a panel of them is laid out.

       4 bits   W = table[code] · scale of the code's block       the first of two codes is in a byte's upper half
       8 bits   W = code · scale of the row

   A block is a power of two, 64 numbers of a row or more; a row has whole blocks. Numbers are worked out in float32 and
   rounded to bfloat16. That takes what a product with a dozen rows does, and nothing is written but the panel. */

typedef struct {
    const void *data;                   /* bfloat16, or codes */
    int64_t by_output, by_input;        /* strides, one of which is 1; of codes it is the last */
    int64_t bits, shift;                /* 16, 8 or 4; 2^shift numbers are a block */
    const float *scale, *table;
} Weight;

enum { DWORDS = 16 };                   /* of a row's codes that are taken at once */

/* 16 dwords of codes of each of 16 rows, of which `count` exist, as vectors that hold a dword of all rows. */
INLINE void load_codes(__m512i r[16], const char *codes, long stride, long count)
{
    for (long i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi32(first_of(count), codes + i * stride);
    transpose(r);
}

INLINE __m512 looked_up(__m512i codes, __m512 table, __m512 scale)
{
    return _mm512_mul_ps(_mm512_permutexvar_ps(codes, table), scale);       /* by their four lowest bits */
}

/* The byte that `up` shifts to the top, with its sign. */
INLINE __m512 signed_byte(__m512i codes, int up, __m512 scale)
{
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(codes, up), 24)), scale);
}

/* Rows from `output` on and their numbers from `input` on as the paired B (depth / 2, width) of their transpose. */
static void rows_of_4_bits(const Weight *W, long output, long input, long depth, long width, pair *out)
{
    const __m512 table = _mm512_loadu_ps(W->table);
    __m512i r[DWORDS];
    for (long n = 0; n < width; n += 16)
        for (long k = 0; k < depth; k += 8 * DWORDS) {
            const long first = (output + n) * W->by_output + input + k, count = MIN(DWORDS, (depth - k) / 8);
            load_codes(r, (const char *)W->data + first / 2, W->by_output / 2, count);
            for (long d = 0; d < count; d += 8) {
                float own[16];
                for (long i = 0; i < 16; i++) own[i] = W->scale[(first + i * W->by_output + 8 * d) >> W->shift];
                const __m512 scale = _mm512_loadu_ps(own);
                pair *to = out + (k / 2 + 4 * d) * width + n;
                for (long i = 0; i < 8; i++)
                    for (int byte = 0; byte < 4; byte++, to += width)
                        _mm512_storeu_si512(to, interleaved(
                            looked_up(_mm512_srli_epi32(r[d + i], 8 * byte + 4), table, scale),
                            looked_up(_mm512_srli_epi32(r[d + i], 8 * byte), table, scale)));
            }
        }
}

static void rows_of_8_bits(const Weight *W, long output, long input, long depth, long width, pair *out)
{
    __m512i r[DWORDS];
    for (long n = 0; n < width; n += 16) {
        const __m512 scale = _mm512_loadu_ps(W->scale + output + n);
        for (long k = 0; k < depth; k += 4 * DWORDS) {
            const long count = MIN(DWORDS, (depth - k) / 4);
            pair *to = out + k / 2 * width + n;
            load_codes(r, (const char *)W->data + (output + n) * W->by_output + input + k, W->by_output, count);
            for (long d = 0; d < count; d++, to += 2 * width) {
                _mm512_storeu_si512(to, interleaved(signed_byte(r[d], 24, scale), signed_byte(r[d], 16, scale)));
                _mm512_storeu_si512(to + width, interleaved(signed_byte(r[d], 8, scale), signed_byte(r[d], 0, scale)));
            }
        }
    }
}

/* 64 codes of 4 bits from number `at` on, as vectors of numbers. */
INLINE void row_of_4_bits(const Weight *W, long at, __m512 table, __m512 numbers[4])
{
    const __m512i down = _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4);
    const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i codes = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)((const char *)W->data + at / 2)));
    const __m512 scale = _mm512_set1_ps(W->scale[at >> W->shift]);
    for (int q = 0; q < 4; q++) {
        const __m512i two = _mm512_permutexvar_epi32(_mm512_add_epi32(halves, _mm512_set1_epi32(2 * q)), codes);
        numbers[q] = looked_up(_mm512_srlv_epi32(two, down), table, scale);
    }
}

/* Rows from `output` on, `depth` of them, and their numbers from `input` on as the paired B (depth / 2, width). */
static void columns_of_4_bits(const Weight *W, long output, long input, long depth, long width, pair *out)
{
    const __m512 table = _mm512_loadu_ps(W->table);
    __m512 even[4], odd[4];
    for (long o = output; o < output + depth; o += 2)
        for (long i = 0; i < width; i += 64, out += 64) {
            row_of_4_bits(W, o * W->by_output + input + i, table, even);
            row_of_4_bits(W, (o + 1) * W->by_output + input + i, table, odd);
            for (int q = 0; q < 4; q++) _mm512_storeu_si512(out + 16 * q, interleaved(even[q], odd[q]));
        }
}

INLINE __m512 row_of_8_bits(const Weight *W, long o, long i)
{
    const __m128i codes = _mm_loadu_si128((const __m128i *)((const char *)W->data + o * W->by_output + i));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), _mm512_set1_ps(W->scale[o]));
}

static void columns_of_8_bits(const Weight *W, long output, long input, long depth, long width, pair *out)
{
    for (long o = output; o < output + depth; o += 2)
        for (long i = input; i < input + width; i += 16, out += 16)
            _mm512_storeu_si512(out, interleaved(row_of_8_bits(W, o, i), row_of_8_bits(W, o + 1, i)));
}
