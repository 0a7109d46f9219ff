// A consumer warpgroup: 64 query rows from scores to output.
//
// With overlap, for the blocks n = last .. 0 (time runs down; the tensor cores see no gap as long
// as another warpgroup's products fill the softmax):
//
//   S(last) = Q K(last)^T                      softmax of S(last) -> P
//   loop   S(n) = Q K(n)^T   | both issued
//          O   += P V(n + 1) | back to back    softmax of S(n) while P V runs
//                                              O *= shrink, P = S(n) rounded
//   O += P V(0)
#pragma once

#include "cuda/core/accumulator.cuh"
#include "cuda/core/mask.h"
#include "cuda/core/softmax.cuh"
#include "cuda/fwd/epilogue.cuh"
#include "cuda/fwd/self_loading.cuh"
#include "cuda/fwd/split.cuh"
#include "cuda/fwd/work.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace jax_fa3 {

// Pingpong: consumer warpgroups issue their products in turns, so that one's softmax runs under
// another's products. Each block is one turn; a warpgroup that skips a block takes its turn too.
template <class Config>
struct Turns {
  static constexpr int kWarpgroups = Config::value.consumer_warpgroups;
  static constexpr int kThreads = 2 * ptx::kWarpgroupSize;  // one that waits, one that arrives
  int warpgroup;

  __device__ __forceinline__ explicit Turns(int warpgroup) : warpgroup(warpgroup) {
    if constexpr (Config::value.pingpong) {
      if (warpgroup == kWarpgroups - 1) ptx::named_barrier_arrive(id(0), kThreads);
    }
  }
  __device__ __forceinline__ void take() const {
    if constexpr (Config::value.pingpong) ptx::named_barrier_sync(id(warpgroup), kThreads);
  }
  __device__ __forceinline__ void pass() const {
    if constexpr (Config::value.pingpong) {
      ptx::named_barrier_arrive(id(warpgroup + 1 == kWarpgroups ? 0 : warpgroup + 1), kThreads);
    }
  }

 private:
  static __device__ __forceinline__ int id(int warpgroup) {
    return static_cast<int>(ptx::NamedBarrier::kPingpong) + warpgroup;
  }
};

template <class Config>
class FwdConsumer {
  static constexpr FwdConfig kConfig = Config::value;
  static constexpr int kTileN = kConfig.tile_n;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kScores = kTileN / 2;  // accumulators a lane: 64 x tile_n over 128 lanes
  static constexpr int kOutputs = kHeadDim / 2;

 public:
  __device__ __forceinline__ FwdConsumer(const FwdParams& params, const FwdRings<Config>& rings,
                                         int warpgroup)
      : params_(params),
        rings_(rings),
        warpgroup_(warpgroup),
        turns_(warpgroup),
        loads_(params, rings, warpgroup) {}

  __device__ __forceinline__ void run() {
    for (FwdSchedule<Config> schedule(rings_.tile_queue);; schedule.step()) {
      schedule.receive();
      if (schedule.index >= work_items<Config>(params_)) break;
      const Piece piece = work_piece<Config>(params_, schedule.index);
      if (piece.tile == Piece::kNone) continue;
      const TileWork work = piece_work<Config>(params_, piece);
      const int32_t work_end = ptx::uniform(work.end - work.begin);
      if (!attend<kConfig.softmax>(work, uniform_blocks(work), work_end, piece)) {
        list_for_redo(piece.tile);
      }
    }
    if constexpr (kConfig.softmax == Softmax::kLazy) redo();
  }

 private:
  __device__ __forceinline__ KeyBlocks uniform_blocks(const TileWork& work) const {
    const KeyBlocks blocks = warpgroup_blocks<Config>(params_, work, warpgroup_);
    return {ptx::uniform(blocks.end), ptx::uniform(blocks.unmasked_end),
            ptx::uniform(blocks.first_row_unseen) != 0};
  }

