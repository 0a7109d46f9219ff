// The configurations of the backward kernel. Plain C++: the planner, the tests and the kernels read
// the same constants.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/core/types.h"

namespace jax_fa3 {

// How dQ, a sum over key tiles, comes about.
//   kAnyOrder  the CTAs that make dK and dV add their keys' part in memory, as they come
//   kInTurns   likewise, but one after another: the same bits in every run
//   kOwnPass   CTAs of their own compute the scores again: seven products of queries and keys
//              instead of five, nothing added in memory, the same bits in every run. two_pass/
enum class DqSum { kAnyOrder, kInTurns, kOwnPass };

struct BwdConfig {
  DType dtype;
  int head_dim;  // of query, key and value
  MaskKind mask;
  DqSum dq_sum;
  int key_warpgroups;  // 64 keys of a CTA each
  int tile_m;          // queries a step
  int stages;          // depth of the query ring and of the dout ring
  int dscores_stages;  // depth of the ring of dS tiles between the key warpgroups and dQ's;
                       // kOwnPass: of P tiles between the warpgroups of dV and dK
  int k_stages = 0;    // kOwnPass: depth of the ring of keys of the CTAs that make dQ; they have
                       // one stage of values, which they need for one product only

  static constexpr int kElementBytes = 2;
  // Rows of a block of dQ's accumulator; what lse, delta and dQ are padded to, whatever tile_m is.
  static constexpr int kBlockRows = 64;
  static constexpr int kPaddedRows = 128;
  static constexpr int kDqColumns = 64;       // of a block of dQ
  static constexpr int kDqBuffers = 2;        // on their way from registers to memory
  static constexpr int kDqAdders = 2;         // kInTurns: threads that add a step each
  static constexpr int kQueryWarpgroups = 2;  // kOwnPass: of a CTA that makes dQ
  static constexpr int kQueryRows = 64 * kQueryWarpgroups;
  static constexpr int kLoaderRegisters = 24;
  static constexpr int kMaxSmemBytes = 227 * 1024;  // a CTA on sm_90, CUDA C++ guide, table 30

  constexpr int tile_n() const { return 64 * key_warpgroups; }
  constexpr int key_warps() const { return 4 * key_warpgroups; }
  constexpr bool two_pass() const { return dq_sum == DqSum::kOwnPass; }
  constexpr bool deterministic() const { return dq_sum != DqSum::kAnyOrder; }

  constexpr bool in_turns() const { return dq_sum == DqSum::kInTurns; }
  // Blocks of kBlockRows x kDqColumns that a step makes of dQ, and how many of a block's columns
  // one product makes. In turns a fourth warpgroup leaves registers for half of them.
  constexpr int dq_blocks() const { return tile_m / kBlockRows * (head_dim / kDqColumns); }
  constexpr int dq_product_columns() const { return in_turns() ? kDqColumns / 2 : kDqColumns; }

  // The key warpgroups, and the one that loads and makes dQ; in turns one more, that loads and
  // adds. Of two passes: two, and the one that loads.
  constexpr int threads() const {
    return 128 * ((two_pass() ? kQueryWarpgroups : key_warpgroups) + 1 + in_turns());
  }

