// Configurations that exist to be measured against the ones we ship: the paper's ablation and ours.
// Included by cuda/fwd/config.h in a build with JAX_FA3_ABLATION=ON.
#pragma once

namespace jax_fa3 {

constexpr FwdConfig variant(FwdConfig base, int consumer_warpgroups, int tile_n, int stages,
                            bool pingpong, Softmax softmax) {
  base.consumer_warpgroups = consumer_warpgroups;
  base.tile_n = tile_n;
  base.stages = stages;
  base.pingpong = pingpong;
  base.softmax = softmax;
  return base;
}

#define JAX_FA3_VARIANT(name, base, ...)                                  \
  struct name {                                                           \
    static constexpr FwdConfig value = variant(base::value, __VA_ARGS__); \
  };

JAX_FA3_VARIANT(Hdim128Full2w128s3, FwdBf16Hdim128Full, 2, 128, 3, false, Softmax::kLazy)
JAX_FA3_VARIANT(Hdim128Full2w128s3Pp, FwdBf16Hdim128Full, 2, 128, 3, true, Softmax::kLazy)
JAX_FA3_VARIANT(Hdim128Full2w64s6, FwdBf16Hdim128Full, 2, 64, 6, false, Softmax::kLazy)
JAX_FA3_VARIANT(Hdim128Full2w96s4, FwdBf16Hdim128Full, 2, 96, 4, false, Softmax::kLazy)
JAX_FA3_VARIANT(Hdim128Causal2w128s3, FwdBf16Hdim128Causal, 2, 128, 3, false, Softmax::kLazy)
JAX_FA3_VARIANT(Hdim128Causal2w128s3Pp, FwdBf16Hdim128Causal, 2, 128, 3, true, Softmax::kLazy)
JAX_FA3_VARIANT(Hdim128Causal2w64s6, FwdBf16Hdim128Causal, 2, 64, 6, false, Softmax::kLazy)
JAX_FA3_VARIANT(Hdim128Causal2w96s4, FwdBf16Hdim128Causal, 2, 96, 4, false, Softmax::kLazy)
JAX_FA3_VARIANT(Hdim64Full2w128s6, FwdBf16Hdim64Full, 2, 128, 6, false, Softmax::kLazy)
JAX_FA3_VARIANT(Hdim64Causal2w128s6, FwdBf16Hdim64Causal, 2, 128, 6, false, Softmax::kLazy)
JAX_FA3_VARIANT(Hdim64Causal3w64s6, FwdBf16Hdim64Causal, 3, 64, 6, false, Softmax::kLazy)
JAX_FA3_VARIANT(Hdim256Causal2w64s2, FwdBf16Hdim256Causal, 2, 64, 2, false, Softmax::kLazy)

}  // namespace jax_fa3

#define JAX_FA3_FWD_VARIANTS_HDIM64(X) \
  X(Hdim64Full2w128s6)                 \
  X(Hdim64Causal2w128s6)               \
  X(Hdim64Causal3w64s6)
#define JAX_FA3_FWD_VARIANTS_HDIM128(X) \
  X(Hdim128Full2w128s3)                 \
  X(Hdim128Full2w128s3Pp)               \
  X(Hdim128Full2w64s6)                  \
  X(Hdim128Full2w96s4)                  \
  X(Hdim128Causal2w128s3)               \
  X(Hdim128Causal2w128s3Pp)             \
  X(Hdim128Causal2w64s6)                \
  X(Hdim128Causal2w96s4)
#define JAX_FA3_FWD_VARIANTS_HDIM256(X) X(Hdim256Causal2w64s2)
#define JAX_FA3_FWD_VARIANTS(X)   \
  JAX_FA3_FWD_VARIANTS_HDIM64(X)  \
  JAX_FA3_FWD_VARIANTS_HDIM128(X) \
  JAX_FA3_FWD_VARIANTS_HDIM256(X)
