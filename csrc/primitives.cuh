// The machine: every instruction that the kernels need by name. The kernels use nothing else of CUDA, so that the
// tests can run them on a CPU, thread by thread, against a replacement of this file (MENDFAST_EMULATION).
#pragma once

#include <cstdint>

namespace mendfast {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct alignas(16) Words4 {
  uint32_t word[4];
};

}  // namespace mendfast

#ifdef MENDFAST_EMULATION
#include MENDFAST_EMULATION
#else

namespace mendfast {

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int block_index() { return blockIdx.x; }
__device__ __forceinline__ int grid_size() { return gridDim.x; }
__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ float word_to_float(uint32_t word) { return __uint_as_float(word); }
__device__ __forceinline__ uint32_t float_to_word(float value) { return __float_as_uint(value); }
__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
// In PTX: the headers for these types take longer to compile than the kernels.
__device__ __forceinline__ float to_float(f16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
__device__ __forceinline__ uint16_t nearest(float value, bf16) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ uint16_t nearest(float value, f16) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ uint16_t f16_toward_zero(float value) {
  uint16_t bits;
  asm("cvt.rz.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Two floats, rounded to nearest; the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// Weights pass through once: don't let them push the factors out of the cache.
__device__ __forceinline__ Words4 load_streaming(const void* source) {
  const uint4 v = __ldcs(static_cast<const uint4*>(source));
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void store_streaming(void* target, const Words4& value) {
  __stcs(static_cast<uint4*>(target), make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
}
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Copies `bytes` of 16 to shared memory and fills up with zeros.
__device__ __forceinline__ void copy_async(void* shared, const void* source, int bytes) {
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the newest group have arrived.
__device__ __forceinline__ void copy_async_wait_older() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements, transposed; lane 8 i + r gives the address of matrix i's row r.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* shared_row) {
  const uint32_t source = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(source)
               : "memory");
}

// c[16 x 8] += a[16 x 16] b[16 x 8], accumulated in float32.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace mendfast

#endif
