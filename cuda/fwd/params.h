// What one launch of the forward kernel reads and writes.
#pragma once

#include <cstdint>

#include "cuda/core/problem.h"
#include "cuda/core/tensor_map.h"
#include "cuda/core/tile_scheduler.h"
#include "cuda/fwd/split.h"

namespace jax_fa3 {

struct FwdParams {
  // Tensors [batch, seqlen, heads, head_dim] as 5-D maps {64, seqlen, head_dim / 64, heads, batch},
  // so that one box is a tile in chunks of 64 columns, which is what wgmma reads.
  TensorMap q_map;
  TensorMap k_map;
  TensorMap v_map;
  void* out;                    // [batch, seqlen_q, heads_q, head_dim], contiguous
  float* lse;                   // [batch, heads_q, seqlen_q]; natural log, -inf for a masked row
  const int32_t* query_offset;  // [batch], or null: `diagonal` holds for every row
  uint32_t* tile_counter;       // zero at launch; dynamic schedules only
  uint32_t* redo_next;          // [tiles * consumer warpgroups]: a CTA's list of rows to do again
  uint32_t* redo_count;         // [ctas]: how many there were; written, never read
  uint32_t* arrivals;           // [tiles cut * consumer warpgroups]: pieces done, zero at launch
  float* partials;              // [slots][consumer warpgroups]: what pieces leave (split.cuh)
  TileGrid grid;
  TailSplit split;
  BatchMap batch_map;
  int32_t seqlen_q;
  int32_t seqlen_k;
  int32_t group;     // query heads a key head
  int32_t diagonal;  // causal: query t sees keys s <= t + diagonal
  float scale_log2;  // scale * log2(e)
};

}  // namespace jax_fa3
