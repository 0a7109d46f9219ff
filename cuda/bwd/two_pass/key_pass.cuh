// The CTAs that make dK and dV: 64 keys of one key head, and the queries that see them, 64 a step,
// of each query head of the group. Their gradients fill two warpgroups' registers, one each:
//
//   warpgroup 0  values    S^T  = K Q^T      P^T  = exp2(S^T scale - lse)      dV += P^T dout
//   warpgroup 1  keys      dP^T = V dout^T   dS^T = P^T * (dP^T - delta)       dK += dS^T Q
//   warpgroup 2  loader    one thread
//
// P^T goes from the first to the second in the order of the registers, which is the same in both.
// A warpgroup issues the gradient of a step and the first product of the next together, and the
// other's products fill the tensor cores while it works on what comes out.
//
//   loader --k_full, v_full, q_full[s], dout_full[s]--> both --q_empty[s], dout_empty[s]--> loader
//   values --probs_full[s]--> keys --probs_empty[s]--> values
#pragma once

#include "cuda/bwd/key_rows.cuh"
#include "cuda/bwd/two_pass/work.cuh"
#include "cuda/core/accumulator.cuh"
#include "cuda/core/operand_batch.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace jax_fa3 {

// The shared memory as the roles see it: addresses.
template <class Config>
struct KeyPassRings {
  static constexpr BwdConfig kConfig = Config::value;
  using Position = RingPosition<kConfig.stages>;
  using ProbsPosition = RingPosition<kConfig.dscores_stages>;

  uint32_t k, v, q, dout, probs, lse_log2, delta;
  uint32_t k_full, v_full;
  Ring<kConfig.stages> q_ring, dout_ring;  // queries and their lse, dout and its delta
  Ring<kConfig.dscores_stages> probs_ring;

  __device__ __forceinline__ explicit KeyPassRings(KeyPassSmem<Config>& smem)
      : k(ptx::shared_address(smem.k)),
        v(ptx::shared_address(smem.v)),
        q(ptx::shared_address(smem.q)),
        dout(ptx::shared_address(smem.dout)),
        probs(ptx::shared_address(smem.probs)),
        lse_log2(ptx::shared_address(smem.lse_log2)),
        delta(ptx::shared_address(smem.delta)),
        k_full(ptx::shared_address(&smem.k_full)),
        v_full(ptx::shared_address(&smem.v_full)),
        q_ring{ptx::shared_address(smem.q_full), ptx::shared_address(smem.q_empty)},
        dout_ring{ptx::shared_address(smem.dout_full), ptx::shared_address(smem.dout_empty)},
        probs_ring{ptx::shared_address(smem.probs_full), ptx::shared_address(smem.probs_empty)} {}

  // One thread.
  __device__ __forceinline__ void init() const {
    ptx::mbarrier_init(k_full, 1);
    ptx::mbarrier_init(v_full, 1);
    q_ring.init(8);  // the warps of both warpgroups
    dout_ring.init(8);
    probs_ring.init(4, 4);
  }
};

// One thread: keys and values once, then queries and dout step by step.
template <class Config>
__device__ __forceinline__ void load_key_pass(const BwdParams& params,
                                              const KeyPassRings<Config>& rings,
                                              const KeyWork& work) {
  constexpr BwdConfig kConfig = Config::value;
  const OperandBatch batch = operand_batch(params.batch_map, work.batch);
  const auto load_keys = [&](const TensorMap& map, uint32_t barrier, uint32_t tile, int32_t row) {
    ptx::mbarrier_arrive_expect_tx(barrier, kConfig.kv_bytes());
    ptx::tma_load_5d(map, barrier, tile, 0, work.n_tile * kConfig.tile_n(), 0, work.head_k, row);
  };
  // A step's rows of query or dout, and what belongs to them of lse or delta.
  typename KeyPassRings<Config>::Position at;
  const auto load_rows = [&](const auto& ring, const TensorMap& map, uint32_t tiles, int32_t row,
                             uint32_t stats, const float* source, int32_t head, int32_t m) {
    ring.acquire(at, kConfig.q_bytes() + kConfig.stats_bytes());
    const uint32_t barrier = ring.full_barrier(at.stage);
    ptx::tma_load_5d(map, barrier, tiles + at.stage * kConfig.q_bytes(), 0, m * kConfig.tile_m, 0,
                     head, row);
    ptx::bulk_load(barrier, stats + at.stage * kConfig.stats_bytes(),
                   source + row_index(params, work.batch, head, m * kConfig.tile_m),
                   kConfig.stats_bytes());
  };
  int32_t head = work.head_k * params.group, m = work.steps.begin;
  const int32_t total = params.group * (work.steps.end - work.steps.begin);
#pragma unroll 1
  for (int32_t i = 0; i < total; ++i) {
    if (i == 0) load_keys(params.k_map, rings.k_full, rings.k, batch.k);
    load_rows(rings.q_ring, params.q_map, rings.q, batch.q, rings.lse_log2, params.lse_log2, head,
              m);
    if (i == 0) load_keys(params.v_map, rings.v_full, rings.v, batch.v);
    load_rows(rings.dout_ring, params.dout_map, rings.dout, work.batch, rings.delta, params.delta,
              head, m);
    at.advance();
    if (++m == work.steps.end) {
      m = work.steps.begin;
      ++head;
    }
  }
}

