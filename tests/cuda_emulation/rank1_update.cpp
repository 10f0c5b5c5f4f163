// csrc/rank1_update*.cuh on the emulated machine, for ctypes.
#include <cstdio>
#include <exception>

#include "arguments.h"
#include "rank1_update_mma.cuh"

using namespace mendfast;

namespace {

char message[512];

template <int tile_rows, int tile_cols, typename Kernel>
void launch(const std::vector<Matrix>& matrices, bool stochastic, int grid, Kernel kernel) {
  for (size_t begin = 0; begin < matrices.size();) {
    Group group{};
    begin = pack(matrices, begin, tile_rows, tile_cols, stochastic, group);
    emulation::machine.grid = min(grid, group.tiles);
    emulation::machine.kernel = [&] { kernel(group); };
    for (int block = 0; block < emulation::machine.grid; ++block) emulation::run_block(block);
  }
}

template <typename W, typename F>
void run(const std::vector<Matrix>& matrices, bool stochastic, int grid, bool mma) {
  if constexpr (sizeof(W) == 2) {
    if (mma)
      return launch<MmaTile<F>::rows, MmaTile<F>::cols>(matrices, stochastic, grid, rank1_update_mma_kernel<W, F>);
  }
  launch<FmaTile<W>::rows, FmaTile<W>::cols>(matrices, stochastic, grid, rank1_update_fma_kernel<W, F>);
}

}  // namespace

// `integers`: weight, left, right, their strides, rows, cols, terms, seed of each matrix. Returns the error, or null.
extern "C" const char* emulate(const int64_t* integers, const float* alphas, int count, int weight, int factor,
                               bool stochastic, bool mma, int grid, int order, bool eager) {
  try {
    std::vector<Matrix> matrices;
    for (int i = 0; i < count; ++i) {
      const int64_t* v = integers + i * 10;
      matrices.push_back({reinterpret_cast<void*>(v[0]), reinterpret_cast<const void*>(v[1]),
                          reinterpret_cast<const void*>(v[2]), v[3], v[4], v[5], static_cast<uint64_t>(v[9]),
                          static_cast<int32_t>(v[6]), static_cast<int32_t>(v[7]), static_cast<int32_t>(v[8]),
                          alphas[i], 0, 0});
    }
    const Dtype w = static_cast<Dtype>(weight), f = static_cast<Dtype>(factor);
    prepare(matrices, w, f);
    emulation::machine.order = order;
    emulation::machine.eager = eager;
    if (w == Dtype::float32) {
      if (mma) throw std::invalid_argument("the kernel for many terms is for 16-bit weights");
      run<float, float>(matrices, false, grid, mma);
    } else if (w == Dtype::bfloat16) {
      f == w ? run<bf16, bf16>(matrices, stochastic, grid, mma) : run<bf16, float>(matrices, stochastic, grid, mma);
    } else {
      f == w ? run<f16, f16>(matrices, stochastic, grid, mma) : run<f16, float>(matrices, stochastic, grid, mma);
    }
    return nullptr;
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
    return message;
  }
}
