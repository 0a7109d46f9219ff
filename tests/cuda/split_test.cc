// fwd/split.h against brute force: every block of every tile once, in pieces that can be joined.
#include "cuda/fwd/split.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace jax_fa3 {
namespace {

struct Cut {
  uint32_t tiles, ctas, ranges;
  int32_t blocks;
  uint32_t whole_tiles() const { return tiles / ctas * ctas; }
  TailSplit split() const { return TailSplit::cut(tiles, whole_tiles(), blocks, ctas, ranges); }
};

// All cuts of small grids: with and without whole waves, with fewer ranges than CTAs.
std::vector<Cut> cuts() {
  std::vector<Cut> all;
  for (uint32_t ctas : {1, 2, 5, 7, 12}) {
    for (uint32_t tiles = 1; tiles <= 3 * ctas; ++tiles) {
      const uint32_t left = tiles % ctas;
      if (left == 0) continue;
      for (int32_t blocks : {1, 2, 3, 8, 13}) {
        for (uint32_t ranges = left; ranges <= std::min<uint32_t>(ctas, left * blocks); ++ranges) {
          all.push_back({tiles, ctas, ranges, blocks});
        }
      }
    }
  }
  return all;
}

// The pieces that the CTAs of a grid walk through, as the kernel does.
std::vector<std::vector<Piece>> walk(const Cut& cut) {
  const TailSplit split = cut.split();
  std::vector<std::vector<Piece>> pieces(cut.ctas);
  for (uint32_t cta = 0; cta < cut.ctas; ++cta) {
    for (uint32_t item = cta; item < split.items; item += cut.ctas) {
      const Piece piece = split.piece(item);
      if (piece.tile != Piece::kNone) pieces[cta].push_back(piece);
    }
  }
  return pieces;
}

std::string what(const Cut& cut) {
  return std::to_string(cut.tiles) + " tiles of " + std::to_string(cut.blocks) + " blocks on " +
         std::to_string(cut.ctas) + " CTAs, " + std::to_string(cut.ranges) + " ranges";
}

TEST(TailSplit, EveryBlockOfEveryTileIsDoneOnce) {
  for (const Cut& cut : cuts()) {
    std::map<std::pair<uint32_t, int32_t>, int> done;
    for (const auto& pieces : walk(cut)) {
      for (const Piece& piece : pieces) {
        ASSERT_LT(piece.begin, piece.end) << what(cut);
        for (int32_t block = piece.begin; block < piece.end; ++block) ++done[{piece.tile, block}];
      }
    }
    for (uint32_t tile = 0; tile < cut.tiles; ++tile) {
      for (int32_t block = 0; block < cut.blocks; ++block) {
        ASSERT_EQ((done[{tile, block}]), 1) << what(cut) << ": tile " << tile << " block " << block;
      }
    }
    EXPECT_EQ(done.size(), size_t{cut.tiles} * cut.blocks) << what(cut);
  }
}

TEST(TailSplit, WholeWavesThenEqualRangesOfAtMostTwoPieces) {
  for (const Cut& cut : cuts()) {
    int32_t shortest = 1 << 30, longest = 0;
    uint32_t ranges = 0;
    for (const auto& pieces : walk(cut)) {
      const size_t waves = cut.tiles / cut.ctas;
      int32_t range = 0;
      for (size_t i = 0; i < pieces.size(); ++i) {
        if (i < waves) {
          EXPECT_LT(pieces[i].tile, cut.whole_tiles());
          EXPECT_EQ(pieces[i].end - pieces[i].begin, cut.blocks);
        } else {
          EXPECT_GE(pieces[i].tile, cut.whole_tiles());
          range += pieces[i].end - pieces[i].begin;
        }
      }
      EXPECT_LE(pieces.size(), waves + 2) << what(cut);
      if (range == 0) continue;
      ++ranges;
      shortest = std::min(shortest, range);
      longest = std::max(longest, range);
    }
    EXPECT_EQ(ranges, cut.ranges) << what(cut);
    EXPECT_LE(longest - shortest, 1) << what(cut);
  }
}

TEST(TailSplit, PiecesOfATileLieInConsecutiveSlotsInTheOrderOfTheirKeys) {
  for (const Cut& cut : cuts()) {
    const TailSplit split = cut.split();
    std::map<uint32_t, std::map<int32_t, Piece>> of_tile;
    for (const auto& pieces : walk(cut)) {
      for (const Piece& piece : pieces) {
        EXPECT_EQ(split.cuts(piece), piece.end - piece.begin < cut.blocks);
        if (piece.tile >= cut.whole_tiles()) of_tile[piece.tile][piece.begin] = piece;
      }
    }
    std::set<uint32_t> taken;
    for (const auto& [tile, pieces] : of_tile) {
      const TailSplit::Slots slots = split.slots(tile);
      ASSERT_EQ(slots.end - slots.begin, pieces.size()) << what(cut);
      uint32_t slot = slots.begin;
      for (const auto& [begin, piece] : pieces) {
        EXPECT_EQ(split.slot(piece), slot++) << what(cut);
        EXPECT_TRUE(taken.insert(split.slot(piece)).second) << what(cut);
      }
    }
    EXPECT_LE(*taken.rbegin() + 1, split.slot_count(cut.tiles)) << what(cut);
    EXPECT_LE(split.slot_count(cut.tiles), cut.ranges + cut.tiles - cut.whole_tiles());
  }
}

TEST(TailSplit, ManyRangesATileDoNotCrossIntoTheNext) {
  for (const Cut& cut : cuts()) {
    const uint32_t left = cut.tiles - cut.whole_tiles();
    if (cut.ranges % left != 0) continue;
    for (const auto& pieces : walk(cut)) EXPECT_LE(pieces.size(), cut.tiles / cut.ctas + 1);
  }
}

TEST(TailSplit, WithoutACutItemsAreTiles) {
  const TailSplit split = TailSplit::none(7, 3);
  EXPECT_EQ(split.items, 7u);
  for (uint32_t tile = 0; tile < 7; ++tile) {
    const Piece piece = split.piece(tile);
    EXPECT_EQ(piece.tile, tile);
    EXPECT_EQ(piece.begin, 0);
    EXPECT_EQ(piece.end, 3);
    EXPECT_FALSE(split.cuts(piece));
  }
  EXPECT_EQ(split.slot_count(7), 0u);
}

TEST(TailSplit, TheLongestTilesStayWithin32Bits) {
  // 2^31 - 1 blocks is what plan.cc allows: 131 tiles of the longest sequence in blocks of 64.
  const int32_t blocks = (1 << 29) / 64;
  const TailSplit split = TailSplit::cut(131, 0, blocks, 132, 132);
  int64_t done = 0;
  for (uint32_t item = 0; item < split.items; ++item) {
    const Piece piece = split.piece(item);
    if (piece.tile == Piece::kNone) continue;
    EXPECT_LT(piece.tile, 131u);
    EXPECT_LT(split.slot(piece), split.slot_count(131));
    done += piece.end - piece.begin;
  }
  EXPECT_EQ(done, int64_t{131} * blocks);
}

}  // namespace
}  // namespace jax_fa3
