// The matrix is read and written once, a tile of TALL x WIDE elements at a time, whose sums stay in registers while
// they go through the terms. Rows of tiles follow memory. Factors are copied first into the order in which tiles ask
// for them. With very few terms there is little to keep and memory sets the pace: a row at a time then, from end to end.
#include "outer_update.h"

#include <omp.h>

#include "elements.h"

namespace mendfast {
namespace {

constexpr int TALL = ISA == Isa::avx512 ? 12 : 6;  // TALL x 2 sums, 2 of right and one of left:
constexpr int WIDE = 2 * LANES;                    // 27 registers of 32, or 15 of 16
constexpr int64_t BLOCK = 64 * 1024;               // floats of right that stay in a near cache
constexpr int64_t MOST_COLUMNS = 1024;             // of a block,
constexpr int64_t MOST_DRAWN = 512;                // and of one with draws
constexpr int64_t TASK_ROWS = 8 * TALL;
constexpr int64_t FEW_TERMS = 2;

// left as [rows / TALL][terms][TALL], then right as [cols / WIDE][terms][WIDE]; zeros beyond the edges.
struct Packed {
  float *left, *right;

  Packed(const OuterUpdate& u, float* scratch)
      : left(scratch), right(scratch + divide_up(divide_up(u.rows, TALL) * TALL * u.terms, 16) * 16) {}
};

void pack_left(const OuterUpdate& u, int64_t panel, float* to) {
  const int64_t row = panel * TALL, rows = least(TALL, u.rows - row);
  const float* from = u.left + row * u.left_row;
  for (int64_t t = 0; t < u.terms; ++t)
    for (int64_t r = 0; r < TALL; ++r) to[t * TALL + r] = r < rows ? from[t * u.left_term + r * u.left_row] : 0.0f;
}

void pack_right(const OuterUpdate& u, int64_t panel, float* to) {
  const int64_t col = panel * WIDE, cols = least(WIDE, u.cols - col);
  const float* from = u.right + col;
  for (int64_t t = 0; t < u.terms; ++t, from += u.right_stride, to += WIDE) {
    if (cols == WIDE) {
      store(to, load(from)), store(to + LANES, load(from + LANES));
    } else {
      for (int64_t c = 0; c < WIDE; ++c) to[c] = c < cols ? from[c] : 0.0f;
    }
  }
}

// -- stochastic rounding ---------------------------------------------------------------------------------------

struct Long {
  __m256i low, high;
};

// The 64-bit products of eight numbers with one.
Long multiplied(__m256i a, uint32_t by) {
  const __m256i b = _mm256_set1_epi32(static_cast<int>(by));
  const __m256i even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
  return {_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA),
          _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA)};
}

// 16 random bits for each of 64 columns of a row, the first a multiple of 64: Philox4x32-10 (Salmon et al. 2011), the
// seed as key and (column / 8, row, 0, 0) as counter; its words serve eight columns, low halves first.
void draw(uint64_t seed, int64_t row, int64_t col, uint16_t* to) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i a = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(col / 8)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  __m256i b = _mm256_set1_epi32(static_cast<int>(row)), c = zero, d = zero;
  auto first_key = static_cast<uint32_t>(seed), second_key = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Long first = multiplied(a, 0xD2511F53), second = multiplied(c, 0xCD9E8D57);
    a = _mm256_xor_si256(_mm256_xor_si256(second.high, b), _mm256_set1_epi32(static_cast<int>(first_key)));
    c = _mm256_xor_si256(_mm256_xor_si256(first.high, d), _mm256_set1_epi32(static_cast<int>(second_key)));
    b = second.low, d = first.low;
    first_key += 0x9E3779B9, second_key += 0xBB67AE85;
  }
  // the four words of each lane beside each other
  const __m256i ab = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
  const __m256i cd = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
  const __m256i lanes[4] = {_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd),
                            _mm256_unpacklo_epi64(ab_high, cd_high), _mm256_unpackhi_epi64(ab_high, cd_high)};
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * i), _mm256_castsi256_si128(lanes[i]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * (i + 4)), _mm256_extracti128_si256(lanes[i], 1));
  }
}

