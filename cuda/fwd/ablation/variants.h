// Configurations that exist to be measured beside the ones we ship: the FlashAttention-3 paper's
// ablation and ours. Included by cuda/fwd/config.h in a build with JAX_FA3_ABLATION=ON;
// benchmarks/ablation.py says which comparison each is for, docs/ablation.md what came out.
//
// A name is Hdim<head dim><mask> and what differs from the configuration that is shipped:
//   3w80s4        3 consumer warpgroups, 80 keys a stage, 4 stages
//   Classical, Conditional   the softmax's reference      InOrder    no overlap
//   Pingpong      warpgroups take turns                   Static     no tile counter
//   NoSplit       the last wave of tiles is not cut along the keys
#pragma once

namespace jax_fa3 {

constexpr void set_tile(FwdConfig& c, int consumer_warpgroups, int tile_n, int stages) {
  c.consumer_warpgroups = consumer_warpgroups;
  c.tile_n = tile_n;
  c.stages = stages;
}

// FlashAttention-3's own structure at head dim 128: two consumer warpgroups, the tiles of its
// tile_size.h, a maximum in every block. (Its clusters of two CTAs for full masks are left out.)
constexpr void set_flash_attention_3(FwdConfig& c, bool overlap, bool pingpong) {
  set_tile(c, 2, c.mask == MaskKind::kFull ? 176 : 128, 2);
  c.overlap = overlap;
  c.pingpong = pingpong;
  c.softmax = Softmax::kClassical;
  c.split_tail = false;
}

// A lazy reference needs the overlapped loop, so the loop without it is compared at kConditional.
constexpr void set_in_order(FwdConfig& c) {
  c.overlap = false;
  c.softmax = Softmax::kConditional;
}

// `base` with the statements `...` applied to it, as c.
#define JAX_FA3_VARIANT(name, base, ...)                \
  constexpr FwdConfig name##_config() {                 \
    FwdConfig c = base::value;                          \
    __VA_ARGS__;                                        \
    return c;                                           \
  }                                                     \
  struct name {                                         \
    static constexpr FwdConfig value = name##_config(); \
  };                                                    \
  static_assert(name::value.fits(), #name ": does not fit a multiprocessor");

// No producer; without one nobody draws tiles from a counter either.
constexpr void set_unspecialised(FwdConfig& c) {
  c.warp_specialized = false;
  c.schedule = Schedule::kStatic;
}

// The paper's table 2. The fifth, without warp specialisation, is Fa3Hdim128FullUnspecialised and
// Fa3Hdim128CausalUnspecialised.
JAX_FA3_VARIANT(Fa3Hdim128Full, FwdBf16Hdim128Full, set_flash_attention_3(c, true, true))
JAX_FA3_VARIANT(Fa3Hdim128FullOverlap, FwdBf16Hdim128Full, set_flash_attention_3(c, true, false))
JAX_FA3_VARIANT(Fa3Hdim128FullPingpong, FwdBf16Hdim128Full, set_flash_attention_3(c, false, true))
JAX_FA3_VARIANT(Fa3Hdim128FullNeither, FwdBf16Hdim128Full, set_flash_attention_3(c, false, false))
JAX_FA3_VARIANT(Fa3Hdim128Causal, FwdBf16Hdim128Causal, set_flash_attention_3(c, true, true))
JAX_FA3_VARIANT(Fa3Hdim128CausalOverlap, FwdBf16Hdim128Causal,
                set_flash_attention_3(c, true, false))
JAX_FA3_VARIANT(Fa3Hdim128CausalPingpong, FwdBf16Hdim128Causal,
                set_flash_attention_3(c, false, true))
JAX_FA3_VARIANT(Fa3Hdim128CausalNeither, FwdBf16Hdim128Causal,
                set_flash_attention_3(c, false, false))
JAX_FA3_VARIANT(Fa3Hdim128FullUnspecialised, FwdBf16Hdim128Full,
                set_flash_attention_3(c, true, true), set_unspecialised(c))
JAX_FA3_VARIANT(Fa3Hdim128CausalUnspecialised, FwdBf16Hdim128Causal,
                set_flash_attention_3(c, true, true), set_unspecialised(c))

#define JAX_FA3_FWD_VARIANTS_FA3(X) \
  X(Fa3Hdim128Full)                 \
  X(Fa3Hdim128FullOverlap)          \
  X(Fa3Hdim128FullPingpong)         \
  X(Fa3Hdim128FullNeither)          \
  X(Fa3Hdim128Causal)               \
  X(Fa3Hdim128CausalOverlap)        \
  X(Fa3Hdim128CausalPingpong)       \
  X(Fa3Hdim128CausalNeither)        \
  X(Fa3Hdim128FullUnspecialised)    \
  X(Fa3Hdim128CausalUnspecialised)

// Ours, head dim 128.
JAX_FA3_VARIANT(Hdim128Full2w128s3, FwdBf16Hdim128Full, set_tile(c, 2, 128, 3))
JAX_FA3_VARIANT(Hdim128Full2w64s6, FwdBf16Hdim128Full, set_tile(c, 2, 64, 6))
JAX_FA3_VARIANT(Hdim128Full3w80s4, FwdBf16Hdim128Full, set_tile(c, 3, 80, 4))
JAX_FA3_VARIANT(Hdim128FullPingpong, FwdBf16Hdim128Full, c.pingpong = true)
JAX_FA3_VARIANT(Hdim128FullConditional, FwdBf16Hdim128Full, c.softmax = Softmax::kConditional)
JAX_FA3_VARIANT(Hdim128FullClassical, FwdBf16Hdim128Full, c.softmax = Softmax::kClassical)
JAX_FA3_VARIANT(Hdim128FullInOrder, FwdBf16Hdim128Full, set_in_order(c))
JAX_FA3_VARIANT(Hdim128FullNoSplit, FwdBf16Hdim128Full, c.split_tail = false)
JAX_FA3_VARIANT(Hdim128Causal2w64s6, FwdBf16Hdim128Causal, set_tile(c, 2, 64, 6))
JAX_FA3_VARIANT(Hdim128Causal3w80s4, FwdBf16Hdim128Causal, set_tile(c, 3, 80, 4))
JAX_FA3_VARIANT(Hdim128CausalPingpong, FwdBf16Hdim128Causal, c.pingpong = true)
JAX_FA3_VARIANT(Hdim128CausalConditional, FwdBf16Hdim128Causal, c.softmax = Softmax::kConditional)
JAX_FA3_VARIANT(Hdim128CausalClassical, FwdBf16Hdim128Causal, c.softmax = Softmax::kClassical)
JAX_FA3_VARIANT(Hdim128CausalInOrder, FwdBf16Hdim128Causal, set_in_order(c))
JAX_FA3_VARIANT(Hdim128CausalStatic, FwdBf16Hdim128Causal, c.schedule = Schedule::kStatic)

#define JAX_FA3_FWD_VARIANTS_HDIM128_FULL(X) \
  X(Hdim128Full2w128s3)                      \
  X(Hdim128Full2w64s6)                       \
  X(Hdim128Full3w80s4)                       \
  X(Hdim128FullPingpong)                     \
  X(Hdim128FullConditional)                  \
  X(Hdim128FullClassical)                    \
  X(Hdim128FullInOrder)                      \
  X(Hdim128FullNoSplit)
#define JAX_FA3_FWD_VARIANTS_HDIM128_CAUSAL(X) \
  X(Hdim128Causal2w64s6)                       \
  X(Hdim128Causal3w80s4)                       \
  X(Hdim128CausalPingpong)                     \
  X(Hdim128CausalConditional)                  \
  X(Hdim128CausalClassical)                    \
  X(Hdim128CausalInOrder)                      \
  X(Hdim128CausalStatic)

// Ours, head dim 64.
JAX_FA3_VARIANT(Hdim64Full2w128s6, FwdBf16Hdim64Full, set_tile(c, 2, 128, 6))
JAX_FA3_VARIANT(Hdim64Full3w96s6, FwdBf16Hdim64Full, set_tile(c, 3, 96, 6))
JAX_FA3_VARIANT(Hdim64FullPingpong, FwdBf16Hdim64Full, c.pingpong = true)
JAX_FA3_VARIANT(Hdim64FullConditional, FwdBf16Hdim64Full, c.softmax = Softmax::kConditional)
JAX_FA3_VARIANT(Hdim64FullClassical, FwdBf16Hdim64Full, c.softmax = Softmax::kClassical)
JAX_FA3_VARIANT(Hdim64FullInOrder, FwdBf16Hdim64Full, set_in_order(c))
JAX_FA3_VARIANT(Hdim64FullNoSplit, FwdBf16Hdim64Full, c.split_tail = false)
JAX_FA3_VARIANT(Hdim64Causal2w128s6, FwdBf16Hdim64Causal, set_tile(c, 2, 128, 6))
JAX_FA3_VARIANT(Hdim64Causal3w96s6, FwdBf16Hdim64Causal, set_tile(c, 3, 96, 6))
JAX_FA3_VARIANT(Hdim64CausalConditional, FwdBf16Hdim64Causal, c.softmax = Softmax::kConditional)
JAX_FA3_VARIANT(Hdim64CausalClassical, FwdBf16Hdim64Causal, c.softmax = Softmax::kClassical)
JAX_FA3_VARIANT(Hdim64CausalStatic, FwdBf16Hdim64Causal, c.schedule = Schedule::kStatic)

#define JAX_FA3_FWD_VARIANTS_HDIM64(X) \
  X(Hdim64Full2w128s6)                 \
  X(Hdim64Full3w96s6)                  \
  X(Hdim64FullPingpong)                \
  X(Hdim64FullConditional)             \
  X(Hdim64FullClassical)               \
  X(Hdim64FullInOrder)                 \
  X(Hdim64FullNoSplit)                 \
  X(Hdim64Causal2w128s6)               \
  X(Hdim64Causal3w96s6)                \
  X(Hdim64CausalConditional)           \
  X(Hdim64CausalClassical)             \
  X(Hdim64CausalStatic)

// Ours, head dim 256: the output alone takes 128 registers a lane, so there is little to vary.
JAX_FA3_VARIANT(Hdim256Full2w80s2, FwdBf16Hdim256Full, set_tile(c, 2, 80, 2))
JAX_FA3_VARIANT(Hdim256FullPingpong, FwdBf16Hdim256Full, c.pingpong = true)
JAX_FA3_VARIANT(Hdim256FullConditional, FwdBf16Hdim256Full, c.softmax = Softmax::kConditional)
JAX_FA3_VARIANT(Hdim256FullClassical, FwdBf16Hdim256Full, c.softmax = Softmax::kClassical)
JAX_FA3_VARIANT(Hdim256FullInOrder, FwdBf16Hdim256Full, set_in_order(c))
JAX_FA3_VARIANT(Hdim256FullNoSplit, FwdBf16Hdim256Full, c.split_tail = false)
JAX_FA3_VARIANT(Hdim256Causal2w80s2, FwdBf16Hdim256Causal, set_tile(c, 2, 80, 2))
JAX_FA3_VARIANT(Hdim256CausalConditional, FwdBf16Hdim256Causal, c.softmax = Softmax::kConditional)
JAX_FA3_VARIANT(Hdim256CausalClassical, FwdBf16Hdim256Causal, c.softmax = Softmax::kClassical)
JAX_FA3_VARIANT(Hdim256CausalStatic, FwdBf16Hdim256Causal, c.schedule = Schedule::kStatic)

#define JAX_FA3_FWD_VARIANTS_HDIM256(X) \
  X(Hdim256Full2w80s2)                  \
  X(Hdim256FullPingpong)                \
  X(Hdim256FullConditional)             \
  X(Hdim256FullClassical)               \
  X(Hdim256FullInOrder)                 \
  X(Hdim256FullNoSplit)                 \
  X(Hdim256Causal2w80s2)                \
  X(Hdim256CausalConditional)           \
  X(Hdim256CausalClassical)             \
  X(Hdim256CausalStatic)

#undef JAX_FA3_VARIANT

#define JAX_FA3_FWD_VARIANTS(X)          \
  JAX_FA3_FWD_VARIANTS_FA3(X)            \
  JAX_FA3_FWD_VARIANTS_HDIM128_FULL(X)   \
  JAX_FA3_FWD_VARIANTS_HDIM128_CAUSAL(X) \
  JAX_FA3_FWD_VARIANTS_HDIM64(X)         \
  JAX_FA3_FWD_VARIANTS_HDIM256(X)

}  // namespace jax_fa3
