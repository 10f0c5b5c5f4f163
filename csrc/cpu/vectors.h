// Vectors of float32 as the kernels use them, of the widest kind that a translation unit is compiled for: each source
// is compiled once for AVX2 and once for AVX-512. One translation unit each.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

#include "kinds.h"

namespace mendfast {
namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#ifdef __AVX512F__

constexpr Isa ISA = Isa::avx512;
using Vector = __m512;
using Words = __m512i;   // as many of 32 bits,
using Halves = __m256i;  // and of 16

inline Vector zeros() { return _mm512_setzero_ps(); }
inline Vector all(float x) { return _mm512_set1_ps(x); }
inline Words all_words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
inline Halves load_halves(const void* from) { return _mm256_loadu_si256(static_cast<const Halves*>(from)); }
inline void store_halves(void* to, Halves x) { _mm256_storeu_si256(static_cast<Halves*>(to), x); }

inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }       // a b + c
inline Vector multiply_subtract(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }  // b, where one is NaN
inline Vector nearest(Vector x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x, but 0 where a < b
inline Vector unless_less(Vector a, Vector b, Vector x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), x);
}

// x, but 0 where a is 0
inline Vector unless_zero(Vector a, Vector x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, zeros(), _CMP_NEQ_UQ), x);
}

inline Words bits_of(Vector x) { return _mm512_castps_si512(x); }
inline Vector vector_of(Words bits) { return _mm512_castsi512_ps(bits); }
inline Words words_of(Vector x) { return _mm512_cvtps_epi32(x); }
inline Words widened_halves(Halves x) { return _mm512_cvtepu16_epi32(x); }
inline Halves low_halves(Words x) { return _mm512_cvtepi32_epi16(x); }
inline Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
template <int count>
Words shifted_left(Words x) { return _mm512_slli_epi32(x, count); }
template <int count>
Words shifted_right(Words x) { return _mm512_srli_epi32(x, count); }
// b where x is NaN, else a
inline Words where_nan(Vector x, Words a, Words b) {
  return _mm512_mask_mov_epi32(a, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), b);
}
// b where x > y as signed numbers, else a
inline Words where_greater(Words x, Words y, Words a, Words b) {
  return _mm512_mask_mov_epi32(a, _mm512_cmpgt_epi32_mask(x, y), b);
}
inline Vector from_f16(Halves x) { return _mm512_cvtph_ps(x); }
inline Halves to_f16(Vector x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// [sum of a, sum of b, sum of c, sum of d]
inline __m128 sums_of(Vector a, Vector b, Vector c, Vector d) {
  const Vector ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vector cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vector quarters = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}
inline float sum_of(Vector a) { return _mm512_reduce_add_ps(a); }

#else

constexpr Isa ISA = Isa::avx2;
using Vector = __m256;
using Words = __m256i;
using Halves = __m128i;

inline Vector zeros() { return _mm256_setzero_ps(); }
inline Vector all(float x) { return _mm256_set1_ps(x); }
inline Words all_words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vector x) { _mm256_storeu_ps(to, x); }
inline Halves load_halves(const void* from) { return _mm_loadu_si128(static_cast<const Halves*>(from)); }
inline void store_halves(void* to, Halves x) { _mm_storeu_si128(static_cast<Halves*>(to), x); }

inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector multiply_subtract(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }
inline Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector nearest(Vector x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vector unless_less(Vector a, Vector b, Vector x) {
  return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ), x);
}

inline Vector unless_zero(Vector a, Vector x) {
  return _mm256_and_ps(_mm256_cmp_ps(a, zeros(), _CMP_NEQ_UQ), x);
}

inline Words bits_of(Vector x) { return _mm256_castps_si256(x); }
inline Vector vector_of(Words bits) { return _mm256_castsi256_ps(bits); }
inline Words words_of(Vector x) { return _mm256_cvtps_epi32(x); }
inline Words widened_halves(Halves x) { return _mm256_cvtepu16_epi32(x); }
inline Halves low_halves(Words x) {
  x = _mm256_and_si256(x, _mm256_set1_epi32(0xFFFF));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0xD8));
}
inline Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
inline Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
template <int count>
Words shifted_left(Words x) { return _mm256_slli_epi32(x, count); }
template <int count>
Words shifted_right(Words x) { return _mm256_srli_epi32(x, count); }
inline Words where_nan(Vector x, Words a, Words b) {
  return _mm256_blendv_epi8(a, b, bits_of(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
inline Words where_greater(Words x, Words y, Words a, Words b) {
  return _mm256_blendv_epi8(a, b, _mm256_cmpgt_epi32(x, y));
}
inline Vector from_f16(Halves x) { return _mm256_cvtph_ps(x); }
inline Halves to_f16(Vector x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline __m128 sums_of(Vector a, Vector b, Vector c, Vector d) {
  const Vector halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}
inline float sum_of(Vector a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_hadd_ps(half, half);
  return _mm_cvtss_f32(_mm_hadd_ps(half, half));
}

#endif

constexpr int64_t LANES = sizeof(Vector) / sizeof(float);

// e^x for x <= 0, by its series around the nearest multiple of ln 2; 0 below e^-87, near the smallest normal number.
inline Vector exp_of(Vector x) {
  const Vector lowest = all(-87.0f), given = x;
  x = larger(lowest, x);  // in this order NaN stays
  const Vector n = nearest(multiply(x, all(1.44269504f)));
  Vector r = multiply_subtract(n, all(0.693359375f), x);  // ln 2 in two parts, as Cephes has them
  r = multiply_subtract(n, all(-2.12194440e-4f), r);
  Vector series = all(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    series = multiply_add(series, r, all(c));
  const Vector power = vector_of(shifted_left<23>(add(words_of(n), all_words(127))));
  return unless_less(given, lowest, multiply(series, power));
}

inline float largest(const float* values, int64_t count, float so_far) {
  Vector top = all(so_far);
  for (int64_t c = 0; c < count; c += LANES) top = larger(top, load(values + c));
  float lanes[LANES];
  store(lanes, top);
  for (const float lane : lanes) so_far = lane > so_far ? lane : so_far;
  return so_far;
}

}  // namespace
}  // namespace mendfast
