// The launcher of one configuration; each file in inst/ instantiates a few.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "cuda/fwd/kernel.cuh"

namespace jax_fa3 {

// The kernel may use more than the default 48 KB of shared memory. Set once per device; a relaxed
// race only sets it twice.
inline cudaError_t allow_shared_memory(const void* kernel, int bytes,
                                       std::atomic<uint64_t>& devices_done) {
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (devices_done.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) devices_done.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

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