// What the two warpgroups have in common.
template <class Config>
class KeyPassWarpgroup : protected KeyRows<Config> {
 protected:
  using Position = typename KeyPassRings<Config>::Position;

  __device__ __forceinline__ KeyPassWarpgroup(const BwdParams& params,
                                              const KeyPassRings<Config>& rings,
                                              const KeyWork& work)
      : KeyRows<Config>(params, work, 0),
        rings_(rings),
        total_(params.group * (work.steps.end - work.steps.begin)) {
    this->stats_lane_ = 4 * accumulator_column();
    probs_lane_ = threadIdx.x % ptx::kWarpgroupSize * 16;
    // Opaque, or ptxas works them out anew in every step.
    asm volatile("" : "+r"(this->stats_lane_), "+r"(probs_lane_));
  }

  const KeyPassRings<Config>& rings_;
  const int32_t total_;  // steps
  uint32_t probs_lane_;  // byte offset of the lane's words in a stage of probs
};

template <class Config>
class ValueWarpgroup : KeyPassWarpgroup<Config> {
  using Base = KeyPassWarpgroup<Config>;
  using Base::kConfig, Base::kGrads, Base::kScores;
  using Base::params_, Base::rings_, Base::work_, Base::total_;
  using typename Base::Position, typename Base::Stats;

 public:
  __device__ __forceinline__ ValueWarpgroup(const BwdParams& params,
                                            const KeyPassRings<Config>& rings, const KeyWork& work)
      : Base(params, rings, work),
        m_(work.steps.begin),
        unmasked_begin_(ptx::uniform(work.steps.unmasked_begin)) {}

  __device__ __forceinline__ void run() {
    if (total_ == 0) return this->store_zeros(params_.dv);
    float dv[kGrads], scores[kScores];
    uint32_t probs[kScores / 2];
#pragma unroll
    for (int i = 0; i < kGrads; ++i) dv[i] = 0.0f;

    ptx::mbarrier_wait(rings_.k_full, 0);
    rings_.q_ring.wait(at_);
    ptx::wgmma_fence();
    this->issue_transposed(scores, rings_.k, rings_.q, at_.stage);
    Stats lse = this->load_stats(rings_.lse_log2, at_.stage);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(scores);
    __syncwarp();  // every lane has read its lse
    rings_.q_ring.release(at_);

#pragma unroll 1
    for (int32_t left = total_; left > 1; --left) {
      make_probs(scores, lse, probs);
      Position next = at_;
      next.advance();
      rings_.dout_ring.wait(at_);
      ptx::fence_registers(dv);
      ptx::wgmma_fence();
      this->issue_gradient(dv, probs, rings_.dout, at_.stage);
      rings_.q_ring.wait(next);
      ptx::fence_registers(scores);
      ptx::wgmma_fence();
      this->issue_transposed(scores, rings_.k, rings_.q, next.stage);
      lse = this->load_stats(rings_.lse_log2, next.stage);
      ptx::wgmma_wait<1>();
      ptx::fence_registers(dv);
      rings_.dout_ring.release(at_);
      ptx::wgmma_wait<0>();
      ptx::fence_registers(scores);
      __syncwarp();
      rings_.q_ring.release(next);
      at_ = next;
    }

    make_probs(scores, lse, probs);
    rings_.dout_ring.wait(at_);
    ptx::fence_registers(dv);
    ptx::wgmma_fence();
    this->issue_gradient(dv, probs, rings_.dout, at_.stage);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(dv);
    this->store(dv, 1.0f, params_.dv);
  }

