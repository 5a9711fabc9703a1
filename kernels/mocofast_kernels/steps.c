/* Steps of optimisers and moving averages on a CPU, in one pass over memory.
 *
 * cpu_steps.py loads this library by ctypes, which holds no lock of Python during a call. The
 * library needs no header of Python.
 *
 * A number of a tensor depends on the numbers at the same place of the tensors beside it alone, and
 * every operation is rounded as written. So the results are equal for any division of the tensors
 * among calls and threads. -ffp-contract=off keeps the compiler from other roundings,
 * -fno-math-errno makes the square root an instruction.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "compilers.h"

/* The tensors of a row, by the bit of their column. The tensors of a row have equal numbers of
 * elements, and lie in memory without gaps and in the same order. cpu_steps.py writes the same
 * order. */
enum {
  PARAM,
  GRAD,   /* without: the parameter stays, average and copies are made */
  FIRST,  /* the momentum buffer of SGD, exp_avg of AdamW */
  SECOND, /* exp_avg_sq of AdamW */
  STEPS,  /* one float: the number of steps of AdamW, this step included */
  TARGET, /* becomes a moving average of the parameter */
  COPY,   /* bfloat16 of the parameter */
  TARGET_COPY,
  COLUMNS
};

/* Addresses of tensors. */
struct table {
  const int64_t *counts;          /* elements of every row */
  const int64_t *columns[COLUMNS]; /* an address for every row, or 0: no row has the tensor */
  int64_t rows;
};

/* Returns the address of a tensor, or 0. */
static inline void *tensor(const struct table *table, int column, int64_t row) {
  return table->columns[column] ? (void *)(intptr_t)table->columns[column][row] : 0;
}

/* Elements between a step and its average. The tensors of a block stay in the fastest cache. */
#define BLOCK 512

#define ALIGNED 64 /* elements: a share starts where tensors of such sizes start a cache line */

/* The numbers of a step of SGD or AdamW. */
struct rule {
  int adamw;
  double lr, decay;
  double momentum;        /* of SGD */
  double beta1, beta2, eps; /* of AdamW */
  float average;          /* 1 - m, for t = m t + (1 - m) p */
};

/* A step of AdamW, with the corrections of the row's number of steps. */
struct adamw {
  float keep;                     /* 1 - lr decay */
  float to_first, beta2, to_second; /* 1 - beta1, beta2, 1 - beta2 */
  float size, scale, eps;         /* p -= size first / (scale sqrt(second) + eps) */
};

static struct adamw corrected(const struct rule *rule, double steps) {
  struct adamw a;
  a.keep = (float)(1 - rule->lr * rule->decay);
  a.to_first = (float)(1 - rule->beta1);
  a.beta2 = (float)rule->beta2;
  a.to_second = (float)(1 - rule->beta2);
  a.size = (float)(rule->lr / (1 - pow(rule->beta1, steps)));
  a.scale = (float)(1 / sqrt(1 - pow(rule->beta2, steps)));
  a.eps = (float)rule->eps;
  return a;
}

#if defined(__aarch64__)
#define FUSED 1
#else
#define FUSED 0
#endif
#define NAME(x) plain_##x
#include "steps_body.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define X86 1
#include <immintrin.h>
#define AHEAD 512 /* elements that are asked for before their turn */
#define AVX512 __attribute__((target("avx512f")))
#define LANES(left) ((left) < 16 ? (__mmask16)((1u << (left)) - 1) : (__mmask16)0xffff)

/* `avx2_average`, with wide vectors and memory asked for in time: .95 of the time on Zen 5. */
AVX512 static void avx512_average(float *restrict t, const float *restrict s, int64_t count,
                                  float w) {
  __m512 weight = _mm512_set1_ps(w < 0.5f ? w : -(1.f - w));
  for (int64_t i = 0; i < count; i += 16) {
    __mmask16 there = LANES(count - i);
    __builtin_prefetch(t + i + AHEAD, 1);
    __builtin_prefetch(s + i + AHEAD);
    __m512 to = _mm512_maskz_loadu_ps(there, t + i), from = _mm512_maskz_loadu_ps(there, s + i);
    __m512 sum = _mm512_fmadd_ps(weight, _mm512_sub_ps(from, to), w < 0.5f ? to : from);
    _mm512_mask_storeu_ps(t + i, there, sum);
  }
}

