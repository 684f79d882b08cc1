/* Sixteen numbers at a time: bfloat16 read and written, some of them only where a row ends, and 2^x. */

INLINE __mmask16 first_of(long count)
{
    return count >= 16 ? 0xffff : count > 0 ? (__mmask16)((1u << count) - 1) : 0;
}

INLINE __m512 widened(__m256i x)
{
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
}

/* The numbers of x under the mask; the others are zeros. */
INLINE __m512 load_some(__mmask16 some, const half *x)
{
    return widened(_mm256_maskz_loadu_epi16(some, x));
}

INLINE __m512 load(const half *x)
{
    return widened(_mm256_loadu_si256((const __m256i *)x));
}

INLINE void store_some(half *to, __mmask16 some, __m512 x)
{
    _mm256_mask_storeu_epi16(to, some, (__m256i)_mm512_cvtneps_pbh(x));
}

/* x as bfloat16 has it. */
INLINE __m512 rounded(__m512 x)
{
    return widened((__m256i)_mm512_cvtneps_pbh(x));
}

/* 2^x, to a relative error of 2e-7; 0 below -126. */
INLINE __m512 exp2_(__m512 x)
{
    static const float c[] = {1.339887440e-3f, 9.618437357e-3f, 5.550332471e-2f, 2.402264791e-1f, 6.931472029e-1f,
                              1.0f};
    const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);   /* and where it is NaN */
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.535336188e-4f);
    for (int i = 0; i < 6; i++) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c[i]));
    return _mm512_maskz_scalef_ps(some, y, whole);
}

#define LOG2_E 1.44269504088896341f
#define FEW (1 << 14)           /* numbers that are not worth a second thread */
