/* BatchNorm, also over splits of a batch, with residual and ReLU, on channels-last images: a CPU
 * with AVX-512.
 *
 * cpu_ghost_bn.py loads this library by ctypes, which holds no lock of Python during a call.
 *
 * A pass takes sums of groups of images, and a second pass writes the result: PyTorch's operators
 * take one more pass for the addition and one for the ReLU. The gradients take two passes, too.
 * Sums of a group are float32, of differences to a pixel or to the mean, and sums of groups are
 * float64, in an order that does not depend on the number of threads.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "compilers.h"
#include "x86.h"

#if X86
#define LANES 16  /* float32 in a vector */
#define VECTORS 4 /* vectors of channels whose sums are in registers */
#define TILE 6144 /* bytes of a tensor at a time, all channels of some pixels: two pages */
#define BLOCK 256 /* channels whose sums are added at a time */

struct norm {
  int64_t images, pixels, channels, splits;
  int64_t group_images, groups; /* images of a group, and groups of a split */
  const void *x, *residual, *gradient;
  const void *output; /* tells the ReLU's zeros where there is a residual */
  void *result, *of_residual;
  const float *bias; /* (channels,) */
  /* (splits, channels). The gradient of x is scale * (gradient - less - slope * (x - mean)). */
  const float *mean;
  float *scale, *less, *slope;
  float *sums; /* (splits * groups, 2, channels) */
  int relu, bfloat16;
  int64_t parts, next;
};

/* Some pixels of an image. A walk through all pixels for some channels would read two lines of the
 * cache here and there, from a page each: 3 times as slow where the tensors come from memory. */
struct tile {
  int64_t at, pixels;
  int64_t ahead; /* elements to the next tile, which is asked for before its turn */
  int64_t split; /* where the numbers of the split begin */
  float *sums;   /* of the group */
};
enum work { STATISTICS, RESULTS, SUMS_OF_GRADIENTS, GRADIENTS };

/* Asks for some channels of a pixel. */
#define FETCH(from, vectors)                                               \
  UNROLL for (int v = 0; v < (vectors); v += 64 / (LANES * sizeof(element))) \
    _mm_prefetch((const char *)((from) + v * LANES), _MM_HINT_T0)

/* Returns the mask of the lanes that are left, of which there may be more than a vector's. */
INLINE __mmask16 lanes(int64_t left) {
  return left >= LANES ? (__mmask16)0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

/* Returns the mask of the values whose gradients a ReLU keeps: those of NaN, too. */
INLINE __attribute__((target(AVX512))) __mmask16 positive(__m512 y) {
  return _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NLE_UQ);
}

/* Image i is of split i % splits. A group has some images of a split. */
INLINE int64_t first_image(const struct norm *n, int64_t group) {
  return group / n->groups + group % n->groups * n->group_images * n->splits;
}
INLINE int64_t last_image(const struct norm *n, int64_t group) {
  const int64_t end = first_image(n, group) + n->group_images * n->splits;
  return end < n->images ? end : n->images;
}

#define NAME(x) float32_##x
#define TARGET __attribute__((target(AVX512)))
#define element float
#define LOAD(from, mask) _mm512_maskz_loadu_ps(mask, from)
#define STORE(to, mask, value) _mm512_mask_storeu_ps(to, mask, value)
#include "batch_norm_body.h"

#define NAME(x) bfloat16_##x
#define TARGET __attribute__((target(AVX512 ",avx512bf16")))
#define element uint16_t
#define LOAD(from, mask)                                                               \
  _mm512_castsi512_ps(                                                                 \
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16))
#define STORE(to, mask, value) \
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(value))
#include "batch_norm_body.h"

/* Takes shares of the groups until none is left. The threads may be fewer than the shares.
 * reversed: a second pass begins with the groups that are still in the caches. */
