// TMA: the copy engine that moves a box of a tensor between global and shared memory.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
#pragma once

#include <cstdint>

#include "cuda/core/tensor_map.h"

namespace jax_fa3::ptx {

__device__ __forceinline__ void tma_prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads one box; `barrier` counts its bytes. Elements outside the tensor arrive as zeros, and
// their bytes count as well. Coordinates are innermost first.
__device__ __forceinline__ void tma_load_5d(const TensorMap& map, uint32_t barrier,
                                            uint32_t destination, int32_t c0, int32_t c1,
                                            int32_t c2, int32_t c3, int32_t c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Copies `bytes` (a multiple of 16, as are both addresses) of contiguous memory; `barrier` counts
// them.
__device__ __forceinline__ void bulk_load(uint32_t barrier, uint32_t destination,
                                          const void* source, uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(destination),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// Adds contiguous float32 numbers in shared memory to those in global memory, asynchronously; each
// addition is atomic, their order is not defined. Generic stores to `source` need a
// fence_proxy_async before it.
__device__ __forceinline__ void bulk_add_f32(float* destination, uint32_t source, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   destination),
               "r"(source), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// The calling thread's bulk groups but the newest kPending have read their shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// The calling thread's bulk groups but the newest kPending are complete: it sees what they wrote.
// Others do behind a release of this thread's that follows, and not before it.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
// Orders this thread's ordinary accesses to shared memory before what wgmma and TMA do there next;
// a barrier must follow for the other threads.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// The same for global memory: orders what this thread has seen before what TMA does there next for
// it.
__device__ __forceinline__ void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace jax_fa3::ptx
