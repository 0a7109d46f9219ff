// Which configuration runs a problem, on what grid. Pure: no CUDA call, no pointer, CPU-testable.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/core/device.h"
#include "cuda/core/problem.h"
#include "cuda/core/status.h"
#include "cuda/core/tile_scheduler.h"
#include "cuda/fwd/config.h"
#include "cuda/fwd/split.h"

namespace jax_fa3 {

struct FwdPlan {
  size_t config_index = 0;  // into kFwdConfigs
  TileGrid grid{};
  TailSplit split{};
  int ctas = 0;  // 0: nothing to do
  const NamedFwdConfig& named() const { return kFwdConfigs[config_index]; }
};

// Index into kFwdConfigs of the configuration with this name, -1 where there is none.
int find_fwd_config(const std::string& name);

// The plan, or why there is none.
Status plan_fwd(const Problem& problem, const Device& device, FwdPlan& plan);

// The workspace of a launch, in bytes from its start. What must be zero at launch comes first.
struct FwdWorkspace {
  static constexpr int64_t kMaxCtas = 256;      // more multiprocessors than any sm_90 device has
  static constexpr int64_t kMaxWarpgroups = 4;  // consumers of a CTA
  static constexpr int64_t kTileCounter = 0;    // uint32, zeroed for a dynamic schedule
  static constexpr int64_t kArrivals = 4;  // uint32 [tiles cut][warpgroups], zeroed for a split
  static constexpr int64_t kRedoCount = 128 + 4 * kMaxCtas * kMaxWarpgroups;  // uint32 [kMaxCtas]
  static constexpr int64_t kRedoNext = kRedoCount + 4 * kMaxCtas;  // uint32, one for 64 rows

  // Bytes from the start that must be zero: often none.
  static int64_t zeroed(const FwdPlan& plan);
  // What the pieces of cut tiles leave: behind the redo list, on a cache line.
  static int64_t partials(const FwdPlan& plan);
  static int64_t bytes(const FwdPlan& plan);
};

// Bytes of device memory that any launch of this problem needs besides its results, on any device.
int64_t fwd_workspace_bytes(const Problem& problem);

// One line for people: the configuration, its tiles and the grid.
std::string describe(const Problem& problem, const FwdPlan& plan);

}  // namespace jax_fa3