#define SHARES(name, function, reversed)                                                       \
  static void name(void *argument) {                                                           \
    struct norm *n = argument;                                                                 \
    const int64_t all = n->splits * n->groups;                                                 \
    for (int64_t part; (part = __atomic_fetch_add(&n->next, 1, __ATOMIC_RELAXED)) < n->parts;) \
      for (int64_t g = all * part / n->parts; g < all * (part + 1) / n->parts; g++)            \
        (n->bfloat16 ? bfloat16_##function : float32_##function)(n, reversed ? all - 1 - g : g); \
  }
SHARES(sum_all, sum, 0)
SHARES(normalise_all, normalise, 0)
SHARES(differentiate_all, differentiate, 1)

/* Adds the sums of a split's groups for some channels. */
INLINE void combine(const struct norm *n, int64_t split, int64_t c, int64_t count, double *first,
                    double *second) {
  memset(first, 0, (size_t)count * sizeof *first);
  memset(second, 0, (size_t)count * sizeof *second);
  for (int64_t g = split * n->groups; g < (split + 1) * n->groups; g++) {
    const float *sums = n->sums + g * 2 * n->channels + c;
    for (int64_t i = 0; i < count; i++) {
      first[i] += sums[i];
      second[i] += sums[n->channels + i];
    }
  }
}

/* Writes the statistics and scale, and adds to the running statistics. */
static __attribute__((target(AVX512))) void finish_statistics(
    const struct norm *n, const float *weight, double eps, float *statistics, double momentum,
    float *running_mean, float *running_variance) {
  const int64_t all = n->splits * n->channels;
  const double count = (double)(n->images / n->splits * n->pixels);
  double sum[BLOCK], square[BLOCK], mean[BLOCK], variance[BLOCK];
  for (int64_t begin = 0; begin < n->channels; begin += BLOCK) {
    const int64_t left = n->channels - begin, width = left < BLOCK ? left : BLOCK;
    memset(mean, 0, sizeof mean);
    memset(variance, 0, sizeof variance);
    for (int64_t s = 0; s < n->splits; s++) {
      combine(n, s, begin, width, sum, square);
      for (int64_t i = 0; i < width; i++) {
        const int64_t at = s * n->channels + begin + i;
        const double off = sum[i] / count, m = statistics[at] + off;
        double v = square[i] / count - off * off;
        v = v < 0 ? 0 : v; /* NaN stays */
        mean[i] += m;
        variance[i] += v;
        statistics[at] = (float)m;
        statistics[all + at] = (float)v;
        statistics[2 * all + at] = (float)(1 / sqrt(v + eps));
        n->scale[at] = weight[begin + i] * statistics[2 * all + at];
      }
    }
    if (!running_mean) continue;
    const double unbiased = count / (count - 1) / (double)n->splits;
    for (int64_t i = 0; i < width; i++) {
      float *m = running_mean + begin + i, *v = running_variance + begin + i;
      *m = (float)(*m + momentum * (mean[i] / (double)n->splits - *m));
      *v = (float)(*v + momentum * (variance[i] * unbiased - *v));
    }
  }
}

/* Writes the gradients of weight and bias, less and slope. */
static __attribute__((target(AVX512))) void finish_gradients(const struct norm *n,
                                                             const float *statistics,
                                                             float *of_weight, float *of_bias) {
  const float *factors = statistics + 2 * n->splits * n->channels;
  const double count = (double)(n->images / n->splits * n->pixels);
  double sum[BLOCK], product[BLOCK], weights[BLOCK], biases[BLOCK];
  for (int64_t begin = 0; begin < n->channels; begin += BLOCK) {
    const int64_t left = n->channels - begin, width = left < BLOCK ? left : BLOCK;
    memset(weights, 0, sizeof weights);
    memset(biases, 0, sizeof biases);
    for (int64_t s = 0; s < n->splits; s++) {
      combine(n, s, begin, width, sum, product);
      for (int64_t i = 0; i < width; i++) {
        const int64_t at = s * n->channels + begin + i;
        const double factor = factors[at];
        weights[i] += product[i] * factor;
        biases[i] += sum[i];
        n->less[at] = (float)(sum[i] / count);
        n->slope[at] = (float)(product[i] * factor * factor / count);
      }
    }
    for (int64_t i = 0; i < width; i++) {
      of_weight[begin + i] = (float)weights[i];
      of_bias[begin + i] = (float)biases[i];
    }
  }
}
#endif

#if X86
static void on_threads(struct norm *n, void (*function)(void *), parallel *run) {
  n->next = 0;
  if (n->parts == 1)
    function(n);
  else
    run(function, n, (unsigned)n->parts, 0);
}
#endif

/* Returns whether this CPU normalises float32 (0) or bfloat16 (1). */
EXPORT int batch_norm_runs(int bfloat16) {
  return has_avx512(bfloat16);
}

/* Normalises. cpu_ghost_bn.py says what the arguments are. */
EXPORT void batch_norm_forward(int bfloat16, int64_t images, int64_t pixels, int64_t channels,
                               int64_t splits, int64_t group_images, int64_t groups,
                               const void *x, const void *residual, void *result, int relu,
                               const float *weight, const float *bias, double eps,
                               float *statistics, double momentum, float *running_mean,
                               float *running_variance, float *scratch, int64_t parts,
                               parallel *run) {
#if X86
  const int64_t all = splits * channels;
  struct norm n = {.images = images, .pixels = pixels, .channels = channels, .splits = splits,
                   .group_images = group_images, .groups = groups, .x = x, .residual = residual,
                   .result = result, .bias = bias, .mean = statistics, .scale = scratch,
                   .sums = scratch + all, .relu = relu, .bfloat16 = bfloat16, .parts = parts};
  for (int64_t s = 0; s < splits; s++)
    (bfloat16 ? bfloat16_write_start : float32_write_start)(&n, s, statistics + s * channels);
  on_threads(&n, sum_all, run);
  finish_statistics(&n, weight, eps, statistics, momentum, running_mean, running_variance);
  on_threads(&n, normalise_all, run);
#endif
}

/* Computes the gradients. */
EXPORT void batch_norm_backward(int bfloat16, int64_t images, int64_t pixels, int64_t channels,
                                int64_t splits, int64_t group_images, int64_t groups,
                                const void *x, const void *output, const void *gradient,
                                void *result, void *of_residual, int relu, const float *weight,
                                const float *bias, const float *statistics, float *of_weight,
                                float *of_bias, float *scratch, int64_t parts, parallel *run) {
#if X86
  const int64_t all = splits * channels;
  struct norm n = {.images = images, .pixels = pixels, .channels = channels, .splits = splits,
                   .group_images = group_images, .groups = groups, .x = x, .output = output,
                   .gradient = gradient, .result = result, .of_residual = of_residual,
                   .bias = bias, .mean = statistics, .scale = scratch, .less = scratch + all,
                   .slope = scratch + 2 * all, .sums = scratch + 3 * all, .relu = relu,
                   .bfloat16 = bfloat16, .parts = parts};
  for (int64_t at = 0; at < all; at++)
    n.scale[at] = weight[at % channels] * statistics[2 * all + at];
  on_threads(&n, sum_all, run);
  finish_gradients(&n, statistics, of_weight, of_bias);
  on_threads(&n, differentiate_all, run);
#endif
}
