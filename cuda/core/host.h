// What the launchers share of CUDA's host side: errors as Status, tensor maps.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/core/status.h"
#include "cuda/core/tensor_map.h"
#include "cuda/core/types.h"

namespace jax_fa3 {

Status cuda_error(cudaError_t error, const char* expression);

#define JAX_FA3_RETURN_IF_ERROR(expression)                             \
  do {                                                                  \
    if (const cudaError_t error = (expression); error != cudaSuccess) { \
      return ::jax_fa3::cuda_error(error, #expression);                 \
    }                                                                   \
  } while (false)

// A tensor [batch, seqlen, heads, head_dim] of 16-bit elements, contiguous, as
// {64, seqlen, head_dim / 64, heads, batch}: the box {64, box_rows, head_dim / 64, 1, 1} is a tile
// in 128-byte rows, swizzled as wgmma reads it. Rows past seqlen arrive as zeros. `name` is for
// the error.
Status encode_tiles(const char* name, const void* data, int64_t batch, int64_t seqlen,
                    int64_t heads, int64_t head_dim, DType dtype, int box_rows, TensorMap& map);

}  // namespace jax_fa3
