// The last wave of a static schedule, cut along the keys. Plain C++, so that a test can walk it.
//
// A persistent grid takes its tiles in waves of one a CTA; what is left over (all tiles, where
// there are fewer than CTAs) would keep some CTAs busy for a whole tile's time and others not at
// all. So the key blocks of the leftover tiles, one tile behind the other, are cut into ranges of
// equal length, one a CTA:
//
//   whole tiles          leftover tiles x key blocks, here 3 tiles on 5 CTAs
//   CTA 0: 0 5 10 ...    |----- tile 15 -----|----- tile 16 -----|----- tile 17 -----|
//   CTA 1: 1 6 11 ...    |-- CTA 0 --|-- CTA 1 --|-- CTA 2 --|-- CTA 3 --|-- CTA 4 --|
//   ...                              first piece ^^^^ second piece of CTA 1
//
// There are at least as many ranges as leftover tiles, so a range is never longer than a tile and
// has at most two pieces. Whoever finishes the last piece of a tile adds them up (split.cuh).
#pragma once

#include <cstdint>

namespace jax_fa3 {

// Key blocks [begin, end) of a tile, or nothing.
struct Piece {
  static constexpr uint32_t kNone = ~uint32_t{0};
  uint32_t tile;  // kNone: nothing to do
  int32_t begin;
  int32_t end;
};

struct TailSplit {
  uint32_t whole_tiles = 0;   // tiles [0, whole_tiles) are not cut; all of them without a split
  uint32_t items = 0;         // whole tiles, then a first and a second piece for each CTA
  int32_t tile_blocks = 0;    // key blocks of a tile, the same for all
  uint32_t ctas = 0;          // of the grid
  uint32_t ranges = 0;        // at most one a CTA; 0 without a split
  uint32_t range_blocks = 0;  // blocks of a range, and what is left over, spread evenly
  uint32_t extra_blocks = 0;

  static constexpr TailSplit none(uint32_t tiles, int32_t tile_blocks) {
    TailSplit split;
    split.whole_tiles = split.items = tiles;
    split.tile_blocks = tile_blocks;
    return split;
  }
  // Cuts all tiles from `whole_tiles` on, which are whole waves of `ctas`. Needs
  // tiles - whole_tiles <= ranges <= ctas < 2^16, and at least as many blocks in those tiles as
  // ranges, but fewer than 2^31.
  static constexpr TailSplit cut(uint32_t tiles, uint32_t whole_tiles, int32_t tile_blocks,
                                 uint32_t ctas, uint32_t ranges) {
    TailSplit split = none(whole_tiles, tile_blocks);
    const uint32_t units = (tiles - whole_tiles) * static_cast<uint32_t>(tile_blocks);
    split.items += 2 * ctas;
    split.ctas = ctas;
    split.ranges = ranges;
    split.range_blocks = units / ranges;
    split.extra_blocks = units % ranges;
    return split;
  }

  // CTA c has the items c, c + ctas, c + 2 ctas, ...
  constexpr Piece piece(uint32_t item) const {
    if (item < whole_tiles) return {item, 0, tile_blocks};
    const bool second = item - whole_tiles >= ctas;
    const uint32_t range = item - whole_tiles - (second ? ctas : 0);
    if (range >= ranges) return {Piece::kNone, 0, 0};
    const uint32_t begin = range_begin(range), end = range_begin(range + 1);
    const uint32_t t = begin / tile_blocks;
    const uint32_t border = (t + 1) * tile_blocks;
    if (!second) return piece_of(t, begin, end < border ? end : border);
    if (end <= border) return {Piece::kNone, 0, 0};
    return piece_of(t + 1, border, end);
  }

  constexpr bool cuts(const Piece& piece) const { return piece.end - piece.begin < tile_blocks; }

  // The pieces of a leftover tile lie in consecutive slots of the workspace: a slot's number is its
  // range plus its tile, which no two pieces share.
  struct Slots {
    uint32_t begin;
    uint32_t end;
  };
  constexpr Slots slots(uint32_t tile) const {
    const uint32_t t = tile - whole_tiles;
    const uint32_t first = t * tile_blocks;
    return {t + range_of(first), t + range_of(first + tile_blocks - 1) + 1};
  }
  constexpr uint32_t slot(const Piece& piece) const {
    const uint32_t t = piece.tile - whole_tiles;
    return t + range_of(t * tile_blocks + piece.begin);
  }
  constexpr uint32_t slot_count(uint32_t tiles) const {
    return ranges == 0 ? 0 : slots(tiles - 1).end;
  }

 private:
  constexpr Piece piece_of(uint32_t t, uint32_t begin, uint32_t end) const {
    const uint32_t first = t * tile_blocks;
    return {whole_tiles + t, static_cast<int32_t>(begin - first),
            static_cast<int32_t>(end - first)};
  }
  // The first unit of a range, a unit being a key block of a leftover tile: range * units / ranges,
  // so that where there are k ranges a tile none crosses into the next.
  constexpr uint32_t range_begin(uint32_t range) const {
    return range * range_blocks + range * extra_blocks / ranges;
  }
  constexpr uint32_t range_of(uint32_t unit) const {
    uint32_t range = unit / range_blocks;  // or a few less
    if (range >= ranges) range = ranges - 1;
    while (range_begin(range) > unit) --range;
    return range;
  }
};

}  // namespace jax_fa3
