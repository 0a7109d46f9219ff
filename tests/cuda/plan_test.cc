// plan_fwd: which configuration, which grid, and what is refused in which
// words.
#include "cuda/fwd/plan.h"

#include <gtest/gtest.h>

#include <set>
#include <tuple>

#include "cuda/core/named_configs.h"
#include "tests/cuda/problems.h"

namespace jax_fa3 {
namespace {

FwdPlan planned(const Problem& p) {
  FwdPlan plan;
  const Status status = plan_fwd(p, Device{}, plan);
  EXPECT_TRUE(status.ok()) << status.message;
  return plan;
}

std::string refused(const Problem& p, StatusCode code) {
  FwdPlan plan;
  const Status status = plan_fwd(p, Device{}, plan);
  EXPECT_EQ(status.code, code) << status.message;
  return status.message;
}

TEST(Plan, EveryDtypeHeadDimAndMaskHasItsConfiguration) {
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    for (int head_dim : {64, 128, 256}) {
      for (MaskKind mask : {MaskKind::kFull, MaskKind::kCausal}) {
        Problem p = problem(2, 8192, 16, head_dim, mask);
        p.dtype = dtype;
        const FwdConfig& config = planned(p).named().config;
        EXPECT_EQ(config.dtype, dtype);
        EXPECT_EQ(config.head_dim, head_dim);
        EXPECT_EQ(config.mask, mask);
      }
    }
  }
}

TEST(Plan, AForcedConfigurationRunsOrSaysWhyNot) {
  Problem p = problem(2, 512, 16, 128, MaskKind::kFull);
  p.config = find_fwd_config("FwdBf16Hdim128Full");
  ASSERT_GE(p.config, 0);
  EXPECT_EQ(planned(p).config_index, static_cast<size_t>(p.config));
  p.config = find_fwd_config("FwdBf16Hdim128Causal");
  const std::string message = refused(p, StatusCode::kInvalidArgument);
  EXPECT_NE(message.find("config FwdBf16Hdim128Causal is not for"), std::string::npos);
  EXPECT_EQ(find_fwd_config("Nonesuch"), -1);
}

TEST(Plan, ConfigurationsFitTheirMultiprocessor) {
  for (const NamedFwdConfig& named : kFwdConfigs) EXPECT_TRUE(named.config.fits()) << named.name;
}

TEST(Plan, TilesCoverTheOutput) {
  for (int64_t seqlen : {1, 63, 64, 191, 192, 193, 3001}) {
    const FwdPlan plan = planned(problem(3, seqlen, 5, 128, MaskKind::kFull));
    const int64_t tile_m = plan.named().config.tile_m();
    EXPECT_GE(plan.grid.m_tiles * tile_m, seqlen);
    EXPECT_LT((plan.grid.m_tiles - 1) * tile_m, seqlen);
    EXPECT_EQ(plan.grid.tiles, plan.grid.m_tiles * 3 * 5);
    EXPECT_EQ(plan.ctas, std::min<int64_t>(132, plan.grid.tiles));
  }
}

std::string chosen(int64_t batch, int64_t seqlen, int64_t heads, int64_t head_dim, MaskKind mask) {
  return planned(problem(batch, seqlen, heads, head_dim, mask)).named().name;
}

// Each line as measured: see the configurations in config.h.
TEST(Plan, TilesOfFewerRowsWhereLargeOnesAreNotFilled) {
  const MaskKind full = MaskKind::kFull;
  // 512 rows fill 2.7 tiles of 192, 1024 fill 5.3, 2048 fill 10.7.
  EXPECT_EQ(chosen(32, 512, 16, 128, full), "FwdBf16Hdim128Full128Rows");
  EXPECT_EQ(chosen(16, 1024, 16, 128, full), "FwdBf16Hdim128Full128Rows");
  EXPECT_EQ(chosen(8, 2048, 16, 128, full), "FwdBf16Hdim128Full");
  EXPECT_EQ(chosen(4, 3001, 16, 128, full), "FwdBf16Hdim128Full");
  EXPECT_EQ(chosen(2, 8192, 16, 128, full), "FwdBf16Hdim128Full");
  EXPECT_EQ(chosen(1, 16384, 16, 128, full), "FwdBf16Hdim128Full");
  EXPECT_EQ(chosen(32, 128, 12, 64, full), "FwdBf16Hdim64Full128Rows");
  EXPECT_EQ(chosen(32, 512, 32, 64, full), "FwdBf16Hdim64Full");
  EXPECT_EQ(chosen(16, 1024, 32, 64, full), "FwdBf16Hdim64Full");
}

TEST(Plan, TilesOfFewerRowsWhereLargeOnesLeaveMultiprocessorsIdle) {
  const MaskKind full = MaskKind::kFull, causal = MaskKind::kCausal;
  EXPECT_EQ(chosen(1, 1024, 8, 128, full), "FwdBf16Hdim128Full128Rows");
  EXPECT_EQ(chosen(1, 4096, 2, 128, full), "FwdBf16Hdim128Full128Rows");
  EXPECT_EQ(chosen(1, 1024, 8, 64, full), "FwdBf16Hdim64Full128Rows");
  EXPECT_EQ(chosen(1, 512, 8, 128, causal), "FwdBf16Hdim128Causal128Rows");
  EXPECT_EQ(chosen(1, 4096, 2, 128, causal), "FwdBf16Hdim128Causal128Rows");
  EXPECT_EQ(chosen(1, 4096, 8, 128, causal), "FwdBf16Hdim128Causal128Rows");
  EXPECT_EQ(chosen(1, 4096, 2, 64, causal), "FwdBf16Hdim64Causal192Rows");
  EXPECT_EQ(chosen(1, 4096, 16, 64, causal), "FwdBf16Hdim64Causal192Rows");
}

TEST(Plan, CausalTilesByHowMuchLiesBeyondTheDiagonal) {
  const MaskKind causal = MaskKind::kCausal;
  EXPECT_EQ(chosen(32, 512, 16, 128, causal), "FwdBf16Hdim128Causal");
  EXPECT_EQ(chosen(8, 2048, 16, 128, causal), "FwdBf16Hdim128Causal");
  EXPECT_EQ(chosen(1, 2048, 256, 128, causal), "FwdBf16Hdim128Causal");
  EXPECT_EQ(chosen(4, 3001, 16, 128, causal), "FwdBf16Hdim128Causal128Rows");
  EXPECT_EQ(chosen(4, 4096, 16, 128, causal), "FwdBf16Hdim128Causal128Rows");
  EXPECT_EQ(chosen(1, 16384, 16, 128, causal), "FwdBf16Hdim128Causal128Rows");
  EXPECT_EQ(chosen(32, 512, 32, 64, causal), "FwdBf16Hdim64Causal");
  EXPECT_EQ(chosen(4, 4096, 32, 64, causal), "FwdBf16Hdim64Causal");
}

TEST(Plan, ChoosesOnlyWhatIsShippedAndByTheSizesAlone) {
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    for (int64_t head_dim : {64, 128, 256}) {
      for (MaskKind mask : {MaskKind::kFull, MaskKind::kCausal}) {
        for (int64_t seqlen : {1, 200, 1000, 5000, 100000}) {
          for (int64_t heads : {1, 16, 300}) {
            Problem p = problem(1, seqlen, heads, head_dim, mask);
            p.dtype = dtype;
            const size_t index = planned(p).config_index;
            EXPECT_LT(index, kFwdShippedCount);
            for (int sm_count : {1, 78, 114, 200}) {
              FwdPlan plan;
              ASSERT_TRUE(plan_fwd(p, Device{sm_count}, plan).ok());
              EXPECT_EQ(plan.config_index, index) << describe(p, plan);
            }
          }
        }
      }
    }
  }
}

