// The divergence of two models' predictions over a vocabulary, on the CPU.
#pragma once

#include <cstdint>

#include "kinds.h"

namespace mendfast {

// [batch, length, vocabulary]; the vocabulary lies in one piece.
struct Logits {
  const void* data;
  int64_t sample, position;  // from one to the next, in elements
  Kind kind;
};

struct Divergence {
  Logits base, edited;
  const bool* keep;  // [batch, length]; what is not kept is not read, and gives 0
  int64_t batch, length, vocabulary;
};

// kl, lse_base, lse_edited [batch, length]: KL(softmax(base) || softmax(edited)) and both log-sum-exps.
template <Isa isa>
void kl_forward(const Divergence& d, float* kl, float* lse_base, float* lse_edited, int threads);

// out [batch, length, vocabulary], of edited's kind: grad [batch, length] times (softmax(edited) - softmax(base)).
template <Isa isa>
void kl_backward(const Divergence& d, const float* grad, const float* lse_base, const float* lse_edited, void* out,
                 int threads);

}  // namespace mendfast
