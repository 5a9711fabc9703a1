/* Vectors of 16 float32, for sweep.c and in_batch.c. Include it after x86.h, where X86 is 1. */

#define LANES 16 /* float32 in a vector */
#define ALL ((__mmask16)0xffff)
#define WIDE __attribute__((target(AVX512)))

/* Returns 2^x with a relative error of 1e-7: inf, 0 and NaN as exp2f does.
 * 2^x = 2^floor(x) p(x - floor(x)), p fitted to the least relative error on [0, 1]. */
INLINE WIDE __m512 exp2_of(__m512 x) {
  __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF); /* 0 for inf */
  __m512 p = _mm512_set1_ps(0x1.c54174p-13f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.46d64ep-10f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.3d0b92p-7f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c68912p-5f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebfd58p-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e42cp-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, x);
}

/* Lanes of 16 numbers from i on, of `width`. */
INLINE WIDE __mmask16 lanes_from(int64_t i, int64_t width) {
  return width - i < LANES ? (__mmask16)((1 << (width - i)) - 1) : ALL;
}

WIDE static float dot(const float *a, const float *b, int64_t width) {
  __m512 sums = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += LANES) {
    __mmask16 lanes = lanes_from(i, width);
    sums = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, a + i), _mm512_maskz_loadu_ps(lanes, b + i),
                           sums);
  }
  return _mm512_reduce_add_ps(sums);
}

/* Writes a x + b y. */
WIDE static void combine(float *out, float a, const float *x, float b, const float *y,
                         int64_t width) {
  for (int64_t i = 0; i < width; i += LANES) {
    __mmask16 lanes = lanes_from(i, width);
    __m512 sum = _mm512_mul_ps(_mm512_set1_ps(a), _mm512_maskz_loadu_ps(lanes, x + i));
    sum = _mm512_fmadd_ps(_mm512_set1_ps(b), _mm512_maskz_loadu_ps(lanes, y + i), sum);
    _mm512_mask_storeu_ps(out + i, lanes, sum);
  }
}

#define EPS 1e-12f /* smallest divisor of a normalised vector */

/* Returns max(norm, EPS), NaN for NaN. */
static float norm_of(const float *x, int64_t width) {
  float norm = sqrtf(dot(x, x, width));
  return norm < EPS ? EPS : norm;
}
