/* The loops of steps.c. The file is included once for every set of instructions.
 *
 * NAME(x): gives a function the name of its set.
 * FUSED: 1 where a product and a sum are rounded once (fused multiply-add).
 */

#if FUSED
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

/* t += w (s - t), in the form of torch.lerp. A weight of 1 gives s exactly. */
static void NAME(average)(float *restrict t, const float *restrict s, int64_t count, float w) {
  float rest = 1.f - w;
  if (w < 0.5f)
    for (int64_t i = 0; i < count; i++) t[i] = MULTIPLY_ADD(w, s[i] - t[i], t[i]);
  else
    for (int64_t i = 0; i < count; i++) t[i] = MULTIPLY_ADD(-rest, s[i] - t[i], s[i]);
}

#ifndef SGD_AVERAGE
#define SGD_AVERAGE NAME(sgd_average)
#endif
#ifndef AVERAGE_ALONE
#define AVERAGE_ALONE NAME(average)
#endif

static void NAME(descend)(float *restrict p, const float *restrict g, int64_t count, float lr,
                          float decay) {
  for (int64_t i = 0; i < count; i++)
    p[i] = MULTIPLY_ADD(-lr, MULTIPLY_ADD(decay, p[i], g[i]), p[i]);
}

static void NAME(sgd)(float *restrict p, const float *restrict g, float *restrict b, int64_t count,
                      float lr, float decay, float momentum) {
  for (int64_t i = 0; i < count; i++) {
    b[i] = MULTIPLY_ADD(momentum, b[i], MULTIPLY_ADD(decay, p[i], g[i]));
    p[i] = MULTIPLY_ADD(-lr, b[i], p[i]);
  }
}

/* Rounds to bfloat16, half to even. */
static inline uint16_t NAME(rounded)(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded); /* NaN stays */
}

/* `sgd` and `average` in one loop, and the copies of both: a block after the other takes 1.25 times
 * as long on Zen 5. */
static void NAME(sgd_average)(float *restrict p, const float *restrict g, float *restrict b,
                              float *restrict t, uint16_t *restrict copy,
                              uint16_t *restrict target_copy, int64_t count,
                              const struct rule *rule) {
  float lr = (float)rule->lr, decay = (float)rule->decay, momentum = (float)rule->momentum;
  float w = rule->average, rest = 1.f - w;
#define LOOP(average, copies)                                                      \
  for (int64_t i = 0; i < count; i++) {                                            \
    b[i] = MULTIPLY_ADD(momentum, b[i], MULTIPLY_ADD(decay, p[i], g[i]));          \
    p[i] = MULTIPLY_ADD(-lr, b[i], p[i]);                                          \
    t[i] = average;                                                                \
    copies                                                                         \
  }
#define NEAR MULTIPLY_ADD(w, p[i] - t[i], t[i])
#define FAR MULTIPLY_ADD(-rest, p[i] - t[i], p[i])
#define COPIES                          \
  copy[i] = NAME(rounded)(p[i]);        \
  target_copy[i] = NAME(rounded)(t[i]);
  if (copy && w < 0.5f)
    LOOP(NEAR, COPIES)
  else if (copy)
    LOOP(FAR, COPIES)
  else if (w < 0.5f)
    LOOP(NEAR, )
  else
    LOOP(FAR, )
}

static void NAME(adamw)(float *restrict p, const float *restrict g, float *restrict m,
                        float *restrict v, int64_t count, const struct adamw *numbers) {
  struct adamw a = *numbers;
  NAME(average)(m, g, count, a.to_first);
  for (int64_t i = 0; i < count; i++) {
    v[i] = MULTIPLY_ADD(a.to_second, g[i] * g[i], a.beta2 * v[i]);
    float denominator = MULTIPLY_ADD(a.scale, sqrtf(v[i]), a.eps);
    p[i] = MULTIPLY_ADD(-a.size, m[i] / denominator, a.keep * p[i]);
  }
}

static void NAME(copy)(uint16_t *restrict to, const float *restrict from, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = NAME(rounded)(from[i]);
}

static void NAME(make)(const struct table *table, int backwards, int64_t first, int64_t last,
                       const struct rule *rule) {
  int64_t start = 0, end; /* elements of the row */
  for (int64_t k = 0; k < table->rows && start < last; k++, start = end) {
    int64_t row = backwards ? table->rows - 1 - k : k;
    end = start + table->counts[row];
    if (end <= first) continue;
    float *param = tensor(table, PARAM, row);
    const float *grad = tensor(table, GRAD, row);
    float *one = tensor(table, FIRST, row), *two = tensor(table, SECOND, row);
    const float *steps = tensor(table, STEPS, row);
    float *target = tensor(table, TARGET, row);
    uint16_t *copy = tensor(table, COPY, row), *target_copy = tensor(table, TARGET_COPY, row);
    struct adamw numbers = {0};
    if (grad && rule->adamw) numbers = corrected(rule, *steps);
    int64_t begin = start < first ? first - start : 0, stop = (end < last ? end : last) - start;
    if (target && !grad && !copy && !target_copy) {
      AVERAGE_ALONE(target + begin, param + begin, stop - begin, rule->average);
      continue;
    }
    if (grad && !rule->adamw && one && target && !copy == !target_copy) {
      SGD_AVERAGE(param + begin, grad + begin, one + begin, target + begin, copy ? copy + begin : 0,
                  copy ? target_copy + begin : 0, stop - begin, rule);
      continue;
    }
    for (int64_t i = begin; i < stop; i += BLOCK) {
      int64_t count = stop - i < BLOCK ? stop - i : BLOCK;
      if (grad && rule->adamw)
        NAME(adamw)(param + i, grad + i, one + i, two + i, count, &numbers);
      else if (grad && one)
        NAME(sgd)(param + i, grad + i, one + i, count, (float)rule->lr, (float)rule->decay,
                  (float)rule->momentum);
      else if (grad)
        NAME(descend)(param + i, grad + i, count, (float)rule->lr, (float)rule->decay);
      if (target) NAME(average)(target + i, param + i, count, rule->average);
      if (copy) NAME(copy)(copy + i, param + i, count);
      if (target_copy) NAME(copy)(target_copy + i, target + i, count);
    }
  }
}

#undef COPIES
#undef FAR
#undef NEAR
#undef LOOP
#undef AVERAGE_ALONE
#undef SGD_AVERAGE
#undef MULTIPLY_ADD
#undef FUSED
#undef NAME
