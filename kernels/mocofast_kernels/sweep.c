/* InfoNCE's sweep over a block of keys on a CPU with AVX-512: logits, exponentials, sums.
 *
 * cpu_sweep.py loads this library by ctypes, which holds no lock of Python during a call.
 *
 * For 32 rows at a time and a tile of keys, weights w = exp2(row . key) are computed in registers,
 * and then w @ keys, while the tile lies in the first caches. Unit vectors of the keys are never
 * stored: a logit and a weight are divided by the norm. Neither product needs another order of the
 * keys in memory: the first multiplies 16 rows by a number of a key, the second 16 numbers of a key
 * by a weight. Only the rows are laid out anew, in panels of 16 rows. bfloat16 operands come in
 * pairs, whose products one instruction adds, in float32.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "compilers.h"
#include "x86.h"

#if X86
#include "avx512.h"

#define PANEL 32  /* rows at a time: two vectors */
#define KEYS 8    /* keys whose logits for a panel are in registers at a time */
#define GROUP 4   /* rows whose sums are in registers at a time, */
#define VECTORS 4 /* for so many vectors */

/* cpu_sweep.py says what the fields are. */
struct sweep {
  const uint32_t *panels, *keys;
  int64_t rows, count, depth, width;
  int normalize;
  const float *tie;
  float *total, *output;
  int32_t *above;
  uint32_t *scratch;
  const uint32_t *last_keys; /* the last keys, of which there are fewer than KEYS, then zeros */
};

#define BF16 0
#define TILE 64 /* keys: 40 KB with their weights for a panel, at 128 dimensions */
#define NAME(x) float32_##x
#define TARGET __attribute__((target(AVX512)))
#include "sweep_body.h"

#define BF16 1
#define TILE 128 /* as many bytes */
#define NAME(x) bfloat16_##x
#define TARGET __attribute__((target(AVX512 ",avx512bf16")))
#include "sweep_body.h"

/* Rounds to bfloat16, to the even of two nearest, with 16 bits of zeros above. */
INLINE WIDE __m512i bfloat16_of(__m512 x) {
  __m512i bits = _mm512_castps_si512(x), half = _mm512_set1_epi32(0x7fff);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(half, odd)), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc0));
}

/* Lays a row out in a panel: factor times the unit vector. */
WIDE static void lay(uint32_t *panel, int bfloat16, const float *unit, float factor,
                     int64_t width) {
  for (int64_t i = 0; i < width; i += LANES) {
    uint32_t words[LANES];
    __mmask16 lanes = lanes_from(i, width);
    __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, unit + i), _mm512_set1_ps(factor));
    if (bfloat16)
      _mm256_storeu_si256((__m256i *)words, _mm512_cvtepi32_epi16(bfloat16_of(x)));
    else
      _mm512_storeu_ps(words, x);
    const int64_t numbers = width - i < LANES ? width - i : LANES;
    for (int64_t j = 0; j < numbers >> bfloat16; j++)
      panel[((i >> bfloat16) + j) * LANES] = words[j];
  }
}

/* Returns the least logit that ties with the logit of a key. tie: a share of all terms' sizes. */
WIDE static float least_tie(int bfloat16, const float *unit, float factor, const float *key,
                            int64_t width, float tie) {
  __m512 score = _mm512_setzero_ps(), size = score;
  for (int64_t i = 0; i < width; i += LANES) {
    __mmask16 lanes = lanes_from(i, width);
    __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, unit + i), _mm512_set1_ps(factor));
    if (bfloat16) x = _mm512_castsi512_ps(_mm512_slli_epi32(bfloat16_of(x), 16));
    __m512 term = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(lanes, key + i));
    score = _mm512_add_ps(score, term);
    size = _mm512_add_ps(size, _mm512_abs_ps(term));
  }
  return _mm512_reduce_add_ps(score) - tie * _mm512_reduce_add_ps(size);
}

/* What InfoNCE knows of the rows before the sweep. `prepare` writes it, `finish` reads it. */
struct rows {
  const float *query, *positive; /* (count, width) */
  int64_t count, width;
  float inverse_t;
  float *units;           /* (count, width) unit vectors of the query */
  float *norms, *lengths; /* (count) of the query and of the positive */
  float *scores;          /* (count) of the positive, times its length */
};

/* Lays the rows out in panels, times log2(e) / T, and computes ties, (count), or 0.
 * equal, tie: as for `sweep_whole`. */
static void prepare(const struct rows *s, int bfloat16, const float *equal, float tie,
                    uint32_t *panels, float *ties) {
  const int64_t width = s->width, depth = bfloat16 ? width / 2 : width;
  const float factor = (float)(s->inverse_t / 0.6931471805599453);
  for (int64_t r = 0; r < s->count; r++) {
    const float *vector = s->query + r * width, *key = s->positive + r * width;
    float *unit = s->units + r * width, norm = norm_of(vector, width), length = norm_of(key, width);
    s->norms[r] = norm;
    s->lengths[r] = length;
    for (int64_t i = 0; i < width; i++) unit[i] = vector[i] / norm;
    lay(panels + r / LANES * LANES * depth + r % LANES, bfloat16, unit, factor, width);
    s->scores[r] = dot(unit, key, width);
    if (ties && equal)
      ties[r] = least_tie(bfloat16, unit, factor, equal + r * width, width, tie);
    else if (ties)
      ties[r] = least_tie(bfloat16, unit, factor, key, width, tie) / length;
  }
}

