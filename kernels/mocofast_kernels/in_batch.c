/* Losses over the pairs of a small batch on a CPU with AVX-512: the loss and all gradients.
 *
 * cpu_compiled_batch.py loads this library by ctypes, which holds no lock of Python during a call.
 *
 * The dot products of all pairs are kept (the scores), and become the weights of the gradients in
 * place. So three matrix products are all that takes long: scores = x y^T, weights y, weights^T x.
 * For every positive the weights hold a number below 0.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "compilers.h"
#include "x86.h"

#if X86
#include "avx512.h"
#include "products.h"

#define LN2 0.6931471805599453

enum kind { PAIRS, BOTH_WAYS, VIEWS, LABELS, SIGMOID };

struct batch {
  int kind;
  const float *x, *y; /* (rows, width): rows and their keys, unit vectors if normalised */
  int64_t rows, width, stride;
  double scale, bias;
  const int64_t *labels; /* (rows) */
  float tie;
  float *scores;   /* (rows, stride), then exponentials, then weights */
  float *total;    /* (stride) the sum over the keys of a row, then the row's factor of weights */
  float *column;   /* (stride) the same over the rows of a key */
  float *positive; /* (stride) of the positive: the exponential or their number, then the weight */
  int32_t *ranks;  /* (rows), or 0 */
  double loss, grad_scale, grad_bias;
};

/* Returns the sum of |a b|. */
WIDE static float dot_of_sizes(const float *a, const float *b, int64_t width) {
  __m512 sums = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += LANES) {
    __mmask16 lanes = lanes_from(i, width);
    __m512 x = _mm512_maskz_loadu_ps(lanes, a + i), y = _mm512_maskz_loadu_ps(lanes, b + i);
    sums = _mm512_add_ps(sums, _mm512_abs_ps(_mm512_mul_ps(x, y)));
  }
  return _mm512_reduce_add_ps(sums);
}

/* The key that is the positive of a row. */
INLINE int64_t positive_of(const struct batch *b, int64_t row) {
  if (b->kind != VIEWS) return row;
  return row < b->rows / 2 ? row + b->rows / 2 : row - b->rows / 2;
}

/* Computes the weights 2^(factor score - shift), 0 for what is no negative, and their sums.
 * Returns whether all logits are numbers within `range` bits. */
WIDE static int exponentials(struct batch *b, float factor, float range, float *shift) {
  __m512 low = _mm512_set1_ps(INFINITY), high = _mm512_set1_ps(-INFINITY);
  __mmask16 nan = 0;
  for (int64_t i = 0; i < b->rows; i++)
    for (int64_t j = 0; j < b->rows; j += LANES) {
      __mmask16 lanes = lanes_from(j, b->rows);
      __m512 score = _mm512_loadu_ps(b->scores + i * b->stride + j);
      nan |= _mm512_mask_cmp_ps_mask(lanes, score, score, _CMP_UNORD_Q);
      low = _mm512_mask_min_ps(low, lanes, score, low);
      high = _mm512_mask_max_ps(high, lanes, score, high);
    }
  float most = factor * _mm512_reduce_max_ps(high), least = factor * _mm512_reduce_min_ps(low);
  if (nan || !(most - least <= range)) return 0;
  *shift = most;
  memset(b->column, 0, sizeof(float) * (size_t)b->stride);
  for (int64_t i = 0; i < b->rows; i++) {
    float *scores = b->scores + i * b->stride, tie = INFINITY;
    int64_t own = positive_of(b, i);
    if (b->kind != LABELS) {
      b->positive[i] = exp2f(factor * scores[own] - most);
      if (b->ranks)
        tie = scores[own] - b->tie * dot_of_sizes(b->x + i * b->width, b->y + own * b->width,
                                                  b->width);
      scores[own] = -INFINITY;
    }
    scores[i] = -INFINITY;
    __m512 total = _mm512_setzero_ps();
    int32_t above = 0;
    for (int64_t j = 0; j < b->rows; j += LANES) {
      __mmask16 lanes = lanes_from(j, b->rows);
      __m512 score = _mm512_loadu_ps(scores + j);
      if (b->ranks)
        above += __builtin_popcount(
            _mm512_mask_cmp_ps_mask(lanes, score, _mm512_set1_ps(tie), _CMP_GE_OQ));
      __m512 logit = _mm512_fmsub_ps(score, _mm512_set1_ps(factor), _mm512_set1_ps(most));
      __m512 weight = _mm512_maskz_mov_ps(lanes, exp2_of(logit));
      total = _mm512_add_ps(total, weight);
      _mm512_storeu_ps(scores + j, weight);
      if (b->kind == BOTH_WAYS)
        _mm512_storeu_ps(b->column + j, _mm512_add_ps(_mm512_loadu_ps(b->column + j), weight));
    }
    b->total[i] = _mm512_reduce_add_ps(total);
    if (b->ranks) b->ranks[i] = above;
  }
  return 1;
}

