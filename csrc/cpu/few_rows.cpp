// Each element of w is read from memory once and used for all rows while it is in a register or a near cache.
//
// A row of w that lies along the depth is multiplied by dot products: a tile of ROWS x COLUMNS sums stays in
// registers while it moves along the depth. One that lies along the columns is multiplied by outer products, from a
// copy: rows of w are often a power of two apart, and would evict each other from the cache.
#include "few_rows.h"

#include <immintrin.h>

namespace mendfast {
namespace {

constexpr int64_t LANES = 8;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// -- w as [cols, depth] ----------------------------------------------------------------------------------------

constexpr int COLUMNS = 4;  // with ROWS x COLUMNS sums, ROWS of x and one of w, 16 registers are full
constexpr int ROWS = 3;
constexpr int64_t TASK_COLUMNS = 64;
constexpr int64_t DOT_DEPTH = 768;  // a tile's rows of x and w, this deep, take 21 of the first cache's 32 KiB

// [sum of a, sum of b, sum of c, sum of d]
__m128 sums(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// Of a piece of the depth, p.depth long; ``ahead`` is a row of w that will be needed soon.
template <int rows>
void dot_tile(const Product& p, bool first, int64_t row, int64_t col, const float* ahead) {
  const float* x = p.x + row * p.x_stride;
  const float* w = p.w + col * p.w_stride;
  __m256 sum[rows][COLUMNS] = {};
  int64_t k = 0;
#pragma GCC unroll 4
  for (; k + LANES <= p.depth; k += LANES) {
    __builtin_prefetch(ahead + k, 0, 2);
    __m256 left[rows];
    for (int r = 0; r < rows; ++r) left[r] = _mm256_loadu_ps(x + r * p.x_stride + k);
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) {
      const __m256 right = _mm256_loadu_ps(w + c * p.w_stride + k);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) sum[r][c] = _mm256_fmadd_ps(left[r], right, sum[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    __m128 total = sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    for (int64_t i = k; i < p.depth; ++i) {
      const __m128 right = _mm_setr_ps(w[i], w[p.w_stride + i], w[2 * p.w_stride + i], w[3 * p.w_stride + i]);
      total = _mm_fmadd_ps(_mm_set1_ps(x[r * p.x_stride + i]), right, total);
    }
    float* y = p.y + (row + r) * p.y_stride + col;
    const __m128 before = !first ? _mm_loadu_ps(y) : p.bias ? _mm_loadu_ps(p.bias + col) : _mm_setzero_ps();
    _mm_storeu_ps(y, _mm_add_ps(before, total));
  }
}

void dot_column(const Product& p, bool first, int64_t col) {
  const float* w = p.w + col * p.w_stride;
  for (int64_t row = 0; row < p.rows; ++row) {
    const float* x = p.x + row * p.x_stride;
    __m256 sum = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + LANES <= p.depth; k += LANES) sum = _mm256_fmadd_ps(_mm256_loadu_ps(x + k), _mm256_loadu_ps(w + k), sum);
    float total = _mm_cvtss_f32(sums(sum, sum, sum, sum));
    for (; k < p.depth; ++k) total += x[k] * w[k];
    float* y = p.y + row * p.y_stride + col;
    *y = total + (!first ? *y : p.bias ? p.bias[col] : 0.0f);
  }
}

int64_t dot_depth(const Product& p) {
  return divide_up(divide_up(p.depth, divide_up(p.depth, DOT_DEPTH)), LANES) * LANES;
}

void dot_products(const Product& p, float* scratch, int threads) {
  const int64_t step = dot_depth(p), tasks = divide_up(p.cols, TASK_COLUMNS), tiles = divide_up(p.rows, ROWS);
#pragma omp parallel num_threads(threads)
  {
    // x by pieces of the depth: those of far-apart rows lie on more pages than the processor can keep in mind
#pragma omp for
    for (int64_t row = 0; row < p.rows; ++row)
      for (int64_t start = 0; start < p.depth; start += step)
        __builtin_memcpy(scratch + start * p.rows + row * step, p.x + row * p.x_stride + start,
                         least(step, p.depth - start) * sizeof(float));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t end = least(p.cols, (task + 1) * TASK_COLUMNS);
      for (int64_t start = 0; start < p.depth; start += step) {
        Product piece = p;
        piece.x = scratch + start * p.rows;
        piece.x_stride = step;
        piece.w += start;
        piece.depth = least(step, p.depth - start);
        int64_t col = task * TASK_COLUMNS;
        for (; col + COLUMNS <= end; col += COLUMNS) {
          for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
            const int64_t rows = divide_up(p.rows - row, tiles - tile);  // as equal as can be
            const float* ahead = piece.w + least(col + COLUMNS + tile % COLUMNS, p.cols - 1) * p.w_stride;
            if (rows == 3) dot_tile<3>(piece, start == 0, row, col, ahead);
            if (rows == 2) dot_tile<2>(piece, start == 0, row, col, ahead);
            if (rows == 1) dot_tile<1>(piece, start == 0, row, col, ahead);
            row += rows;
          }
        }
        for (; col < end; ++col) dot_column(piece, start == 0, col);
      }
    }
  }
}

// -- w as [depth, cols] ----------------------------------------------------------------------------------------

constexpr int64_t WIDTH = 2 * LANES;     // of a tile
constexpr int64_t TALLEST = 6;           // rows of a tile: 6 x 2 sums, 2 of w and one of x, 15 registers
constexpr int64_t PANEL = 24 * WIDTH;    // columns of a task: long pieces of w's rows, as memory likes it
constexpr int64_t OUTER_DEPTH = 64;      // PANEL x OUTER_DEPTH floats are 96 KiB of the second cache
constexpr int64_t THIN_PANEL = 2 * PANEL;
constexpr int64_t LEAST_PART = 512;      // of the depth that has a sum of its own,
constexpr int64_t TASKS = 64;            // so that many threads find work in a narrow product

template <int rows>
void outer_tile(const float* x, int64_t x_stride, const float* w, int64_t depth, float* y, int64_t y_stride) {
  __m256 sum[rows][2];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < 2; ++c) sum[r][c] = _mm256_loadu_ps(y + r * y_stride + c * LANES);
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    const __m256 first = _mm256_load_ps(w + k * WIDTH), second = _mm256_load_ps(w + k * WIDTH + LANES);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const __m256 left = _mm256_broadcast_ss(x + r * x_stride + k);
      sum[r][0] = _mm256_fmadd_ps(left, first, sum[r][0]);
      sum[r][1] = _mm256_fmadd_ps(left, second, sum[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < 2; ++c) _mm256_storeu_ps(y + r * y_stride + c * LANES, sum[r][c]);
}

// Rows [start, start + depth) of columns [col, col + PANEL), as tiles of WIDTH columns; 0 beyond the matrix.
void pack(const Product& p, int64_t col, int64_t start, int64_t depth, float* packed) {
  const int64_t width = least(PANEL, p.cols - col);
  for (int64_t k = 0; k < depth; ++k) {
    const float* row = p.w + (start + k) * p.w_stride + col;
    for (int64_t tile = 0; tile < PANEL; tile += WIDTH) {
      float* to = packed + tile * OUTER_DEPTH + k * WIDTH;
      if (tile + WIDTH <= width) {
        _mm256_store_ps(to, _mm256_loadu_ps(row + tile));
        _mm256_store_ps(to + LANES, _mm256_loadu_ps(row + tile + LANES));
      } else {
        for (int64_t c = 0; c < WIDTH; ++c) to[c] = tile + c < width ? row[tile + c] : 0.0f;
      }
    }
  }
}

// y [rows, PANEL] += x [rows, start .. end) w [start .. end, col .. col + PANEL)
void outer_panel(const Product& p, int64_t col, int64_t start, int64_t end, float* packed, float* y, int64_t y_stride) {
  const int64_t tiles = divide_up(p.rows, TALLEST), share = divide_up(OUTER_DEPTH, tiles);
  const int64_t width = least(PANEL, p.cols - col);
  for (; start < end; start += OUTER_DEPTH) {
    const int64_t depth = least(OUTER_DEPTH, end - start), next = start + OUTER_DEPTH;
    pack(p, col, start, depth, packed);
    for (int64_t c = 0; c < width; c += WIDTH) {
      for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
        // the next block, a few lines at a time: the processor does not foresee pieces so far apart
        for (int64_t k = next + tile * share; k < least(next + (tile + 1) * share, p.depth); ++k)
          __builtin_prefetch(p.w + k * p.w_stride + col + c);
        const int64_t rows = divide_up(p.rows - row, tiles - tile);
        const float* x = p.x + row * p.x_stride + start;
        const float* w = packed + c * OUTER_DEPTH;
        float* to = y + row * y_stride + c;
        if (rows == 6) outer_tile<6>(x, p.x_stride, w, depth, to, y_stride);
        if (rows == 5) outer_tile<5>(x, p.x_stride, w, depth, to, y_stride);
        if (rows == 4) outer_tile<4>(x, p.x_stride, w, depth, to, y_stride);
        if (rows == 3) outer_tile<3>(x, p.x_stride, w, depth, to, y_stride);
        if (rows == 2) outer_tile<2>(x, p.x_stride, w, depth, to, y_stride);
        if (rows == 1) outer_tile<1>(x, p.x_stride, w, depth, to, y_stride);
        row += rows;
      }
    }
  }
}

