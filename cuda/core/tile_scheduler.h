// The tiles of a launch and the order in which they are worked on. Plain C++,
// so that a test can walk every order.
#pragma once

#include <cstdint>

namespace jax_fa3 {

struct Tile {
  int32_t m_tile;
  int32_t head;
  int32_t batch;
};

struct TileGrid {
  uint32_t tiles;  // m_tiles * heads * batch
  int32_t m_tiles;
  int32_t heads;
  // Longest-first order: how many (head, batch) pairs are in flight, sharing
  // L2.
  int32_t heads_in_flight;
};

// Query tiles of one head next to each other: they read the same keys and
// values.
struct HeadMajorOrder {
  static constexpr Tile tile(const TileGrid& grid, uint32_t index) {
    const uint32_t pair = index / grid.m_tiles;
    return {static_cast<int32_t>(index % grid.m_tiles), static_cast<int32_t>(pair % grid.heads),
            static_cast<int32_t>(pair / grid.heads)};
  }
};

// Longest tiles first, so that no CTA starts a long one when the others finish, inside groups of
// pairs (a batch row and a head) whose data fit L2 together: tile `index` is the rank-th longest of
// its pair.
struct LongestFirst {
  uint32_t pair;
  uint32_t rank;
};
constexpr LongestFirst longest_first(uint32_t tiles, uint32_t pair_tiles, uint32_t pairs_in_flight,
                                     uint32_t index) {
  const uint32_t group_tiles = pairs_in_flight * pair_tiles;
  const uint32_t first_pair = index / group_tiles * pairs_in_flight;
  const uint32_t within = index % group_tiles;
  const uint32_t left = tiles / pair_tiles - first_pair;
  const uint32_t pairs = left < pairs_in_flight ? left : pairs_in_flight;
  return {first_pair + within % pairs, within / pairs};
}

// Of query tiles the last are the longest.
struct LongestFirstOrder {
  static constexpr Tile tile(const TileGrid& grid, uint32_t index) {
    const LongestFirst at = longest_first(grid.tiles, grid.m_tiles, grid.heads_in_flight, index);
    return {grid.m_tiles - 1 - static_cast<int32_t>(at.rank),
            static_cast<int32_t>(at.pair % grid.heads), static_cast<int32_t>(at.pair / grid.heads)};
  }
};

}  // namespace jax_fa3
