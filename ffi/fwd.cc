// The custom call jax_fa3_fwd_v1: decode, validate, plan, launch. It allocates nothing and waits
// for nothing, so XLA may record it into a command buffer. Its operands are frozen: a change of
// meaning takes a new version in the name.
#include "ffi/fwd.h"

#include "cuda/fwd/launch.h"
#include "cuda/fwd/plan.h"
#include "ffi/call.h"
#include "ffi/problem.h"
#include "ffi/status.h"

namespace jax_fa3 {
namespace {

namespace ffi = xla::ffi;

constexpr char kTarget[] = "jax_fa3_fwd_v1";

ffi::Error fwd(CUstream_st* stream, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
               ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> out,
               ffi::Result<ffi::AnyBuffer> lse, ffi::Result<ffi::AnyBuffer> workspace,
               ffi::Dictionary dictionary) {
  Attributes attributes{};
  Status status = read_attributes(dictionary, Pass::kForward, attributes);
  if (!status.ok()) return to_ffi_error(kTarget, status);

  FwdBuffers buffers{};
  FwdShapes shapes{tensor_of(query),
                   tensor_of(key),
                   tensor_of(value),
                   {},
                   tensor_of(*out),
                   tensor_of(*lse),
                   static_cast<int64_t>(workspace->size_bytes())};
  status = read_query_offset(optional, attributes, shapes.query_offset, buffers.query_offset);
  if (!status.ok()) return to_ffi_error(kTarget, status);

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
                                  .Attrs(),                    // Attributes
                              {xla::ffi::Traits::kCmdBufferCompatible});
