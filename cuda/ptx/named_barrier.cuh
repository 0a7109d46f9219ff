// The 16 hardware barriers of a CTA. Where an id depends on the warpgroup ptxas reserves all of
// them, which costs nothing with one CTA a multiprocessor.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-bar
#pragma once

#include <cstdint>

namespace jax_fa3::ptx {

enum class NamedBarrier : int {
  kSyncThreads = 0,  // __syncthreads
  kPingpong = 1,     // one a consumer warpgroup, up to four
  kVote = 5,         // likewise
  kDq = 9,           // the warpgroup that makes dQ
};

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Waits for `threads` threads and returns whether `value` held in any of them.
__device__ __forceinline__ bool named_barrier_any(int id, int threads, bool value) {
  uint32_t any;
  asm volatile(
      "{\n.reg .pred p, q;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "barrier.cta.red.or.pred q, %2, %3, p;\n"
      "selp.u32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(static_cast<uint32_t>(value)), "r"(id), "r"(threads)
      : "memory");
  return any != 0;
}

}  // namespace jax_fa3::ptx
