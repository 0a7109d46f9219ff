// What producer and consumers share: the shared memory, the rings in it, and which blocks of which
// tile there are to do.
#pragma once

#include "cuda/core/mask.h"
#include "cuda/core/pipeline.cuh"
#include "cuda/core/tile_scheduler.cuh"
#include "cuda/fwd/config.h"
#include "cuda/fwd/params.h"
#include "cuda/ptx/warp.cuh"

namespace jax_fa3 {

// Softmax::kLazy: a CTA's rows whose sums left their range, 64 a warpgroup, as a linked list
// through FwdParams::redo_next. Entry e is warpgroup (e - 1) % W of tile (e - 1) / W; 0 ends the
// list. They are done again when the CTA has no other tile left, so that no CTA waits for another.
struct RedoList {
  uint64_t drained;  // barrier: every consumer warp is through with its tiles
  uint32_t head;
};

// Tiles lie in chunks of 64 columns: [head_dim / 64][rows][64], rows of 128 bytes, 128-byte
// swizzle.
template <class Config>
struct FwdSmem {
  static constexpr FwdConfig kConfig = Config::value;

  alignas(1024) uint8_t q[kConfig.consumer_warpgroups][kConfig.q_bytes()];
  alignas(1024) uint8_t k[kConfig.stages][kConfig.kv_bytes()];
  alignas(1024) uint8_t v[kConfig.stages][kConfig.kv_bytes()];
  uint64_t q_full[kConfig.consumer_warpgroups];
  uint64_t q_empty[kConfig.consumer_warpgroups];
  uint64_t k_full[kConfig.stages];
  uint64_t k_empty[kConfig.stages];
  uint64_t v_full[kConfig.stages];
  uint64_t v_empty[kConfig.stages];
  TileQueue tile_queue;
  RedoList redo;
};

template <Schedule kSchedule>
struct ScheduleOf {
  using type = StaticSchedule;
};
template <>
struct ScheduleOf<Schedule::kDynamic> {
  using type = DynamicSchedule;
};
template <class Config>
using FwdSchedule = typename ScheduleOf<Config::value.schedule>::type;

// The shared memory as both roles see it.
template <class Config>
struct FwdRings {
  static constexpr FwdConfig kConfig = Config::value;
  using Position = RingPosition<kConfig.stages>;

  uint32_t q, k, v;  // addresses of the tiles
  uint32_t q_full, q_empty;
  Ring<kConfig.stages> k_ring, v_ring;
  uint32_t tile_queue;
  RedoList* redo;

  __device__ __forceinline__ explicit FwdRings(FwdSmem<Config>& smem)
      : q(ptx::shared_address(smem.q)),
        k(ptx::shared_address(smem.k)),
        v(ptx::shared_address(smem.v)),
        q_full(ptx::shared_address(smem.q_full)),
        q_empty(ptx::shared_address(smem.q_empty)),
        k_ring{ptx::shared_address(smem.k_full), ptx::shared_address(smem.k_empty)},
        v_ring{ptx::shared_address(smem.v_full), ptx::shared_address(smem.v_empty)},
        tile_queue(ptx::shared_address(&smem.tile_queue)),
        redo(&smem.redo) {}

  // One thread.
  __device__ __forceinline__ void init() const {
    for (int w = 0; w < kConfig.consumer_warpgroups; ++w) {
      ptx::mbarrier_init(q_full + 8 * w, 1);
      ptx::mbarrier_init(q_empty + 8 * w, 4);  // the warps of one warpgroup
    }
    k_ring.init(kConfig.consumer_warps());
    v_ring.init(kConfig.consumer_warps());
    FwdSchedule<Config>::init(tile_queue, kConfig.consumer_warps());
    ptx::mbarrier_init(ptx::shared_address(&redo->drained), kConfig.consumer_warps());
    redo->head = 0;
  }
};

template <MaskKind kMask>
struct TileOrderOf {
  using type = HeadMajorOrder;
};
template <>
struct TileOrderOf<MaskKind::kCausal> {
  using type = LongestFirstOrder;
};
template <class Config>
using FwdTileOrder = typename TileOrderOf<Config::value.mask>::type;

// Walks the finished list: call after waiting for `drained`.
struct RedoCursor {
  uint32_t entry;

  __device__ __forceinline__ explicit RedoCursor(const RedoList& list)
      : entry(*static_cast<const volatile uint32_t*>(&list.head)) {}
  template <class Config>
  __device__ __forceinline__ uint32_t tile() const {
    return (entry - 1) / Config::value.consumer_warpgroups;
  }
  template <class Config>
  __device__ __forceinline__ int warpgroup() const {
    return static_cast<int>((entry - 1) % Config::value.consumer_warpgroups);
  }
  __device__ __forceinline__ void step(const FwdParams& params) {
    entry = static_cast<const volatile uint32_t*>(params.redo_next)[entry - 1];
  }
};

// A tile, or a piece of one: key blocks [begin, end), worked out alike by producer and consumers.
struct TileWork {
  Tile tile;
  int32_t diagonal;
  int32_t begin;
  int32_t end;
};

// All key blocks of a tile.
template <class Config>
__device__ __forceinline__ TileWork tile_work(const FwdParams& params, uint32_t index) {
  TileWork work{FwdTileOrder<Config>::tile(params.grid, index), params.diagonal, 0, 0};
  if constexpr (Config::value.mask == MaskKind::kCausal) {
    if (params.query_offset != nullptr) work.diagonal = params.query_offset[work.tile.batch];
  }
  const int32_t row = work.tile.m_tile * Config::value.tile_m();
  work.end = key_blocks<Config::value.mask>(row, min(row + Config::value.tile_m(), params.seqlen_q),
                                            params.seqlen_k, work.diagonal, Config::value.tile_n)
                 .end;
  return work;
}

// What the schedule's indices stand for: tiles, or with split_tail also pieces.
template <class Config>
__device__ __forceinline__ uint32_t work_items(const FwdParams& params) {
  return Config::value.split_tail ? params.split.items : params.grid.tiles;
}
template <class Config>
__device__ __forceinline__ Piece work_piece(const FwdParams& params, uint32_t index) {
  if constexpr (Config::value.split_tail) return params.split.piece(index);
  return {index, 0, 0};
}
template <class Config>
__device__ __forceinline__ TileWork piece_work(const FwdParams& params, const Piece& piece) {
  TileWork work = tile_work<Config>(params, piece.tile);
  if constexpr (Config::value.split_tail) {
    work.begin = piece.begin;
    work.end = piece.end;
  }
  return work;
}

// The key blocks of warpgroup `warpgroup`'s 64 rows, counted from the work's first.
template <class Config>
__device__ __forceinline__ KeyBlocks warpgroup_blocks(const FwdParams& params, const TileWork& work,
                                                      int warpgroup) {
  const int32_t row = work.tile.m_tile * Config::value.tile_m() + warpgroup * 64;
  KeyBlocks blocks = key_blocks<Config::value.mask>(
      row, min(row + 64, params.seqlen_q), params.seqlen_k, work.diagonal, Config::value.tile_n);
  if constexpr (Config::value.split_tail) {
    blocks.end = clamp(blocks.end, work.begin, work.end) - work.begin;
    blocks.unmasked_end = clamp(blocks.unmasked_end, work.begin, work.end) - work.begin;
  }
  return blocks;
}

}  // namespace jax_fa3
