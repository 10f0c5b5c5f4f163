// Products of few rows in pieces that stay in registers and near caches. One translation unit each.
//
// A row of w that lies along the depth is multiplied by dot products: a tile of ROWS x COLUMNS sums stays in
// registers while it moves along the depth. One that lies along the columns is multiplied by outer products. The first
// of several tiles leaves the others a copy in float32: 16 bits are widened once, and rows of w that lie along the
// columns, often a power of two apart, would evict each other from the first cache.
// Either reads w from memory once, and asks in good time for what comes next: the processor does not foresee pieces so
// far apart. To ask for what lies beyond the matrix does nothing.
#pragma once

#include <type_traits>

#include "elements.h"
#include "few_rows.h"

namespace mendfast {
namespace {

// What a tile multiplies by: w; w, of which it makes a copy; or the copy.
enum Copy { NONE, MADE, READ };

// -- w as [cols, depth] ----------------------------------------------------------------------------------------

// With ROWS x COLUMNS sums, ROWS of x and one of w the registers are full: 16 of AVX2, 31 of AVX-512's 32.
constexpr int COLUMNS = 4;
constexpr int ROWS = ISA == Isa::avx512 ? 6 : 3;
constexpr int64_t DOT_DEPTH = 768;  // a tile's rows of x and w, this deep, take 21 or 30 KiB of the first cache
constexpr int NEAR = ISA == Isa::avx512 ? 3 : 2;  // the cache that the next columns are asked into: the first or second

// A piece of the depth. AVX-512 is through it so soon that, but for two tiles in one piece, all of x should stay near.
inline int64_t dot_depth(int64_t depth, int64_t rows) {
  const bool less = ISA == Isa::avx512 && (depth > DOT_DEPTH || rows > 2 * ROWS);
  return divide_up(divide_up(depth, divide_up(depth, less ? 640 : DOT_DEPTH)), LANES) * LANES;
}

// x as pieces [rows, dot_depth], one after the other along the depth: pieces of far-apart rows lie on more pages than
// the processor can keep in mind. Called by all threads of a team.
template <class Element>
void split_depth(const Product<Element>& p, float* pieces) {
  const int64_t step = dot_depth(p.depth, p.rows);
#pragma omp for
  for (int64_t row = 0; row < p.rows; ++row)
    for (int64_t start = 0; start < p.depth; start += step)
      __builtin_memcpy(pieces + start * p.rows + row * step, p.x + row * p.x_stride + start,
                       least(step, p.depth - start) * sizeof(float));
}

// Of a piece of the depth, p.depth long; of the columns that come next, the tile asks for ``asks``. Inlined it is
// slower.
template <int rows, int asks, Copy copy, class Element>
[[gnu::noinline]] void dot_tile(const Product<Element>& p, bool first, int64_t row, int64_t col, const Element* next,
                                float* copied) {
  const float* x = p.x + row * p.x_stride;
  const Element* w = p.w + col * p.w_stride;
  Vector sum[rows][COLUMNS] = {};
  int64_t k = 0;
#pragma GCC unroll 4
  for (; k + LANES <= p.depth; k += LANES) {
#pragma GCC unroll 4
    for (int i = 0; i < asks; ++i) __builtin_prefetch(next + i * (COLUMNS / asks) * p.w_stride + k, 0, NEAR);
    Vector left[rows];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) left[r] = load(x + r * p.x_stride + k);
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) {
      const Vector right = copy == READ ? load(copied + c * DOT_DEPTH + k) : load(w + c * p.w_stride + k);
      if constexpr (copy == MADE) store(copied + c * DOT_DEPTH + k, right);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) sum[r][c] = multiply_add(left[r], right, sum[r][c]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    __m128 total = sums_of(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    for (int64_t i = k; i < p.depth; ++i) {
      const __m128 right = _mm_setr_ps(value(w[i]), value(w[p.w_stride + i]), value(w[2 * p.w_stride + i]),
                                       value(w[3 * p.w_stride + i]));
      total = _mm_fmadd_ps(_mm_set1_ps(x[r * p.x_stride + i]), right, total);
    }
    float* y = p.y + (row + r) * p.y_stride + col;
    const __m128 before = !first ? _mm_loadu_ps(y) : p.bias ? _mm_loadu_ps(p.bias + col) : _mm_setzero_ps();
    _mm_storeu_ps(y, _mm_add_ps(before, total));
  }
}

// ``rows`` of them, at most ``most``.
template <int asks, Copy copy, int most = ROWS, class Element>
void dot_tile(int64_t rows, const Product<Element>& p, bool first, int64_t row, int64_t col, const Element* next,
              float* copied) {
  if (rows == most)
    dot_tile<most, asks, copy>(p, first, row, col, next, copied);
  else if constexpr (most > 1)
    dot_tile<asks, copy, most - 1>(rows, p, first, row, col, next, copied);
}

template <int asks, bool alone, class Element>
void dot_tiles(const Product<Element>& p, bool first, int64_t col, int64_t tiles) {
  constexpr bool copies = !alone && !std::is_same_v<Element, float>;
  alignas(64) float copied[copies ? COLUMNS * DOT_DEPTH : 1];
  const Element* next = p.w + (col + COLUMNS) * p.w_stride;
  for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
    const int64_t rows = divide_up(p.rows - row, tiles - tile);  // as equal as can be
    const Element* own = next + tile % (COLUMNS / asks) * p.w_stride;
    if constexpr (!copies)
      dot_tile<asks, NONE>(rows, p, first, row, col, own, copied);
    else if (tile == 0)
      dot_tile<asks, MADE>(rows, p, first, row, col, own, copied);
    else
      dot_tile<asks, READ>(rows, p, first, row, col, own, copied);
    row += rows;
  }
}

template <class Element>
void dot_column(const Product<Element>& p, bool first, int64_t col) {
  float room[DOT_DEPTH];
  const float* w = widened(p.w + col * p.w_stride, p.depth, room);
  for (int64_t row = 0; row < p.rows; ++row) {
    const float* x = p.x + row * p.x_stride;
    Vector sum = zeros();
    int64_t k = 0;
    for (; k + LANES <= p.depth; k += LANES) sum = multiply_add(load(x + k), load(w + k), sum);
    float total = sum_of(sum);
    for (; k < p.depth; ++k) total += x[k] * w[k];
    float* y = p.y + row * p.y_stride + col;
    *y = total + (!first ? *y : p.bias ? p.bias[col] : 0.0f);
  }
}

// Columns [col, end) of y, from x as split_depth left it.
template <class Element>
void dot_columns(const Product<Element>& p, const float* pieces, int64_t from, int64_t end) {
  const int64_t step = dot_depth(p.depth, p.rows), tiles = divide_up(p.rows, ROWS);
  for (int64_t start = 0; start < p.depth; start += step) {
    Product<Element> piece = p;
    piece.x = pieces + start * p.rows;
    piece.x_stride = step;
    piece.w += start;
    piece.depth = least(step, p.depth - start);
    int64_t col = from;
    for (; col + COLUMNS <= end; col += COLUMNS) {
      // all of the next columns, whatever the number of tiles
      if (tiles == 1)
        dot_tiles<4, true>(piece, start == 0, col, tiles);
      else if (tiles <= 3)
        dot_tiles<2, false>(piece, start == 0, col, tiles);
      else
        dot_tiles<ISA == Isa::avx512 ? 4 : 1, false>(piece, start == 0, col, tiles);
    }
    for (; col < end; ++col) dot_column(piece, start == 0, col);
  }
}

// -- w as [depth, cols] ----------------------------------------------------------------------------------------

constexpr int64_t WIDTH = 2 * LANES;  // of a tile
constexpr int64_t TALLEST = ISA == Isa::avx512 ? 12 : 6;  // rows of a tile: x 2 sums, 2 of w and one of x
constexpr int64_t PANEL = 768;        // columns at a time: long pieces of w's rows, as memory likes it
constexpr int64_t THIN_DEEP = 16;     // rows of w at a time, if one tile takes them all,
constexpr int64_t MOST_DEEP = 128;    // and if many do
constexpr int64_t SOON = 8;           // rows of w that are on their way to the first cache
template <class Element>
constexpr int64_t NEXT = WIDTH * sizeof(Element) < 64 ? 64 / sizeof(Element) : WIDTH;  // columns, a line at least

// Rows of w at a time: the fewer rows of y, the sooner a tile needs the next ones.
inline int64_t deep_of(int64_t rows) {
  int64_t deep = THIN_DEEP;
  for (int64_t tall = TALLEST; tall < rows && deep < MOST_DEEP; tall *= 2) deep *= 2;
  return deep;
}

// All cache lines of a tile's row, into the first cache or (locality 2) the second.
template <int locality, class Element>
void ask(const Element* row) {
  constexpr int64_t line = 64 / sizeof(Element);
  for (int64_t i = 0; i < WIDTH; i += line) __builtin_prefetch(row + i, 0, locality);
}

// y [rows, WIDTH] += x [rows, depth] w [depth, WIDTH]; the first of several tiles leaves a copy of w to the others.
template <int rows, Copy copy, class Element>
[[gnu::noinline]] void outer_tile(const float* x, int64_t x_stride, const Element* w, int64_t w_stride, float* packed,
                                  int64_t depth, float* y, int64_t y_stride) {
  Vector sum[rows][2];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < 2; ++c) sum[r][c] = load(y + r * y_stride + c * LANES);
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    const Element* row = w + k * w_stride;
    float* copied = packed + k * WIDTH;
    const Vector first = copy == READ ? load(copied) : load(row);
    const Vector second = copy == READ ? load(copied + LANES) : load(row + LANES);
    if constexpr (copy == NONE) {
      ask<3>(row + 2 * NEXT<Element>);
      ask<2>(row + THIN_DEEP * w_stride);
    }
    if constexpr (copy == MADE) {
      ask<3>(row + SOON * w_stride);
      store(copied, first), store(copied + LANES, second);
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const Vector left = all(x[r * x_stride + k]);
      sum[r][0] = multiply_add(left, first, sum[r][0]);
      sum[r][1] = multiply_add(left, second, sum[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < 2; ++c) store(y + r * y_stride + c * LANES, sum[r][c]);
}

// ``rows`` of them, at most ``most``.
template <Copy copy, int most = TALLEST, class Element>
void outer_tile(int64_t rows, const float* x, int64_t x_stride, const Element* w, int64_t w_stride, float* packed,
                int64_t depth, float* y, int64_t y_stride) {
  if (rows == most)
    outer_tile<most, copy>(x, x_stride, w, w_stride, packed, depth, y, y_stride);
  else if constexpr (most > 1)
    outer_tile<copy, most - 1>(rows, x, x_stride, w, w_stride, packed, depth, y, y_stride);
}

// y [rows, PANEL] += x [rows, start .. end) w [start .. end, col .. col + PANEL)
template <class Element>
void outer_panel(const Product<Element>& p, int64_t col, int64_t start, int64_t end, float* y, int64_t y_stride) {
  alignas(64) float packed[MOST_DEEP * WIDTH];
  alignas(64) Element edge[MOST_DEEP * WIDTH];
  const int64_t tiles = divide_up(p.rows, TALLEST), deep = deep_of(p.rows), share = divide_up(deep, tiles);
  const int64_t width = least(PANEL, p.cols - col);
  for (; start < end; start += deep) {
    const int64_t depth = least(deep, end - start);
    for (int64_t c = 0; c < width; c += WIDTH) {
      const bool last = c + WIDTH >= width;  // then the next rows' first columns come next
      const int64_t soon_row = last ? start + deep : start;
      const Element* soon = p.w + soon_row * p.w_stride + col + (last ? 0 : c + WIDTH);
      const Element* w = p.w + start * p.w_stride + col + c;
      int64_t w_stride = p.w_stride;
      if (c + WIDTH > width) {
        for (int64_t k = 0; k < depth; ++k)
          for (int64_t i = 0; i < WIDTH; ++i) edge[k * WIDTH + i] = c + i < width ? w[k * w_stride + i] : Element{};
        w = edge, w_stride = WIDTH;
      }
      for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
        if (tiles > 1)
          for (int64_t k = tile * share; k < least((tile + 1) * share, p.depth - soon_row); ++k)
            ask<2>(soon + k * p.w_stride);
        const int64_t rows = divide_up(p.rows - row, tiles - tile);
        const float* x = p.x + row * p.x_stride + start;
        float* to = y + row * y_stride + c;
        if (tiles == 1)
          outer_tile<NONE>(rows, x, p.x_stride, w, w_stride, packed, depth, to, y_stride);
        else if (tile == 0)
          outer_tile<MADE>(rows, x, p.x_stride, w, w_stride, packed, depth, to, y_stride);
        else
          outer_tile<READ>(rows, x, p.x_stride, w, w_stride, packed, depth, to, y_stride);
        row += rows;
      }
    }
  }
}

}  // namespace
}  // namespace mendfast
