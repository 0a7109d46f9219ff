// Loading without a producer, for the paper's ablation (`warp_specialized` off): the warpgroups
// that multiply also issue the TMA loads, between their own products, and everybody keeps the
// registers of the launch.
//
//   warp 0 of the CTA              keys and values, for all: one block of each a block that it does
//   warp 0 of each warpgroup       its 64 query rows, once its last scores of a tile are done
//
// A load still runs by itself once it is issued. What is lost is the thread that has nothing to do
// but wait: here the loading warp waits, amid its own block, until the slowest warpgroup has given
// the stage back. So in block i it asks for the stages that block i - 1 has left, never for those
// of block i, which would wait for warpgroups that may themselves wait for it:
//
//   block i:   issue S(i), O(i - 1)   |  load K(i + A), V(i + A - 1)   |  wait, softmax ...
//                                         A = stages - 1
//
// Blocks are counted here from the CTA's first to its last, across tiles. Static schedules only,
// since no one is left to draw tiles, and no lazy reference, whose redone rows are streamed by the
// producer.
#pragma once

#include "cuda/fwd/producer.cuh"
#include "cuda/fwd/work.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/warp.cuh"

namespace jax_fa3 {

// Walks through the CTA's work that has keys, block by block from the last, or work by work. Its
// branches lie in the consumers' key loop, so ptxas has to be told that they are uniform.
template <class Config>
struct WorkCursor {
  StaticSchedule schedule;
  TileWork work;
  OperandBatch batch;
  int32_t block;
  bool more;

  __device__ __forceinline__ WorkCursor(const FwdParams& params, uint32_t queue) : schedule(queue) {
    find(params);
  }
  __device__ __forceinline__ void next_work(const FwdParams& params) {
    schedule.step();
    find(params);
  }
  __device__ __forceinline__ void next_block(const FwdParams& params) {
    if (ptx::uniform(--block < work.begin)) next_work(params);
  }

 private:
  __device__ __forceinline__ void find(const FwdParams& params) {
    for (;; schedule.step()) {
      more = schedule.index < work_items<Config>(params);
      if (!more) return;
      const Piece piece = work_piece<Config>(params, schedule.index);
      if (piece.tile == Piece::kNone) continue;
      work = piece_work<Config>(params, piece);
      block = work.end - 1;
      if (ptx::uniform(work.end <= work.begin)) continue;
      batch = operand_batch(params.batch_map, work.tile.batch);
      return;
    }
  }
};

// What a consumer calls; whole warps.
template <class Config>
class SelfLoading {
  static constexpr FwdConfig kConfig = Config::value;
  static_assert(kConfig.schedule == Schedule::kStatic && kConfig.softmax != Softmax::kLazy);
  static constexpr int kAhead = kConfig.stages - 1;

 public:
  __device__ __forceinline__ SelfLoading(const FwdParams& params, const FwdRings<Config>& rings,
                                         int warpgroup)
      : params_(params),
        rings_(rings),
        warpgroup_(warpgroup),
        warp_(ptx::uniform(ptx::warp_index())),
        queries_(params, rings.tile_queue),
        keys_(queries_),
        values_(queries_) {
    load_query();
    if (warp_ != 0) return;
    for (int i = 0; i < kAhead; ++i) {
      load_keys();
      if (i > 0) load_values();
    }
  }

  // Once a block, when its products are issued.
  __device__ __forceinline__ void load_block() {
    if (warp_ != 0) return;
    load_keys();
    load_values();
  }
  // Once a tile, when the warpgroup has released its query.
  __device__ __forceinline__ void load_next_query() {
    queries_.next_work(params_);
    load_query();
  }

 private:
  __device__ __forceinline__ void load_query() {
    if (!queries_.more || warp_ % 4 != 0) return;
    const uint32_t full = rings_.q_full + 8 * warpgroup_;
    ptx::mbarrier_wait(rings_.q_empty + 8 * warpgroup_, q_phase_ ^ 1);
    q_phase_ ^= 1;
    if (ptx::elect_one()) {
      const Tile& tile = queries_.work.tile;
      ptx::mbarrier_arrive_expect_tx(full, kConfig.q_bytes());
      ptx::tma_load_5d(params_.q_map, full, rings_.q + warpgroup_ * kConfig.q_bytes(), 0,
                       tile.m_tile * kConfig.tile_m() + warpgroup_ * 64, 0, tile.head,
                       queries_.batch.q);
    }
  }
  __device__ __forceinline__ void load_keys() {
    if (!ptx::uniform(keys_.more)) return;
    load(rings_.k_ring, k_at_, params_.k_map, rings_.k, keys_, keys_.batch.k);
  }
  __device__ __forceinline__ void load_values() {
    if (!ptx::uniform(values_.more)) return;
    load(rings_.v_ring, v_at_, params_.v_map, rings_.v, values_, values_.batch.v);
  }
  __device__ __forceinline__ void load(const Ring<kConfig.stages>& ring,
                                       typename FwdRings<Config>::Position& at,
                                       const TensorMap& map, uint32_t tiles,
                                       WorkCursor<Config>& cursor, int32_t batch) {
    ptx::mbarrier_wait(ring.empty_barrier(at.stage), at.phase ^ 1);
    if (ptx::elect_one()) {
      ptx::mbarrier_arrive_expect_tx(ring.full_barrier(at.stage), kConfig.kv_bytes());
      ptx::tma_load_5d(map, ring.full_barrier(at.stage), tiles + at.stage * kConfig.kv_bytes(), 0,
                       cursor.block * kConfig.tile_n, 0, cursor.work.tile.head / params_.group,
                       batch);
    }
    at.advance();
    cursor.next_block(params_);
  }

  const FwdParams& params_;
  const FwdRings<Config>& rings_;
  const int warpgroup_;
  const int warp_;
  WorkCursor<Config> queries_, keys_, values_;
  typename FwdRings<Config>::Position k_at_, v_at_;
  uint32_t q_phase_ = 0;
};

// With a producer there is nothing to do.
struct LoadedByProducer {
  template <class Params, class Rings>
  __device__ __forceinline__ LoadedByProducer(const Params&, const Rings&, int /*warpgroup*/) {}
  __device__ __forceinline__ void load_block() {}
  __device__ __forceinline__ void load_next_query() {}
};

template <class Config, bool kWarpSpecialized = Config::value.warp_specialized>
struct LoadsOf {
  using type = LoadedByProducer;
};
template <class Config>
struct LoadsOf<Config, false> {
  using type = SelfLoading<Config>;
};
template <class Config>
using FwdLoads = typename LoadsOf<Config>::type;

}  // namespace jax_fa3
