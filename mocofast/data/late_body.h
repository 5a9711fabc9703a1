/* Jitter of channels, jitter of stains, and noise: the operators with numbers from the key of a
 * view. photometric_body.h includes this file, and its NAME(x) and MULTIPLY_ADD hold here.
 *
 * Every function computes what the function of the same name in view_ops.py, stains.py or
 * random_numbers.py computes, in the same order of roundings, with the same coefficients.
 */

/* Brightness, then contrast. factor: C factors of brightness and C factors of contrast. */
static void NAME(channel_jitter)(const struct images *images, float *x, const float *factor) {
  int64_t count = pixels_of(images);
  for (int c = 0; c < images->channels; c++, x += count, factor++) {
    NAME(brightness)(x, count, factor[0], (float)images->top);
    float mean = NAME(mean)(images, x);
    NAME(contrast_plane)(images, x, mean, factor[images->channels]);
  }
}

/* Returns 2^x, for x from -30 to 0. */
static inline float NAME(power_of_two)(float x) {
  float whole = x + 12582912.f, f = x - (whole - 12582912.f);
  float power = f * 0.0013264727f;
  power = (power + 0.0096715128f) * f;
  power = (power + 0.055507337f) * f;
  power = (power + 0.24022242f) * f;
  power = (power + 0.693147f) * f + 1.f;
  uint32_t bits, places;
  memcpy(&bits, &power, 4);
  memcpy(&places, &whole, 4);
  bits += places << 23;
  memcpy(&power, &bits, 4);
  return power;
}

/* Copies the logarithms of an image, (H, W, 3), to planes. logarithms: of every level. */
static void NAME(load_logarithms)(const struct images *images, const void *image,
                                  const float *logarithms, float *planes) {
  int64_t count = pixels_of(images);
  const uint8_t *bytes = image;
  const uint16_t *words = image;
  float *r = planes, *g = planes + count, *b = planes + 2 * count;
  if (images->top == 255)
    for (int64_t i = 0; i < count; i++) {
      r[i] = logarithms[bytes[3 * i]];
      g[i] = logarithms[bytes[3 * i + 1]];
      b[i] = logarithms[bytes[3 * i + 2]];
    }
  else
    for (int64_t i = 0; i < count; i++) {
      r[i] = logarithms[words[3 * i]];
      g[i] = logarithms[words[3 * i + 1]];
      b[i] = logarithms[words[3 * i + 2]];
    }
}

/* Jitters the stains of red, green and blue, logarithms that become levels.
 * map: a matrix, (3, 3), and a shift, (3,). */
static void NAME(jitter_stains)(float *restrict r, float *restrict g, float *restrict b,
                                int64_t count, const float *map, float top) {
  for (int64_t i = 0; i < count; i++) {
    float from_r = r[i], from_g = g[i], from_b = b[i], to[3];
    for (int c = 0; c < 3; c++) {
      float sum = MULTIPLY_ADD(from_g, map[3 * c + 1], from_r * map[3 * c]);
      sum = MULTIPLY_ADD(from_b, map[3 * c + 2], sum) + map[9 + c];
      float power = NAME(power_of_two)(NAME(minimum)(NAME(maximum)(sum, -30.f), 0.f));
      to[c] = NAME(round)(power * top);
    }
    r[i] = to[0], g[i] = to[1], b[i] = to[2];
  }
}

static inline uint32_t NAME(hash_word)(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

/* Returns sin(2 pi x) / x of y = x^2, for x from -1/4 to 1/4. */
static inline float NAME(sine)(float y) {
  float sine = (y * 39.710918f + -76.574989f) * y;
  sine = (sine + 81.60223f) * y;
  return (sine + -41.341676f) * y + 6.283185f;
}

/* Computes two normal numbers from two words of 32 bits. */
static inline void NAME(normal_numbers)(uint32_t first, uint32_t second, float *one,
                                        float *other) {
  float v = (float)(16777216 - (int32_t)(first >> 8));
  uint32_t bits;
  memcpy(&bits, &v, 4);
  int32_t exponent = (int32_t)((bits - 0x3F3504F3u) >> 23);
  bits -= (uint32_t)exponent << 23;
  memcpy(&v, &bits, 4);
  float s = (v - 1.f) / (v - 1.f + 2.f), z = s * s;
  float log = ((z * 0.82592744f + 1.3330445f) * z + 4.0000005f) * s;
  float square = NAME(maximum)((float)(24 - exponent) * 1.3862944f - log, 1e-30f);
  float radius = 1.f / sqrtf(square) * square;
  float turns = (float)((int32_t)second >> 8) * (1.f / 16777216);
  float c = 0.25f - fabsf(turns), d = copysignf(0.25f - fabsf(c), turns);
  *one = c * NAME(sine)(c * c) * radius;
  *other = d * NAME(sine)(d * d) * radius;
}

static inline float NAME(with_noise)(float x, float normal, float sigma, float top) {
  float sum = NAME(round)(MULTIPLY_ADD(normal, sigma, x));
  return NAME(minimum)(NAME(maximum)(sum, 0.f), top);
}

/* Adds the two normal numbers of a place to a value of `lower` and a value of `upper`. */
static void NAME(noise_pairs)(float *restrict lower, float *restrict upper, int64_t pairs,
                              uint32_t first, uint32_t second, float sigma, float top) {
  for (int64_t i = 0; i < pairs; i++) {
    uint32_t place = (uint32_t)i;
    float one, other;
    NAME(normal_numbers)(NAME(hash_word)(first ^ place), NAME(hash_word)(second ^ place), &one,
                         &other);
    lower[i] = NAME(with_noise)(lower[i], one, sigma, top);
    upper[i] = NAME(with_noise)(upper[i], other, sigma, top);
  }
}

/* Adds normal numbers of the deviation sigma to values. */
static void NAME(noise)(float *x, int64_t count, uint32_t key, float sigma, float top) {
  uint32_t first = NAME(hash_word)(key + 2), second = NAME(hash_word)(key + 3);
  int64_t half = (count + 1) / 2, pairs = count / 2;
  NAME(noise_pairs)(x, x + half, pairs, first, second, sigma, top);
  if (pairs == half) return;
  uint32_t place = (uint32_t)pairs;
  float one, other; /* the last value has no pair */
  NAME(normal_numbers)(NAME(hash_word)(first ^ place), NAME(hash_word)(second ^ place), &one,
                       &other);
  x[pairs] = NAME(with_noise)(x[pairs], one, sigma, top);
}

/* Changes a view, (H, W, C), in place. planes: C H W + W floats. */
static void NAME(late)(const struct images *images, const struct late *late, void *view,
                       const float *numbers, uint32_t key, float *planes) {
  int64_t count = pixels_of(images), values = count * images->channels;
  float top = (float)images->top, *buffer = planes + values;
  if (late->channel_jitter || !late->logarithms) NAME(load)(images, view, planes);
  if (late->channel_jitter) {
    NAME(channel_jitter)(images, planes, numbers);
    numbers += 2 * images->channels;
  }
  if (late->logarithms) {
    if (late->channel_jitter) NAME(store)(images, planes, view, 0, 0, 0, buffer);
    NAME(load_logarithms)(images, view, late->logarithms, planes);
    NAME(jitter_stains)(planes, planes + count, planes + 2 * count, count, numbers, top);
    numbers += 12;
  }
  if (late->noise) NAME(noise)(planes, values, key, *numbers, top);
  NAME(store)(images, planes, view, 0, 0, 0, buffer);
}
