// What the programs that launch kernels without JAX do alike: cases on every configuration, two
// streams, a soak, and the command line. A Case has a name and a problem; a Run is made of a Case
// and a seed, and has launch, verify and compare_with_first.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/core/named_configs.h"
#include "tests/cuda/device_arrays.cuh"

namespace jax_fa3 {

template <class Bits>
__global__ void count_differing_bits(const Bits* a, const Bits* b, size_t count,
                                     uint32_t* differing) {
  uint32_t here = 0;
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    here += a[i] != b[i];
  }
  if (here > 0) atomicAdd(differing, here);
}
// Adds to *differing the number of elements that are not the same bits.
template <class T>
void count_differing(const DeviceArray<T>& a, const DeviceArray<T>& b, uint32_t* differing,
                     cudaStream_t stream) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(Bits));
  count_differing_bits<<<64, 256, 0, stream>>>(reinterpret_cast<const Bits*>(a.get()),
                                               reinterpret_cast<const Bits*>(b.get()), a.count(),
                                               differing);
  CHECK_CUDA(cudaGetLastError());
}

template <class T>
std::unique_ptr<DeviceArray<T>> copy_of(const DeviceArray<T>& array, cudaStream_t stream) {
  auto copy = std::make_unique<DeviceArray<T>>(array.count());
  copy->copy_from(array, stream);
  return copy;
}

// Each case on each configuration that takes it, not only on the one that the plan would choose; in
// a build with JAX_FA3_ABLATION on each variant too. Those whose name contains `only`.
template <class Case, class Named, size_t kCount>
std::vector<Case> on_every_config(const Named (&configs)[kCount], const std::vector<Case>& some,
                                  const std::string& only) {
  std::vector<Case> all;
  for (const Case& c : some) {
    for (size_t i = 0; i < kCount; ++i) {
      if (!takes(configs[i].config, c.problem)) continue;
      Case forced = c;
      forced.problem.config = static_cast<int>(i);
      forced.name += std::string(" on ") + configs[i].name;
      if (forced.name.find(only) != std::string::npos) all.push_back(forced);
    }
  }
  return all;
}

// Counts checks, and prints those that failed.
class Report {
 public:
  // Nothing is wrong where `wrong` is empty.
  void operator()(const std::string& name, const std::string& wrong) {
    if (wrong.empty()) {
      ++passed_;
    } else {
      ++failed_;
      std::printf("FAILED %s: %s\n", name.c_str(), wrong.c_str());
    }
  }
  int count() const { return passed_ + failed_; }
  // The program's exit status.
  int finish() const {
    std::printf("%d passed, %d failed\n", passed_, failed_);
    return failed_ == 0 ? 0 : 1;
  }

 private:
  int passed_ = 0, failed_ = 0;
};

// Two streams at once: nothing is shared between launches.
template <class Run>
void run_on_two_streams(Run& left, Run& right, Report& report) {
  cudaStream_t streams[2];
  for (cudaStream_t& stream : streams) {
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  for (int i = 0; i < 20; ++i) {
    report("two streams", left.launch(streams[0]).message);
    report("two streams", right.launch(streams[1]).message);
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  report("first of two streams", left.verify());
  report("second of two streams", right.verify());
}

// Launches of varied shapes in a random order, back to back; the results of each are compared on
// the device with those of its shape's first, and those, if asked, with the definition.
template <class Run, class Case>
int soak_shapes(const std::vector<Case>& shapes, int launches, bool verify_first) {
  std::vector<std::unique_ptr<Run>> runs;
  for (const Case& c : shapes) runs.push_back(std::make_unique<Run>(c, 77));
  DeviceArray<uint32_t> differing(shapes.size());
  differing.zero(nullptr);
  std::mt19937 generator(1);
  for (int i = 0; i < launches; ++i) {
    const bool first = static_cast<size_t>(i) < shapes.size();
    const size_t shape = first ? i : generator() % shapes.size();
    std::string wrong = runs[shape]->launch(nullptr).message;
    if (first && verify_first && wrong.empty()) {
      CHECK_CUDA(cudaDeviceSynchronize());
      wrong = runs[shape]->verify();
    }
    if (!wrong.empty()) {
      std::printf("FAILED %s: %s\n", shapes[shape].name.c_str(), wrong.c_str());
      return 1;
    }
    runs[shape]->compare_with_first(differing.get() + shape, nullptr);
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  const std::vector<uint32_t> elements = differing.copy();
  int failed = 0;
  for (size_t shape = 0; shape < shapes.size(); ++shape) {
    if (elements[shape] == 0) continue;
    ++failed;
    std::printf("FAILED %s: %u elements differed\n", shapes[shape].name.c_str(), elements[shape]);
  }
  std::printf("%d launches over %zu shapes, %d shapes changed\n", launches, shapes.size(), failed);
  return failed == 0 ? 0 : 1;
}

inline int device_main(int argc, char** argv, const char* program,
                       int (*run_all)(const std::string& only), int (*soak)(int launches)) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no GPU: nothing was tested\n");
    return 3;
  }
  const std::string argument = argc > 1 ? argv[1] : "--only=";
  const std::string soak_flag = "--soak=", only_flag = "--only=";
  if (argc <= 2 && argument.rfind(soak_flag, 0) == 0) {
    return soak(std::atoi(argument.c_str() + soak_flag.size()));
  }
  if (argc <= 2 && argument.rfind(only_flag, 0) == 0) {
    return run_all(argument.substr(only_flag.size()));
  }
  std::fprintf(stderr, "usage: %s [--only=TEXT | --soak=LAUNCHES]\n", program);
  return 2;
}

}  // namespace jax_fa3
