/* The operators of photometric.c. The file is included once for every set of instructions.
 *
 * NAME(x): gives a function the name of its set.
 * FUSED: 1 where PyTorch's operators round a product and a sum once (fused multiply-add).
 *
 * A plane is (H, W) float32 with integers from 0 to `top`. Every function computes what the
 * function of the same name in view_ops.py computes, in the same order of roundings.
 */

#if FUSED
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

static inline float NAME(minimum)(float a, float b) { return a < b ? a : b; }
static inline float NAME(maximum)(float a, float b) { return a > b ? a : b; }
/* Values are never negative: to cut the fraction is to round down. */
static inline float NAME(floor)(float x) { return (float)(int32_t)x; }
/* Rounds half to even: the sum has no bits for a fraction. */
static inline float NAME(round)(float x) { return (x + 12582912.f) - 12582912.f; }

static inline float NAME(luma)(float r, float g, float b) {
  float sum = MULTIPLY_ADD(b, LUMA_B, MULTIPLY_ADD(g, LUMA_G, r * LUMA_R));
  return NAME(floor)(sum + 0.5f);
}

static inline float NAME(blend)(float x, float other, float factor, float top) {
  float mixed = (x - other) * factor + other;
  return NAME(floor)(NAME(minimum)(NAME(maximum)(mixed, 0.f), top));
}

static void NAME(brightness)(float *x, int64_t count, float factor, float top) {
  for (int64_t i = 0; i < count; i++) x[i] = NAME(floor)(NAME(minimum)(x[i] * factor, top));
}

/* Returns the mean of a plane, rounded. */
static float NAME(mean)(const struct images *images, const float *plane) {
  int64_t count = pixels_of(images);
  if ((double)images->top * count > 16777216.) /* PyTorch rounds the sums, in an order of its own */
    return NAME(floor)(images->mean(plane, images->height, images->width) + 0.5f);
  int32_t sum = 0;
  for (int64_t i = 0; i < count; i++) sum += (int32_t)plane[i];
  return NAME(floor)((float)sum / (float)count + 0.5f);
}

static void NAME(contrast_plane)(const struct images *images, float *x, float mean, float factor) {
  int64_t count = pixels_of(images);
  float top = (float)images->top;
  for (int64_t i = 0; i < count; i++) x[i] = NAME(blend)(x[i], mean, factor, top);
}

static void NAME(contrast)(const struct images *images, float *x, float *scratch, float factor) {
  int64_t count = pixels_of(images);
  if (images->channels != 3) {
    for (int c = 0; c < images->channels; c++)
      NAME(contrast_plane)(images, x + c * count, NAME(mean)(images, x + c * count), factor);
    return;
  }
  const float *r = x, *g = x + count, *b = x + 2 * count;
  for (int64_t i = 0; i < count; i++) scratch[i] = NAME(luma)(r[i], g[i], b[i]);
  float mean = NAME(mean)(images, scratch);
  for (int c = 0; c < 3; c++) NAME(contrast_plane)(images, x + c * count, mean, factor);
}

static void NAME(saturation)(float *restrict r, float *restrict g, float *restrict b,
                             int64_t count, float factor, float top) {
  for (int64_t i = 0; i < count; i++) {
    float gray = NAME(luma)(r[i], g[i], b[i]);
    r[i] = NAME(blend)(r[i], gray, factor, top);
    g[i] = NAME(blend)(g[i], gray, factor, top);
    b[i] = NAME(blend)(b[i], gray, factor, top);
  }
}

/* Returns the value of a channel, not rounded. offset: the turn to the pure hue of the channel. */
static inline float NAME(hue_channel)(float hue, float chroma, float base, float offset) {
  float near = fabsf(fabsf(MULTIPLY_ADD(chroma, offset, hue)) - 3 * chroma);
  return NAME(minimum)(NAME(maximum)(near, chroma), 2 * chroma) + base;
}

static void NAME(hue)(float *restrict r, float *restrict g, float *restrict b, int64_t count,
                      float shift) {
  static const float pure[3] = {0, 2, -2};
  float offset[3];
  for (int c = 0; c < 3; c++) {
    float turn = fmodf(shift * 6 - pure[c] + 3, 6);
    offset[c] = (turn < 0 ? turn + 6 : turn) - 3;
  }
  float to_r = offset[0], to_g = offset[1], to_b = offset[2];
  for (int64_t i = 0; i < count; i++) {
    float low = NAME(minimum)(g[i], b[i]), smallest = NAME(minimum)(low, r[i]);
    float largest = NAME(maximum)(NAME(maximum)(g[i], b[i]), r[i]);
    float chroma = largest - smallest, difference = g[i] - b[i];
    float hue = copysignf(fabsf(difference) + largest - r[i] + 2 * (low - smallest), difference);
    float base = smallest - chroma;
    r[i] = NAME(round)(NAME(hue_channel)(hue, chroma, base, to_r));
    g[i] = NAME(round)(NAME(hue_channel)(hue, chroma, base, to_g));
    b[i] = NAME(round)(NAME(hue_channel)(hue, chroma, base, to_b));
  }
}

