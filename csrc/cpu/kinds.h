// What matrices are made of, and what kernels are compiled for.
#pragma once

#include <cstdint>

namespace mendfast {

enum class Kind { float32, bfloat16, float16 };

enum class Isa { avx2, avx512 };

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

}  // namespace mendfast
