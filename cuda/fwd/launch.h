// From a plan and device pointers to a kernel on a stream. Nothing is allocated or synchronised:
// a launch can be captured into a CUDA graph.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/core/problem.h"
#include "cuda/core/status.h"
#include "cuda/fwd/plan.h"

struct CUstream_st;

namespace jax_fa3 {

struct FwdBuffers {
  const void* query;            // [batch_q, seqlen_q, heads_q, head_dim]
  const void* key;              // [batch_k, seqlen_k, heads_k, head_dim]
  const void* value;            // [batch_v, seqlen_k, heads_k, head_dim]
  const int32_t* query_offset;  // [batch], or null
  void* out;                    // [batch, seqlen_q, heads_q, head_dim]
  float* lse;                   // [batch, heads_q, seqlen_q]
  void* workspace;              // fwd_workspace_bytes
};

Status launch_fwd(const Problem& problem, const FwdPlan& plan, const FwdBuffers& buffers,
                  CUstream_st* stream);

}  // namespace jax_fa3
