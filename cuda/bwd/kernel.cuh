// The backward's main kernel: dK, dV, and dQ's accumulator. Outline of the roles; each has its own
// file. FlashAttention-3 (Shah et al. 2024), Algorithm 3.
//
// A CTA owns 64 W keys of one key head and walks over the queries that see them, tile_m a step, of
// each query head of the group: dK and dV need no addition across CTAs, and are the same bits in
// every run.
//
//   warpgroups 0..W-1  keys   64 keys each: scores and their derivative again, dK and dV
//   warpgroup W        dQ     one thread loads by TMA; all make dQ of the step over the CTA's keys
//                             and add it to what other CTAs add, in memory
//   warpgroup W + 1    turns  only where key tiles take turns in adding: it loads and adds instead
//
//   dQ --k_full, v_full, q_full[s], dout_full[s]--> keys --dscores_full[s]--> dQ
//                                                        <--dscores_empty[s]--
//
//   full (of tiles)  1 arrival, with the bytes that TMA will land
//   dscores_full     1 arrival a key warp, after its stores; also says that the step before this
//                    one has been read, so that its stage can be filled again
//   dscores_empty    1 arrival a warp of dQ's; in turns one more, of the thread that loads
//   dq_full          in turns: 1 arrival a warp of dQ's, after it has staged a step
//   dq_empty         in turns: 1 arrival, of the thread that adds, when the step has been read
#pragma once

#include "cuda/bwd/dq.cuh"
#include "cuda/bwd/keys.cuh"
#include "cuda/bwd/turns.cuh"
#include "cuda/bwd/work.cuh"
#include "cuda/core/set_up.cuh"
#include "cuda/ptx/warp.cuh"

namespace jax_fa3 {

template <class Config>
__global__ void __launch_bounds__(Config::value.threads(), 1)
    bwd_kernel(const __grid_constant__ BwdParams params) {
  constexpr BwdConfig kConfig = Config::value;
  extern __shared__ __align__(1024) uint8_t shared[];
  const BwdRings<Config> rings(*reinterpret_cast<BwdSmem<Config>*>(shared));

  set_up([&] { rings.init(); }, params.q_map, params.k_map, params.v_map, params.dout_map);

  const KeyWork work = key_work<Config>(params, blockIdx.x);
  const int warpgroup = ptx::warpgroup_index();
  if (warpgroup < kConfig.key_warpgroups) {
    ptx::grow_registers<kConfig.key_registers()>();
    KeyWarpgroup<Config>(params, rings, work, warpgroup).run();
  } else if constexpr (!kConfig.in_turns()) {
    ptx::shrink_registers<kConfig.dq_registers()>();
    DqWarpgroup<Config>(params, rings, work).run();
  } else if (warpgroup == kConfig.key_warpgroups) {
    // Its work worked out anew: what is held across the branches costs all roles registers.
    ptx::shrink_registers<kConfig.dq_registers()>();
    DqWarpgroup<Config>(params, rings, key_work<Config>(params, blockIdx.x)).run();
  } else {
    ptx::shrink_registers<BwdConfig::kLoaderRegisters>();
    load_and_add<Config>(params, rings, key_work<Config>(params, blockIdx.x));
  }
}

}  // namespace jax_fa3
