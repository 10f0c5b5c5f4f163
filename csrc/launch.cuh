// Grids and launches, for the two files that hold a kernel each.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "rank1_update.h"

namespace mendfast {

enum class Kind { float32, bfloat16, bfloat16_float32, float16, float16_float32 };  // weight, and factor if it differs

int launch_fma(Kind kind, const std::vector<Matrix>& matrices, bool stochastic, int device, cudaStream_t stream);
int launch_mma(Kind kind, const std::vector<Matrix>& matrices, bool stochastic, int device, cudaStream_t stream);

constexpr int max_devices = 64;

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next call would report this error again
  throw std::runtime_error(std::string("rank1_update: ") + what + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "reading the current device failed");
    if (device != previous_) check(cudaSetDevice(device), "choosing the device failed");
  }
  ~DeviceGuard() { (void)cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

using Kernel = void (*)(Group);

// As many blocks as the device holds at once; asked for once per kernel and device.
template <Kernel kernel, int threads>
int resident_blocks(int device) {
  static std::atomic<int> known[max_devices];
  int blocks = known[device].load(std::memory_order_relaxed);
  if (blocks == 0) {
    int per_processor = 0, processors = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0),
          "asking for the kernel's occupancy failed");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "asking for the number of multiprocessors failed");
    blocks = std::max(1, per_processor * processors);
    known[device].store(blocks, std::memory_order_relaxed);
  }
  return blocks;
}

template <Kernel kernel, int threads, int tile_rows, int tile_cols>
int launch(const std::vector<Matrix>& matrices, bool stochastic, int device, cudaStream_t stream) {
  const int resident = resident_blocks<kernel, threads>(device);
  int launches = 0;
  for (size_t begin = 0; begin < matrices.size();) {
    Group group{};
    begin = pack(matrices, begin, tile_rows, tile_cols, stochastic, group);
    kernel<<<std::min(resident, group.tiles), threads, 0, stream>>>(group);
    check(cudaGetLastError(), "the launch failed");
    ++launches;
  }
  return launches;
}

}  // namespace mendfast
