// The CTAs that make dQ: 128 queries of one head, and the keys that they see, 64 a step. Shaped
// like the forward, with a third product and without a running reference:
//
//   warpgroups 0, 1  queries   64 rows each: S = Q K^T    P  = exp2(S scale - lse)
//                                            dP = dout V^T   dS = P * (dP - delta)    dQ += dS K
//   warpgroup 2      loader    one thread
//
//   loader --q_full[w], dout_full[w], k_full[s], v_full--> queries --k_empty[s], v_empty--> loader
//
// There are two stages of keys and one of values: a block's values are read by one product, early
// in its step, and the next ones arrive under the rest of it. (Keys and values in turns in one ring
// of three: 9.98 M cycles instead of 8.57, because the values' stage was the last that became
// free.)
//
// One step (time runs down; the other warpgroup's products fill the gaps):
//
//   tensor cores      this warpgroup's lanes
//   dP(n)             P(n)
//                     dS(n), rounded
//   dQ, S(n + 1)
#pragma once

#include "cuda/bwd/two_pass/work.cuh"
#include "cuda/core/accumulator.cuh"
#include "cuda/core/operand_batch.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace jax_fa3 {

// The shared memory as the roles see it: addresses.
template <class Config>
struct QueryPassRings {
  static constexpr BwdConfig kConfig = Config::value;
  using Position = RingPosition<kConfig.k_stages>;
  using ValuePosition = RingPosition<1>;

  uint32_t q, dout, k, v;
  uint32_t q_full, dout_full;  // one a warpgroup
  Ring<kConfig.k_stages> k_ring;
  Ring<1> v_ring;

  __device__ __forceinline__ explicit QueryPassRings(QueryPassSmem<Config>& smem)
      : q(ptx::shared_address(smem.q)),
        dout(ptx::shared_address(smem.dout)),
        k(ptx::shared_address(smem.k)),
        v(ptx::shared_address(smem.v)),
        q_full(ptx::shared_address(smem.q_full)),
        dout_full(ptx::shared_address(smem.dout_full)),
        k_ring{ptx::shared_address(smem.k_full), ptx::shared_address(smem.k_empty)},
        v_ring{ptx::shared_address(&smem.v_full), ptx::shared_address(&smem.v_empty)} {}

  // One thread.
  __device__ __forceinline__ void init() const {
    for (int w = 0; w < BwdConfig::kQueryWarpgroups; ++w) {
      ptx::mbarrier_init(q_full + 8 * w, 1);
      ptx::mbarrier_init(dout_full + 8 * w, 1);
    }
    k_ring.init(4 * BwdConfig::kQueryWarpgroups);
    v_ring.init(4 * BwdConfig::kQueryWarpgroups);
  }
};

// One thread. K(0), V(0), K(1), V(1), ...; queries and dout where they are first waited for.
template <class Config>
__device__ __forceinline__ void load_query_pass(const BwdParams& params,
                                                const QueryPassRings<Config>& rings,
                                                const QueryWork& work) {
  constexpr BwdConfig kConfig = Config::value;
  constexpr int kWarpgroups = BwdConfig::kQueryWarpgroups;
  const OperandBatch batch = operand_batch(params.batch_map, work.tile.batch);
  const int32_t head_k = work.tile.head / params.group;
  const auto load_rows = [&](const TensorMap& map, uint32_t full, uint32_t tiles, int32_t row) {
#pragma unroll
    for (int w = 0; w < kWarpgroups; ++w) {
      ptx::mbarrier_arrive_expect_tx(full + 8 * w, kConfig.q_bytes());
      ptx::tma_load_5d(map, full + 8 * w, tiles + w * kConfig.q_bytes(), 0,
                       work.tile.m_tile * BwdConfig::kQueryRows + w * 64, 0, work.tile.head, row);
    }
  };
  typename QueryPassRings<Config>::Position k_at;
  typename QueryPassRings<Config>::ValuePosition v_at;
  const auto load_block = [&](const auto& ring, auto& at, const TensorMap& map, uint32_t tiles,
                              int32_t block, int32_t row) {
    ring.acquire(at, kConfig.kv_bytes());
    ptx::tma_load_5d(map, ring.full_barrier(at.stage), tiles + at.stage * kConfig.kv_bytes(), 0,
                     block * kConfig.tile_n(), 0, head_k, row);
    at.advance();
  };
  int32_t end = 0;
#pragma unroll
  for (int w = 0; w < kWarpgroups; ++w) {
    const int32_t own = query_blocks<Config>(params, work, w).end;
    end = own > end ? own : end;
  }
#pragma unroll 1
  for (int32_t block = 0; block < end; ++block) {
    if (block == 0) load_rows(params.q_map, rings.q_full, rings.q, batch.q);
    load_block(rings.k_ring, k_at, params.k_map, rings.k, block, batch.k);
    if (block == 0) load_rows(params.dout_map, rings.dout_full, rings.dout, work.tile.batch);
    load_block(rings.v_ring, v_at, params.v_map, rings.v, block, batch.v);
  }
}

