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
  // A producer warpgroup issues the loads and leaves its registers to the others. Off in the
  // ablation only: the consumers load for themselves (self_loading.cuh).
  bool warp_specialized;
  bool split_tail;  // what does not fill a wave of CTAs is cut along the keys (split.h)
  // Measured with every multiprocessor busy: the time of one row and key, in per cent of the first
  // configuration of this head dim and mask. The plan weighs tiles of different sizes with it.
  int relative_cost = 100;

  static constexpr int kElementBytes = 2;
  static constexpr int kMaxSmemBytes = 227 * 1024;  // a CTA on sm_90, CUDA C++ guide, table 30

  constexpr int tile_m() const { return 64 * consumer_warpgroups; }
  constexpr int threads() const { return 128 * (consumer_warpgroups + warp_specialized); }
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
           (warp_specialized
                ? 128 * (producer_registers() + consumer_warpgroups * consumer_registers()) <=
                      65536 / threads() / 8 * 8 * threads()
                : schedule == Schedule::kStatic && softmax != Softmax::kLazy);
  }
};

// A head dim and mask has one configuration that is the fastest where there is enough to do, named
// after just those, and one with tiles of fewer rows, named after their number: where the rows do
// not fill large tiles, or large tiles do not fill the multiprocessors. plan.cc chooses.
//
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
                                   .warp_specialized = true,
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
                                   .warp_specialized = true,
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
                                   .warp_specialized = true,
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
                                   .warp_specialized = true,
                                   .split_tail = false};
};
// H200, microseconds a launch, beside the three warpgroups of FwdHdim128Full: 64 x 256 (batch x
// sequence, 16 heads) 91 against 119, 32 x 512 131 against 142, 16 x 1024 241 against 252, 8 x 2048
// 430 against 421; 1 x 1024 14.8 against 19.2 with 8 heads. Its turns are worth 1 to 5 % at these
// lengths, and 128 keys as much again over 64.
template <DType kDType>
struct FwdHdim128Full128Rows {
  static constexpr FwdConfig value{.dtype = kDType,
                                   .head_dim = 128,
                                   .mask = MaskKind::kFull,
                                   .consumer_warpgroups = 2,
                                   .tile_n = 128,
                                   .stages = 3,
                                   .overlap = true,
                                   .pingpong = true,
                                   .softmax = Softmax::kLazy,
                                   .schedule = Schedule::kStatic,
                                   .warp_specialized = true,
                                   .split_tail = true,
                                   .relative_cost = 104};
};
// Microseconds beside FwdHdim128Causal: 1 x 4096 with 2 heads 48 against 63, with 8 heads 70
// against 82; 4 x 4096 with 16 heads 449 against 460, 1 x 16384 1670 against 1717. Behind it where
// 128 keys a block cost more beyond the diagonal: 32 x 512 113 against 105. Without turns, which
// lose 2 to 4 % here from 2048 keys on.
template <DType kDType>
struct FwdHdim128Causal128Rows {
  static constexpr FwdConfig value{.dtype = kDType,
                                   .head_dim = 128,
                                   .mask = MaskKind::kCausal,
                                   .consumer_warpgroups = 2,
                                   .tile_n = 128,
                                   .stages = 3,
                                   .overlap = true,
                                   .pingpong = false,
                                   .softmax = Softmax::kLazy,
                                   .schedule = Schedule::kDynamic,
                                   .warp_specialized = true,
                                   .split_tail = false,
                                   .relative_cost = 99};
};
// Microseconds beside FwdHdim64Full: 1 x 512 with 16 heads 9.1 against 12.2, 1 x 1024 with 8 heads
// 13.4 against 18.8; far behind it with all multiprocessors busy: 16 x 1024 with 32 heads 365
// against 286.
template <DType kDType>
struct FwdHdim64Full128Rows {
  static constexpr FwdConfig value{.dtype = kDType,
                                   .head_dim = 64,
                                   .mask = MaskKind::kFull,
                                   .consumer_warpgroups = 2,
                                   .tile_n = 64,
                                   .stages = 8,
                                   .overlap = true,
                                   .pingpong = false,
                                   .softmax = Softmax::kLazy,
                                   .schedule = Schedule::kStatic,
                                   .warp_specialized = true,
                                   .split_tail = true,
                                   .relative_cost = 128};
};
// Microseconds beside FwdHdim64Causal: 1 x 4096 with 2 heads 49 against 62, with 8 heads 60 against
// 63, with 16 heads 80 against 93; 4 x 4096 with 32 heads 582 against 557. Two warpgroups win 2 to
// 10 % of the smallest of these and lose as much of the others.
template <DType kDType>
struct FwdHdim64Causal192Rows {
  static constexpr FwdConfig value{.dtype = kDType,
                                   .head_dim = 64,
                                   .mask = MaskKind::kCausal,
                                   .consumer_warpgroups = 3,
                                   .tile_n = 64,
                                   .stages = 6,
                                   .overlap = true,
                                   .pingpong = false,
                                   .softmax = Softmax::kLazy,
                                   .schedule = Schedule::kDynamic,
                                   .warp_specialized = true,
                                   .split_tail = false,
                                   .relative_cost = 105};
};
// 128 output accumulators a lane leave room for two warpgroups only. Of 64 and 80 keys a stage, 64
// won 1 to 5 % at 18 of 20 shapes, both masks, 512 to 16384 keys (H200: full 2 x 8192 1496 against
// 1544 us, causal 1 x 2048 with 256 heads 946 against 981), and lost 2 % at the others.
template <DType kDType>
struct FwdHdim256Full {
  static constexpr FwdConfig value{.dtype = kDType,
                                   .head_dim = 256,
                                   .mask = MaskKind::kFull,
                                   .consumer_warpgroups = 2,
                                   .tile_n = 64,
                                   .stages = 2,
                                   .overlap = true,
                                   .pingpong = false,
                                   .softmax = Softmax::kLazy,
                                   .schedule = Schedule::kStatic,
                                   .warp_specialized = true,
                                   .split_tail = true};
};
template <DType kDType>
struct FwdHdim256Causal {
  static constexpr FwdConfig value{.dtype = kDType,
                                   .head_dim = 256,
                                   .mask = MaskKind::kCausal,
                                   .consumer_warpgroups = 2,
                                   .tile_n = 64,
                                   .stages = 2,
                                   .overlap = true,
                                   .pingpong = false,
                                   .softmax = Softmax::kLazy,
                                   .schedule = Schedule::kDynamic,
                                   .warp_specialized = true,
                                   .split_tail = false};
};