TEST(Plan, TheLargestProblemsHaveAPlanToo) {
  Problem p = problem(1, (int64_t{1} << 29) - 1, 32, 64, MaskKind::kCausal);
  p.diagonal = -(int64_t{1} << 29);
  EXPECT_EQ(planned(p).ctas, 132);
  p.mask = MaskKind::kFull;
  p.diagonal = 0;
  EXPECT_EQ(planned(p).ctas, 132);
}

TEST(Plan, NothingToDoNeedsNoGrid) {
  EXPECT_EQ(planned(problem(0, 128, 4, 64, MaskKind::kFull)).ctas, 0);
  EXPECT_EQ(planned(problem(2, 0, 4, 64, MaskKind::kCausal)).ctas, 0);
  EXPECT_EQ(planned(problem(2, 128, 0, 64, MaskKind::kCausal)).ctas, 0);
}

TEST(Plan, QueriesWithoutKeysStillGetTheirZeros) {
  Problem p = problem(2, 128, 4, 64, MaskKind::kFull);
  p.seqlen_k = 0;
  EXPECT_GT(planned(p).ctas, 0);
}

TEST(Plan, MoreHeadsThanAGridDimensionIsFine) {
  const FwdPlan plan = planned(problem(1024, 64, 256, 64, MaskKind::kCausal));
  EXPECT_EQ(plan.grid.tiles, 1024u * 256);
  EXPECT_EQ(plan.ctas, 132);
}

