#include "ffi/call.h"

#include <string>
#include <string_view>

namespace jax_fa3 {
namespace {

// Reads the named attribute, or adds to `wrong` what it should have been. (XLA's own decoder would
// say only that some attribute has the wrong type.)
template <class T>
void read(const xla::ffi::Dictionary& attributes, const char* name, const char* type, T& value,
          std::string& wrong) {
  const xla::ffi::ErrorOr<T> got = attributes.get<T>(name);
  if (got.has_value()) {
    value = *got;
  } else {
    wrong += std::string(wrong.empty() ? "" : "; ") + "attribute " + name + ": expected " + type +
             ", " + got.error().message();
  }
}

}  // namespace

Tensor tensor_of(const xla::ffi::AnyBuffer& buffer) {
  return {buffer.element_type(), Shape(buffer.dimensions().begin(), buffer.dimensions().end())};
}

Status read_attributes(const xla::ffi::Dictionary& dictionary, Pass pass, Attributes& attributes) {
  std::string wrong;
  read(dictionary, "scale", "f32", attributes.scale, wrong);
  read(dictionary, "is_causal", "i1", attributes.is_causal, wrong);
  read(dictionary, "diagonal", "i64", attributes.diagonal, wrong);
  read(dictionary, "has_query_offset", "i1", attributes.has_query_offset, wrong);
  size_t expected = 4;
  if (pass == Pass::kBackward) {
    read(dictionary, "deterministic", "i1", attributes.deterministic, wrong);
    ++expected;
  }
  // Benchmarks may name a configuration; a program never does.
  if (dictionary.contains("config")) {
    std::string_view config;
    read(dictionary, "config", "string", config, wrong);
    attributes.config = config;
    ++expected;
  }
  if (dictionary.size() != expected) {
    wrong += std::string(wrong.empty() ? "" : "; ") + "got " + std::to_string(dictionary.size()) +
             " attributes, expected " + std::to_string(expected);
  }
  return wrong.empty() ? Status{} : Status::invalid_argument(wrong);
}

Status read_query_offset(const xla::ffi::RemainingArgs& optional, const Attributes& attributes,
                         Shape& shape, const int32_t*& data) {
  if (optional.size() != static_cast<size_t>(attributes.has_query_offset)) {
    return Status::invalid_argument("got " + std::to_string(optional.size()) +
                                    " optional operands, expected " +
                                    std::to_string(static_cast<int>(attributes.has_query_offset)));
  }
  if (!attributes.has_query_offset) return {};
  const xla::ffi::ErrorOr<xla::ffi::AnyBuffer> offset = optional.get<xla::ffi::AnyBuffer>(0);
  if (!offset.has_value()) return Status::invalid_argument(offset.error().message());
  if (offset->element_type() != xla::ffi::DataType::S32) {
    return Status::invalid_argument("query_offset: expected int32");
  }
  shape = tensor_of(*offset).shape;
  data = static_cast<const int32_t*>(offset->untyped_data());
  return {};
}

}  // namespace jax_fa3
