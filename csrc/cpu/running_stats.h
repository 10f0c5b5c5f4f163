// Rows merged into a running mean and its squared deviations, on the CPU.
#pragma once

#include <cstdint>

#include "kinds.h"

namespace mendfast {

struct Chunk {
  const float* rows;  // [count, width], ``stride`` apart
  const bool* mask;   // [count], or null: all
  int64_t count, width, stride;
};

// How many rows the mask keeps.
template <Isa isa>
int64_t kept_rows(const Chunk& chunk);

// Chan, Golub and LeVeque 1979, in float64: mean and m2 of ``before`` rows become those of before + kept rows.
template <Isa isa, class Element>
void running_stats(const Chunk& chunk, double before, double kept, Element* mean, Element* m2, int threads);

}  // namespace mendfast