/* Computes loss, gradient and ranks, as `sweep_whole` does, from sums over `keys` keys. */
static void finish(const struct rows *s, const float *total, const float *output,
                   const int32_t *above, int64_t keys, int mean, float *loss, float *grad,
                   int32_t *ranks) {
  const double inverse_t = s->inverse_t;
  double all = 0;
  for (int64_t r = 0; r < s->count; r++) {
    const float *unit = s->units + r * s->width, norm = s->norms[r], length = s->lengths[r];
    float *own = grad + r * s->width;
    double difference = log(total[r]) - inverse_t * s->scores[r] / length;
    double value = difference > 40 ? difference : log1p(exp(difference));
    double weight = -inverse_t / (1 + exp(-difference)) / (mean ? (double)s->count : 1);
    all += value;
    if (!mean) loss[r] = (float)value;
    if (ranks) ranks[r] = value != value ? (int32_t)keys : above[r];
    /* By the unit vector, then by the query: up to EPS the divisor is a constant. */
    combine(own, (float)(weight / length), s->positive + r * s->width, (float)(-weight / total[r]),
            output + r * s->width, s->width);
    float along = norm <= EPS ? 0 : dot(own, unit, s->width) / norm;
    combine(own, 1 / norm, own, -along, unit, s->width);
  }
  if (mean) *loss = (float)(all / (double)s->count);
}
#endif

/* Returns whether this CPU sweeps with float32 operands (0) or bfloat16 operands (1). */
EXPORT int sweep_runs(int bfloat16) {
  return has_avx512(bfloat16);
}

/* Adds the sums over a block of keys. cpu_sweep.py says what the arguments are. */
EXPORT void sweep_keys(int bfloat16, const uint32_t *panels, const uint32_t *keys, int64_t rows,
                        int64_t count, int64_t depth, int64_t width, int normalize,
                        const float *tie, float *total, float *output, int32_t *above,
                        uint32_t *scratch) {
#if X86
  struct sweep s = {panels, keys,  rows,   count, depth,   width, normalize,
                    tie,    total, output, above, scratch, 0};
  if (bfloat16)
    bfloat16_sweep(&s);
  else
    float32_sweep(&s);
#endif
}

/* Prepares rows of InfoNCE for a sweep with operands of float32 or bfloat16.
 *
 * query, positive: (rows, width). numbers: (3, rows), units: (rows, width), for `sweep_finish`.
 * panels: for `sweep_keys`. ties: (rows), or 0. equal, tie: as for `sweep_whole`. */
EXPORT void sweep_prepare(int bfloat16, const float *query, const float *positive,
                          const float *equal, int64_t rows, int64_t width, float inverse_t,
                          float tie, float *units, float *numbers, uint32_t *panels, float *ties) {
#if X86
  struct rows s = {query,   positive,       rows,              width, inverse_t, units,
                   numbers, numbers + rows, numbers + 2 * rows};
  prepare(&s, bfloat16, equal, tie, panels, ties);
#endif
}

/* Computes InfoNCE of prepared rows from their sums over `count` keys, which `sweep_keys` adds.
 * loss, grad, ranks: as for `sweep_whole`. */
EXPORT void sweep_finish(const float *positive, int64_t rows, int64_t count, int64_t width,
                         float inverse_t, int mean, float *units, float *numbers,
                         const float *total, const float *output, const int32_t *above,
                         float *loss, float *grad, int32_t *ranks) {
#if X86
  struct rows s = {0,       positive,       rows,              width, inverse_t, units,
                   numbers, numbers + rows, numbers + 2 * rows};
  finish(&s, total, output, above, count, mean, loss, grad, ranks);
#endif
}

/* Computes InfoNCE of a few rows, float32: loss, gradient and ranks of cpu_one_block.py.
 *
 * query, positive, grad: (rows, width). keys: (count, width). loss: (rows), of the mean ().
 * ranks: (rows), or 0. normalize: divide the keys by their norms.
 * equal: (rows, width) the keys that tie with the positives, or 0: the positives' unit vectors.
 * tie: the share of the sum of |q k| that scores of equal keys may differ by.
 * Returns whether there was memory. */
EXPORT int sweep_whole(const float *query, const float *positive, const float *keys,
                      const float *equal, int64_t rows, int64_t count, int64_t width,
                      int normalize, float inverse_t, int mean, float tie, float *loss,
                      float *grad, int32_t *ranks) {
#if X86
  int64_t padded = (rows + LANES - 1) / LANES * LANES, numbers = padded * width;
  float *memory = calloc((size_t)(3 * numbers + 6 * padded + KEYS * width), sizeof(*memory));
  if (!memory) return 0;
  float *panels = memory, *units = panels + numbers, *output = units + numbers;
  float *total = output + numbers, *ties = total + padded, *norms = ties + padded;
  int32_t *above = (int32_t *)(norms + 3 * padded);
  struct rows own = {query, positive,       rows,              width, inverse_t, units,
                     norms, norms + padded, norms + 2 * padded};
  struct sweep s = {(const uint32_t *)panels,
                    (const uint32_t *)keys,
                    rows,
                    count,
                    width,
                    width,
                    normalize,
                    ranks ? ties : 0,
                    total,
                    output,
                    above,
                    (uint32_t *)(above + padded),
                    0};
  prepare(&own, 0, equal, tie, (uint32_t *)panels, ranks ? ties : 0);
  float32_sweep(&s);
  finish(&own, total, output, above, count, mean, loss, grad, ranks);
  free(memory);
  return 1;
#else
  return 0;
#endif
}
