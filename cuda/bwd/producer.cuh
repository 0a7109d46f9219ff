// The producer: one thread that loads the CTA's keys and values once and streams queries and dout.
#pragma once

#include "cuda/bwd/work.cuh"
#include "cuda/core/operand_batch.cuh"
#include "cuda/ptx/tma.cuh"

namespace jax_fa3 {

// In the order in which the key warpgroups wait: K, Q, V, dout, then Q, dout, Q, dout, ...
template <class Config>
__device__ __forceinline__ void produce(const BwdParams& params, const BwdRings<Config>& rings,
                                        const KeyWork& work) {
  constexpr BwdConfig kConfig = Config::value;
  typename BwdRings<Config>::Position at;
  const OperandBatch batch = operand_batch(params.batch_map, work.batch);
  const int32_t first_key = work.n_tile * kConfig.tile_n();

  const auto load_keys = [&](const TensorMap& map, uint32_t barrier, uint32_t tile, int32_t b) {
    ptx::mbarrier_arrive_expect_tx(barrier, kConfig.kv_bytes());
    ptx::tma_load_5d(map, barrier, tile, 0, first_key, 0, work.head_k, b);
  };
  const auto load_rows = [&](const TensorMap& map, const auto& ring, uint32_t tiles, int32_t b,
                             uint32_t stats, const float* source, int32_t head, int32_t m) {
    ring.acquire(at, kConfig.q_bytes() + BwdConfig::stats_bytes());
    const uint32_t barrier = ring.full_barrier(at.stage);
    ptx::tma_load_5d(map, barrier, tiles + at.stage * kConfig.q_bytes(), 0, m * BwdConfig::kTileM,
                     0, head, b);
    ptx::bulk_load(barrier, stats + at.stage * BwdConfig::stats_bytes(),
                   source + step_index(params, work.batch, head, m) * BwdConfig::kTileM,
                   BwdConfig::stats_bytes());
  };

  load_keys(params.k_map, rings.k_full, rings.k, batch.k);
  bool first = true;
  for (int32_t g = 0; g < params.group; ++g) {
    const int32_t head = work.head_k * params.group + g;
#pragma unroll 1
    for (int32_t m = work.steps.begin; m < work.steps.end; ++m) {
      load_rows(params.q_map, rings.q_ring, rings.q, batch.q, rings.lse_log2, params.lse_log2, head,
                m);
      if (first) load_keys(params.v_map, rings.v_full, rings.v, batch.v);
      first = false;
      load_rows(params.dout_map, rings.dout_ring, rings.dout, work.batch, rings.delta, params.delta,
                head, m);
      at.advance();
    }
  }
}

}  // namespace jax_fa3
