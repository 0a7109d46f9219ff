// What the roles of the backward kernel share: the shared memory, the rings in it, and which
// queries a CTA's keys meet.
#pragma once

#include "cuda/bwd/config.h"
#include "cuda/bwd/params.h"
#include "cuda/core/mask.h"
#include "cuda/core/pipeline.cuh"
#include "cuda/core/tile_scheduler.h"
#include "cuda/ptx/warp.cuh"

namespace jax_fa3 {

// Tiles lie in chunks of 64 columns: [head_dim / 64][rows][64], rows of 128 bytes, 128-byte
// swizzle. dscores is [tile_m / 64][keys][64 queries], the same rows.
template <class Config>
struct BwdSmem {
  static constexpr BwdConfig kConfig = Config::value;

  alignas(1024) uint8_t k[kConfig.kv_bytes()];
  alignas(1024) uint8_t v[kConfig.kv_bytes()];
  alignas(1024) uint8_t q[kConfig.stages][kConfig.q_bytes()];
  alignas(1024) uint8_t dout[kConfig.stages][kConfig.q_bytes()];
  alignas(1024) uint8_t dscores[kConfig.dscores_stages][kConfig.dscores_bytes()];
  alignas(1024) uint8_t dq[BwdConfig::kDqBuffers][BwdConfig::dq_bytes()];
  alignas(16) float lse_log2[kConfig.stages][kConfig.tile_m];
  float delta[kConfig.stages][kConfig.tile_m];
  uint64_t k_full, v_full;
  uint64_t q_full[kConfig.stages], dout_full[kConfig.stages];
  uint64_t dscores_full[kConfig.dscores_stages], dscores_empty[kConfig.dscores_stages];
  uint64_t dq_full[BwdConfig::kDqAdders], dq_empty[BwdConfig::kDqAdders];  // in turns
};

// The shared memory as the roles see it: addresses.
template <class Config>
struct BwdRings {
  static constexpr BwdConfig kConfig = Config::value;
  using Position = RingPosition<kConfig.stages>;
  using DscoresPosition = RingPosition<kConfig.dscores_stages>;
  using DqPosition = RingPosition<BwdConfig::kDqAdders>;

  uint32_t k, v, q, dout, dscores, dq, lse_log2, delta;
  uint32_t k_full, v_full;
  uint32_t q_full, dout_full;  // kConfig.stages each: queries and their lse, dout and its delta
  Ring<kConfig.dscores_stages> dscores_ring;
  Ring<BwdConfig::kDqAdders> dq_ring;  // in turns: steps of dQ, one after another in the same place

  __device__ __forceinline__ explicit BwdRings(BwdSmem<Config>& smem)
      : k(ptx::shared_address(smem.k)),
        v(ptx::shared_address(smem.v)),
        q(ptx::shared_address(smem.q)),
        dout(ptx::shared_address(smem.dout)),
        dscores(ptx::shared_address(smem.dscores)),
        dq(ptx::shared_address(smem.dq)),
        lse_log2(ptx::shared_address(smem.lse_log2)),
        delta(ptx::shared_address(smem.delta)),
        k_full(ptx::shared_address(&smem.k_full)),
        v_full(ptx::shared_address(&smem.v_full)),
        q_full(ptx::shared_address(smem.q_full)),
        dout_full(ptx::shared_address(smem.dout_full)),
        dscores_ring{ptx::shared_address(smem.dscores_full),
                     ptx::shared_address(smem.dscores_empty)},
        dq_ring{ptx::shared_address(smem.dq_full), ptx::shared_address(smem.dq_empty)} {}

  // One thread.
  __device__ __forceinline__ void init() const {
    ptx::mbarrier_init(k_full, 1);
    ptx::mbarrier_init(v_full, 1);
    for (int stage = 0; stage < kConfig.stages; ++stage) {
      ptx::mbarrier_init(q_full + 8 * stage, 1);
      ptx::mbarrier_init(dout_full + 8 * stage, 1);
    }
    // Consumers: dQ's warps, and in turns the thread that loads.
    dscores_ring.init(kConfig.in_turns() ? 5 : 4, kConfig.key_warps());
    if constexpr (kConfig.in_turns()) dq_ring.init(1, 4);
  }
};

// A CTA's keys, and the steps over the queries of each head of their group.
struct KeyWork {
  int32_t n_tile, head_k, batch;
  int32_t diagonal;
  QuerySteps steps;
};

// The order of a head's steps. In turns with a causal mask it is from the last query backwards:
// the steps that all key tiles have come first, and a tile waits for one that is ahead of it.
template <class Config>
struct StepOrder {
  static constexpr bool kBackwards =
      Config::value.in_turns() && Config::value.mask == MaskKind::kCausal;
  int32_t first, end;

  // A head's last step is the same for all keys; worked out anew, it needs no register.
  __device__ __forceinline__ StepOrder(const BwdParams& params, const QuerySteps& steps)
      : first(kBackwards ? ceil_div(params.seqlen_q, Config::value.tile_m) - 1 : steps.begin),
        end(kBackwards ? steps.begin - 1 : steps.end) {}
  // Returns whether a next head begins.
  __device__ __forceinline__ bool advance(int32_t& m) const {
    m += kBackwards ? -1 : 1;
    if (m != end) return false;
    m = first;
    return true;
  }
};

template <class Config>
__device__ __forceinline__ KeyWork key_work(const BwdParams& params, uint32_t index) {
  constexpr BwdConfig kConfig = Config::value;
  const KeyTileGrid& grid = params.grid;
  uint32_t n_tile, pair;
  if constexpr (kConfig.mask == MaskKind::kCausal || kConfig.in_turns()) {
    // Of key tiles the first are the longest. In turns: those of other pairs lie between two of
    // the same, which gives the first a start.
    const LongestFirst at = longest_first(grid.tiles, grid.n_tiles, grid.pairs_in_flight, index);
    n_tile = at.rank;
    pair = at.pair;
  } else {
    n_tile = index % grid.n_tiles;
    pair = index / grid.n_tiles;
  }
  KeyWork work;
  work.n_tile = n_tile;
  work.head_k = pair % grid.heads_k;
  work.batch = pair / grid.heads_k;
  work.diagonal = params.diagonal;
  if constexpr (kConfig.mask == MaskKind::kCausal) {
    if (params.query_offset != nullptr) work.diagonal = params.query_offset[work.batch];
  }
  const int32_t begin = work.n_tile * kConfig.tile_n();
  work.steps = query_steps<kConfig.mask>(begin, begin + kConfig.tile_n(), params.seqlen_q,
                                         params.seqlen_k, work.diagonal, kConfig.tile_m);
  work.steps.begin = ptx::uniform(work.steps.begin);
  work.steps.end = ptx::uniform(work.steps.end);
  return work;
}

// Where query `row` of a head stands in lse, delta and (times head_dim) dQ's accumulator.
__device__ __forceinline__ int64_t row_index(const BwdParams& params, int32_t batch, int32_t head,
                                             int32_t row) {
  return (static_cast<int64_t>(batch) * params.heads_q + head) * params.padded_q + row;
}

}  // namespace jax_fa3