// The same for so few rows that a copy of w would not pay: w streams by, ``deep`` of its rows at a time.
template <int rows, int deep>
void thin_panel(const Product& p, int64_t col, int64_t start, int64_t end, float* y, int64_t y_stride) {
  const int64_t width = least(THIN_PANEL, p.cols - col);
  for (; start + deep <= end; start += deep) {
    const float *x = p.x + start, *w = p.w + start * p.w_stride + col;
    __m256 left[rows][deep];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int k = 0; k < deep; ++k) left[r][k] = _mm256_broadcast_ss(x + r * p.x_stride + k);
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) {
      __m256 right[deep];
#pragma GCC unroll 8
      for (int k = 0; k < deep; ++k) right[k] = _mm256_loadu_ps(w + k * p.w_stride + c);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        __m256 sum = _mm256_loadu_ps(y + r * y_stride + c);
#pragma GCC unroll 8
        for (int k = 0; k < deep; ++k) sum = _mm256_fmadd_ps(left[r][k], right[k], sum);
        _mm256_storeu_ps(y + r * y_stride + c, sum);
      }
    }
    for (; c < width; ++c)
      for (int r = 0; r < rows; ++r)
        for (int k = 0; k < deep; ++k) y[r * y_stride + c] += x[r * p.x_stride + k] * w[k * p.w_stride + c];
  }
  if constexpr (deep > 1) thin_panel<rows, 1>(p, col, start, end, y, y_stride);
}

