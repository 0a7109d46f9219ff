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
};

// The shared memory as both roles see it.
template <class Config>
struct FwdRings {
  static constexpr FwdConfig kConfig = Config::value;
  using Position = RingPosition<kConfig.stages>;

  uint32_t q, k, v;  // addresses of the tiles
  uint32_t q_full, q_empty;
  Ring<kConfig.stages> k_ring, v_ring;
  uint32_t tile_queue;

  __device__ __forceinline__ explicit FwdRings(FwdSmem<Config>& smem)
      : q(ptx::shared_address(smem.q)),
        k(ptx::shared_address(smem.k)),
        v(ptx::shared_address(smem.v)),
        q_full(ptx::shared_address(smem.q_full)),
        q_empty(ptx::shared_address(smem.q_empty)),
        k_ring{ptx::shared_address(smem.k_full), ptx::shared_address(smem.k_empty)},
        v_ring{ptx::shared_address(smem.v_full), ptx::shared_address(smem.v_empty)},
        tile_queue(ptx::shared_address(&smem.tile_queue)) {}
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

// What a tile asks for, worked out alike by producer and consumers.
struct TileWork {
  Tile tile;
  int32_t diagonal;
};

template <class Config>
__device__ __forceinline__ TileWork tile_work(const FwdParams& params, uint32_t index) {
  TileWork work{FwdTileOrder<Config>::tile(params.grid, index), params.diagonal};
  if constexpr (Config::value.mask == MaskKind::kCausal) {
    if (params.query_offset != nullptr) work.diagonal = params.query_offset[work.tile.batch];
  }
  return work;
}

// The key blocks of warpgroup `warpgroup`'s 64 rows of a tile, and of the whole tile.
template <class Config>
__device__ __forceinline__ KeyBlocks warpgroup_blocks(const FwdParams& params, const TileWork& work,
                                                      int warpgroup) {
  const int32_t row = work.tile.m_tile * Config::value.tile_m() + warpgroup * 64;
  return key_blocks<Config::value.mask>(row, min(row + 64, params.seqlen_q), params.seqlen_k,
                                        work.diagonal, Config::value.tile_n);
}
template <class Config>
__device__ __forceinline__ int32_t tile_blocks(const FwdParams& params, const TileWork& work) {
  const int32_t row = work.tile.m_tile * Config::value.tile_m();
  return key_blocks<Config::value.mask>(row, min(row + Config::value.tile_m(), params.seqlen_q),
                                        params.seqlen_k, work.diagonal, Config::value.tile_n)
      .end;
}

}  // namespace jax_fa3
