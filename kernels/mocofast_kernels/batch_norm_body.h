/* The functions of batch_norm.c for one type of elements. Before the inclusion define
 *
 *   NAME(x)  the name of a function of this type
 *   TARGET   the attribute of functions that use the instructions
 *   element  the type of an element
 *   LOAD(from, mask)        elements in float32, 0 outside of the mask
 *   STORE(to, mask, value)  stores float32 as elements
 */

/* Returns the middle one of three pixels of a split: about the mean, and no outlier. */
INLINE TARGET __m512 NAME(start_of)(const struct norm *n, int64_t split, int64_t c, __mmask16 mask) {
  const int64_t area = n->pixels * n->channels, last = n->images - n->splits + split;
  const element *x = (const element *)n->x + c;
  const __m512 a = LOAD(x + split * area, mask);
  const __m512 b = LOAD(x + last * area + area - n->channels, mask);
  const __m512 middle = LOAD(x + split * area + n->pixels / 2 * n->channels, mask);
  const __m512 low = _mm512_min_ps(a, b), high = _mm512_max_ps(a, b);
  return _mm512_max_ps(low, _mm512_min_ps(high, middle));
}

/* Sums x - start and (x - start)^2 over the pixels of a group, for some channels. */
INLINE TARGET void NAME(statistics_of)(const struct norm *n, int64_t group, float *sums, int64_t c,
                                       const int vectors) {
  const int64_t split = group / n->groups, area = n->pixels * n->channels;
  __m512 sum[VECTORS], square[VECTORS], start[VECTORS];
  __mmask16 mask[VECTORS];
  UNROLL for (int v = 0; v < vectors; v++) {
    mask[v] = lanes(n->channels - c - v * LANES);
    sum[v] = square[v] = _mm512_setzero_ps();
    start[v] = NAME(start_of)(n, split, c + v * LANES, mask[v]);
  }
  for (int64_t i = first_image(n, group); i < last_image(n, group); i += n->splits) {
    const element *x = (const element *)n->x + i * area + c;
    for (int64_t p = 0; p < n->pixels; p++, x += n->channels)
      UNROLL for (int v = 0; v < vectors; v++) {
        const __m512 d = _mm512_sub_ps(LOAD(x + v * LANES, mask[v]), start[v]);
        sum[v] = _mm512_add_ps(sum[v], d);
        square[v] = _mm512_fmadd_ps(d, d, square[v]);
      }
  }
  UNROLL for (int v = 0; v < vectors; v++) {
    _mm512_mask_storeu_ps(sums + c + v * LANES, mask[v], sum[v]);
    _mm512_mask_storeu_ps(sums + n->channels + c + v * LANES, mask[v], square[v]);
  }
}

/* Sums the gradient and the gradient x (x - mean) over the pixels of a group. */
INLINE TARGET void NAME(gradients_of)(const struct norm *n, int64_t group, float *sums, int64_t c,
                                      const int relu, const int vectors) {
  const element *gradients = n->of_residual ? n->of_residual : n->gradient;
  const int64_t split = group / n->groups * n->channels + c, area = n->pixels * n->channels;
  __m512 sum[VECTORS], product[VECTORS], mean[VECTORS], scale[VECTORS], bias[VECTORS];
  __mmask16 mask[VECTORS];
  UNROLL for (int v = 0; v < vectors; v++) {
    mask[v] = lanes(n->channels - c - v * LANES);
    sum[v] = product[v] = _mm512_setzero_ps();
    mean[v] = _mm512_maskz_loadu_ps(mask[v], n->mean + split + v * LANES);
    scale[v] = _mm512_maskz_loadu_ps(mask[v], n->scale + split + v * LANES);
    bias[v] = _mm512_maskz_loadu_ps(mask[v], n->bias + c + v * LANES);
  }
  for (int64_t i = first_image(n, group); i < last_image(n, group); i += n->splits)
    for (int64_t p = 0, at = i * area + c; p < n->pixels; p++, at += n->channels)
      UNROLL for (int v = 0; v < vectors; v++) {
        const int64_t here = at + v * LANES;
        const __m512 d = _mm512_sub_ps(LOAD((const element *)n->x + here, mask[v]), mean[v]);
        __m512 gradient = LOAD(gradients + here, mask[v]);
        if (relu) {
          const __m512 y = _mm512_fmadd_ps(d, scale[v], bias[v]);
          gradient = _mm512_maskz_mov_ps(positive(y), gradient);
        }
        sum[v] = _mm512_add_ps(sum[v], gradient);
        product[v] = _mm512_fmadd_ps(gradient, d, product[v]);
      }
  UNROLL for (int v = 0; v < vectors; v++) {
    _mm512_mask_storeu_ps(sums + c + v * LANES, mask[v], sum[v]);
    _mm512_mask_storeu_ps(sums + n->channels + c + v * LANES, mask[v], product[v]);
  }
}

