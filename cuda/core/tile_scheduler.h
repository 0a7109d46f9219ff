// The extent of a launch in tiles, as host and device see it.
#pragma once

#include <cstdint>

namespace jax_fa3 {

struct TileGrid {
  uint32_t tiles;  // m_tiles * heads * batch
  int32_t m_tiles;
  int32_t heads;
  int32_t
      heads_in_flight;  // longest-first order: (head, batch) pairs whose keys and values share L2
};

}  // namespace jax_fa3
