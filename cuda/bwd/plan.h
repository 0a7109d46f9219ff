// Which configuration runs a backward problem, on what grid. Pure: no CUDA call, no pointer,
// CPU-testable.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/bwd/config.h"
#include "cuda/bwd/params.h"
#include "cuda/core/device.h"
#include "cuda/core/problem.h"
#include "cuda/core/status.h"

namespace jax_fa3 {

struct BwdPlan {
  size_t config_index = 0;  // into kBwdConfigs
  KeyTileGrid grid{};       // the CTAs that make dK and dV
  TileGrid query_grid{};    // two passes: those that make dQ
  bool keys_first = true;
  int32_t padded_q = 0;
  const NamedBwdConfig& named() const { return kBwdConfigs[config_index]; }
};

// Index into kBwdConfigs of the configuration with this name, -1 where there is none.
int find_bwd_config(const std::string& name);

// The plan, or why there is none.
Status plan_bwd(const Problem& problem, const Device& device, BwdPlan& plan);

// The workspace of a backward pass, in bytes from its start: what the three kernels hand on.
// batch * heads_q * padded_q rows, each with two floats; of one pass also head_dim of dQ's
// accumulator and, where it is to be deterministic, a turn for every 64 rows.
struct BwdWorkspace {
  int64_t lse_log2 = 0;
  int64_t delta = 0;
  int64_t dq_accumulator = 0;
  int64_t turns = 0;
  int64_t bytes = 0;

  BwdWorkspace(const Problem& problem, const BwdPlan& plan);
};

// Bytes of device memory that any backward pass of this problem needs besides its results.
int64_t bwd_workspace_bytes(const Problem& problem);

// One line for people: the configuration, its tiles and the grid.
std::string describe(const Problem& problem, const BwdPlan& plan);

}  // namespace jax_fa3
