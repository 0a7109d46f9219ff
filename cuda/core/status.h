// What a host function of this library returns: success, or why not. It never
// throws or aborts.
#pragma once

#include <string>
#include <utility>

namespace jax_fa3 {

enum class StatusCode { kOk, kInvalidArgument, kUnimplemented, kInternal };

struct Status {
  StatusCode code = StatusCode::kOk;
  std::string message;

  bool ok() const { return code == StatusCode::kOk; }

  static Status invalid_argument(std::string message) {
    return {StatusCode::kInvalidArgument, std::move(message)};
  }
  static Status unimplemented(std::string message) {
    return {StatusCode::kUnimplemented, std::move(message)};
  }
  static Status internal(std::string message) {
    return {StatusCode::kInternal, std::move(message)};
  }
};

}  // namespace jax_fa3