  constexpr int kv_bytes() const { return tile_n() * head_dim * kElementBytes; }
  constexpr int q_bytes() const { return tile_m * head_dim * kElementBytes; }
  constexpr int stats_bytes() const { return tile_m * 4; }
  static constexpr int dq_bytes() { return kBlockRows * kDqColumns * 4; }
  constexpr int dscores_bytes() const { return tile_n() * tile_m * kElementBytes; }
  // launch.cuh asserts that it is sizeof(BwdSmem), or that of the larger of two_pass/work.cuh's.
  constexpr int smem_bytes() const {
    const int tiles = 2 * kv_bytes() + stages * 2 * q_bytes() + dscores_stages * dscores_bytes();
    const int stats = stages * 2 * stats_bytes();
    // Barriers: key and value; full of each stage (of two passes, empty too), full and empty of dS
    // and of dQ.
    if (!two_pass()) {
      return struct_bytes(tiles + kDqBuffers * dq_bytes(), stats,
                          2 + 2 * stages + 2 * dscores_stages + 2 * kDqAdders);
    }
    const int keys = struct_bytes(tiles, stats, 2 + 4 * stages + 2 * dscores_stages);
    const int queries = struct_bytes(2 * kQueryWarpgroups * q_bytes() + (k_stages + 1) * kv_bytes(),
                                     0, 2 * kQueryWarpgroups + 2 * (k_stages + 1));
    return keys > queries ? keys : queries;
  }
  // Bytes of tiles, bytes of lse and delta, then barriers; rounded up to the tiles' alignment.
  static constexpr int struct_bytes(int tiles, int stats, int barriers) {
    return (tiles + stats + 8 * barriers + 1023) / 1024 * 1024;
  }

  // setmaxnreg: multiples of 8. The sum over warpgroups must stay within what the CTA got at
  // launch, threads() times the cap that __launch_bounds__ implies.
  constexpr int dq_registers() const { return in_turns() ? 56 : 72; }
  constexpr int key_registers() const { return two_pass() ? 240 : 216; }

