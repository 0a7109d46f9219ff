// The fourth warpgroup of a CTA where key tiles take turns in adding to dQ, so that the result is
// the same bits in every run: one thread loads, two add. A step's turn comes when the key tiles of
// lower index have added to it, which a counter in global memory says.
//
// A turn is passed on by a release, behind the wait for the additions: the wait alone orders them
// for the thread that issued them, not for the next key tile's. (With the L2 overloaded 59 of 60
// runs differed.) A release takes half a step, so two threads add, every other step each, and
// neither the tensor cores nor the loads wait for them. (In the dQ warpgroup's own thread the mode
// ran at 0.62 of the default's speed, at 0.85 with a turn for four steps.)
//
// A key tile waits only for tiles of the same (batch row, head) pair and a lower index, which have
// been launched before it, and which come to every step that it comes to.
#pragma once

#include "cuda/bwd/dq.cuh"
#include "cuda/bwd/loader.cuh"
#include "cuda/bwd/work.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/warp.cuh"

namespace jax_fa3 {

// One thread. It waits for each step's dS as the dQ warpgroup does, since nothing else says which
// stages may be filled again, and releases it like a warp of that.
template <class Config>
__device__ __forceinline__ void load_steps(const BwdParams& params, const BwdRings<Config>& rings,
                                           const KeyWork& work, int32_t total) {
  Loader<Config> loader(params, rings, work);
  loader.begin();
  typename BwdRings<Config>::DscoresPosition at;
#pragma unroll 1
  for (int32_t left = total; left > 0; --left) {
    rings.dscores_ring.wait(at);
    if (left != total) loader.load_step();
    ptx::mbarrier_arrive(rings.dscores_ring.empty_barrier(at.stage));
    at.advance();
  }
}

// One thread: every kDqAdders-th step from `first` on.
template <class Config>
__device__ __forceinline__ void add_steps(const BwdParams& params, const BwdRings<Config>& rings,
                                          const KeyWork& work, int32_t total, int32_t first) {
  constexpr BwdConfig kConfig = Config::value;
  constexpr int kAdders = BwdConfig::kDqAdders;
  DqSteps<Config> destination(params, work);
#pragma unroll 1
  for (int32_t i = 0; i < first; ++i) destination.advance();
  const uint32_t full = rings.dq_ring.full_barrier(first);
  const uint32_t empty = rings.dq_ring.empty_barrier(first);
  uint32_t phase = 0;
#pragma unroll 1
  for (int32_t left = total - first; left > 0; left -= kAdders) {
    float* const step = *destination;
    uint32_t* const turn =
        params.turns + (step - params.dq_accumulator) / (BwdConfig::kBlockRows * kConfig.head_dim);
    while (ptx::load_acquire(turn) != static_cast<uint32_t>(work.n_tile)) {
    }
    ptx::fence_proxy_async_global();
    ptx::mbarrier_wait(full, phase);
    ptx::bulk_add_f32(step, rings.dq, kConfig.dq_blocks() * BwdConfig::dq_bytes());
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    ptx::mbarrier_arrive(empty);
    ptx::bulk_wait<0>();
    ptx::add_release(turn, 1);
    phase ^= 1;
#pragma unroll
    for (int i = 0; i < kAdders; ++i) destination.advance();
  }
}

template <class Config>
__device__ __forceinline__ void load_and_add(const BwdParams& params, const BwdRings<Config>& rings,
                                             const KeyWork& work) {
  const int32_t total = params.group * (work.steps.end - work.steps.begin);
  if (ptx::lane_index() != 0) return;
  const int warp = threadIdx.x % ptx::kWarpgroupSize / 32;
  if (warp == 0) {
    load_steps<Config>(params, rings, work, total);
  } else if (warp <= BwdConfig::kDqAdders) {
    add_steps<Config>(params, rings, work, total, warp - 1);
  }
}

}  // namespace jax_fa3
