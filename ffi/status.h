// Status of cuda/ -> ffi::Error of XLA, with the text unchanged.
#pragma once

#include "cuda/core/status.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fa3 {

inline xla::ffi::Error to_ffi_error(const char* target, const Status& status) {
  if (status.ok()) return xla::ffi::Error::Success();
  const std::string message = std::string(target) + ": " + status.message;
  switch (status.code) {
    case StatusCode::kInvalidArgument:
      return xla::ffi::Error::InvalidArgument(message);
    case StatusCode::kUnimplemented:
      return xla::ffi::Error(xla::ffi::ErrorCode::kUnimplemented, message);
    default:
      return xla::ffi::Error::Internal(message);
  }
}

}  // namespace jax_fa3
