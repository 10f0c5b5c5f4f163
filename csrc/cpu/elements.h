// 32- and 16-bit floating-point numbers as the kernels read and write them, eight at a time in float32.
#pragma once

#include "kinds.h"
#include "vectors.h"

namespace mendfast {
namespace {

inline __m256 load(const float* from) { return _mm256_loadu_ps(from); }
inline __m256 load(const F16* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
inline __m256 load(const BF16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

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

// The low halves of eight words.
inline void store_halves(uint16_t* to, __m256i words) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

// To nearest, ties to even; NaN stays NaN.
inline __m256i nearest_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7FC0), nan);
}

inline void store(float* to, __m256 x) { _mm256_storeu_ps(to, x); }
inline void store(BF16* to, __m256 x) { store_halves(&to->bits, nearest_bf16(x)); }
inline void store(F16* to, __m256 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace
}  // namespace mendfast
