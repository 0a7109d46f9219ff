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

// A buffer as XLA hands it over.
struct Tensor {
  xla::ffi::DataType dtype;
  Shape shape;
};

struct Attributes {
  float scale;
  bool is_causal;
  int64_t diagonal;
  bool has_query_offset;
  bool deterministic;  // of the backward call only
  std::string config;  // name of a configuration to force; empty: the plan chooses
};

// The calls' buffers. Leading dimensions are the batch; in query, key and value each is the
// output's or 1 (broadcast).
struct FwdShapes {
  Tensor query;        // [*batch, seqlen_q, heads_q, head_dim]
  Tensor key;          // [*batch, seqlen_k, heads_k, head_dim]
  Tensor value;        // [*batch, seqlen_k, heads_k, head_dim]
  Shape query_offset;  // [*batch]; empty and unused unless has_query_offset
  Tensor out;          // [*batch, seqlen_q, heads_q, head_dim]
  Tensor lse;          // [*batch, heads_q, seqlen_q]
  int64_t workspace_bytes = 0;
};
struct BwdShapes {
  Tensor query, key, value;
  Shape query_offset;
  Tensor out, dout, dq;  // [*batch, seqlen_q, heads_q, head_dim]
  Tensor lse, dlse;      // [*batch, heads_q, seqlen_q]
  Tensor dk, dv;         // [*batch, seqlen_k, heads_k, head_dim]
  int64_t workspace_bytes = 0;
};

// InvalidArgument lists every mismatch at once.
Status fwd_problem(const FwdShapes& shapes, const Attributes& attributes, Problem& problem);

Status bwd_problem(const BwdShapes& shapes, const Attributes& attributes, Problem& problem);

}  // namespace jax_fa3
