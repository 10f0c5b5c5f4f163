// mendfast._cpu: pointers, sizes and strides in; no PyTorch, no NumPy. Threads are those of the OpenMP library that
// PyTorch brought along, which must have been imported before.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "few_rows.h"

namespace py = pybind11;

namespace {

const char* problem() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "" : "this processor has no AVX2";
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
  thread_local std::vector<float> scratch;
  const size_t needed = mendfast::few_rows_scratch(product);
  if (scratch.size() < needed) scratch.resize(needed);
  mendfast::few_rows(product, scratch.data(), threads);
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
}