  // The warpgroup's rows of a tile, or of a piece of one, of `work_end` blocks; `blocks` are the
  // warpgroup's own, and both count from the work's first block. False where a lazy reference
  // failed; always the same in all threads of the warpgroup.
  template <Softmax kSoftmax>
  __device__ __forceinline__ bool attend(const TileWork& work, const KeyBlocks& blocks,
                                         int32_t work_end, const Piece& piece) {
    float output[kOutputs];
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) output[i] = 0.0f;

    const int row = work.tile.m_tile * kConfig.tile_m() + warpgroup_ * 64 + accumulator_row();
    const int32_t first_key = work.begin * kTileN;
    const int32_t visible[2] = {
        visible_keys<kConfig.mask>(row, params_.seqlen_k, work.diagonal) - first_key,
        visible_keys<kConfig.mask>(row + 8, params_.seqlen_k, work.diagonal) - first_key};

    // The tile's last blocks may be visible to the warpgroups below only.
    for (int32_t block = work_end - 1; block >= blocks.end; --block) skip_block();

    bool all_good = true;
    bool store[2] = {row < params_.seqlen_q, row + 8 < params_.seqlen_q};
    float inverse[2] = {0.0f, 0.0f};
    float lse[2] = {-INFINITY, -INFINITY};
    if (work_end > 0) wait_query();
    if (blocks.end > 0) {
      if constexpr (kConfig.overlap) {
        attend_overlapped<kSoftmax>(blocks, visible, output);
      } else {
        attend_in_order(blocks, visible, output);
      }
      bool lazy = blocks.unmasked_end > 0;  // masked blocks are not
      if constexpr (kConfig.split_tail && kSoftmax == kConfig.softmax) {
        if (params_.split.cuts(piece)) {
          if (!join_pieces<Config>(params_, piece, warpgroup_, softmax_, output)) return true;
          lazy = true;
        }
      }
      softmax_.finish(params_.scale_log2, inverse, lse);
      if constexpr (kSoftmax == Softmax::kLazy) {
        if (lazy) all_good = check_rows(output, lse);
      }
    } else if (work_end > 0) {
      release_query();
    }
    if constexpr (kSoftmax != kConfig.softmax) {  // a redo: rows that were right keep their bits
      store[0] = store[0] && is_nan(*lse_address(params_, work.tile, row));
      store[1] = store[1] && is_nan(*lse_address(params_, work.tile, row + 8));
    }
    store_output<Config>(params_, work.tile, row, store, output, inverse, lse);
    return all_good;
  }

  // Marks the lane's failed rows by a NaN lse, by which redo() will know them. Whether no row of
  // the warpgroup failed.
  __device__ __forceinline__ bool check_rows(const float (&output)[kOutputs], float (&lse)[2]) {
    bool good[2];
    softmax_.in_range(output, good);
    if (!good[0]) lse[0] = NAN;
    if (!good[1]) lse[1] = NAN;
    return !ptx::named_barrier_any(static_cast<int>(ptx::NamedBarrier::kVote) + warpgroup_,
                                   ptx::kWarpgroupSize, !good[0] || !good[1]);
  }
  static __device__ __forceinline__ bool is_nan(float x) { return x != x; }

  __device__ __forceinline__ void list_for_redo(uint32_t tile) {
    if (threadIdx.x % ptx::kWarpgroupSize != 0) return;
    const uint32_t entry = tile * kConfig.consumer_warpgroups + warpgroup_;
    params_.redo_next[entry] = atomicExch(&rings_.redo->head, entry + 1);
  }

  // The listed rows, by the loop that takes a maximum in every block. The other warpgroups let the
  // blocks pass.
  __device__ __forceinline__ void redo() {
    const uint32_t drained = ptx::shared_address(&rings_.redo->drained);
    __syncwarp();  // the arriving lane speaks for what its warp has stored
    if (ptx::lane_index() == 0) ptx::mbarrier_arrive(drained);
    ptx::mbarrier_wait(drained, 0);
    uint32_t count = 0;
    for (RedoCursor redo(*rings_.redo); redo.entry != 0; redo.step(params_), ++count) {
      const TileWork work = tile_work<Config>(params_, redo.template tile<Config>());
      const int chosen = redo.template warpgroup<Config>();
      if (chosen == warpgroup_) {
        const KeyBlocks blocks = uniform_blocks(work);
        attend<Softmax::kClassical>(work, blocks, blocks.end, Piece{});
      } else {
        const int32_t end = warpgroup_blocks<Config>(params_, work, chosen).end;
        for (int32_t block = 0; block < end; ++block) skip_block();
        wait_query();
        release_query();
      }
    }
    if (warpgroup_ == 0 && threadIdx.x % ptx::kWarpgroupSize == 0) {
      params_.redo_count[blockIdx.x] = count;
    }
  }

  template <Softmax kSoftmax>
  __device__ __forceinline__ void attend_overlapped(const KeyBlocks& blocks,
                                                    const int32_t (&visible)[2],
                                                    float (&output)[kOutputs]) {
    int32_t block = blocks.end - 1;
    rings_.k_ring.wait(k_at_);
    turns_.take();
    ptx::wgmma_fence();
    issue_scores();
    turns_.pass();
    loads_.load_block();
    ptx::wgmma_wait<0>();
    ptx::fence_registers(scores_);
    release_keys();
    if (block >= blocks.unmasked_end) mask(block, visible);
    softmax_.first(scores_, params_.scale_log2);
    pack_fragments<kConfig.dtype>(scores_, probs_);

    // Before a lazy reference is set, blocks are done as kConditional does them.
    constexpr Softmax kRule = kSoftmax == Softmax::kLazy ? Softmax::kConditional : kSoftmax;
    for (--block; block >= blocks.unmasked_end; --block) step<true, kRule>(block, visible, output);
    if constexpr (kSoftmax == Softmax::kLazy) {
      // A reference needs a visible key. The first row may have seen none yet, when the masked
      // blocks begin just behind its last key (later rows see more); one more block shows it some.
      if (block >= 0 && blocks.first_row_unseen) {
        step<false, kRule>(block, visible, output);
        --block;
      }
      softmax_.freeze();
      for (; block >= 0; --block) step<false, Softmax::kLazy>(block, visible, output);
    } else {
      for (; block >= 0; --block) step<false, kRule>(block, visible, output);
    }

    release_query();
    rings_.v_ring.wait(v_at_);
    ptx::fence_registers(output);
    ptx::wgmma_fence();
    issue_output(output);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(output);
    release_values();
  }

  template <bool kMasked, Softmax kRule>
  __device__ __forceinline__ void step(int32_t block, const int32_t (&visible)[2],
                                       float (&output)[kOutputs]) {
    rings_.k_ring.wait(k_at_);
    turns_.take();
    ptx::fence_registers(output);
    ptx::wgmma_fence();
    issue_scores();
    rings_.v_ring.wait(v_at_);
    // Again before the second group: without it ptxas adds its own arrive in what it takes for a
    // divergent path, and serializes.
    ptx::wgmma_fence();
    issue_output(output);
    turns_.pass();
    loads_.load_block();

    ptx::wgmma_wait<1>();
    ptx::fence_registers(scores_);
    release_keys();
    if constexpr (kMasked) mask(block, visible);
    if constexpr (kRule == Softmax::kLazy) {
      softmax_.next_frozen(scores_, params_.scale_log2);
    } else {
      softmax_.template next<kRule>(scores_, params_.scale_log2);
    }

    ptx::wgmma_wait<0>();
    ptx::fence_registers(output);
    ptx::fence_registers(probs_);
    release_values();
    if constexpr (kRule != Softmax::kLazy) softmax_.rescale(output);
    pack_fragments<kConfig.dtype>(scores_, probs_);
  }

  // Without overlap: scores, softmax and output of a block one after the other.
  __device__ __forceinline__ void attend_in_order(const KeyBlocks& blocks,
                                                  const int32_t (&visible)[2],
                                                  float (&output)[kOutputs]) {
    for (int32_t block = blocks.end - 1; block >= 0; --block) {
      rings_.k_ring.wait(k_at_);
      turns_.take();
      ptx::fence_registers(output);
      ptx::wgmma_fence();
      issue_scores();
      turns_.pass();
      loads_.load_block();
      ptx::wgmma_wait<0>();
      ptx::fence_registers(scores_);
      ptx::fence_registers(output);
      release_keys();
      if (block >= blocks.unmasked_end) mask(block, visible);
      if (block == blocks.end - 1) {
        softmax_.first(scores_, params_.scale_log2);
      } else {
        softmax_.template next<kConfig.softmax>(scores_, params_.scale_log2);
        softmax_.rescale(output);
      }
      pack_fragments<kConfig.dtype>(scores_, probs_);
      rings_.v_ring.wait(v_at_);
      ptx::fence_registers(output);
      ptx::wgmma_fence();
      issue_output(output);
      ptx::wgmma_wait<0>();
      ptx::fence_registers(output);
      release_values();
    }
    release_query();
  }

  // S = Q K^T, asynchronously: A [64, head_dim] and B [tile_n, head_dim], both K-major.
  __device__ __forceinline__ void issue_scores() {
    using Mma = ptx::Wgmma<kConfig.dtype, kTileN>;
    const ptx::SmemOperand q = ptx::k_major_operand(rings_.q + warpgroup_ * kConfig.q_bytes());
    const ptx::SmemOperand k = ptx::k_major_operand(rings_.k + k_at_.stage * kConfig.kv_bytes());
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int chunk = step / 4, within = step % 4 * 32;
      Mma::template ss<ptx::Major::kK, ptx::Major::kK>(
          scores_, q.descriptor(chunk * 64 * 128 + within),
          k.descriptor(chunk * kTileN * 128 + within), step > 0);
    }
    ptx::wgmma_commit();
  }

  // O += P V: A from registers, B [tile_n, head_dim] with the keys contracted.
  __device__ __forceinline__ void issue_output(float (&output)[kOutputs]) {
    using Mma = ptx::Wgmma<kConfig.dtype, kHeadDim>;
    const ptx::SmemOperand v =
        ptx::mn_major_operand(rings_.v + v_at_.stage * kConfig.kv_bytes(), kTileN * 128);
#pragma unroll
    for (int step = 0; step < kTileN / 16; ++step) {
      Mma::template rs<ptx::Major::kMN>(output, probs_[4 * step], probs_[4 * step + 1],
                                        probs_[4 * step + 2], probs_[4 * step + 3],
                                        v.descriptor(step * 16 * 128), 1);
    }
    ptx::wgmma_commit();
  }

  // Row r of the lane sees keys [0, visible[r]).
  __device__ __forceinline__ void mask(int32_t block, const int32_t (&visible)[2]) {
    const int32_t first = block * kTileN + accumulator_column();
    const int32_t limit[2] = {visible[0] - first, visible[1] - first};
    mask_from(scores_, limit);
  }

  __device__ __forceinline__ void release_keys() {
    rings_.k_ring.release(k_at_);
    k_at_.advance();
  }
  __device__ __forceinline__ void release_values() {
    rings_.v_ring.release(v_at_);
    v_at_.advance();
  }
  __device__ __forceinline__ void wait_query() {
    ptx::mbarrier_wait(rings_.q_full + 8 * warpgroup_, q_phase_);
    q_phase_ ^= 1;
  }
  // The last scores are done: the producer may load the next tile's query under the last P V.
  __device__ __forceinline__ void release_query() {
    if (ptx::lane_index() == 0) ptx::mbarrier_arrive(rings_.q_empty + 8 * warpgroup_);
    loads_.load_next_query();
  }
  // Both barriers must have been seen full before they are released.
  __device__ __forceinline__ void skip_block() {
    turns_.take();
    turns_.pass();
    rings_.k_ring.wait(k_at_);
    release_keys();
    loads_.load_block();
    rings_.v_ring.wait(v_at_);
    release_values();
  }

  const FwdParams& params_;
  const FwdRings<Config>& rings_;
  const int warpgroup_;
  const Turns<Config> turns_;
  FwdLoads<Config> loads_;
  typename FwdRings<Config>::Position k_at_, v_at_;
  uint32_t q_phase_ = 0;
  float scores_[kScores];
  uint32_t probs_[kScores / 2];
  OnlineSoftmax<kScores, kConfig.softmax, kConfig.dtype> softmax_;
};

}  // namespace jax_fa3
