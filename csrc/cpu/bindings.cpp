// mendfast._cpu: pointers, sizes and strides in; no PyTorch, no NumPy. Threads are those of the OpenMP library that
// PyTorch brought along, which must have been imported before.
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "few_rows.h"
#include "linear_nll.h"

namespace py = pybind11;

namespace {

const char* problem() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "" : "this processor has no AVX2";
}

// On a cache line; kept for the next call of this thread: fresh pages take longer than many a product.
float* scratch_of(size_t size) {
  constexpr size_t line = 64 / sizeof(float);
  thread_local std::vector<float> scratch;
  if (scratch.size() < size + line) scratch.resize(size + line);
  void* start = scratch.data();
  size_t space = scratch.size() * sizeof(float);
  return static_cast<float*>(std::align(64, size * sizeof(float), start, space));
}

void few_rows(uintptr_t x, int64_t x_stride, uintptr_t w, int64_t w_stride, bool transposed, uintptr_t bias,
              uintptr_t y, int64_t y_stride, int64_t rows, int64_t cols, int64_t depth, int threads) {
  if (rows < 0 || cols < 0 || depth < 1)
    throw py::value_error("few_rows: rows and cols must not be negative, and depth must be at least 1.");
  if (threads < 1) throw py::value_error("few_rows: threads must be at least 1.");
  if (x_stride < depth || w_stride < (transposed ? depth : cols) || y_stride < cols)
    throw py::value_error("few_rows: a stride is less than its row is long.");
  if (rows == 0 || cols == 0) return;
  if (x == 0 || w == 0 || y == 0) throw py::value_error("few_rows: a pointer is null.");
  if (*problem()) throw std::runtime_error(std::string("few_rows: ") + problem() + ".");
  const mendfast::Product product = {
      reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(w), reinterpret_cast<const float*>(bias),
      reinterpret_cast<float*>(y), x_stride, w_stride, y_stride, rows, cols, depth, transposed};
  const py::gil_scoped_release release;
  mendfast::few_rows(product, scratch_of(mendfast::few_rows_scratch(product)), threads);
}

void linear_nll(uintptr_t x, int64_t x_stride, uintptr_t w, int64_t w_stride, uintptr_t bias, uintptr_t labels,
                uintptr_t nll, uintptr_t dx, int64_t rows, int64_t vocabulary, int64_t depth, int threads) {
  if (rows < 0 || vocabulary < 1 || depth < 1)
    throw py::value_error("linear_nll: rows must not be negative, and vocabulary and depth must be at least 1.");
  if (threads < 1) throw py::value_error("linear_nll: threads must be at least 1.");
  if (x_stride < depth || w_stride < depth)
    throw py::value_error("linear_nll: a stride is less than its row is long.");
  if (rows == 0) return;
  if (x == 0 || w == 0 || labels == 0 || nll == 0) throw py::value_error("linear_nll: a pointer is null.");
  const auto* label = reinterpret_cast<const int64_t*>(labels);
  for (int64_t n = 0; n < rows; ++n)
    if (label[n] >= vocabulary) throw py::value_error("linear_nll: a label is not in the vocabulary.");
  if (*problem()) throw std::runtime_error(std::string("linear_nll: ") + problem() + ".");
  const mendfast::LinearNLL loss = {
      reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(w), reinterpret_cast<const float*>(bias),
      label, reinterpret_cast<float*>(nll), reinterpret_cast<float*>(dx), x_stride, w_stride, rows, vocabulary, depth};
  const py::gil_scoped_release release;
  mendfast::linear_nll(loss, scratch_of(mendfast::linear_nll_scratch(loss, threads)), threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels of mendfast.";
  module.def("problem", &problem, "Why no kernel can run on this processor, or an empty string.");
  module.def("few_rows", &few_rows, py::arg("x"), py::arg("x_stride"), py::arg("w"), py::arg("w_stride"),
             py::arg("transposed"), py::arg("bias"), py::arg("y"), py::arg("y_stride"), py::arg("rows"),
             py::arg("cols"), py::arg("depth"), py::arg("threads"),
             "y [rows, cols] = x [rows, depth] w [depth, cols] + bias [cols], float32.\n\nx, w, bias (0: none) and y "
             "are addresses, strides are from row to row in elements; transposed: w is kept as [cols, depth]. y must "
             "not overlap the others. Raises ValueError before anything is written.");
  module.def("linear_nll", &linear_nll, py::arg("x"), py::arg("x_stride"), py::arg("w"), py::arg("w_stride"),
             py::arg("bias"), py::arg("labels"), py::arg("nll"), py::arg("dx"), py::arg("rows"), py::arg("vocabulary"),
             py::arg("depth"), py::arg("threads"),
             "nll [rows] = logsumexp(z) - z[label] of z = x [rows, depth] w [vocabulary, depth]^T + bias, float32, and "
             "dx [rows, depth], its gradient at x.\n\nAddresses (bias, dx: 0 for none) and strides from row to row in "
             "elements; labels int64, a negative one gives 0. Raises ValueError before anything is written.");
}
