// The loss of labelled rows under a linear head over a vocabulary, and its gradient, on the CPU.
#pragma once

#include <cstdint>

#include "kinds.h"

namespace mendfast {

// nll[n] = logsumexp(z[n]) - z[n, labels[n]] for z = x w^T + bias, and dx[n] its gradient at x[n], all float32 but w:
// float, BF16 or F16.
template <class Element>
struct LinearNLL {
  const float* x;         // [rows, depth]
  const Element* w;       // [vocabulary, depth]
  const float* bias;      // [vocabulary], or null
  const int64_t* labels;  // [rows], less than vocabulary; a negative one gives 0
  float* nll;             // [rows]
  float* dx;              // [rows, depth] without gaps, or null
  int64_t x_stride, w_stride;  // from row to row, in elements
  int64_t rows, vocabulary, depth;
};

// How many floats linear_nll needs to work in.
template <Isa isa, class Element>
int64_t linear_nll_scratch(const LinearNLL<Element>& loss, int threads);

// The result does not depend on the number of threads, and is that of the widened w.
template <Isa isa, class Element>
void linear_nll(const LinearNLL<Element>& loss, float* scratch, int threads);

}  // namespace mendfast
