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

#include "cuda/bwd/two_pass/work.cuh"
#include "cuda/core/accumulator.cuh"
#include "cuda/core/operand_batch.cuh"
#include "cuda/core/unpack.cuh"
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
    for (int stage = 0; stage < kConfig.dscores_stages; ++stage) {
      ptx::mbarrier_init(probs_ring.full_barrier(stage), 4);
      ptx::mbarrier_init(probs_ring.empty_barrier(stage), 4);
    }
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
class KeyPassWarpgroup {
 protected:
  static constexpr BwdConfig kConfig = Config::value;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kTileM = kConfig.tile_m;
  static constexpr int kScores = kTileM / 2;  // accumulators a lane: 64 x kTileM over 128 lanes
  static constexpr int kGrads = kHeadDim / 2;
  using Position = typename KeyPassRings<Config>::Position;

  __device__ __forceinline__ KeyPassWarpgroup(const BwdParams& params,
                                              const KeyPassRings<Config>& rings,
                                              const KeyWork& work)
      : params_(params),
        rings_(rings),
        work_(work),
        total_(params.group * (work.steps.end - work.steps.begin)) {
    stats_lane_ = 4 * accumulator_column();
    probs_lane_ = threadIdx.x % ptx::kWarpgroupSize * 16;
    // Opaque, or ptxas works them out anew in every step.
    asm volatile("" : "+r"(stats_lane_), "+r"(probs_lane_));
  }

  // The transposed product of the CTA's keys (or values) with a stage's queries (or dout).
  __device__ __forceinline__ void issue_transposed(float (&product)[kScores], uint32_t key_tile,
                                                   uint32_t query_tiles, int stage) const {
    using Mma = ptx::Wgmma<kConfig.dtype, kTileM>;
    const ptx::SmemOperand keys = ptx::k_major_operand(key_tile);
    const ptx::SmemOperand queries = ptx::k_major_operand(query_tiles + stage * kConfig.q_bytes());
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int chunk = step / 4, within = step % 4 * 32;
      Mma::template ss<ptx::Major::kK, ptx::Major::kK>(
          product, keys.descriptor(chunk * kConfig.tile_n() * 128 + within),
          queries.descriptor(chunk * kTileM * 128 + within), step > 0);
    }
    ptx::wgmma_commit();
  }

  // gradient += fragments [64 keys, kTileM queries] times a stage's rows, queries contracted.
  __device__ __forceinline__ void issue_gradient(float (&gradient)[kGrads],
                                                 const uint32_t (&fragments)[kScores / 2],
                                                 uint32_t query_tiles, int stage) const {
    using Mma = ptx::Wgmma<kConfig.dtype, kHeadDim>;
    const ptx::SmemOperand rows =
        ptx::mn_major_operand(query_tiles + stage * kConfig.q_bytes(), kTileM * 128);
#pragma unroll
    for (int step = 0; step < kTileM / 16; ++step) {
      Mma::template rs<ptx::Major::kMN>(gradient, fragments[4 * step], fragments[4 * step + 1],
                                        fragments[4 * step + 2], fragments[4 * step + 3],
                                        rows.descriptor(step * 16 * 128), 1);
    }
    ptx::wgmma_commit();
  }

  // A stage's lse or delta at the lane's columns 8 j and 8 j + 1.
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
                   : "r"(row + 32 * j)
                   : "memory");
    }
    return stats;
  }

  // The lane's two rows of dK or dV, [batch, seqlen_k, heads_k, head_dim].
  template <class StoreRow>
  __device__ __forceinline__ void for_rows(void* tensor, const StoreRow& store_row) const {
    const int32_t key = first_key() + accumulator_row();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t token = static_cast<int64_t>(work_.batch) * params_.seqlen_k + key + 8 * r;
      auto* const row =
          reinterpret_cast<uint4*>(static_cast<uint16_t*>(tensor) +
                                   (token * params_.grid.heads_k + work_.head_k) * kHeadDim);
      store_row(r, row, key + 8 * r < params_.seqlen_k);
    }
  }
  __device__ __forceinline__ void store(const float (&gradient)[kGrads], float scale,
                                        void* tensor) const {
    for_rows(tensor, [&](int r, uint4* row, bool valid) {
      store_row<kConfig.dtype>(gradient, r, scale, row, valid);
    });
  }
  // Of keys that no query sees.
  __device__ __forceinline__ void store_zeros(void* tensor) const {
    for_rows(tensor, [&](int, uint4* row, bool valid) { store_zero_row<kHeadDim>(row, valid); });
  }

  __device__ __forceinline__ int32_t first_key() const { return work_.n_tile * kConfig.tile_n(); }

  const BwdParams& params_;
  const KeyPassRings<Config>& rings_;
  const KeyWork& work_;
  const int32_t total_;  // steps
  uint32_t stats_lane_;  // byte offset of the lane's columns in a row of lse or delta
  uint32_t probs_lane_;  // byte offset of the lane's words in a stage of probs
};

