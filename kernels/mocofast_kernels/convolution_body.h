/* The functions of convolution.c for one type of elements and one set of instructions. Before the
 * inclusion define
 *
 *   NAME(x)  the name of a function of this type
 *   TARGET   the attribute of functions that use the instructions
 *   element  the type of an element
 *   PAIR     elements in a word of 32 bits: 2 of bfloat16, 1 of float32
 *   LANES    float32 or words in a vector
 *   PANEL    columns of weights at a time
 *   SHORT    rows whose sums are in registers beside the vectors of a panel
 *   TALL     rows beside two vectors at most
 *   sums_t, words_t  vectors of float32 and of words
 *   ZERO(), LOAD_SUMS(from), STORE_SUMS(to, sums), LOAD_WORDS(from), STORE_WORDS(to, words)
 *   LOAD_SOME(from, count)   some words, then zeros
 *   BROADCAST(from)          a word, in all lanes
 *   TRANSPOSE(square)        LANES x LANES words
 *   ADD(sum, x, w)           adds the products of the words of x and w to sum
 *   STORE(to, sums)          stores sums as elements
 *   COPY(out, a, b, count)   stores words of rows of elements: of bfloat16 a[0] b[0], a[1] b[1] and
 *                            so on (zeros where b is NULL), of float32 a alone
 */

