// What the handlers share in decoding a call.
#pragma once

#include "cuda/core/status.h"
#include "ffi/problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fa3 {

Tensor tensor_of(const xla::ffi::AnyBuffer& buffer);

enum class Pass { kForward, kBackward };

// The backward has one attribute more than the forward. InvalidArgument names each that is missing
// or of another type.
Status read_attributes(const xla::ffi::Dictionary& dictionary, Pass pass, Attributes& attributes);

// The optional operand query_offset, int32 [*batch], where the attributes announce it.
Status read_query_offset(const xla::ffi::RemainingArgs& optional, const Attributes& attributes,
                         Shape& shape, const int32_t*& data);

}  // namespace jax_fa3
