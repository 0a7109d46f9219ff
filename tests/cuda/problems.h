// Problems for the tests. Plain C++.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/core/problem.h"

namespace jax_fa3 {

inline Problem problem(DType dtype, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                       int64_t heads_q, int64_t heads_k, int64_t head_dim, MaskKind mask) {
  Problem p;
  p.dtype = dtype;
  p.batch = p.batch_q = p.batch_k = p.batch_v = batch;
  p.batch_map.size[0] = static_cast<int32_t>(batch);
  p.seqlen_q = seqlen_q;
  p.seqlen_k = seqlen_k;
  p.heads_q = heads_q;
  p.heads_k = heads_k;
  p.head_dim = head_dim;
  p.mask = mask;
  p.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  return p;
}
// bfloat16, as many keys as queries, a key head for each query head.
inline Problem problem(int64_t batch, int64_t seqlen, int64_t heads, int64_t head_dim,
                       MaskKind mask) {
  return problem(DType::kBF16, batch, seqlen, seqlen, heads, heads, head_dim, mask);
}

}  // namespace jax_fa3
