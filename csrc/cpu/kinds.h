#pragma once

namespace mendfast {

enum class Kind { float32, bfloat16, float16 };

}  // namespace mendfast
