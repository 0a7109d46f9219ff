// Which (query tile, head, batch row) a CTA works on next. The grid is persistent: as many CTAs as
// multiprocessors, each taking tiles until none is left.
#pragma once

#include <cstdint>

#include "cuda/core/tile_scheduler.h"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/warp.cuh"

namespace jax_fa3 {

// The shared memory of a dynamic schedule: a ring of two tile indices.
struct TileQueue {
  static constexpr int kSlots = 2;
  uint64_t full[kSlots];
  uint64_t empty[kSlots];
  uint32_t index[kSlots];

  static constexpr uint32_t kFull = 0, kEmpty = 16, kIndex = 32;  // byte offsets of the members
};

// Every role computes the same sequence; nothing is communicated.
struct StaticSchedule {
  uint32_t index;

  __device__ __forceinline__ explicit StaticSchedule(uint32_t /*queue*/) : index(blockIdx.x) {}
  static __device__ __forceinline__ void init(uint32_t /*queue*/, int /*consumer_warps*/) {}
  __device__ __forceinline__ void prefetch(uint32_t* /*counter*/) {}
  __device__ __forceinline__ void publish() {}
  __device__ __forceinline__ void receive() {}
  __device__ __forceinline__ void step() { index += gridDim.x; }
};

// A global counter hands out tiles; the producer draws one tile ahead and passes the indices on.
// The counter is zero at launch; CTA i begins with tile i.
struct DynamicSchedule {
  uint32_t queue;  // shared-memory address of the TileQueue
  uint32_t index;
  uint32_t drawn = 0;
  uint32_t turn = 0;  // bit 0 is the slot, bit 1 its phase: roles are short of registers

  __device__ __forceinline__ explicit DynamicSchedule(uint32_t queue)
      : queue(queue), index(blockIdx.x) {}

  static __device__ __forceinline__ void init(uint32_t queue, int consumer_warps) {
    for (int slot = 0; slot < TileQueue::kSlots; ++slot) {
      ptx::mbarrier_init(queue + TileQueue::kFull + 8 * slot, 1);
      ptx::mbarrier_init(queue + TileQueue::kEmpty + 8 * slot, consumer_warps);
    }
  }

  // Producer, while it still loads the current tile: the draw's latency hides behind the loads.
  __device__ __forceinline__ void prefetch(uint32_t* counter) {
    drawn = gridDim.x + atomicAdd(counter, 1u);
  }
  // Producer: hands `index` to the consumers, the first index past the end included.
  __device__ __forceinline__ void publish() {
    ptx::mbarrier_wait(empty_barrier(), phase() ^ 1);
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(index_address()), "r"(index) : "memory");
    ptx::mbarrier_arrive(full_barrier());
    ++turn;
  }
  // Consumer warps. One lane reads and gives the slot back; the shuffle also tells ptxas that the
  // index is uniform over the warp.
  __device__ __forceinline__ void receive() {
    ptx::mbarrier_wait(full_barrier(), phase());
    if (ptx::lane_index() == 0) {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(index) : "r"(index_address()) : "memory");
      ptx::mbarrier_arrive(empty_barrier());
    }
    index = __shfl_sync(0xffffffff, index, 0);
    ++turn;
  }
  __device__ __forceinline__ void step() { index = drawn; }

 private:
  static_assert(TileQueue::kSlots == 2, "turn counts slots in one bit");
  __device__ __forceinline__ uint32_t slot() const { return turn & 1; }
  __device__ __forceinline__ uint32_t phase() const { return turn >> 1 & 1; }
  __device__ __forceinline__ uint32_t full_barrier() const {
    return queue + TileQueue::kFull + 8 * slot();
  }
  __device__ __forceinline__ uint32_t empty_barrier() const {
    return queue + TileQueue::kEmpty + 8 * slot();
  }
  __device__ __forceinline__ uint32_t index_address() const {
    return queue + TileQueue::kIndex + 4 * slot();
  }
};

}  // namespace jax_fa3