// How the work is divided; by the shape alone, so that the sums don't depend on the number of threads.
struct Division {
  int64_t panel, panels, depth, parts;

  explicit Division(const Product& p) {
    panel = p.rows <= TALLEST ? THIN_PANEL : PANEL;
    panels = divide_up(p.cols, panel);
    const int64_t least_depth = divide_up(p.depth, divide_up(TASKS, panels));
    depth = divide_up(least_depth < LEAST_PART ? LEAST_PART : least_depth, OUTER_DEPTH) * OUTER_DEPTH;
    parts = divide_up(p.depth, depth);
  }
  int64_t stride() const { return panels * panel; }
};

void outer_products(const Product& p, float* scratch, int threads) {
  const Division by(p);
  const int64_t stride = by.stride();
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float packed[PANEL * OUTER_DEPTH];
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < by.panels * by.parts; ++task) {
      const int64_t col = task % by.panels * by.panel, part = task / by.panels;
      const int64_t start = part * by.depth, end = least(p.depth, start + by.depth);
      float* y = scratch + part * p.rows * stride + col;
      for (int64_t row = 0; row < p.rows; ++row) __builtin_memset(y + row * stride, 0, by.panel * sizeof(float));
      switch (p.rows) {
        case 1: thin_panel<1, 8>(p, col, start, end, y, stride); break;
        case 2: thin_panel<2, 6>(p, col, start, end, y, stride); break;
        case 3: thin_panel<3, 4>(p, col, start, end, y, stride); break;
        case 4: thin_panel<4, 3>(p, col, start, end, y, stride); break;
        case 5: thin_panel<5, 2>(p, col, start, end, y, stride); break;
        case 6: thin_panel<6, 2>(p, col, start, end, y, stride); break;
        default: outer_panel(p, col, start, end, packed, y, stride);
      }
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

int64_t few_rows_scratch(const Product& p) {
  if (p.transposed) return p.rows * divide_up(p.depth, dot_depth(p)) * dot_depth(p);
  const Division by(p);
  return by.parts * p.rows * by.stride();
}

void few_rows(const Product& product, float* scratch, int threads) {
  if (product.transposed)
    dot_products(product, scratch, threads);
  else
    outer_products(product, scratch, threads);
}

}  // namespace mendfast
