#include "cuda/fwd/plan.h"

#include <algorithm>
#include <sstream>

#include "cuda/core/problem_rules.h"

namespace jax_fa3 {
namespace {

// Heads whose keys and values together fill about this much of the 50 MB L2 are worked on at the
// same time in the longest-first order: more would evict each other, fewer leave CTAs without work.
// 32 MB measured best of 16, 32, 50 in the prototypes (batch 2, seq 8192, head dim 128, H200).
constexpr int64_t kL2Bytes = 32 * 1024 * 1024;

// What a split costs, in keys: the time in which a CTA would have done so many more keys of a tile.
// Its time a key and the bytes of a partial output both grow with rows and head dim, so the ratio
// holds for every configuration.
constexpr int64_t kPieceKeys = 256;  // a piece: its query, its first block alone, its stores
constexpr int64_t kJoinKeys = 128;   // reading one piece back

// The redo list counts warpgroups of tiles, up to four a tile, in 32 bits.
constexpr int64_t kMaxTiles = (int64_t{1} << 29) - 1;

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

int32_t full_mask_blocks(const FwdConfig& config, const Problem& p) {
  return static_cast<int32_t>(ceil_div<int64_t>(p.seqlen_k, config.tile_n));
}

// How the last wave of tiles runs: cut along the keys into as many ranges as end soonest, or whole
// where no cut ends sooner.
TailSplit plan_split(const FwdConfig& config, uint32_t tiles, int32_t blocks, int sm_count) {
  const uint32_t sms = std::min<uint32_t>(sm_count, FwdWorkspace::kMaxCtas);
  const TailSplit whole = TailSplit::none(tiles, blocks);
  const uint32_t left = tiles % sms;
  const int64_t units = int64_t{left} * blocks;
  if (!config.split_tail || units == 0 || units >> 31 != 0) return whole;

  uint32_t best = 0;
  int64_t best_keys = int64_t{blocks} * config.tile_n;
  for (uint32_t ranges = left + 1; ranges <= std::min<int64_t>(sms, units); ++ranges) {
    const bool crossing = ranges % left != 0;  // ranges that cross from one tile into the next
    const int64_t keys = ceil_div<int64_t>(units, ranges) * config.tile_n +
                         (crossing ? 2 : 1) * kPieceKeys +
                         (ranges / left + (crossing ? 2 : 0)) * kJoinKeys;
    if (keys < best_keys) {
      best = ranges;
      best_keys = keys;
    }
  }
  if (best == 0) return whole;
  const uint32_t ctas = left == tiles ? best : sms;
  return TailSplit::cut(tiles, tiles - left, blocks, ctas, best);
}

}  // namespace

int64_t FwdWorkspace::zeroed(const FwdPlan& plan) {
  const FwdConfig& config = plan.named().config;
  if (plan.split.ranges > 0) {
    const int64_t cut = plan.grid.tiles - plan.split.whole_tiles;
    return kArrivals + 4 * cut * config.consumer_warpgroups;
  }
  return config.schedule == Schedule::kDynamic ? kTileCounter + 4 : 0;
}

int64_t FwdWorkspace::partials(const FwdPlan& plan) {
  const int64_t list = int64_t{4} * plan.grid.tiles * plan.named().config.consumer_warpgroups;
  return (kRedoNext + list + 127) / 128 * 128;
}

int64_t FwdWorkspace::bytes(const FwdPlan& plan) {
  const FwdConfig& config = plan.named().config;
  if (plan.split.ranges == 0) {
    return kRedoNext + int64_t{4} * plan.grid.tiles * config.consumer_warpgroups;
  }
  return partials(plan) + int64_t{plan.split.slot_count(plan.grid.tiles)} *
                              config.consumer_warpgroups * config.partial_bytes();
}

int find_fwd_config(const std::string& name) {
  for (size_t i = 0; i < kFwdConfigCount; ++i) {
    if (name == kFwdConfigs[i].name) return static_cast<int>(i);
  }
  return -1;
}

Status plan_fwd(const Problem& problem, const Device& device, FwdPlan& plan) {
  if (Status status = check_problem(problem); !status.ok()) return status;

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

  const auto split_on = [&](const Device& on) {
    return plan_split(found->config, plan.grid.tiles, full_mask_blocks(found->config, problem),
                      on.sm_count);
  };
  plan.split = split_on(device);
  // The workspace is sized before the device is known, for the default one. Another device leaves
  // its last wave whole where a split would need more.
  if (plan.split.slot_count(plan.grid.tiles) > split_on(Device{}).slot_count(plan.grid.tiles)) {
    plan.split = TailSplit::none(plan.grid.tiles, plan.split.tile_blocks);
  }
  if (plan.split.ranges > 0) plan.ctas = static_cast<int>(plan.split.ctas);
  return {};
}

int64_t fwd_workspace_bytes(const Problem& problem) {
  FwdPlan plan;
  if (!plan_fwd(problem, Device{}, plan).ok()) return 0;  // the launch will say why
  return FwdWorkspace::bytes(plan);
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
       << plan.grid.tiles << " tiles";
  if (plan.split.ranges > 0) {
    text << ", the last " << plan.grid.tiles - plan.split.whole_tiles << " cut into "
         << plan.split.ranges << " ranges of keys,";
  }
  text << " on " << plan.ctas << " CTAs of " << c.threads() << " threads, " << c.smem_bytes() / 1024
       << " KiB shared; " << describe(problem);
  return text.str();
}

}  // namespace jax_fa3