// The names a profiler prints.
struct FwdBf16Hdim64Full : FwdHdim64Full<DType::kBF16> {};
struct FwdBf16Hdim64Causal : FwdHdim64Causal<DType::kBF16> {};
struct FwdBf16Hdim128Full : FwdHdim128Full<DType::kBF16> {};
struct FwdBf16Hdim128Causal : FwdHdim128Causal<DType::kBF16> {};
struct FwdBf16Hdim256Full : FwdHdim256Full<DType::kBF16> {};
struct FwdBf16Hdim256Causal : FwdHdim256Causal<DType::kBF16> {};
struct FwdBf16Hdim64Full128Rows : FwdHdim64Full128Rows<DType::kBF16> {};
struct FwdBf16Hdim64Causal192Rows : FwdHdim64Causal192Rows<DType::kBF16> {};
struct FwdBf16Hdim128Full128Rows : FwdHdim128Full128Rows<DType::kBF16> {};
struct FwdBf16Hdim128Causal128Rows : FwdHdim128Causal128Rows<DType::kBF16> {};
struct FwdF16Hdim64Full : FwdHdim64Full<DType::kF16> {};
struct FwdF16Hdim64Causal : FwdHdim64Causal<DType::kF16> {};
struct FwdF16Hdim128Full : FwdHdim128Full<DType::kF16> {};
struct FwdF16Hdim128Causal : FwdHdim128Causal<DType::kF16> {};
struct FwdF16Hdim256Full : FwdHdim256Full<DType::kF16> {};
struct FwdF16Hdim256Causal : FwdHdim256Causal<DType::kF16> {};
struct FwdF16Hdim64Full128Rows : FwdHdim64Full128Rows<DType::kF16> {};
struct FwdF16Hdim64Causal192Rows : FwdHdim64Causal192Rows<DType::kF16> {};
struct FwdF16Hdim128Full128Rows : FwdHdim128Full128Rows<DType::kF16> {};
struct FwdF16Hdim128Causal128Rows : FwdHdim128Causal128Rows<DType::kF16> {};

struct NamedFwdConfig {
  const char* name;
  FwdConfig config;
};

// The one list. plan.cc searches it (of two that take as long, the first), launch.cu turns an index
// into a kernel, tests walk it.
#define JAX_FA3_FWD_CONFIGS(X)   \
  X(FwdBf16Hdim64Full)           \
  X(FwdBf16Hdim64Causal)         \
  X(FwdBf16Hdim128Full)          \
  X(FwdBf16Hdim128Causal)        \
  X(FwdBf16Hdim256Full)          \
  X(FwdBf16Hdim256Causal)        \
  X(FwdBf16Hdim64Full128Rows)    \
  X(FwdBf16Hdim64Causal192Rows)  \
  X(FwdBf16Hdim128Full128Rows)   \
  X(FwdBf16Hdim128Causal128Rows) \
  X(FwdF16Hdim64Full)            \
  X(FwdF16Hdim64Causal)          \
  X(FwdF16Hdim128Full)           \
  X(FwdF16Hdim128Causal)         \
  X(FwdF16Hdim256Full)           \
  X(FwdF16Hdim256Causal)         \
  X(FwdF16Hdim64Full128Rows)     \
  X(FwdF16Hdim64Causal192Rows)   \
  X(FwdF16Hdim128Full128Rows)    \
  X(FwdF16Hdim128Causal128Rows)

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
// Those that the plan chooses from; variants follow them.
#define JAX_FA3_ONE(config) +1
inline constexpr size_t kFwdShippedCount = 0 JAX_FA3_FWD_CONFIGS(JAX_FA3_ONE);
#undef JAX_FA3_ONE

#define JAX_FA3_FITS(config) \
  static_assert(config::value.fits(), #config ": does not fit a multiprocessor");
JAX_FA3_FWD_CONFIGS(JAX_FA3_FITS)
#undef JAX_FA3_FITS

}  // namespace jax_fa3
