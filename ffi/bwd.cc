// The custom call jax_fa3_bwd_v1: decode, validate, plan, launch the kernels. It allocates
// nothing and waits for nothing, so XLA may record it into a command buffer. Its operands are
// frozen: a change of meaning takes a new version in the name.
#include "ffi/bwd.h"

#include "cuda/bwd/launch.h"
#include "cuda/bwd/plan.h"
#include "cuda/core/device.h"
#include "ffi/call.h"
#include "ffi/problem.h"
#include "ffi/status.h"

namespace jax_fa3 {
namespace {

namespace ffi = xla::ffi;

constexpr char kTarget[] = "jax_fa3_bwd_v1";

ffi::Error bwd(CUstream_st* stream, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
               ffi::AnyBuffer out, ffi::AnyBuffer lse, ffi::AnyBuffer dout, ffi::AnyBuffer dlse,
               ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> dq,
               ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv,
               ffi::Result<ffi::AnyBuffer> workspace, ffi::Dictionary dictionary) {
  Attributes attributes{};
  Status status = read_attributes(dictionary, Pass::kBackward, attributes);
  if (!status.ok()) return to_ffi_error(kTarget, status);

  BwdShapes shapes{};
  shapes.query = tensor_of(query);
  shapes.key = tensor_of(key);
  shapes.value = tensor_of(value);
  shapes.out = tensor_of(out);
  shapes.lse = tensor_of(lse);
  shapes.dout = tensor_of(dout);
  shapes.dlse = tensor_of(dlse);
  shapes.dq = tensor_of(*dq);
  shapes.dk = tensor_of(*dk);
  shapes.dv = tensor_of(*dv);
  shapes.workspace_bytes = static_cast<int64_t>(workspace->size_bytes());
  BwdBuffers buffers{};
  status = read_query_offset(optional, attributes, shapes.query_offset, buffers.query_offset);
  if (!status.ok()) return to_ffi_error(kTarget, status);

  Problem problem;
  status = bwd_problem(shapes, attributes, problem);
  if (!status.ok()) return to_ffi_error(kTarget, status);
  Device device;
  if (status = current_device(device); !status.ok()) return to_ffi_error(kTarget, status);
  BwdPlan plan;
  if (status = plan_bwd(problem, device, plan); !status.ok()) return to_ffi_error(kTarget, status);

  buffers.query = query.untyped_data();
  buffers.key = key.untyped_data();
  buffers.value = value.untyped_data();
  buffers.out = out.untyped_data();
  buffers.lse = static_cast<const float*>(lse.untyped_data());
  buffers.dout = dout.untyped_data();
  buffers.dlse = static_cast<const float*>(dlse.untyped_data());
  buffers.dq = dq->untyped_data();
  buffers.dk = dk->untyped_data();
  buffers.dv = dv->untyped_data();
  buffers.workspace = workspace->untyped_data();
  return to_ffi_error(kTarget, launch_bwd(problem, plan, buffers, stream));
}

}  // namespace
}  // namespace jax_fa3

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_bwd_v1, jax_fa3::bwd,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<CUstream_st*>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // query
                                  .Arg<xla::ffi::AnyBuffer>()  // key
                                  .Arg<xla::ffi::AnyBuffer>()  // value
                                  .Arg<xla::ffi::AnyBuffer>()  // out
                                  .Arg<xla::ffi::AnyBuffer>()  // lse
                                  .Arg<xla::ffi::AnyBuffer>()  // dout
                                  .Arg<xla::ffi::AnyBuffer>()  // dlse
                                  .RemainingArgs()             // query_offset
                                  .Ret<xla::ffi::AnyBuffer>()  // dq
                                  .Ret<xla::ffi::AnyBuffer>()  // dk
                                  .Ret<xla::ffi::AnyBuffer>()  // dv
                                  .Ret<xla::ffi::AnyBuffer>()  // workspace
                                  .Attrs(),                    // Attributes
                              {xla::ffi::Traits::kCmdBufferCompatible});
