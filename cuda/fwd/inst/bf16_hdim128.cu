#include "cuda/fwd/launch.cuh"

namespace jax_fa3 {

template cudaError_t launch_config<FwdBf16Hdim128Full>(int, const FwdParams&, cudaStream_t);
template cudaError_t launch_config<FwdBf16Hdim128Causal>(int, const FwdParams&, cudaStream_t);
template cudaError_t launch_config<FwdBf16Hdim128Full128Rows>(int, const FwdParams&, cudaStream_t);
template cudaError_t launch_config<FwdBf16Hdim128Causal128Rows>(int, const FwdParams&,
                                                                cudaStream_t);

}  // namespace jax_fa3
