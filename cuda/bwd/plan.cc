#include "cuda/bwd/plan.h"

#include <algorithm>
#include <sstream>

#include "cuda/core/named_configs.h"

namespace jax_fa3 {

int find_bwd_config(const std::string& name) { return find_config(kBwdConfigs, name); }

Status plan_bwd(const Problem& problem, const Device& /*device*/, BwdPlan& plan) {
  if (Status status = check_problem(problem); !status.ok()) return status;
  const NamedBwdConfig* found = nullptr;
  // A deterministic kernel where one is asked for, and elsewhere only where there is no other.
  const auto better = [&](const BwdConfig& a, const BwdConfig& b) {
    return a.deterministic() != b.deterministic() && a.deterministic() == problem.deterministic;
  };
  if (Status status =
          choose_config(kBwdConfigs, kBwdConfigCount, "backward", problem, better, found);
      !status.ok()) {
    return status;
  }
  if (problem.deterministic && !found->config.deterministic()) {
    return Status::invalid_argument(std::string("config ") + found->name +
                                    " is not deterministic, as " + describe(problem) + " is to be");
  }
  plan = BwdPlan{};
  plan.config_index = found - kBwdConfigs;
  plan.padded_q = static_cast<int32_t>(ceil_div<int64_t>(problem.seqlen_q, BwdConfig::kPaddedRows) *
                                       BwdConfig::kPaddedRows);

  const int64_t n_tiles = ceil_div<int64_t>(problem.seqlen_k, found->config.tile_n());
  const int64_t pairs = problem.batch * problem.heads_k;
  const int64_t blocks = plan.padded_q / BwdConfig::kBlockRows;
  constexpr int64_t kMaxCtas = (int64_t{1} << 31) - 1;
  if ((pairs > 0 && n_tiles > kMaxCtas / 2 / pairs) ||
      (problem.batch * problem.heads_q > 0 &&
       blocks > kMaxCtas / 4 / (problem.batch * problem.heads_q))) {
    return Status::unimplemented("more than 2^31 tiles: " + describe(problem));
  }
  const int64_t group =
      problem.heads_k > 0 ? std::max<int64_t>(1, problem.heads_q / problem.heads_k) : 1;
  // What a pair keeps in the L2 while its key tiles are worked on: query, dout and dQ's accumulator
  // of its group of query heads.
  const int64_t pair_bytes = std::max<int64_t>(
      1, group * plan.padded_q * problem.head_dim * (2 * BwdConfig::kElementBytes + 4));
  int64_t in_flight = equal_groups(pairs, kSharedL2Bytes / pair_bytes);
  if (found->config.in_turns()) {
    // The more pairs, the further apart are two key tiles of the same one, and the less do they
    // wait for each other; but where the first has added to dQ, the second had better find it in
    // the L2. Of P pairs with `steps` steps a tile it comes P * steps / 132 steps later, and in
    // each of them the P pairs touch step_bytes. Best of 1 to 64 MB (H200, seq 1024 to 8192): 4,
    // causal 8.
    const bool causal = problem.mask == MaskKind::kCausal;
    const int64_t tile_m = found->config.tile_m;
    const int64_t steps = std::max<int64_t>(1, group * plan.padded_q / tile_m / (causal ? 2 : 1));
    const int64_t step_bytes = tile_m * problem.head_dim * (2 * BwdConfig::kElementBytes + 4);
    const int64_t room = Device{}.sm_count * (int64_t{causal ? 8 : 4} << 20);
    int64_t apart = 1;
    while ((apart + 1) * (apart + 1) * steps * step_bytes <= room) ++apart;
    in_flight = equal_groups(pairs, std::max(apart, in_flight));
  }
  plan.grid = {static_cast<uint32_t>(n_tiles * pairs), static_cast<int32_t>(n_tiles),
               static_cast<int32_t>(problem.heads_k), static_cast<int32_t>(in_flight)};
  if (found->config.two_pass()) {
    const int64_t m_tiles = ceil_div<int64_t>(problem.seqlen_q, BwdConfig::kQueryRows);
    const int64_t heads = problem.batch * problem.heads_q;
    // What a head keeps in the L2 while its query tiles are worked on: its keys and values.
    const int64_t head_bytes = std::max<int64_t>(
        1, 2 * problem.seqlen_k * problem.head_dim * BwdConfig::kElementBytes / group);
    plan.query_grid = {static_cast<uint32_t>(m_tiles * heads), static_cast<int32_t>(m_tiles),
                       static_cast<int32_t>(problem.heads_q),
                       static_cast<int32_t>(equal_groups(heads, kSharedL2Bytes / head_bytes))};
    // Four products of 64 keys with a group's queries against three of 128 queries with the keys.
    plan.keys_first = 4 * found->config.tile_n() * group * problem.seqlen_q >
                      3 * BwdConfig::kQueryRows * problem.seqlen_k;
  }
  return {};
}

BwdWorkspace::BwdWorkspace(const Problem& problem, const BwdPlan& plan) {
  const int64_t rows = problem.batch * problem.heads_q * plan.padded_q;
  lse_log2 = 0;
  delta = lse_log2 + 4 * rows;
  dq_accumulator = delta + 4 * rows;
  const BwdConfig& config = plan.named().config;
  turns = dq_accumulator + (config.two_pass() ? 0 : 4 * rows * problem.head_dim);
  bytes = turns + (config.in_turns() ? 4 * rows / BwdConfig::kBlockRows : 0);
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
       << c.stages << " stages, ";
  if (c.two_pass()) {
    text << "dQ in a pass of its own by " << plan.query_grid.tiles << " CTAs of "
         << BwdConfig::kQueryRows << " queries; ";
  } else {
    text << c.key_warpgroups << " key warpgroups (" << c.key_registers() << " registers); ";
    if (c.deterministic()) text << "key tiles take turns in adding to dQ; ";
  }
  text << plan.grid.tiles << " CTAs of " << c.threads() << " threads, " << c.smem_bytes() / 1024
       << " KiB shared; " << describe(problem);
  return text.str();
}

}  // namespace jax_fa3
