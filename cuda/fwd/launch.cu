#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstring>
#include <sstream>

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

Status cuda_error(cudaError_t error, const char* expression) {
  return Status::internal(std::string(expression) + ": " + cudaGetErrorName(error) + " (" +
                          cudaGetErrorString(error) + ")");
}
#define JAX_FA3_RETURN_IF_ERROR(expression)                             \
  do {                                                                  \
    if (const cudaError_t error = (expression); error != cudaSuccess) { \
      return cuda_error(error, #expression);                            \
    }                                                                   \
  } while (false)

// The driver's entry point by name, so that the library needs no libcuda to load.
PFN_cuTensorMapEncodeTiled_v12000 encode_tiled() {
  static const auto function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
      pointer = nullptr;
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(pointer);
  }();
  return function;
}

// [batch, seqlen, heads, head_dim], contiguous, as {64, seqlen, head_dim / 64, heads, batch}: the
// box {64, rows, head_dim / 64, 1, 1} is a tile in 128-byte rows, swizzled as wgmma reads it. Rows
// past seqlen arrive as zeros.
Status encode(const char* name, const void* data, int64_t batch, int64_t seqlen, int64_t heads,
              int64_t head_dim, DType dtype, int box_rows, TensorMap& map) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  const auto encode_tensor_map = encode_tiled();
  if (encode_tensor_map == nullptr) {
    return Status::internal("the driver has no cuTensorMapEncodeTiled: too old");
  }
  constexpr uint64_t kElement = FwdConfig::kElementBytes;
  const uint64_t chunks = head_dim / 64;
  // A dimension of 0 cannot be encoded. Nothing is loaded from such a tensor (no visible key), but
  // the kernel still prefetches the descriptor.
  const auto at_least_1 = [](int64_t n) { return static_cast<uint64_t>(n > 0 ? n : 1); };
  const uint64_t sizes[5] = {64, at_least_1(seqlen), chunks, at_least_1(heads), at_least_1(batch)};
  const uint64_t row = at_least_1(heads) * head_dim * kElement;
  const uint64_t strides[4] = {row, 64 * kElement, head_dim * kElement, row * at_least_1(seqlen)};
  const uint32_t box[5] = {64, static_cast<uint32_t>(box_rows), static_cast<uint32_t>(chunks), 1,
                           1};
  const uint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap encoded;
  const CUresult result = encode_tensor_map(
      &encoded,
      dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::ostringstream why;
    why << "cuTensorMapEncodeTiled(" << name << "): error " << result << " for batch " << batch
        << ", seqlen " << seqlen << ", heads " << heads << ", head_dim " << head_dim << " at "
        << data;
    return Status::internal(why.str());
  }
  std::memcpy(&map, &encoded, sizeof(map));
  return {};
}

}  // namespace

Status current_device(Device& device) {
  int ordinal = 0, major = 0, minor = 0;
  JAX_FA3_RETURN_IF_ERROR(cudaGetDevice(&ordinal));
  JAX_FA3_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal));
  JAX_FA3_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal));
  if (major != 9 || minor != 0) {
    return Status::unimplemented("the kernels need compute capability 9.0 (H100, H200); device " +
                                 std::to_string(ordinal) + " has " + std::to_string(major) + "." +
                                 std::to_string(minor));
  }
  JAX_FA3_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&device.sm_count, cudaDevAttrMultiProcessorCount, ordinal));
  return {};
}

Status launch_fwd(const Problem& problem, const FwdPlan& plan, const FwdBuffers& buffers,
                  CUstream_st* stream) {
  if (plan.ctas == 0) return {};
  const FwdConfig& config = plan.named().config;

  // Without keys there is nothing to map; any valid address will do.
  const bool no_keys = problem.seqlen_k == 0 || problem.batch_k == 0;
  FwdParams params{};
  Status status = encode("query", buffers.query, problem.batch_q, problem.seqlen_q, problem.heads_q,
                         problem.head_dim, problem.dtype, 64, params.q_map);
  if (!status.ok()) return status;
  status = encode("key", no_keys ? buffers.query : buffers.key, problem.batch_k, problem.seqlen_k,
                  problem.heads_k, problem.head_dim, problem.dtype, config.tile_n, params.k_map);
  if (!status.ok()) return status;
  status =
      encode("value", no_keys ? buffers.query : buffers.value, problem.batch_v, problem.seqlen_k,
             problem.heads_k, problem.head_dim, problem.dtype, config.tile_n, params.v_map);
  if (!status.ok()) return status;

  constexpr double kLog2e = 1.4426950408889634;
  params.out = buffers.out;
  params.lse = buffers.lse;
  params.query_offset = buffers.query_offset;
  auto* const workspace = static_cast<uint8_t*>(buffers.workspace);
  params.tile_counter = reinterpret_cast<uint32_t*>(workspace + FwdWorkspace::kTileCounter);
  params.redo_count = reinterpret_cast<uint32_t*>(workspace + FwdWorkspace::kRedoCount);
  params.redo_next = reinterpret_cast<uint32_t*>(workspace + FwdWorkspace::kRedoNext);
  params.grid = plan.grid;
  params.batch_map = problem.batch_map;
  params.seqlen_q = static_cast<int32_t>(problem.seqlen_q);
  params.seqlen_k = static_cast<int32_t>(problem.seqlen_k);
  params.group = static_cast<int32_t>(problem.heads_q / problem.heads_k);
  params.diagonal = static_cast<int32_t>(problem.diagonal);
  params.scale_log2 = static_cast<float>(problem.scale * kLog2e);

  if (config.schedule == Schedule::kDynamic) {
    JAX_FA3_RETURN_IF_ERROR(
        cudaMemsetAsync(params.tile_counter, 0, sizeof(*params.tile_counter), stream));
  }
  if (const cudaError_t error = kLaunchers[plan.config_index](plan.ctas, params, stream);
      error != cudaSuccess) {
    return cuda_error(error, plan.named().name);
  }
  return {};
}

}  // namespace jax_fa3
