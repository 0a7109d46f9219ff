// The launcher of one configuration; each file in inst/ instantiates a few.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "cuda/bwd/convert_dq.cuh"
#include "cuda/bwd/delta.cuh"
#include "cuda/bwd/kernel.cuh"
#include "cuda/core/shared_memory.h"

namespace jax_fa3 {

template <class Config>
cudaError_t launch_delta(uint32_t ctas, const DeltaParams& params, cudaStream_t stream) {
  delta_kernel<Config::value.dtype, Config::value.head_dim>
      <<<ctas, kDeltaThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <class Config>
cudaError_t launch_bwd_config(const BwdParams& params, cudaStream_t stream) {
  constexpr BwdConfig kConfig = Config::value;
  static_assert(sizeof(BwdSmem<Config>) == kConfig.smem_bytes(),
                "plan and kernel disagree on the shared memory");
  static std::atomic<uint64_t> devices_done{0};
  const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(&bwd_kernel<Config>),
                                                kConfig.smem_bytes(), devices_done);
  if (error != cudaSuccess) return error;
  bwd_kernel<Config>
      <<<params.grid.tiles, kConfig.threads(), kConfig.smem_bytes(), stream>>>(params);
  return cudaGetLastError();
}

template <class Config>
cudaError_t launch_convert(uint32_t ctas, const ConvertParams& params, cudaStream_t stream) {
  convert_dq_kernel<Config::value.dtype, Config::value.head_dim>
      <<<ctas, ptx::kWarpgroupSize, 0, stream>>>(params);
  return cudaGetLastError();
}

#define JAX_FA3_INSTANTIATE_BWD(Config)                                                  \
  template cudaError_t launch_delta<Config>(uint32_t, const DeltaParams&, cudaStream_t); \
  template cudaError_t launch_bwd_config<Config>(const BwdParams&, cudaStream_t);        \
  template cudaError_t launch_convert<Config>(uint32_t, const ConvertParams&, cudaStream_t);

}  // namespace jax_fa3
