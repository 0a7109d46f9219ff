// A key warpgroup: dK and dV of 64 keys, in registers from the first query to the last.
//
// Scores are computed transposed, [64 keys, tile_m queries], so that P^T and dS^T come out of the
// tensor cores as the A operands of the next products:
//
//   S^T  = K Q^T      P^T  = exp2(S^T scale - lse)          dV += P^T dout
//   dP^T = V dout^T   dS^T = P^T * (dP^T - delta)           dK += dS^T Q
//
// dS^T also goes to shared memory, from which the dQ warpgroup makes dQ = dS K.
// FlashAttention-3, Algorithm 3; the warpgroup of its own for dQ is ours.
//
// One step (time runs down). S^T and dP^T take turns in the same accumulators, because dK, dV and
// both together are more than a lane's registers:
//
//   tensor cores        this warpgroup's lanes
//   dP^T(m)             P^T(m), rounded
//                       dS^T(m), rounded; handed over
//   dV                  wait for the next queries
//   dK, S^T(m + 1)      lse of the next queries
#pragma once

#include "cuda/bwd/key_rows.cuh"
#include "cuda/bwd/work.cuh"
#include "cuda/core/accumulator.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace jax_fa3 {

template <class Config>
class KeyWarpgroup : KeyRows<Config> {
  using Base = KeyRows<Config>;
  using Base::kConfig, Base::kGrads, Base::kScores, Base::kTileM, Base::kTileN;
  using Base::params_, Base::work_, Base::stats_lane_;
  using typename Base::Stats;
  static constexpr int kLongTile = 16;  // query steps

 public:
  __device__ __forceinline__ KeyWarpgroup(const BwdParams& params, const BwdRings<Config>& rings,
                                          const KeyWork& work, int warpgroup)
      : Base(params, work, warpgroup), rings_(rings) {
    stats_lane_ = 4 * accumulator_column();
    // Matrix lane / 8 of a stmatrix: rows 0-7 or 8-15 of the warp's 16, columns 0-7 or 8-15.
    const uint32_t lane = ptx::lane_index();
    const uint32_t row =
        warpgroup * 64 + threadIdx.x % ptx::kWarpgroupSize / ptx::kWarpSize * 16 + lane % 16;
    dscores_lane_ = row * 128 + ((lane / 16 ^ row & 7) << 4);
    // Opaque, or ptxas works them out anew in every step, beginning with a slow look at the
    // thread's index.
    leader_ = lane == 0;
    asm volatile("" : "+r"(stats_lane_), "+r"(dscores_lane_), "+r"(leader_));
  }

  __device__ __forceinline__ void run() {
    float dk[kGrads], dv[kGrads];
#pragma unroll
    for (int i = 0; i < kGrads; ++i) dk[i] = dv[i] = 0.0f;

    const QuerySteps own =
        query_steps<kConfig.mask>(this->first_key(), this->first_key() + 64, params_.seqlen_q,
                                  params_.seqlen_k, work_.diagonal, kTileM);
    const int32_t unmasked_begin = ptx::uniform(own.unmasked_begin);
    // Of the first head's first steps, those that only the keys of the warpgroups before see. It
    // does them all the same in a long tile, where starting out of step with the others costs more
    // than it saves (head dim 128, causal: 2 % at 8192 tokens, against 3 to 4 % won at 512 and
    // 1024).
    const int32_t steps = work_.steps.end - work_.steps.begin;
    const int32_t unseen = StepOrder<Config>::kBackwards || steps > kLongTile
                               ? 0
                               : ptx::uniform(own.begin) - work_.steps.begin;

    walk(unmasked_begin, unseen, dk, dv);
    this->store(dk, params_.scale, params_.dk);
    this->store(dv, 1.0f, params_.dv);
  }

