// The loss of labelled rows under a linear head over a vocabulary, and its gradient, on the CPU.
#pragma once

#include <cstdint>

namespace mendfast {

// nll[n] = logsumexp(z[n]) - z[n, labels[n]] for z = x w^T + bias, and dx[n] its gradient at x[n], all float32.
struct LinearNLL {
  const float* x;         // [rows, depth]
  const float* w;         // [vocabulary, depth]
  const float* bias;      // [vocabulary], or null
  const int64_t* labels;  // [rows], less than vocabulary; a negative one gives 0
  float* nll;             // [rows]
  float* dx;              // [rows, depth] without gaps, or null
  int64_t x_stride, w_stride;  // from row to row, in elements
  int64_t rows, vocabulary, depth;
};

// How many floats linear_nll needs to work in.
int64_t linear_nll_scratch(const LinearNLL& loss, int threads);

// The result does not depend on the number of threads.
void linear_nll(const LinearNLL& loss, float* scratch, int threads);

}  // namespace mendfast
