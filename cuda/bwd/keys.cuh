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

#include "cuda/bwd/work.cuh"
#include "cuda/core/accumulator.cuh"
#include "cuda/core/unpack.cuh"
#include "cuda/ptx/stmatrix.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace jax_fa3 {

template <class Config>
class KeyWarpgroup {
  static constexpr BwdConfig kConfig = Config::value;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kTileN = kConfig.tile_n();
  static constexpr int kTileM = kConfig.tile_m;
  static constexpr int kScores = kTileM / 2;  // accumulators a lane: 64 x kTileM over 128 lanes
  static constexpr int kGrads = kHeadDim / 2;
  static constexpr int kLongTile = 16;  // query steps

 public:
  __device__ __forceinline__ KeyWarpgroup(const BwdParams& params, const BwdRings<Config>& rings,
                                          const KeyWork& work, int warpgroup)
      : params_(params), rings_(rings), work_(work), warpgroup_(warpgroup) {
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

    const QuerySteps own = query_steps<kConfig.mask>(
        first_key(), first_key() + 64, params_.seqlen_q, params_.seqlen_k, work_.diagonal, kTileM);
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
    store(dk, params_.scale, params_.dk);
    store(dv, 1.0f, params_.dv);
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
#pragma unroll 1
    for (; unseen > 0; --unseen) pass_over();
    ptx::mbarrier_wait(rings_.k_full, 0);
    ptx::mbarrier_wait(rings_.v_full, 0);
    if (total > 0) wait(rings_.q_full, at_);
    ptx::wgmma_fence();
    issue_transposed(product, rings_.k, rings_.q, at_.stage);
    Stats lse = load_stats(rings_.lse_log2, at_.stage);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(product);

#pragma unroll 1
    for (int32_t left = total; left > 0; --left) {
      uint32_t probs[kScores / 2], dscores[kScores / 2];
      if (m < unmasked_begin) mask(m, product);
      exponentiate(product, lse);
      pack_fragments<kConfig.dtype>(product, probs);
      ptx::fence_registers(probs);

      wait(rings_.dout_full, at_);
      ptx::wgmma_fence();
      issue_transposed(product, rings_.v, rings_.dout, at_.stage);
      ptx::wgmma_wait<0>();
      ptx::fence_registers(product);
      const Stats delta = load_stats(rings_.delta, at_.stage);
      differentiate(probs, product, delta, dscores);
      hand_over(dscores);

      ptx::fence_registers(dv);
      ptx::fence_registers(probs);
      ptx::wgmma_fence();
      issue_gradient(dv, probs, rings_.dout);
      auto next = at_;
      if (left > 1) {
        next.advance();
        order.advance(m);
        wait(rings_.q_full, next);
      }
      ptx::wgmma_wait<0>();
      ptx::fence_registers(dv);
      ptx::fence_registers(dk);
      ptx::fence_registers(dscores);
      ptx::fence_registers(product);
      ptx::wgmma_fence();
      issue_gradient(dk, dscores, rings_.q);
      issue_transposed(product, rings_.k, rings_.q, next.stage);
      lse = load_stats(rings_.lse_log2, next.stage);
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

  // The transposed product of the warpgroup's 64 rows of a key tile with the stage's queries (or
  // dout), both K-major.
  __device__ __forceinline__ void issue_transposed(float (&product)[kScores], uint32_t key_tile,
                                                   uint32_t query_tiles, int stage) {
    using Mma = ptx::Wgmma<kConfig.dtype, kTileM>;
    const ptx::SmemOperand keys = ptx::k_major_operand(key_tile + warpgroup_ * 64 * 128);
    const ptx::SmemOperand queries = ptx::k_major_operand(query_tiles + stage * kConfig.q_bytes());
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int chunk = step / 4, within = step % 4 * 32;
      Mma::template ss<ptx::Major::kK, ptx::Major::kK>(
          product, keys.descriptor(chunk * kTileN * 128 + within),
          queries.descriptor(chunk * kTileM * 128 + within), step > 0);
    }
    ptx::wgmma_commit();
  }

  // gradient += fragments [64 keys, kTileM queries] times the stage's rows, queries contracted.
  __device__ __forceinline__ void issue_gradient(float (&gradient)[kGrads],
                                                 const uint32_t (&fragments)[kScores / 2],
                                                 uint32_t query_tiles) {
    using Mma = ptx::Wgmma<kConfig.dtype, kHeadDim>;
    const ptx::SmemOperand rows =
        ptx::mn_major_operand(query_tiles + at_.stage * kConfig.q_bytes(), kTileM * 128);
#pragma unroll
    for (int step = 0; step < kTileM / 16; ++step) {
      Mma::template rs<ptx::Major::kMN>(gradient, fragments[4 * step], fragments[4 * step + 1],
                                        fragments[4 * step + 2], fragments[4 * step + 3],
                                        rows.descriptor(step * 16 * 128), 1);
    }
    ptx::wgmma_commit();
  }

  // A row of the lane is seen by queries from its first one on. (Worked out here, in the few steps
  // that need it, because registers that are held through the others are what there is least of.)
  __device__ __forceinline__ void mask(int32_t m, float (&scores)[kScores]) {
    const int32_t key = first_key() + accumulator_row();
    const int32_t first = m * kTileM + accumulator_column();
    int32_t limit[2] = {
        first_visible_query<kConfig.mask>(key, params_.seqlen_k, work_.diagonal) - first,
        first_visible_query<kConfig.mask>(key + 8, params_.seqlen_k, work_.diagonal) - first};
    // Without a causal mask a row is seen by all or by none. ptxas must not make a branch of that:
    // it would diverge, and wgmma around it be serialized.
    asm volatile("" : "+r"(limit[0]), "+r"(limit[1]));
    mask_below(scores, limit);
  }

  // A stage's lse or delta at the lane's columns 8 j and 8 j + 1. Better loaded before a wait for
  // the tensor cores than behind it: while they read shared memory, these take hundreds of cycles.
  // So is lse; for delta there are no registers left before its wait (ptxas spills 8 to 80 bytes).
  struct Stats {
    float2 pairs[kTileM / 8];
  };
  __device__ __forceinline__ Stats load_stats(uint32_t rows, int stage) const {
    const uint32_t row = rows + stage * kConfig.stats_bytes() + stats_lane_;
    Stats stats;
#pragma unroll
    for (int j = 0; j < kTileM / 8; ++j) {
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(stats.pairs[j].x), "=f"(stats.pairs[j].y)
                   : "r"(row + 32 * j));
    }
    return stats;
  }

