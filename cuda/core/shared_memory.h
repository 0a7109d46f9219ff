// More shared memory than a kernel gets by default.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

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

}  // namespace jax_fa3