#define VECTORS (PANEL / LANES)
#if VECTORS == 2
#define CHOOSE(vectors, name) ((void)(vectors), NAME(name##_2))
#else
#define CHOOSE(vectors, name)       \
  (vectors == 4   ? NAME(name##_4)  \
   : vectors == 3 ? NAME(name##_3)  \
   : vectors == 2 ? NAME(name##_2)  \
                  : NAME(name##_1))
#endif

/* ---- products over taps ---- */

/* Computes `height` pixels of the result, `vectors` vectors of channels of each. */
INLINE TARGET void NAME(pixels)(const struct gather *g, const element *source,
                                const uint32_t *panel, element *result, int64_t row, int64_t class,
                                int64_t column, const int height, const int vectors) {
  sums_t sum[TALL][VECTORS];
  const element *from[TALL];
  UNROLL for (int r = 0; r < height; r++) {
    UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = ZERO();
    from[r] = source + (int64_t)g->from[row + r] * g->depth;
  }
  /* The next pixels. `from` has as many more entries. */
  UNROLL for (int r = 0; r < height; r++) {
    const char *next = (const char *)(source + (int64_t)g->from[row + height + r] * g->depth);
    for (int64_t b = 0; b < g->depth * (int64_t)sizeof(element); b += 64)
      _mm_prefetch(next + b, _MM_HINT_T0);
  }
  for (int64_t t = g->class_taps[class]; t < g->class_taps[class + 1]; t++) {
    const int64_t begin = (int64_t)g->offset[t] * g->depth;
    const uint32_t *weights = panel + g->tap[t] * (g->depth / PAIR) * (vectors * LANES);
    for (int64_t k = begin; k < begin + g->depth; k += PAIR) {
      words_t w[VECTORS];
      UNROLL for (int v = 0; v < vectors; v++) w[v] = LOAD_WORDS(weights + v * LANES);
      weights += vectors * LANES;
      UNROLL for (int r = 0; r < height; r++) {
        const words_t x = BROADCAST(from[r] + k);
        UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = ADD(sum[r][v], x, w[v]);
      }
    }
  }
  UNROLL for (int r = 0; r < height; r++) {
    element *to = result + (int64_t)g->to[row + r] * g->width + column;
    UNROLL for (int v = 0; v < vectors; v++) STORE(to + v * LANES, sum[r][v]);
  }
}

#define CASE(height, vectors) \
  case height: NAME(pixels)(g, source, panel, result, row, class, column, height, vectors); break;
#define ROWS(name, tallest, vectors, cases)                                                       \
  static TARGET void NAME(name)(const struct gather *g, const element *source,                    \
                                const uint32_t *panel, element *result, int64_t row, int64_t end, \
                                int64_t class, int64_t column) {                                  \
    for (; row < end; row += tallest) switch (end - row) {                                        \
        default: cases(CASE, vectors)                                                             \
      }                                                                                           \
  }
#if VECTORS == 2
ROWS(rows_2, TALL, 2, UP_TO_6)
#else
ROWS(rows_1, TALL, 1, UP_TO_12)
ROWS(rows_2, TALL, 2, UP_TO_12)
ROWS(rows_3, SHORT, 3, UP_TO_6)
ROWS(rows_4, SHORT, 4, UP_TO_6)
#endif
#undef ROWS
#undef CASE

/* Lays out weights (width, taps, depth) as panel[tap][word of depth][column]. */
static TARGET void NAME(pack_rows)(const struct gather *g, const element *weights, int64_t column,
                                   int vectors, uint32_t *panel) {
  const int64_t words = g->depth / PAIR;
  for (int64_t t = 0; t < g->taps; t++)
    for (int64_t k = 0; k < words; k += LANES) {
      const int64_t count = words - k < LANES ? words - k : LANES;
      for (int v = 0; v < vectors; v++) {
        words_t square[LANES];
        UNROLL for (int i = 0; i < LANES; i++) {
          const int64_t row = (column + v * LANES + i) * g->taps + t;
          square[i] = LOAD_SOME(weights + row * g->depth + k * PAIR, count);
        }
        TRANSPOSE(square);
        uint32_t *out = panel + ((t * words + k) * vectors + v) * LANES;
        for (int i = 0; i < count; i++) STORE_WORDS(out + i * vectors * LANES, square[i]);
      }
    }
}

/* Lays out weights (depth, taps, width) in the same way. */
static TARGET void NAME(pack_columns)(const struct gather *g, const element *weights,
                                      int64_t column, int vectors, uint32_t *panel) {
  const int64_t words = g->depth / PAIR, stride = g->taps * g->width;
  for (int64_t k = 0; k < words; k++)
    for (int64_t t = 0; t < g->taps; t++) {
      const element *from = weights + k * PAIR * stride + t * g->width + column;
      uint32_t *out = panel + (t * words + k) * vectors * LANES;
      COPY(out, from, from + stride, vectors * LANES);
    }
}

/* Computes a part: some panels of columns, and of each class of pixels a share. */
static TARGET void NAME(gather_part)(const struct gather_job *job, int64_t part) {
  const struct gather *g = job->g;
  const int64_t panels = (g->width + PANEL - 1) / PANEL, groups = divisor(panels, job->parts);
  const int64_t members = job->parts / groups, group = part / members, member = part % members;
  uint32_t *panel = job->scratch + part * g->taps * (g->depth / PAIR) * PANEL;
  for (int64_t column = group * PANEL; column < g->width; column += groups * PANEL) {
    const int vectors = (int)(least(g->width - column, PANEL) / LANES);
    if (job->transposed)
      NAME(pack_columns)(g, job->weights, column, vectors, panel);
    else
      NAME(pack_rows)(g, job->weights, column, vectors, panel);
    for (int64_t class = 0; class < g->classes; class++) {
      const int64_t first = g->class_rows[class], count = g->class_rows[class + 1] - first;
      const int64_t blocks = (count + TALL - 1) / TALL;
      const int64_t begin = first + blocks * member / members * TALL;
      const int64_t end = first + least(count, blocks * (member + 1) / members * TALL);
      CHOOSE(vectors, rows)(g, job->source, panel, job->result, begin, end, class, column);
    }
  }
}

/* ---- gradient of the weights ---- */

/* Lays out `count` channels of some pixels of some images as
 * out[pixel][word of images][channel]. */
static TARGET void NAME(pack_images)(const element *images, int64_t image, int64_t last_image,
                                     int64_t pixels, int64_t channels, int64_t channel,
                                     int64_t count, int64_t pixel, int64_t end, uint32_t *out) {
  const int64_t stride = pixels * channels;
  for (; pixel < end; pixel++)
    for (int64_t i = image; i < last_image; i += PAIR) {
      const element *a = images + i * stride + pixel * channels + channel;
      const element *b = i + 1 < last_image ? a + stride : NULL;
      COPY(out, a, b, count);
      out += count;
    }
}

/* Adds a chunk's products to the gradients of `height` outputs and `vectors` vectors of inputs. */
INLINE TARGET void NAME(gradients)(const struct weights *s, const uint32_t *outputs,
                                   const uint32_t *inputs, int64_t link, int64_t end,
                                   int64_t first_output, int64_t first_input, int64_t words,
                                   int64_t stride, float *sums, int first, const int height,
                                   const int vectors) {
  sums_t sum[TALL][VECTORS];
  const int64_t row = s->taps * s->depth;
  UNROLL for (int r = 0; r < height; r++)
    UNROLL for (int v = 0; v < vectors; v++)
      sum[r][v] = first ? ZERO() : LOAD_SUMS(sums + r * row + v * LANES);
  for (; link < end; link++) {
    const uint32_t *g = outputs + (s->output[link] - first_output) * words * stride;
    const uint32_t *x = inputs + (s->input[link] - first_input) * words * (vectors * LANES);
    for (int64_t i = 0; i < words; i++, g += stride, x += vectors * LANES) {
      words_t w[VECTORS];
      UNROLL for (int v = 0; v < vectors; v++) w[v] = LOAD_WORDS(x + v * LANES);
      UNROLL for (int r = 0; r < height; r++) {
        const words_t gradient = BROADCAST(g + r);
        UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = ADD(sum[r][v], gradient, w[v]);
      }
    }
  }
  UNROLL for (int r = 0; r < height; r++)
    UNROLL for (int v = 0; v < vectors; v++)
      STORE_SUMS(sums + r * row + v * LANES, sum[r][v]);
}

#define CASE(height, vectors)                                                                     \
  case height:                                                                                    \
    NAME(gradients)(s, outputs, inputs, link, end, first_output, first_input, words, stride, sums, \
                    first, height, vectors);                                                      \
    break;
#define BLOCK(name, vectors, cases)                                                               \
  static TARGET void NAME(name)(const struct weights *s, const uint32_t *outputs,                 \
                                const uint32_t *inputs, int64_t link, int64_t end,                \
                                int64_t first_output, int64_t first_input, int64_t words,         \
                                int64_t stride, float *sums, int first, int64_t height) {         \
    switch (height) { default: cases(CASE, vectors) }                                             \
  }
#if VECTORS == 2
BLOCK(block_2, 2, UP_TO_6)
#else
BLOCK(block_1, 1, UP_TO_12)
BLOCK(block_2, 2, UP_TO_12)
BLOCK(block_3, 3, UP_TO_6)
BLOCK(block_4, 4, UP_TO_6)
#endif
#undef BLOCK
#undef CASE

/* Adds a chunk's products to the gradients of a range of outputs and a panel of inputs. */
static TARGET void NAME(panel_gradients)(const struct weights_job *job, const uint32_t *outputs,
                                         const uint32_t *inputs, int64_t begin, int64_t end,
                                         int64_t column, int64_t chunk, int64_t words,
                                         int first) {
  const struct weights *s = job->s;
  const int64_t *bounds = s->bounds + 4 * chunk, *links = s->tap_links + chunk * s->taps;
  const int64_t vectors = least(s->depth - column, PANEL) / LANES;
  const int64_t tallest = s->depth > 2 * LANES ? SHORT : TALL;
  for (int64_t t = 0; t < s->taps; t++)
    for (int64_t o = begin; o < end; o += tallest) {
      float *sums = job->sums + (o * s->taps + t) * s->depth + column;
      const int64_t group = (o - begin) / GROUP * GROUP, stride = least(end - begin - group, GROUP);
      const uint32_t *from = outputs + group * (bounds[1] - bounds[0]) * words + o - begin - group;
      CHOOSE(vectors, block)(s, from, inputs, links[t], links[t + 1], bounds[0], bounds[2], words,
                             stride, sums, first, least(end - o, tallest));
    }
}

/* Computes a part: some panels of inputs, and a share of the outputs. */
static TARGET void NAME(weights_part)(const struct weights_job *job, int64_t part) {
  const struct weights *s = job->s;
  const int64_t panels = (s->depth + PANEL - 1) / PANEL, groups = divisor(panels, job->parts);
  const int64_t members = job->parts / groups, group = part / members, member = part % members;
  const int64_t blocks = (s->width + TALL - 1) / TALL;
  const int64_t begin = blocks * member / members * TALL;
  const int64_t end = least(s->width, blocks * (member + 1) / members * TALL);
  uint32_t *inputs = job->scratch + part * job->scratch_words;
  uint32_t *outputs = inputs + s->most_inputs * (s->images_at_a_time / PAIR) * PANEL;
  for (int64_t chunk = 0; chunk < s->chunks; chunk++)
    for (int64_t image = 0; image < s->images; image += s->images_at_a_time) {
      const int64_t *bounds = s->bounds + 4 * chunk;
      const int64_t last_image = least(s->images, image + s->images_at_a_time);
      const int64_t words = (last_image - image + PAIR - 1) / PAIR;
      for (int64_t o = begin; o < end; o += GROUP)
        NAME(pack_images)(job->gradient, image, last_image, s->output_pixels, s->width, o,
                          least(end - o, GROUP), bounds[0], bounds[1],
                          outputs + (o - begin) * (bounds[1] - bounds[0]) * words);
      for (int64_t c = group * PANEL; c < s->depth; c += groups * PANEL) {
        NAME(pack_images)(job->images, image, last_image, s->input_pixels, s->depth, c,
                          least(s->depth - c, PANEL), bounds[2], bounds[3], inputs);
        NAME(panel_gradients)(job, outputs, inputs, begin, end, c, chunk, words,
                              chunk + image == 0);
      }
    }
}

#undef VECTORS
#undef CHOOSE
#undef NAME
#undef element
#undef PAIR
#undef ADD
#undef STORE
#undef COPY
