// csrc/primitives.cuh for a machine without a GPU: a block's threads are fibers, run one after the other between
// barriers, in an order that the caller chooses. Instructions of a whole warp (mma, ldmatrix, shfl) wait until all 32
// lanes have come to the same one. Asynchronous copies arrive at once or as late as the waits allow, by choice: a
// kernel that is right under both, and in any order of threads, needs no luck.
//
// Fragment layouts are those of the PTX ISA: "Matrix fragments for mma.m16n8k16", "ldmatrix".
#pragma once

#include <csetjmp>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

namespace mendfast {

using ::fabsf;
using ::fmaf;
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace emulation {

enum class Op { none, shuffle, ldmatrix, mma_bf16, mma_f16 };
enum class State { ready, at_block_barrier, at_warp_op, done };

struct Copy {
  void* target;
  const void* source;
  int bytes;
  void run() const {
    char buffer[16] = {};
    if (bytes > 0) std::memcpy(buffer, source, bytes);
    std::memcpy(target, buffer, 16);
  }
};

struct Thread {
  ucontext_t context;
  jmp_buf resume;
  bool started;
  std::vector<char> stack;
  State state;
  Op op;
  // of the warp operation under way
  float value, *result, *c;
  const uint32_t *a, *b;
  uint32_t* out;
  const void* row;
  int mask;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};

struct Machine {
  static constexpr int threads = 256;
  Thread thread[threads];
  ucontext_t end;
  jmp_buf scheduler;
  int current = 0, block = 0, grid = 1, order = 0;
  bool eager = false;
  std::function<void()> kernel;
  std::exception_ptr error;
};
inline Machine machine;

inline Thread& self() { return machine.thread[machine.current]; }
// Jumps change fibers; swapcontext, which makes them, asks the kernel for the signal mask every time.
inline void yield(State state) {
  self().state = state;
  if (_setjmp(self().resume) == 0) _longjmp(machine.scheduler, 1);
}
__attribute__((noinline)) inline void resume(int index) {
  machine.current = index;
  if (_setjmp(machine.scheduler) != 0) return;
  if (self().started) _longjmp(self().resume, 1);
  self().started = true;
  setcontext(&self().context);
}
inline void start() {
  try {
    machine.kernel();
  } catch (...) {
    machine.error = std::current_exception();
  }
  yield(State::done);
}

inline float half(uint32_t word, int which) {
  const uint16_t bits = word >> (which * 16);
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
inline float as_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
// Element i of a lane's fragment; 16-bit types have two in a word.
inline float element(Op op, const uint32_t* words, int i) {
  return op == Op::mma_f16 ? half(words[i / 2], i % 2) : as_float(words[i / 2] >> (i % 2 * 16) << 16);
}

inline void run_mma(Thread* warp, Op op) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) a[g + i / 2 % 2 * 8][t * 2 + i % 2 + i / 4 * 8] = element(op, warp[lane].a, i);
    for (int i = 0; i < 4; ++i) b[t * 2 + i % 2 + i / 2 * 8][g] = element(op, warp[lane].b, i);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      double sum = warp[lane].c[i];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][col];
      warp[lane].c[i] = static_cast<float>(sum);
    }
  }
}

inline void run_warp_op(Thread* warp) {
  const Op op = warp[0].op;
  for (int lane = 1; lane < 32; ++lane)
    if (warp[lane].op != op) throw std::runtime_error("the lanes of a warp came to different instructions");
  if (op == Op::shuffle) {
    for (int lane = 0; lane < 32; ++lane) *warp[lane].result = warp[lane ^ warp[lane].mask].value;
  } else if (op == Op::ldmatrix) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (int j = 0; j < 2; ++j)
          std::memcpy(&pair[j], static_cast<const char*>(warp[i * 8 + lane % 4 * 2 + j].row) + lane / 4 * 2, 2);
        warp[lane].out[i] = static_cast<uint32_t>(pair[1]) << 16 | pair[0];
      }
    }
  } else {
    run_mma(warp, op);
  }
}

inline void warp_op(Op op) {
  self().op = op;
  yield(State::at_warp_op);
}

// Runs every lane that can run, then the instruction that all wait for; false if nothing could be done.
inline bool run_warp(Thread* warp) {
  bool ran = false;
  int waiting = 0;
  for (int i = 0; i < 32; ++i) {
    const int lane = machine.order % 2 == 0 ? i : 31 - i;
    if (warp[lane].state == State::ready) {
      resume(static_cast<int>(warp - machine.thread) + lane);
      if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
      ran = true;
    }
    waiting += warp[lane].state == State::at_warp_op;
  }
  if (waiting < 32) return ran;
  run_warp_op(warp);
  for (int lane = 0; lane < 32; ++lane) warp[lane].state = State::ready;
  return true;
}