static void NAME(grayscale)(float *restrict r, float *restrict g, float *restrict b,
                            int64_t count) {
  for (int64_t i = 0; i < count; i++) r[i] = g[i] = b[i] = NAME(luma)(r[i], g[i], b[i]);
}

/* Computes a row or a column of boxes.
 * from: the first pixel of the first box. step: from a pixel of a box to the next pixel. */
static inline void NAME(box)(float *restrict to, const float *restrict from, int count,
                             int64_t step, int reach, float inner, float outer) {
  if (reach == 1) {
    for (int x = 0; x < count; x++)
      to[x] =
          NAME(round)(MULTIPLY_ADD(from[x + step], inner, (from[x] + from[x + 2 * step]) * outer));
  } else if (reach == 2) {
    for (int x = 0; x < count; x++) {
      float body = from[x + step] + from[x + 2 * step] + from[x + 3 * step];
      to[x] = NAME(round)(MULTIPLY_ADD(body, inner, (from[x] + from[x + 4 * step]) * outer));
    }
  } else {
    for (int x = 0; x < count; x++) {
      float body = from[x + step];
      for (int i = 2; i < 2 * reach; i++) body += from[x + i * step];
      float ends = from[x] + from[x + 2 * reach * step];
      to[x] = NAME(round)(MULTIPLY_ADD(body, inner, ends * outer));
    }
  }
}

/* Blurs a plane: three boxes along rows, then three along columns.
 * scratch: 2 W (H + 2 reach) floats. */
static void NAME(blur)(float *plane, int height, int width, float radius, int reach,
                       float *scratch) {
  float inner = 1 / (2 * radius + 1), outer = (1 - (float)(2 * reach - 1) * inner) / 2;
  int64_t wide = width + 2 * (int64_t)reach, tall = height + 2 * (int64_t)reach;
  size_t row = sizeof(float) * width;
  float *from = scratch, *to = scratch + wide;
  for (int y = 0; y < height; y++) {
    memcpy(from + reach, plane + (int64_t)y * width, row);
    for (int pass = 0; pass < 3; pass++) {
      for (int i = 0; i < reach; i++) {
        from[i] = from[reach];
        from[reach + width + i] = from[reach + width - 1];
      }
      float *out = pass < 2 ? to + reach : plane + (int64_t)y * width;
      NAME(box)(out, from, width, 1, reach, inner, outer);
      float *swap = from;
      from = to;
      to = swap;
    }
  }
  from = scratch, to = scratch + tall * width;
  memcpy(from + (int64_t)reach * width, plane, row * height);
  for (int pass = 0; pass < 3; pass++) {
    for (int i = 0; i < reach; i++) {
      memcpy(from + (int64_t)i * width, from + (int64_t)reach * width, row);
      memcpy(from + (int64_t)(reach + height + i) * width,
             from + (int64_t)(reach + height - 1) * width, row);
    }
    float *out = pass < 2 ? to + (int64_t)reach * width : plane;
    for (int64_t y = 0; y < height; y++)
      NAME(box)(out + y * width, from + y * width, width, width, reach, inner, outer);
    float *swap = from;
    from = to;
    to = swap;
  }
}

/* Inverts the upper half of the levels. */
static void NAME(solarize)(float *x, int64_t count, float top) {
  float half = (top + 1) / 2;
  for (int64_t i = 0; i < count; i++) x[i] = x[i] < half ? x[i] : top - x[i];
}

static void NAME(chain)(const struct images *images, float *x, float *scratch, const float *view) {
  int64_t count = pixels_of(images), values = count * images->channels;
  float top = (float)images->top, *r = x, *g = x + count, *b = x + 2 * count;
  int is_colour = images->channels == 3, gray = view[GRAY] != 0 && is_colour;
  if (gray && images->gray_first) NAME(grayscale)(r, g, b, count);
  for (int slot = 0; slot < 4; slot++) {
    int operator = (int)view[ORDER + slot];
    if (operator == 0) NAME(brightness)(x, values, view[BRIGHTNESS], top);
    if (operator == 1) NAME(contrast)(images, x, scratch, view[CONTRAST]);
    if (operator == 2 && is_colour) NAME(saturation)(r, g, b, count, view[SATURATION], top);
    if (operator == 3 && is_colour) NAME(hue)(r, g, b, count, view[HUE]);
  }
  if (gray && !images->gray_first) NAME(grayscale)(r, g, b, count);
  for (int c = 0; c < images->channels && view[REACH] > 0; c++)
    NAME(blur)(x + c * count, images->height, images->width, view[RADIUS], (int)view[REACH],
               scratch);
  if (view[SOLARIZE]) NAME(solarize)(x, values, top);
}

