/* The functions of batch_norm.c for one type of elements. Before the inclusion define
 *
 *   NAME(x)  the name of a function of this type
 *   TARGET   the attribute of functions that use the instructions
 *   element  the type of an element
 *   LOAD(from, mask)        elements in float32, 0 outside of the mask
 *   STORE(to, mask, value)  stores float32 as elements
 */

/* Returns the middle one of three pixels of a split: about the mean, and no outlier. */
INLINE TARGET __m512 NAME(start_of)(const struct norm *n, int64_t split, int64_t c,
                                    __mmask16 mask) {
  const int64_t area = n->pixels * n->channels, last = n->images - n->splits + split;
  const element *x = (const element *)n->x + c;
  const __m512 a = LOAD(x + split * area, mask);
  const __m512 b = LOAD(x + last * area + area - n->channels, mask);
  const __m512 middle = LOAD(x + split * area + n->pixels / 2 * n->channels, mask);
  const __m512 low = _mm512_min_ps(a, b), high = _mm512_max_ps(a, b);
  return _mm512_max_ps(low, _mm512_min_ps(high, middle));
}

/* Adds x - start and (x - start)^2 of some pixels to the sums of a group, for some channels. */
INLINE TARGET void NAME(add_statistics)(const struct norm *n, const struct tile *t, int64_t c,
                                        const int vectors, const int full) {
  float *sums = t->sums + c, *squares = sums + n->channels;
  __m512 sum[VECTORS], square[VECTORS], start[VECTORS];
  __mmask16 mask[VECTORS];
  UNROLL for (int v = 0; v < vectors; v++) {
    mask[v] = full ? 0xffff : lanes(n->channels - c - v * LANES);
    sum[v] = _mm512_maskz_loadu_ps(mask[v], sums + v * LANES);
    square[v] = _mm512_maskz_loadu_ps(mask[v], squares + v * LANES);
    start[v] = _mm512_maskz_loadu_ps(mask[v], n->mean + t->split + c + v * LANES);
  }
  const element *x = (const element *)n->x + t->at + c;
  for (int64_t p = 0; p < t->pixels; p++, x += n->channels) {
    FETCH(x + t->ahead, vectors);
    UNROLL for (int v = 0; v < vectors; v++) {
      const __m512 d = _mm512_sub_ps(LOAD(x + v * LANES, mask[v]), start[v]);
      sum[v] = _mm512_add_ps(sum[v], d);
      square[v] = _mm512_fmadd_ps(d, d, square[v]);
    }
  }
  UNROLL for (int v = 0; v < vectors; v++) {
    _mm512_mask_storeu_ps(sums + v * LANES, mask[v], sum[v]);
    _mm512_mask_storeu_ps(squares + v * LANES, mask[v], square[v]);
  }
}

/* Adds the gradient and the gradient x (x - mean) of some pixels to the sums of a group. Writes
 * the rectified gradient for the residual, if there is one. */
INLINE TARGET void NAME(add_gradients)(const struct norm *n, const struct tile *t, int64_t c,
                                       const int residual, const int relu, const int vectors,
                                       const int full) {
  float *sums = t->sums + c, *products = sums + n->channels;
  __m512 sum[VECTORS], product[VECTORS], mean[VECTORS], scale[VECTORS], bias[VECTORS];
  __mmask16 mask[VECTORS];
  UNROLL for (int v = 0; v < vectors; v++) {
    mask[v] = full ? 0xffff : lanes(n->channels - c - v * LANES);
    sum[v] = _mm512_maskz_loadu_ps(mask[v], sums + v * LANES);
    product[v] = _mm512_maskz_loadu_ps(mask[v], products + v * LANES);
    mean[v] = _mm512_maskz_loadu_ps(mask[v], n->mean + t->split + c + v * LANES);
    scale[v] = _mm512_maskz_loadu_ps(mask[v], n->scale + t->split + c + v * LANES);
    bias[v] = _mm512_maskz_loadu_ps(mask[v], n->bias + c + v * LANES);
  }
  const element *x = (const element *)n->x + t->at + c;
  const element *gradients = (const element *)n->gradient + t->at + c;
  const element *output = (const element *)n->output + t->at + c;
  element *of_residual = (element *)n->of_residual + t->at + c;
  for (int64_t p = 0; p < t->pixels; p++) {
    FETCH(x + t->ahead, vectors);
    FETCH(gradients + t->ahead, vectors);
    if (residual) FETCH(output + t->ahead, vectors);
    UNROLL for (int v = 0; v < vectors; v++) {
      const __m512 d = _mm512_sub_ps(LOAD(x + v * LANES, mask[v]), mean[v]);
      __m512 gradient = LOAD(gradients + v * LANES, mask[v]);
      if (relu) {
        const __m512 y = residual ? LOAD(output + v * LANES, mask[v])
                                  : _mm512_fmadd_ps(d, scale[v], bias[v]);
        gradient = _mm512_maskz_mov_ps(positive(y), gradient);
      }
      if (residual) STORE(of_residual + v * LANES, mask[v], gradient);
      sum[v] = _mm512_add_ps(sum[v], gradient);
      product[v] = _mm512_fmadd_ps(gradient, d, product[v]);
    }
    x += n->channels;
    gradients += n->channels;
    output += n->channels;
    of_residual += n->channels;
  }
  UNROLL for (int v = 0; v < vectors; v++) {
    _mm512_mask_storeu_ps(sums + v * LANES, mask[v], sum[v]);
    _mm512_mask_storeu_ps(products + v * LANES, mask[v], product[v]);
  }
}

