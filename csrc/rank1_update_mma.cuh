// The kernel for many terms, into 16-bit weights: the sum on tensor cores, float32 accumulators.
#pragma once

#include "rank1_update.cuh"

namespace mendfast {

// Factors wait in shared memory as they lie in memory, [term, row or column], two buffers of 16 KiB each. Eight
// elements of padding put a quad's four terms into different banks, and ldmatrix's eight rows too.
template <typename F>
struct MmaTile {
  static constexpr int rows = 128, cols = 128, terms = 64 / sizeof(F), pitch = 128 + 8;
  using Row = F[pitch];
};

// One step over `terms` terms: fragments of a 16 x 8 product, in the register layout of mma.sync (PTX ISA, "Matrix
// fragments for mma.m16n8k8 / m16n8k16"; g = lane / 4, t = lane % 4). A holds rows g, g + 8; B and C columns.
template <typename W, typename F>
struct Product;

// 16-bit factors: as they are.
template <typename W>
struct Product<W, W> {
  static_assert(sizeof(W) == 2);
  static constexpr int terms = 16;
  struct A {
    uint32_t word[4];
  };
  struct B {
    uint32_t word[2];
  };
  template <typename Row>
  static __device__ __forceinline__ void load_a(A& a, const Row* tile, int row, int lane) {
    const int matrix = lane / 8;
    load_matrices_transposed(a.word, &tile[lane % 8 + matrix / 2 * 8][row + matrix % 2 * 8]);
  }
  // Four neighbouring products.
  template <typename Row>
  static __device__ __forceinline__ void load_b(B (&b)[4], const Row* tile, int col, int lane) {
    const int matrix = lane / 8;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      uint32_t word[4];
      load_matrices_transposed(word, &tile[lane % 8 + matrix % 2 * 8][col + j * 8 + matrix / 2 * 8]);
      b[j] = {{word[0], word[1]}};
      b[j + 1] = {{word[2], word[3]}};
    }
  }
  static __device__ __forceinline__ void add(float (&c)[4], const A& a, const B& b) {
    multiply_add(c, a.word, b.word, W{});
  }
};

// float32 factors: x = high + low in bfloat16, 8 + 8 bits, and x y = high high + high low + low high; what is left out
// is 2^-16 of a product, W's own rounding 2^-9 or 2^-12.
struct SplitProduct {
  static constexpr int terms = 16;
  struct A {
    uint32_t high[4], low[4];
  };
  struct B {
    uint32_t high[2], low[2];
  };
  template <typename Row>
  static __device__ __forceinline__ void load_a(A& a, const Row* tile, int row, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a.high[i], a.low[i], tile, i / 2, row + i % 2 * 8 + lane / 4, lane % 4);
  }
  template <typename Row>
  static __device__ __forceinline__ void load_b(B (&b)[4], const Row* tile, int col, int lane) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) split(b[j].high[i], b[j].low[i], tile, i, col + j * 8 + lane / 4, lane % 4);
  }
  static __device__ __forceinline__ void add(float (&c)[4], const A& a, const B& b) {
    multiply_add(c, a.low, b.high, bf16{});
    multiply_add(c, a.high, b.low, bf16{});
    multiply_add(c, a.high, b.high, bf16{});
  }

 private:
  // Which term takes which place in the product is free as long as A and B agree; terms four apart make a pair here, so
  // that the lanes of a warp read 32 different banks.
  template <typename Row>
  static __device__ __forceinline__ void split(uint32_t& high, uint32_t& low, const Row* tile, int half, int at,
                                               int t) {
    const float x = tile[half * 8 + t][at], y = tile[half * 8 + t + 4][at];
    high = pack_bf16(x, y);
    low = pack_bf16(x - word_to_float(high << 16), y - word_to_float(high & 0xffff0000u));
  }
};

template <>
struct Product<bf16, float> : SplitProduct {};
template <>
struct Product<f16, float> : SplitProduct {};

// Starts copying one block of a factor to shared memory, zeros beyond its edges.
template <typename F>
__device__ __forceinline__ void stage(typename MmaTile<F>::Row* tile, const F* factor, int64_t stride, int first_term,
                                      int terms, int first, int width, bool aligned) {
  constexpr int chunk = 16 / sizeof(F), chunks_across = 128 / chunk;
#pragma unroll
  for (int i = thread_index(); i < MmaTile<F>::terms * chunks_across; i += threads) {
    const int term = i / chunks_across, at = i % chunks_across * chunk;
    const int count = first_term + term < terms ? min(max(width - first - at, 0), chunk) : 0;
    // An address that is not read must be valid all the same.
    const F* source = count > 0 ? factor + (first_term + term) * stride + first + at : factor;
    if (aligned) {
      copy_async(&tile[term][at], source, count * static_cast<int>(sizeof(F)));
    } else {
#pragma unroll
      for (int j = 0; j < chunk; ++j) tile[term][at + j] = j < count ? source[j] : F{};
    }
  }
}

