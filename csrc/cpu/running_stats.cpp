// One pass: differences from the chunk's first kept row, x_0, and their squares are summed in float64. With n rows the
// squares are sum (x - mean)^2 + n (mean - x_0)^2, and the second term is at most n times the first, in which x_0 is
// one of the rows: what is subtracted costs no more than a factor of n + 1 of float64's rounding.
#include "running_stats.h"

#include <omp.h>

#include "vectors.h"

namespace mendfast {
namespace {

constexpr int64_t WIDTH = 64;  // columns at a time

template <class Element>
void merge(const Chunk& chunk, int64_t col, int64_t width, double before, double kept, Element* mean, Element* m2) {
  double first[WIDTH] = {}, sum[WIDTH] = {}, squares[WIDTH] = {};
  bool started = false;
  for (int64_t n = 0; n < chunk.count; ++n) {
    if (chunk.mask && !chunk.mask[n]) continue;
    const float* row = chunk.rows + n * chunk.stride + col;
    if (!started) {
      for (int64_t c = 0; c < width; ++c) first[c] = row[c];
      started = true;
      for (int64_t c = 0; c < width; ++c) sum[c] = first[c] - first[c];  // NaN where it is not finite
      continue;
    }
    for (int64_t c = 0; c < width; ++c) {
      const double difference = row[c] - first[c];
      sum[c] += difference;
      squares[c] += difference * difference;
    }
  }
  const double total = before + kept, weight = kept / (total < 1 ? 1 : total), share = 1 / kept;
  for (int64_t c = 0; c < width; ++c) {
    const double off = sum[c] * share, rest = squares[c] - sum[c] * off, spread = rest < 0 ? 0.0 : rest;
    const double difference = first[c] + off - mean[col + c];
    m2[col + c] = static_cast<Element>(m2[col + c] + spread + difference * difference * (before * weight));
    mean[col + c] = static_cast<Element>(mean[col + c] + difference * weight);
  }
}

}  // namespace

template <>
int64_t kept_rows<ISA>(const Chunk& chunk) {
  if (!chunk.mask) return chunk.count;
  int64_t kept = 0;
  for (int64_t n = 0; n < chunk.count; ++n) kept += chunk.mask[n];
  return kept;
}

template <Isa isa, class Element>
void running_stats(const Chunk& chunk, double before, double kept, Element* mean, Element* m2, int threads) {
  const int64_t blocks = divide_up(chunk.width, WIDTH);
  if (chunk.count * chunk.width < 1 << 15) threads = 1;
#pragma omp parallel for num_threads(threads)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t col = block * WIDTH;
    if (col + WIDTH <= chunk.width)
      merge(chunk, col, WIDTH, before, kept, mean, m2);
    else
      merge(chunk, col, chunk.width - col, before, kept, mean, m2);
  }
}

template void running_stats<ISA>(const Chunk&, double, double, float*, float*, int);
template void running_stats<ISA>(const Chunk&, double, double, double*, double*, int);

}  // namespace mendfast