/* Writes the results of some pixels: (x - mean) scale + bias, plus the residual, rectified. */
INLINE TARGET void NAME(write_results)(const struct norm *n, const struct tile *t, int64_t c,
                                       const int residual, const int relu, const int vectors,
                                       const int full) {
  __m512 mean[VECTORS], scale[VECTORS], bias[VECTORS];
  __mmask16 mask[VECTORS];
  UNROLL for (int v = 0; v < vectors; v++) {
    mask[v] = full ? 0xffff : lanes(n->channels - c - v * LANES);
    mean[v] = _mm512_maskz_loadu_ps(mask[v], n->mean + t->split + c + v * LANES);
    scale[v] = _mm512_maskz_loadu_ps(mask[v], n->scale + t->split + c + v * LANES);
    bias[v] = _mm512_maskz_loadu_ps(mask[v], n->bias + c + v * LANES);
  }
  const element *x = (const element *)n->x + t->at + c;
  const element *more = (const element *)n->residual + t->at + c;
  element *result = (element *)n->result + t->at + c;
  for (int64_t p = 0; p < t->pixels; p++) {
    FETCH(x + t->ahead, vectors);
    if (residual) FETCH(more + t->ahead, vectors);
    UNROLL for (int v = 0; v < vectors; v++) {
      const __m512 d = _mm512_sub_ps(LOAD(x + v * LANES, mask[v]), mean[v]);
      __m512 value = _mm512_fmadd_ps(d, scale[v], bias[v]);
      if (residual) value = _mm512_add_ps(value, LOAD(more + v * LANES, mask[v]));
      if (relu) value = _mm512_max_ps(_mm512_setzero_ps(), value); /* NaN stays */
      STORE(result + v * LANES, mask[v], value);
    }
    x += n->channels;
    more += n->channels;
    result += n->channels;
  }
}

/* Writes the gradients of x of some pixels. */
INLINE TARGET void NAME(write_gradients)(const struct norm *n, const struct tile *t, int64_t c,
                                         const int relu, const int vectors, const int full) {
  __m512 mean[VECTORS], scale[VECTORS], bias[VECTORS], less[VECTORS], slope[VECTORS];
  __mmask16 mask[VECTORS];
  UNROLL for (int v = 0; v < vectors; v++) {
    mask[v] = full ? 0xffff : lanes(n->channels - c - v * LANES);
    mean[v] = _mm512_maskz_loadu_ps(mask[v], n->mean + t->split + c + v * LANES);
    scale[v] = _mm512_maskz_loadu_ps(mask[v], n->scale + t->split + c + v * LANES);
    bias[v] = _mm512_maskz_loadu_ps(mask[v], n->bias + c + v * LANES);
    less[v] = _mm512_maskz_loadu_ps(mask[v], n->less + t->split + c + v * LANES);
    slope[v] = _mm512_maskz_loadu_ps(mask[v], n->slope + t->split + c + v * LANES);
  }
  const element *x = (const element *)n->x + t->at + c;
  const element *gradients = (const element *)n->gradient + t->at + c;
  element *result = (element *)n->result + t->at + c;
  for (int64_t p = 0; p < t->pixels; p++) {
    FETCH(x + t->ahead, vectors);
    FETCH(gradients + t->ahead, vectors);
    UNROLL for (int v = 0; v < vectors; v++) {
      const __m512 d = _mm512_sub_ps(LOAD(x + v * LANES, mask[v]), mean[v]);
      __m512 gradient = LOAD(gradients + v * LANES, mask[v]);
      if (relu) {
        const __m512 y = _mm512_fmadd_ps(d, scale[v], bias[v]);
        gradient = _mm512_maskz_mov_ps(positive(y), gradient);
      }
      gradient = _mm512_sub_ps(gradient, less[v]);
      gradient = _mm512_fnmadd_ps(d, slope[v], gradient);
      STORE(result + v * LANES, mask[v], _mm512_mul_ps(gradient, scale[v]));
    }
    x += n->channels;
    gradients += n->channels;
    result += n->channels;
  }
}

