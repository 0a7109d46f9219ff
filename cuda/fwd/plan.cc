#include "cuda/fwd/plan.h"

#include <algorithm>
#include <sstream>

namespace jax_fa3 {
namespace {

// Row and key positions, their sums with the diagonal, and byte strides of tensor maps (< 2^40) all
// stay in range below this.
constexpr int64_t kMaxSeqlen = int64_t{1} << 29;

// Heads whose keys and values together fill about this much of the 50 MB L2 are worked on at the
// same time in the longest-first order: more would evict each other, fewer leave CTAs without work.
// 32 MB measured best of 16, 32, 50 in the prototypes (batch 2, seq 8192, head dim 128, H200).
constexpr int64_t kL2Bytes = 32 * 1024 * 1024;

// The redo list counts warpgroups of tiles, up to four a tile, in 32 bits.
constexpr int64_t kMaxTiles = (int64_t{1} << 29) - 1;

Status check(const Problem& p) {
  std::ostringstream why;
  const auto refuse = [&](const char* name, int64_t got, const std::string& wanted) {
    why << (why.tellp() > 0 ? "; " : "") << name << " is " << got << ", expected " << wanted;
  };
  if (p.batch < 0) refuse("batch", p.batch, "at least 0");
  if (p.seqlen_q < 0 || p.seqlen_q >= kMaxSeqlen) refuse("seqlen_q", p.seqlen_q, "[0, 2^29)");
  if (p.seqlen_k < 0 || p.seqlen_k >= kMaxSeqlen) refuse("seqlen_k", p.seqlen_k, "[0, 2^29)");
  if (p.heads_q < 0) refuse("heads_q", p.heads_q, "at least 0");
  if (p.heads_k <= 0 ? p.heads_q != 0 : p.heads_q % p.heads_k != 0) {
    refuse("heads_k", p.heads_k, "a divisor of heads_q = " + std::to_string(p.heads_q));
  }
  if (p.diagonal < -kMaxSeqlen || p.diagonal > kMaxSeqlen) {
    refuse("diagonal", p.diagonal, "[-2^29, 2^29]");
  }
  if (!(p.scale > 0)) {
    why << (why.tellp() > 0 ? "; " : "") << "scale is " << p.scale << ", expected above 0";
  }
  if (why.tellp() > 0) return Status::invalid_argument(why.str());
  return {};
}

bool takes(const FwdConfig& config, const Problem& p) {
  return config.dtype == p.dtype && config.head_dim == p.head_dim && config.mask == p.mask;
}

Status choose(const Problem& problem, const NamedFwdConfig*& found) {
  if (problem.config >= 0) {
    found = &kFwdConfigs[problem.config];
    if (takes(found->config, problem)) return {};
    return Status::invalid_argument(std::string("config ") + found->name + " is not for " +
                                    describe(problem));
  }
  const NamedFwdConfig* const end = kFwdConfigs + kFwdConfigCount;
  found = std::find_if(kFwdConfigs, end,
                       [&](const NamedFwdConfig& named) { return takes(named.config, problem); });
  if (found != end) return {};
  std::ostringstream why;
  why << "no forward kernel for " << name(problem.dtype) << ", head_dim " << problem.head_dim
      << ", " << name(problem.mask) << "; there are:";
  for (const NamedFwdConfig& named : kFwdConfigs) why << " " << named.name;
  return Status::unimplemented(why.str());
}

}  // namespace

int find_fwd_config(const std::string& name) {
  for (size_t i = 0; i < kFwdConfigCount; ++i) {
    if (name == kFwdConfigs[i].name) return static_cast<int>(i);
  }
  return -1;
}

Status plan_fwd(const Problem& problem, const Device& device, FwdPlan& plan) {
  if (Status status = check(problem); !status.ok()) return status;

  const NamedFwdConfig* found = nullptr;
  if (Status status = choose(problem, found); !status.ok()) return status;
  plan = FwdPlan{};
  plan.config_index = found - kFwdConfigs;

  const int64_t m_tiles = ceil_div<int64_t>(problem.seqlen_q, found->config.tile_m());
  const int64_t pairs = problem.batch * problem.heads_q;
  if (pairs > 0 && m_tiles > kMaxTiles / pairs) {
    return Status::unimplemented("more than 2^29 query tiles: " + describe(problem));
  }
  const int64_t tiles = m_tiles * pairs;

  const int64_t group = problem.heads_k > 0 ? problem.heads_q / problem.heads_k : 1;
  const int64_t kv_bytes =
      std::max<int64_t>(1, 2 * problem.seqlen_k * problem.head_dim * FwdConfig::kElementBytes);
  const int64_t heads_in_flight =
      std::clamp<int64_t>(kL2Bytes / kv_bytes, 1, std::max<int64_t>(1, pairs)) * group;

  plan.grid = {static_cast<uint32_t>(tiles), static_cast<int32_t>(m_tiles),
               static_cast<int32_t>(problem.heads_q),
               static_cast<int32_t>(std::min(heads_in_flight, std::max<int64_t>(1, pairs)))};
  plan.ctas = static_cast<int>(std::min<int64_t>({tiles, device.sm_count, FwdWorkspace::kMaxCtas}));
  return {};
}

int64_t fwd_workspace_bytes(const Problem& problem) {
  FwdPlan plan;
  if (!plan_fwd(problem, Device{}, plan).ok()) return 0;  // the launch will say why
  return FwdWorkspace::kRedoNext +
         int64_t{4} * plan.grid.tiles * plan.named().config.consumer_warpgroups;
}

std::string describe(const Problem& p) {
  std::ostringstream text;
  text << name(p.dtype) << ", batch " << p.batch << ", seqlen " << p.seqlen_q << " x " << p.seqlen_k
       << ", heads " << p.heads_q << " over " << p.heads_k << ", head_dim " << p.head_dim << ", "
       << name(p.mask);
  return text.str();
}

std::string describe(const Problem& problem, const FwdPlan& plan) {
  const FwdConfig& c = plan.named().config;
  std::ostringstream text;
  text << plan.named().name << ": " << c.tile_m() << " queries x " << c.tile_n << " keys, "
       << c.stages << " stages, " << c.consumer_warpgroups << " consumer warpgroups ("
       << c.consumer_registers() << " registers)" << (c.overlap ? ", overlap" : "")
       << (c.pingpong ? ", pingpong" : "")
       << (c.softmax == Softmax::kLazy          ? ", lazy reference"
           : c.softmax == Softmax::kConditional ? ", conditional rescale"
                                                : "")
       << (c.schedule == Schedule::kDynamic ? ", dynamic schedule" : ", static schedule") << "; "
       << plan.grid.tiles << " tiles on " << plan.ctas << " CTAs of " << c.threads() << " threads, "
       << c.smem_bytes() / 1024 << " KiB shared; " << describe(problem);
  return text.str();
}

}  // namespace jax_fa3
