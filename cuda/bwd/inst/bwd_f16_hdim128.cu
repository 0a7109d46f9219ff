#include "cuda/bwd/launch.cuh"

namespace jax_fa3 {

JAX_FA3_INSTANTIATE_BWD(BwdF16Hdim128Full)
JAX_FA3_INSTANTIATE_BWD(BwdF16Hdim128Causal)

}  // namespace jax_fa3
