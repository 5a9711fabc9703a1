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

/* Computes InfoNCE of a few rows, float32: loss, gradient and ranks of cpu_one_block.py.
 *
 * query, positive, grad: (rows, width). keys: (count, width). loss: (rows), of the mean ().
 * ranks: (rows), or 0. tie: TIE of cpu_ranks.py. normalize: divide the keys by their norms.
 * Returns whether there was memory. */
EXPORT int sweep_loss(const float *query, const float *positive, const float *keys, int64_t rows,
                      int64_t count, int64_t width, int normalize, float inverse_t, int mean,
                      float tie, float *loss, float *grad, int32_t *ranks) {
#if X86
  const double log_2 = 0.6931471805599453;
  const float factor = (float)(inverse_t / log_2);
  int64_t padded = (rows + LANES - 1) / LANES * LANES, numbers = padded * width;
  float *memory = calloc((size_t)(3 * numbers + 6 * padded + KEYS * width), sizeof(*memory));
  if (!memory) return 0;
  float *panels = memory, *units = panels + numbers, *output = units + numbers;
  float *total = output + numbers, *ties = total + padded;
  float *norms = ties + padded, *lengths = norms + padded; /* of the query and of the positive */
  float *scores = lengths + padded;                        /* of the positive, times its length */
  int32_t *above = (int32_t *)(scores + padded);
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
  for (int64_t r = 0; r < rows; r++) {
    const float *vector = query + r * width, *key = positive + r * width;
    float *unit = units + r * width, *panel = panels + r / LANES * LANES * width + r % LANES;
    norms[r] = norm_of(vector, width);
    lengths[r] = norm_of(key, width);
    for (int64_t i = 0; i < width; i++) {
      unit[i] = vector[i] / norms[r];
      panel[i * LANES] = unit[i] * factor;
    }
    scores[r] = dot(unit, key, width);
    if (ranks) {
      float least = scores[r] - tie * dot_of_sizes(unit, key, width);
      ties[r] = factor * least / lengths[r];
    }
  }
  float32_sweep(&s);
  double all = 0;
  for (int64_t r = 0; r < rows; r++) {
    const float *unit = units + r * width;
    float *own = grad + r * width;
    double difference = log(total[r]) - (double)inverse_t * scores[r] / lengths[r];
    double value = difference > 40 ? difference : log1p(exp(difference));
    double weight = -(double)inverse_t / (1 + exp(-difference)) / (mean ? (double)rows : 1);
    all += value;
    if (!mean) loss[r] = (float)value;
    if (ranks) ranks[r] = value != value ? (int32_t)count : above[r];
    /* By the unit vector, then by the query: up to EPS the divisor is a constant. */
    combine(own, (float)(weight / lengths[r]), positive + r * width, (float)(-weight / total[r]),
            output + r * width, width);
    float along = norms[r] <= EPS ? 0 : dot(own, unit, width) / norms[r];
    combine(own, 1 / norms[r], own, -along, unit, width);
  }
  if (mean) *loss = (float)(all / (double)rows);
  free(memory);
  return 1;
#else
  return 0;
#endif
}
