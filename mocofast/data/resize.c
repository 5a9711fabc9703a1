/* The antialiased bilinear resize of crops on a CPU, compiled: `resize.resized_crops`.
 *
 * resize.py loads this library by ctypes, which holds no lock of Python during a call.
 *
 * Crops equal those of PyTorch's operator to the bit. PyTorch resizes rows, then columns. Bytes:
 * weights of 16 bits, sums of 32 bits, and bytes between the two passes. Words: float32 weights,
 * sums and values, rounded at the end. photometric.c says which options of the compiler keep the
 * results exact, and what a variant is.
 *
 * Rows are resized when a column needs them, into a ring of as many rows as a column takes.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "compilers.h"

#define ROWS 4 /* rows that are resized in one go */
#define PAD 64 /* values behind a row that may be read and written */

/* PyTorch's loop over the taps of a word is compiled to groups of 4 after the first tap. A group
 * rounds products and sums apart, and the rest together where the CPU can. This is the first tap
 * of the rest. */
#define APART(taps) (1 + ((taps)-1) / 4 * 4)

/* A crop: rows of `width` pixels of `channels` values, uint8 or uint16. */
struct crop {
  const char *pixels; /* the first pixel */
  int64_t row;        /* bytes from a row to the next */
  int height, width, channels;
  int tall, wide; /* pixels of the view */
  int upside_down;
};

/* Where the pixels of an axis come from. Weights behind the taps of a pixel are 0. */
struct axis {
  int most; /* weights of a pixel: a multiple of 4 */
  int taps; /* the most taps of a pixel */
  int bits; /* of the fraction of `words` */
  int32_t *start, *count;
  float *floats;  /* for words */
  int16_t *words; /* for bytes */
};

#define REAL float
#define WEIGHTS weights_float
#include "resize_weights.h"

#define REAL double
#define WEIGHTS weights_double
#include "resize_weights.h"

static int multiple_of_4(int count) { return (count + 3) / 4 * 4; }

static int most_taps(int size, int side) {
  double scale = (double)size / side;
  return multiple_of_4(2 * (int)ceil(scale > 1 ? scale : 1) + 1);
}

/* Turns exact weights into 16 bits, with as many bits as the largest weight allows. */
static void set_words(struct axis *axis, const double *exact, int side) {
  int count = side * axis->most;
  double largest = 0;
  for (int i = 0; i < count; i++) largest = exact[i] > largest ? exact[i] : largest;
  axis->bits = 0;
  while (axis->bits < 22 && (int)(0.5 + largest * (1 << (axis->bits + 1))) < 1 << 15) axis->bits++;
  for (int i = 0; i < count; i++)
    axis->words[i] = (int16_t)(0.5 + exact[i] * (1 << axis->bits));
}

/* Allocates and sets an axis. Returns 0 without memory. `free(axis->start)` frees all. */
static int set_axis(struct axis *axis, int size, int side, int top) {
  axis->most = most_taps(size, side);
  size_t weights = (size_t)side * axis->most;
  char *memory = malloc(2 * sizeof(int32_t) * side + weights * (sizeof(double) + sizeof(int16_t)));
  if (!memory) return 0;
  axis->start = (int32_t *)memory;
  axis->count = axis->start + side;
  axis->floats = (float *)(axis->count + side);
  axis->words = (int16_t *)((double *)(axis->count + side) + weights);
  if (top != 255) {
    axis->taps = weights_float(axis, axis->floats, size, side);
    return 1;
  }
  axis->taps = weights_double(axis, (double *)axis->floats, size, side);
  set_words(axis, (double *)axis->floats, side);
  return 1;
}

static inline uint8_t clipped(int32_t sum, int bits) {
  sum >>= bits;
  return (uint8_t)(sum < 255 ? sum : 255);
}

/* Exchanges left and right: the pixels of an axis in reverse order. */
static void reverse(struct axis *axis, int side, int top) {
  size_t size = axis->most * (top == 255 ? sizeof(int16_t) : sizeof(float));
  char *weights = top == 255 ? (char *)axis->words : (char *)axis->floats;
  for (int low = 0, high = side - 1; low < high; low++, high--) {
    int32_t start = axis->start[low], count = axis->count[low];
    axis->start[low] = axis->start[high], axis->count[low] = axis->count[high];
    axis->start[high] = start, axis->count[high] = count;
    for (size_t i = 0; i < size; i++) {
      char swap = weights[low * size + i];
      weights[low * size + i] = weights[high * size + i];
      weights[high * size + i] = swap;
    }
  }
}

/* Returns a row of a crop, or the last row for numbers behind it. */
static inline const char *row_of(const struct crop *crop, int y) {
  return crop->pixels + (y < crop->height ? y : crop->height - 1) * crop->row;
}

#define FUSED 0
#define VECTORS 0
#define NAME(x) plain_##x
#include "resize_body.h"

#define FUSED 1
#define VECTORS 0
#define NAME(x) fused_##x
#include "resize_body.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define X86 1
#include <immintrin.h>
#include "avx2_begin.h"
#include "resize_avx2.h"
#define FUSED 1
#define VECTORS 1
#define NAME(x) avx2_##x
#include "resize_body.h"
#include "avx2_end.h"
#endif

typedef int (*bytes_function)(const struct crop *, const struct axis *, const struct axis *,
                              uint8_t *);
typedef int (*words_function)(const struct crop *, const struct axis *, const struct axis *,
                              uint16_t *);

struct variant {
  bytes_function bytes;
  words_function words;
};

/* The numbers are those of library.VARIANTS. */
static const struct variant variants[] = {
    {plain_resize_bytes, plain_resize_words},
    {fused_resize_bytes, fused_resize_words},
#ifdef X86
    {avx2_resize_bytes, avx2_resize_words},
#endif
};

/* Resizes n crops, and flips them.
 *
 * pixels: the first pixel of every crop. rows: bytes from a row to the next, for every crop.
 * heights, widths: of the crops. The channels of a pixel, and the pixels of a row, lie side by
 * side.
 * flips: two bytes for every crop: 1 exchanges left and right, and top and bottom.
 * tall, wide: pixels of a view.
 * out: (n, tall, wide, C), uint8 for a top of 255, uint16 for a top of 65535.
 * Returns 1, or 0 where there is not enough memory. */
EXPORT int resize_make(int variant, int64_t n, const void *const *pixels, const int64_t *rows,
                       const int64_t *heights, const int64_t *widths, const uint8_t *flips,
                       int tall, int wide, int channels, int top, void *out) {
  int64_t values = (int64_t)tall * wide * channels;
  for (int64_t i = 0; i < n; i++) {
    struct crop crop = {pixels[i], rows[i], (int)heights[i], (int)widths[i],
                        channels,  tall,    wide,            flips[2 * i + 1]};
    struct axis across = {0}, down = {0};
    int done = set_axis(&across, crop.width, wide, top) && set_axis(&down, crop.height, tall, top);
    if (done && flips[2 * i]) reverse(&across, wide, top);
    if (done && top == 255)
      done = variants[variant].bytes(&crop, &across, &down, (uint8_t *)out + i * values);
    else if (done)
      done = variants[variant].words(&crop, &across, &down, (uint16_t *)out + i * values);
    free(across.start);
    free(down.start);
    if (!done) return 0;
  }
  return 1;
}
