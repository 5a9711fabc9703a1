/* The operators of view_ops.py on a CPU, compiled.
 *
 * photometric.py loads this library by ctypes, which holds no lock of Python during a call. The
 * library needs no header of Python.
 *
 * Views equal the views of PyTorch's operators to the bit. Hence the options of the compiler:
 *   -ffp-contract=off   needed. The compiler must not join a product and a sum. PyTorch joins
 *                       some, where a CPU can: MULTIPLY_ADD in photometric_body.h names every
 *                       such place.
 *   -fno-trapping-math, -fno-math-errno   exact, and 15% faster.
 * Other parts of -ffast-math: -fassociative-math changes nearly every view, because the compiler
 * removes the two sums of `round`. -ffinite-math-only, -freciprocal-math and -fno-signed-zeros
 * changed no view and gained nothing: minima, maxima and roundings are written so that the loops
 * become vector instructions without these options.
 *
 * A set of instructions is chosen at run time: the file is compiled for plain CPUs, no
 * -march option, and holds the same functions for AVX2 beside. AVX-512 gains 4% (docs/log.md).
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "compilers.h"

/* Weights of red, green and blue: view_ops.LUMA. */
#define LUMA_R (19595.f / 65536)
#define LUMA_G (38470.f / 65536)
#define LUMA_B (7471.f / 65536)

/* The floats that describe a view. photometric.py writes the same order. */
enum {
  ORDER, /* four operators: 0 brightness, 1 contrast, 2 saturation, 3 hue, or -1 for none */
  BRIGHTNESS = 4,
  CONTRAST,
  SATURATION,
  HUE,
  GRAY,
  RADIUS,
  REACH,
  SOLARIZE,
  FLIP,
  VERTICAL_FLIP,
  TURNS,
  FIELDS
};

/* Returns the mean of a plane, (height, width) float32, as PyTorch sums it. */
typedef float (*mean_function)(const float *plane, int height, int width);

struct images {
  int height, width; /* H, W */
  int channels;      /* C */
  int top;           /* the largest level: 255 or 65535 */
  int gray_first;
  mean_function mean;
};

/* The operators with numbers from the key of a view, in their order. The numbers of a view are, one
 * after the other: factors of brightness and of contrast for C channels, a map of colours (9 and 3,
 * stains.colour_map), and the deviation of the noise. */
struct late {
  int channel_jitter;      /* 0 or 1 */
  const float *logarithms; /* of every level (stains.logarithms), or NULL: no jitter of stains */
  int noise;               /* 0 or 1 */
};

/* Returns the pixels of an image. */
static inline int64_t pixels_of(const struct images *images) {
  return (int64_t)images->height * images->width;
}

#define FUSED 0
#define NAME(x) plain_##x
#include "photometric_body.h"

#define FUSED 1
#define NAME(x) fused_##x
#include "photometric_body.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define X86 1
#include "avx2_begin.h"
#define FUSED 1
#define NAME(x) avx2_##x
#include "photometric_body.h"
#include "avx2_end.h"
#endif

typedef void (*load_function)(const struct images *, const void *, float *);
typedef void (*rotate_function)(const struct images *, const void *, const float *, float *,
                                float *);
typedef void (*chain_function)(const struct images *, float *, float *, const float *);
typedef void (*late_function)(const struct images *, const struct late *, void *, const float *,
                              uint32_t, float *);
typedef void (*store_function)(const struct images *, float *, void *, int, int, int, float *);

struct variant {
  load_function load;
  rotate_function rotate;
  chain_function chain;
  late_function late;
  store_function store;
};

/* The numbers are those of library.VARIANTS. */
static const struct variant variants[] = {
    {plain_load, plain_rotate, plain_chain, plain_late, plain_store},
    {fused_load, fused_rotate, fused_chain, fused_late, fused_store},
#ifdef X86
    {avx2_load, avx2_rotate, avx2_chain, avx2_late, avx2_store},
#endif
};

/* Returns 1 where this CPU has the instructions of a variant. */
EXPORT int photometric_runs(int variant) {
  if (variant < 2) return variant >= 0;
#ifdef X86
  if (variant == 2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return 0;
}

/* Makes n views, without the operators of `photometric_late`.
 *
 * in: n images, (H, W, C), uint8 for a top of 255, uint16 for a top of 65535.
 * out: (n, H, W, C) of the same type. The images of `in` may lie there, in the same order.
 * views: n times FIELDS floats.
 * places: for every view the places of rotation_body.h, or 0 for a view that is not turned.
 * scratch: C H W floats, and behind them the more of 2 W (H + 2 R), R the largest reach, and, if a
 *   view is turned, C H W + W + 1.
 * mean: for sums beyond 2^24, which float32 does not hold. */
EXPORT void photometric_early(int variant, const void *const *in, void *out, int64_t n, int height,
                              int width, int channels, int top, const float *views, int gray_first,
                              const float *const *places, float *scratch, mean_function mean) {
  struct images images = {height, width, channels, top, gray_first, mean};
  const struct variant *chosen = &variants[variant];
  int64_t count = pixels_of(&images) * channels, bytes = count * (top == 255 ? 1 : 2);
  for (int64_t i = 0; i < n; i++, views += FIELDS) {
    if (places[i])
      chosen->rotate(&images, in[i], places[i], scratch, scratch + count);
    else
      chosen->load(&images, in[i], scratch);
    chosen->chain(&images, scratch, scratch + count, views);
    chosen->store(&images, scratch, (char *)out + i * bytes, views[FLIP] != 0,
                  views[VERTICAL_FLIP] != 0, (int)views[TURNS], scratch + count);
  }
}

/* Changes n views, (n, H, W, C), in place.
 *
 * channel_jitter, logarithms, noise: as in `struct late`. Jitter of stains needs three channels.
 * numbers: n times `fields` floats, as `struct late` says.
 * keys: of n views.
 * scratch: C H W + W floats. */
EXPORT void photometric_late(int variant, void *views, int64_t n, int height, int width,
                             int channels, int top, int channel_jitter, const float *logarithms,
                             int noise, const float *numbers, int64_t fields, const uint32_t *keys,
                             float *scratch, mean_function mean) {
  struct images images = {height, width, channels, top, 0, mean};
  struct late late = {channel_jitter, logarithms, noise};
  int64_t bytes = pixels_of(&images) * channels * (top == 255 ? 1 : 2);
  for (int64_t i = 0; i < n; i++, numbers += fields)
    variants[variant].late(&images, &late, (char *)views + i * bytes, numbers, keys[i], scratch);
}

/* The linker of Windows wants this name in a library that setuptools builds. Not called. */
EXPORT void *PyInit__photometric(void) { return 0; }
