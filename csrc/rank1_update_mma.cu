// Instances of the kernel for many terms.
#include <stdexcept>

#include "launch.cuh"
#include "rank1_update_mma.cuh"

namespace mendfast {
namespace {

template <typename W, typename F>
int run(const std::vector<Matrix>& matrices, bool stochastic, int device, cudaStream_t stream) {
  using T = MmaTile<F>;
  return launch<rank1_update_mma_kernel<W, F>, threads, T::rows, T::cols>(matrices, stochastic, device, stream);
}

}  // namespace

int launch_mma(Kind kind, const std::vector<Matrix>& matrices, bool stochastic, int device, cudaStream_t stream) {
  switch (kind) {
    case Kind::float32:
      throw std::invalid_argument("rank1_update: the kernel for many terms is for 16-bit weights");
    case Kind::bfloat16:
      return run<bf16, bf16>(matrices, stochastic, device, stream);
    case Kind::bfloat16_float32:
      return run<bf16, float>(matrices, stochastic, device, stream);
    case Kind::float16:
      return run<f16, f16>(matrices, stochastic, device, stream);
    case Kind::float16_float32:
      return run<f16, float>(matrices, stochastic, device, stream);
  }
  throw std::invalid_argument("rank1_update: unknown combination of types");
}

}  // namespace mendfast
