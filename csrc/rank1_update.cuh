// What both kernels share (tiles, rounding, access to W), and the kernel for few terms.
#pragma once

#include "primitives.cuh"
#include "rank1_update.h"

namespace mendfast {

constexpr int threads = 256;

struct Tile {
  int matrix, row, col;
};

template <int rows_of_tile, int cols_of_tile>
__device__ __forceinline__ Tile find_tile(const Group& group, int index) {
  int i = 0;
  while (i + 1 < group.count && group.matrices[i + 1].first_tile <= index) ++i;
  const int tiles_across = (group.matrices[i].cols - 1) / cols_of_tile + 1;
  const int local = index - group.matrices[i].first_tile;
  return {i, local / tiles_across * rows_of_tile, local % tiles_across * cols_of_tile};
}

// Starts the next tile's way from memory while this one is worked on.
template <typename W, int rows_of_tile, int cols_of_tile>
__device__ __forceinline__ void prefetch_tile(const Matrix& matrix, int row0, int col0) {
  constexpr int line = 128 / sizeof(W), lines_across = cols_of_tile / line;
  for (int i = thread_index(); i < rows_of_tile * lines_across; i += threads) {
    const int row = row0 + i / lines_across, col = col0 + i % lines_across * line;
    if (row < matrix.rows && col < matrix.cols)
      prefetch_l2(static_cast<const W*>(matrix.weight) + row * matrix.weight_stride + col);
  }
}

// Philox4x32-10 (Salmon et al. 2011): 128 random bits, a function of seed, row and block of eight columns alone, so
// that the same seed rounds the same way whatever the tiling, the kernel or the device.
__device__ __forceinline__ Words4 philox(uint64_t seed, uint32_t block, uint32_t row) {
  uint32_t c0 = block, c1 = row, c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = multiply_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Toward zero, plus one unit in the last place where the part cut off, in units of 2^-16, and `draw` (16 random bits)
// together reach one unit. What would become infinite, or is, is rounded to nearest.
__device__ __forceinline__ uint16_t stochastic(float value, uint32_t draw, bf16) {
  constexpr uint32_t exponent = 0x7f800000u;
  const uint32_t bits = float_to_word(value), moved = bits + draw;
  const bool finite = (bits & exponent) != exponent && (moved & exponent) != exponent;
  return finite ? static_cast<uint16_t>(moved >> 16) : nearest(value, bf16{});
}
__device__ __forceinline__ uint16_t stochastic(float value, uint32_t draw, f16) {
  constexpr uint32_t infinity = 0x7c00u;
  const uint16_t low = f16_toward_zero(value), high = low + 1;
  if ((low & infinity) == infinity || (high & infinity) == infinity) return nearest(value, f16{});
  const float below = to_float(f16{low});
  // One unit in the last place is a power of two, its reciprocal a subtraction of exponents.
  const uint32_t unit = float_to_word(fabsf(to_float(f16{high}) - below));
  const float cut_off = fabsf(value - below) * word_to_float(0x7f000000u - unit);
  return cut_off * 65536.f > 65535.5f - static_cast<float>(draw) ? high : low;
}

// `width` consecutive elements of a row of W, as 32-bit words in registers.
template <typename W, int width>
struct Segment {
  static constexpr int words = width * sizeof(W) / 4;
  uint32_t word[words];

  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(W) == 4) {
      return word_to_float(word[i]);
    } else {
      return to_float(W{static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16))});
    }
  }

  // `count` elements lie within the matrix.
  __device__ __forceinline__ void load(const W* source, int count, bool aligned) {
    if (aligned && count >= width) {
#pragma unroll
      for (int i = 0; i < words; i += 4) {
        const Words4 part = load_streaming(reinterpret_cast<const uint32_t*>(source) + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) word[i + j] = part.word[j];
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < words; ++i) word[i] = 0;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      if (i >= count) continue;
      if constexpr (sizeof(W) == 4) {
        word[i] = float_to_word(source[i]);
      } else {
        word[i / 2] |= static_cast<uint32_t>(source[i].bits) << (i % 2 * 16);
      }
    }
  }

  __device__ __forceinline__ void store(W* target, int count, bool aligned) const {
    if (aligned && count >= width) {
#pragma unroll
      for (int i = 0; i < words; i += 4)
        store_streaming(reinterpret_cast<uint32_t*>(target) + i,
                        Words4{{word[i], word[i + 1], word[i + 2], word[i + 3]}});
      return;
    }
#pragma unroll
    for (int i = 0; i < width; ++i) {
      if (i >= count) continue;
      if constexpr (sizeof(W) == 4) {
        target[i] = word_to_float(word[i]);
      } else {
        target[i] = W{static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16))};
      }
    }
  }

  // Subtracts alpha * sum. 16-bit elements come in whole blocks of eight columns.
  __device__ __forceinline__ void subtract(const float (&sum)[width], float alpha, bool draws, uint64_t seed, int row,
                                           int col) {
    if constexpr (sizeof(W) == 4) {
#pragma unroll
      for (int i = 0; i < width; ++i) word[i] = float_to_word(fmaf(-alpha, sum[i], get(i)));
    } else {
      static_assert(width == 8, "one draw serves eight columns");
      Words4 random{};
      if (draws) random = philox(seed, static_cast<uint32_t>(col / 8), static_cast<uint32_t>(row));
#pragma unroll
      for (int i = 0; i < words; ++i) {
        const float low = fmaf(-alpha, sum[2 * i], get(2 * i));
        const float high = fmaf(-alpha, sum[2 * i + 1], get(2 * i + 1));
        const uint32_t r = random.word[i];
        uint16_t a, b;
        if (draws) {
          a = stochastic(low, r & 0xffffu, W{});
          b = stochastic(high, r >> 16, W{});
        } else {
          a = nearest(low, W{});
          b = nearest(high, W{});
        }
        word[i] = static_cast<uint32_t>(b) << 16 | a;
      }
    }
  }
};

