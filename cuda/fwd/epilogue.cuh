// From accumulators to global memory: normalise, round, store 16 bytes a lane.
#pragma once

#include "cuda/core/accumulator.cuh"
#include "cuda/fwd/work.cuh"

namespace jax_fa3 {

// The row's log-sum-exp in [batch, heads, seqlen_q].
__device__ __forceinline__ float* lse_address(const FwdParams& params, const Tile& tile, int row) {
  const int64_t pair = static_cast<int64_t>(tile.batch) * params.grid.heads + tile.head;
  return params.lse + pair * params.seqlen_q + row;
}

// Rows `row` and `row + 8`, each where `store` says so.
template <class Config, int kOutputs>
__device__ __forceinline__ void store_output(const FwdParams& params, const Tile& tile, int row,
                                             const bool (&store)[2],
                                             const float (&output)[kOutputs],
                                             const float (&inverse)[2], const float (&lse)[2]) {
  constexpr FwdConfig kConfig = Config::value;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t t = row + 8 * r;
    // [batch, seqlen_q, heads, head_dim]: past 2^31 elements, hence 64 bit.
    const int64_t token = static_cast<int64_t>(tile.batch) * params.seqlen_q + t;
    uint4* const out =
        reinterpret_cast<uint4*>(static_cast<uint16_t*>(params.out) +
                                 (token * params.grid.heads + tile.head) * kConfig.head_dim);
    store_row<kConfig.dtype>(output, r, inverse[r], out, store[r]);
    if (store[r] && threadIdx.x % 4 == 0) *lse_address(params, tile, t) = lse[r];
  }
}

}  // namespace jax_fa3
