// Checks of the arguments, and the choice between the two kernels.
#include "rank1_update.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "launch.cuh"

namespace mendfast {
namespace {

bool by_sixteen(const void* pointer, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * size % 16 == 0;
}

[[noreturn]] void refuse(size_t i, const std::string& what) {
  throw std::invalid_argument("rank1_update: matrix " + std::to_string(i) + ": " + what);
}

void check_matrix(size_t i, const Matrix& m, int64_t weight_size, int64_t factor_size) {
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

}  // namespace

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
