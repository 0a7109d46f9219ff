#include "cuda/fwd/launch.cuh"

namespace jax_fa3 {

template cudaError_t launch_config<FwdBf16Hdim64Full>(int, const FwdParams&, cudaStream_t);
template cudaError_t launch_config<FwdBf16Hdim64Causal>(int, const FwdParams&, cudaStream_t);
template cudaError_t launch_config<FwdBf16Hdim64Full128Rows>(int, const FwdParams&, cudaStream_t);
template cudaError_t launch_config<FwdBf16Hdim64Causal192Rows>(int, const FwdParams&, cudaStream_t);

}  // namespace jax_fa3
