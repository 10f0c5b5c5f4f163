// While a block of w is in a cache it gives the logits of all rows, and then, times their exponentials, their share
// of the gradient: neither logits nor probabilities are kept, and w is read from memory once. The exponentials are
// those of differences from the largest logit so far; what was summed is scaled when a larger one comes (Milakov and
// Gimelshein 2018, "Online normalizer calculation for softmax").
#include "linear_nll.h"

#include <omp.h>

#include <cfloat>
#include <cmath>

#include "tiles.h"

namespace mendfast {
namespace {

constexpr int64_t MOST_PARTS = 64;       // of the vocabulary, each with sums of its own
constexpr int64_t LEAST_PARTS = 8;
constexpr int64_t SUMS = int64_t{1} << 20;  // floats that all parts' sums may take, where that leaves enough parts

// Floats up to the end of a cache line: what two threads write must not lie on one.
int64_t lines(int64_t floats) { return divide_up(floats, 16) * 16; }

// What a part of the vocabulary leaves behind.
struct Part {
  float* y;    // [rows, stride]: exponentials times rows of w
  float* top;  // [rows]: largest logit
  float* sum;  // [rows]: of the exponentials
};

// How the work is divided; by the shape alone, so that the sums don't depend on the number of threads.
struct Division {
  int64_t rows, block, length, parts, stride;

  template <class Element>
  explicit Division(const LinearNLL<Element>& p) : rows(p.rows) {
    block = deep_of(p.rows);
    stride = p.dx ? divide_up(p.depth, PANEL) * PANEL : 0;
    int64_t most = p.dx ? SUMS / (p.rows * stride) : MOST_PARTS;
    most = most < LEAST_PARTS ? LEAST_PARTS : least(most, MOST_PARTS);
    length = divide_up(divide_up(p.vocabulary, most), block) * block;
    parts = divide_up(p.vocabulary, length);
  }

  int64_t part_size() const { return lines(rows * stride) + 2 * lines(rows); }

