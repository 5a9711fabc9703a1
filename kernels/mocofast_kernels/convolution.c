/* Convolutions of channels-last images on a CPU with AVX-512, forward and backward.
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

struct gather;
struct weights;

/* Older compilers do not know all of the instructions. */
#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 11))
#define X86 1
#include <immintrin.h>

#define LANES 16 /* float32 in a vector */
#define PANEL 64 /* columns of weights at a time, */
#define VECTORS 4 /* in so many vectors */
#define SHORT 6  /* rows whose sums are in registers beside 3 or 4 vectors */
#define TALL 12  /* rows beside 1 or 2 vectors */
#define GROUP 48 /* outputs whose gradients lie together */
#define ALL ((__mmask16)0xffff)
#define INLINE static inline __attribute__((always_inline))
#define AVX512 "avx512f,avx512dq,avx512bw,avx512vl,fma"
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
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
  int transposed, bfloat16;
  int64_t parts, next;
};
struct weights_job {
  const struct weights *s;
  const void *images, *gradient;
  float *sums;
  uint32_t *scratch;
  int64_t scratch_words;
  int bfloat16;
  int64_t parts, next;
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

/* Returns the greatest common divisor. */
static int64_t divisor(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

/* Transposes 16 x 16 words. */
INLINE __attribute__((target(AVX512))) void transpose(__m512i r[LANES]) {
  __m512i t[LANES];
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

#define NAME(x) float32_##x
#define TARGET __attribute__((target(AVX512)))
#define element float
#define PAIR 1
#define ADD(sum, x, w) _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum)
#define STORE(out, sum) _mm512_storeu_ps(out, sum)
#include "convolution_body.h"

#define NAME(x) bfloat16_##x
#define TARGET __attribute__((target(AVX512 ",avx512bf16")))
#define element uint16_t
#define PAIR 2
#define ADD(sum, x, w) _mm512_dpbf16_ps(sum, (__m512bh)(x), (__m512bh)(w))
#define STORE(out, sum) \
  _mm256_storeu_si256((__m256i *)(out), (__m256i)_mm512_cvtneps_pbh(sum))
#include "convolution_body.h"

/* Computes parts until none is left. The threads may be fewer than the parts. */
static void gather_parts(void *argument) {
  struct gather_job *job = argument;
  for (int64_t part; (part = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->parts;)
    (job->bfloat16 ? bfloat16_gather_part : float32_gather_part)(job, part);
}

static void weights_parts(void *argument) {
  struct weights_job *job = argument;
  for (int64_t part; (part = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->parts;)
    (job->bfloat16 ? bfloat16_weights_part : float32_weights_part)(job, part);
}
#endif

/* GNU OpenMP's GOMP_parallel: calls a function with an argument on several threads. */
typedef void parallel(void (*)(void *), void *, unsigned, unsigned);

/* Returns whether this CPU convolves float32 (0) or bfloat16 (1). */
EXPORT int convolution_runs(int bfloat16) {
#if X86
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && (!bfloat16 || __builtin_cpu_supports("avx512bf16"));
#else
  (void)bfloat16;
  return 0;
#endif
}

/* Convolves, or computes the gradient of the images. cpu_convolution.py says what the arguments
 * are. */
EXPORT void convolution_gather(int bfloat16, const struct gather *g, const void *source,
                               const void *weights, void *result, uint32_t *scratch,
                               int transposed, int64_t threads, parallel *run) {
#if X86
  struct gather_job job = {g, source, weights, result, scratch, transposed, bfloat16, threads, 0};
  if (threads == 1)
    gather_parts(&job);
  else
    run(gather_parts, &job, (unsigned)threads, 0);
#endif
}

/* Computes the gradient of the weights, in float32. */
EXPORT void convolution_weights(int bfloat16, const struct weights *s, const void *images,
                                const void *gradient, float *sums, uint32_t *scratch,
                                int64_t scratch_words, int64_t threads, parallel *run) {
#if X86
  struct weights_job job = {s,       images,  gradient, sums, scratch, scratch_words,
                            bfloat16, threads, 0};
  if (threads == 1)
    weights_parts(&job);
  else
    run(weights_parts, &job, (unsigned)threads, 0);
#endif
}
