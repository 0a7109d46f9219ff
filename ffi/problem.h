// From XLA's buffers and attributes to a Problem. Every rule on shapes stands here, once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/core/problem.h"
#include "cuda/core/status.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fa3 {

using Shape = std::vector<int64_t>;

// The forward call's shapes, as XLA hands them over. Leading dimensions are the batch; in query,
// key and value each is the output's or 1 (broadcast).
struct FwdShapes {
  xla::ffi::DataType query_dtype, key_dtype, value_dtype, out_dtype;
  Shape query;         // [*batch, seqlen_q, heads_q, head_dim]
  Shape key;           // [*batch, seqlen_k, heads_k, head_dim]
  Shape value;         // [*batch, seqlen_k, heads_k, head_dim]
  Shape query_offset;  // [*batch]; empty and unused unless has_query_offset
  Shape out;           // [*batch, seqlen_q, heads_q, head_dim]
  Shape lse;           // [*batch, heads_q, seqlen_q]
  int64_t workspace_bytes = 0;
};

struct FwdAttributes {
  float scale;
  bool is_causal;
  int64_t diagonal;
  bool has_query_offset;
  std::string config;  // name of a configuration to force; empty: the plan chooses
};

// InvalidArgument lists every mismatch at once.
Status fwd_problem(const FwdShapes& shapes, const FwdAttributes& attributes, Problem& problem);

}  // namespace jax_fa3
