#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstring>
#include <sstream>
#include <string>

#include "cuda/core/device.h"
#include "cuda/core/host.h"

namespace jax_fa3 {

Status cuda_error(cudaError_t error, const char* expression) {
  return Status::internal(std::string(expression) + ": " + cudaGetErrorName(error) + " (" +
                          cudaGetErrorString(error) + ")");
}

namespace {

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

}  // namespace

Status encode_tiles(const char* name, const void* data, int64_t batch, int64_t seqlen,
                    int64_t heads, int64_t head_dim, DType dtype, int box_rows, TensorMap& map) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  const auto encode_tensor_map = encode_tiled();
  if (encode_tensor_map == nullptr) {
    return Status::internal("the driver has no cuTensorMapEncodeTiled: too old");
  }
  constexpr uint64_t kElement = 2;
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

}  // namespace jax_fa3