INLINE TARGET void NAME(sums_of)(const struct norm *n, int64_t group, float *sums, int64_t c,
                                 const int vectors) {
  if (!n->gradient)
    NAME(statistics_of)(n, group, sums, c, vectors);
  else if (n->relu && !n->of_residual)
    NAME(gradients_of)(n, group, sums, c, 1, vectors);
  else
    NAME(gradients_of)(n, group, sums, c, 0, vectors);
}

/* Writes the gradient of the residual of a group: the gradient where the ReLU keeps it. */
static TARGET void NAME(rectify)(const struct norm *n, int64_t group) {
  const int64_t area = n->pixels * n->channels;
  for (int64_t i = first_image(n, group); i < last_image(n, group); i += n->splits) {
    const element *g = (const element *)n->gradient + i * area;
    const element *y = (const element *)n->output + i * area;
    element *to = (element *)n->of_residual + i * area;
    for (int64_t at = 0; at < area; at += LANES) {
      const __mmask16 mask = lanes(area - at), kept = positive(LOAD(y + at, mask));
      STORE(to + at, mask, _mm512_maskz_mov_ps(kept, LOAD(g + at, mask)));
    }
  }
}

static TARGET void NAME(sum)(const struct norm *n, int64_t group) {
  float *sums = n->sums + group * 2 * n->channels;
  int64_t c = 0;
  /* Before the sums, which then read the second cache. */
  if (n->of_residual) NAME(rectify)(n, group);
  for (; n->channels - c > LANES; c += VECTORS * LANES) NAME(sums_of)(n, group, sums, c, VECTORS);
  if (c < n->channels) NAME(sums_of)(n, group, sums, c, 1);
}

/* Writes the result of a group: (x - mean) scale + bias, plus the residual, rectified. */
static TARGET void NAME(normalise)(const struct norm *n, int64_t group) {
  const int64_t area = n->pixels * n->channels;
  const float *mean = n->mean + group / n->groups * n->channels;
  const float *scale = n->scale + group / n->groups * n->channels;
  for (int64_t i = first_image(n, group); i < last_image(n, group); i += n->splits)
    for (int64_t p = 0; p < n->pixels; p++)
      for (int64_t c = 0; c < n->channels; c += LANES) {
        const int64_t at = i * area + p * n->channels + c;
        const __mmask16 mask = lanes(n->channels - c);
        const __m512 x = LOAD((const element *)n->x + at, mask);
        const __m512 d = _mm512_sub_ps(x, _mm512_maskz_loadu_ps(mask, mean + c));
        __m512 value = _mm512_fmadd_ps(d, _mm512_maskz_loadu_ps(mask, scale + c),
                                       _mm512_maskz_loadu_ps(mask, n->bias + c));
        if (n->residual) value = _mm512_add_ps(value, LOAD((const element *)n->residual + at, mask));
        if (n->relu) value = _mm512_max_ps(_mm512_setzero_ps(), value); /* NaN stays */
        STORE((element *)n->result + at, mask, value);
      }
}

/* Writes the gradient of x of a group. */
static TARGET void NAME(differentiate)(const struct norm *n, int64_t group) {
  const int64_t area = n->pixels * n->channels, split = group / n->groups * n->channels;
  const float *mean = n->mean + split, *scale = n->scale + split;
  const float *less = n->less + split, *slope = n->slope + split;
  const element *gradients = n->of_residual ? n->of_residual : n->gradient;
  for (int64_t i = first_image(n, group); i < last_image(n, group); i += n->splits)
    for (int64_t p = 0; p < n->pixels; p++)
      for (int64_t c = 0; c < n->channels; c += LANES) {
        const int64_t at = i * area + p * n->channels + c;
        const __mmask16 mask = lanes(n->channels - c);
        const __m512 x = LOAD((const element *)n->x + at, mask);
        const __m512 d = _mm512_sub_ps(x, _mm512_maskz_loadu_ps(mask, mean + c));
        const __m512 factor = _mm512_maskz_loadu_ps(mask, scale + c);
        __m512 gradient = LOAD(gradients + at, mask);
        if (n->relu && !n->of_residual) {
          const __m512 y = _mm512_fmadd_ps(d, factor, _mm512_maskz_loadu_ps(mask, n->bias + c));
          gradient = _mm512_maskz_mov_ps(positive(y), gradient);
        }
        gradient = _mm512_sub_ps(gradient, _mm512_maskz_loadu_ps(mask, less + c));
        gradient = _mm512_fnmadd_ps(d, _mm512_maskz_loadu_ps(mask, slope + c), gradient);
        STORE((element *)n->result + at, mask, _mm512_mul_ps(gradient, factor));
      }
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
