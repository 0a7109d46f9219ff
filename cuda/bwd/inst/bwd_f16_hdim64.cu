#include "cuda/bwd/launch.cuh"

namespace jax_fa3 {

JAX_FA3_INSTANTIATE_BWD(BwdF16Hdim64Full)
JAX_FA3_INSTANTIATE_BWD(BwdF16Hdim64Causal)

}  // namespace jax_fa3
