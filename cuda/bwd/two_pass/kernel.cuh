// The backward in two passes, for head dim 256: one kind of CTA makes dK and dV, another dQ, and
// both compute the scores. Seven products of queries and keys instead of five, but nothing is added
// in memory. In one pass 64 keys a CTA (dK and dV of more do not fit its registers) would add as
// many bytes to dQ as they load, and FlashAttention-3's kernel, which does so with 80, leaves the
// tensor cores idle half of the time; these are busy for 86 % of it (H200, batch 2, seq 8192,
// full). The result is the same bits in every run, and there is no accumulator to zero and to
// convert.
//
//   key_pass.cuh    64 keys a CTA, over the queries
//   query_pass.cuh  128 queries a CTA, over the keys
//
// Both kinds are in one launch, so that the last CTAs of the one run beside the first of the other;
// the kind with the longer CTAs goes first. Sharing the loads of queries and dout between two CTAs
// of a cluster (multicast) changed nothing: 9.98 and 9.99 M cycles full, 4.88 and 5.00 causal.
#pragma once

#include "cuda/bwd/two_pass/key_pass.cuh"
#include "cuda/bwd/two_pass/query_pass.cuh"
#include "cuda/core/set_up.cuh"
#include "cuda/ptx/warp.cuh"

namespace jax_fa3 {

template <class Config>
__global__ void __launch_bounds__(Config::value.threads(), 1)
    bwd_two_pass_kernel(const __grid_constant__ BwdParams params) {
  constexpr BwdConfig kConfig = Config::value;
  extern __shared__ __align__(1024) uint8_t shared[];
  const KeyPassRings<Config> key_rings(*reinterpret_cast<KeyPassSmem<Config>*>(shared));
  const QueryPassRings<Config> query_rings(*reinterpret_cast<QueryPassSmem<Config>*>(shared));

  const uint32_t first = params.keys_first ? params.grid.tiles : params.query_grid.tiles;
  const bool makes_keys = (blockIdx.x < first) == params.keys_first;
  const uint32_t index = blockIdx.x < first ? blockIdx.x : blockIdx.x - first;

  const auto init = [&] { makes_keys ? key_rings.init() : query_rings.init(); };
  set_up(init, params.q_map, params.k_map, params.v_map, params.dout_map);

  const int warpgroup = ptx::warpgroup_index();
  if (warpgroup == BwdConfig::kQueryWarpgroups) {
    ptx::shrink_registers<BwdConfig::kLoaderRegisters>();
    if (threadIdx.x % ptx::kWarpgroupSize != 0) return;
    if (makes_keys) {
      load_key_pass<Config>(params, key_rings, key_work<Config>(params, index));
    } else {
      load_query_pass<Config>(params, query_rings, query_work<Config>(params, index));
    }
  } else {
    ptx::grow_registers<kConfig.key_registers()>();
    if (makes_keys) {
      const KeyWork work = key_work<Config>(params, index);
      if (warpgroup == 0) {
        ValueWarpgroup<Config>(params, key_rings, work).run();
      } else {
        KeyGradientWarpgroup<Config>(params, key_rings, work).run();
      }
    } else {
      const QueryWork work = query_work<Config>(params, index);
      QueryWarpgroup<Config>(params, query_rings, work, warpgroup).run();
    }
  }
}

}  // namespace jax_fa3
