// Words that every layer shares. Plain C++17 without standard library types that NVRTC lacks.
#pragma once

#include <cstdint>

namespace jax_fa3 {

enum class DType { kBF16, kF16 };

// Which scores a kernel may see.
//   kFull    every key below the key length
//   kCausal  key s of query t when s <= t + diagonal
enum class MaskKind { kFull, kCausal };

// What the exponentials of a row refer to. All three are exact: sum and output always refer to the
// same value, and the final division removes it.
//   kClassical    the running maximum; the output is rescaled after every block
//   kConditional  the maximum when it last grew by more than 2^8; rescaled only then. Probabilities
//                 reach 2^8, harmless in bfloat16 and in float16 (65504)
//   kLazy         the maximum of the first blocks, never raised, no maximum taken in the loop. A
//                 row whose scores later rise too far overflows; each tile checks that, and those
//                 that did are done again with kClassical at the end of the kernel
enum class Softmax { kClassical, kConditional, kLazy };

constexpr const char* name(DType dtype) { return dtype == DType::kBF16 ? "bfloat16" : "float16"; }
constexpr const char* name(MaskKind mask) { return mask == MaskKind::kFull ? "full" : "causal"; }

template <class Int>
constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

}  // namespace jax_fa3