TEST(Plan, HeadsInFlightFitTheL2) {
  // 8192 keys and values of 128 x 2 bytes are 4 MB a head: 8 heads in 32 MB.
  EXPECT_EQ(planned(problem(2, 8192, 16, 128, MaskKind::kCausal)).grid.heads_in_flight, 8);
  // Never none, never more than there are.
  EXPECT_EQ(planned(problem(1, 1 << 20, 4, 128, MaskKind::kCausal)).grid.heads_in_flight, 1);
  EXPECT_EQ(planned(problem(2, 128, 4, 128, MaskKind::kCausal)).grid.heads_in_flight, 8);
  // Query heads that share a key head count once.
  Problem gqa = problem(2, 8192, 32, 128, MaskKind::kCausal);
  gqa.heads_k = 8;
  EXPECT_EQ(planned(gqa).grid.heads_in_flight, 32);
}

TEST(Plan, RefusalsNameTheFieldTheValueAndTheWish) {
  Problem p = problem(2, 128, 6, 128, MaskKind::kFull);
  p.heads_k = 4;
  p.seqlen_k = int64_t{1} << 29;
  p.scale = -1;
  const std::string message = refused(p, StatusCode::kInvalidArgument);
  EXPECT_NE(message.find("heads_k is 4, expected a divisor of heads_q = 6"), std::string::npos);
  EXPECT_NE(message.find("seqlen_k is 536870912"), std::string::npos);
  EXPECT_NE(message.find("scale is -1"), std::string::npos);
}

TEST(Plan, AMissingHeadDimListsWhatThereIs) {
  const std::string message =
      refused(problem(2, 128, 4, 96, MaskKind::kFull), StatusCode::kUnimplemented);
  EXPECT_NE(message.find("head_dim 96"), std::string::npos);
  EXPECT_NE(message.find("FwdBf16Hdim128Full"), std::string::npos);
}

TEST(Plan, MoreTilesThanTheCounterHoldsAreRefused) {
  refused(problem(1 << 20, 192 * 64, 64, 64, MaskKind::kCausal), StatusCode::kUnimplemented);
}

TEST(Plan, TheWorkspaceHoldsOneWordForEvery64Rows) {
  const Problem p = problem(2, 8192, 16, 128, MaskKind::kCausal);
  const FwdPlan plan = planned(p);
  EXPECT_EQ(
      fwd_workspace_bytes(p),
      FwdWorkspace::kRedoNext + 4 * plan.grid.tiles * plan.named().config.consumer_warpgroups);
  EXPECT_LT(fwd_workspace_bytes(p), 2 * 16 * 8192 * 4 / 32);  // a small part of lse
}

// 43 tiles of 192 rows a head: 1376 tiles are ten waves of 132 and 56 tiles.
TEST(Plan, WhatDoesNotFillAWaveIsCutAlongTheKeys) {
  const FwdPlan plan = planned(problem(2, 8192, 16, 128, MaskKind::kFull));
  EXPECT_EQ(plan.split.whole_tiles, 10u * 132);
  EXPECT_GT(plan.split.ranges, 112u);
  EXPECT_EQ(plan.ctas, 132);
  // Few tiles: every multiprocessor gets a piece.
  const FwdPlan few = planned(problem(1, 4096, 2, 128, MaskKind::kFull));
  EXPECT_LT(few.grid.tiles, 66u);
  EXPECT_EQ(few.split.whole_tiles, 0u);
  EXPECT_GT(few.ctas, 120);
}

TEST(Plan, ACutMustPay) {
  // The tiles fill their waves.
  EXPECT_EQ(planned(problem(1, 64 * 192, 132, 128, MaskKind::kFull)).split.ranges, 0u);
  // Joining the pieces would take longer than doing so few keys.
  EXPECT_EQ(planned(problem(32, 512, 16, 128, MaskKind::kFull)).split.ranges, 0u);
  EXPECT_EQ(planned(problem(1, 512, 4, 64, MaskKind::kFull)).split.ranges, 0u);
  // Almost a whole wave is left.
  EXPECT_EQ(planned(problem(1, 192 * 131, 1, 128, MaskKind::kFull)).split.ranges, 0u);
  // Causal tiles are of unequal length and handed out by a counter.
  EXPECT_EQ(planned(problem(2, 8192, 16, 128, MaskKind::kCausal)).split.ranges, 0u);
}

TEST(Plan, OneTileIsNotCutIntoTooManyPieces) {
  Problem p = problem(1, 1, 1, 128, MaskKind::kFull);
  p.seqlen_k = 1 << 16;
  const FwdPlan plan = planned(p);
  EXPECT_GT(plan.split.ranges, 8u);
  EXPECT_LT(plan.split.ranges, 64u);  // one warpgroup reads them all back
  EXPECT_EQ(plan.ctas, static_cast<int>(plan.split.ranges));
}

