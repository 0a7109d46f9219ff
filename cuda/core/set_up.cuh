// What a kernel does before its warpgroups part.
#pragma once

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace jax_fa3 {

// One thread fetches the tensor maps and initialises what is in shared memory; all wait for it.
template <class Init, class... Maps>
__device__ __forceinline__ void set_up(const Init& init, const Maps&... maps) {
  if (threadIdx.x == 0) {
    (ptx::tma_prefetch_map(maps), ...);
    init();
    ptx::mbarrier_fence_init();
  }
  __syncthreads();
}

}  // namespace jax_fa3
