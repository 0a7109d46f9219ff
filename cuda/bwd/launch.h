// From a plan and device pointers to the kernels of a backward pass on a stream. Nothing is
// allocated or synchronised: a pass can be captured into a CUDA graph.
#pragma once

#include <cstdint>

#include "cuda/bwd/plan.h"
#include "cuda/core/problem.h"
#include "cuda/core/status.h"

struct CUstream_st;

namespace jax_fa3 {

struct BwdBuffers {
  const void* query;            // [batch_q, seqlen_q, heads_q, head_dim]
  const void* key;              // [batch_k, seqlen_k, heads_k, head_dim]
  const void* value;            // [batch_v, seqlen_k, heads_k, head_dim]
  const void* out;              // [batch, seqlen_q, heads_q, head_dim]
  const float* lse;             // [batch, heads_q, seqlen_q], natural log
  const void* dout;             // as out
  const float* dlse;            // as lse
  const int32_t* query_offset;  // [batch], or null
  void* dq;                     // [batch, seqlen_q, heads_q, head_dim]
  void* dk;                     // [batch, seqlen_k, heads_k, head_dim]
  void* dv;                     // likewise
  void* workspace;              // bwd_workspace_bytes
};

Status launch_bwd(const Problem& problem, const BwdPlan& plan, const BwdBuffers& buffers,
                  CUstream_st* stream);

}  // namespace jax_fa3
