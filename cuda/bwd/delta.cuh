// Before the main kernel: delta = rowsum(dout * out) - dlse, lse in base 2, and zeros for
// what the key tiles add to.
//
// With P = exp(S - lse) and cotangents of both results, dS = P * (dP - rowsum(dout * out) + dlse):
// one more subtraction here gives lse an exact gradient.
#pragma once

#include <cstdint>

#include "cuda/bwd/config.h"
#include "cuda/bwd/params.h"
#include "cuda/core/unpack.cuh"

namespace jax_fa3 {

inline constexpr int kDeltaThreads = 128;

// One CTA a block of 64 queries of a head; heads next to each other, as they lie in memory.
template <DType kDType, int kHeadDim, DqSum kDqSum>
__global__ void __launch_bounds__(kDeltaThreads)
    delta_kernel(const __grid_constant__ DeltaParams params) {
  constexpr int kLanes = kHeadDim / 8;  // 16 bytes a lane
  constexpr int kRows = kDeltaThreads / kLanes;
  constexpr int kPasses = BwdConfig::kBlockRows / kRows;
  const int32_t head = blockIdx.x % params.heads_q;
  const int32_t m = blockIdx.x / params.heads_q % params.blocks;
  const int32_t batch = blockIdx.x / params.heads_q / params.blocks;
  const int64_t pair = static_cast<int64_t>(batch) * params.heads_q + head;
  const int lane = threadIdx.x % kLanes;
  const int first_row = m * BwdConfig::kBlockRows + threadIdx.x / kLanes;

  uint4 out[kPasses], dout[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int32_t row = first_row + pass * kRows;
    if (row < params.seqlen_q) {
      const int64_t token = static_cast<int64_t>(batch) * params.seqlen_q + row;
      const int64_t at = (token * params.heads_q + head) * kLanes + lane;
      out[pass] = static_cast<const uint4*>(params.out)[at];
      dout[pass] = static_cast<const uint4*>(params.dout)[at];
    }
  }

  if constexpr (kDqSum != DqSum::kOwnPass) {
    float4* const zeros = reinterpret_cast<float4*>(params.dq_accumulator) +
                          (pair * params.blocks + m) * (BwdConfig::kBlockRows * kHeadDim / 4);
#pragma unroll
    for (int i = 0; i < BwdConfig::kBlockRows * kHeadDim / 4; i += kDeltaThreads) {
      zeros[i + threadIdx.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
  if constexpr (kDqSum == DqSum::kInTurns) {
    if (threadIdx.x == 0) params.turns[pair * params.blocks + m] = 0;
  }

#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int32_t row = first_row + pass * kRows;
    float sum = row < params.seqlen_q ? dot<kDType>(out[pass], dout[pass]) : 0.0f;
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {  // a warp's rows may end, its lanes may not
      sum += __shfl_xor_sync(0xffffffff, sum, step);
    }
    if (lane != 0) continue;
    float lse_log2 = INFINITY;  // past the end: probabilities exp2(score - inf) = 0
    if (row < params.seqlen_q) {
      constexpr float kLog2e = 1.4426950408889634f;
      const int64_t at = pair * params.seqlen_q + row;
      const float lse = params.lse[at];
      // A row that saw no key takes part in nothing, whatever the cotangent of its -inf is.
      const bool unseen = lse == -INFINITY;
      lse_log2 = unseen ? INFINITY : lse * kLog2e;
      sum = unseen ? 0.0f : sum - params.dlse[at];
    }
    params.lse_log2[pair * params.padded_q + row] = lse_log2;
    params.delta[pair * params.padded_q + row] = sum;
  }
}

}  // namespace jax_fa3