 private:
  // All steps. No test for zero steps around the loop: gradients that come from two places meet in
  // copies of registers, and wgmma is serialized for want of those. For the same reason there is a
  // product for the step after the last, of tiles that are there anyway; nobody reads it.
  __device__ __forceinline__ void walk(int32_t unmasked_begin, int32_t unseen, float (&dk)[kGrads],
                                       float (&dv)[kGrads]) {
    const int32_t total = params_.group * (work_.steps.end - work_.steps.begin) - unseen;
    float product[kScores];
    const StepOrder<Config> order(params_, work_.steps);
    int32_t m = order.first + unseen;
    if (m == order.end) m = order.first;  // none of the first head's
#pragma unroll 1
    for (; unseen > 0; --unseen) pass_over();
    ptx::mbarrier_wait(rings_.k_full, 0);
    ptx::mbarrier_wait(rings_.v_full, 0);
    if (total > 0) wait(rings_.q_full, at_);
    ptx::wgmma_fence();
    this->issue_transposed(product, rings_.k, rings_.q, at_.stage);
    Stats lse = this->load_stats(rings_.lse_log2, at_.stage);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(product);

#pragma unroll 1
    for (int32_t left = total; left > 0; --left) {
      uint32_t probs[kScores / 2], dscores[kScores / 2];
      if (m < unmasked_begin) this->mask(m, product);
      this->exponentiate(product, lse);
      pack_fragments<kConfig.dtype>(product, probs);
      ptx::fence_registers(probs);

      wait(rings_.dout_full, at_);
      ptx::wgmma_fence();
      this->issue_transposed(product, rings_.v, rings_.dout, at_.stage);
      ptx::wgmma_wait<0>();
      ptx::fence_registers(product);
      // Not before the wait, as lse is: no registers are left there (8 to 80 bytes of spills).
      const Stats delta = this->load_stats(rings_.delta, at_.stage);
      this->differentiate(probs, product, delta, dscores);
      hand_over(dscores);

      ptx::fence_registers(dv);
      ptx::fence_registers(probs);
      ptx::wgmma_fence();
      this->issue_gradient(dv, probs, rings_.dout, at_.stage);
      auto next = at_;
      if (left > 1) {
        next.advance();
        // In turns every register counts. (Without a causal mask all steps are masked alike.)
        if constexpr (!kConfig.in_turns() || kConfig.mask == MaskKind::kCausal) order.advance(m);
        wait(rings_.q_full, next);
      }
      ptx::wgmma_wait<0>();
      ptx::fence_registers(dv);
      ptx::fence_registers(dk);
      ptx::fence_registers(dscores);
      ptx::fence_registers(product);
      ptx::wgmma_fence();
      this->issue_gradient(dk, dscores, rings_.q, at_.stage);
      this->issue_transposed(product, rings_.k, rings_.q, next.stage);
      lse = this->load_stats(rings_.lse_log2, next.stage);
      ptx::wgmma_wait<0>();
      ptx::fence_registers(dk);
      ptx::fence_registers(product);
      at_ = next;
    }
  }

  // A step whose dS is zeros. (Its tiles are waited for all the same: a wait for the next ones in
  // the stage could not tell their phase from one that has not begun.)
  __device__ __forceinline__ void pass_over() {
    wait(rings_.q_full, at_);
    wait(rings_.dout_full, at_);
    uint32_t zeros[kScores / 2];
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) zeros[i] = 0;
    hand_over(zeros);
    at_.advance();
  }

  // Waits for a stage's tiles.
  __device__ __forceinline__ void wait(uint32_t full,
                                       const typename BwdRings<Config>::Position& at) const {
    ptx::mbarrier_wait(full + 8 * at.stage, at.phase);
  }

  // dS^T to shared memory, [key][query] in rows of 128 bytes, for the dQ warpgroup.
  __device__ __forceinline__ void hand_over(const uint32_t (&dscores)[kScores / 2]) {
    const uint32_t tile = rings_.dscores + dscores_at_.stage * kConfig.dscores_bytes();
    ptx::mbarrier_wait(rings_.dscores_ring.empty_barrier(dscores_at_.stage), dscores_at_.phase ^ 1);
    uint32_t lane = dscores_lane_;
    if constexpr (kConfig.in_turns()) {
      // Opaque in each step, or ptxas keeps all of its swizzled forms in registers and spills.
      asm volatile("" : "+r"(lane));
    }
#pragma unroll
    for (int step = 0; step < kTileM / 16; ++step) {  // 16 columns are 32 bytes, swizzled
      const uint32_t half = tile + step / 4 * kTileN * 128;
      ptx::stmatrix_x4(half + (lane ^ step % 4 << 5), dscores[4 * step], dscores[4 * step + 1],
                       dscores[4 * step + 2], dscores[4 * step + 3]);
    }
    ptx::fence_proxy_async();
    __syncwarp();
    if (leader_) ptx::mbarrier_arrive(rings_.dscores_ring.full_barrier(dscores_at_.stage));
    dscores_at_.advance();
  }

  const BwdRings<Config>& rings_;
  uint32_t leader_;        // of the warp: arrives at barriers
  uint32_t dscores_lane_;  // byte offset of the lane's row in a dS tile, swizzled
  typename BwdRings<Config>::Position at_;
  typename BwdRings<Config>::DscoresPosition dscores_at_;
};

}  // namespace jax_fa3