 private:
  // P^T of a step, rounded, for this warpgroup and the other.
  __device__ __forceinline__ void make_probs(float (&scores)[kScores], const Stats& lse,
                                             uint32_t (&probs)[kScores / 2]) {
    if (m_ < unmasked_begin_) this->mask(m_, scores);
    if (++m_ == work_.steps.end) m_ = work_.steps.begin;
    this->exponentiate(scores, lse);
    pack_fragments<kConfig.dtype>(scores, probs);
    ptx::fence_registers(probs);

    ptx::mbarrier_wait(rings_.probs_ring.empty_barrier(probs_at_.stage), probs_at_.phase ^ 1);
    const uint32_t address =
        rings_.probs + probs_at_.stage * kConfig.dscores_bytes() + this->probs_lane_;
#pragma unroll
    for (int i = 0; i < kScores / 2; i += 4) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address + i * 512),
                   "r"(probs[i]), "r"(probs[i + 1]), "r"(probs[i + 2]), "r"(probs[i + 3])
                   : "memory");
    }
    __syncwarp();
    if (ptx::lane_index() == 0) {
      ptx::mbarrier_arrive(rings_.probs_ring.full_barrier(probs_at_.stage));
    }
    probs_at_.advance();
  }

  int32_t m_;
  const int32_t unmasked_begin_;
  Position at_;
  typename KeyPassRings<Config>::ProbsPosition probs_at_;
};

template <class Config>
class KeyGradientWarpgroup : KeyPassWarpgroup<Config> {
  using Base = KeyPassWarpgroup<Config>;
  using Base::kConfig, Base::kGrads, Base::kScores;
  using Base::params_, Base::rings_, Base::total_;
  using typename Base::Position, typename Base::Stats;

 public:
  __device__ __forceinline__ KeyGradientWarpgroup(const BwdParams& params,
                                                  const KeyPassRings<Config>& rings,
                                                  const KeyWork& work)
      : Base(params, rings, work) {}

  __device__ __forceinline__ void run() {
    if (total_ == 0) return this->store_zeros(params_.dk);
    float dk[kGrads], dprobs[kScores];
    uint32_t dscores[kScores / 2];
#pragma unroll
    for (int i = 0; i < kGrads; ++i) dk[i] = 0.0f;

    ptx::mbarrier_wait(rings_.v_full, 0);
    rings_.dout_ring.wait(at_);
    ptx::wgmma_fence();
    this->issue_transposed(dprobs, rings_.v, rings_.dout, at_.stage);
    Stats delta = this->load_stats(rings_.delta, at_.stage);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(dprobs);
    __syncwarp();  // every lane has read its delta
    rings_.dout_ring.release(at_);

#pragma unroll 1
    for (int32_t left = total_; left > 1; --left) {
      make_dscores(dprobs, delta, dscores);
      Position next = at_;
      next.advance();
      rings_.q_ring.wait(at_);
      ptx::fence_registers(dk);
      ptx::wgmma_fence();
      this->issue_gradient(dk, dscores, rings_.q, at_.stage);
      rings_.dout_ring.wait(next);
      ptx::fence_registers(dprobs);
      ptx::wgmma_fence();
      this->issue_transposed(dprobs, rings_.v, rings_.dout, next.stage);
      delta = this->load_stats(rings_.delta, next.stage);
      ptx::wgmma_wait<1>();
      ptx::fence_registers(dk);
      rings_.q_ring.release(at_);
      ptx::wgmma_wait<0>();
      ptx::fence_registers(dprobs);
      __syncwarp();
      rings_.dout_ring.release(next);
      at_ = next;
    }

    make_dscores(dprobs, delta, dscores);
    rings_.q_ring.wait(at_);
    ptx::fence_registers(dk);
    ptx::wgmma_fence();
    this->issue_gradient(dk, dscores, rings_.q, at_.stage);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(dk);
    this->store(dk, params_.scale, params_.dk);
  }

 private:
  // dS^T of a step, rounded, from the other warpgroup's P^T.
  __device__ __forceinline__ void make_dscores(const float (&dprobs)[kScores], const Stats& delta,
                                               uint32_t (&dscores)[kScores / 2]) {
    uint32_t probs[kScores / 2];
    rings_.probs_ring.wait(probs_at_);
    const uint32_t address =
        rings_.probs + probs_at_.stage * kConfig.dscores_bytes() + this->probs_lane_;
#pragma unroll
    for (int i = 0; i < kScores / 2; i += 4) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(probs[i]), "=r"(probs[i + 1]), "=r"(probs[i + 2]), "=r"(probs[i + 3])
                   : "r"(address + i * 512)
                   : "memory");
    }
    this->differentiate(probs, dprobs, delta, dscores);
    __syncwarp();
    rings_.probs_ring.release(probs_at_);
    probs_at_.advance();
    ptx::fence_registers(dscores);
  }

  Position at_;
  typename KeyPassRings<Config>::ProbsPosition probs_at_;
};

}  // namespace jax_fa3