  constexpr bool fits() const {
    if (two_pass()) {
      return smem_bytes() <= kMaxSmemBytes && head_dim % 64 == 0 && key_warpgroups == 1 &&
             tile_m == 64 && stages >= 2 && dscores_stages >= 1 && k_stages >= 2 &&
             128 * (kLoaderRegisters + kQueryWarpgroups * key_registers()) <=
                 65536 / threads() / 8 * 8 * threads();
    }
    return smem_bytes() <= kMaxSmemBytes && head_dim % 64 == 0 && stages >= 2 &&
           tile_m % kBlockRows == 0 && kPaddedRows % tile_m == 0 && dscores_stages >= 1 &&
           (!in_turns() || dq_blocks() == kDqBuffers) &&
           128 * (dq_registers() + key_warpgroups * key_registers() +
                  (in_turns() ? kLoaderRegisters : 0)) <=
               65536 / threads() / 8 * 8 * threads();
  }
};

template <DType kDType, MaskKind kMask, DqSum kDqSum = DqSum::kAnyOrder>
struct BwdHdim64 {
  static constexpr BwdConfig value{.dtype = kDType,
                                   .head_dim = 64,
                                   .mask = kMask,
                                   .dq_sum = kDqSum,
                                   .key_warpgroups = 2,
                                   .tile_m = 128,
                                   .stages = 3,
                                   .dscores_stages = 1};
};
template <DType kDType, MaskKind kMask, DqSum kDqSum = DqSum::kAnyOrder>
struct BwdHdim128 {
  static constexpr BwdConfig value{.dtype = kDType,
                                   .head_dim = 128,
                                   .mask = kMask,
                                   .dq_sum = kDqSum,
                                   .key_warpgroups = 2,
                                   .tile_m = 64,
                                   .stages = 3,
                                   .dscores_stages = 2};
};
template <DType kDType, MaskKind kMask>
struct BwdHdim256 {
  static constexpr BwdConfig value{.dtype = kDType,
                                   .head_dim = 256,
                                   .mask = kMask,
                                   .dq_sum = DqSum::kOwnPass,
                                   .key_warpgroups = 1,
                                   .tile_m = 64,
                                   .stages = 2,
                                   .dscores_stages = 2,
                                   .k_stages = 2};
};

// The names a profiler prints.
struct BwdBf16Hdim64Full : BwdHdim64<DType::kBF16, MaskKind::kFull> {};
struct BwdBf16Hdim64Causal : BwdHdim64<DType::kBF16, MaskKind::kCausal> {};
struct BwdBf16Hdim128Full : BwdHdim128<DType::kBF16, MaskKind::kFull> {};
struct BwdBf16Hdim128Causal : BwdHdim128<DType::kBF16, MaskKind::kCausal> {};
struct BwdBf16Hdim256Full : BwdHdim256<DType::kBF16, MaskKind::kFull> {};
struct BwdBf16Hdim256Causal : BwdHdim256<DType::kBF16, MaskKind::kCausal> {};
struct BwdBf16Hdim64FullInTurns : BwdHdim64<DType::kBF16, MaskKind::kFull, DqSum::kInTurns> {};
struct BwdBf16Hdim64CausalInTurns : BwdHdim64<DType::kBF16, MaskKind::kCausal, DqSum::kInTurns> {};
struct BwdBf16Hdim128FullInTurns : BwdHdim128<DType::kBF16, MaskKind::kFull, DqSum::kInTurns> {};
struct BwdBf16Hdim128CausalInTurns : BwdHdim128<DType::kBF16, MaskKind::kCausal, DqSum::kInTurns> {
};
struct BwdF16Hdim64Full : BwdHdim64<DType::kF16, MaskKind::kFull> {};
struct BwdF16Hdim64Causal : BwdHdim64<DType::kF16, MaskKind::kCausal> {};
struct BwdF16Hdim128Full : BwdHdim128<DType::kF16, MaskKind::kFull> {};
struct BwdF16Hdim128Causal : BwdHdim128<DType::kF16, MaskKind::kCausal> {};
struct BwdF16Hdim256Full : BwdHdim256<DType::kF16, MaskKind::kFull> {};
struct BwdF16Hdim256Causal : BwdHdim256<DType::kF16, MaskKind::kCausal> {};
struct BwdF16Hdim64FullInTurns : BwdHdim64<DType::kF16, MaskKind::kFull, DqSum::kInTurns> {};
struct BwdF16Hdim64CausalInTurns : BwdHdim64<DType::kF16, MaskKind::kCausal, DqSum::kInTurns> {};
struct BwdF16Hdim128FullInTurns : BwdHdim128<DType::kF16, MaskKind::kFull, DqSum::kInTurns> {};
struct BwdF16Hdim128CausalInTurns : BwdHdim128<DType::kF16, MaskKind::kCausal, DqSum::kInTurns> {};

struct NamedBwdConfig {
  const char* name;
  BwdConfig config;
};

// The one list. plan.cc searches it, launch.cu turns an index into a kernel, tests walk it.
#define JAX_FA3_BWD_CONFIGS(X)   \
  X(BwdBf16Hdim64Full)           \
  X(BwdBf16Hdim64Causal)         \
  X(BwdBf16Hdim128Full)          \
  X(BwdBf16Hdim128Causal)        \
  X(BwdBf16Hdim256Full)          \
  X(BwdBf16Hdim256Causal)        \
  X(BwdBf16Hdim64FullInTurns)    \
  X(BwdBf16Hdim64CausalInTurns)  \
  X(BwdBf16Hdim128FullInTurns)   \
  X(BwdBf16Hdim128CausalInTurns) \
  X(BwdF16Hdim64Full)            \
  X(BwdF16Hdim64Causal)          \
  X(BwdF16Hdim128Full)           \
  X(BwdF16Hdim128Causal)         \
  X(BwdF16Hdim256Full)           \
  X(BwdF16Hdim256Causal)         \
  X(BwdF16Hdim64FullInTurns)     \
  X(BwdF16Hdim64CausalInTurns)   \
  X(BwdF16Hdim128FullInTurns)    \
  X(BwdF16Hdim128CausalInTurns)

#define JAX_FA3_NAMED(config) NamedBwdConfig{#config, config::value},
inline constexpr NamedBwdConfig kBwdConfigs[] = {JAX_FA3_BWD_CONFIGS(JAX_FA3_NAMED)};
#undef JAX_FA3_NAMED
inline constexpr size_t kBwdConfigCount = sizeof(kBwdConfigs) / sizeof(kBwdConfigs[0]);

#define JAX_FA3_FITS(config) \
  static_assert(config::value.fits(), #config ": does not fit a multiprocessor");
JAX_FA3_BWD_CONFIGS(JAX_FA3_FITS)
#undef JAX_FA3_FITS

}  // namespace jax_fa3
