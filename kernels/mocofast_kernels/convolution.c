/* Convolutions of channels-last images on a CPU with AVX2 or AVX-512, forward and backward.
 *
 * cpu_convolution.py loads this library by ctypes, which holds no lock of Python during a call.
 *
 * A pixel of the result is a sum over taps (the positions in a kernel of weights) of a product
 * "channels of a pixel of the source x weights of the tap". Pixels with the same taps inside of the
 * image are a class, and the products of taps outside of the image are left out: 8 of 9 taps for a
 * 3 x 3 kernel on images of one pixel. The gradient of the images is the same with the weights
 * transposed. The gradient of a tap's weights is a product over all pixels and images. Weights are
 * read in the order in which PyTorch keeps channels-last weights, a panel at a time, and results
 * are sums in an order that does not depend on the number of threads.
 *
 * A word is 32 bits: two bfloat16 of neighbouring channels or images, or one float32.
 */

#include <stdint.h>
#include <string.h>

#include "compilers.h"
#include "x86.h"

struct gather;
struct weights;

#if X86
#define GROUP 48 /* outputs whose gradients lie together */
#define WITH_AVX2 __attribute__((target("avx2,fma")))
#define WITH_AVX512 __attribute__((target(AVX512)))
#define WITH_AVX512BF16 __attribute__((target(AVX512 ",avx512bf16")))
#define UP_TO_6(CASE, v) CASE(6, v) CASE(5, v) CASE(4, v) CASE(3, v) CASE(2, v) CASE(1, v)
#define UP_TO_12(CASE, v) \
  CASE(12, v) CASE(11, v) CASE(10, v) CASE(9, v) CASE(8, v) CASE(7, v) UP_TO_6(CASE, v)

/* cpu_convolution.py says what the fields of both are. */
struct gather {
  int64_t classes, depth, width, taps;
  const int64_t *class_taps, *class_rows;
  const int32_t *tap, *offset, *to, *from;
};
struct weights {
  int64_t images, images_at_a_time, output_pixels, input_pixels, width, depth, taps;
  int64_t chunks, most_outputs, most_inputs;
  const int64_t *bounds, *tap_links;
  const int32_t *output, *input;
};

struct gather_job {
  const struct gather *g;
  const void *source, *weights;
  void *result;
  uint32_t *scratch;
  int transposed, kind;
  int64_t parts, next;
};
struct weights_job {
  const struct weights *s;
  const void *images, *gradient;
  float *sums;
  uint32_t *scratch;
  int64_t scratch_words;
  int kind;
  int64_t parts, next;
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Returns the greatest common divisor. */
static int64_t divisor(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

/* Kinds of elements and instructions. */
enum { FLOAT32_AVX512, BFLOAT16_AVX512, FLOAT32_AVX2 };

INLINE WITH_AVX2 __m256i broadcast_8(const void *word) {
  int32_t bits;
  memcpy(&bits, word, 4);
  return _mm256_set1_epi32(bits);
}
INLINE WITH_AVX512 __m512i broadcast_16(const void *word) {
  int32_t bits;
  memcpy(&bits, word, 4);
  return _mm512_set1_epi32(bits);
}

/* Transposes 8 x 8 words. */
INLINE WITH_AVX2 void transpose_8(__m256i r[8]) {
  __m256i t[8];
  UNROLL for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  UNROLL for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  UNROLL for (int i = 0; i < 8; i++) r[i] = t[i];
}

/* Transposes 16 x 16 words. */
INLINE WITH_AVX512 void transpose_16(__m512i r[16]) {
  __m512i t[16];
  UNROLL for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  UNROLL for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

INLINE WITH_AVX512 void pair(uint32_t *out, const uint16_t *a, const uint16_t *b, int64_t count) {
  for (int64_t c = 0; c < count; c += 16) {
    const __mmask16 mask = count - c < 16 ? (__mmask16)((1u << (count - c)) - 1) : 0xffff;
    __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a + c));
    if (b) {
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b + c));
      words = _mm512_or_si512(words, _mm512_slli_epi32(high, 16));
    }
    _mm512_mask_storeu_epi32(out + c, mask, words);
  }
}
#define COPY_FLOATS(out, a, b, count) ((void)(b), (void)memcpy(out, a, (size_t)(count) * 4))

/* AVX2 has half of the registers, and half of the lanes. */
#define LANES 8
#define PANEL 16
#define SHORT 6
#define TALL 6
#define TARGET WITH_AVX2
#define sums_t __m256
#define words_t __m256i
#define ZERO() _mm256_setzero_ps()
#define LOAD_SUMS(from) _mm256_loadu_ps(from)
#define STORE_SUMS(to, sums) _mm256_storeu_ps(to, sums)
#define LOAD_WORDS(from) _mm256_loadu_si256((const __m256i *)(from))
#define LOAD_SOME(from, count) LOAD_WORDS(from) /* channels are multiples of 16 */
#define STORE_WORDS(to, words) _mm256_storeu_si256((__m256i *)(to), words)
#define BROADCAST(from) broadcast_8(from)
#define TRANSPOSE(square) transpose_8(square)

