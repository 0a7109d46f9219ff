// A ring of shared-memory stages between the producer and the consumers.
//
//   producer --full[s]--> consumers     TMA has landed the stage's bytes
//   producer <--empty[s]-- consumers    every consumer warp is done with the stage
//
// The four verbs are CUTLASS's: the producer acquires a stage and commits it (TMA does), a consumer
// waits for it and releases it.
#pragma once

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/warp.cuh"

namespace jax_fa3 {

// Where a role stands in a ring. Never reset: it runs on from tile to tile.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// `full` and `empty` are the addresses of kStages barriers each.
template <int kStages>
struct Ring {
  uint32_t full;
  uint32_t empty;

  static constexpr uint32_t kBarrierBytes = 8;

  __device__ __forceinline__ uint32_t full_barrier(int stage) const {
    return full + stage * kBarrierBytes;
  }
  __device__ __forceinline__ uint32_t empty_barrier(int stage) const {
    return empty + stage * kBarrierBytes;
  }

  // One thread. A fresh ring is empty: the wait for the opposite parity returns at once.
  __device__ __forceinline__ void acquire(const RingPosition<kStages>& at, uint32_t bytes) const {
    ptx::mbarrier_wait(empty_barrier(at.stage), at.phase ^ 1);
    ptx::mbarrier_arrive_expect_tx(full_barrier(at.stage), bytes);
  }
  // Whole warps, or single threads.
  __device__ __forceinline__ void wait(const RingPosition<kStages>& at) const {
    ptx::mbarrier_wait(full_barrier(at.stage), at.phase);
  }
  // Each warp for itself, not one thread for its warpgroup: a warp that lags two phases behind its
  // siblings would wait for a parity that has already come round again. That happens where a
  // warpgroup skips blocks, since no wgmma keeps its warps together there.
  __device__ __forceinline__ void release(const RingPosition<kStages>& at) const {
    if (ptx::lane_index() == 0) ptx::mbarrier_arrive(empty_barrier(at.stage));
  }

  // `producers` arrive at a full barrier: one thread, with TMA's bytes, or warps that store.
  __device__ __forceinline__ void init(int consumer_warps, int producers = 1) const {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full_barrier(stage), producers);
      ptx::mbarrier_init(empty_barrier(stage), consumer_warps);
    }
  }
};

}  // namespace jax_fa3
