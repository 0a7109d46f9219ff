// Which keys a query sees. Everything about masks that is not a register: which blocks of keys a
// range of rows visits, which of those need masking, and how many keys one row sees.
#pragma once

#include <cstdint>

#include "cuda/core/types.h"

namespace jax_fa3 {

constexpr int32_t clamp(int32_t x, int32_t low, int32_t high) {
  return x < low ? low : (x > high ? high : x);
}

// Keys [0, visible_keys) are what query `row` sees. Lengths are below 2^29 and the diagonal lies in
// [-2^29, 2^29] (check_problem; one that is read from device memory was clipped by Python, further
// than that it changes nothing), so the sum cannot overflow.
template <MaskKind kMask>
constexpr int32_t visible_keys(int32_t row, int32_t seqlen_k, int32_t diagonal) {
  return kMask == MaskKind::kCausal ? clamp(row + diagonal + 1, 0, seqlen_k) : seqlen_k;
}

// Blocks of `tile_n` keys that query rows [row_begin, row_end) visit, from the last to the first.
struct KeyBlocks {
  int32_t end;            // blocks [0, end) hold a visible key for some row
  int32_t unmasked_end;   // blocks [0, unmasked_end) are visible to every row, whole
  bool first_row_unseen;  // blocks [unmasked_end, end) exist and show the first row no key
};
template <MaskKind kMask>
constexpr KeyBlocks key_blocks(int32_t row_begin, int32_t row_end, int32_t seqlen_k,
                               int32_t diagonal, int32_t tile_n) {
  if (row_begin >= row_end) return {0, 0, false};
  const int32_t first_visible = visible_keys<kMask>(row_begin, seqlen_k, diagonal);
  const int32_t end = ceil_div(visible_keys<kMask>(row_end - 1, seqlen_k, diagonal), tile_n);
  const int32_t unmasked_end = first_visible / tile_n;
  return {end, unmasked_end, end > unmasked_end && first_visible == unmasked_end * tile_n};
}

// The first query that sees `key`; every later one sees it too. kNoQuery when none does, because
// the key lies past the end.
inline constexpr int32_t kNoQuery = INT32_MAX;
template <MaskKind kMask>
constexpr int32_t first_visible_query(int32_t key, int32_t seqlen_k, int32_t diagonal) {
  if (key >= seqlen_k) return kNoQuery;
  return kMask == MaskKind::kCausal && key > diagonal ? key - diagonal : 0;
}

// Steps of `tile_m` queries that keys [key_begin, key_end) visit, from the first to the last.
struct QuerySteps {
  int32_t begin, end;      // steps [begin, end) hold a query that sees a key
  int32_t unmasked_begin;  // queries of steps [unmasked_begin, end) see all of them
};
template <MaskKind kMask>
constexpr QuerySteps query_steps(int32_t key_begin, int32_t key_end, int32_t seqlen_q,
                                 int32_t seqlen_k, int32_t diagonal, int32_t tile_m) {
  const int32_t end = ceil_div(seqlen_q, tile_m);
  const int32_t first = first_visible_query<kMask>(key_begin, seqlen_k, diagonal);
  const int32_t last = first_visible_query<kMask>(key_end - 1, seqlen_k, diagonal);
  const int32_t begin = clamp(first / tile_m, 0, end);
  return {begin, end, last == kNoQuery ? end : clamp(ceil_div(last, tile_m), begin, end)};
}

}  // namespace jax_fa3
