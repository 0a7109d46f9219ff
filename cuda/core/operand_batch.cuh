// Where a batch row of the output finds its operands.
#pragma once

#include <cstdint>

#include "cuda/core/problem.h"

namespace jax_fa3 {

// Batch coordinates of the operands, which may be broadcast over parts of the output's batch.
struct OperandBatch {
  int32_t q, k, v;
};
__device__ __forceinline__ OperandBatch operand_batch(const BatchMap& map, int32_t batch) {
  if (map.levels == 1) {
    return {batch * map.q_stride[0], batch * map.k_stride[0], batch * map.v_stride[0]};
  }
  OperandBatch at{0, 0, 0};
  for (int level = map.levels - 1; level >= 0; --level) {
    const int32_t i = batch % map.size[level];
    batch /= map.size[level];
    at.q += i * map.q_stride[level];
    at.k += i * map.k_stride[level];
    at.v += i * map.v_stride[level];
  }
  return at;
}

}  // namespace jax_fa3