/* Makes the weights of the gradients from exponentials, and the mean loss. */
WIDE static void weigh_pairs(struct batch *b) {
  const int ways = b->kind == BOTH_WAYS ? 2 : 1;
  const double factor = b->scale / (double)(ways * b->rows);
  float *shares = b->positive; /* of the positive: the exponential, then its weight */
  double loss = 0;
  for (int64_t i = 0; i < b->rows; i++) {
    float one = b->positive[i];
    double inverse = factor / ((double)b->total[i] + one), share = b->total[i] * inverse;
    loss += log1p((double)b->total[i] / one);
    b->total[i] = (float)inverse;
    if (ways == 2) {
      inverse = factor / ((double)b->column[i] + one);
      loss += log1p((double)b->column[i] / one);
      share += b->column[i] * inverse;
      b->column[i] = (float)inverse;
    }
    shares[i] = (float)share;
  }
  b->loss = loss / (double)(ways * b->rows);
  const float *column = b->kind == VIEWS ? b->total : b->column; /* zeros for one way */
  for (int64_t i = 0; i < b->rows; i++) {
    float *weights = b->scores + i * b->stride;
    __m512 row = _mm512_set1_ps(b->total[i]);
    for (int64_t j = 0; j < b->rows; j += LANES) {
      __m512 both = _mm512_add_ps(row, _mm512_loadu_ps(column + j));
      _mm512_storeu_ps(weights + j, _mm512_mul_ps(_mm512_loadu_ps(weights + j), both));
    }
    int64_t own = positive_of(b, i);
    weights[own] = b->kind == VIEWS ? -(shares[i] + shares[own]) : -shares[i];
  }
}

/* Returns the lanes of the other rows with the label of row i. */
INLINE WIDE __mmask16 same_label(const struct batch *b, int64_t i, int64_t j) {
  __mmask16 lanes = lanes_from(j, b->rows);
  __m512i label = _mm512_set1_epi64(b->labels[i]);
  __m512i low = _mm512_maskz_loadu_epi64((__mmask8)lanes, b->labels + j);
  __m512i high = _mm512_maskz_loadu_epi64((__mmask8)(lanes >> 8), b->labels + j + 8);
  unsigned same = _mm512_cmpeq_epi64_mask(low, label) |
                  (unsigned)_mm512_cmpeq_epi64_mask(high, label) << 8;
  if (i >= j && i < j + LANES) same &= ~(1u << (i - j));
  return (__mmask16)(same & lanes);
}

/* Computes the sums over the positives of every row, and their number in `positive`. */
WIDE static void sum_positives(struct batch *b, double *sums) {
  for (int64_t i = 0; i < b->rows; i++) {
    __m512 sum = _mm512_setzero_ps();
    int count = 0;
    for (int64_t j = 0; j < b->rows; j += LANES) {
      __mmask16 same = same_label(b, i, j);
      count += __builtin_popcount(same);
      sum = _mm512_mask_add_ps(sum, same, sum, _mm512_loadu_ps(b->scores + i * b->stride + j));
    }
    b->positive[i] = (float)count;
    sums[i] = count ? _mm512_reduce_add_ps(sum) / (double)count : 0;
  }
}

