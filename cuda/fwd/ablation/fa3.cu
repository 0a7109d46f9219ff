// Empty in a build without variants, for tools that compile every .cu they find.
#include "cuda/fwd/launch.cuh"

#ifdef JAX_FA3_ABLATION
namespace jax_fa3 {

#define JAX_FA3_INSTANTIATE(config) \
  template cudaError_t launch_config<config>(int, const FwdParams&, cudaStream_t);
JAX_FA3_FWD_VARIANTS_FA3(JAX_FA3_INSTANTIATE)

}  // namespace jax_fa3
#endif  // JAX_FA3_ABLATION
