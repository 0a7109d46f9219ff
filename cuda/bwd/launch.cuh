// The launcher of one configuration; each file in inst/ instantiates a few.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "cuda/bwd/convert_dq.cuh"
#include "cuda/bwd/delta.cuh"
#include "cuda/bwd/kernel.cuh"
#include "cuda/bwd/two_pass/kernel.cuh"
#include "cuda/core/shared_memory.h"

namespace jax_fa3 {

template <class Config>
cudaError_t launch_delta(uint32_t ctas, const DeltaParams& params, cudaStream_t stream) {
  delta_kernel<Config::value.dtype, Config::value.head_dim, Config::value.dq_sum>
      <<<ctas, kDeltaThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <class Config>
cudaError_t launch_bwd_config(const BwdParams& params, cudaStream_t stream) {
  constexpr BwdConfig kConfig = Config::value;
  void (*kernel)(BwdParams);
  uint32_t ctas = params.grid.tiles;
  if constexpr (!kConfig.two_pass()) {
    static_assert(sizeof(BwdSmem<Config>) == kConfig.smem_bytes(),
                  "plan and kernel disagree on the shared memory");
    kernel = &bwd_kernel<Config>;
  } else {
    static_assert(two_pass_smem_bytes<Config>() == kConfig.smem_bytes(),
                  "plan and kernel disagree on the shared memory");
    kernel = &bwd_two_pass_kernel<Config>;
    ctas += params.query_grid.tiles;
  }
  static std::atomic<uint64_t> devices_done{0};
  const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel),
                                                kConfig.smem_bytes(), devices_done);
  if (error != cudaSuccess) return error;
  kernel<<<ctas, kConfig.threads(), kConfig.smem_bytes(), stream>>>(params);
  return cudaGetLastError();
}

// Nothing to do after two passes.
template <class Config>
cudaError_t launch_convert(uint32_t ctas, const ConvertParams& params, cudaStream_t stream) {
  if constexpr (!Config::value.two_pass()) {
    convert_dq_kernel<Config::value.dtype, Config::value.head_dim>
        <<<ctas, ptx::kWarpgroupSize, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

#define JAX_FA3_INSTANTIATE_BWD(Config)                                                  \
  template cudaError_t launch_delta<Config>(uint32_t, const DeltaParams&, cudaStream_t); \
  template cudaError_t launch_bwd_config<Config>(const BwdParams&, cudaStream_t);        \
  template cudaError_t launch_convert<Config>(uint32_t, const ConvertParams&, cudaStream_t);

}  // namespace jax_fa3
