// What programs that launch kernels without JAX share: arrays on the device, 16-bit numbers on the
// host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/core/problem.h"

#define CHECK_CUDA(expression)                                                  \
  do {                                                                          \
    if (const cudaError_t error = (expression); error != cudaSuccess) {         \
      std::fprintf(stderr, "%s: %s\n", #expression, cudaGetErrorString(error)); \
      std::exit(2);                                                             \
    }                                                                           \
  } while (false)

namespace jax_fa3 {

inline uint16_t bits(DType dtype, float x) {
  if (dtype == DType::kBF16) return __bfloat16_as_ushort(__float2bfloat16(x));
  return __half_as_ushort(__float2half(x));
}
inline float value(DType dtype, uint16_t b) {
  return dtype == DType::kBF16 ? __bfloat162float(__ushort_as_bfloat16(b))
                               : __half2float(__ushort_as_half(b));
}

// An allocation of its own, so that memcheck sees an access past its end.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    if (count_ > 0) CHECK_CUDA(cudaMalloc(&data_, bytes()));
    poison(nullptr);
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;

  T* get() const { return data_; }
  size_t count() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }
  // NaN in every format, and no counter's or accumulator's zero.
  void poison(cudaStream_t stream) {
    if (count_ > 0) CHECK_CUDA(cudaMemsetAsync(data_, 0xff, bytes(), stream));
  }
  void zero(cudaStream_t stream) {
    if (count_ > 0) CHECK_CUDA(cudaMemsetAsync(data_, 0, bytes(), stream));
  }
  void copy_from(const std::vector<T>& host) {
    if (count_ > 0) CHECK_CUDA(cudaMemcpy(data_, host.data(), bytes(), cudaMemcpyHostToDevice));
  }
  void copy_from(const DeviceArray& other, cudaStream_t stream) {
    if (count_ == 0) return;
    CHECK_CUDA(cudaMemcpyAsync(data_, other.data_, bytes(), cudaMemcpyDeviceToDevice, stream));
  }
  std::vector<T> copy() const {
    std::vector<T> host(count_);
    if (count_ > 0) CHECK_CUDA(cudaMemcpy(host.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  size_t count_;
  T* data_ = nullptr;
};

// Which of the operands' own batch rows a row of the output reads.
struct OperandRows {
  int64_t q = 0, k = 0, v = 0;
};
inline OperandRows operand_rows(const BatchMap& map, int64_t batch) {
  OperandRows rows;
  for (int level = map.levels - 1; level >= 0; --level) {
    const int64_t i = batch % map.size[level];
    batch /= map.size[level];
    rows.q += i * map.q_stride[level];
    rows.k += i * map.k_stride[level];
    rows.v += i * map.v_stride[level];
  }
  return rows;
}

}  // namespace jax_fa3
