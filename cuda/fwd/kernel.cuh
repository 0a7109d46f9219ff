// The forward kernel: out = softmax(scale * Q K^T + mask) V, and lse. Outline of the roles; each
// has its own file. FlashAttention-3 (Shah et al. 2024), Algorithm 1.
//
//   warpgroup 0      producer    one thread streams Q, K and V tiles into shared memory by TMA
//   warpgroups 1..W  consumers   each owns 64 query rows: scores, softmax, output
//
//   producer --q_full[w]--> consumer w      producer --k_full[s]--> all    --v_full[s]--> all
//            <--q_empty[w]--                         <--k_empty[s]--       <--v_empty[s]--
//
// (Without warp specialisation, in the ablation, there is no producer: self_loading.cuh.)
#pragma once

#include "cuda/core/set_up.cuh"
#include "cuda/fwd/consumer.cuh"
#include "cuda/fwd/producer.cuh"
#include "cuda/fwd/work.cuh"
#include "cuda/ptx/warp.cuh"

namespace jax_fa3 {

template <class Config>
__global__ void __launch_bounds__(Config::value.threads(), 1)
    fwd_kernel(const __grid_constant__ FwdParams params) {
  constexpr FwdConfig kConfig = Config::value;
  extern __shared__ __align__(1024) uint8_t shared[];
  const FwdRings<Config> rings(*reinterpret_cast<FwdSmem<Config>*>(shared));

  set_up([&] { rings.init(); }, params.q_map, params.k_map, params.v_map);

  const int warpgroup = ptx::warpgroup_index();
  if constexpr (!kConfig.warp_specialized) {
    FwdConsumer<Config>(params, rings, warpgroup).run();
  } else if (warpgroup == 0) {
    ptx::shrink_registers<kConfig.producer_registers()>();
    if (ptx::warp_index() == 0 && ptx::elect_one()) produce<Config>(params, rings);
  } else {
    ptx::grow_registers<kConfig.consumer_registers()>();
    FwdConsumer<Config>(params, rings, warpgroup - 1).run();
  }
}

}  // namespace jax_fa3
