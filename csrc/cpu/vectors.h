// What the kernels for AVX2 share. One translation unit each.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

namespace mendfast {
namespace {

constexpr int64_t LANES = 8;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline float sum_of(__m256 a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_hadd_ps(half, half);
  return _mm_cvtss_f32(_mm_hadd_ps(half, half));
}

// e^x for x <= 0, by its series around the nearest multiple of ln 2; 0 below e^-87, near the smallest normal number.
inline __m256 exp_of(__m256 x) {
  const __m256 lowest = _mm256_set1_ps(-87.0f);
  const __m256 vanishes = _mm256_cmp_ps(x, lowest, _CMP_LT_OQ);
  x = _mm256_max_ps(lowest, x);  // in this order NaN stays
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);  // ln 2 in two parts, as Cephes has them
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 series = _mm256_set1_ps(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    series = _mm256_fmadd_ps(series, r, _mm256_set1_ps(c));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_andnot_ps(vanishes, _mm256_mul_ps(series, _mm256_castsi256_ps(power)));
}

inline float largest(const float* values, int64_t count, float so_far) {
  __m256 top = _mm256_set1_ps(so_far);
  for (int64_t c = 0; c < count; c += LANES) top = _mm256_max_ps(top, _mm256_loadu_ps(values + c));
  alignas(32) float lanes[LANES];
  _mm256_store_ps(lanes, top);
  for (const float lane : lanes) so_far = lane > so_far ? lane : so_far;
  return so_far;
}

}  // namespace
}  // namespace mendfast
