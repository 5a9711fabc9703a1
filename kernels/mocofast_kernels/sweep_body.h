/* The sweep over a block of keys with operands of one type. sweep.c includes this file once a type.
 *
 * BF16: 0 or 1. NAME(x): a name for the type. TARGET: instructions that the compiler may use.
 * A word holds a float32, or two neighbouring bfloat16 of a sum.
 */

/* Adds the products of two words to 16 sums. */
INLINE TARGET __m512 NAME(add_product)(__m512 sum, __m512i x, __m512i y) {
#if BF16
  return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
#else
  return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), sum);
#endif
}

/* Computes logits[i][v] += the products of KEYS keys and V vectors of 16 rows.
 * panels: (V, depth, 16) words. keys: (KEYS, depth) words. */
INLINE TARGET void NAME(add_logits)(__m512 logits[KEYS][2], int V, const uint32_t *panels,
                                    const uint32_t *keys, int64_t depth) {
  for (int64_t c = 0; c < depth; c++) {
    __m512i rows[2];
    UNROLL
    for (int v = 0; v < V; v++) rows[v] = _mm512_loadu_si512(panels + (v * depth + c) * LANES);
    UNROLL
    for (int i = 0; i < KEYS; i++) {
      __m512i key = _mm512_set1_epi32((int32_t)keys[i * depth + c]);
      UNROLL
      for (int v = 0; v < V; v++) logits[i][v] = NAME(add_product)(logits[i][v], key, rows[v]);
    }
  }
}

/* Multiplies values[i] by scales[i]. */
INLINE TARGET void NAME(multiply_by)(__m512 values[KEYS][2], int V, const float *scales) {
  UNROLL
  for (int i = 0; i < KEYS; i++)
    UNROLL
    for (int v = 0; v < V; v++)
      values[i][v] = _mm512_mul_ps(values[i][v], _mm512_set1_ps(scales[i]));
}

/* Stores the weights of KEYS keys, the first key at `first` of the tile.
 * weights: (TILE, PANEL) float32, or (TILE / 2, PANEL) pairs of bfloat16. */
INLINE TARGET void NAME(store)(uint32_t *weights, int first, __m512 values[KEYS][2], int V) {
#if BF16
  /* Puts the 16 bits of two halves side by side. */
  const __m512i pairs = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
      3, 18, 2, 17, 1, 16, 0);
  UNROLL
  for (int i = 0; i < KEYS; i += 2)
    UNROLL
    for (int v = 0; v < V; v++) {
      __m512i both = (__m512i)_mm512_cvtne2ps_pbh(values[i + 1][v], values[i][v]);
      _mm512_storeu_si512(weights + (first + i) / 2 * PANEL + v * LANES,
                          _mm512_permutexvar_epi16(pairs, both));
    }
#else
  UNROLL
  for (int i = 0; i < KEYS; i++)
    UNROLL
    for (int v = 0; v < V; v++)
      _mm512_storeu_ps((float *)weights + (first + i) * PANEL + v * LANES, values[i][v]);
#endif
}

/* Computes 1 / max(norm, EPS) of keys, (count, depth) words. */
TARGET static void NAME(scale)(float *scales, const uint32_t *keys, int count, int64_t depth) {
  for (int j = 0; j < count; j++, keys += depth) {
    __m512 sums = _mm512_setzero_ps();
    for (int64_t c = 0; c < depth; c += LANES) {
      __mmask16 lanes = depth - c < LANES ? (__mmask16)((1 << (depth - c)) - 1) : ALL;
      __m512i key = _mm512_maskz_loadu_epi32(lanes, keys + c);
#if BF16
      __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(key, 16));
      sums = _mm512_fmadd_ps(low, low, sums);
      key = _mm512_and_si512(key, _mm512_set1_epi32((int32_t)0xffff0000));
#endif
      __m512 x = _mm512_castsi512_ps(key);
      sums = _mm512_fmadd_ps(x, x, sums);
    }
    float norm = sqrtf(_mm512_reduce_add_ps(sums));
    scales[j] = 1 / (norm < EPS ? EPS : norm);
  }
}

