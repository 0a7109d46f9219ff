// The CTA's loads: keys and values once, then queries and dout (with lse and delta) step by step.
#pragma once

#include "cuda/bwd/work.cuh"
#include "cuda/core/operand_batch.cuh"
#include "cuda/ptx/tma.cuh"

namespace jax_fa3 {

// One thread. There are no barriers for empty stages: when the key warpgroups have handed over the
// dS of a step, they are through with the step before it, and its stage may be filled again.
template <class Config>
class Loader {
  static constexpr BwdConfig kConfig = Config::value;

 public:
  __device__ __forceinline__ Loader(const BwdParams& params, const BwdRings<Config>& rings,
                                    const KeyWork& work)
      : params_(params),
        rings_(rings),
        work_(work),
        batch_(operand_batch(params.batch_map, work.batch)),
        head_(work.head_k * params.group),
        order_(params, work.steps),
        m_(order_.first),
        left_(params.group * (work.steps.end - work.steps.begin)) {}

  // Everything that there is room for, in the order in which it is waited for.
  __device__ __forceinline__ void begin() {
    load_keys(params_.k_map, rings_.k_full, rings_.k, batch_.k);
    load_queries();
    load_keys(params_.v_map, rings_.v_full, rings_.v, batch_.v);
    load_dout();
#pragma unroll 1
    for (int i = 1; i < kConfig.stages; ++i) load_step();
  }

  __device__ __forceinline__ void load_step() {
    load_queries();
    load_dout();
  }

 private:
  __device__ __forceinline__ void load_keys(const TensorMap& map, uint32_t barrier, uint32_t tile,
                                            int32_t batch) {
    ptx::mbarrier_arrive_expect_tx(barrier, kConfig.kv_bytes());
    ptx::tma_load_5d(map, barrier, tile, 0, work_.n_tile * kConfig.tile_n(), 0, work_.head_k,
                     batch);
  }
  __device__ __forceinline__ void load_queries() {
    if (left_ > 0) {
      load_rows(params_.q_map, rings_.q_full, rings_.q, batch_.q, rings_.lse_log2,
                params_.lse_log2);
    }
  }
  __device__ __forceinline__ void load_dout() {
    if (left_ <= 0) return;
    load_rows(params_.dout_map, rings_.dout_full, rings_.dout, work_.batch, rings_.delta,
              params_.delta);
    at_.advance();
    --left_;
    if (order_.advance(m_)) ++head_;
  }
  // A step's rows of query or dout, and what belongs to them of lse or delta.
  __device__ __forceinline__ void load_rows(const TensorMap& map, uint32_t full, uint32_t tiles,
                                            int32_t batch, uint32_t stats, const float* source) {
    const uint32_t barrier = full + 8 * at_.stage;
    ptx::mbarrier_arrive_expect_tx(barrier, kConfig.q_bytes() + kConfig.stats_bytes());
    ptx::tma_load_5d(map, barrier, tiles + at_.stage * kConfig.q_bytes(), 0, m_ * kConfig.tile_m, 0,
                     head_, batch);
    ptx::bulk_load(barrier, stats + at_.stage * kConfig.stats_bytes(),
                   source + row_index(params_, work_.batch, head_, m_ * kConfig.tile_m),
                   kConfig.stats_bytes());
  }

  const BwdParams& params_;
  const BwdRings<Config>& rings_;
  const KeyWork& work_;
  const OperandBatch batch_;
  int32_t head_;
  const StepOrder<Config> order_;
  int32_t m_;
  int32_t left_;  // steps still to be loaded
  typename BwdRings<Config>::Position at_;
};

}  // namespace jax_fa3