// Runs one block to its end.
inline void run_block(int block) {
  Machine& m = machine;
  m.block = block;
  for (Thread& thread : m.thread) {
    thread.stack.resize(64 * 1024);
    thread.state = State::ready;
    thread.open.clear();
    thread.committed.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &m.end;
    thread.started = false;
    makecontext(&thread.context, start, 0);
  }
  while (true) {
    bool ran = false;
    int done = 0, waiting = 0;
    for (int i = 0; i < Machine::threads / 32; ++i) {
      const int warp = m.order % 2 == 0 ? i : Machine::threads / 32 - 1 - i;
      // in greedy orders a warp runs until a barrier of the block stops it, far ahead of the others
      while (run_warp(m.thread + warp * 32)) {
        ran = true;
        if (m.order < 2) break;
      }
    }
    for (const Thread& thread : m.thread) {
      done += thread.state == State::done;
      waiting += thread.state == State::at_block_barrier;
    }
    if (done == Machine::threads) return;
    if (waiting == Machine::threads) {
      for (Thread& thread : m.thread) thread.state = State::ready;
    } else if (!ran) {
      throw std::runtime_error("deadlock: some threads wait for others that never come");
    }
  }
}

}  // namespace emulation

inline int thread_index() { return emulation::machine.current; }
inline int block_index() { return emulation::machine.block; }
inline int grid_size() { return emulation::machine.grid; }
inline void sync_block() { emulation::yield(emulation::State::at_block_barrier); }
inline float shuffle_xor(float value, int mask) {
  float result;
  emulation::Thread& thread = emulation::self();
  thread.value = value;
  thread.mask = mask;
  thread.result = &result;
  emulation::warp_op(emulation::Op::shuffle);
  return result;
}

inline float word_to_float(uint32_t word) { return emulation::as_float(word); }
inline uint32_t float_to_word(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return word_to_float(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(f16 value) { return emulation::half(value.bits, 0); }
inline uint16_t nearest(float value, bf16) {
  const uint32_t bits = float_to_word(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint16_t nearest(float value, f16) {
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline uint16_t f16_toward_zero(float value) {
  uint16_t bits = nearest(value, f16{});
  if (std::fabs(to_float(f16{bits})) > std::fabs(value)) --bits;
  return bits;
}
inline uint32_t pack_bf16(float low, float high) {
  return static_cast<uint32_t>(nearest(high, bf16{})) << 16 | nearest(low, bf16{});
}

inline Words4 load_streaming(const void* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16) throw std::runtime_error("a 16-byte load is not aligned");
  Words4 value;
  std::memcpy(&value, source, 16);
  return value;
}
inline void store_streaming(void* target, const Words4& value) {
  if (reinterpret_cast<uintptr_t>(target) % 16) throw std::runtime_error("a 16-byte store is not aligned");
  std::memcpy(target, &value, 16);
}
inline void prefetch_l2(const void*) {}

inline void copy_async(void* shared, const void* source, int bytes) {
  if (reinterpret_cast<uintptr_t>(source) % 16 || reinterpret_cast<uintptr_t>(shared) % 16)
    throw std::runtime_error("an asynchronous copy is not aligned");
  const emulation::Copy copy{shared, source, bytes};
  if (emulation::machine.eager) return copy.run();
  emulation::self().open.push_back(copy);
}
inline void copy_async_commit() {
  emulation::self().committed.push_back(std::move(emulation::self().open));
  emulation::self().open.clear();
}
inline void copy_async_wait_older() {
  auto& committed = emulation::self().committed;
  while (committed.size() > 1) {
    for (const emulation::Copy& copy : committed.front()) copy.run();
    committed.pop_front();
  }
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* shared_row) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16) throw std::runtime_error("a row for ldmatrix is not aligned");
  emulation::self().out = out;
  emulation::self().row = shared_row;
  emulation::warp_op(emulation::Op::ldmatrix);
}
inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulation::Op op) {
  emulation::Thread& thread = emulation::self();
  thread.c = c;
  thread.a = a;
  thread.b = b;
  emulation::warp_op(op);
}
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  multiply(c, a, b, emulation::Op::mma_bf16);
}
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
  multiply(c, a, b, emulation::Op::mma_f16);
}

}  // namespace mendfast
