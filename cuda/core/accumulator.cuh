// Where an element of a wgmma accumulator lives. The only file that knows.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#wgmma-64n16-d
//
// A warpgroup holds D[64, N]; warp w of it has rows 16 w .. 16 w + 15. Of those, a lane has rows
// lane / 4 and lane / 4 + 8, and in every 8 columns the pair 2 (lane % 4), 2 (lane % 4) + 1:
//
//   d[4 j + 0], d[4 j + 1]    row lane / 4,       columns 8 j + 2 (lane % 4) + 0, 1
//   d[4 j + 2], d[4 j + 3]    row lane / 4 + 8,   the same columns
//
// The four lanes of a row are a quad. Two neighbouring groups of 8 columns, rounded to 16 bit, are
// the A fragment of a wgmma that contracts over those 16 columns: probabilities never leave
// registers.
#pragma once

#include <cstdint>

#include "cuda/core/types.h"
#include "cuda/ptx/warp.cuh"

namespace jax_fa3 {

inline constexpr int kWarpgroupRows = 64;

// The lane's first row within the warpgroup's 64; its second is 8 below.
__device__ __forceinline__ int accumulator_row() {
  const int thread = threadIdx.x % ptx::kWarpgroupSize;
  return thread / ptx::kWarpSize * 16 + thread % ptx::kWarpSize / 4;
}
// The lane's first column within every 8.
__device__ __forceinline__ int accumulator_column() { return 2 * (threadIdx.x % 4); }

// Two floats, rounded to nearest even; `low` goes to the lower address.
template <DType kType>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (kType == DType::kBF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// Accumulators of N columns -> A fragments, four registers for every 16 columns.
template <DType kType, int kCount>
__device__ __forceinline__ void pack_fragments(const float (&d)[kCount],
                                               uint32_t (&fragments)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) fragments[i] = pack<kType>(d[2 * i], d[2 * i + 1]);
}

// Masks: -inf in the columns of row r (0 or 1) of the lane from `limit[r]` on, or below it; a limit
// counts from the lane's first column. Columns are constants then, so one compare a score.
template <int kCount>
__device__ __forceinline__ void mask_from(float (&scores)[kCount], const int32_t (&limit)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = i / 4 * 8 + i % 2;
    if (column >= limit[i / 2 % 2]) scores[i] = -INFINITY;
  }
}
template <int kCount>
__device__ __forceinline__ void mask_below(float (&scores)[kCount], const int32_t (&limit)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = i / 4 * 8 + i % 2;
    if (column < limit[i / 2 % 2]) scores[i] = -INFINITY;
  }
}

// 4 x 4 transpose over a quad: word w of lane q goes to word q of lane w. Four shuffles and no
// shared memory, so that nothing has to wait for the epilogue.
__device__ __forceinline__ void quad_transpose(uint32_t (&words)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t received = __shfl_xor_sync(0xffffffff, odd ? words[i] : words[i + 1], 1);
    (odd ? words[i] : words[i + 1]) = received;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t received = __shfl_xor_sync(0xffffffff, high ? words[i] : words[i + 2], 2);
    (high ? words[i] : words[i + 2]) = received;
  }
}

// Row `r` (0 or 1) of the lane's accumulators, times a factor, rounded, to
// memory: 16 bytes a lane. Lane q of a quad holds columns 2 q, 2 q + 1 of every 8; after the
// transpose of four such groups it holds all 8 columns of group q. All lanes take part; those that
// are not `valid` store nothing.
template <DType kType, int kCount>
__device__ __forceinline__ void store_row(const float (&d)[kCount], int r, float factor, uint4* row,
                                          bool valid) {
#pragma unroll
  for (int group = 0; group < kCount / 16; ++group) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = (4 * group + i) * 4 + 2 * r;
      words[i] = pack<kType>(d[at] * factor, d[at + 1] * factor);
    }
    quad_transpose(words);
    if (valid) {
      row[4 * group + threadIdx.x % 4] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}
// The same of zeros.
template <int kColumns>
__device__ __forceinline__ void store_zero_row(uint4* row, bool valid) {
  if (!valid) return;
#pragma unroll
  for (int group = 0; group < kColumns / 32; ++group) {
    row[4 * group + threadIdx.x % 4] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace jax_fa3