// c[j][p] is a lane's pair p of the products j, where a pair lies beside those of the other three lanes of its quad.
// Afterwards lane t has all eight columns of product t: a transposition of 4 x 4 pairs by two exchanges.
__device__ __forceinline__ void gather_row(float (&pair)[4][2], int lane) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float received = shuffle_xor(upper ? pair[j][e] : pair[j + step][e], step);
        (upper ? pair[j][e] : pair[j + step][e]) = received;
      }
    }
  }
}

template <typename W, typename F>
__global__ void __launch_bounds__(threads, 2) rank1_update_mma_kernel(const __grid_constant__ Group group) {
  using T = MmaTile<F>;
  using P = Product<W, F>;
  alignas(16) __shared__ typename T::Row left_s[2][T::terms];
  alignas(16) __shared__ typename T::Row right_s[2][T::terms];
  const int lane = thread_index() % 32;
  // Eight warps, two down and four across, of 64 x 32 elements each.
  const int warp_row = thread_index() / 128 * 64, warp_col = thread_index() / 32 % 4 * 32;

  const auto stage_both = [&](int buffer, const Tile& tile, int first_term) {
    const Matrix& m = group.matrices[tile.matrix];
    stage<F>(left_s[buffer], static_cast<const F*>(m.left), m.left_stride, first_term, m.terms, tile.row, m.rows,
             m.aligned & aligned_left);
    stage<F>(right_s[buffer], static_cast<const F*>(m.right), m.right_stride, first_term, m.terms, tile.col, m.cols,
             m.aligned & aligned_right);
  };

  int index = block_index(), buffer = 0;
  if (index >= group.tiles) return;
  Tile tile = find_tile<T::rows, T::cols>(group, index);
  stage_both(0, tile, 0);
  copy_async_commit();

  while (true) {
    const Matrix& matrix = group.matrices[tile.matrix];
    const bool more = group.tiles - index > grid_size();
    if (more) {
      const Tile next = find_tile<T::rows, T::cols>(group, index + grid_size());
      prefetch_tile<W, T::rows, T::cols>(group.matrices[next.matrix], next.row, next.col);
    }

    float sum[4][4][4] = {};  // [16 rows][8 columns][fragment]
    for (int first = 0; first < matrix.terms; first += T::terms) {
      // What comes next is on its way while this is multiplied: more terms, or the next tile's first.
      const bool same = first + T::terms < matrix.terms;
      if (same || more)
        stage_both(buffer ^ 1, same ? tile : find_tile<T::rows, T::cols>(group, index + grid_size()),
                   same ? first + T::terms : 0);
      copy_async_commit();
      copy_async_wait_older();
      sync_block();
      const int count = min(T::terms, matrix.terms - first);
#pragma unroll 1
      for (int k = 0; k < count; k += P::terms) {
        typename P::B b[4];
        P::load_b(b, &right_s[buffer][k], warp_col, lane);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          typename P::A a;
          P::load_a(a, &left_s[buffer][k], warp_row + i * 16, lane);
#pragma unroll
          for (int j = 0; j < 4; ++j) P::add(sum[i][j], a, b[j]);
        }
      }
      sync_block();
      buffer ^= 1;
    }

    const int row0 = tile.row + warp_row + lane / 4, col = tile.col + warp_col + lane % 4 * 8;
    W* weight = static_cast<W*>(matrix.weight) + row0 * matrix.weight_stride + col;
    const bool aligned = matrix.aligned & aligned_weight;
    constexpr int batch = 2;  // segments in flight, by the registers that are left
#pragma unroll
    for (int base = 0; base < 8; base += batch) {
      Segment<W, 8> segment[batch];
#pragma unroll
      for (int s = 0; s < batch; ++s) {
        const int down = (base + s) * 8;
        const int count = row0 + down < matrix.rows ? matrix.cols - col : 0;
        segment[s].load(weight + down * matrix.weight_stride, count, aligned);
      }
#pragma unroll
      for (int s = 0; s < batch; ++s) {
        const int i = (base + s) / 2, half = (base + s) % 2, down = (base + s) * 8;
        float pair[4][2];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          pair[j][0] = sum[i][j][half * 2];
          pair[j][1] = sum[i][j][half * 2 + 1];
        }
        gather_row(pair, lane);
        float row[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) row[j] = pair[j / 2][j % 2];
        const int count = row0 + down < matrix.rows ? matrix.cols - col : 0;
        segment[s].subtract(row, matrix.alpha, group.stochastic, matrix.seed, row0 + down, col);
        segment[s].store(weight + down * matrix.weight_stride, count, aligned);
      }
    }
    if (!more) return;
    index += grid_size();
    tile = find_tile<T::rows, T::cols>(group, index);
  }
}

}  // namespace mendfast
