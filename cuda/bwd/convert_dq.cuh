// After the main kernel: dQ's accumulator, times the scale, to the result's dtype and layout.
#pragma once

#include <cstdint>

#include "cuda/bwd/config.h"
#include "cuda/bwd/params.h"
#include "cuda/core/accumulator.cuh"

namespace jax_fa3 {

// One CTA of a warpgroup a block of 64 queries of a head. Blocks of the accumulator have the order
// of the registers that dq.cuh wrote.
template <DType kDType, int kHeadDim>
__global__ void __launch_bounds__(ptx::kWarpgroupSize)
    convert_dq_kernel(const __grid_constant__ ConvertParams params) {
  constexpr int kChunks = kHeadDim / BwdConfig::kDqColumns;
  constexpr int kAccumulators = BwdConfig::kDqColumns / 2;
  const int32_t head = blockIdx.x % params.heads_q;
  const int32_t m = blockIdx.x / params.heads_q % params.blocks;
  const int32_t batch = blockIdx.x / params.heads_q / params.blocks;
  const int64_t pair = static_cast<int64_t>(batch) * params.heads_q + head;
  const float4* const blocks = reinterpret_cast<const float4*>(params.dq_accumulator) +
                               (pair * params.blocks + m) * (BwdConfig::kBlockRows * kHeadDim / 4);
  const int32_t first_row = m * BwdConfig::kBlockRows + accumulator_row();

#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    float dq[kAccumulators];
#pragma unroll
    for (int i = 0; i < kAccumulators; i += 4) {
      const float4 four =
          blocks[(chunk * kAccumulators + i) / 4 * ptx::kWarpgroupSize + threadIdx.x];
      dq[i] = four.x;
      dq[i + 1] = four.y;
      dq[i + 2] = four.z;
      dq[i + 3] = four.w;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t row = first_row + 8 * r;
      const int64_t token = static_cast<int64_t>(batch) * params.seqlen_q + row;
      uint4* const out = reinterpret_cast<uint4*>(static_cast<uint16_t*>(params.dq) +
                                                  (token * params.heads_q + head) * kHeadDim +
                                                  chunk * BwdConfig::kDqColumns);
      store_row<kDType>(dq, r, params.scale, out, row < params.seqlen_q);
    }
  }
}

}  // namespace jax_fa3