template <class Config>
class QueryWarpgroup {
  static constexpr BwdConfig kConfig = Config::value;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kTileN = kConfig.tile_n();
  static constexpr int kScores = kTileN / 2;  // accumulators a lane: 64 x kTileN over 128 lanes
  static constexpr int kGrads = kHeadDim / 2;
  using Position = typename QueryPassRings<Config>::Position;

 public:
  __device__ __forceinline__ QueryWarpgroup(const BwdParams& params,
                                            const QueryPassRings<Config>& rings,
                                            const QueryWork& work, int warpgroup)
      : params_(params), rings_(rings), work_(work), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void run() {
    const KeyBlocks blocks = query_blocks<Config>(params_, work_, warpgroup_);
    int32_t end = blocks.end;
#pragma unroll
    for (int w = 0; w < BwdConfig::kQueryWarpgroups; ++w) {
      const int32_t other = query_blocks<Config>(params_, work_, w).end;
      end = other > end ? other : end;
    }
    if (blocks.end > 0) {
      differentiate(blocks);
    } else {
      for_rows([&](int, uint4* row, bool valid) { store_zero_row<kHeadDim>(row, valid); });
      if (end > 0) {  // no load may outlive the CTA
        ptx::mbarrier_wait(rings_.q_full + 8 * warpgroup_, 0);
        ptx::mbarrier_wait(rings_.dout_full + 8 * warpgroup_, 0);
      }
    }
    // The tile's last blocks may be visible to the other warpgroup only.
    for (int32_t block = blocks.end; block < end; ++block) {
      rings_.k_ring.wait(k_at_);
      rings_.k_ring.release(k_at_);
      k_at_.advance();
      rings_.v_ring.wait(v_at_);
      rings_.v_ring.release(v_at_);
      v_at_.advance();
    }
  }

 private:
  __device__ __forceinline__ void differentiate(const KeyBlocks& blocks) {
    float dq[kGrads], scores[kScores], dprobs[kScores];
    uint32_t dscores[kScores / 2];
#pragma unroll
    for (int i = 0; i < kGrads; ++i) dq[i] = 0.0f;
    const int32_t row = first_row() + accumulator_row();
    const int64_t at = row_index(params_, work_.tile.batch, work_.tile.head, row);
    const float lse[2] = {params_.lse_log2[at], params_.lse_log2[at + 8]};
    const float delta[2] = {params_.delta[at], params_.delta[at + 8]};

    ptx::mbarrier_wait(rings_.q_full + 8 * warpgroup_, 0);
    rings_.k_ring.wait(k_at_);
    ptx::wgmma_fence();
    issue_product(scores, rings_.q, key_tile(k_at_));
    ptx::wgmma_wait<0>();
    ptx::fence_registers(scores);
    ptx::mbarrier_wait(rings_.dout_full + 8 * warpgroup_, 0);

    int32_t block = 0;
#pragma unroll 1
    for (; block < blocks.end - 1; ++block) {
      if (block >= blocks.unmasked_end) mask(block, row, scores);
      make_dscores(scores, lse, delta, dprobs, dscores);
      Position next = k_at_;
      next.advance();
      rings_.k_ring.wait(next);
      ptx::fence_registers(dq);
      ptx::fence_registers(scores);
      ptx::wgmma_fence();
      issue_gradient(dq, dscores);
      issue_product(scores, rings_.q, key_tile(next));
      ptx::wgmma_wait<1>();
      ptx::fence_registers(dq);
      rings_.k_ring.release(k_at_);
      ptx::wgmma_wait<0>();
      ptx::fence_registers(scores);
      k_at_ = next;
    }

    if (block >= blocks.unmasked_end) mask(block, row, scores);
    make_dscores(scores, lse, delta, dprobs, dscores);
    ptx::fence_registers(dq);
    ptx::wgmma_fence();
    issue_gradient(dq, dscores);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(dq);
    rings_.k_ring.release(k_at_);
    k_at_.advance();
    for_rows([&](int r, uint4* out, bool valid) {
      store_row<kConfig.dtype>(dq, r, params_.scale, out, valid);
    });
  }

