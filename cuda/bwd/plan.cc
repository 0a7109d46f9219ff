#include "cuda/bwd/plan.h"

#include <algorithm>
#include <sstream>

#include "cuda/core/named_configs.h"

namespace jax_fa3 {

int find_bwd_config(const std::string& name) { return find_config(kBwdConfigs, name); }

Status plan_bwd(const Problem& problem, const Device& /*device*/, BwdPlan& plan) {
  if (Status status = check_problem(problem); !status.ok()) return status;
  const NamedBwdConfig* found = nullptr;
  const auto first = [](const BwdConfig&, const BwdConfig&) { return false; };
  if (Status status =
          choose_config(kBwdConfigs, kBwdConfigCount, "backward", problem, first, found);
      !status.ok()) {
    return status;
  }
  plan = BwdPlan{};
  plan.config_index = found - kBwdConfigs;
  plan.padded_q = static_cast<int32_t>(ceil_div<int64_t>(problem.seqlen_q, BwdConfig::kPaddedRows) *
                                       BwdConfig::kPaddedRows);

  const int64_t n_tiles = ceil_div<int64_t>(problem.seqlen_k, found->config.tile_n());
  const int64_t pairs = problem.batch * problem.heads_k;
  const int64_t blocks = plan.padded_q / BwdConfig::kBlockRows;
  constexpr int64_t kMaxCtas = (int64_t{1} << 31) - 1;
  if ((pairs > 0 && n_tiles > kMaxCtas / pairs) ||
      (problem.batch * problem.heads_q > 0 &&
       blocks > kMaxCtas / 4 / (problem.batch * problem.heads_q))) {
    return Status::unimplemented("more than 2^31 tiles: " + describe(problem));
  }
  const int64_t group = problem.heads_k > 0 ? problem.heads_q / problem.heads_k : 1;
  // What a pair keeps in the L2 while its key tiles are worked on: query, dout and dQ's accumulator
  // of its group of query heads.
  const int64_t pair_bytes = std::max<int64_t>(
      1, group * plan.padded_q * problem.head_dim * (2 * BwdConfig::kElementBytes + 4));
  const int64_t in_flight =
      std::clamp<int64_t>(kSharedL2Bytes / pair_bytes, 1, std::max<int64_t>(1, pairs));
  plan.grid = {static_cast<uint32_t>(n_tiles * pairs), static_cast<int32_t>(n_tiles),
               static_cast<int32_t>(problem.heads_k), static_cast<int32_t>(in_flight)};
  return {};
}

BwdWorkspace::BwdWorkspace(const Problem& problem, const BwdPlan& plan) {
  const int64_t rows = problem.batch * problem.heads_q * plan.padded_q;
  lse_log2 = 0;
  delta = lse_log2 + 4 * rows;
  dq_accumulator = delta + 4 * rows;
  bytes = dq_accumulator + 4 * rows * problem.head_dim;
}

int64_t bwd_workspace_bytes(const Problem& problem) {
  BwdPlan plan;
  if (!plan_bwd(problem, Device{}, plan).ok()) return 0;  // the launch will say why
  return BwdWorkspace(problem, plan).bytes;
}

std::string describe(const Problem& problem, const BwdPlan& plan) {
  const BwdConfig& c = plan.named().config;
  std::ostringstream text;
  text << plan.named().name << ": " << c.tile_n() << " keys x " << c.tile_m << " queries a step, "
       << c.stages << " stages, " << c.key_warpgroups << " key warpgroups (" << c.key_registers()
       << " registers); " << plan.grid.tiles << " CTAs of " << c.threads() << " threads, "
       << c.smem_bytes() / 1024 << " KiB shared; " << describe(problem);
  return text.str();
}

}  // namespace jax_fa3
