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
  const int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t t = row + 8 * r;
    // [batch, seqlen_q, heads, head_dim]: past 2^31 elements, hence 64 bit.
    const int64_t token = static_cast<int64_t>(tile.batch) * params.seqlen_q + t;
    uint4* const out =
        reinterpret_cast<uint4*>(static_cast<uint16_t*>(params.out) +
                                 (token * params.grid.heads + tile.head) * kConfig.head_dim);
    // Lane q of a quad holds columns 2 q, 2 q + 1 of every 8; after the transpose of four such
    // groups it holds all 8 columns of group q.
#pragma unroll
    for (int group = 0; group < kConfig.head_dim / 32; ++group) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = (4 * group + i) * 4 + 2 * r;
        words[i] = pack<kConfig.dtype>(output[at] * inverse[r], output[at + 1] * inverse[r]);
      }
      quad_transpose(words);
      if (store[r]) out[4 * group + quad_lane] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (store[r] && quad_lane == 0) *lse_address(params, tile, t) = lse[r];
  }
}

}  // namespace jax_fa3