template <class Config>
class ValueWarpgroup : KeyPassWarpgroup<Config> {
  using Base = KeyPassWarpgroup<Config>;
  using Base::kConfig, Base::kGrads, Base::kScores, Base::kTileM;
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
    if (m_ < unmasked_begin_) mask(scores);
    if (++m_ == work_.steps.end) m_ = work_.steps.begin;
#pragma unroll
    for (int j = 0; j < kTileM / 8; ++j) {
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; i += 2) {
        scores[i] = ptx::exp2_approx(__fmaf_rn(scores[i], params_.scale_log2, -lse.pairs[j].x));
        scores[i + 1] =
            ptx::exp2_approx(__fmaf_rn(scores[i + 1], params_.scale_log2, -lse.pairs[j].y));
      }
    }
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

  // A row of the lane is seen by queries from its first one on.
  __device__ __forceinline__ void mask(float (&scores)[kScores]) const {
    const int32_t key = this->first_key() + accumulator_row();
    const int32_t first = m_ * kTileM + accumulator_column();
    int32_t limit[2] = {
        first_visible_query<kConfig.mask>(key, params_.seqlen_k, work_.diagonal) - first,
        first_visible_query<kConfig.mask>(key + 8, params_.seqlen_k, work_.diagonal) - first};
    // Without a causal mask a row is seen by all or by none. ptxas must not make a branch of that:
    // it would diverge, and wgmma around it be serialized.
    asm volatile("" : "+r"(limit[0]), "+r"(limit[1]));
    mask_below(scores, limit);
  }

  int32_t m_;
  const int32_t unmasked_begin_;
  Position at_;
  typename KeyPassRings<Config>::ProbsPosition probs_at_;
};

template <class Config>
class KeyGradientWarpgroup : KeyPassWarpgroup<Config> {
  using Base = KeyPassWarpgroup<Config>;
  using Base::kConfig, Base::kGrads, Base::kScores, Base::kTileM;
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
    rings_.dout_ring.release(at_);

#pragma unroll 1
    for (int32_t left = total_; left > 1; --left) {
      differentiate(dprobs, delta, dscores);
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
      rings_.dout_ring.release(next);
      at_ = next;
    }

    differentiate(dprobs, delta, dscores);
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
  __device__ __forceinline__ void differentiate(const float (&dprobs)[kScores], const Stats& delta,
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
#pragma unroll
    for (int j = 0; j < kTileM / 8; ++j) {
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; i += 2) {
        const float2 p = unpack<kConfig.dtype>(probs[i / 2]);
        dscores[i / 2] = pack<kConfig.dtype>(p.x * (dprobs[i] - delta.pairs[j].x),
                                             p.y * (dprobs[i + 1] - delta.pairs[j].y));
      }
    }
    __syncwarp();
    rings_.probs_ring.release(probs_at_);
    probs_at_.advance();
    ptx::fence_registers(dscores);
  }

  Position at_;
  typename KeyPassRings<Config>::ProbsPosition probs_at_;
};

}  // namespace jax_fa3
