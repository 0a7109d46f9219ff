// The dQ warpgroup: dQ = dS K of each step over the CTA's keys, added to the accumulator in global
// memory, off the key warpgroups' critical path. Where the result must be the same bits in every
// run, the key tiles take turns.
//
// The accumulator keeps registers' order, so that a lane moves 16 bytes at a time: of a block of 64
// queries x 64 columns, accumulators 4 k .. 4 k + 3 of thread t are floats 4 (128 k + t) + 0 .. 3.
// convert_dq.cuh reads it the same way.
#pragma once

#include "cuda/bwd/loader.cuh"
#include "cuda/bwd/work.cuh"
#include "cuda/core/accumulator.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace jax_fa3 {

template <class Config>
class DqWarpgroup {
  static constexpr BwdConfig kConfig = Config::value;
  static constexpr int kTileN = kConfig.tile_n();
  static constexpr int kChunks = kConfig.head_dim / BwdConfig::kDqColumns;
  static constexpr int kBlocks = kConfig.tile_m / BwdConfig::kBlockRows * kChunks;  // a step
  static constexpr int kAccumulators = BwdConfig::kDqColumns / 2;
  static constexpr bool kInTurns = kConfig.dq_sum == DqSum::kInTurns;

 public:
  __device__ __forceinline__ DqWarpgroup(const BwdParams& params, const BwdRings<Config>& rings,
                                         const KeyWork& work)
      : params_(params), rings_(rings), work_(work) {}

  __device__ __forceinline__ void run() {
    const bool leader = threadIdx.x % ptx::kWarpgroupSize == 0;
    const int32_t steps = work_.steps.end - work_.steps.begin;
    Loader<Config> loader(params_, rings_, work_);
    if (leader) loader.begin();
    __syncwarp();
    if (steps == 0) return;
    ptx::mbarrier_wait(rings_.k_full, 0);
    // The steps of one head lie next to each other, its siblings' a whole head away.
    using Order = StepOrder<Config>;
    float* block =
        params_.dq_accumulator + row_index(params_, work_.batch, work_.head_k * params_.group,
                                           Order(params_, work_.steps).first * kConfig.tile_m) *
                                     kConfig.head_dim;
    constexpr int kStride = Order::kBackwards ? -kStep : kStep;
    const int64_t next_head =
        static_cast<int64_t>(params_.padded_q) * kConfig.head_dim - int64_t{steps} * kStride;
    int32_t left_of_head = steps;
#pragma unroll 1
    for (int32_t left = params_.group * steps; left > 0; --left) {
      rings_.dscores_ring.wait(at_);
      if (leader) {
        if constexpr (kInTurns) look_at_turn(block);
        if (left != params_.group * steps) loader.load_step();
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        ptx::wgmma_fence();
        multiply(i / kChunks, i % kChunks);
        ptx::wgmma_wait<0>();
        ptx::fence_registers(dq_);
        if (i == kBlocks - 1) {
          rings_.dscores_ring.release(at_);
          at_.advance();
        }
        add(leader, i, block + i * kBlock);
      }
      block += kStride;
      if (--left_of_head == 0) {
        left_of_head = steps;
        block += next_head;
      }
    }
    if (leader) {
      ptx::bulk_wait_read<0>();
      if constexpr (kInTurns) pass_turn();
    }
  }

 private:
  static constexpr int kBlock = BwdConfig::kBlockRows * BwdConfig::kDqColumns;  // floats
  static constexpr int kStep = kConfig.tile_m * kConfig.head_dim;

  // 64 rows and columns of dS K: A [64 queries, keys] and B [keys, 64], both stored with the keys
  // as rows.
  __device__ __forceinline__ void multiply(int half, int chunk) {
    using Mma = ptx::Wgmma<kConfig.dtype, BwdConfig::kDqColumns>;
    const ptx::SmemOperand dscores = ptx::mn_major_operand(
        rings_.dscores + at_.stage * kConfig.dscores_bytes() + half * kTileN * 128, kTileN * 128);
    const ptx::SmemOperand keys =
        ptx::mn_major_operand(rings_.k + chunk * kTileN * 128, kTileN * 128);
#pragma unroll
    for (int step = 0; step < kTileN / 16; ++step) {
      Mma::template ss<ptx::Major::kMN, ptx::Major::kMN>(
          dq_, dscores.descriptor(step * 16 * 128), keys.descriptor(step * 16 * 128), step > 0);
    }
    ptx::wgmma_commit();
  }

  // Adds block `i` of a step to the accumulator: registers to shared memory, from where the copy
  // engine takes it. Two buffers: the one to fill was the last but one to leave.
  __device__ __forceinline__ void add(bool leader, int i, float* destination) {
    static_assert(BwdConfig::kDqBuffers == 2);
    constexpr int kBarrier = static_cast<int>(ptx::NamedBarrier::kDq);
    const uint32_t buffer = rings_.dq + buffer_ * BwdConfig::dq_bytes();
    buffer_ ^= 1;
    if (leader) {
      if (kInTurns && i == 0) {
        // A step later its additions are complete, or nearly. (At once, waiting for them holds the
        // warpgroup up: head dim 128 ran at 0.63 of the default's speed.)
        if (turn_ >= 0) pass_turn();
      } else {
        ptx::bulk_wait_read<1>();
      }
    }
    ptx::named_barrier_sync(kBarrier, ptx::kWarpgroupSize);
    const uint32_t address = buffer + threadIdx.x % ptx::kWarpgroupSize * 16;
#pragma unroll
    for (int i = 0; i < kAccumulators; i += 4) {
      asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address + i * 512), "f"(dq_[i]),
                   "f"(dq_[i + 1]), "f"(dq_[i + 2]), "f"(dq_[i + 3])
                   : "memory");
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kBarrier, ptx::kWarpgroupSize);
    if (leader) {
      if (kInTurns && i == 0) await_turn(destination);
      ptx::bulk_add_f32(destination, buffer, BwdConfig::dq_bytes());
      ptx::bulk_commit();
    }
  }

  // Key tiles add to a step in the order of their launch, so that none waits for one that has no
  // multiprocessor yet. One thread; `step` is where its blocks begin.
  //
  // The counters are relaxed: they publish nothing, they order additions that the L2 does. Those of
  // one tile have been done when its bulk_wait returns, and those of the next are issued after it
  // has read the counter. (With release, acquire and proxy fences the mode took a third more time.)
  __device__ __forceinline__ void look_at_turn(const float* step) {
    seen_ = ptx::load_relaxed(params_.turns + turn_index(step));
  }
  __device__ __forceinline__ void await_turn(const float* step) {
    turn_ = turn_index(step);
    while (seen_ != static_cast<uint32_t>(work_.n_tile)) {
      seen_ = ptx::load_relaxed(params_.turns + turn_);
    }
  }
  __device__ __forceinline__ void pass_turn() const {
    ptx::bulk_wait<0>();
    ptx::add_relaxed(params_.turns + turn_, 1);
  }
  __device__ __forceinline__ int32_t turn_index(const float* step) const {
    return static_cast<int32_t>((step - params_.dq_accumulator) /
                                (BwdConfig::kBlockRows * kConfig.head_dim));
  }

  const BwdParams& params_;
  const BwdRings<Config>& rings_;
  const KeyWork& work_;
  typename BwdRings<Config>::DscoresPosition at_;
  int buffer_ = 0;
  int32_t turn_ = -1;  // index of the step added to last; none yet
  uint32_t seen_;      // of a turn's counter
  float dq_[kAccumulators];
};

}  // namespace jax_fa3
