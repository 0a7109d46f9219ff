// Lanes, warps, warpgroups: who am I, which one of us acts, how many registers may we have.
#pragma once

#include <cstdint>

namespace jax_fa3::ptx {

inline constexpr int kWarpSize = 32;
inline constexpr int kWarpgroupSize = 128;

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarpSize; }

// Uniform over the warp. The shuffle tells ptxas so; without it, branches on the index count as
// divergent and wgmma inside them is serialized.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / kWarpSize, 0);
}
__device__ __forceinline__ int warpgroup_index() { return warp_index() / 4; }

// A value that is the same in all lanes, in a form that ptxas believes: the reduction writes a
// uniform register, while it takes what a shuffle returns for divergent. Below a bound or a branch
// that it takes for divergent the rings' positions leave the uniform registers, which costs every
// key block some 25 instructions (head dim 128 causal: 231 against 209), or wgmma is serialized.
__device__ __forceinline__ int32_t uniform(int32_t x) { return __reduce_max_sync(0xffffffff, x); }

// True in exactly one lane of a converged warp.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-elect-sync
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(elected));
  return elected != 0;
}

// setmaxnreg: all warps of the warpgroup execute it, once, at the top of their role.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A counter in global memory by which CTAs wait for one another: what a thread did before it added
// is done for whoever has seen the sum. What TMA did for it is where a bulk_wait came before, and
// what TMA does next where a fence_proxy_async_global comes behind.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
__device__ __forceinline__ void add_release(uint32_t* counter, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// Reductions over the four lanes that share an accumulator row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// 2^x, flushing denormals; exact at -inf (+0) and NaN. Not volatile: ptxas may place it freely.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace jax_fa3::ptx