/* Computes the weights of a tile of keys for V vectors of 16 rows, and adds them to the totals.
 * scales: of the keys, or 0. */
INLINE TARGET void NAME(weigh)(const struct sweep *s, int V, int64_t row, int64_t first, int count,
                               const float *scales, uint32_t *weights) {
  const uint32_t *panels = s->panels + row * s->depth;
  __m512 total[2], tie[2];
  __m512i above[2];
  UNROLL
  for (int v = 0; v < V; v++) {
    total[v] = _mm512_setzero_ps();
    above[v] = _mm512_setzero_si512();
    tie[v] = s->tie ? _mm512_loadu_ps(s->tie + row + v * LANES) : total[v];
  }
  for (int j = 0; j < count; j += KEYS) {
    int present = count - j < KEYS ? count - j : KEYS;
    const uint32_t *keys = present < KEYS ? s->last_keys : s->keys + (first + j) * s->depth;
    __m512 values[KEYS][2];
    UNROLL
    for (int i = 0; i < KEYS; i++)
      UNROLL
      for (int v = 0; v < V; v++)
        values[i][v] = _mm512_setzero_ps();
    NAME(add_logits)(values, V, panels, keys, s->depth);
    if (scales) NAME(multiply_by)(values, V, scales + j);
    if (s->tie)
      UNROLL
      for (int i = 0; i < KEYS; i++)
        UNROLL
        for (int v = 0; v < V; v++) {
          __mmask16 reach = _mm512_cmp_ps_mask(values[i][v], tie[v], _CMP_GE_OQ);
          if (i < present) above[v] = _mm512_sub_epi32(above[v], _mm512_movm_epi32(reach));
        }
    UNROLL
    for (int i = 0; i < KEYS; i++)
      UNROLL
      for (int v = 0; v < V; v++) {
        values[i][v] = i < present ? exp2_of(values[i][v]) : _mm512_setzero_ps();
        total[v] = _mm512_add_ps(total[v], values[i][v]);
      }
    if (s->output) {
      if (scales) NAME(multiply_by)(values, V, scales + j);
      NAME(store)(weights, j, values, V);
    }
  }
  UNROLL
  for (int v = 0; v < V; v++) {
    float *totals = s->total + row + v * LANES;
    _mm512_storeu_ps(totals, _mm512_add_ps(_mm512_loadu_ps(totals), total[v]));
    if (s->tie) {
      int32_t *aboves = s->above + row + v * LANES;
      _mm512_storeu_si512(aboves, _mm512_add_epi32(_mm512_loadu_si512(aboves), above[v]));
    }
  }
}

/* Adds weights^T @ values to GROUP rows and V vectors of the output.
 * weights: (count, PANEL) words, from the first of the rows. values: (count, width) words.
 * last: lanes of the last vector. */
INLINE TARGET void NAME(add_values)(float *output, int V, __mmask16 last, const uint32_t *weights,
                                    const uint32_t *values, int count, int64_t width) {
  __m512 sums[GROUP][VECTORS];
  UNROLL
  for (int i = 0; i < GROUP; i++)
    UNROLL
    for (int v = 0; v < V; v++) sums[i][v] = _mm512_setzero_ps();
  for (int j = 0; j < count; j++) {
    __m512i row[VECTORS];
    UNROLL
    for (int v = 0; v < V; v++) {
      const uint32_t *place = values + j * width + v * LANES;
      row[v] = v < V - 1 || last == ALL ? _mm512_loadu_si512(place)
                                        : _mm512_maskz_loadu_epi32(last, place);
    }
    UNROLL
    for (int i = 0; i < GROUP; i++) {
      __m512i weight = _mm512_set1_epi32((int32_t)weights[j * PANEL + i]);
      UNROLL
      for (int v = 0; v < V; v++) sums[i][v] = NAME(add_product)(sums[i][v], weight, row[v]);
    }
  }
  UNROLL
  for (int i = 0; i < GROUP; i++)
    UNROLL
    for (int v = 0; v < V; v++) {
      float *place = output + i * width + v * LANES;
      __mmask16 lanes = v < V - 1 ? ALL : last;
      __m512 before = _mm512_maskz_loadu_ps(lanes, place);
      _mm512_mask_storeu_ps(place, lanes, _mm512_add_ps(before, sums[i][v]));
    }
}

