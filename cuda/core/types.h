// Words that every layer shares. Plain C++17 without standard library types
// that NVRTC lacks.
#pragma once

#include <cstdint>

namespace jax_fa3 {

enum class DType { kBF16, kF16 };

// Which scores a kernel may see.
//   kFull    every key below the key length
//   kCausal  key s of query t when s <= t + diagonal
enum class MaskKind { kFull, kCausal };

// When a block raises a row's maximum the output so far must shrink by
// exp2((old - new) * c).
//   kAlways       after every block
//   kConditional  only when some row of the warp grew by more than 2^8. Exact
//   all the same: sum and
//                 output refer to the same stale maximum. Probabilities reach
//                 2^8, harmless in bfloat16 and in float16 (65504).
enum class Rescale { kAlways, kConditional };

constexpr const char *name(DType dtype) {
  return dtype == DType::kBF16 ? "bfloat16" : "float16";
}
constexpr const char *name(MaskKind mask) {
  return mask == MaskKind::kFull ? "full" : "causal";
}

template <class Int> constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

} // namespace jax_fa3
