// What the roles of the two-pass backward share: the shared memory of its two kinds of CTA, and
// which of them a CTA is.
#pragma once

#include "cuda/bwd/config.h"
#include "cuda/bwd/params.h"
#include "cuda/bwd/work.cuh"
#include "cuda/core/mask.h"
#include "cuda/core/pipeline.cuh"
#include "cuda/core/tile_scheduler.h"
#include "cuda/ptx/warp.cuh"

namespace jax_fa3 {

// A CTA that makes dK and dV. Tiles lie in chunks of 64 columns, as in BwdSmem. probs is in
// registers' order: words 4 k .. 4 k + 3 of thread t are at 16 (128 k + t).
template <class Config>
struct KeyPassSmem {
  static constexpr BwdConfig kConfig = Config::value;
  static constexpr int kStages = kConfig.stages;

  alignas(1024) uint8_t k[kConfig.kv_bytes()];
  alignas(1024) uint8_t v[kConfig.kv_bytes()];
  alignas(1024) uint8_t q[kStages][kConfig.q_bytes()];
  alignas(1024) uint8_t dout[kStages][kConfig.q_bytes()];
  alignas(1024) uint8_t probs[kConfig.dscores_stages][kConfig.dscores_bytes()];
  alignas(16) float lse_log2[kStages][kConfig.tile_m];
  float delta[kStages][kConfig.tile_m];
  uint64_t k_full, v_full;
  uint64_t q_full[kStages], q_empty[kStages];
  uint64_t dout_full[kStages], dout_empty[kStages];
  uint64_t probs_full[kConfig.dscores_stages], probs_empty[kConfig.dscores_stages];
};

// A CTA that makes dQ.
template <class Config>
struct QueryPassSmem {
  static constexpr BwdConfig kConfig = Config::value;

  alignas(1024) uint8_t q[BwdConfig::kQueryWarpgroups][kConfig.q_bytes()];
  alignas(1024) uint8_t dout[BwdConfig::kQueryWarpgroups][kConfig.q_bytes()];
  alignas(1024) uint8_t k[kConfig.k_stages][kConfig.kv_bytes()];
  alignas(1024) uint8_t v[kConfig.kv_bytes()];
  uint64_t q_full[BwdConfig::kQueryWarpgroups], dout_full[BwdConfig::kQueryWarpgroups];
  uint64_t k_full[kConfig.k_stages], k_empty[kConfig.k_stages];
  uint64_t v_full, v_empty;
};

template <class Config>
constexpr int two_pass_smem_bytes() {
  constexpr size_t kKeys = sizeof(KeyPassSmem<Config>), kQueries = sizeof(QueryPassSmem<Config>);
  return static_cast<int>(kKeys > kQueries ? kKeys : kQueries);
}

// Rows [m_tile * kQueryRows, ...) of one query head, and the blocks of keys that they meet.
struct QueryWork {
  Tile tile;
  int32_t diagonal;
};

template <class Config>
__device__ __forceinline__ QueryWork query_work(const BwdParams& params, uint32_t index) {
  using Order = std::conditional_t<Config::value.mask == MaskKind::kCausal, LongestFirstOrder,
                                   HeadMajorOrder>;
  QueryWork work;
  work.tile = Order::tile(params.query_grid, index);
  work.diagonal = params.diagonal;
  if constexpr (Config::value.mask == MaskKind::kCausal) {
    if (params.query_offset != nullptr) work.diagonal = params.query_offset[work.tile.batch];
  }
  return work;
}

// The blocks of keys that a warpgroup's 64 rows meet.
template <class Config>
__device__ __forceinline__ KeyBlocks query_blocks(const BwdParams& params, const QueryWork& work,
                                                  int warpgroup) {
  const int32_t begin = work.tile.m_tile * BwdConfig::kQueryRows + warpgroup * 64;
  const int32_t end = begin + 64 < params.seqlen_q ? begin + 64 : params.seqlen_q;
  const KeyBlocks blocks = key_blocks<Config::value.mask>(begin, end, params.seqlen_k,
                                                          work.diagonal, Config::value.tile_n());
  return {ptx::uniform(blocks.end), ptx::uniform(blocks.unmasked_end), false};
}

}  // namespace jax_fa3