#define NAME(x) float32_avx2_##x
#define element float
#define PAIR 1
#define ADD(sum, x, w) _mm256_fmadd_ps(_mm256_castsi256_ps(x), _mm256_castsi256_ps(w), sum)
#define STORE(out, sum) _mm256_storeu_ps(out, sum)
#define COPY(out, a, b, count) COPY_FLOATS(out, a, b, count)
#include "convolution_body.h"

#undef LANES
#undef PANEL
#undef SHORT
#undef TALL
#undef TARGET
#undef sums_t
#undef words_t
#undef ZERO
#undef LOAD_SUMS
#undef STORE_SUMS
#undef LOAD_WORDS
#undef LOAD_SOME
#undef STORE_WORDS
#undef BROADCAST
#undef TRANSPOSE
#define LANES 16
#define PANEL 64
#define SHORT 6
#define TALL 12
#define sums_t __m512
#define words_t __m512i
#define ZERO() _mm512_setzero_ps()
#define LOAD_SUMS(from) _mm512_loadu_ps(from)
#define STORE_SUMS(to, sums) _mm512_storeu_ps(to, sums)
#define LOAD_WORDS(from) _mm512_loadu_si512(from)
#define LOAD_SOME(from, count) _mm512_maskz_loadu_epi32((__mmask16)((1u << (count)) - 1), from)
#define STORE_WORDS(to, words) _mm512_storeu_si512(to, words)
#define BROADCAST(from) broadcast_16(from)
#define TRANSPOSE(square) transpose_16(square)

#define NAME(x) float32_##x
#define TARGET WITH_AVX512
#define element float
#define PAIR 1
#define ADD(sum, x, w) _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum)
#define STORE(out, sum) _mm512_storeu_ps(out, sum)
#define COPY(out, a, b, count) COPY_FLOATS(out, a, b, count)
#include "convolution_body.h"

#undef TARGET
#define NAME(x) bfloat16_##x
#define TARGET WITH_AVX512BF16
#define element uint16_t
#define PAIR 2
#define ADD(sum, x, w) _mm512_dpbf16_ps(sum, (__m512bh)(x), (__m512bh)(w))
#define STORE(out, sum) \
  _mm256_storeu_si256((__m256i *)(out), (__m256i)_mm512_cvtneps_pbh(sum))
#define COPY(out, a, b, count) pair(out, a, b, count)
#include "convolution_body.h"

/* Computes parts until none is left. The threads may be fewer than the parts. */
#define PARTS(name, job_t, function)                                                             \
  static void name(void *argument) {                                                             \
    job_t *job = argument;                                                                       \
    for (int64_t p; (p = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->parts;)     \
      (job->kind == BFLOAT16_AVX512  ? bfloat16_##function                                       \
       : job->kind == FLOAT32_AVX512 ? float32_##function                                        \
                                     : float32_avx2_##function)(job, p);                         \
  }
PARTS(gather_parts, struct gather_job, gather_part)
PARTS(weights_parts, struct weights_job, weights_part)
#endif

/* Returns whether this CPU convolves a kind: float32 by AVX-512 (0) or AVX2 (2), bfloat16 (1). */
EXPORT int convolution_runs(int kind) {
#if X86
  if (kind == FLOAT32_AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has_avx512(kind == BFLOAT16_AVX512);
#else
  (void)kind;
  return 0;
#endif
}

/* Convolves, or computes the gradient of the images. cpu_convolution.py says what the arguments
 * are. */
EXPORT void convolution_gather(int kind, const struct gather *g, const void *source,
                               const void *weights, void *result, uint32_t *scratch,
                               int transposed, int64_t threads, parallel *run) {
#if X86
  struct gather_job job = {g, source, weights, result, scratch, transposed, kind, threads, 0};
  if (threads == 1)
    gather_parts(&job);
  else
    run(gather_parts, &job, (unsigned)threads, 0);
#endif
}

/* Computes the gradient of the weights, in float32. */
EXPORT void convolution_weights(int kind, const struct weights *s, const void *images,
                                const void *gradient, float *sums, uint32_t *scratch,
                                int64_t scratch_words, int64_t threads, parallel *run) {
#if X86
  struct weights_job job = {s,    images,  gradient, sums, scratch, scratch_words,
                            kind, threads, 0};
  if (threads == 1)
    weights_parts(&job);
  else
    run(weights_parts, &job, (unsigned)threads, 0);
#endif
}
