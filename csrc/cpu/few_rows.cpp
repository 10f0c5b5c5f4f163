#include "few_rows.h"

#include "tiles.h"

namespace mendfast {
namespace {

constexpr int64_t TASK_COLUMNS = 64;
constexpr int64_t LEAST_PART = 512;  // of the depth that has a sum of its own,
constexpr int64_t TASKS = 64;        // so that many threads find work in a narrow product

template <class Element>
void by_dot_products(const Product<Element>& p, float* scratch, int threads) {
  const int64_t tasks = divide_up(p.cols, TASK_COLUMNS);
#pragma omp parallel num_threads(threads)
  {
    split_depth(p, scratch);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task)
      dot_columns(p, scratch, task * TASK_COLUMNS, least(p.cols, (task + 1) * TASK_COLUMNS));
  }
}

// How the work is divided; by the shape alone, so that the sums don't depend on the number of threads.
struct Division {
  int64_t panels, depth, parts;

  template <class Element>
  explicit Division(const Product<Element>& p) {
    panels = divide_up(p.cols, PANEL);
    const int64_t wanted = divide_up(TASKS, panels), most = divide_up(p.depth, LEAST_PART);
    depth = divide_up(divide_up(p.depth, least(wanted, most)), LANES) * LANES;
    parts = divide_up(p.depth, depth);
  }
  int64_t stride() const { return panels * PANEL; }
};

template <class Element>
void by_outer_products(const Product<Element>& p, float* scratch, int threads) {
  const Division by(p);
  const int64_t stride = by.stride();
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < by.panels * by.parts; ++task) {
      const int64_t col = task % by.panels * PANEL, part = task / by.panels;
      const int64_t start = part * by.depth, end = least(p.depth, start + by.depth);
      float* y = scratch + part * p.rows * stride + col;
      for (int64_t row = 0; row < p.rows; ++row) __builtin_memset(y + row * stride, 0, PANEL * sizeof(float));
      outer_panel(p, col, start, end, y, stride);
    }
#pragma omp for
    for (int64_t row = 0; row < p.rows; ++row) {
      float* y = p.y + row * p.y_stride;
      for (int64_t c = 0; c < p.cols; ++c) y[c] = p.bias ? p.bias[c] : 0.0f;
      for (int64_t part = 0; part < by.parts; ++part) {
        const float* from = scratch + (part * p.rows + row) * stride;
        for (int64_t c = 0; c < p.cols; ++c) y[c] += from[c];
      }
    }
  }
}

}  // namespace

template <Isa isa, class Element>
int64_t few_rows_scratch(const Product<Element>& p) {
  if (p.transposed) return p.rows * divide_up(p.depth, dot_depth(p.depth, p.rows)) * dot_depth(p.depth, p.rows);
  const Division by(p);
  return by.parts * p.rows * by.stride();
}

template <Isa isa, class Element>
void few_rows(const Product<Element>& product, float* scratch, int threads) {
  if (product.transposed)
    by_dot_products(product, scratch, threads);
  else
    by_outer_products(product, scratch, threads);
}

template int64_t few_rows_scratch<ISA>(const Product<float>&);
template int64_t few_rows_scratch<ISA>(const Product<BF16>&);
template int64_t few_rows_scratch<ISA>(const Product<F16>&);
template void few_rows<ISA>(const Product<float>&, float*, int);
template void few_rows<ISA>(const Product<BF16>&, float*, int);
template void few_rows<ISA>(const Product<F16>&, float*, int);

}  // namespace mendfast