/* Copies an image, (H, W, C), to planes, (C, H, W) float32. */
static void NAME(load)(const struct images *images, const void *image, float *planes) {
  int64_t count = pixels_of(images);
  int channels = images->channels;
  const uint8_t *bytes = image;
  const uint16_t *words = image;
  if (channels == 3) {
    float *restrict r = planes, *restrict g = planes + count, *restrict b = planes + 2 * count;
    if (images->top == 255)
      for (int64_t i = 0; i < count; i++) {
        r[i] = bytes[3 * i];
        g[i] = bytes[3 * i + 1];
        b[i] = bytes[3 * i + 2];
      }
    else
      for (int64_t i = 0; i < count; i++) {
        r[i] = words[3 * i];
        g[i] = words[3 * i + 1];
        b[i] = words[3 * i + 2];
      }
    return;
  }
  for (int c = 0; c < channels; c++, planes += count) {
    if (images->top == 255)
      for (int64_t i = 0; i < count; i++) planes[i] = bytes[i * channels + c];
    else
      for (int64_t i = 0; i < count; i++) planes[i] = words[i * channels + c];
  }
}

/* Copies a row of three planes to a row of an image. step: from a pixel to the next. */
static inline void NAME(store_bytes)(uint8_t *restrict out, const float *restrict r,
                                     const float *restrict g, const float *restrict b, int width,
                                     int64_t step) {
  for (int x = 0; x < width; x++, out += 3) {
    out[0] = (uint8_t)(int32_t)r[x * step];
    out[1] = (uint8_t)(int32_t)g[x * step];
    out[2] = (uint8_t)(int32_t)b[x * step];
  }
}

static inline void NAME(store_words)(uint16_t *restrict out, const float *restrict r,
                                     const float *restrict g, const float *restrict b, int width,
                                     int64_t step) {
  for (int x = 0; x < width; x++, out += 3) {
    out[0] = (uint16_t)(int32_t)r[x * step];
    out[1] = (uint16_t)(int32_t)g[x * step];
    out[2] = (uint16_t)(int32_t)b[x * step];
  }
}

/* Exchanges left and right of a row. buffer: `width` floats. */
static void NAME(mirror)(float *restrict row, float *restrict buffer, int width) {
  memcpy(buffer, row, sizeof(float) * width);
  for (int x = 0; x < width; x++) row[x] = buffer[width - 1 - x];
}

/* Copies planes to an image, flipped and turned. flip, vertical_flip: 0 or 1. turns: 0 unless
 * images are square. buffer: W floats. */
static void NAME(store)(const struct images *images, float *planes, void *image, int flip,
                  int vertical_flip, int turns, float *buffer) {
  int height = images->height, width = images->width, channels = images->channels;
  int64_t count = pixels_of(images), last = width - 1;
  /* The place of the pixel (0, 0), and the steps to the next row and the next column, after the
   * flips. */
  int64_t row = vertical_flip ? -width : width, column = flip ? -1 : 1;
  int64_t start = (vertical_flip ? (height - 1) * (int64_t)width : 0) + (flip ? last : 0);
  for (; turns > 0; turns--) { /* counter-clockwise: the last column becomes the first row */
    int64_t old_row = row;
    start += last * column;
    row = -column;
    column = old_row;
  }
  for (int y = 0; y < height; y++) {
    float *from = planes + start + y * row;
    if (channels == 3) {
      int64_t at = 3 * (int64_t)y * width;
      if (column == -1) { /* a compiler makes no vector instructions of steps backwards and of 3 */
        from -= last;
        for (int c = 0; c < 3; c++) NAME(mirror)(from + c * count, buffer, width);
      }
      const float *g = from + count, *b = from + 2 * count;
      int straight = column == 1 || column == -1;
      if (images->top == 255 && straight)
        NAME(store_bytes)((uint8_t *)image + at, from, g, b, width, 1);
      else if (images->top == 255)
        NAME(store_bytes)((uint8_t *)image + at, from, g, b, width, column);
      else if (straight)
        NAME(store_words)((uint16_t *)image + at, from, g, b, width, 1);
      else
        NAME(store_words)((uint16_t *)image + at, from, g, b, width, column);
      continue;
    }
    for (int c = 0; c < channels; c++, from += count) {
      int64_t at = (int64_t)y * width * channels + c;
      if (images->top == 255)
        for (int x = 0; x < width; x++)
          ((uint8_t *)image)[at + (int64_t)x * channels] = (uint8_t)(int32_t)from[x * column];
      else
        for (int x = 0; x < width; x++)
          ((uint16_t *)image)[at + (int64_t)x * channels] = (uint16_t)(int32_t)from[x * column];
    }
  }
}

#include "rotation_body.h"
#include "late_body.h"

#undef MULTIPLY_ADD
#undef NAME
#undef FUSED
