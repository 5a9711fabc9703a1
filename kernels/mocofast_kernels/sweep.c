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
#include <string.h>

#include "compilers.h"
#include "x86.h"

#if X86
#define LANES 16  /* float32 in a vector */
#define PANEL 32  /* rows at a time: two vectors */
#define KEYS 8    /* keys whose logits for a panel are in registers at a time */
#define GROUP 4   /* rows whose sums are in registers at a time, */
#define VECTORS 4 /* for so many vectors */
#define ALL ((__mmask16)0xffff)

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

/* Returns 2^x with a relative error of 1e-7: inf, 0 and NaN as exp2f does.
 * 2^x = 2^floor(x) p(x - floor(x)), p fitted to the least relative error on [0, 1]. */
INLINE __attribute__((target(AVX512))) __m512 exp2_of(__m512 x) {
  __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF); /* 0 for inf */
  __m512 p = _mm512_set1_ps(0x1.c54174p-13f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.46d64ep-10f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.3d0b92p-7f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c68912p-5f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebfd58p-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e42cp-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, x);
}

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
