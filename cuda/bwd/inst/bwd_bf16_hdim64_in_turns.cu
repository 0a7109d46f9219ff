#include "cuda/bwd/launch.cuh"

namespace jax_fa3 {

JAX_FA3_INSTANTIATE_BWD(BwdBf16Hdim64FullInTurns)
JAX_FA3_INSTANTIATE_BWD(BwdBf16Hdim64CausalInTurns)

}  // namespace jax_fa3
