// The dQ warpgroup: dQ = dS K of each step over the CTA's keys, staged in shared memory for the
// copy engine to add to the accumulator in global memory, off the key warpgroups' critical path. It
// loads and adds for itself too, unless key tiles take turns in adding: then a warpgroup beside it
// does both (turns.cuh).
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

// A CTA's steps in dQ's accumulator. Those of one head lie next to each other, its siblings' a
// whole head away.
template <class Config>
class DqSteps {
  static constexpr BwdConfig kConfig = Config::value;
  using Order = StepOrder<Config>;
  static constexpr int kStep = kConfig.tile_m * kConfig.head_dim;  // floats
  static constexpr int kStride = Order::kBackwards ? -kStep : kStep;

 public:
  __device__ __forceinline__ DqSteps(const BwdParams& params, const KeyWork& work)
      : step_(params.dq_accumulator + row_index(params, work.batch, work.head_k * params.group,
                                                Order(params, work.steps).first * kConfig.tile_m) *
                                          kConfig.head_dim),
        steps_(work.steps.end - work.steps.begin),
        left_of_head_(steps_),
        next_head_(static_cast<int64_t>(params.padded_q) * kConfig.head_dim -
                   int64_t{steps_} * kStride) {}

  __device__ __forceinline__ float* operator*() const { return step_; }
  __device__ __forceinline__ void advance() {
    step_ += kStride;
    if (--left_of_head_ == 0) {
      left_of_head_ = steps_;
      step_ += next_head_;
    }
  }

 private:
  float* step_;
  const int32_t steps_;
  int32_t left_of_head_;
  const int64_t next_head_;
};

template <class Config>
class DqWarpgroup {
  static constexpr BwdConfig kConfig = Config::value;
  static constexpr int kTileN = kConfig.tile_n();
  static constexpr int kChunks = kConfig.head_dim / BwdConfig::kDqColumns;
  static constexpr int kBlocks = kConfig.dq_blocks();
  static constexpr int kColumns = kConfig.dq_product_columns();
  static constexpr int kParts = BwdConfig::kDqColumns / kColumns;  // products a block
  static constexpr int kAccumulators = kColumns / 2;
  static constexpr bool kInTurns = kConfig.in_turns();

 public:
  __device__ __forceinline__ DqWarpgroup(const BwdParams& params, const BwdRings<Config>& rings,
                                         const KeyWork& work)
      : params_(params), rings_(rings), work_(work) {}

  __device__ __forceinline__ void run() {
    // Loads and adds. In turns nobody here does.
    const bool leader = !kInTurns && threadIdx.x % ptx::kWarpgroupSize == 0;
    const int32_t total = params_.group * (work_.steps.end - work_.steps.begin);
    Loader<Config> loader(params_, rings_, work_);
    if (leader) loader.begin();
    __syncwarp();
    if (total == 0) return;
    ptx::mbarrier_wait(rings_.k_full, 0);
    DqSteps<Config> destination(params_, work_);
#pragma unroll 1
    for (int32_t left = total; left > 0; --left) {
      rings_.dscores_ring.wait(at_);
      if (leader && left != total) loader.load_step();
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kBlocks * kParts; ++i) {
        const int block = i / kParts;
        ptx::wgmma_fence();
        multiply(block / kChunks, block % kChunks, i % kParts);
        ptx::wgmma_wait<0>();
        ptx::fence_registers(dq_);
        if (i == kBlocks * kParts - 1) {
          rings_.dscores_ring.release(at_);
          at_.advance();
        }
        if constexpr (kInTurns) {
          hand_over(i);
        } else {
          add(leader, *destination + block * kBlock);
        }
      }
      destination.advance();
    }
    if (leader) ptx::bulk_wait_read<0>();
  }

 private:
  static constexpr int kBlock = BwdConfig::kBlockRows * BwdConfig::kDqColumns;  // floats

  // 64 rows and kColumns columns of dS K: A [64 queries, keys] and B [keys, kColumns], both stored
  // with the keys as rows.
  __device__ __forceinline__ void multiply(int half, int chunk, int part) {
    using Mma = ptx::Wgmma<kConfig.dtype, kColumns>;
    const ptx::SmemOperand dscores = ptx::mn_major_operand(
        rings_.dscores + at_.stage * kConfig.dscores_bytes() + half * kTileN * 128, kTileN * 128);
    const ptx::SmemOperand keys = ptx::mn_major_operand(
        rings_.k + chunk * kTileN * 128 + part * kColumns * BwdConfig::kElementBytes, kTileN * 128);
#pragma unroll
    for (int step = 0; step < kTileN / 16; ++step) {
      Mma::template ss<ptx::Major::kMN, ptx::Major::kMN>(
          dq_, dscores.descriptor(step * 16 * 128), keys.descriptor(step * 16 * 128), step > 0);
    }
    ptx::wgmma_commit();
  }

  // Adds a block to the accumulator: registers to shared memory, from where the copy engine takes
  // it. Two buffers: the one to fill was the last but one to leave.
  __device__ __forceinline__ void add(bool leader, float* destination) {
    static_assert(BwdConfig::kDqBuffers == 2);
    constexpr int kBarrier = static_cast<int>(ptx::NamedBarrier::kDq);
    const uint32_t buffer = rings_.dq + buffer_ * BwdConfig::dq_bytes();
    buffer_ ^= 1;
    if (leader) ptx::bulk_wait_read<1>();
    ptx::named_barrier_sync(kBarrier, ptx::kWarpgroupSize);
    stage(buffer);
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kBarrier, ptx::kWarpgroupSize);
    if (leader) {
      ptx::bulk_add_f32(destination, buffer, BwdConfig::dq_bytes());
      ptx::bulk_commit();
    }
  }

  // In turns: stages product `i` of a step, and hands the step over after its last. Before the
  // first the step before must have been read: all steps share the buffers.
  __device__ __forceinline__ void hand_over(int i) {
    if (i == 0) {
      ptx::mbarrier_wait(rings_.dq_ring.empty_barrier(dq_before_.stage), dq_before_.phase);
      dq_before_.advance();
    }
    stage(rings_.dq + i * (BwdConfig::dq_bytes() / kParts));
    if (i != kBlocks * kParts - 1) return;
    ptx::fence_proxy_async();
    __syncwarp();
    if (ptx::lane_index() == 0) ptx::mbarrier_arrive(rings_.dq_ring.full_barrier(dq_at_.stage));
    dq_at_.advance();
  }

  __device__ __forceinline__ void stage(uint32_t buffer) const {
    const uint32_t address = buffer + threadIdx.x % ptx::kWarpgroupSize * 16;
#pragma unroll
    for (int i = 0; i < kAccumulators; i += 4) {
      asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address + i * 512), "f"(dq_[i]),
                   "f"(dq_[i + 1]), "f"(dq_[i + 2]), "f"(dq_[i + 3])
                   : "memory");
    }
  }

  const BwdParams& params_;
  const BwdRings<Config>& rings_;
  const KeyWork& work_;
  typename BwdRings<Config>::DscoresPosition at_;
  int buffer_ = 0;
  typename BwdRings<Config>::DqPosition dq_at_;            // in turns: this step's place
  typename BwdRings<Config>::DqPosition dq_before_{1, 1};  // and that of the step before it
  float dq_[kAccumulators];
};

}  // namespace jax_fa3
