// The launcher of one configuration; each file in inst/ instantiates a few.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "cuda/core/shared_memory.h"
#include "cuda/fwd/kernel.cuh"

namespace jax_fa3 {

template <class Config>
cudaError_t launch_config(int ctas, const FwdParams& params, cudaStream_t stream) {
  constexpr FwdConfig kConfig = Config::value;
  static_assert(sizeof(FwdSmem<Config>) == kConfig.smem_bytes(),
                "plan and kernel disagree on the shared memory");
  static std::atomic<uint64_t> devices_done{0};
  const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(&fwd_kernel<Config>),
                                                kConfig.smem_bytes(), devices_done);
  if (error != cudaSuccess) return error;
  fwd_kernel<Config><<<ctas, kConfig.threads(), kConfig.smem_bytes(), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_fa3
