/* The two passes of resize.c. The file is included once for every set of instructions.
 *
 * NAME(x): gives a function the name of its set.
 * FUSED: 1 where PyTorch's operators round a product and a sum once (fused multiply-add).
 * VECTORS: 1 where resize_avx2.h has made the functions for rows and columns.
 */

#if FUSED
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

#if !VECTORS
/* Resizes ROWS rows of words. from: rows of floats. to: rows of the ring. */
static void NAME(rows_of_words)(const struct crop *crop, const struct axis *axis,
                                const float *const *from, float *const *to) {
  int channels = crop->channels;
  for (int r = 0; r < ROWS; r++) {
    for (int x = 0; x < crop->wide; x++) {
      const float *weights = axis->floats + (int64_t)x * axis->most;
      int taps = axis->count[x], apart = APART(taps);
      for (int c = 0; c < channels; c++) {
        const float *tap = from[r] + (int64_t)axis->start[x] * channels + c;
        float sum = tap[0] * weights[0];
        for (int j = 1; j < apart; j++) sum += tap[j * channels] * weights[j];
        for (int j = apart; j < taps; j++)
          sum = MULTIPLY_ADD(tap[j * channels], weights[j], sum);
        to[r][(int64_t)x * channels + c] = sum;
      }
    }
  }
}

/* Makes a row of the view, of `count` values, from rows of the ring. */
static void NAME(column_of_words)(const struct axis *axis, int y, const float *const *rows,
                                  uint16_t *restrict to, int count) {
  const float *weights = axis->floats + (int64_t)y * axis->most;
  int taps = axis->count[y], apart = APART(taps);
  for (int i = 0; i < count; i++) {
    float sum = rows[0][i] * weights[0];
    for (int j = 1; j < apart; j++) sum += rows[j][i] * weights[j];
    for (int j = apart; j < taps; j++) sum = MULTIPLY_ADD(rows[j][i], weights[j], sum);
    sum = (sum + 12582912.f) - 12582912.f; /* half to even, as in photometric.c */
    sum = sum < 65535.f ? sum : 65535.f;
    to[i] = (uint16_t)(int32_t)(sum > 0.f ? sum : 0.f);
  }
}
#endif

/* Resizes ROWS rows of bytes. from: rows of the crop. to: rows of the ring. */
static void NAME(rows_of_bytes)(const struct crop *crop, const struct axis *axis,
                                const uint8_t *const *from, uint8_t *const *to) {
  int channels = crop->channels;
#if VECTORS
  if (channels <= 4) {
    rows_of_few_bytes(crop, axis, from, to);
    return;
  }
#endif
  for (int r = 0; r < ROWS; r++) {
    for (int x = 0; x < crop->wide; x++) {
      const int16_t *weights = axis->words + (int64_t)x * axis->most;
      for (int c = 0; c < channels; c++) {
        const uint8_t *tap = from[r] + (int64_t)axis->start[x] * channels + c;
        int32_t sum = 1 << (axis->bits - 1);
        for (int j = 0; j < axis->count[x]; j++) sum += tap[j * channels] * weights[j];
        to[r][(int64_t)x * channels + c] = clipped(sum, axis->bits);
      }
    }
  }
}

#if !VECTORS
static void NAME(column_of_bytes)(const struct axis *axis, int y, const uint8_t *const *rows,
                                  uint8_t *restrict to, int count) {
  const int16_t *weights = axis->words + (int64_t)y * axis->most;
  for (int i = 0; i < count; i++) {
    int32_t sum = 1 << (axis->bits - 1);
    for (int j = 0; j < axis->count[y]; j++) sum += rows[j][i] * weights[j];
    to[i] = clipped(sum, axis->bits);
  }
}
#endif

/* Resizes a crop of words. Returns 0 where there is not enough memory. */
static int NAME(resize_words)(const struct crop *crop, const struct axis *across,
                              const struct axis *down, uint16_t *out) {
  int values = crop->width * crop->channels, made = crop->wide * crop->channels, ready = 0;
  int size = down->taps + ROWS; /* rows of the ring */
  size_t row = made + PAD, wide = values + (size_t)across->most * crop->channels + PAD;
  float *ring = calloc(row * size + ROWS * wide, sizeof(float));
  const float **rows = malloc(sizeof(float *) * size);
  if (ring && rows) {
    for (int y = 0; y < crop->tall; y++) {
      int start = down->start[y], stop = start + down->count[y];
      for (; ready < stop; ready += ROWS) {
        const float *from[ROWS];
        float *to[ROWS];
        for (int r = 0; r < ROWS; r++) {
          float *copy = ring + row * size + r * wide;
          const uint16_t *pixels = (const uint16_t *)row_of(crop, ready + r);
          for (int i = 0; i < values; i++) copy[i] = pixels[i];
          from[r] = copy;
          to[r] = ring + row * ((ready + r) % size);
        }
        NAME(rows_of_words)(crop, across, from, to);
      }
      for (int j = 0; j < down->count[y]; j++) rows[j] = ring + row * ((start + j) % size);
      int64_t at = crop->upside_down ? crop->tall - 1 - y : y;
      NAME(column_of_words)(down, y, rows, out + at * made, made);
    }
  }
  int done = ring && rows;
  free(ring);
  free(rows);
  return done;
}

/* Resizes a crop of bytes. Returns 0 where there is not enough memory. */
static int NAME(resize_bytes)(const struct crop *crop, const struct axis *across,
                              const struct axis *down, uint8_t *out) {
  int values = crop->width * crop->channels, made = crop->wide * crop->channels, ready = 0;
  int size = down->taps + ROWS;
  size_t passed = (size_t)across->most * crop->channels + PAD; /* read behind a row at most */
  size_t row = made + PAD, wide = values + passed;
  uint8_t *ring = calloc(row * size + ROWS * wide, 1);
  const uint8_t **rows = malloc(sizeof(uint8_t *) * size);
  if (ring && rows) {
    for (int y = 0; y < crop->tall; y++) {
      int start = down->start[y], stop = start + down->count[y];
      for (; ready < stop; ready += ROWS) {
        const uint8_t *from[ROWS];
        uint8_t *to[ROWS];
        for (int r = 0; r < ROWS; r++) {
          from[r] = (const uint8_t *)row_of(crop, ready + r);
          /* Only bytes up to the end of the crop may be read. */
          int64_t below = (int64_t)(crop->height - 1 - ready - r) * crop->row;
          if (crop->row < values || below < (int64_t)passed)
            from[r] = memcpy(ring + row * size + r * wide, from[r], values);
          to[r] = ring + row * ((ready + r) % size);
        }
        NAME(rows_of_bytes)(crop, across, from, to);
      }
      /* One more than the taps: the weight behind the last tap is 0. */
      for (int j = 0; j <= down->count[y]; j++) rows[j] = ring + row * ((start + j) % size);
      int64_t at = crop->upside_down ? crop->tall - 1 - y : y;
      NAME(column_of_bytes)(down, y, rows, out + at * made, made);
    }
  }
  int done = ring && rows;
  free(ring);
  free(rows);
  return done;
}

#undef MULTIPLY_ADD
#undef NAME
#undef FUSED
#undef VECTORS
