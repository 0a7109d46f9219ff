// plan_bwd: which configuration, which grid, how much workspace, and what is refused in which
// words.
#include <gtest/gtest.h>

#include <set>

#include "cuda/bwd/plan.h"
#include "tests/cuda/problems.h"

namespace jax_fa3 {
namespace {

BwdPlan planned(const Problem& p) {
  BwdPlan plan;
  const Status status = plan_bwd(p, Device{}, plan);
  EXPECT_TRUE(status.ok()) << status.message;
  return plan;
}

std::string refused(const Problem& p, StatusCode code) {
  BwdPlan plan;
  const Status status = plan_bwd(p, Device{}, plan);
  EXPECT_EQ(status.code, code) << status.message;
  EXPECT_EQ(bwd_workspace_bytes(p), 0);
  return status.message;
}

// The head dims that have a kernel.
std::set<int> head_dims() {
  std::set<int> dims;
  for (const NamedBwdConfig& named : kBwdConfigs) dims.insert(named.config.head_dim);
  return dims;
}

TEST(BwdPlan, EveryDtypeHeadDimAndMaskHasItsConfiguration) {
  for (int head_dim : head_dims()) {
    for (DType dtype : {DType::kBF16, DType::kF16}) {
      for (MaskKind mask : {MaskKind::kFull, MaskKind::kCausal}) {
        Problem p = problem(2, 8192, 16, head_dim, mask);
        p.dtype = dtype;
        const BwdConfig& config = planned(p).named().config;
        EXPECT_EQ(config.dtype, dtype);
        EXPECT_EQ(config.head_dim, head_dim);
        EXPECT_EQ(config.mask, mask);
        // Slower where it takes turns, so only on request.
        EXPECT_NE(config.dq_sum, DqSum::kInTurns);
        p.deterministic = true;
        const BwdConfig& deterministic = planned(p).named().config;
        EXPECT_TRUE(deterministic.deterministic());
        EXPECT_EQ(deterministic.head_dim, head_dim);
        EXPECT_EQ(deterministic.mask, mask);
        EXPECT_EQ(deterministic.dtype, dtype);
      }
    }
  }
}

TEST(BwdPlan, ConfigurationsFitTheirMultiprocessor) {
  for (const NamedBwdConfig& named : kBwdConfigs) EXPECT_TRUE(named.config.fits()) << named.name;
}

TEST(BwdPlan, NamesAreFoundAndAreOneEach) {
  std::set<std::string> names;
  for (size_t i = 0; i < kBwdConfigCount; ++i) {
    EXPECT_TRUE(names.insert(kBwdConfigs[i].name).second) << kBwdConfigs[i].name;
    EXPECT_EQ(find_bwd_config(kBwdConfigs[i].name), static_cast<int>(i));
  }
  EXPECT_EQ(find_bwd_config("Nonesuch"), -1);
  EXPECT_EQ(find_bwd_config("FwdBf16Hdim64Full"), -1);
}

TEST(BwdPlan, AForcedConfigurationRunsOrSaysWhyNot) {
  for (size_t i = 0; i < kBwdConfigCount; ++i) {
    const BwdConfig& config = kBwdConfigs[i].config;
    Problem p = problem(2, 512, 16, config.head_dim, config.mask);
    p.dtype = config.dtype;
    p.config = static_cast<int>(i);
    EXPECT_EQ(planned(p).config_index, i);
    p.mask = config.mask == MaskKind::kFull ? MaskKind::kCausal : MaskKind::kFull;
    const std::string message = refused(p, StatusCode::kInvalidArgument);
    EXPECT_NE(message.find("config " + std::string(kBwdConfigs[i].name) + " is not for"),
              std::string::npos);
    EXPECT_NE(message.find(name(p.mask)), std::string::npos) << message;
    p.mask = config.mask;
    p.deterministic = true;
    if (config.deterministic()) {
      EXPECT_EQ(planned(p).config_index, i);
    } else {
      EXPECT_NE(refused(p, StatusCode::kInvalidArgument).find("is not deterministic"),
                std::string::npos);
    }
  }
}

TEST(BwdPlan, TilesCoverTheKeysAndStepsTheQueries) {
  for (int head_dim : head_dims()) {
    for (int64_t seqlen : {1, 63, 64, 127, 128, 129, 3001}) {
      Problem p = problem(3, seqlen, 4, head_dim, MaskKind::kFull);
      p.heads_k = 2;
      p.seqlen_k = seqlen + 7;
      const BwdPlan plan = planned(p);
      const int64_t tile_n = plan.named().config.tile_n();
      EXPECT_GE(plan.grid.n_tiles * tile_n, p.seqlen_k);
      EXPECT_LT((plan.grid.n_tiles - 1) * tile_n, p.seqlen_k);
      // One CTA a tile of a key head: its whole group of query heads is summed there.
      EXPECT_EQ(plan.grid.tiles, static_cast<uint32_t>(plan.grid.n_tiles * 3 * 2));
      EXPECT_EQ(plan.grid.heads_k, 2);
      EXPECT_GE(plan.padded_q, seqlen);
      EXPECT_LT(plan.padded_q, seqlen + 128);
      EXPECT_EQ(plan.padded_q % 64, 0);
      if (plan.named().config.two_pass()) {
        const TileGrid& queries = plan.query_grid;
        EXPECT_GE(queries.m_tiles * BwdConfig::kQueryRows, seqlen);
        EXPECT_LT((queries.m_tiles - 1) * BwdConfig::kQueryRows, seqlen);
        EXPECT_EQ(queries.tiles, static_cast<uint32_t>(queries.m_tiles * 3 * 4));
        EXPECT_EQ(queries.heads, 4);
        EXPECT_GE(queries.heads_in_flight, 1);
      } else {
        EXPECT_EQ(plan.query_grid.tiles, 0u);
      }
    }
  }
}

// Bytes of workspace a padded query row: two floats, and what adding dQ up in memory takes.
int64_t row_bytes(const Problem& p) {
  return 8 + (planned(p).named().config.two_pass() ? 0 : 4 * p.head_dim);
}

TEST(BwdPlan, TheWorkspaceIsTwoFloatsARowAndTheAccumulatorAndTurns) {
  for (int head_dim : head_dims()) {
    for (int64_t seqlen_q : {1, 64, 65, 1000, 16384}) {
      for (int64_t seqlen_k : {0, 1, 5000}) {
        for (bool deterministic : {false, true}) {
          Problem p = problem(3, seqlen_q, 6, head_dim, MaskKind::kCausal);
          p.seqlen_k = seqlen_k;  // takes no part
          p.heads_k = 2;
          p.deterministic = deterministic;
          const BwdPlan plan = planned(p);
          const int64_t rows = p.batch * p.heads_q * plan.padded_q;
          const bool turns = plan.named().config.dq_sum == DqSum::kInTurns;
          EXPECT_EQ(turns, deterministic && head_dim != 256);
          EXPECT_EQ(bwd_workspace_bytes(p), rows * row_bytes(p) + (turns ? rows / 64 * 4 : 0));
          // Its parts lie apart and where 16-byte accesses and bulk copies want them.
          const BwdWorkspace layout(p, plan);
          EXPECT_EQ(layout.bytes, bwd_workspace_bytes(p));
          for (int64_t begin :
               {layout.lse_log2, layout.delta, layout.dq_accumulator, layout.turns}) {
            EXPECT_EQ(begin % 128, 0);
          }
          EXPECT_GE(layout.delta - layout.lse_log2, 4 * rows);
          EXPECT_GE(layout.dq_accumulator - layout.delta, 4 * rows);
          EXPECT_GE(layout.turns - layout.dq_accumulator, rows * (row_bytes(p) - 8));
        }
      }
    }
  }
}

TEST(BwdPlan, TheLongerTilesOfTwoPassesGoFirst) {
  Problem p = problem(2, 4096, 8, 256, MaskKind::kFull);
  EXPECT_FALSE(planned(p).keys_first);
  p.heads_k = 1;  // a tile of keys meets the queries of eight heads
  EXPECT_TRUE(planned(p).keys_first);
}

TEST(BwdPlan, TurnsKeepMorePairsInFlightButNoMoreThanThereAre) {
  for (int head_dim : {64, 128}) {
    for (MaskKind mask : {MaskKind::kFull, MaskKind::kCausal}) {
      Problem p = problem(2, 16384, 2048 / head_dim, head_dim, mask);
      const int any_order = planned(p).grid.pairs_in_flight;
      p.deterministic = true;
      EXPECT_GT(planned(p).grid.pairs_in_flight, any_order);
      p = problem(1, 1024, 2, head_dim, mask);
      p.deterministic = true;
      EXPECT_EQ(planned(p).grid.pairs_in_flight, 2);
      p = problem(0, 1024, 2, head_dim, mask);
      p.deterministic = true;
      EXPECT_EQ(planned(p).grid.pairs_in_flight, 1);  // never a division by zero
    }
  }
}

TEST(BwdPlan, ArraysOfMoreThan2To31ElementsHaveAPlan) {
  for (int head_dim : head_dims()) {
    // Short sequences in a large batch, and one long sequence.
    Problem p = problem(1 << 16, 64, 16, head_dim, MaskKind::kCausal);
    const int64_t elements = p.batch * p.seqlen_q * p.heads_q * head_dim;
    ASSERT_GT(elements, int64_t{1} << 31);
    EXPECT_EQ(planned(p).grid.tiles, 1u << 20);
    // The accumulator's steps may hold more rows than the sequences have.
    EXPECT_GE(bwd_workspace_bytes(p), elements / head_dim * row_bytes(p));
    p = problem(1, int64_t{1} << 24, 4, head_dim, MaskKind::kFull);
    EXPECT_EQ(bwd_workspace_bytes(p), (int64_t{1} << 26) * row_bytes(p));
  }
}

TEST(BwdPlan, TheLargestProblemsHaveAPlanToo) {
  Problem p = problem(1, (int64_t{1} << 29) - 1, 2, *head_dims().begin(), MaskKind::kCausal);
  p.diagonal = -(int64_t{1} << 29);
  const BwdPlan plan = planned(p);
  EXPECT_EQ(plan.padded_q, 1 << 29);
  EXPECT_EQ(plan.grid.pairs_in_flight, 1);
}

TEST(BwdPlan, MoreTilesThanAGridHoldsAreRefused) {
  const int head_dim = *head_dims().begin();
  const std::string message = refused(problem(1 << 20, 1 << 14, 64, head_dim, MaskKind::kCausal),
                                      StatusCode::kUnimplemented);
  EXPECT_NE(message.find("2^31"), std::string::npos);
  EXPECT_NE(message.find("batch 1048576"), std::string::npos);
  // Many queries and few keys: the steps of the small kernels count as well.
  Problem p = problem(1 << 20, 1 << 14, 64, head_dim, MaskKind::kFull);
  p.seqlen_k = 1;
  refused(p, StatusCode::kUnimplemented);
}

TEST(BwdPlan, NothingToDoNeedsNoGridAndNoWorkspace) {
  const int head_dim = *head_dims().begin();
  for (const Problem& p : {problem(0, 128, 4, head_dim, MaskKind::kFull),
                           problem(2, 128, 0, head_dim, MaskKind::kCausal)}) {
    EXPECT_EQ(planned(p).grid.tiles, 0u);
    EXPECT_EQ(bwd_workspace_bytes(p), 0);
  }
}

TEST(BwdPlan, KeysWithoutQueriesStillGetTheirZerosAndQueriesWithoutKeysToo) {
  const int head_dim = *head_dims().begin();
  Problem p = problem(2, 128, 4, head_dim, MaskKind::kCausal);
  p.seqlen_q = 0;
  EXPECT_GT(planned(p).grid.tiles, 0u);
  EXPECT_EQ(bwd_workspace_bytes(p), 0);
  p = problem(2, 128, 4, head_dim, MaskKind::kFull);
  p.seqlen_k = 0;
  EXPECT_EQ(planned(p).grid.tiles, 0u);
  EXPECT_GT(bwd_workspace_bytes(p), 0);  // dq is converted from a zeroed accumulator
}

TEST(BwdPlan, PairsInFlightAreAtLeastOneAtMostAllAndFewerWhereTheyAreLarge) {
  for (int head_dim : head_dims()) {
    const MaskKind causal = MaskKind::kCausal;
    const auto in_flight = [](const Problem& p) { return planned(p).grid.pairs_in_flight; };
    EXPECT_EQ(in_flight(problem(1, 1 << 22, 4, head_dim, causal)), 1);
    EXPECT_EQ(in_flight(problem(2, 128, 4, head_dim, causal)), 8);
    EXPECT_EQ(in_flight(problem(0, 128, 4, head_dim, causal)), 1);  // never a division by zero
    // Query, dout and the accumulator of what is in flight fit the L2 of 50 MB.
    const Problem p = problem(4, 8192, 16, head_dim, causal);
    const int64_t pair = p.seqlen_q * head_dim * 8;
    EXPECT_LE(in_flight(p) * pair, 50 << 20);
    EXPECT_GE((in_flight(p) + 1) * pair, 16 << 20);
    // A key head brings the queries of its whole group along.
    Problem gqa = p;
    gqa.heads_k = 4;
    EXPECT_LT(in_flight(gqa), in_flight(p));
    EXPECT_GE(in_flight(gqa), in_flight(p) / 4);
  }
}

TEST(BwdPlan, RefusalsNameTheFieldTheValueAndTheWish) {
  Problem p = problem(2, 128, 6, *head_dims().begin(), MaskKind::kFull);
  p.heads_k = 4;
  p.seqlen_q = int64_t{1} << 29;
  p.diagonal = -(int64_t{1} << 30);
  p.scale = -1;
  const std::string message = refused(p, StatusCode::kInvalidArgument);
  EXPECT_NE(message.find("heads_k is 4, expected a divisor of heads_q = 6"), std::string::npos);
  EXPECT_NE(message.find("seqlen_q is 536870912, expected [0, 2^29)"), std::string::npos);
  EXPECT_NE(message.find("diagonal is -1073741824, expected [-2^29, 2^29]"), std::string::npos);
  EXPECT_NE(message.find("scale is -1, expected above 0"), std::string::npos);
}

TEST(BwdPlan, AMissingHeadDimListsWhatThereIs) {
  const std::string message =
      refused(problem(2, 128, 4, 96, MaskKind::kFull), StatusCode::kUnimplemented);
  EXPECT_NE(message.find("no backward kernel for bfloat16, head_dim 96, full"), std::string::npos);
  for (const NamedBwdConfig& named : kBwdConfigs) {
    EXPECT_NE(message.find(named.name), std::string::npos) << named.name;
  }
}

TEST(BwdPlan, TheDescriptionNamesConfigurationAndProblem) {
  for (int head_dim : head_dims()) {
    Problem p = problem(2, 8192, 16, head_dim, MaskKind::kCausal);
    p.heads_k = 4;
    const BwdPlan plan = planned(p);
    const std::string text = describe(p, plan);
    EXPECT_EQ(text.find(plan.named().name), 0u);
    EXPECT_NE(text.find("batch 2"), std::string::npos);
    EXPECT_NE(text.find("heads 16 over 4"), std::string::npos);
    EXPECT_NE(text.find(std::to_string(plan.grid.tiles) + " CTAs"), std::string::npos);
  }
}

}  // namespace
}  // namespace jax_fa3
