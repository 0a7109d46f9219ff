// The 16 hardware barriers of a CTA. Ids are compile-time constants, so that ptxas reserves only
// those that are used.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-bar
#pragma once

namespace jax_fa3::ptx {

enum class NamedBarrier : int {
  kSyncThreads = 0,  // __syncthreads
  kPingpong = 1,     // one a consumer warpgroup: kPingpong + warpgroup
};

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace jax_fa3::ptx
