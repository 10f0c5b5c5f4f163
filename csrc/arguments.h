// Checks of the arguments, and their way into launches. Plain C++: the tests' emulation shares it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "rank1_update.h"

namespace mendfast {

inline bool by_sixteen(const void* pointer, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * size % 16 == 0;
}

[[noreturn]] inline void refuse(size_t i, const std::string& what) {
  throw std::invalid_argument("rank1_update: matrix " + std::to_string(i) + ": " + what);
}

inline void check_matrix(size_t i, const Matrix& m, int64_t weight_size, int64_t factor_size) {
  if (m.rows < 0 || m.cols < 0 || m.terms < 0) refuse(i, "rows, cols and terms must not be negative");
  if (m.rows == 0 || m.cols == 0 || m.terms == 0) return;
  constexpr int32_t most = INT32_MAX - 1024;
  if (m.rows > most || m.cols > most) refuse(i, "rows and cols must be below 2^31 - 1024");
  if (m.weight_stride < m.cols)
    refuse(i, "weight_stride is " + std::to_string(m.weight_stride) + ", less than the " + std::to_string(m.cols) +
                  " columns");
  if (m.left_stride < m.rows && m.terms > 1) refuse(i, "left_stride is less than the number of rows");
  if (m.right_stride < m.cols && m.terms > 1) refuse(i, "right_stride is less than the number of columns");
  if (!m.weight || !m.left || !m.right) refuse(i, "a pointer is null");
  if (reinterpret_cast<uintptr_t>(m.weight) % weight_size || reinterpret_cast<uintptr_t>(m.left) % factor_size ||
      reinterpret_cast<uintptr_t>(m.right) % factor_size)
    refuse(i, "a pointer is not aligned to its elements");
}

// Checks every matrix, notes its alignment, drops those without anything to do; returns the largest number of terms.
inline int64_t prepare(std::vector<Matrix>& matrices, Dtype weight, Dtype factor) {
  const int64_t weight_size = weight == Dtype::float32 ? 4 : 2, factor_size = factor == Dtype::float32 ? 4 : 2;
  if (factor != Dtype::float32 && factor != weight)
    throw std::invalid_argument("rank1_update: factors must be float32 or of the weight's type");
  int64_t most_terms = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    Matrix& m = matrices[i];
    check_matrix(i, m, weight_size, factor_size);
    m.aligned = (by_sixteen(m.weight, m.weight_stride, weight_size) ? aligned_weight : 0u) |
                (by_sixteen(m.left, m.left_stride, factor_size) ? aligned_left : 0u) |
                (by_sixteen(m.right, m.right_stride, factor_size) ? aligned_right : 0u);
    most_terms = std::max<int64_t>(most_terms, m.terms);
  }
  const auto empty = [](const Matrix& m) { return m.rows == 0 || m.cols == 0 || m.terms == 0; };
  matrices.erase(std::remove_if(matrices.begin(), matrices.end(), empty), matrices.end());
  return most_terms;
}

// Fills one launch with the matrices from `begin` on; returns where the next launch begins.
inline size_t pack(const std::vector<Matrix>& matrices, size_t begin, int tile_rows, int tile_cols, bool stochastic,
                   Group& group) {
  constexpr int64_t most = 1 << 30;
  int64_t tiles = 0;
  group.count = 0;
  group.stochastic = stochastic;
  while (begin < matrices.size() && group.count < max_matrices) {
    Matrix matrix = matrices[begin];
    const int64_t here = ((int64_t{matrix.rows} - 1) / tile_rows + 1) * ((int64_t{matrix.cols} - 1) / tile_cols + 1);
    if (here > most) refuse(begin, "it has more than 2^30 tiles");
    if (tiles + here > most) break;
    matrix.first_tile = static_cast<int32_t>(tiles);
    group.matrices[group.count++] = matrix;
    tiles += here;
    ++begin;
  }
  group.tiles = static_cast<int32_t>(tiles);
  return begin;
}

}  // namespace mendfast
