#include "cuda/fwd/launch.cuh"

namespace jax_fa3 {

template cudaError_t launch_config<FwdBf16Hdim256Full>(int, const FwdParams&, cudaStream_t);
template cudaError_t launch_config<FwdBf16Hdim256Causal>(int, const FwdParams&, cudaStream_t);

}  // namespace jax_fa3
