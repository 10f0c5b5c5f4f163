// Checks of the arguments, and the choice between the two kernels.
#include "rank1_update.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "arguments.h"
#include "launch.cuh"

namespace mendfast {

const char* device_problem() {
  static thread_local std::string problem;
  problem.clear();
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return "";
  (void)cudaGetLastError();
  int driver = 0, runtime = 0;
  (void)cudaDriverGetVersion(&driver);
  (void)cudaRuntimeGetVersion(&runtime);
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  if (driver == 0) {
    problem = "no CUDA driver: install NVIDIA's driver, or use another backend";
  } else if (status == cudaErrorInsufficientDriver) {
    problem = "the CUDA driver serves CUDA " + version(driver) + " and the extension was built with " +
              version(runtime) + ": update the driver, or build with an older nvcc";
  } else {
    problem = std::string("no CUDA device: ") + cudaGetErrorString(status == cudaSuccess ? cudaErrorNoDevice : status);
  }
  return problem.c_str();
}

int rank1_update_group(std::vector<Matrix> matrices, Dtype weight, Dtype factor, bool stochastic, int device,
                       uintptr_t stream, Path path) {
  const int64_t most_terms = prepare(matrices, weight, factor);
  if (matrices.empty()) return 0;
  const char* problem = device_problem();
  if (*problem) throw std::runtime_error(std::string("rank1_update: ") + problem + ".");
  if (device < 0 || device >= max_devices) throw std::invalid_argument("rank1_update: no such device");
  const DeviceGuard guard(device);
  const bool mma = path == Path::mma || (path == Path::automatic && prefers_mma(most_terms, weight));
  const Kind kind = weight == Dtype::float32      ? Kind::float32
                    : weight == Dtype::bfloat16   ? (factor == weight ? Kind::bfloat16 : Kind::bfloat16_float32)
                    : factor == Dtype::float32    ? Kind::float16_float32
                                                  : Kind::float16;
  return (mma ? launch_mma : launch_fma)(kind, matrices, stochastic && kind != Kind::float32, device,
                                         reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace mendfast
