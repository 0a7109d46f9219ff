// What the caller asked for, in the words of attention; no tile size, no
// pointer.
#pragma once

#include <cstdint>

#include "cuda/core/types.h"

namespace jax_fa3 {

// The batch of the output, as the product of up to kMaxLevels runs of
// dimensions, outermost first. An operand that is broadcast over a run (a vmap
// that maps only the others) has stride 0 there, so it is never copied. Strides
// count whole [seqlen, heads, head_dim] blocks.
struct BatchMap {
  static constexpr int kMaxLevels = 8;
  int32_t levels = 1;
  int32_t size[kMaxLevels] = {1};
  int32_t q_stride[kMaxLevels] = {1};
  int32_t k_stride[kMaxLevels] = {1};
  int32_t v_stride[kMaxLevels] = {1};
};

struct Problem {
  DType dtype = DType::kBF16;
  int64_t batch = 0;    // of the output; the operands' own are below
  int64_t batch_q = 0;  // blocks that query holds: batch, or less where it is broadcast
  int64_t batch_k = 0;
  int64_t batch_v = 0;
  BatchMap batch_map;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int64_t heads_q = 0;
  int64_t heads_k = 0;   // divides heads_q
  int64_t head_dim = 0;  // of query, key and value alike
  MaskKind mask = MaskKind::kFull;
  int64_t diagonal = 0;           // causal: query t sees keys s <= t + diagonal
  bool has_query_offset = false;  // the diagonal is read from device memory, one a batch row
  float scale = 1.0f;             // > 0
  bool deterministic = false;     // backward: gradients are the same bits in every run
  int config = -1;  // the plan chooses; else an index into kFwdConfigs or kBwdConfigs, for
                    // benchmarks
};

}  // namespace jax_fa3
