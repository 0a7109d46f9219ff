// Online softmax of one warpgroup's 64 rows: each lane keeps the reference and its part of the sum
// of its two rows. Milakov & Gimelshein 2018; FlashAttention-3, Algorithm 1.
//
// exp(scale * s - scale * max) is computed as exp2(s * c - max * c) with c = scale * log2(e), one
// FFMA and one EX2 a score.
#pragma once

#include <cstdint>

#include "cuda/core/types.h"
#include "cuda/ptx/warp.cuh"

namespace jax_fa3 {

template <int kScores, Softmax kSoftmax, DType kDType>
struct OnlineSoftmax {
  static constexpr float kRescaleLog2 = 8.0f;
  // Probabilities are divided by 2^kHeadroomLog2. float16 ends at 2^16, so a lazy reference wants
  // some of the range below 1. The smallest float16 is 2^-24: 2^-3 loses no weight that would show
  // even where 16k keys share what one leaves them (2^-6 did: test_lazy.py), and lets scores rise
  // by 2^19 before a tile must be done again. bfloat16 needs none.
  static constexpr float kHeadroomLog2 =
      kSoftmax == Softmax::kLazy && kDType == DType::kF16 ? 3.0f : 0.0f;

  float reference[2];  // maximum of the row, unscaled; -inf while it has seen no key
  float row_sum[2];    // this lane's part
  float shrink[2];     // factor for the output of the blocks before this one
  bool must_shrink;    // uniform over the warp

  // The first block of a tile.
  __device__ __forceinline__ void first(float (&scores)[kScores], float scale_log2) {
    block_max(scores, reference);
    row_sum[0] = row_sum[1] = 0.0f;
    exponentiate(scores, scale_log2);
  }

  // Any later block, as kClassical or kConditional has it. The caller applies `rescale` to the
  // output once its products are done.
  template <Softmax kRule>
  __device__ __forceinline__ void next(float (&scores)[kScores], float scale_log2) {
    float max[2];
    block_max(scores, max);
    max[0] = fmaxf(max[0], reference[0]);
    max[1] = fmaxf(max[1], reference[1]);
    if constexpr (kRule == Softmax::kClassical) {
      must_shrink = true;
    } else {
      // -inf - -inf is NaN, which does not grow; finite - -inf does.
      const bool grew = (max[0] - reference[0]) * scale_log2 > kRescaleLog2 ||
                        (max[1] - reference[1]) * scale_log2 > kRescaleLog2;
      must_shrink = __any_sync(0xffffffff, grew);
    }
    if (must_shrink) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        shrink[r] = ptx::exp2_approx((reference[r] - finite(max[r])) * scale_log2);
        reference[r] = max[r];
        row_sum[r] *= shrink[r];
      }
    }
    exponentiate(scores, scale_log2);
  }

  // Lazy: from here on the reference stays. A row whose scores so far are all -inf gets 0.
  __device__ __forceinline__ void freeze() {
    reference[0] = finite(reference[0]);
    reference[1] = finite(reference[1]);
  }
  // Lazy: a block without a look at its maximum.
  __device__ __forceinline__ void next_frozen(float (&scores)[kScores], float scale_log2) {
    exponentiate(scores, scale_log2);
  }
  // Lazy, at the end: whether the rows are what the classical loop would have made of them. An
  // overflow anywhere on the way leaves an infinity or a NaN behind, since nothing makes those
  // finite again; a sum below the range means that the reference was no score's. For rows that saw
  // a frozen block: those have a visible key. The same in the four lanes of a row.
  template <int kCount>
  __device__ __forceinline__ void in_range(const float (&output)[kCount], bool (&good)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float even = 0.0f, odd = 0.0f;  // infinity * 0 and NaN * 0 are NaN
#pragma unroll
      for (int i = 2 * r; i < kCount; i += 4) {
        even = __fmaf_rn(output[i], 0.0f, even);
        odd = __fmaf_rn(output[i + 1], 0.0f, odd);
      }
      const float sum = ptx::quad_sum(row_sum[r]);
      good[r] = ptx::quad_sum(even + odd) == 0.0f && sum >= 0x1p-20f && sum <= 0x1p+120f;
    }
  }

  template <int kCount>
  __device__ __forceinline__ void rescale(float (&output)[kCount]) const {
    if (must_shrink) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) output[i] *= shrink[i / 2 % 2];
    }
  }

  // The whole row's sum -> what to multiply the output with, and log-sum-exp (natural log). A row
  // that saw no key has sum 0: output 0, lse -inf. A NaN sum stays NaN, but where it is NaN because
  // a score is infinite, lse is that infinity.
  __device__ __forceinline__ void finish(float scale_log2, float (&inverse)[2], float (&lse)[2]) {
    constexpr float kLn2 = 0.693147180559945309f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = ptx::quad_sum(row_sum[r]);
      inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
      lse[r] = (reference[r] * scale_log2 + kHeadroomLog2 + log2f(sum)) * kLn2;
      if (sum == 0.0f) lse[r] = -INFINITY;
      if (reference[r] == INFINITY) lse[r] = INFINITY;
    }
  }

 private:
  // A row whose scores are all masked has maximum -inf; subtracting that would make NaN of masked
  // scores, subtracting 0 makes 0 of them.
  static __device__ __forceinline__ float finite(float max) {
    return max == -INFINITY ? 0.0f : max;
  }

  // Two chains a row: FMNMX issues every other cycle and takes longer to return.
  static __device__ __forceinline__ void block_max(const float (&scores)[kScores],
                                                   float (&max)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float even = scores[2 * r], odd = scores[2 * r + 1];
#pragma unroll
      for (int i = 4; i < kScores; i += 4) {
        even = fmaxf(even, scores[i + 2 * r]);
        odd = fmaxf(odd, scores[i + 2 * r + 1]);
      }
      max[r] = ptx::quad_max(fmaxf(even, odd));
    }
  }

  __device__ __forceinline__ void exponentiate(float (&scores)[kScores], float scale_log2) {
    const float offset[2] = {-finite(reference[0]) * scale_log2 - kHeadroomLog2,
                             -finite(reference[1]) * scale_log2 - kHeadroomLog2};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float even = 0.0f, odd = 0.0f;
#pragma unroll
      for (int i = 2 * r; i < kScores; i += 4) {
        scores[i] = ptx::exp2_approx(__fmaf_rn(scores[i], scale_log2, offset[r]));
        scores[i + 1] = ptx::exp2_approx(__fmaf_rn(scores[i + 1], scale_log2, offset[r]));
        even += scores[i];
        odd += scores[i + 1];
      }
      row_sum[r] += even + odd;
    }
  }
};

}  // namespace jax_fa3
