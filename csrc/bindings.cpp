// mendfast._C: pointers, sizes and strides in; no PyTorch, no NumPy.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "rank1_update.h"

namespace py = pybind11;

namespace {

using mendfast::Dtype;
using mendfast::Path;

// weight, left, right (addresses), their row strides, rows, cols, terms, alpha, seed
using Row = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int32_t, int32_t, int32_t, float,
                       uint64_t>;

template <typename T>
T named(const std::string& name, const std::vector<std::pair<const char*, T>>& choices, const char* what) {
  std::string all;
  for (const auto& [text, value] : choices) {
    if (name == text) return value;
    all += std::string(all.empty() ? "" : ", ") + text;
  }
  throw py::value_error(std::string("rank1_update: ") + what + " is '" + name + "'; use one of " + all + ".");
}

Dtype dtype(const std::string& name, const char* what) {
  return named<Dtype>(
      name, {{"float32", Dtype::float32}, {"bfloat16", Dtype::bfloat16}, {"float16", Dtype::float16}}, what);
}

int rank1_update_group(const std::vector<Row>& rows, const std::string& weight_dtype, const std::string& factor_dtype,
                       bool stochastic, int device, uintptr_t stream, const std::string& path) {
  std::vector<mendfast::Matrix> matrices;
  matrices.reserve(rows.size());
  for (const auto& [weight, left, right, weight_stride, left_stride, right_stride, height, width, terms, alpha, seed] :
       rows) {
    matrices.push_back({reinterpret_cast<void*>(weight), reinterpret_cast<const void*>(left),
                        reinterpret_cast<const void*>(right), weight_stride, left_stride, right_stride, seed, height,
                        width, terms, alpha, 0, 0});
  }
  const Dtype w = dtype(weight_dtype, "weight_dtype"), f = dtype(factor_dtype, "factor_dtype");
  const Path p = named<Path>(path, {{"auto", Path::automatic}, {"fma", Path::fma}, {"mma", Path::mma}}, "path");
  const py::gil_scoped_release release;
  return mendfast::rank1_update_group(std::move(matrices), w, f, stochastic, device, stream, p);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CUDA kernels of mendfast.";
  module.def("device_problem", &mendfast::device_problem,
             "Why no kernel can run on this machine, as a sentence, or an empty string.");
  module.def(
      "prefers_mma",
      [](int64_t terms, const std::string& weight) { return mendfast::prefers_mma(terms, dtype(weight, "weight")); },
      py::arg("terms"), py::arg("weight_dtype"), "Whether path='auto' takes tensor cores for this many terms.");
  module.def("rank1_update_group", &rank1_update_group, py::arg("matrices"), py::kw_only(), py::arg("weight_dtype"),
             py::arg("factor_dtype"), py::arg("stochastic"), py::arg("device"), py::arg("stream"),
             py::arg("path") = "auto",
             "weight [rows, cols] -= alpha * left^T right, in place, for every matrix of the list, with left [terms, "
             "rows] and right [terms, cols].\n\nA matrix is (weight, left, right, weight_stride, left_stride, "
             "right_stride, rows, cols, terms, alpha, seed): three device addresses, three row strides in elements. "
             "Types are 'float32', 'bfloat16' or 'float16'; factors float32 or the weight's. stream is a "
             "cudaStream_t as a number. Returns the number of launches. Raises TypeError and ValueError before a "
             "launch, RuntimeError with CUDA's text after.");
}
