/* The rows and columns of resize.c with AVX2. Four rows of a crop are resized in one go. */

/* Sums 8 channels, from channel `first` on, of every pixel of 4 rows of words. */
static void rows_of_8_words(const struct crop *crop, const struct axis *axis,
                            const float *const *from, float *const *to, int first) {
  int channels = crop->channels;
  for (int x = 0; x < crop->wide; x++) {
    const float *weights = axis->floats + (int64_t)x * axis->most;
    int64_t at = (int64_t)axis->start[x] * channels + first;
    int taps = axis->count[x], apart = APART(taps), j = 1;
    __m256 sum[ROWS], weight = _mm256_broadcast_ss(weights);
    for (int r = 0; r < ROWS; r++) sum[r] = _mm256_mul_ps(_mm256_loadu_ps(from[r] + at), weight);
    for (; j < apart; j++) {
      at += channels, weight = _mm256_broadcast_ss(weights + j);
      for (int r = 0; r < ROWS; r++)
        sum[r] = _mm256_add_ps(sum[r], _mm256_mul_ps(_mm256_loadu_ps(from[r] + at), weight));
    }
    for (; j < taps; j++) {
      at += channels, weight = _mm256_broadcast_ss(weights + j);
      for (int r = 0; r < ROWS; r++)
        sum[r] = _mm256_fmadd_ps(_mm256_loadu_ps(from[r] + at), weight, sum[r]);
    }
    for (int r = 0; r < ROWS; r++) _mm256_storeu_ps(to[r] + (int64_t)x * channels + first, sum[r]);
  }
}

/* The same for 4 channels. Of fewer channels the rest is overwritten by the next pixel. */
static void rows_of_4_words(const struct crop *crop, const struct axis *axis,
                            const float *const *from, float *const *to, int first) {
  int channels = crop->channels;
  for (int x = 0; x < crop->wide; x++) {
    const float *weights = axis->floats + (int64_t)x * axis->most;
    int64_t at = (int64_t)axis->start[x] * channels + first;
    int taps = axis->count[x], apart = APART(taps), j = 1;
    __m128 sum[ROWS], weight = _mm_broadcast_ss(weights);
    for (int r = 0; r < ROWS; r++) sum[r] = _mm_mul_ps(_mm_loadu_ps(from[r] + at), weight);
    for (; j < apart; j++) {
      at += channels, weight = _mm_broadcast_ss(weights + j);
      for (int r = 0; r < ROWS; r++)
        sum[r] = _mm_add_ps(sum[r], _mm_mul_ps(_mm_loadu_ps(from[r] + at), weight));
    }
    for (; j < taps; j++) {
      at += channels, weight = _mm_broadcast_ss(weights + j);
      for (int r = 0; r < ROWS; r++)
        sum[r] = _mm_fmadd_ps(_mm_loadu_ps(from[r] + at), weight, sum[r]);
    }
    for (int r = 0; r < ROWS; r++) _mm_storeu_ps(to[r] + (int64_t)x * channels + first, sum[r]);
  }
}

/* Some channels at the end of a pixel are summed twice. */
static void avx2_rows_of_words(const struct crop *crop, const struct axis *axis,
                               const float *const *from, float *const *to) {
  int channels = crop->channels, first = 0;
  for (; first + 8 <= channels; first += 8) rows_of_8_words(crop, axis, from, to, first);
  if (first == channels) return;
  if (channels > 8) {
    rows_of_8_words(crop, axis, from, to, channels - 8);
    return;
  }
  rows_of_4_words(crop, axis, from, to, 0);
  if (channels > 4) rows_of_4_words(crop, axis, from, to, channels - 4);
}

/* Makes a row of the view, 32 words in one go. */
static void avx2_column_of_words(const struct axis *axis, int y, const float *const *rows,
                                 uint16_t *restrict to, int count) {
  const float *weights = axis->floats + (int64_t)y * axis->most;
  int taps = axis->count[y], apart = APART(taps);
  for (int first = 0; first < count; first += 32) {
    __m256 sum[4], weight = _mm256_broadcast_ss(weights);
    int j = 1;
    for (int i = 0; i < 4; i++)
      sum[i] = _mm256_mul_ps(_mm256_loadu_ps(rows[0] + first + 8 * i), weight);
    for (; j < apart; j++) {
      weight = _mm256_broadcast_ss(weights + j);
      for (int i = 0; i < 4; i++)
        sum[i] = _mm256_add_ps(
            sum[i], _mm256_mul_ps(_mm256_loadu_ps(rows[j] + first + 8 * i), weight));
    }
    for (; j < taps; j++) {
      weight = _mm256_broadcast_ss(weights + j);
      for (int i = 0; i < 4; i++)
        sum[i] = _mm256_fmadd_ps(_mm256_loadu_ps(rows[j] + first + 8 * i), weight, sum[i]);
    }
    uint16_t rest[32], *made = count - first >= 32 ? to + first : rest;
    for (int i = 0; i < 4; i += 2) {
      /* Rounds half to even, and clips to 0..65535. */
      __m256i words = _mm256_packus_epi32(_mm256_cvtps_epi32(sum[i]),
                                          _mm256_cvtps_epi32(sum[i + 1]));
      _mm256_storeu_si256((__m256i *)(made + 8 * i), _mm256_permute4x64_epi64(words, 0xd8));
    }
    if (made == rest) memcpy(to + first, rest, sizeof(uint16_t) * (count - first));
  }
}