/* Adds weights^T @ values to the output of the rows of a panel. */
TARGET static void NAME(multiply)(const struct sweep *s, int64_t row, const uint32_t *weights,
                                  const uint32_t *values, int count) {
  int64_t width = s->width;
  for (int64_t c = 0; c < width; c += LANES * VECTORS) {
    int64_t left = width - c;
    __mmask16 last = left % LANES ? (__mmask16)((1 << left % LANES) - 1) : ALL;
    for (int r = 0; r < PANEL && row + r < s->rows; r += GROUP) {
      float *output = s->output + (row + r) * width + c;
      if (left >= LANES * VECTORS)
        NAME(add_values)(output, VECTORS, ALL, weights + r, values + c, count, width);
      else if (left > LANES * 3)
        NAME(add_values)(output, 4, last, weights + r, values + c, count, width);
      else if (left > LANES * 2)
        NAME(add_values)(output, 3, last, weights + r, values + c, count, width);
      else if (left > LANES)
        NAME(add_values)(output, 2, last, weights + r, values + c, count, width);
      else
        NAME(add_values)(output, 1, last, weights + r, values + c, count, width);
    }
  }
}

#if BF16
/* Puts the numbers of two keys side by side. keys: (count, width) bfloat16.
 * pairs: (count / 2 rounded up, width). */
TARGET static void NAME(pair)(uint32_t *pairs, const uint16_t *keys, int count, int64_t width) {
  for (int j = 0; j < count; j += 2)
    for (int64_t c = 0; c < width; c += LANES) {
      int64_t left = width - c;
      __mmask16 lanes = left < LANES ? (__mmask16)((1 << left) - 1) : ALL;
      const uint16_t *place = keys + j * width + c;
      __mmask16 second = j + 1 < count ? lanes : 0;
      __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, place));
      __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, place + width));
      _mm512_mask_storeu_epi32(pairs + j / 2 * width + c, lanes,
                               _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}
#endif

TARGET static void NAME(sweep)(struct sweep *s) {
  uint32_t weights[TILE * PANEL];
  float scales[TILE] = {0};
  uint32_t *spare = s->scratch;
  int64_t whole = s->count / KEYS * KEYS;
  memset(spare, 0, sizeof(*spare) * (size_t)(KEYS * s->depth));
  memcpy(spare, s->keys + whole * s->depth,
         sizeof(*spare) * (size_t)((s->count - whole) * s->depth));
  s->last_keys = spare;
  for (int64_t first = 0; first < s->count; first += TILE) {
    int count = s->count - first < TILE ? (int)(s->count - first) : TILE;
    const uint32_t *keys = s->keys + first * s->depth, *values = keys;
    const float *scaled = s->normalize ? scales : 0;
    if (scaled) NAME(scale)(scales, keys, count, s->depth);
#if BF16
    uint32_t *pairs = spare + KEYS * s->depth;
    if (s->output) NAME(pair)(pairs, (const uint16_t *)keys, count, s->width);
    values = pairs;
#endif
    for (int64_t row = 0; row < s->rows; row += PANEL) {
      if (s->rows - row > LANES)
        NAME(weigh)(s, 2, row, first, count, scaled, weights);
      else
        NAME(weigh)(s, 1, row, first, count, scaled, weights);
      if (s->output) NAME(multiply)(s, row, weights, values, BF16 ? (count + 1) / 2 : count);
    }
  }
}

#undef TILE
#undef BF16
#undef NAME
#undef TARGET
