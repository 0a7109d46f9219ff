#include "cuda/fwd/plan.h"

#include <algorithm>
#include <sstream>

#include "cuda/core/named_configs.h"

namespace jax_fa3 {
namespace {

// Times are counted in keys: the time in which a CTA would have done so many more keys of its tile,
// every multiprocessor busy. A CTA's time a key, the bytes of its rows' results and of a partial
// output all grow with rows and head dim, so these hold for every configuration (H200, fitted to
// head dim 128, 1024 to 65536 keys, 1 to 60 tiles cut into 2 to 132 ranges).
constexpr int64_t kTileKeys = 64;    // a tile: its first and last block alone, its results
constexpr int64_t kPieceKeys = 384;  // a piece of a tile: that too, and its partial output
constexpr int64_t kJoinKeys = 64;    // reading one piece back

// The redo list counts warpgroups of tiles, up to four a tile, in 32 bits.
constexpr int64_t kMaxTiles = (int64_t{1} << 29) - 1;

// Query tiles of all heads; kMaxTiles + 1 for more than that.
int64_t tile_count(const FwdConfig& config, const Problem& p) {
  const int64_t m_tiles = ceil_div<int64_t>(p.seqlen_q, config.tile_m());
  const int64_t pairs = p.batch * p.heads_q;
  return pairs > 0 && m_tiles > kMaxTiles / pairs ? kMaxTiles + 1 : m_tiles * pairs;
}

// How a last wave of `left` tiles is done soonest: cut along the keys into `ranges`, or whole.
struct LastWave {
  uint32_t ranges = 0;  // 0: whole
  int64_t keys = 0;     // how long it takes
};
LastWave last_wave(const FwdConfig& config, int64_t left, int64_t blocks, int64_t sms) {
  if (left == 0) return {};
  LastWave best{0, blocks * config.tile_n};
  const int64_t units = left * blocks;
  if (!config.split_tail || units >> 31 != 0) return best;
  for (int64_t ranges = left + 1; ranges <= std::min(sms, units); ++ranges) {
    const bool crossing = ranges % left != 0;  // from one tile into the next: two pieces a range
    const int64_t keys = ceil_div(units, ranges) * config.tile_n + (crossing ? 2 : 1) * kPieceKeys +
                         (ranges / left + (crossing ? 2 : 0)) * kJoinKeys;
    if (keys < best.keys) best = {static_cast<uint32_t>(ranges), keys};
  }
  return best;
}

int64_t full_mask_blocks(const FwdConfig& config, const Problem& p) {
  return ceil_div<int64_t>(p.seqlen_k, config.tile_n);
}

// (Query, key) pairs of one head that see each other.
double visible_pairs(const Problem& p) {
  // Query t sees t + diagonal + 1 keys, clamped to [0, seqlen_k].
  const auto sum_below = [](double n) { return n > 0 ? n * (n + 1) / 2 : 0.0; };
  const double first = static_cast<double>(p.diagonal), last = first + p.seqlen_q;
  const double k = static_cast<double>(p.seqlen_k);
  const double unclamped = sum_below(last) - sum_below(first);
  return unclamped - (sum_below(last - k) - sum_below(first - k));
}

// How long a configuration would take, up to a factor that all those of a head dim and mask share:
// the busiest multiprocessor's rows x keys. By the problem's sizes and diagonal alone, on the
// default device, because the workspace is sized before the device is known.
double estimated_cost(const FwdConfig& config, const Problem& p) {
  const int64_t sms = Device{}.sm_count;
  const int64_t tiles = tile_count(config, p);
  if (config.mask == MaskKind::kFull) {
    // Waves of equal tiles, each as long as one: rows beyond the end of a head, and multiprocessors
    // without a tile in the last wave, cost as much as others.
    const int64_t blocks = full_mask_blocks(config, p);
    const int64_t wave = blocks * config.tile_n + kTileKeys;
    const int64_t left = tiles % sms;
    const double keys = static_cast<double>(tiles / sms * wave) +
                        (left > 0 ? last_wave(config, left, blocks, sms).keys + kTileKeys : 0);
    return keys * config.tile_m() * config.relative_cost;
  }
  // Tiles of many lengths, handed out as CTAs become free. A warpgroup stops at its own last block,
  // half a block beyond the diagonal on average. The end is ragged by about a quarter of the
  // longest tile; with few tiles that tile is all there is to wait for.
  const double seeing = std::clamp<int64_t>(p.seqlen_q + p.diagonal, 0, p.seqlen_q);
  const double total =
      static_cast<double>(p.batch * p.heads_q) * (visible_pairs(p) + seeing * config.tile_n / 2) +
      static_cast<double>(tiles) * config.tile_m() * kTileKeys;
  const double last_sees = std::clamp<int64_t>(p.seqlen_q + p.diagonal, 0, p.seqlen_k);
  const double longest = (last_sees + kTileKeys) * config.tile_m();
  return std::max(longest, total / sms + longest / 4) * config.relative_cost;
}

TailSplit plan_split(const FwdConfig& config, const Problem& p, uint32_t tiles, int sm_count) {
  const int64_t sms = std::min<int64_t>(sm_count, FwdWorkspace::kMaxCtas);
  const int32_t blocks = static_cast<int32_t>(full_mask_blocks(config, p));
  const uint32_t left = static_cast<uint32_t>(tiles % sms);
  const uint32_t ranges = last_wave(config, left, blocks, sms).ranges;
  if (ranges == 0) return TailSplit::none(tiles, blocks);
  const uint32_t ctas = left == tiles ? ranges : static_cast<uint32_t>(sms);
  return TailSplit::cut(tiles, tiles - left, blocks, ctas, ranges);
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

int find_fwd_config(const std::string& name) { return find_config(kFwdConfigs, name); }

Status plan_fwd(const Problem& problem, const Device& device, FwdPlan& plan) {
  if (Status status = check_problem(problem); !status.ok()) return status;

  const NamedFwdConfig* found = nullptr;
  const auto faster = [&](const FwdConfig& a, const FwdConfig& b) {
    return estimated_cost(a, problem) < estimated_cost(b, problem);
  };
  if (Status status =
          choose_config(kFwdConfigs, kFwdShippedCount, "forward", problem, faster, found);
      !status.ok()) {
    return status;
  }
  plan = FwdPlan{};
  plan.config_index = found - kFwdConfigs;

  const int64_t tiles = tile_count(found->config, problem);
  if (tiles > kMaxTiles) {
    return Status::unimplemented("more than 2^29 query tiles: " + describe(problem));
  }
  const int64_t m_tiles = ceil_div<int64_t>(problem.seqlen_q, found->config.tile_m());
  const int64_t pairs = problem.batch * problem.heads_q;

  const int64_t group = problem.heads_k > 0 ? problem.heads_q / problem.heads_k : 1;
  const int64_t kv_bytes =
      std::max<int64_t>(1, 2 * problem.seqlen_k * problem.head_dim * FwdConfig::kElementBytes);
  const int64_t heads_in_flight =
      equal_groups(problem.batch * problem.heads_k, kSharedL2Bytes / kv_bytes) * group;

  plan.grid = {static_cast<uint32_t>(tiles), static_cast<int32_t>(m_tiles),
               static_cast<int32_t>(problem.heads_q),
               static_cast<int32_t>(std::min(heads_in_flight, std::max<int64_t>(1, pairs)))};
  plan.ctas = static_cast<int>(std::min<int64_t>({tiles, device.sm_count, FwdWorkspace::kMaxCtas}));

  plan.split = plan_split(found->config, problem, plan.grid.tiles, device.sm_count);
  // The workspace is sized for the default device. Another one leaves its last wave whole where a
  // split would need more.
  const TailSplit sized = plan_split(found->config, problem, plan.grid.tiles, Device{}.sm_count);
  if (plan.split.slot_count(plan.grid.tiles) > sized.slot_count(plan.grid.tiles)) {
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
       << (c.warp_specialized ? std::to_string(c.consumer_registers()) + " registers"
                              : "loading for themselves")
       << ")" << (c.overlap ? ", overlap" : "") << (c.pingpong ? ", pingpong" : "")
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