  // dS of the block whose scores are given, rounded.
  __device__ __forceinline__ void make_dscores(float (&scores)[kScores], const float (&lse)[2],
                                               const float (&delta)[2], float (&dprobs)[kScores],
                                               uint32_t (&dscores)[kScores / 2]) {
    rings_.v_ring.wait(v_at_);
    ptx::fence_registers(dprobs);
    ptx::wgmma_fence();
    issue_product(dprobs, rings_.dout, rings_.v);
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      scores[i] = ptx::exp2_approx(__fmaf_rn(scores[i], params_.scale_log2, -lse[i / 2 % 2]));
    }
    ptx::wgmma_wait<0>();
    ptx::fence_registers(dprobs);
    rings_.v_ring.release(v_at_);
    v_at_.advance();
#pragma unroll
    for (int i = 0; i < kScores; i += 2) {
      const float shift = delta[i / 2 % 2];
      dscores[i / 2] = pack<kConfig.dtype>(scores[i] * (dprobs[i] - shift),
                                           scores[i + 1] * (dprobs[i + 1] - shift));
    }
    ptx::fence_registers(dscores);
  }

  // The product of the warpgroup's 64 rows of query (or dout) with a block of keys (or values).
  __device__ __forceinline__ void issue_product(float (&product)[kScores], uint32_t query_tiles,
                                                uint32_t key_tile) const {
    using Mma = ptx::Wgmma<kConfig.dtype, kTileN>;
    const ptx::SmemOperand rows =
        ptx::k_major_operand(query_tiles + warpgroup_ * kConfig.q_bytes());
    const ptx::SmemOperand keys = ptx::k_major_operand(key_tile);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int chunk = step / 4, within = step % 4 * 32;
      Mma::template ss<ptx::Major::kK, ptx::Major::kK>(
          product, rows.descriptor(chunk * 64 * 128 + within),
          keys.descriptor(chunk * kTileN * 128 + within), step > 0);
    }
    ptx::wgmma_commit();
  }

  // dQ += dS K of the block at hand.
  __device__ __forceinline__ void issue_gradient(float (&dq)[kGrads],
                                                 const uint32_t (&dscores)[kScores / 2]) const {
    using Mma = ptx::Wgmma<kConfig.dtype, kHeadDim>;
    const ptx::SmemOperand keys = ptx::mn_major_operand(key_tile(k_at_), kTileN * 128);
#pragma unroll
    for (int step = 0; step < kTileN / 16; ++step) {
      Mma::template rs<ptx::Major::kMN>(dq, dscores[4 * step], dscores[4 * step + 1],
                                        dscores[4 * step + 2], dscores[4 * step + 3],
                                        keys.descriptor(step * 16 * 128), 1);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void mask(int32_t block, int32_t row, float (&scores)[kScores]) const {
    const int32_t first = block * kTileN + accumulator_column();
    int32_t limit[2] = {
        visible_keys<kConfig.mask>(row, params_.seqlen_k, work_.diagonal) - first,
        visible_keys<kConfig.mask>(row + 8, params_.seqlen_k, work_.diagonal) - first};
    asm volatile("" : "+r"(limit[0]), "+r"(limit[1]));  // as in key_rows.cuh
    mask_from(scores, limit);
  }

  __device__ __forceinline__ uint32_t key_tile(const Position& at) const {
    return rings_.k + at.stage * kConfig.kv_bytes();
  }

  // The lane's two rows of dQ, [batch, seqlen_q, heads_q, head_dim].
  template <class StoreRow>
  __device__ __forceinline__ void for_rows(const StoreRow& store_row) const {
    const int32_t row = first_row() + accumulator_row();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t token = static_cast<int64_t>(work_.tile.batch) * params_.seqlen_q + row + 8 * r;
      auto* const out =
          reinterpret_cast<uint4*>(static_cast<uint16_t*>(params_.dq) +
                                   (token * params_.heads_q + work_.tile.head) * kHeadDim);
      store_row(r, out, row + 8 * r < params_.seqlen_q);
    }
  }

  __device__ __forceinline__ int32_t first_row() const {
    return work_.tile.m_tile * BwdConfig::kQueryRows + warpgroup_ * 64;
  }

  const BwdParams& params_;
  const QueryPassRings<Config>& rings_;
  const QueryWork& work_;
  const int warpgroup_;
  Position k_at_;
  typename QueryPassRings<Config>::ValuePosition v_at_;
};

}  // namespace jax_fa3