  Part part(float* scratch, int64_t i) const {
    float* const y = scratch + i * part_size();
    return {y, y + lines(rows * stride), y + lines(rows * stride) + lines(rows)};
  }
};

// values = exp(values - top); their sum.
float exponentials(float* values, int64_t count, float top) {
  Vector sum = zeros();
  for (int64_t c = 0; c < count; c += LANES) {
    const Vector e = exp_of(subtract(load(values + c), all(top)));
    store(values + c, e);
    sum = add(sum, e);
  }
  return sum_of(sum);
}

// Rows [start, start + length) of w; the labels' logits among theirs go to ``hit`` [rows].
template <class Element>
void run_part(const LinearNLL<Element>& p, const Division& by, int64_t start, const float* pieces, float* z, float* hit,
              const Part& part) {
  for (int64_t n = 0; n < p.rows; ++n) part.top[n] = -FLT_MAX, part.sum[n] = 0.0f;
  __builtin_memset(part.y, 0, p.rows * by.stride * sizeof(float));
  const int64_t end = least(p.vocabulary, start + by.length);
  for (int64_t v = start; v < end; v += by.block) {
    const int64_t width = least(by.block, end - v);
    const Element* w = p.w + v * p.w_stride;
    const float* bias = p.bias ? p.bias + v : nullptr;
    const Product<Element> logits_of = {nullptr, w, bias, z, 0, p.w_stride, by.block, p.rows, width, p.depth, true};
    dot_columns(logits_of, pieces, 0, width);
    for (int64_t n = 0; n < p.rows; ++n) {
      float* logits = z + n * by.block;
      if (p.labels[n] >= v && p.labels[n] < v + width) hit[n] = logits[p.labels[n] - v];
      for (int64_t c = width; c < by.block; ++c) logits[c] = -INFINITY;
      const float top = largest(logits, by.block, part.top[n]);
      if (top > part.top[n]) {
        const float scale = std::exp(part.top[n] - top);
        part.top[n] = top;
        part.sum[n] *= scale;
        for (int64_t k = 0; k < by.stride; ++k) part.y[n * by.stride + k] *= scale;
      }
      part.sum[n] += exponentials(logits, by.block, top);
    }
    if (!p.dx) continue;
    // the rest of w, so that the next block is asked for
    const int64_t rest = p.vocabulary - v;
    const Product<Element> gradient = {z,      w,       nullptr, nullptr, by.block, p.w_stride, 0,
                                       p.rows, p.depth, rest,    false};
    for (int64_t k = 0; k < p.depth; k += PANEL) outer_panel(gradient, k, 0, width, part.y + k, by.stride);
  }
}

// Row n of the result, from all parts'.
template <class Element>
void gather(const LinearNLL<Element>& p, const Division& by, int64_t n, float* scratch, float hit) {
  float* dx = p.dx ? p.dx + n * p.depth : nullptr;
  if (p.labels[n] < 0) {
    p.nll[n] = 0.0f;
    if (dx) __builtin_memset(dx, 0, p.depth * sizeof(float));
    return;
  }
  float top = -FLT_MAX;
  for (int64_t i = 0; i < by.parts; ++i) {
    const float other = by.part(scratch, i).top[n];
    top = other > top ? other : top;
  }
  double sum = 0.0;
  for (int64_t i = 0; i < by.parts; ++i) {
    const Part part = by.part(scratch, i);
    sum += std::exp(part.top[n] - top) * double{part.sum[n]};
  }
  p.nll[n] = static_cast<float>(std::log(sum) + (top - hit));
  if (!dx) return;
  const Element* label = p.w + p.labels[n] * p.w_stride;
  for (int64_t k = 0; k < p.depth; ++k) dx[k] = -value(label[k]);
  for (int64_t i = 0; i < by.parts; ++i) {
    const Part part = by.part(scratch, i);
    const float scale = static_cast<float>(std::exp(part.top[n] - top) / sum);
    for (int64_t k = 0; k < p.depth; ++k) dx[k] += scale * part.y[n * by.stride + k];
  }
}

}  // namespace

template <Isa isa, class Element>
int64_t linear_nll_scratch(const LinearNLL<Element>& p, int threads) {
  const Division by(p);
  const int64_t pieces = p.rows * divide_up(p.depth, dot_depth(p.depth, p.rows)) * dot_depth(p.depth, p.rows);
  return by.parts * by.part_size() + threads * lines(p.rows * by.block) + lines(p.rows) + pieces;
}

template <Isa isa, class Element>
void linear_nll(const LinearNLL<Element>& p, float* scratch, int threads) {
  const Division by(p);
  float* const blocks = scratch + by.parts * by.part_size();
  float* const hits = blocks + threads * lines(p.rows * by.block);
  float* const pieces = hits + lines(p.rows);
  const Product<Element> all = {p.x, p.w,    nullptr,      nullptr, p.x_stride, p.w_stride,
                                0,   p.rows, p.vocabulary, p.depth, true};
#pragma omp parallel num_threads(threads)
  {
    float* const z = blocks + omp_get_thread_num() * lines(p.rows * by.block);
    split_depth(all, pieces);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < by.parts; ++i) run_part(p, by, i * by.length, pieces, z, hits, by.part(scratch, i));
#pragma omp for
    for (int64_t n = 0; n < p.rows; ++n) gather(p, by, n, scratch, hits[n]);
  }
}

template int64_t linear_nll_scratch<ISA>(const LinearNLL<float>&, int);
template int64_t linear_nll_scratch<ISA>(const LinearNLL<BF16>&, int);
template int64_t linear_nll_scratch<ISA>(const LinearNLL<F16>&, int);
template void linear_nll<ISA>(const LinearNLL<float>&, float*, int);
template void linear_nll<ISA>(const LinearNLL<BF16>&, float*, int);
template void linear_nll<ISA>(const LinearNLL<F16>&, float*, int);

}  // namespace mendfast