/* Returns two weights in every 32 bits. */
static inline __m256i two_weights(const int16_t *weights) {
  int32_t both;
  memcpy(&both, weights, sizeof(both));
  return _mm256_set1_epi32(both);
}

/* Returns 16 bytes of each of two rows. */
static inline __m256i two_rows(const uint8_t *low, const uint8_t *high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                                 _mm_loadu_si128((const __m128i *)high), 1);
}

/* Resizes 4 rows of up to 4 channels. 16 bytes hold 4 taps. Two taps and two weights make one
 * product. */
static void rows_of_few_bytes(const struct crop *crop, const struct axis *axis,
                              const uint8_t *const *from, uint8_t *const *to) {
  const __m256i half = _mm256_set1_epi32(1 << (axis->bits - 1));
  const __m128i bits = _mm_cvtsi32_si128(axis->bits);
  int channels = crop->channels;
  int8_t places[2][16];
  memset(places, -1, sizeof(places));
  for (int c = 0; c < channels; c++)
    for (int tap = 0; tap < 4; tap++)
      places[tap / 2][4 * c + 2 * (tap % 2)] = (int8_t)(tap * channels + c);
  /* Bytes of taps 0 and 1 side by side, as words, then of taps 2 and 3. */
  const __m256i low = two_rows((uint8_t *)places[0], (uint8_t *)places[0]);
  const __m256i high = two_rows((uint8_t *)places[1], (uint8_t *)places[1]);
  for (int x = 0; x < crop->wide; x++) {
    const int16_t *weights = axis->words + (int64_t)x * axis->most;
    int64_t at = (int64_t)axis->start[x] * channels;
    __m256i a = half, b = half;
    for (int tap = 0; tap < axis->taps; tap += 4, at += 4 * channels) {
      __m256i above = two_rows(from[0] + at, from[1] + at);
      __m256i below = two_rows(from[2] + at, from[3] + at);
      __m256i weight = two_weights(weights + tap);
      a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_shuffle_epi8(above, low), weight));
      b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_shuffle_epi8(below, low), weight));
      if (tap + 2 >= axis->taps) break;
      weight = two_weights(weights + tap + 2);
      a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_shuffle_epi8(above, high), weight));
      b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_shuffle_epi8(below, high), weight));
    }
    a = _mm256_packs_epi32(_mm256_sra_epi32(a, bits), _mm256_sra_epi32(b, bits));
    a = _mm256_packus_epi16(a, a);
    /* Bytes of the rows 0 and 2, then of 1 and 3. Of fewer than 4 channels the rest is overwritten
     * by the next pixel. */
    int32_t made[ROWS] = {_mm256_extract_epi32(a, 0), _mm256_extract_epi32(a, 4),
                          _mm256_extract_epi32(a, 1), _mm256_extract_epi32(a, 5)};
    for (int r = 0; r < ROWS; r++) memcpy(to[r] + x * channels, &made[r], 4);
  }
}

/* Makes a row of the view, 32 bytes in one go. rows: one more than taps. */
static void avx2_column_of_bytes(const struct axis *axis, int y, const uint8_t *const *rows,
                                 uint8_t *restrict to, int count) {
  const int16_t *weights = axis->words + (int64_t)y * axis->most;
  const __m256i zero = _mm256_setzero_si256();
  const __m256i half = _mm256_set1_epi32(1 << (axis->bits - 1));
  const __m128i bits = _mm_cvtsi32_si128(axis->bits);
  for (int first = 0; first < count; first += 32) {
    __m256i sum[4] = {half, half, half, half};
    for (int tap = 0; tap < axis->count[y]; tap += 2) {
      __m256i weight = two_weights(weights + tap);
      __m256i a = _mm256_loadu_si256((const __m256i *)(rows[tap] + first));
      __m256i b = _mm256_loadu_si256((const __m256i *)(rows[tap + 1] + first));
      __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
      __m256i pairs[4] = {_mm256_unpacklo_epi8(low, zero), _mm256_unpackhi_epi8(low, zero),
                          _mm256_unpacklo_epi8(high, zero), _mm256_unpackhi_epi8(high, zero)};
      for (int i = 0; i < 4; i++)
        sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs[i], weight));
    }
    for (int i = 0; i < 4; i++) sum[i] = _mm256_sra_epi32(sum[i], bits);
    /* Packing undoes the order of unpacking. */
    __m256i made = _mm256_packus_epi16(_mm256_packs_epi32(sum[0], sum[1]),
                                       _mm256_packs_epi32(sum[2], sum[3]));
    uint8_t rest[32];
    _mm256_storeu_si256((__m256i *)(count - first >= 32 ? to + first : rest), made);
    if (count - first < 32) memcpy(to + first, rest, count - first);
  }
}
