// The Python extension jax_fa3._jax_fa3: the handlers as capsules, and what the build can do.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <set>

#include "cuda/bwd/plan.h"
#include "cuda/fwd/plan.h"
#include "ffi/bwd.h"
#include "ffi/fwd.h"

namespace nb = nanobind;

namespace jax_fa3 {
namespace {

nb::dict registrations() {
  nb::dict targets;
  targets["jax_fa3_fwd_v1"] = nb::capsule(reinterpret_cast<void*>(&jax_fa3_fwd_v1));
  targets["jax_fa3_bwd_v1"] = nb::capsule(reinterpret_cast<void*>(&jax_fa3_bwd_v1));
  return targets;
}

template <class Named, size_t kCount>
std::vector<int> head_dims(const Named (&configs)[kCount]) {
  std::set<int> dims;
  for (const Named& named : configs) dims.insert(named.config.head_dim);
  return {dims.begin(), dims.end()};
}

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (const NamedFwdConfig& named : kFwdConfigs) names.emplace_back(named.name);
  for (const NamedBwdConfig& named : kBwdConfigs) names.emplace_back(named.name);
  return names;
}

// The two passes as Python asks for them.
struct Fwd {
  using Plan = FwdPlan;
  static constexpr auto& kFind = find_fwd_config;
  static constexpr auto& kPlan = plan_fwd;
  static constexpr auto& kWorkspaceBytes = fwd_workspace_bytes;
};
struct Bwd {
  using Plan = BwdPlan;
  static constexpr auto& kFind = find_bwd_config;
  static constexpr auto& kPlan = plan_bwd;
  static constexpr auto& kWorkspaceBytes = bwd_workspace_bytes;
};

template <class Pass>
Problem problem(const std::string& dtype, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                int64_t heads_q, int64_t heads_k, int64_t head_dim, bool is_causal,
                const std::string& config, int64_t diagonal, bool deterministic) {
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
  p.diagonal = diagonal;
  p.deterministic = deterministic;
  if (!config.empty()) {
    p.config = Pass::kFind(config);
    if (p.config < 0)
      throw nb::value_error(("config is " + config + ", expected a kernel").c_str());
  }
  return p;
}

// Throws ValueError for a problem without a plan.
template <class Pass>
std::string describe_plan(const Problem& p) {
  typename Pass::Plan plan;
  const Status status = Pass::kPlan(p, Device{}, plan);
  if (!status.ok()) throw nb::value_error(status.message.c_str());
  return describe(p, plan);
}
template <class Pass>
int64_t workspace_bytes(const Problem& p) {
  return Pass::kWorkspaceBytes(p);
}

// A function of the problem that the arguments describe.
template <auto kFunction>
auto of_fwd(const std::string& dtype, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
            int64_t heads_q, int64_t heads_k, int64_t head_dim, bool is_causal,
            const std::string& config, int64_t diagonal) {
  return kFunction(problem<Fwd>(dtype, batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim,
                                is_causal, config, diagonal, false));
}
template <auto kFunction>
auto of_bwd(const std::string& dtype, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
            int64_t heads_q, int64_t heads_k, int64_t head_dim, bool is_causal,
            const std::string& config, bool deterministic) {
  return kFunction(problem<Bwd>(dtype, batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim,
                                is_causal, config, 0, deterministic));
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
  m.def("supported_head_dims", [] { return head_dims(kFwdConfigs); });
  m.def("bwd_head_dims", [] { return head_dims(kBwdConfigs); });
  m.def("kernels", &kernels);
  const auto def = [&](const char* name, auto function, const auto&... more) {
    m.def(name, function, "dtype"_a, "batch"_a, "seqlen_q"_a, "seqlen_k"_a, "heads_q"_a,
          "heads_k"_a, "head_dim"_a, "is_causal"_a, "config"_a = "", more...);
  };
  const auto diagonal = "diagonal"_a = 0;
  def("describe_plan", &of_fwd<&describe_plan<Fwd>>, diagonal);
  def("fwd_workspace_bytes", &of_fwd<&workspace_bytes<Fwd>>, diagonal);
  const auto deterministic = "deterministic"_a = false;
  def("describe_bwd_plan", &of_bwd<&describe_plan<Bwd>>, deterministic);
  def("bwd_workspace_bytes", &of_bwd<&workspace_bytes<Bwd>>, deterministic);
  m.def("driver_version", &driver_version);
  m.def("cuda_version", [] { return CUDART_VERSION; });
  m.def("ffi_api_version",
        [] { return std::pair<int, int>(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
}

}  // namespace jax_fa3