INLINE TARGET void NAME(do)(const struct norm *n, const struct tile *t, int64_t c,
                            const enum work work, const int residual, const int relu,
                            const int vectors, const int full) {
  if (work == STATISTICS) NAME(add_statistics)(n, t, c, vectors, full);
  if (work == SUMS_OF_GRADIENTS) NAME(add_gradients)(n, t, c, residual, relu, vectors, full);
  if (work == RESULTS) NAME(write_results)(n, t, c, residual, relu, vectors, full);
  if (work == GRADIENTS) NAME(write_gradients)(n, t, c, relu, vectors, full);
}

/* Does something with the pixels of a group: all channels of a tile, then of the next one. */
INLINE TARGET void NAME(walk)(const struct norm *of, int64_t group, const enum work work,
                              const int residual, const int relu) {
  const struct norm n = *of;
  const int64_t tiles = (n.pixels * n.channels * (int64_t)sizeof(element) + TILE - 1) / TILE;
  const int64_t rows = tiles < n.pixels ? (n.pixels + tiles - 1) / tiles : 1;
  struct tile t = {.split = group / n.groups * n.channels, .ahead = rows * n.channels,
                   .sums = n.sums + group * 2 * n.channels};
  for (int64_t i = first_image(&n, group); i < last_image(&n, group); i += n.splits)
    for (int64_t p = 0; p < n.pixels; p += rows) {
      t.at = (i * n.pixels + p) * n.channels;
      t.pixels = n.pixels - p < rows ? n.pixels - p : rows;
      int64_t c = 0;
      for (; n.channels - c >= VECTORS * LANES; c += VECTORS * LANES)
        NAME(do)(&n, &t, c, work, residual, relu, VECTORS, 1);
      for (; n.channels - c >= LANES; c += LANES)
        NAME(do)(&n, &t, c, work, residual, relu, 1, 1);
      if (c < n.channels) NAME(do)(&n, &t, c, work, residual, relu, 1, 0);
    }
}

static TARGET void NAME(sum)(const struct norm *n, int64_t group) {
  memset(n->sums + group * 2 * n->channels, 0, (size_t)n->channels * 2 * sizeof *n->sums);
  if (!n->gradient)
    NAME(walk)(n, group, STATISTICS, 0, 0);
  else if (n->of_residual)
    NAME(walk)(n, group, SUMS_OF_GRADIENTS, 1, 1);
  else if (n->relu)
    NAME(walk)(n, group, SUMS_OF_GRADIENTS, 0, 1);
  else
    NAME(walk)(n, group, SUMS_OF_GRADIENTS, 0, 0);
}

static TARGET void NAME(normalise)(const struct norm *n, int64_t group) {
  if (n->residual && n->relu)
    NAME(walk)(n, group, RESULTS, 1, 1);
  else if (n->residual)
    NAME(walk)(n, group, RESULTS, 1, 0);
  else if (n->relu)
    NAME(walk)(n, group, RESULTS, 0, 1);
  else
    NAME(walk)(n, group, RESULTS, 0, 0);
}

static TARGET void NAME(differentiate)(const struct norm *n, int64_t group) {
  struct norm rectified = *n;
  if (n->of_residual) rectified.gradient = n->of_residual;
  if (n->relu && !n->of_residual)
    NAME(walk)(n, group, GRADIENTS, 0, 1);
  else
    NAME(walk)(&rectified, group, GRADIENTS, 0, 0);
}

/* Writes the start of a split for all channels. */
static TARGET void NAME(write_start)(const struct norm *n, int64_t split, float *start) {
  for (int64_t c = 0; c < n->channels; c += LANES) {
    const __mmask16 mask = lanes(n->channels - c);
    _mm512_mask_storeu_ps(start + c, mask, NAME(start_of)(n, split, c, mask));
  }
}

#undef NAME
#undef TARGET
#undef element
#undef LOAD
#undef STORE
