// The TMA descriptor as kernels see it: 128 opaque bytes. (CUtensorMap itself
// lives in <cuda.h>, a host header that kernel headers do not include.)
#pragma once

#include <cstdint>

namespace jax_fa3 {

struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

}  // namespace jax_fa3
