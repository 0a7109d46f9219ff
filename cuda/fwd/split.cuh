// The pieces of a tile that split.h has cut: each leaves its unnormalised output in the workspace,
// and the warpgroup that finishes the last piece adds them up.
//
// Two pieces of a row refer to different references, and O = sum_i 2^(r_i - R) O_i with R the
// largest of the r_i brings them together; so do the sums. The order of the sum is the order of the
// pieces, whoever happens to be last: a split tile has the same bits in every launch.
#pragma once

#include "cuda/fwd/work.cuh"
#include "cuda/ptx/named_barrier.cuh"

namespace jax_fa3 {

// One thread's part of what a warpgroup leaves of a piece. The registers lie 16 bytes at a time as
// [register / 4][thread], so that a warp moves 512 bytes at once and no layout is needed: the
// thread that reads them holds the same rows and columns as the one that wrote. First the softmax's
// state, then the output.
template <class Config>
struct Partial {
  static constexpr FwdConfig kConfig = Config::value;
  static constexpr int kThreads = ptx::kWarpgroupSize;
  static constexpr int kOutputs = kConfig.head_dim / 2;
  static_assert(kConfig.partial_bytes() == 4 * kThreads * (4 + kOutputs));

  float4* at;

  __device__ __forceinline__ Partial(const FwdParams& params, uint32_t slot, int warpgroup)
      : at(reinterpret_cast<float4*>(
               params.partials +
               (static_cast<int64_t>(slot) * kConfig.consumer_warpgroups + warpgroup) *
                   (kConfig.partial_bytes() / 4)) +
           threadIdx.x % kThreads) {}

  // Past the L1 cache, which does not see what other multiprocessors write.
  __device__ __forceinline__ void write_state(const float (&reference)[2],
                                              const float (&row_sum)[2]) const {
    __stcg(at, make_float4(reference[0], reference[1], row_sum[0], row_sum[1]));
  }
  __device__ __forceinline__ void read_state(float (&reference)[2], float (&row_sum)[2]) const {
    const float4 state = __ldcg(at);
    reference[0] = state.x, reference[1] = state.y;
    row_sum[0] = state.z, row_sum[1] = state.w;
  }
  __device__ __forceinline__ void write_output(const float (&output)[kOutputs]) const {
#pragma unroll
    for (int i = 0; i < kOutputs; i += 4) {
      __stcg(at + (1 + i / 4) * kThreads,
             make_float4(output[i], output[i + 1], output[i + 2], output[i + 3]));
    }
  }
  // output[i] += factor of the element's row * what was written.
  __device__ __forceinline__ void add_output(const float (&half)[2],
                                             float (&output)[kOutputs]) const {
#pragma unroll
    for (int i = 0; i < kOutputs; i += 4) {
      const float4 piece = __ldcg(at + (1 + i / 4) * kThreads);
      output[i] += piece.x * half[0] * half[0];
      output[i + 1] += piece.y * half[0] * half[0];
      output[i + 2] += piece.z * half[1] * half[1];
      output[i + 3] += piece.w * half[1] * half[1];
    }
  }
};

// Called by a warpgroup with the sums and the output of its rows over a piece. True in the one
// whose piece is the tile's last to be done: it leaves with those of the whole tile.
template <class Config, class Softmax, int kOutputs>
__device__ __forceinline__ bool join_pieces(const FwdParams& params, const Piece& piece,
                                            int warpgroup, Softmax& softmax,
                                            float (&output)[kOutputs]) {
  const TailSplit& split = params.split;
  const int vote = static_cast<int>(ptx::NamedBarrier::kVote) + warpgroup;

  const Partial<Config> own(params, split.slot(piece), warpgroup);
  own.write_state(softmax.reference, softmax.row_sum);
  own.write_output(output);

  // Every thread's stores before the warpgroup's arrival, the arrivals before the last one's loads.
  const TailSplit::Slots slots = split.slots(piece.tile);
  __threadfence();
  ptx::named_barrier_sync(vote, ptx::kWarpgroupSize);
  bool last = false;
  if (threadIdx.x % ptx::kWarpgroupSize == 0) {
    const uint32_t counter =
        (piece.tile - split.whole_tiles) * Config::value.consumer_warpgroups + warpgroup;
    last = atomicAdd(params.arrivals + counter, 1u) == slots.end - slots.begin - 1;
  }
  last = ptx::named_barrier_any(vote, ptx::kWarpgroupSize, last);
  if (ptx::uniform(last) == 0) return false;
  __threadfence();

  float reference[2] = {-INFINITY, -INFINITY};
  float piece_reference[2], piece_sum[2];
  for (uint32_t slot = slots.begin; slot < slots.end; ++slot) {
    Partial<Config>(params, slot, warpgroup).read_state(piece_reference, piece_sum);
    reference[0] = fmaxf(reference[0], piece_reference[0]);
    reference[1] = fmaxf(reference[1], piece_reference[1]);
  }
  softmax.row_sum[0] = softmax.row_sum[1] = 0.0f;
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) output[i] = 0.0f;
#pragma unroll 1  // the loads of one piece are in flight together; more would not fit
  for (uint32_t slot = slots.begin; slot < slots.end; ++slot) {
    const Partial<Config> partial(params, slot, warpgroup);
    partial.read_state(piece_reference, piece_sum);
    // The square root of the factor, applied twice: a lazy piece may have sums of 2^100 behind a
    // reference so low that the factor itself would flush to 0.
    float half[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // A row whose scores are all -inf in every piece: 0, as in the softmax.
      const float common = reference[r] == -INFINITY ? 0.0f : reference[r];
      half[r] = ptx::exp2_approx((piece_reference[r] - common) * (0.5f * params.scale_log2));
      softmax.row_sum[r] += piece_sum[r] * half[r] * half[r];
    }
    partial.add_output(half, output);
  }
  softmax.reference[0] = reference[0];
  softmax.reference[1] = reference[1];
  return true;
}

}  // namespace jax_fa3
