// The custom call jax_fa3_fwd_v1: decode, validate, plan, launch. It allocates nothing and waits
// for nothing, so XLA may record it into a command buffer. Its operands are frozen: a change of
// meaning takes a new version in the name.
#include "ffi/fwd.h"

#include <string_view>

#include "cuda/fwd/launch.h"
#include "cuda/fwd/plan.h"
#include "ffi/problem.h"
#include "ffi/status.h"

namespace jax_fa3 {
namespace {

namespace ffi = xla::ffi;

constexpr char kTarget[] = "jax_fa3_fwd_v1";

Shape shape_of(const ffi::AnyBuffer& buffer) {
  return Shape(buffer.dimensions().begin(), buffer.dimensions().end());
}

// Reads the named attribute, or adds to `wrong` what it should have been. (XLA's own decoder would
// say only that some attribute has the wrong type.)
template <class T>
void read(const ffi::Dictionary& attributes, const char* name, const char* type, T& value,
          std::string& wrong) {
  const ffi::ErrorOr<T> got = attributes.get<T>(name);
  if (got.has_value()) {
    value = *got;
  } else {
    wrong += std::string(wrong.empty() ? "" : "; ") + "attribute " + name + ": expected " + type +
             ", " + got.error().message();
  }
}

Status read_attributes(const ffi::Dictionary& dictionary, FwdAttributes& attributes) {
  std::string wrong;
  read(dictionary, "scale", "f32", attributes.scale, wrong);
  read(dictionary, "is_causal", "i1", attributes.is_causal, wrong);
  read(dictionary, "diagonal", "i64", attributes.diagonal, wrong);
  read(dictionary, "has_query_offset", "i1", attributes.has_query_offset, wrong);
  // Benchmarks may name a configuration; a program never does.
  size_t expected = 4;
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

ffi::Error fwd(CUstream_st* stream, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
               ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> out,
               ffi::Result<ffi::AnyBuffer> lse, ffi::Result<ffi::AnyBuffer> workspace,
               ffi::Dictionary dictionary) {
  FwdAttributes attributes{};
  Status status = read_attributes(dictionary, attributes);
  if (!status.ok()) return to_ffi_error(kTarget, status);

  FwdBuffers buffers{};
  FwdShapes shapes{query.element_type(),
                   key.element_type(),
                   value.element_type(),
                   out->element_type(),
                   shape_of(query),
                   shape_of(key),
                   shape_of(value),
                   {},
                   shape_of(*out),
                   shape_of(*lse),
                   static_cast<int64_t>(workspace->size_bytes())};
  if (lse->element_type() != ffi::DataType::F32) {
    return to_ffi_error(kTarget, Status::invalid_argument("lse: expected float32"));
  }
  if (optional.size() != static_cast<size_t>(attributes.has_query_offset)) {
    return to_ffi_error(
        kTarget, Status::invalid_argument(
                     "got " + std::to_string(optional.size()) + " optional operands, expected " +
                     std::to_string(static_cast<int>(attributes.has_query_offset))));
  }
  if (attributes.has_query_offset) {
    const ffi::ErrorOr<ffi::AnyBuffer> offset = optional.get<ffi::AnyBuffer>(0);
    if (!offset.has_value()) return offset.error();
    if (offset->element_type() != ffi::DataType::S32) {
      return to_ffi_error(kTarget, Status::invalid_argument("query_offset: expected int32"));
    }
    shapes.query_offset = shape_of(*offset);
    buffers.query_offset = static_cast<const int32_t*>(offset->untyped_data());
  }

  Problem problem;
  status = fwd_problem(shapes, attributes, problem);
  if (!status.ok()) return to_ffi_error(kTarget, status);
  Device device;
  if (status = current_device(device); !status.ok()) return to_ffi_error(kTarget, status);
  FwdPlan plan;
  if (status = plan_fwd(problem, device, plan); !status.ok()) return to_ffi_error(kTarget, status);

  buffers.query = query.untyped_data();
  buffers.key = key.untyped_data();
  buffers.value = value.untyped_data();
  buffers.out = out->untyped_data();
  buffers.lse = static_cast<float*>(lse->untyped_data());
  buffers.workspace = workspace->untyped_data();
  return to_ffi_error(kTarget, launch_fwd(problem, plan, buffers, stream));
}

}  // namespace
}  // namespace jax_fa3

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_fwd_v1, jax_fa3::fwd,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<CUstream_st*>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // query
                                  .Arg<xla::ffi::AnyBuffer>()  // key
                                  .Arg<xla::ffi::AnyBuffer>()  // value
                                  .RemainingArgs()             // query_offset
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Ret<xla::ffi::AnyBuffer>()  // lse
                                  .Ret<xla::ffi::AnyBuffer>()  // workspace
                                  .Attrs(),                    // FwdAttributes
                              {xla::ffi::Traits::kCmdBufferCompatible});
