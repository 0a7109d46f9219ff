#include "cuda/bwd/launch.cuh"

namespace jax_fa3 {

JAX_FA3_INSTANTIATE_BWD(BwdBf16Hdim64Full)
JAX_FA3_INSTANTIATE_BWD(BwdBf16Hdim64Causal)

}  // namespace jax_fa3