TEST(Plan, TheWorkspaceHoldsThePiecesOnAnyDevice) {
  for (MaskKind mask : {MaskKind::kFull, MaskKind::kCausal}) {
    for (int64_t heads : {1, 2, 7, 16, 33, 64}) {
      for (int64_t seqlen : {100, 1000, 2048, 5000, 16384}) {
        for (int64_t head_dim : {64, 128, 256}) {
          const Problem p = problem(1, seqlen, heads, head_dim, mask);
          const int64_t bytes = fwd_workspace_bytes(p);
          for (int sm_count : {1, 20, 78, 114, 132, 144, 300}) {
            FwdPlan plan;
            ASSERT_TRUE(plan_fwd(p, Device{sm_count}, plan).ok());
            EXPECT_LE(FwdWorkspace::bytes(plan), bytes) << describe(p, plan);
            EXPECT_LE(plan.ctas, sm_count);
            EXPECT_LE(FwdWorkspace::zeroed(plan), FwdWorkspace::kRedoCount);
            // Zeroing is a launch of its own: only counters cost it.
            EXPECT_EQ(FwdWorkspace::zeroed(plan) > 0,
                      mask == MaskKind::kCausal || plan.split.ranges > 0);
          }
        }
      }
    }
  }
}

TEST(Plan, TheDescriptionNamesConfigurationAndProblem) {
  const Problem p = problem(2, 8192, 16, 128, MaskKind::kCausal);
  const std::string text = describe(p, planned(p));
  EXPECT_NE(text.find("FwdBf16Hdim128Causal"), std::string::npos);
  EXPECT_NE(text.find("batch 2"), std::string::npos);
  const Problem full = problem(2, 8192, 16, 128, MaskKind::kFull);
  EXPECT_NE(describe(full, planned(full)).find("the last 56 cut into"), std::string::npos);
}

template <class Order>
void expect_every_tile_once(const TileGrid& grid) {
  std::set<std::tuple<int, int, int>> seen;
  for (uint32_t index = 0; index < grid.tiles; ++index) {
    const Tile tile = Order::tile(grid, index);
    EXPECT_GE(tile.m_tile, 0);
    EXPECT_LT(tile.m_tile, grid.m_tiles);
    EXPECT_LT(tile.head, grid.heads);
    EXPECT_LT(tile.batch, static_cast<int>(grid.tiles) / grid.m_tiles / grid.heads);
    EXPECT_TRUE(seen.insert({tile.m_tile, tile.head, tile.batch}).second) << index;
  }
}

TEST(TileOrder, EveryTileComesUpOnce) {
  for (int heads_in_flight : {1, 2, 3, 7, 15}) {
    const TileGrid grid{4 * 5 * 3, 4, 5, heads_in_flight};
    expect_every_tile_once<HeadMajorOrder>(grid);
    expect_every_tile_once<LongestFirstOrder>(grid);
  }
}

TEST(TileOrder, LongestTilesOfAGroupComeFirst) {
  const TileGrid grid{4 * 6, 4, 6, 3};
  for (uint32_t index = 1; index < 12; ++index) {
    EXPECT_LE(LongestFirstOrder::tile(grid, index).m_tile,
              LongestFirstOrder::tile(grid, index - 1).m_tile);
    EXPECT_LT(LongestFirstOrder::tile(grid, index).head, 3);
  }
}

// A last group of one or two pairs would leave most multiprocessors without a tile.
TEST(FwdPlan, PairsInFlightComeInGroupsOfEqualSize) {
  for (int64_t pairs = 1; pairs < 200; ++pairs) {
    for (int64_t room = 1; room < 64; ++room) {
      const int64_t size = equal_groups(pairs, room);
      EXPECT_LE(size, room);
      EXPECT_EQ(ceil_div(pairs, size), ceil_div(pairs, room));
      const int64_t last = pairs - (ceil_div(pairs, size) - 1) * size;
      EXPECT_GE(last + ceil_div(pairs, size) - 1, size);  // short by less than one a group
    }
  }
  EXPECT_EQ(equal_groups(0, 4), 1);
  EXPECT_EQ(equal_groups(3, 0), 1);
  // Batch 4, 3001 tokens, 16 heads: 21 would fit the L2, and leave one of 64 for the end.
  EXPECT_EQ(planned(problem(4, 3001, 16, 128, MaskKind::kCausal)).grid.heads_in_flight, 16);
}

}  // namespace
}  // namespace jax_fa3