  __device__ __forceinline__ void exponentiate(float (&scores)[kScores], const Stats& stats) {
#pragma unroll
    for (int j = 0; j < kTileM / 8; ++j) {
      const float2 lse = stats.pairs[j];
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; i += 2) {
        scores[i] = ptx::exp2_approx(__fmaf_rn(scores[i], params_.scale_log2, -lse.x));
        scores[i + 1] = ptx::exp2_approx(__fmaf_rn(scores[i + 1], params_.scale_log2, -lse.y));
      }
    }
  }

  // dS^T, rounded, from the rounded P^T: registers do not hold the unrounded one beside dP^T, dK
  // and dV. One rounding more, of the size of the one that follows.
  __device__ __forceinline__ void differentiate(const uint32_t (&probs)[kScores / 2],
                                                const float (&dprobs)[kScores], const Stats& stats,
                                                uint32_t (&dscores)[kScores / 2]) {
#pragma unroll
    for (int j = 0; j < kTileM / 8; ++j) {
      const float2 delta = stats.pairs[j];
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; i += 2) {
        const float2 p = unpack<kConfig.dtype>(probs[i / 2]);
        dscores[i / 2] =
            pack<kConfig.dtype>(p.x * (dprobs[i] - delta.x), p.y * (dprobs[i + 1] - delta.y));
      }
    }
  }

  // dS^T to shared memory, [key][query] in rows of 128 bytes, for the dQ warpgroup.
  __device__ __forceinline__ void hand_over(const uint32_t (&dscores)[kScores / 2]) {
    const uint32_t tile = rings_.dscores + dscores_at_.stage * kConfig.dscores_bytes();
    ptx::mbarrier_wait(rings_.dscores_ring.empty_barrier(dscores_at_.stage), dscores_at_.phase ^ 1);
    uint32_t lane = dscores_lane_;
    if constexpr (kConfig.dq_sum == DqSum::kInTurns) {
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

  // The lane's two rows of dK or dV, [batch, seqlen_k, heads_k, head_dim].
  __device__ __forceinline__ void store(const float (&gradient)[kGrads], float scale,
                                        void* tensor) {
    const int32_t key = first_key() + accumulator_row();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t token = static_cast<int64_t>(work_.batch) * params_.seqlen_k + key + 8 * r;
      auto* const row =
          reinterpret_cast<uint4*>(static_cast<uint16_t*>(tensor) +
                                   (token * params_.grid.heads_k + work_.head_k) * kHeadDim);
      store_row<kConfig.dtype>(gradient, r, scale, row, key + 8 * r < params_.seqlen_k);
    }
  }

  __device__ __forceinline__ int32_t first_key() const {
    return work_.n_tile * kTileN + warpgroup_ * 64;
  }

  const BwdParams& params_;
  const BwdRings<Config>& rings_;
  const KeyWork& work_;
  const int warpgroup_;
  uint32_t leader_;        // of the warp: arrives at barriers
  uint32_t stats_lane_;    // byte offset of the lane's columns in a row of lse or delta
  uint32_t dscores_lane_;  // byte offset of the lane's row in a dS tile, swizzled
  typename BwdRings<Config>::Position at_;
  typename BwdRings<Config>::DscoresPosition dscores_at_;
};

}  // namespace jax_fa3