/* The same as `weigh_pairs` for rows with several positives. sums: means of their scores. */
WIDE static void weigh_labels(struct batch *b, const double *sums, float shift) {
  double loss = 0, some = 0;
  for (int64_t i = 0; i < b->rows; i++)
    if (b->positive[i] > 0) {
      loss += (log2(b->total[i]) + shift) * LN2 - b->scale * sums[i];
      some += 1;
    }
  if (some == 0) some = 1;
  b->loss = loss / some;
  for (int64_t i = 0; i < b->rows; i++) {
    double factor = b->positive[i] > 0 ? b->scale / some : 0;
    b->total[i] = (float)(factor / b->total[i]);
    b->positive[i] = factor > 0 ? (float)(factor / b->positive[i]) : 0;
  }
  for (int64_t i = 0; i < b->rows; i++) {
    float *weights = b->scores + i * b->stride;
    __m512 row = _mm512_set1_ps(b->total[i]), one = _mm512_set1_ps(b->positive[i]);
    for (int64_t j = 0; j < b->rows; j += LANES) {
      __m512 both = _mm512_add_ps(row, _mm512_loadu_ps(b->total + j));
      __m512 weight = _mm512_mul_ps(_mm512_loadu_ps(weights + j), both);
      __m512 drawn = _mm512_add_ps(one, _mm512_loadu_ps(b->positive + j));
      _mm512_storeu_ps(weights + j,
                       _mm512_mask_sub_ps(weight, same_label(b, i, j), weight, drawn));
    }
  }
}

/* Returns log(1 + x) for x in [0, 1], with a relative error of 2e-7.
 * 2 artanh(x / (2 + x)), a series. */
INLINE WIDE __m512 log1p_of(__m512 x) {
  __m512 s = _mm512_div_ps(x, _mm512_add_ps(x, _mm512_set1_ps(2.f)));
  __m512 square = _mm512_mul_ps(s, s), p = _mm512_set1_ps(2.f / 15);
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.f / 13));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.f / 11));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.f / 9));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.f / 7));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.f / 5));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.f / 3));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.f));
  return _mm512_mul_ps(p, s);
}

/* Makes the weights of SigLIP's gradients from scores, and the loss. */
WIDE static void weigh_sigmoid(struct batch *b) {
  const __m512 scale = _mm512_set1_ps((float)b->scale), bias = _mm512_set1_ps((float)b->bias);
  const __m512 one = _mm512_set1_ps(1.f), zero = _mm512_setzero_ps();
  const __m512 mean = _mm512_set1_ps((float)(1 / (double)b->rows));
  const __m512 sign = _mm512_set1_ps(-0.f), bits = _mm512_set1_ps((float)(-1 / LN2));
  double loss = 0, by_scale = 0, by_bias = 0;
  for (int64_t i = 0; i < b->rows; i++) {
    float *weights = b->scores + i * b->stride;
    __m512 losses = zero, scales = zero, biases = zero;
    for (int64_t j = 0; j < b->rows; j += LANES) {
      __mmask16 lanes = lanes_from(j, b->rows);
      __mmask16 own = i >= j && i < j + LANES ? (__mmask16)(1 << (i - j)) : 0;
      __m512 score = _mm512_loadu_ps(weights + j), logit = _mm512_fmadd_ps(score, scale, bias);
      logit = _mm512_mask_xor_ps(logit, own, logit, sign); /* the loss is log(1 + e^logit) */
      __m512 power = exp2_of(_mm512_mul_ps(_mm512_abs_ps(logit), bits));
      losses = _mm512_mask_add_ps(losses, lanes, losses,
                                  _mm512_add_ps(_mm512_max_ps(logit, zero), log1p_of(power)));
      __mmask16 above = _mm512_cmp_ps_mask(logit, zero, _CMP_GE_OQ);
      __m512 weight = _mm512_div_ps(_mm512_mask_mov_ps(power, above, one),
                                    _mm512_add_ps(power, one));
      weight = _mm512_maskz_mul_ps(lanes, weight, mean);
      weight = _mm512_mask_xor_ps(weight, own, weight, sign);
      scales = _mm512_mask3_fmadd_ps(weight, score, scales, lanes);
      biases = _mm512_add_ps(biases, weight);
      _mm512_storeu_ps(weights + j, _mm512_mul_ps(weight, scale));
    }
    loss += _mm512_reduce_add_ps(losses);
    by_scale += _mm512_reduce_add_ps(scales);
    by_bias += _mm512_reduce_add_ps(biases);
  }
  b->loss = loss / (double)b->rows;
  b->grad_scale = by_scale;
  b->grad_bias = by_bias;
}