/* Stores as bfloat16, rounded as by `avx2_rounded`. */
AVX512 static inline void avx512_store(uint16_t *to, __mmask16 there, __m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  _mm512_mask_cvtepi32_storeu_epi16(
      to, there,
      _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

/* `avx2_sgd_average`, the same way: .8 of the time with copies. */
AVX512 static void avx512_sgd_average(float *restrict p, const float *restrict g,
                                      float *restrict b, float *restrict t,
                                      uint16_t *restrict copy, uint16_t *restrict target_copy,
                                      int64_t count, const struct rule *rule) {
  const float w = rule->average;
  const __m512 lr = _mm512_set1_ps(-(float)rule->lr);
  const __m512 decay = _mm512_set1_ps((float)rule->decay);
  const __m512 momentum = _mm512_set1_ps((float)rule->momentum);
  const __m512 weight = _mm512_set1_ps(w < 0.5f ? w : -(1.f - w));
  for (int64_t i = 0; i < count; i += 16) {
    __mmask16 there = LANES(count - i);
    __builtin_prefetch(p + i + AHEAD, 1);
    __builtin_prefetch(g + i + AHEAD);
    __builtin_prefetch(b + i + AHEAD, 1);
    __builtin_prefetch(t + i + AHEAD, 1);
    __m512 param = _mm512_maskz_loadu_ps(there, p + i), grad = _mm512_maskz_loadu_ps(there, g + i);
    __m512 first = _mm512_maskz_loadu_ps(there, b + i);
    __m512 target = _mm512_maskz_loadu_ps(there, t + i);
    first = _mm512_fmadd_ps(momentum, first, _mm512_fmadd_ps(decay, param, grad));
    param = _mm512_fmadd_ps(lr, first, param);
    target = _mm512_fmadd_ps(weight, _mm512_sub_ps(param, target), w < 0.5f ? target : param);
    _mm512_mask_storeu_ps(b + i, there, first);
    _mm512_mask_storeu_ps(p + i, there, param);
    _mm512_mask_storeu_ps(t + i, there, target);
    if (copy) {
      __builtin_prefetch(copy + i + AHEAD, 1);
      __builtin_prefetch(target_copy + i + AHEAD, 1);
      avx512_store(copy + i, there, param);
      avx512_store(target_copy + i, there, target);
    }
  }
}

#include "avx2_begin.h"
#define AVERAGE_ALONE(...)                                                               \
  (__builtin_cpu_supports("avx512f") ? avx512_average(__VA_ARGS__) : avx2_average(__VA_ARGS__))
#define SGD_AVERAGE(...)                                             \
  (__builtin_cpu_supports("avx512f") ? avx512_sgd_average(__VA_ARGS__) \
                                     : avx2_sgd_average(__VA_ARGS__))
#define FUSED 1
#define NAME(x) avx2_##x
#include "steps_body.h"
#include "avx2_end.h"
#endif

static void make(const struct table *table, int backwards, int64_t first, int64_t last,
                 const struct rule *rule) {
#ifdef X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    avx2_make(table, backwards, first, last, rule);
    return;
  }
#endif
  plain_make(table, backwards, first, last, rule);
}

/* What the threads of a team share. */
struct team {
  const struct table *table;
  const struct rule *rule;
  int backwards;
  int threads, arrived;
  int64_t first, last, size; /* of the elements, of a part */
  int64_t *taken;            /* (threads,) elements that are taken of every thread's share */
};

#ifdef __GNUC__
/* Takes parts of the thread's own share, then of the others' shares. Threads that read far apart
 * from start to end read faster than threads in turns. */
static void help(void *shared) {
  struct team *team = shared;
  const int own = __atomic_fetch_add(&team->arrived, 1, __ATOMIC_RELAXED);
  const int64_t share = ((team->last - team->first) / team->threads / ALIGNED + 1) * ALIGNED;
  for (int i = 0; i < team->threads; i++) {
    const int owner = (own + i) % team->threads;
    const int64_t start = team->first + owner * share;
    const int64_t end = team->last - start < share ? team->last : start + share;
    for (;;) {
      int64_t first = start + __atomic_fetch_add(team->taken + owner, team->size, __ATOMIC_RELAXED);
      if (first >= end) break;
      make(team->table, team->backwards, first, first + team->size < end ? first + team->size : end,
           team->rule);
    }
  }
}
#endif

/* Makes the step of elements first to last - 1. Elements are numbered through all rows.
 *
 * counts: (rows,) elements of every row.
 * addresses: (columns, rows), for the columns whose bits are set in `present`.
 * backwards: the last row comes first.
 * parallel: GOMP_parallel of PyTorch's OpenMP, whose threads then take parts of `size` elements, or
 *     0: the calling thread makes the step. */
EXPORT void steps_make(const int64_t *counts, const int64_t *addresses, int64_t rows, int present,
                       int backwards, int64_t first, int64_t last, int adamw, double lr,
                       double decay, double momentum, double beta1, double beta2, double eps,
                       double average,
                       void (*parallel)(void (*)(void *), void *, unsigned, unsigned),
                       int threads, int64_t size) {
  struct rule rule = {adamw, lr, decay, momentum, beta1, beta2, eps, (float)average};
  struct table table = {counts, {0}, rows};
  for (int column = 0; column < COLUMNS; column++)
    if (present >> column & 1) {
      table.columns[column] = addresses;
      addresses += rows;
    }
#ifdef __GNUC__
  if (parallel) {
    int64_t taken[threads];
    memset(taken, 0, sizeof taken);
    struct team team = {&table, &rule, backwards, threads, 0, first, last, size, taken};
    parallel(help, &team, (unsigned)threads, 0);
    return;
  }
#endif
  make(&table, backwards, first, last, &rule);
}
