/* The taps of an axis, included once for every type of numbers. REAL: float or double.
 * WEIGHTS: the name of the function. All roundings are PyTorch's. */

/* Sets `start`, `count` and the weights of an axis. size: pixels of the crop. side: of the view.
 * weights: (side, most). Returns the most taps of a pixel. */
static int WEIGHTS(struct axis *axis, REAL *weights, int size, int side) {
  REAL scale = (REAL)size / side;
  REAL reach = scale >= 1 ? scale : 1, inverse = scale >= 1 ? (REAL)(1.0 / scale) : 1;
  int limit = 2 * (int)ceilf((float)reach) + 1, most = 0;
  for (int i = 0; i < side; i++, weights += axis->most) {
    REAL center = (REAL)(scale * (i + 0.5)), total = 0;
    int start = (int)(center - reach + 0.5), stop = (int)(center + reach + 0.5), taps;
    start = start > 0 ? start : 0;
    stop = stop < size ? stop : size;
    taps = stop - start < limit ? stop - start : limit;
    for (int j = 0; j < taps; j++) {
      REAL away = (REAL)fabs((REAL)((start + j - center + 0.5) * inverse));
      weights[j] = away < 1 ? 1 - away : 0;
      total += weights[j];
    }
    for (int j = 0; j < taps; j++) weights[j] /= total;
    for (int j = taps; j < axis->most; j++) weights[j] = 0;
    axis->start[i] = start;
    axis->count[i] = taps;
    most = taps > most ? taps : most;
  }
  return most;
}

#undef REAL
#undef WEIGHTS