/* Turns gradients by unit vectors into gradients by vectors. Returns the sum of grad . unit. */
WIDE static double finish(float *grad, const float *units, const float *norms, int64_t rows,
                          int64_t width) {
  double sum = 0;
  for (int64_t i = 0; i < rows; i++, grad += width, units += width) {
    float along = dot(grad, units, width);
    sum += along;
    if (!norms) continue;
    /* Up to EPS the divisor is a constant. */
    if (norms[i] <= EPS) along = 0;
    combine(grad, 1 / norms[i], grad, -along / norms[i], units, width);
  }
  return sum;
}

/* Writes unit vectors and their norms. */
WIDE static void normalize_rows(float *units, float *norms, const float *from, int64_t rows,
                                int64_t width) {
  for (int64_t i = 0; i < rows; i++, units += width, from += width) {
    norms[i] = norm_of(from, width);
    for (int64_t c = 0; c < width; c++) units[c] = from[c] / norms[i];
  }
}
#endif

/* Computes a loss of a batch and its gradients, float32. cpu_compiled_batch.py says what the
 * arguments are. Returns 1, 0 without memory, -1 for logits out of range. */
EXPORT int in_batch_loss(int kind, const float *x, const float *y, const int64_t *labels,
                         int64_t rows, int64_t width, int normalize, double scale, double bias,
                         double range, float tie, float *loss, float *grad_x, float *grad_y,
                         float *grad_scale, float *grad_bias, int32_t *ranks) {
#if X86
  const int is_one = kind == VIEWS || kind == LABELS; /* x is y */
  int64_t stride = ((rows + LANES - 1) / LANES | 1) * LANES, both = is_one ? 1 : 2;
  int64_t numbers = rows * width, copies = normalize ? both * numbers : 0;
  size_t size = (size_t)((rows + width + 5) * stride + copies + 2 * rows + LANES);
  float *memory = malloc(size * sizeof(float) + (size_t)rows * sizeof(double));
  if (!memory) return 0;
  float *start = (float *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
  struct batch b = {kind, x, y, rows, width, stride, scale, bias, labels, tie, 0, 0, 0, 0, ranks,
                    0, 0, 0};
  b.scores = start;
  float *turned = b.scores + rows * stride;
  b.total = turned + width * stride;
  b.column = b.total + stride;
  b.positive = b.column + stride;
  double *sums = (double *)(b.positive + stride);
  float *units = (float *)(sums + rows), *norms = units + copies;
  if (normalize) {
    normalize_rows(units, norms, x, rows, width);
    b.x = b.y = units;
    if (!is_one) {
      normalize_rows(units + numbers, norms + rows, y, rows, width);
      b.y = units + numbers;
    }
  }
  memset(b.total, 0, sizeof(float) * (size_t)(3 * stride));
  transpose(turned, stride, b.y, rows, width);
  struct product p = {b.scores, stride, b.x, width, 1, turned, stride, rows, rows, width};
  multiply(&p);
  if (kind == SIGMOID)
    weigh_sigmoid(&b);
  else {
    float shift;
    if (kind == LABELS) sum_positives(&b, sums);
    if (!exponentials(&b, (float)(scale / LN2), (float)range, &shift)) {
      free(memory);
      return -1;
    }
    if (kind == LABELS)
      weigh_labels(&b, sums, shift);
    else
      weigh_pairs(&b);
  }
  struct product by_x = {grad_x, width, b.scores, stride, 1, b.y, width, rows, width, rows};
  multiply(&by_x);
  double along = finish(grad_x, b.x, normalize ? norms : 0, rows, width);
  if (kind != SIGMOID) b.grad_scale = along / scale / (is_one ? 2 : 1);
  if (grad_y) {
    struct product by_y = {grad_y, width, b.scores, 1, stride, b.x, width, rows, width, rows};
    multiply(&by_y);
    if (normalize) finish(grad_y, b.y, norms + rows, rows, width);
  }
  *loss = (float)b.loss;
  *grad_scale = (float)b.grad_scale;
  if (grad_bias) *grad_bias = (float)b.grad_bias;
  free(memory);
  return 1;
#else
  return 0;
#endif
}

/* Writes factor x from. */
EXPORT void in_batch_scale(float *restrict to, const float *restrict from, int64_t count,
                           float factor) {
  for (int64_t i = 0; i < count; i++) to[i] = factor * from[i];
}
