// A row at a time, in pieces that stay in the first cache: the largest logits, then all sums; the row is still in a
// near cache for them. Each piece is summed in float32 and added up in float64.
#include "kl_divergence.h"

#include <omp.h>

#include <cmath>

#include "elements.h"

namespace mendfast {
namespace {

constexpr int64_t PIECE = 1024;

template <class Element>
const Element* row_of(const Logits& logits, const Divergence& d, int64_t row) {
  return static_cast<const Element*>(logits.data) + row / d.length * logits.sample +
         row % d.length * logits.position;
}

// A piece of a row, in float32, up to a whole number of vectors; what was added has no weight.
template <class Element>
const float* piece(const Element* from, int64_t count, float* buffer) {
  const int64_t whole = count / LANES * LANES;
  if constexpr (sizeof(Element) == sizeof(float))
    if (count == whole) return from;
  for (int64_t i = 0; i < whole; i += LANES) store(buffer + i, load(from + i));
  if (whole < count) {
    alignas(64) Element rest[LANES] = {};
    __builtin_memcpy(rest, from + whole, (count - whole) * sizeof(Element));
    store(buffer + whole, load(rest));
    for (int64_t i = count; i < whole + LANES; ++i) buffer[i] = -INFINITY;
  }
  return buffer;
}

struct Sums {
  double base = 0, edited = 0, gap = 0;  // of e_p, e_q, and e_p (p - q)
};

void add_piece(const float* p, const float* q, int64_t count, Vector top_p, Vector top_q, Sums& sums) {
  Vector base = zeros(), edited = base, gaps = base;
  for (int64_t i = 0; i < count; i += LANES) {
    const Vector x = subtract(load(p + i), top_p), y = subtract(load(q + i), top_q);
    const Vector weight = exp_of(x);
    base = add(base, weight);
    edited = add(edited, exp_of(y));
    // what is impossible in the base has weight 0, however far apart the logits are
    gaps = add(gaps, unless_zero(weight, multiply(weight, subtract(x, y))));
  }
  sums.base += sum_of(base), sums.edited += sum_of(edited), sums.gap += sum_of(gaps);
}

template <class Base, class Edited>
void forward(const Divergence& d, float* kl, float* lse_base, float* lse_edited, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t row = 0; row < d.batch * d.length; ++row) {
    if (!d.keep[row]) {
      kl[row] = lse_base[row] = lse_edited[row] = 0.0f;
      continue;
    }
    const Base* p = row_of<Base>(d.base, d, row);
    const Edited* q = row_of<Edited>(d.edited, d, row);
    alignas(64) float p_buffer[PIECE], q_buffer[PIECE];
    float top_p = -INFINITY, top_q = -INFINITY;
    for (int64_t i = 0; i < d.vocabulary; i += PIECE) {
      const int64_t count = least(PIECE, d.vocabulary - i);
      top_p = largest(piece(p + i, count, p_buffer), count, top_p);
      top_q = largest(piece(q + i, count, q_buffer), count, top_q);
    }
    Sums sums;
    for (int64_t i = 0; i < d.vocabulary; i += PIECE) {
      const int64_t count = least(PIECE, d.vocabulary - i);
      add_piece(piece(p + i, count, p_buffer), piece(q + i, count, q_buffer), count, all(top_p),
                all(top_q), sums);
    }
    // one logarithm of the quotient: of two like sums nothing is lost in a difference
    kl[row] = static_cast<float>(sums.gap / sums.base + std::log(sums.edited / sums.base));
    lse_base[row] = static_cast<float>(std::log(sums.base) + top_p);
    lse_edited[row] = static_cast<float>(std::log(sums.edited) + top_q);
  }
}

template <class Base, class Edited>
void backward(const Divergence& d, const float* grad, const float* lse_base, const float* lse_edited, void* out,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t row = 0; row < d.batch * d.length; ++row) {
    Edited* to = static_cast<Edited*>(out) + row * d.vocabulary;
    if (!d.keep[row]) {
      __builtin_memset(to, 0, d.vocabulary * sizeof(Edited));
      continue;
    }
    const Base* p = row_of<Base>(d.base, d, row);
    const Edited* q = row_of<Edited>(d.edited, d, row);
    const Vector lse_p = all(lse_base[row]), lse_q = all(lse_edited[row]);
    const Vector by = all(grad[row]);
    alignas(64) float p_buffer[LANES], q_buffer[LANES];
    const auto difference = [&](const float* base, const float* edited) {
      const Vector from = exp_of(subtract(load(base), lse_p));
      return multiply(by, subtract(exp_of(subtract(load(edited), lse_q)), from));
    };
    int64_t i = 0;
    for (; i + LANES <= d.vocabulary; i += LANES)
      store(to + i, difference(piece(p + i, LANES, p_buffer), piece(q + i, LANES, q_buffer)));
    if (i < d.vocabulary) {
      const int64_t rest = d.vocabulary - i;
      alignas(64) Edited edge[LANES];
      store(edge, difference(piece(p + i, rest, p_buffer), piece(q + i, rest, q_buffer)));
      __builtin_memcpy(to + i, edge, rest * sizeof(Edited));
    }
  }
}

// run of the two kinds' elements
template <class Run>
void by_kinds(const Divergence& d, Run run) {
  const auto second = [&](auto base) {
    if (d.edited.kind == Kind::float32) run(base, float{});
    if (d.edited.kind == Kind::bfloat16) run(base, BF16{});
    if (d.edited.kind == Kind::float16) run(base, F16{});
  };
  if (d.base.kind == Kind::float32) second(float{});
  if (d.base.kind == Kind::bfloat16) second(BF16{});
  if (d.base.kind == Kind::float16) second(F16{});
}

}  // namespace

template <>
void kl_forward<ISA>(const Divergence& d, float* kl, float* lse_base, float* lse_edited, int threads) {
  by_kinds(d, [&](auto base, auto edited) {
    forward<decltype(base), decltype(edited)>(d, kl, lse_base, lse_edited, threads);
  });
}

template <>
void kl_backward<ISA>(const Divergence& d, const float* grad, const float* lse_base, const float* lse_edited, void* out,
                 int threads) {
  by_kinds(d, [&](auto base, auto edited) {
    backward<decltype(base), decltype(edited)>(d, grad, lse_base, lse_edited, out, threads);
  });
}

}  // namespace mendfast
