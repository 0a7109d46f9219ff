#include <cuda_runtime.h>

#include "cuda/core/host.h"
#include "cuda/fwd/launch.h"
#include "cuda/fwd/params.h"

namespace jax_fa3 {

// Defined in inst/, one file a dtype and head dim.
template <class Config>
cudaError_t launch_config(int ctas, const FwdParams& params, cudaStream_t stream);

namespace {

using Launcher = cudaError_t (*)(int, const FwdParams&, cudaStream_t);
#define JAX_FA3_LAUNCHER(config) &launch_config<config>,
constexpr Launcher kLaunchers[] = {JAX_FA3_FWD_CONFIGS(JAX_FA3_LAUNCHER)
                                       JAX_FA3_FWD_VARIANTS(JAX_FA3_LAUNCHER)};
#undef JAX_FA3_LAUNCHER

}  // namespace

Status launch_fwd(const Problem& problem, const FwdPlan& plan, const FwdBuffers& buffers,
                  CUstream_st* stream) {
  if (plan.ctas == 0) return {};
  const FwdConfig& config = plan.named().config;

  // Without keys there is nothing to map; any valid address will do.
  const bool no_keys = problem.seqlen_k == 0 || problem.batch_k == 0;
  FwdParams params{};
  Status status = encode_tiles("query", buffers.query, problem.batch_q, problem.seqlen_q,
                               problem.heads_q, problem.head_dim, problem.dtype, 64, params.q_map);
  if (!status.ok()) return status;
  status =
      encode_tiles("key", no_keys ? buffers.query : buffers.key, problem.batch_k, problem.seqlen_k,
                   problem.heads_k, problem.head_dim, problem.dtype, config.tile_n, params.k_map);
  if (!status.ok()) return status;
  status = encode_tiles("value", no_keys ? buffers.query : buffers.value, problem.batch_v,
                        problem.seqlen_k, problem.heads_k, problem.head_dim, problem.dtype,
                        config.tile_n, params.v_map);
  if (!status.ok()) return status;

  constexpr double kLog2e = 1.4426950408889634;
  params.out = buffers.out;
  params.lse = buffers.lse;
  params.query_offset = buffers.query_offset;
  auto* const workspace = static_cast<uint8_t*>(buffers.workspace);
  params.tile_counter = reinterpret_cast<uint32_t*>(workspace + FwdWorkspace::kTileCounter);
  params.redo_count = reinterpret_cast<uint32_t*>(workspace + FwdWorkspace::kRedoCount);
  params.redo_next = reinterpret_cast<uint32_t*>(workspace + FwdWorkspace::kRedoNext);
  params.arrivals = reinterpret_cast<uint32_t*>(workspace + FwdWorkspace::kArrivals);
  params.partials = reinterpret_cast<float*>(workspace + FwdWorkspace::partials(plan));
  params.grid = plan.grid;
  params.split = plan.split;
  params.batch_map = problem.batch_map;
  params.seqlen_q = static_cast<int32_t>(problem.seqlen_q);
  params.seqlen_k = static_cast<int32_t>(problem.seqlen_k);
  params.group = static_cast<int32_t>(problem.heads_q / problem.heads_k);
  params.diagonal = static_cast<int32_t>(problem.diagonal);
  params.scale_log2 = static_cast<float>(problem.scale * kLog2e);

  if (const int64_t zeroed = FwdWorkspace::zeroed(plan); zeroed > 0) {
    JAX_FA3_RETURN_IF_ERROR(cudaMemsetAsync(workspace, 0, zeroed, stream));
  }
  if (const cudaError_t error = kLaunchers[plan.config_index](plan.ctas, params, stream);
      error != cudaSuccess) {
    return cuda_error(error, plan.named().name);
  }
  return {};
}

}  // namespace jax_fa3
