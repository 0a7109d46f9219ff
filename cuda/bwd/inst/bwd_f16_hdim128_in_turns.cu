#include "cuda/bwd/launch.cuh"

namespace jax_fa3 {

JAX_FA3_INSTANTIATE_BWD(BwdF16Hdim128FullInTurns)
JAX_FA3_INSTANTIATE_BWD(BwdF16Hdim128CausalInTurns)

}  // namespace jax_fa3
