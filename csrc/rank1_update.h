// W <- W - alpha sum_i delta_i u_i^T for a group of matrices, in place (Mitchell et al. 2022, Algorithm 2).
#pragma once

#include <cstdint>
#include <vector>

namespace mendfast {

enum class Dtype : int32_t { float32, bfloat16, float16 };
enum class Path : int32_t { automatic, fma, mma };

// W [rows, cols] loses alpha * left^T right. An nn.Linear's weight has left = delta, right = u; a Conv1D's the reverse.
struct Matrix {
  void* weight;
  const void* left;   // [terms, rows]
  const void* right;  // [terms, cols]
  int64_t weight_stride, left_stride, right_stride;  // elements from one row to the next
  uint64_t seed;                                     // of stochastic rounding
  int32_t rows, cols, terms;
  float alpha;
  int32_t first_tile;  // within its launch
  uint32_t aligned;    // Aligned: which of the three can be read 16 bytes at a time
};

enum Aligned : uint32_t { aligned_weight = 1, aligned_left = 2, aligned_right = 4 };

// Passed by value as the kernel's parameter: nothing is allocated or copied at a launch.
constexpr int max_matrices = 32;
struct Group {
  Matrix matrices[max_matrices];
  int32_t count, tiles;
  bool stochastic;
};
static_assert(sizeof(Group) <= 4096, "kernel parameters end at 4 KiB");

// True where tensor cores are expected to beat multiply-adds, in a 16-bit weight. An estimate from the ratio of
// arithmetic to bandwidth of A100 and H100 (about 9 float32 multiply-adds for a byte moved), not a measurement: an
// element is read and written once, 4 bytes, so multiply-adds keep up with memory until some 35 terms at the peak of
// both, and in practice until about half of that. Many terms of float32 weights are cuBLAS's (mendfast/ops).
constexpr bool prefers_mma(int64_t terms, Dtype weight) { return weight != Dtype::float32 && terms > 16; }

// Updates every matrix on `stream` of `device`; returns the number of kernels launched, one for each `max_matrices`.
// Throws std::invalid_argument before anything is launched, std::runtime_error with CUDA's text after.
int rank1_update_group(std::vector<Matrix> matrices, Dtype weight, Dtype factor, bool stochastic, int device,
                       uintptr_t stream, Path path);

// Why no kernel can run here ("no CUDA driver: ..."), or an empty string. Starts nothing on a device.
const char* device_problem();

}  // namespace mendfast
