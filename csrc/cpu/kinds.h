// What matrices are made of.
#pragma once

#include <cstdint>

namespace mendfast {

enum class Kind { float32, bfloat16, float16 };

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

}  // namespace mendfast
