// The tile configurations of the forward kernel. Plain C++: the planner, the tests and the kernels
// read the same constants.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/core/types.h"

namespace jax_fa3 {

// How tiles reach the CTAs.
//   kStatic   every CTA takes each gridDim-th tile, head by head. Right where tiles cost the same.
//   kDynamic  a global counter, longest tiles first inside groups of heads that share L2. Decides
//             causal speed: a static longest-first order gives CTA 0 the longest tile every wave.
enum class Schedule { kStatic, kDynamic };

struct FwdConfig {
  DType dtype;
  int head_dim;  // of query, key and value
  MaskKind mask;
  int consumer_warpgroups;  // 64 query rows each
  int tile_n;               // keys a stage
  int stages;               // depth of the key ring and of the value ring
  bool overlap;             // the next block's scores are issued before this block's P V
  bool pingpong;            // warpgroups take turns at issuing matrix products
  Softmax softmax;
  Schedule schedule;
  bool split_tail;  // what does not fill a wave of CTAs is cut along the keys (split.h)

  static constexpr int kElementBytes = 2;
  static constexpr int kMaxSmemBytes = 227 * 1024;  // a CTA on sm_90, CUDA C++ guide, table 30

  constexpr int tile_m() const { return 64 * consumer_warpgroups; }
  constexpr int threads() const { return 128 * (consumer_warpgroups + 1); }
  constexpr int consumer_warps() const { return 4 * consumer_warpgroups; }

  constexpr int q_bytes() const { return 64 * head_dim * kElementBytes; }  // one warpgroup's
  constexpr int kv_bytes() const { return tile_n * head_dim * kElementBytes; }
  // Tiles, then barriers: query full and empty a warpgroup, key and value full and empty a stage,
  // the tile queue and the redo list; rounded up to its alignment. launch.cuh asserts that it is
  // sizeof(FwdSmem).
  constexpr int smem_bytes() const {
    const int tiles = consumer_warpgroups * q_bytes() + 2 * stages * kv_bytes();
    const int barriers = 8 * (2 * consumer_warpgroups + 4 * stages) + 40 + 16;
    return (tiles + barriers + 1023) / 1024 * 1024;
  }

  // What one warpgroup leaves of a piece of a tile: 128 threads, each with its outputs and the
  // state of its two rows.
  constexpr int partial_bytes() const { return 4 * 128 * (head_dim / 2 + 4); }

  // setmaxnreg: multiples of 8. The sum over warpgroups must stay within what the CTA got at
  // launch, threads() times the cap that __launch_bounds__ implies.
  constexpr int producer_registers() const { return consumer_warpgroups <= 2 ? 40 : 32; }
  constexpr int consumer_registers() const {
    return consumer_warpgroups <= 2 ? 232 : (consumer_warpgroups == 3 ? 160 : 112);
  }
  // Scores, packed probabilities and output of one lane. Beyond the limits ptxas reports
  // "insufficient register resources" and serializes every wgmma (136 fails at 160, 92 at 112).
  constexpr int accumulator_registers() const { return tile_n / 2 + tile_n / 4 + head_dim / 2; }
  constexpr int accumulator_limit() const {
    return consumer_warpgroups <= 2 ? 208 : (consumer_warpgroups == 3 ? 128 : 80);
  }

