// mendfast._cpu: pointers, sizes and strides in; no PyTorch, no NumPy. Threads are those of the OpenMP library that
// PyTorch brought along, which must have been imported before.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "few_rows.h"
#include "kl_divergence.h"
#include "linear_nll.h"
#include "outer_update.h"
#include "running_stats.h"

namespace py = pybind11;

namespace {

// Of the processors that have AVX2 every one has F16C, which not every compiler lets one ask for.
const char* problem() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "" : "this processor has no AVX2";
}

bool has_avx512() {
  __builtin_cpu_init();  // it is asked before the program's constructors have run
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool avx512 = has_avx512();

std::string instructions() { return *problem() ? "" : avx512 ? "avx512" : "avx2"; }

void choose(const std::string& name) {
  if (name != "avx2" && name != "avx512") throw py::value_error("choose: " + name + "; use avx2 or avx512.");
  if (*problem()) throw std::runtime_error(std::string("choose: ") + problem() + ".");
  if (name == "avx512" && !has_avx512()) throw std::runtime_error("choose: this processor has no AVX-512.");
  avx512 = name == "avx512";
}

// Calls ``run`` with what the kernels are to be compiled for.
template <class Run>
auto with_isa(Run run) {
  using mendfast::Isa;
  return avx512 ? run(std::integral_constant<Isa, Isa::avx512>{}) : run(std::integral_constant<Isa, Isa::avx2>{});
}

void serve(const char* op, int threads) {
  if (threads < 1) throw py::value_error(std::string(op) + ": threads must be at least 1.");
  if (*problem()) throw std::runtime_error(std::string(op) + ": " + problem() + ".");
}

mendfast::Kind kind_of(const std::string& name) {
  if (name == "float32") return mendfast::Kind::float32;
  if (name == "bfloat16") return mendfast::Kind::bfloat16;
  if (name == "float16") return mendfast::Kind::float16;
  throw py::value_error("kind is " + name + "; use float32, bfloat16 or float16.");
}

// Calls ``run`` with an element of that kind.
template <class Run>
void with_element(const std::string& name, Run run) {
  const mendfast::Kind kind = kind_of(name);
  if (kind == mendfast::Kind::float32) run(float{});
  if (kind == mendfast::Kind::bfloat16) run(mendfast::BF16{});
  if (kind == mendfast::Kind::float16) run(mendfast::F16{});
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

void few_rows(uintptr_t x, int64_t x_stride, uintptr_t w, int64_t w_stride, bool transposed, const std::string& kind,
              uintptr_t bias, uintptr_t y, int64_t y_stride, int64_t rows, int64_t cols, int64_t depth, int threads) {
  if (rows < 0 || cols < 0 || depth < 1)
    throw py::value_error("few_rows: rows and cols must not be negative, and depth must be at least 1.");
  if (threads < 1) throw py::value_error("few_rows: threads must be at least 1.");
  if (x_stride < depth || w_stride < (transposed ? depth : cols) || y_stride < cols)
    throw py::value_error("few_rows: a stride is less than its row is long.");
  if (rows == 0 || cols == 0) return;
  if (x == 0 || w == 0 || y == 0) throw py::value_error("few_rows: a pointer is null.");
  if (*problem()) throw std::runtime_error(std::string("few_rows: ") + problem() + ".");
  with_element(kind, [&](auto element) {
    const mendfast::Product<decltype(element)> product = {
        reinterpret_cast<const float*>(x), reinterpret_cast<const decltype(element)*>(w),
        reinterpret_cast<const float*>(bias), reinterpret_cast<float*>(y), x_stride, w_stride, y_stride, rows, cols,
        depth, transposed};
    const py::gil_scoped_release release;
    with_isa([&](auto isa) {
      mendfast::few_rows<isa()>(product, scratch_of(mendfast::few_rows_scratch<isa()>(product)), threads);
    });
  });
}

void linear_nll(uintptr_t x, int64_t x_stride, uintptr_t w, int64_t w_stride, const std::string& kind, uintptr_t bias,
                uintptr_t labels, uintptr_t nll, uintptr_t dx, int64_t rows, int64_t vocabulary, int64_t depth,
                int threads) {
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
  with_element(kind, [&](auto element) {
    const mendfast::LinearNLL<decltype(element)> loss = {
        reinterpret_cast<const float*>(x), reinterpret_cast<const decltype(element)*>(w),
        reinterpret_cast<const float*>(bias), label, reinterpret_cast<float*>(nll), reinterpret_cast<float*>(dx),
        x_stride, w_stride, rows, vocabulary, depth};
    const py::gil_scoped_release release;
    with_isa([&](auto isa) {
      mendfast::linear_nll<isa()>(loss, scratch_of(mendfast::linear_nll_scratch<isa()>(loss, threads)), threads);
    });
  });
}

// from, to, left, right; from_stride, to_stride, left_term, left_row, right_stride; rows, cols, terms; alpha, seed
using Update = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, double, uint64_t>;

mendfast::OuterUpdate outer_update_of(const Update& given) {
  const auto [from, to, left, right, from_stride, to_stride, left_term, left_row, right_stride, rows, cols, terms,
              alpha, seed] = given;
  if (rows < 1 || cols < 1 || terms < 1)
    throw py::value_error("outer_update: rows, cols and terms must be at least 1.");
  if (from_stride < cols || to_stride < cols || right_stride < cols)
    throw py::value_error("outer_update: a stride is less than its row is long.");
  if (!(left_row == 1 && left_term >= rows) && !(left_term == 1 && left_row >= terms))
    throw py::value_error("outer_update: left must be contiguous along its rows or its terms.");
  if (from == 0 || to == 0 || left == 0 || right == 0) throw py::value_error("outer_update: a pointer is null.");
  return {reinterpret_cast<const void*>(from), reinterpret_cast<void*>(to), reinterpret_cast<const float*>(left),
          reinterpret_cast<const float*>(right), from_stride, to_stride, left_term, left_row, right_stride, rows, cols,
          terms, static_cast<float>(alpha), seed};
}

// Whether no matrix that is written reaches into one of another's, or into factors.
bool apart(const std::vector<mendfast::OuterUpdate>& updates, int64_t size) {
  struct Span {
    uintptr_t start, end;
  };
  const auto span = [](const void* data, int64_t lines, int64_t stride, int64_t width, int64_t bytes) {
    const auto start = reinterpret_cast<uintptr_t>(data);
    return Span{start, start + static_cast<uintptr_t>(((lines - 1) * stride + width) * bytes)};
  };
  std::vector<Span> written, read;
  for (const auto& u : updates) {
    written.push_back(span(u.to, u.rows, u.to_stride, u.cols, size));
    const bool by_term = u.left_row == 1;
    read.push_back(span(u.left, by_term ? u.terms : u.rows, by_term ? u.left_term : u.left_row,
                        by_term ? u.rows : u.terms, sizeof(float)));
    read.push_back(span(u.right, u.terms, u.right_stride, u.cols, sizeof(float)));
  }
  for (size_t i = 0; i < written.size(); ++i) {
    for (size_t j = 0; j < i; ++j)
      if (written[i].start < written[j].end && written[j].start < written[i].end) return false;
    for (const Span& factor : read)
      if (written[i].start < factor.end && factor.start < written[i].end) return false;
  }
  return true;
}

constexpr size_t MOST_KEPT = size_t{1} << 22;  // floats of factors in between; more are given back

bool outer_update(const std::vector<Update>& given, const std::string& kind_name, bool stochastic, bool check_memory,
                  bool check_factors, int threads) {
  serve("outer_update", threads);
  const mendfast::Kind kind = kind_of(kind_name);
  if (stochastic && kind == mendfast::Kind::float16)
    throw py::value_error("outer_update: float16 is not rounded stochastically here.");
  std::vector<mendfast::OuterUpdate> updates;
  for (const Update& each : given) updates.push_back(outer_update_of(each));
  const py::gil_scoped_release release;
  if (check_memory && !apart(updates, kind == mendfast::Kind::float32 ? 4 : 2)) return false;
  return with_isa([&](auto isa) {
    if (check_factors)
      for (const auto& each : updates)
        if (!mendfast::finite_factors<isa()>(each)) return false;
    for (const auto& each : updates) {
      const auto size = static_cast<size_t>(mendfast::outer_update_scratch<isa()>(each));
      const std::unique_ptr<float[]> own(size > MOST_KEPT ? new float[size] : nullptr);
      mendfast::outer_update<isa()>(each, kind, stochastic, own ? own.get() : scratch_of(size), threads);
    }
    return true;
  });
}

using Rows = std::tuple<uintptr_t, int64_t, int64_t, std::string>;  // data, sample, position, kind

mendfast::Divergence divergence_of(const char* op, const Rows& base, const Rows& edited, uintptr_t keep, int64_t batch,
                                   int64_t length, int64_t vocabulary) {
  if (batch < 1 || length < 1 || vocabulary < 1)
    throw py::value_error(std::string(op) + ": batch, length and vocabulary must be at least 1.");
  if (std::get<0>(base) == 0 || std::get<0>(edited) == 0 || keep == 0)
    throw py::value_error(std::string(op) + ": a pointer is null.");
  const auto logits = [](const Rows& rows) {
    return mendfast::Logits{reinterpret_cast<const void*>(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows),
                            kind_of(std::get<3>(rows))};
  };
  return {logits(base), logits(edited), reinterpret_cast<const bool*>(keep), batch, length, vocabulary};
}

void kl_forward(const Rows& base, const Rows& edited, uintptr_t keep, uintptr_t kl, uintptr_t lse_base,
                uintptr_t lse_edited, int64_t batch, int64_t length, int64_t vocabulary, int threads) {
  serve("kl_forward", threads);
  const auto d = divergence_of("kl_forward", base, edited, keep, batch, length, vocabulary);
  if (kl == 0 || lse_base == 0 || lse_edited == 0) throw py::value_error("kl_forward: a pointer is null.");
  const py::gil_scoped_release release;
  with_isa([&](auto isa) {
    mendfast::kl_forward<isa()>(d, reinterpret_cast<float*>(kl), reinterpret_cast<float*>(lse_base),
                                reinterpret_cast<float*>(lse_edited), threads);
  });
}

void kl_backward(const Rows& base, const Rows& edited, uintptr_t keep, uintptr_t grad, uintptr_t lse_base,
                 uintptr_t lse_edited, uintptr_t out, int64_t batch, int64_t length, int64_t vocabulary, int threads) {
  serve("kl_backward", threads);
  const auto d = divergence_of("kl_backward", base, edited, keep, batch, length, vocabulary);
  if (grad == 0 || lse_base == 0 || lse_edited == 0 || out == 0)
    throw py::value_error("kl_backward: a pointer is null.");
  const py::gil_scoped_release release;
  with_isa([&](auto isa) {
    mendfast::kl_backward<isa()>(d, reinterpret_cast<const float*>(grad), reinterpret_cast<const float*>(lse_base),
                                 reinterpret_cast<const float*>(lse_edited), reinterpret_cast<void*>(out), threads);
  });
}

int64_t running_stats(uintptr_t rows, int64_t stride, uintptr_t mask, uintptr_t mean, uintptr_t m2, double before,
                      int64_t count, int64_t width, bool wide, int threads) {
  serve("running_stats", threads);
  if (count < 1 || width < 0 || stride < width)
    throw py::value_error("running_stats: there must be rows, and a stride must not be less than a row is long.");
  if (width > 0 && (rows == 0 || mean == 0 || m2 == 0)) throw py::value_error("running_stats: a pointer is null.");
  const mendfast::Chunk chunk = {reinterpret_cast<const float*>(rows), reinterpret_cast<const bool*>(mask), count,
                                 width, stride};
  const py::gil_scoped_release release;
  return with_isa([&](auto isa) -> int64_t {
    const int64_t kept = mendfast::kept_rows<isa()>(chunk);
    if (kept == 0) return 0;
    if (wide)
      mendfast::running_stats<isa()>(chunk, before, static_cast<double>(kept), reinterpret_cast<double*>(mean),
                                     reinterpret_cast<double*>(m2), threads);
    else
      mendfast::running_stats<isa()>(chunk, before, static_cast<double>(kept), reinterpret_cast<float*>(mean),
                                     reinterpret_cast<float*>(m2), threads);
    return kept;
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels of mendfast.";
  module.def("problem", &problem, "Why no kernel can run on this processor, or an empty string.");
  module.def("instructions", &instructions, "What the kernels use: \"avx512\" where the processor has it, or \"avx2\".");
  module.def("choose", &choose, py::arg("name"),
             "Use \"avx2\" or \"avx512\" from now on, in all threads: to compare the two. Raises ValueError for "
             "another name, RuntimeError where the processor lacks it.");
  module.def("few_rows", &few_rows, py::arg("x"), py::arg("x_stride"), py::arg("w"), py::arg("w_stride"),
             py::arg("transposed"), py::arg("kind"), py::arg("bias"), py::arg("y"), py::arg("y_stride"),
             py::arg("rows"), py::arg("cols"), py::arg("depth"), py::arg("threads"),
             "y [rows, cols] = x [rows, depth] w [depth, cols] + bias [cols]; w of a kind (\"float32\", \"bfloat16\", "
             "\"float16\"), the others float32.\n\nx, w, bias (0: none) and y are addresses, strides are from row to "
             "row in elements; transposed: w is kept as [cols, depth]. y must not overlap the others. Raises "
             "ValueError before anything is written.");
  module.def("linear_nll", &linear_nll, py::arg("x"), py::arg("x_stride"), py::arg("w"), py::arg("w_stride"),
             py::arg("kind"), py::arg("bias"), py::arg("labels"), py::arg("nll"), py::arg("dx"), py::arg("rows"),
             py::arg("vocabulary"), py::arg("depth"), py::arg("threads"),
             "nll [rows] = logsumexp(z) - z[label] of z = x [rows, depth] w [vocabulary, depth]^T + bias, and dx "
             "[rows, depth], its gradient at x; w of a kind (\"float32\", \"bfloat16\", \"float16\"), the others "
             "float32.\n\nAddresses (bias, dx: 0 for none) and strides from row to row in elements; labels int64, a "
             "negative one gives 0. Raises ValueError before anything is written.");
  module.def("outer_update", &outer_update, py::arg("updates"), py::arg("kind"), py::arg("stochastic"),
             py::arg("check_memory"), py::arg("check_factors"), py::arg("threads"),
             "to [rows, cols] = from - alpha sum over terms of left [term, row] right [term, col], of each update.\n\n"
             "(from, to, left, right, from_stride, to_stride, left_term, left_row, right_stride, rows, cols, terms, "
             "alpha, seed), addresses and strides in elements; from and to are of a kind (\"float32\", \"bfloat16\", "
             "\"float16\"), the factors float32. False, and nothing is written, with check_memory where what is "
             "written crosses other memory, with check_factors where a factor is NaN or infinite. Raises ValueError "
             "before anything is written.");
  module.def("kl_forward", &kl_forward, py::arg("base"), py::arg("edited"), py::arg("keep"), py::arg("kl"),
             py::arg("lse_base"), py::arg("lse_edited"), py::arg("batch"), py::arg("length"), py::arg("vocabulary"),
             py::arg("threads"),
             "KL(softmax(base) || softmax(edited)) and both log-sum-exps, float32 [batch, length].\n\nLogits are "
             "(address, stride from sample to sample, from position to position, kind), the vocabulary contiguous; keep "
             "[batch, length] bool. Raises ValueError before anything is written.");
  module.def("kl_backward", &kl_backward, py::arg("base"), py::arg("edited"), py::arg("keep"), py::arg("grad"),
             py::arg("lse_base"), py::arg("lse_edited"), py::arg("out"), py::arg("batch"), py::arg("length"),
             py::arg("vocabulary"), py::arg("threads"),
             "out [batch, length, vocabulary], of edited's kind: its gradient, grad [batch, length] times "
             "(softmax(edited) - softmax(base)). Arguments as kl_forward's.");
  module.def("running_stats", &running_stats, py::arg("rows"), py::arg("stride"), py::arg("mask"), py::arg("mean"),
             py::arg("m2"), py::arg("before"), py::arg("count"), py::arg("width"), py::arg("wide"), py::arg("threads"),
             "Merge rows [count, width], float32, into mean and m2 [width] of ``before`` rows, in place; how many rows "
             "the mask (0: all) keeps. wide: mean and m2 are float64. Raises ValueError before anything is written.");
}