// Toward zero, plus one unit in the last place where the part cut off and the draw carry over; to nearest what is, or
// would become, infinite.
void store_drawn(BF16* to, Vector x, const uint16_t* draws) {
  const Words bits = bits_of(x), size = both(bits, all_words(0x7FFFFFFF));
  const Words drawn = shifted_right<16>(add(bits, widened_halves(load_halves(draws))));
  store_halves(to, low_halves(where_greater(size, all_words(0x7F7EFFFF), drawn, nearest_bf16(x))));
}

// -- tiles -----------------------------------------------------------------------------------------------------

template <bool stochastic, class Element>
void finish(Vector first, Vector second, Vector alpha, const Element* from, Element* to, const uint16_t* draws) {
  first = multiply_subtract(alpha, first, load(from));
  second = multiply_subtract(alpha, second, load(from + LANES));
  if constexpr (stochastic) {
    store_drawn(to, first, draws), store_drawn(to + LANES, second, draws + LANES);
  } else {
    store(to, first), store(to + LANES, second);
  }
}

template <bool stochastic, class Element>
[[gnu::noinline]] void tile(const OuterUpdate& u, const float* left, const float* right, const Element* from,
                            Element* to, const uint16_t* draws, int64_t rows, int64_t cols) {
  for (int r = 0; r < TALL; ++r) __builtin_prefetch(from + (TALL + r) * u.from_stride, 1);  // of the tile that is below
  Vector sum[TALL][2] = {};
#pragma GCC unroll 4
  for (int64_t t = 0; t < u.terms; ++t) {
    const Vector first = load(right + t * WIDE), second = load(right + t * WIDE + LANES);
#pragma GCC unroll 12
    for (int r = 0; r < TALL; ++r) {
      const Vector factor = all(left[t * TALL + r]);
      sum[r][0] = multiply_add(factor, first, sum[r][0]);
      sum[r][1] = multiply_add(factor, second, sum[r][1]);
    }
  }
  const Vector alpha = all(u.alpha);
  if (rows == TALL && cols == WIDE) {
#pragma GCC unroll 12
    for (int r = 0; r < TALL; ++r)
      finish<stochastic>(sum[r][0], sum[r][1], alpha, from + r * u.from_stride, to + r * u.to_stride,
                         draws + (stochastic ? r * MOST_DRAWN : 0));
    return;
  }
  Vector kept[TALL][2];  // of sums that a loop counts, none would stay in a register
  __builtin_memcpy(kept, sum, sizeof kept);
  for (int64_t r = 0; r < rows; ++r) {
    Element edge[WIDE] = {};
    __builtin_memcpy(edge, from + r * u.from_stride, cols * sizeof(Element));
    finish<stochastic>(kept[r][0], kept[r][1], alpha, edge, edge, draws + (stochastic ? r * MOST_DRAWN : 0));
    __builtin_memcpy(to + r * u.to_stride, edge, cols * sizeof(Element));
  }
}

template <bool stochastic, class Element>
void write(const OuterUpdate& u, float* scratch, int threads) {
  const Packed packed(u, scratch);
  const int64_t left_panels = divide_up(u.rows, TALL), right_panels = divide_up(u.cols, WIDE);
  int64_t columns = least(stochastic ? MOST_DRAWN : MOST_COLUMNS, BLOCK / u.terms / 64 * 64);
  columns = columns < 64 ? 64 : columns;
  const int64_t blocks = divide_up(u.cols, columns), tasks = divide_up(u.rows, TASK_ROWS);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for nowait
    for (int64_t i = 0; i < left_panels; ++i) pack_left(u, i, packed.left + i * TALL * u.terms);
#pragma omp for
    for (int64_t i = 0; i < right_panels; ++i) pack_right(u, i, packed.right + i * WIDE * u.terms);
    alignas(64) uint16_t draws[stochastic ? TALL * MOST_DRAWN : 1];
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < blocks * tasks; ++task) {
      const int64_t start = task / tasks * columns, end = least(u.cols, start + columns);
      const int64_t last = least(u.rows, (task % tasks + 1) * TASK_ROWS);
      for (int64_t row = task % tasks * TASK_ROWS; row < last; row += TALL) {
        const int64_t rows = least(TALL, u.rows - row);
        if constexpr (stochastic)
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t col = start; col < end; col += 64)
              draw(u.seed, row + r, col, draws + r * MOST_DRAWN + col - start);
        const Element* from = static_cast<const Element*>(u.from) + row * u.from_stride;
        Element* to = static_cast<Element*>(u.to) + row * u.to_stride;
        for (int64_t col = start; col < end; col += WIDE)
          tile<stochastic>(u, packed.left + row * u.terms, packed.right + col * u.terms, from + col, to + col,
                           stochastic ? draws + col - start : draws, rows, least(WIDE, u.cols - col));
      }
    }
  }
}