// Four consecutive elements of a factor, zero beyond `count`.
template <typename F>
__device__ __forceinline__ void load_four(float (&out)[4], const F* source, int count, bool aligned) {
  if (aligned && count >= 4) {
    struct alignas(4 * sizeof(F)) Four {
      F element[4];
    };
    const Four four = *reinterpret_cast<const Four*>(source);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = to_float(four.element[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = i < count ? to_float(source[i]) : 0.f;
}

struct alignas(16) Float4 {
  float at[4];
};

// Few terms: memory is the limit and multiply-adds keep up. A thread owns 16 bytes of W in each of eight rows and
// has as many of them in flight, before it touches the factors, as its registers hold beside the sums; the factors
// wait in shared memory, 16 terms at a time.
template <typename W>
struct FmaTile {
  static constexpr int width = 16 / sizeof(W), thread_rows = 8, early_rows = width == 4 ? 8 : 4;
  static constexpr int terms = 16;
  static constexpr int rows = threads / 32 * thread_rows, cols = 32 * width;
};

template <typename W, typename F>
__global__ void __launch_bounds__(threads, 2) rank1_update_fma_kernel(const __grid_constant__ Group group) {
  using T = FmaTile<W>;
  constexpr int width = T::width;
  __shared__ Float4 left_s[T::terms][T::rows / 4];
  __shared__ Float4 right_s[T::terms][T::cols / 4];
  const int warp = thread_index() / 32, lane = thread_index() % 32;

  for (int index = block_index(); index < group.tiles; index += grid_size()) {
    const Tile tile = find_tile<T::rows, T::cols>(group, index);
    const Matrix& matrix = group.matrices[tile.matrix];
    const int row0 = tile.row + warp * T::thread_rows, col = tile.col + lane * width;
    W* weight = static_cast<W*>(matrix.weight) + row0 * matrix.weight_stride + col;
    const bool aligned = matrix.aligned & aligned_weight;

    const auto inside = [&](int i) { return row0 + i < matrix.rows ? matrix.cols - col : 0; };
    Segment<W, width> segment[T::early_rows];
#pragma unroll
    for (int i = 0; i < T::early_rows; ++i) segment[i].load(weight + i * matrix.weight_stride, inside(i), aligned);
    if (group.tiles - index > grid_size()) {
      const Tile next = find_tile<T::rows, T::cols>(group, index + grid_size());
      prefetch_tile<W, T::rows, T::cols>(group.matrices[next.matrix], next.row, next.col);
    }

    float sum[T::thread_rows][width] = {};
    for (int first = 0; first < matrix.terms; first += T::terms) {
      const int count = min(T::terms, matrix.terms - first);
      const F* left = static_cast<const F*>(matrix.left) + first * matrix.left_stride + tile.row;
      const F* right = static_cast<const F*>(matrix.right) + first * matrix.right_stride + tile.col;
#pragma unroll 1
      for (int i = thread_index(); i < count * (T::rows / 4); i += threads) {
        const int k = i / (T::rows / 4), four = i % (T::rows / 4);
        load_four(left_s[k][four].at, left + k * matrix.left_stride + four * 4, matrix.rows - tile.row - four * 4,
                  matrix.aligned & aligned_left);
      }
#pragma unroll 2
      for (int i = thread_index(); i < count * (T::cols / 4); i += threads) {
        const int k = i / (T::cols / 4), four = i % (T::cols / 4);
        // Eight columns of a lane lie in two halves of the row: a stride of 32 bytes between lanes would have two
        // of them meet in a bank.
        const int slot = width == 8 ? four % 2 * 32 + four / 2 : four;
        load_four(right_s[k][slot].at, right + k * matrix.right_stride + four * 4, matrix.cols - tile.col - four * 4,
                  matrix.aligned & aligned_right);
      }
      sync_block();
#pragma unroll(width == 4 ? 2 : 1)
      for (int k = 0; k < count; ++k) {
        float x[T::thread_rows], y[width];
#pragma unroll
        for (int i = 0; i < T::thread_rows; i += 4) {
          const Float4 four = left_s[k][(warp * T::thread_rows + i) / 4];
#pragma unroll
          for (int j = 0; j < 4; ++j) x[i + j] = four.at[j];
        }
#pragma unroll
        for (int i = 0; i < width; i += 4) {
          const Float4 four = right_s[k][i * 8 + lane];
#pragma unroll
          for (int j = 0; j < 4; ++j) y[i + j] = four.at[j];
        }
#pragma unroll
        for (int i = 0; i < T::thread_rows; ++i)
#pragma unroll
          for (int j = 0; j < width; ++j) sum[i][j] = fmaf(x[i], y[j], sum[i][j]);
      }
      sync_block();
    }

#pragma unroll
    for (int base = 0; base < T::thread_rows; base += T::early_rows) {
#pragma unroll
      for (int i = 0; base > 0 && i < T::early_rows; ++i)
        segment[i].load(weight + (base + i) * matrix.weight_stride, inside(base + i), aligned);
#pragma unroll
      for (int i = 0; i < T::early_rows; ++i) {
        const int row = base + i;
        segment[i].subtract(sum[row], matrix.alpha, group.stochastic, matrix.seed, row0 + row, col);
        segment[i].store(weight + row * matrix.weight_stride, inside(row), aligned);
      }
    }
  }
}

}  // namespace mendfast
