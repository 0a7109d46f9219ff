// TMA: the copy engine that moves a box of a tensor between global and shared memory.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
#pragma once

#include <cstdint>

#include "cuda/core/tensor_map.h"

namespace jax_fa3::ptx {

__device__ __forceinline__ void tma_prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads one box; `barrier` counts its bytes. Elements outside the tensor arrive as zeros, and
// their bytes count as well. Coordinates are innermost first.
__device__ __forceinline__ void tma_load_5d(const TensorMap& map, uint32_t barrier,
                                            uint32_t destination, int32_t c0, int32_t c1,
                                            int32_t c2, int32_t c3, int32_t c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

}  // namespace jax_fa3::ptx
