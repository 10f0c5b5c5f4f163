// A matrix less a sum of outer products, on the CPU.
#pragma once

#include <cstdint>

#include "kinds.h"

namespace mendfast {

// to [rows, cols] = from [rows, cols] - alpha * sum over terms of left [term, row] * right [term, col]
struct OuterUpdate {
  const void* from;
  void* to;  // the same memory, or none of it
  const float* left;
  const float* right;
  int64_t from_stride, to_stride;  // from row to row, in elements
  int64_t left_term, left_row;     // of left's element (term, row); one of them is 1
  int64_t right_stride;            // from term to term
  int64_t rows, cols, terms;
  float alpha;
  uint64_t seed;  // of stochastic rounding
};

// Whether no factor is NaN or infinite.
template <Isa isa>
bool finite_factors(const OuterUpdate& update);

// How many floats outer_update needs to work in.
template <Isa isa>
int64_t outer_update_scratch(const OuterUpdate& update);

// Sums are float32, rounded once to the matrix's kind: to nearest, or (bfloat16) stochastically, by the draws of
// mendfast.reference.rank1_update. The result does not depend on the number of threads.
template <Isa isa>
void outer_update(const OuterUpdate& update, Kind kind, bool stochastic, float* scratch, int threads);

}  // namespace mendfast
