// What the launches of one backward pass read and write.
#pragma once

#include <cstdint>

#include "cuda/core/problem.h"
#include "cuda/core/tensor_map.h"
#include "cuda/core/tile_scheduler.h"

namespace jax_fa3 {

// Key tiles in the order in which the CTAs begin. With a causal mask the first tiles of a sequence
// are the longest, so that counting up is longest first; `pairs_in_flight` (batch row, key head)
// pairs at a time, whose query, dout and dQ share the L2.
struct KeyTileGrid {
  uint32_t tiles;  // n_tiles * heads_k * batch
  int32_t n_tiles;
  int32_t heads_k;
  int32_t pairs_in_flight;
};

// Rows of one (batch row, query head): lse, delta and dQ's accumulator are padded to
// BwdConfig::kPaddedRows, which are whole steps.
struct BwdParams {
  TensorMap q_map;  // [batch, seqlen, heads, head_dim] as encode_tiles has it
  TensorMap k_map;
  TensorMap v_map;
  TensorMap dout_map;
  const float* lse_log2;  // [batch, heads_q, padded_q]: lse * log2(e), +inf beyond seqlen_q
  const float* delta;     // [batch, heads_q, padded_q]: rowsum(dout * out) - dlse
  float* dq_accumulator;  // [batch, heads_q, padded_q / 64, head_dim / 64][64 x 64]: dq.cuh
                          // but for kOwnPass
  uint32_t* turns;        // kInTurns: [batch, heads_q, padded_q / 64], how many key tiles have
                          // added their part to a step's dQ, by its first 64 rows
  void* dq;               // [batch, seqlen_q, heads_q, head_dim]: kOwnPass only
  void* dk;               // [batch, seqlen_k, heads_k, head_dim]
  void* dv;               // likewise
  const int32_t* query_offset;  // [batch], or null: `diagonal` holds for every row
  KeyTileGrid grid;
  TileGrid query_grid;  // kOwnPass: the CTAs that make dQ
  bool keys_first;      // and whether they come after the others
  BatchMap batch_map;
  int32_t seqlen_q;
  int32_t seqlen_k;
  int32_t padded_q;  // seqlen_q rounded up to BwdConfig::kPaddedRows
  int32_t heads_q;
  int32_t group;     // query heads a key head
  int32_t diagonal;  // causal: query t sees keys s <= t + diagonal
  float scale;
  float scale_log2;  // scale * log2(e)
};

// delta.cuh: before the main kernel.
struct DeltaParams {
  const void* out;    // [batch, seqlen_q, heads_q, head_dim]
  const void* dout;   // likewise
  const float* lse;   // [batch, heads_q, seqlen_q], natural log
  const float* dlse;  // likewise
  float* lse_log2;    // as in BwdParams
  float* delta;
  float* dq_accumulator;  // zeroed, where there is one
  uint32_t* turns;        // likewise
  int32_t seqlen_q;
  int32_t padded_q;
  int32_t heads_q;
  int32_t blocks;  // padded_q / 64
};

// convert_dq.cuh: after it.
struct ConvertParams {
  const float* dq_accumulator;
  void* dq;  // [batch, seqlen_q, heads_q, head_dim]
  int32_t seqlen_q;
  int32_t heads_q;
  int32_t blocks;
  float scale;
};

}  // namespace jax_fa3
