// 32- and 16-bit floating-point numbers as the kernels read and write them, a vector at a time in float32.
#pragma once

#include "vectors.h"

namespace mendfast {
namespace {

inline Vector load(const F16* from) { return from_f16(load_halves(from)); }
inline Vector load(const BF16* from) { return vector_of(shifted_left<16>(widened_halves(load_halves(from)))); }

inline float value(float x) { return x; }
inline float value(F16 x) { return _cvtsh_ss(x.bits); }
inline float value(BF16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// ``from`` itself, or its elements in ``room``.
inline const float* widened(const float* from, int64_t, float*) { return from; }
template <class Element>
const float* widened(const Element* from, int64_t count, float* room) {
  for (int64_t i = 0; i < count; ++i) room[i] = value(from[i]);
  return room;
}

// To nearest, ties to even; NaN stays NaN.
inline Words nearest_bf16(Vector x) {
  const Words bits = bits_of(x), odd = both(shifted_right<16>(bits), all_words(1));
  const Words rounded = add(add(bits, all_words(0x7FFF)), odd);
  return where_nan(x, shifted_right<16>(rounded), all_words(0x7FC0));
}

inline void store(BF16* to, Vector x) { store_halves(to, low_halves(nearest_bf16(x))); }
inline void store(F16* to, Vector x) { store_halves(to, to_f16(x)); }

}  // namespace
}  // namespace mendfast
