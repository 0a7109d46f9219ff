// What a warpgroup that makes dK or dV of 64 keys does, whether its CTA has one pass (keys.cuh) or
// two (two_pass/key_pass.cuh). Scores and dP are transposed, [64 keys, tile_m queries], so that P^T
// and dS^T come out of the tensor cores as the A operands of dV += P^T dout and dK += dS^T Q.
#pragma once

#include "cuda/bwd/work.cuh"
#include "cuda/core/accumulator.cuh"
#include "cuda/core/unpack.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace jax_fa3 {

template <class Config>
class KeyRows {
 protected:
  static constexpr BwdConfig kConfig = Config::value;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kTileN = kConfig.tile_n();
  static constexpr int kTileM = kConfig.tile_m;
  static constexpr int kScores = kTileM / 2;  // accumulators a lane: 64 x kTileM over 128 lanes
  static constexpr int kGrads = kHeadDim / 2;

  // `rows`: which 64 of the CTA's keys.
  __device__ __forceinline__ KeyRows(const BwdParams& params, const KeyWork& work, int rows)
      : params_(params), work_(work), rows_(rows) {}

  // The transposed product of the 64 rows of a tile of keys (or values) with a stage's queries (or
  // dout), both K-major.
  __device__ __forceinline__ void issue_transposed(float (&product)[kScores], uint32_t key_tile,
                                                   uint32_t query_tiles, int stage) const {
    using Mma = ptx::Wgmma<kConfig.dtype, kTileM>;
    const ptx::SmemOperand keys = ptx::k_major_operand(key_tile + rows_ * 64 * 128);
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

  // A row of the lane is seen by queries from its first one on. (Worked out here, in the few steps
  // that need it, because registers that are held through the others are what there is least of.)
  __device__ __forceinline__ void mask(int32_t m, float (&scores)[kScores]) const {
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

  // P^T of the scores.
  __device__ __forceinline__ void exponentiate(float (&scores)[kScores], const Stats& stats) const {
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

  // dS^T, rounded, from the rounded P^T: in one pass registers do not hold the unrounded one beside
  // dP^T, dK and dV, in two it is what the other warpgroup hands over. One rounding more, of the
  // size of the one that follows.
  __device__ __forceinline__ void differentiate(const uint32_t (&probs)[kScores / 2],
                                                const float (&dprobs)[kScores], const Stats& stats,
                                                uint32_t (&dscores)[kScores / 2]) const {
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

  // The lane's two rows of dK or dV, [batch, seqlen_k, heads_k, head_dim].
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

  __device__ __forceinline__ int32_t first_key() const {
    return work_.n_tile * kTileN + rows_ * 64;
  }

 private:
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

 protected:
  const BwdParams& params_;
  const KeyWork& work_;
  const int rows_;
  uint32_t stats_lane_;  // byte offset of the lane's columns in a row of lse or delta. Set and made
                         // opaque by who inherits, with lane offsets of its own: ptxas, free to
                         // work it out anew, does so in every step.
};

}  // namespace jax_fa3
