// The backward handler's symbol, for module.cc.
#pragma once

#include "xla/ffi/api/ffi.h"

extern "C" XLA_FFI_Error* jax_fa3_bwd_v1(XLA_FFI_CallFrame* call_frame);
