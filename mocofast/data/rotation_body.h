/* The rotation of rotation.py. photometric_body.h includes this file and says what NAME and
 * MULTIPLY_ADD are.
 *
 * Sums and products are rounded as in PyTorch's `grid_sample`, bilinear with borders.
 */

#ifndef TURNED
#define TURNED 128 /* pixels of a row that are turned in one go */
/* A byte of a word. Vector instructions make floats of signed numbers only. */
#define BYTE(word, shift) ((float)(int32_t)((word) >> (shift) & 255))
#endif

/* Where some pixels of a row come from. */
struct NAME(sources) {
  int32_t at[TURNED]; /* the upper left of four pixels */
  float weight[4][TURNED]; /* of upper left, upper right, lower left, lower right. 0 outside */
};

/* Returns the place in pixels. place: from -1 to 1. half: half of the pixels. */
static inline float NAME(position)(float place, float half, float last) {
  float position = MULTIPLY_ADD(place + 1, half, -0.5f);
  return NAME(minimum)(NAME(maximum)(position, 0.f), last);
}

/* Finds the sources of `count` pixels of a row. across, down: parts of the columns of the places.
 * row_across, row_down: parts of the row. */
static inline void NAME(find_sources)(struct NAME(sources) *restrict sources,
                                      const struct images *images, const float *across,
                                      const float *down, float row_across, float row_down,
                                      int count) {
  int width = images->width;
  float half_width = (float)width / 2, half_height = (float)images->height / 2;
  float last_x = (float)(width - 1), last_y = (float)(images->height - 1);
  for (int i = 0; i < count; i++) {
    float place_x = across[i] + row_across, place_y = down[i] + row_down;
    float x = NAME(position)(place_x, half_width, last_x);
    float y = NAME(position)(place_y, half_height, last_y);
    float left = NAME(floor)(x), upper = NAME(floor)(y);
    float to_left = x - left, to_right = 1 - to_left, to_upper = y - upper, to_lower = 1 - to_upper;
    int inside = (place_x >= -1) & (place_x < 1) & (place_y >= -1) & (place_y < 1);
    to_upper = inside ? to_upper : 0;
    to_lower = inside ? to_lower : 0;
    sources->at[i] = (int32_t)upper * width + (int32_t)left;
    sources->weight[0][i] = to_lower * to_right;
    sources->weight[1][i] = to_lower * to_left;
    sources->weight[2][i] = to_upper * to_right;
    sources->weight[3][i] = to_upper * to_left;
  }
}

/* Returns pixel i of the row from the values of its four sources. */
static inline float NAME(mix)(const struct NAME(sources) *sources, int i, float upper_left,
                              float upper_right, float lower_left, float lower_right) {
  float sum = upper_left * sources->weight[0][i];
  sum = MULTIPLY_ADD(upper_right, sources->weight[1][i], sum);
  sum = MULTIPLY_ADD(lower_left, sources->weight[2][i], sum);
  sum = MULTIPLY_ADD(lower_right, sources->weight[3][i], sum);
  return NAME(floor)(sum + 1.f / 1024); /* rotation.py says why */
}

/* Mixes pixels of 8 bits and three channels. from: words of red, green and blue. */
static inline void NAME(mix_rgb)(const struct NAME(sources) *restrict sources,
                                 const uint32_t *restrict from, float *restrict r,
                                 float *restrict g, float *restrict b, int count, int width) {
  for (int i = 0; i < count; i++) {
    int32_t at = sources->at[i];
    uint32_t p = from[at], q = from[at + 1], u = from[at + width], v = from[at + width + 1];
    r[i] = NAME(mix)(sources, i, BYTE(p, 0), BYTE(q, 0), BYTE(u, 0), BYTE(v, 0));
    g[i] = NAME(mix)(sources, i, BYTE(p, 8), BYTE(q, 8), BYTE(u, 8), BYTE(v, 8));
    b[i] = NAME(mix)(sources, i, BYTE(p, 16), BYTE(q, 16), BYTE(u, 16), BYTE(v, 16));
  }
}

/* Mixes pixels of a channel. from: words of a value and the next one. */
static inline void NAME(mix_plane)(const struct NAME(sources) *restrict sources,
                                   const uint32_t *restrict from, float *restrict to, int count,
                                   int width) {
  for (int i = 0; i < count; i++) {
    uint32_t upper = from[sources->at[i]], lower = from[sources->at[i] + width];
    to[i] = NAME(mix)(sources, i, (float)(int32_t)(upper & 65535), (float)(int32_t)(upper >> 16),
                      (float)(int32_t)(lower & 65535), (float)(int32_t)(lower >> 16));
  }
}

/* Packs three bytes of every pixel, or two neighbours of a channel, into a word. planes: memory for
 * an image. */
static void NAME(pack)(const struct images *images, const void *image, float *restrict planes,
                       uint32_t *restrict words) {
  int64_t count = pixels_of(images), last = count * images->channels - 1;
  const uint8_t *bytes = image;
  if (images->top == 255 && images->channels == 3) {
    for (int64_t i = 0; i < count; i++)
      words[i] = bytes[3 * i] | bytes[3 * i + 1] << 8 | bytes[3 * i + 2] << 16;
    return;
  }
  NAME(load)(images, image, planes);
  for (int64_t i = 0; i < last; i++)
    words[i] = (uint32_t)(int32_t)planes[i] | (uint32_t)(int32_t)planes[i + 1] << 16;
  words[last] = (uint32_t)(int32_t)planes[last];
}

/* Copies an image, (H, W, C), to planes, (C, H, W) float32, turned.
 *
 * places: parts of the columns across and down, 2 W, and of the rows, 2 H.
 * scratch: C H W + W + 1 floats. The right and lower sources of pixels at an edge lie in the next
 * row or behind the image: whatever number is there has the weight 0. */
static void NAME(rotate)(const struct images *images, const void *image, const float *places,
                         float *planes, float *scratch) {
  int height = images->height, width = images->width, channels = images->channels;
  int64_t count = pixels_of(images);
  int is_rgb = images->top == 255 && channels == 3;
  const float *across = places, *down = places + width;
  const float *row_across = places + 2 * (int64_t)width, *row_down = row_across + height;
  uint32_t *words = (uint32_t *)scratch;
  struct NAME(sources) sources;
  NAME(pack)(images, image, planes, words);
  for (int y = 0; y < height; y++) {
    for (int x = 0; x < width; x += TURNED) {
      int size = width - x < TURNED ? width - x : TURNED;
      float *to = planes + (int64_t)y * width + x;
      NAME(find_sources)(&sources, images, across + x, down + x, row_across[y], row_down[y], size);
      if (is_rgb)
        NAME(mix_rgb)(&sources, words, to, to + count, to + 2 * count, size, width);
      else
        for (int c = 0; c < channels; c++)
          NAME(mix_plane)(&sources, words + c * count, to + c * count, size, width);
    }
  }
}
