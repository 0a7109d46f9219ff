// The Python extension jax_fa3._jax_fa3: the handlers as capsules, and what the build can do.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <set>

#include "cuda/fwd/plan.h"
#include "ffi/fwd.h"

namespace nb = nanobind;

namespace jax_fa3 {
namespace {

nb::dict registrations() {
  nb::dict targets;
  targets["jax_fa3_fwd_v1"] = nb::capsule(reinterpret_cast<void*>(&jax_fa3_fwd_v1));
  return targets;
}

std::vector<int> supported_head_dims() {
  std::set<int> dims;
  for (const NamedFwdConfig& named : kFwdConfigs) dims.insert(named.config.head_dim);
  return {dims.begin(), dims.end()};
}

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (const NamedFwdConfig& named : kFwdConfigs) names.emplace_back(named.name);
  return names;
}

Problem problem(const std::string& dtype, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                int64_t heads_q, int64_t heads_k, int64_t head_dim, bool is_causal,
                const std::string& config) {
  if (dtype != name(DType::kBF16) && dtype != name(DType::kF16)) {
    throw nb::value_error(("dtype is " + dtype + ", expected bfloat16 or float16").c_str());
  }
  Problem p;
  p.dtype = dtype == name(DType::kBF16) ? DType::kBF16 : DType::kF16;
  p.batch = p.batch_q = p.batch_k = p.batch_v = batch;
  p.seqlen_q = seqlen_q;
  p.seqlen_k = seqlen_k;
  p.heads_q = heads_q;
  p.heads_k = heads_k;
  p.head_dim = head_dim;
  p.mask = is_causal ? MaskKind::kCausal : MaskKind::kFull;
  if (!config.empty()) {
    p.config = find_fwd_config(config);
    if (p.config < 0)
      throw nb::value_error(("config is " + config + ", expected a kernel").c_str());
  }
  return p;
}

// Throws ValueError for a problem without a plan.
std::string describe_plan(const std::string& dtype, int64_t batch, int64_t seqlen_q,
                          int64_t seqlen_k, int64_t heads_q, int64_t heads_k, int64_t head_dim,
                          bool is_causal, const std::string& config) {
  const Problem p =
      problem(dtype, batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, is_causal, config);
  FwdPlan plan;
  const Status status = plan_fwd(p, Device{}, plan);
  if (!status.ok()) throw nb::value_error(status.message.c_str());
  return describe(p, plan);
}

int64_t workspace_bytes(const std::string& dtype, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                        int64_t heads_q, int64_t heads_k, int64_t head_dim, bool is_causal,
                        const std::string& config) {
  return fwd_workspace_bytes(
      problem(dtype, batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, is_causal, config));
}

// As cudaDriverGetVersion counts (13000 for CUDA 13.0); 0 without a driver.
int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace

NB_MODULE(_jax_fa3, m) {
  using nb::literals::operator""_a;
  m.def("registrations", &registrations);
  m.def("supported_head_dims", &supported_head_dims);
  m.def("kernels", &kernels);
  m.def("describe_plan", &describe_plan, "dtype"_a, "batch"_a, "seqlen_q"_a, "seqlen_k"_a,
        "heads_q"_a, "heads_k"_a, "head_dim"_a, "is_causal"_a, "config"_a = "");
  m.def("fwd_workspace_bytes", &workspace_bytes, "dtype"_a, "batch"_a, "seqlen_q"_a, "seqlen_k"_a,
        "heads_q"_a, "heads_k"_a, "head_dim"_a, "is_causal"_a, "config"_a = "");
  m.def("driver_version", &driver_version);
  m.def("cuda_version", [] { return CUDART_VERSION; });
  m.def("ffi_api_version",
        [] { return std::pair<int, int>(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
}

}  // namespace jax_fa3