  constexpr bool fits() const {
    return smem_bytes() <= kMaxSmemBytes && accumulator_registers() <= accumulator_limit() &&
           (softmax != Softmax::kLazy || overlap) && tile_n % 16 == 0 && head_dim % 64 == 0 &&
           stages >= 2 &&
           (!split_tail || (mask == MaskKind::kFull && schedule == Schedule::kStatic)) &&
           128 * (producer_registers() + consumer_warpgroups * consumer_registers()) <=
               65536 / threads() / 8 * 8 * threads();
  }
};

// Three warpgroups of 64 rows with small key blocks rather than two with large ones: products with
// P in registers block their warp while the next scores are computed, so what keeps the tensor
// cores busy is other warpgroups, not overlap inside one.
template <DType kDType>
struct FwdHdim64Full {
  static constexpr FwdConfig value{.dtype = kDType,
                                   .head_dim = 64,
                                   .mask = MaskKind::kFull,
                                   .consumer_warpgroups = 4,
                                   .tile_n = 64,
                                   .stages = 4,
                                   .overlap = true,
                                   .pingpong = false,
                                   .softmax = Softmax::kLazy,
                                   .schedule = Schedule::kStatic,
                                   .split_tail = true};
};
template <DType kDType>
struct FwdHdim64Causal {
  static constexpr FwdConfig value{.dtype = kDType,
                                   .head_dim = 64,
                                   .mask = MaskKind::kCausal,
                                   .consumer_warpgroups = 4,
                                   .tile_n = 64,
                                   .stages = 4,
                                   .overlap = true,
                                   .pingpong = false,
                                   .softmax = Softmax::kLazy,
                                   .schedule = Schedule::kDynamic,
                                   .split_tail = false};
};
template <DType kDType>
struct FwdHdim128Full {
  static constexpr FwdConfig value{.dtype = kDType,
                                   .head_dim = 128,
                                   .mask = MaskKind::kFull,
                                   .consumer_warpgroups = 3,
                                   .tile_n = 64,
                                   .stages = 5,
                                   .overlap = true,
                                   .pingpong = false,
                                   .softmax = Softmax::kLazy,
                                   .schedule = Schedule::kStatic,
                                   .split_tail = true};
};
template <DType kDType>
struct FwdHdim128Causal {
  static constexpr FwdConfig value{.dtype = kDType,
                                   .head_dim = 128,
                                   .mask = MaskKind::kCausal,
                                   .consumer_warpgroups = 3,
                                   .tile_n = 64,
                                   .stages = 5,
                                   .overlap = true,
                                   .pingpong = false,
                                   .softmax = Softmax::kLazy,
                                   .schedule = Schedule::kDynamic,
                                   .split_tail = false};
};
// 128 output accumulators a lane leave room for two warpgroups only.
template <DType kDType>
struct FwdHdim256Full {
  static constexpr FwdConfig value{.dtype = kDType,
                                   .head_dim = 256,
                                   .mask = MaskKind::kFull,
                                   .consumer_warpgroups = 2,
                                   .tile_n = 80,
                                   .stages = 2,
                                   .overlap = true,
                                   .pingpong = false,
                                   .softmax = Softmax::kLazy,
                                   .schedule = Schedule::kStatic,
                                   .split_tail = true};
};
template <DType kDType>
struct FwdHdim256Causal {
  static constexpr FwdConfig value{.dtype = kDType,
                                   .head_dim = 256,
                                   .mask = MaskKind::kCausal,
                                   .consumer_warpgroups = 2,
                                   .tile_n = 80,
                                   .stages = 2,
                                   .overlap = true,
                                   .pingpong = false,
                                   .softmax = Softmax::kLazy,
                                   .schedule = Schedule::kDynamic,
                                   .split_tail = false};
};

// The names a profiler prints.
struct FwdBf16Hdim64Full : FwdHdim64Full<DType::kBF16> {};
struct FwdBf16Hdim64Causal : FwdHdim64Causal<DType::kBF16> {};
struct FwdBf16Hdim128Full : FwdHdim128Full<DType::kBF16> {};
struct FwdBf16Hdim128Causal : FwdHdim128Causal<DType::kBF16> {};
struct FwdBf16Hdim256Full : FwdHdim256Full<DType::kBF16> {};
struct FwdBf16Hdim256Causal : FwdHdim256Causal<DType::kBF16> {};
struct FwdF16Hdim64Full : FwdHdim64Full<DType::kF16> {};
struct FwdF16Hdim64Causal : FwdHdim64Causal<DType::kF16> {};
struct FwdF16Hdim128Full : FwdHdim128Full<DType::kF16> {};
struct FwdF16Hdim128Causal : FwdHdim128Causal<DType::kF16> {};
struct FwdF16Hdim256Full : FwdHdim256Full<DType::kF16> {};
struct FwdF16Hdim256Causal : FwdHdim256Causal<DType::kF16> {};

struct NamedFwdConfig {
  const char* name;
  FwdConfig config;
};

// The one list. plan.cc searches it, launch.cu turns an index into a kernel, tests walk it.
#define JAX_FA3_FWD_CONFIGS(X) \
  X(FwdBf16Hdim64Full)         \
  X(FwdBf16Hdim64Causal)       \
  X(FwdBf16Hdim128Full)        \
  X(FwdBf16Hdim128Causal)      \
  X(FwdBf16Hdim256Full)        \
  X(FwdBf16Hdim256Causal)      \
  X(FwdF16Hdim64Full)          \
  X(FwdF16Hdim64Causal)        \
  X(FwdF16Hdim128Full)         \
  X(FwdF16Hdim128Causal)       \
  X(FwdF16Hdim256Full)         \
  X(FwdF16Hdim256Causal)

// Variants to measure, not to ship: only in a build with JAX_FA3_ABLATION=ON. They follow the
// others, so that the plan never chooses one; a benchmark names it.
#ifndef JAX_FA3_ABLATION
#define JAX_FA3_FWD_VARIANTS(X)
#else
}  // namespace jax_fa3
#include "cuda/fwd/ablation/variants.h"
namespace jax_fa3 {
#endif

#define JAX_FA3_NAMED(config) NamedFwdConfig{#config, config::value},
inline constexpr NamedFwdConfig kFwdConfigs[] = {JAX_FA3_FWD_CONFIGS(JAX_FA3_NAMED)
                                                     JAX_FA3_FWD_VARIANTS(JAX_FA3_NAMED)};
#undef JAX_FA3_NAMED
inline constexpr size_t kFwdConfigCount = sizeof(kFwdConfigs) / sizeof(kFwdConfigs[0]);

#define JAX_FA3_FITS(config) \
  static_assert(config::value.fits(), #config ": does not fit a multiprocessor");
JAX_FA3_FWD_CONFIGS(JAX_FA3_FITS)
#undef JAX_FA3_FITS

}  // namespace jax_fa3