template <class Element>
void write_lines(const OuterUpdate& u, int threads) {
  const Vector alpha = all(u.alpha);
  const int64_t whole = u.cols / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < u.rows; ++row) {
    const Element* from = static_cast<const Element*>(u.from) + row * u.from_stride;
    Element* to = static_cast<Element*>(u.to) + row * u.to_stride;
    Vector factors[FEW_TERMS];
    for (int64_t t = 0; t < u.terms; ++t) factors[t] = all(u.left[row * u.left_row + t * u.left_term]);
    for (int64_t col = 0; col < whole; col += LANES) {
      Vector sum = {};
      for (int64_t t = 0; t < u.terms; ++t)
        sum = multiply_add(factors[t], load(u.right + t * u.right_stride + col), sum);
      store(to + col, multiply_subtract(alpha, sum, load(from + col)));
    }
    if (const int64_t cols = u.cols - whole) {
      Element edge[LANES] = {};
      __builtin_memcpy(edge, from + whole, cols * sizeof(Element));
      Vector sum = {};
      for (int64_t t = 0; t < u.terms; ++t) {
        float right[LANES] = {};
        __builtin_memcpy(right, u.right + t * u.right_stride + whole, cols * sizeof(float));
        sum = multiply_add(factors[t], load(right), sum);
      }
      store(edge, multiply_subtract(alpha, sum, load(edge)));
      __builtin_memcpy(to + whole, edge, cols * sizeof(Element));
    }
  }
}

template <class Element>
void write_nearest(const OuterUpdate& u, float* scratch, int threads) {
  if (u.terms <= FEW_TERMS)
    write_lines<Element>(u, threads);
  else
    write<false, Element>(u, scratch, threads);
}

// Whether all exponents are less than that of infinity.
bool finite(const float* values, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, values + i, sizeof bits);
    bits &= 0x7FFFFFFF;
    most = bits > most ? bits : most;
  }
  return most < 0x7F800000;
}

}  // namespace

template <>
bool finite_factors<ISA>(const OuterUpdate& u) {
  const bool by_term = u.left_row == 1;
  const int64_t lines = by_term ? u.terms : u.rows, length = by_term ? u.rows : u.terms;
  for (int64_t i = 0; i < lines; ++i)
    if (!finite(u.left + i * (by_term ? u.left_term : u.left_row), length)) return false;
  for (int64_t t = 0; t < u.terms; ++t)
    if (!finite(u.right + t * u.right_stride, u.cols)) return false;
  return true;
}

template <>
int64_t outer_update_scratch<ISA>(const OuterUpdate& u) {
  return (divide_up(u.rows, TALL) * TALL + divide_up(u.cols, WIDE) * WIDE) * u.terms + 16;
}

template <>
void outer_update<ISA>(const OuterUpdate& u, Kind kind, bool stochastic, float* scratch, int threads) {
  if (kind == Kind::float32) write_nearest<float>(u, scratch, threads);
  if (kind == Kind::float16) write_nearest<F16>(u, scratch, threads);
  if (kind == Kind::bfloat16 && !stochastic) write_nearest<BF16>(u, scratch, threads);
  if (kind == Kind::bfloat16 && stochastic) write<true, BF16>(u, scratch, threads);
}

}  // namespace mendfast
