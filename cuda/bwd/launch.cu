#include <cuda_runtime.h>

#include "cuda/bwd/launch.h"
#include "cuda/bwd/params.h"
#include "cuda/core/host.h"

namespace jax_fa3 {

// Defined in inst/, one file a dtype and head dim.
template <class Config>
cudaError_t launch_delta(uint32_t ctas, const DeltaParams& params, cudaStream_t stream);
template <class Config>
cudaError_t launch_bwd_config(const BwdParams& params, cudaStream_t stream);
template <class Config>
cudaError_t launch_convert(uint32_t ctas, const ConvertParams& params, cudaStream_t stream);

namespace {

struct Launchers {
  cudaError_t (*delta)(uint32_t, const DeltaParams&, cudaStream_t);
  cudaError_t (*main)(const BwdParams&, cudaStream_t);
  cudaError_t (*convert)(uint32_t, const ConvertParams&, cudaStream_t);
};
#define JAX_FA3_LAUNCHERS(config) \
  {&launch_delta<config>, &launch_bwd_config<config>, &launch_convert<config>},
constexpr Launchers kLaunchers[] = {JAX_FA3_BWD_CONFIGS(JAX_FA3_LAUNCHERS)};
#undef JAX_FA3_LAUNCHERS

}  // namespace

Status launch_bwd(const Problem& problem, const BwdPlan& plan, const BwdBuffers& buffers,
                  CUstream_st* stream) {
  const BwdConfig& config = plan.named().config;
  const Launchers& launch = kLaunchers[plan.config_index];
  const BwdWorkspace layout(problem, plan);
  auto* const workspace = static_cast<uint8_t*>(buffers.workspace);
  auto* const lse_log2 = reinterpret_cast<float*>(workspace + layout.lse_log2);
  auto* const delta = reinterpret_cast<float*>(workspace + layout.delta);
  auto* const dq_accumulator = reinterpret_cast<float*>(workspace + layout.dq_accumulator);
  auto* const turns = reinterpret_cast<uint32_t*>(workspace + layout.turns);
  const auto heads_q = static_cast<int32_t>(problem.heads_q);
  // Without query heads there are no steps over queries either.
  const auto seqlen_q = heads_q > 0 ? static_cast<int32_t>(problem.seqlen_q) : 0;
  const int32_t blocks = plan.padded_q / BwdConfig::kBlockRows;
  const auto block_ctas = static_cast<uint32_t>(problem.batch * heads_q * blocks);

  if (block_ctas > 0) {
    DeltaParams params{};
    params.out = buffers.out;
    params.dout = buffers.dout;
    params.lse = buffers.lse;
    params.dlse = buffers.dlse;
    params.lse_log2 = lse_log2;
    params.delta = delta;
    params.dq_accumulator = dq_accumulator;
    params.turns = turns;
    params.seqlen_q = seqlen_q;
    params.padded_q = plan.padded_q;
    params.heads_q = heads_q;
    params.blocks = blocks;
    JAX_FA3_RETURN_IF_ERROR(launch.delta(block_ctas, params, stream));
  }

  if (plan.grid.tiles > 0 || plan.query_grid.tiles > 0) {
    // Where there is no query or no key there is nothing to map, and the results are zeros; any
    // valid address will do.
    const bool no_queries = block_ctas == 0, no_keys = plan.grid.tiles == 0;
    const void* const some = no_keys ? buffers.query : buffers.key;
    BwdParams params{};
    const auto encode = [&](const char* name, const void* data, int64_t batch, int64_t seqlen,
                            int64_t heads, int rows, TensorMap& map) {
      return encode_tiles(name, data, batch, seqlen, heads, problem.head_dim, problem.dtype, rows,
                          map);
    };
    Status status = encode("query", no_queries ? some : buffers.query, problem.batch_q,
                           problem.seqlen_q, problem.heads_q, config.tile_m, params.q_map);
    if (!status.ok()) return status;
    status = encode("dout", no_queries ? some : buffers.dout, problem.batch, problem.seqlen_q,
                    problem.heads_q, config.tile_m, params.dout_map);
    if (!status.ok()) return status;
    status = encode("key", no_keys ? some : buffers.key, problem.batch_k, problem.seqlen_k,
                    problem.heads_k, config.tile_n(), params.k_map);
    if (!status.ok()) return status;
    status = encode("value", no_keys ? some : buffers.value, problem.batch_v, problem.seqlen_k,
                    problem.heads_k, config.tile_n(), params.v_map);
    if (!status.ok()) return status;

    constexpr double kLog2e = 1.4426950408889634;
    params.lse_log2 = lse_log2;
    params.delta = delta;
    params.dq_accumulator = dq_accumulator;
    params.turns = turns;
    params.dq = buffers.dq;
    params.dk = buffers.dk;
    params.dv = buffers.dv;
    params.query_offset = buffers.query_offset;
    params.grid = plan.grid;
    params.query_grid = plan.query_grid;
    params.keys_first = plan.keys_first;
    params.batch_map = problem.batch_map;
    params.seqlen_q = seqlen_q;
    params.seqlen_k = static_cast<int32_t>(problem.seqlen_k);
    params.padded_q = plan.padded_q;
    params.heads_q = heads_q;
    params.group = static_cast<int32_t>(problem.heads_q / problem.heads_k);
    params.diagonal = static_cast<int32_t>(problem.diagonal);
    params.scale = problem.scale;
    params.scale_log2 = static_cast<float>(problem.scale * kLog2e);
    if (const cudaError_t error = launch.main(params, stream); error != cudaSuccess) {
      return cuda_error(error, plan.named().name);
    }
  }

  if (block_ctas > 0 && !config.two_pass()) {
    ConvertParams params{};
    params.dq_accumulator = dq_accumulator;
    params.dq = buffers.dq;
    params.seqlen_q = seqlen_q;
    params.heads_q = heads_q;
    params.blocks = blocks;
    params.scale = problem.scale;
    JAX_FA3_RETURN_IF_ERROR(launch.convert(block_ctas, params, stream));
  }
  return {};
}

}  // namespace jax_fa3
