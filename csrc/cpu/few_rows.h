// A product of few rows with a large matrix, on the CPU.
#pragma once

#include <cstdint>

#include "kinds.h"

namespace mendfast {

// y [rows, cols] = x [rows, depth] w [depth, cols] + bias [cols], all float32 but w: float, BF16 or F16.
template <class Element>
struct Product {
  const float* x;
  const Element* w;
  const float* bias;  // or null
  float* y;
  int64_t x_stride, w_stride, y_stride;  // from row to row, in elements
  int64_t rows, cols, depth;
  bool transposed;  // w is kept as [cols, depth]
};

// How many floats few_rows needs to work in.
template <Isa isa, class Element>
int64_t few_rows_scratch(const Product<Element>& product);

// The result does not depend on the number of threads, and is that of the widened w.
template <Isa isa, class Element>
void few_rows(const Product<Element>& product, float* scratch, int threads);

}  // namespace mendfast
