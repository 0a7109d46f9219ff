// The producer: one thread that keeps the rings full, running on from tile to tile.
#pragma once

#include "cuda/core/mask.h"
#include "cuda/core/operand_batch.cuh"
#include "cuda/fwd/work.cuh"
#include "cuda/ptx/tma.cuh"

namespace jax_fa3 {

// Loads in the order in which the consumers wait: K(n-1), Q, then K(n-2), V(n-1), ... K(0), V(1),
// V(0). Keys run one block ahead of values, from the last block to the first. (A piece of a tile
// has its own first and last block.)
template <class Config>
__device__ __forceinline__ void produce(const FwdParams& params, const FwdRings<Config>& rings) {
  constexpr FwdConfig kConfig = Config::value;
  typename FwdRings<Config>::Position k_at, v_at;
  uint32_t q_phase = 0;

  const auto load = [&](const TileWork& work, int32_t end) {
    const OperandBatch batch = operand_batch(params.batch_map, work.tile.batch);
    const int32_t head_k = work.tile.head / params.group;

    const auto load_k = [&](int32_t block) {
      rings.k_ring.acquire(k_at, kConfig.kv_bytes());
      ptx::tma_load_5d(params.k_map, rings.k_ring.full_barrier(k_at.stage),
                       rings.k + k_at.stage * kConfig.kv_bytes(), 0, block * kConfig.tile_n, 0,
                       head_k, batch.k);
      k_at.advance();
    };
    const auto load_v = [&](int32_t block) {
      rings.v_ring.acquire(v_at, kConfig.kv_bytes());
      ptx::tma_load_5d(params.v_map, rings.v_ring.full_barrier(v_at.stage),
                       rings.v + v_at.stage * kConfig.kv_bytes(), 0, block * kConfig.tile_n, 0,
                       head_k, batch.v);
      v_at.advance();
    };

    load_k(end - 1);
#pragma unroll
    for (int w = 0; w < kConfig.consumer_warpgroups; ++w) {
      ptx::mbarrier_wait(rings.q_empty + 8 * w, q_phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(rings.q_full + 8 * w, kConfig.q_bytes());
      ptx::tma_load_5d(params.q_map, rings.q_full + 8 * w, rings.q + w * kConfig.q_bytes(), 0,
                       work.tile.m_tile * kConfig.tile_m() + w * 64, 0, work.tile.head, batch.q);
    }
    q_phase ^= 1;
#pragma unroll 1  // unrolled, the loop outgrows the producer's registers
    for (int32_t block = end - 2; block >= work.begin; --block) {
      load_k(block);
      load_v(block + 1);
    }
    load_v(work.begin);
  };

  for (FwdSchedule<Config> schedule(rings.tile_queue);; schedule.step()) {
    schedule.publish();
    if (schedule.index >= work_items<Config>(params)) break;
    schedule.prefetch(params.tile_counter);
    const Piece piece = work_piece<Config>(params, schedule.index);
    if (piece.tile == Piece::kNone) continue;
    const TileWork work = piece_work<Config>(params, piece);
    if (work.end > work.begin) load(work, work.end);
  }
  if constexpr (kConfig.softmax == Softmax::kLazy) {
    ptx::mbarrier_wait(ptx::shared_address(&rings.redo->drained), 0);
    for (RedoCursor redo(*rings.redo); redo.entry != 0; redo.step(params)) {
      const TileWork work = tile_work<Config>(params, redo.tile<Config>());
      load(work, warpgroup_blocks<Config>(params, work, redo.warpgroup<Config>()).end);
    }
  }
}

}  // namespace jax_fa3
