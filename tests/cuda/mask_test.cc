// core/mask.h against brute force on a small grid.
#include "cuda/core/mask.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

namespace jax_fa3 {
namespace {

template <MaskKind kMask>
bool sees(int row, int key, int seqlen_k, int diagonal) {
  return key < seqlen_k && (kMask == MaskKind::kFull || key <= row + diagonal);
}

template <MaskKind kMask>
void expect_brute_force() {
  for (int seqlen_q : {1, 3, 5, 8, 11}) {
    for (int seqlen_k : {0, 1, 4, 7, 12, 13}) {
      for (int diagonal : {-14, -12, -5, -1, 0, 1, 2, 6, 13, 20}) {
        for (int tile_m : {1, 2, 4}) {
          for (int tile_n : {1, 3, 4}) {
            for (int begin = 0; begin < seqlen_q + tile_m; begin += tile_m) {
              const int end = std::min(begin + tile_m, seqlen_q);
              const KeyBlocks blocks = key_blocks<kMask>(begin, end, seqlen_k, diagonal, tile_n);
              int visited_end = 0, unmasked_end = 0;
              bool all_so_far = begin < end;
              for (int block = 0; block * tile_n < seqlen_k; ++block) {
                bool any = false, all = true;
                for (int row = begin; row < end; ++row) {
                  for (int key = block * tile_n; key < (block + 1) * tile_n; ++key) {
                    const bool visible = sees<kMask>(row, key, seqlen_k, diagonal);
                    any |= visible;
                    all &= visible;
                  }
                }
                if (any) visited_end = block + 1;
                all_so_far &= all;
                if (all_so_far) unmasked_end = block + 1;
              }
              EXPECT_EQ(blocks.end, visited_end)
                  << "rows " << begin << ".." << end << ", " << seqlen_k << " keys, diagonal "
                  << diagonal << ", tile_n " << tile_n;
              EXPECT_EQ(blocks.unmasked_end, unmasked_end);
              // Every row but the first sees a key in the masked blocks, if there are any.
              for (int row = begin; row < end; ++row) {
                bool seen = false;
                for (int key = unmasked_end * tile_n; key < visited_end * tile_n; ++key) {
                  seen |= sees<kMask>(row, key, seqlen_k, diagonal);
                }
                if (visited_end == unmasked_end || unmasked_end == 0) continue;
                EXPECT_EQ(seen, row > begin || !blocks.first_row_unseen);
              }
            }
          }
        }
      }
    }
  }
}

TEST(Mask, FullBlocksEqualBruteForce) { expect_brute_force<MaskKind::kFull>(); }
TEST(Mask, CausalBlocksEqualBruteForce) { expect_brute_force<MaskKind::kCausal>(); }

TEST(Mask, VisibleKeysIsTheRowsPrefix) {
  for (int row : {0, 1, 7}) {
    for (int diagonal : {-9, -1, 0, 3}) {
      int prefix = 0;
      while (sees<MaskKind::kCausal>(row, prefix, 6, diagonal)) ++prefix;
      EXPECT_EQ(visible_keys<MaskKind::kCausal>(row, 6, diagonal), prefix);
    }
  }
}

// The first query that sees `key`, by looking at more rows than any diagonal below needs.
template <MaskKind kMask>
int first_that_sees(int key, int seqlen_k, int diagonal) {
  for (int row = 0; row < 64; ++row) {
    if (sees<kMask>(row, key, seqlen_k, diagonal)) return row;
  }
  return kNoQuery;
}

template <MaskKind kMask>
void expect_first_query() {
  for (int seqlen_k : {0, 1, 4, 7}) {
    for (int diagonal = -14; diagonal <= 14; ++diagonal) {
      for (int key = 0; key < 10; ++key) {
        EXPECT_EQ(first_visible_query<kMask>(key, seqlen_k, diagonal),
                  first_that_sees<kMask>(key, seqlen_k, diagonal))
            << "key " << key << " of " << seqlen_k << ", diagonal " << diagonal;
      }
    }
  }
}

TEST(Mask, FirstVisibleQueryOfAFullMask) { expect_first_query<MaskKind::kFull>(); }
TEST(Mask, FirstVisibleQueryOfACausalMask) { expect_first_query<MaskKind::kCausal>(); }

// What a CTA of the backward walks over: a tile of keys, part of which may lie past the end.
template <MaskKind kMask>
void expect_steps_of_brute_force() {
  for (int seqlen_q : {0, 1, 3, 8, 11}) {
    for (int seqlen_k : {1, 4, 7, 12, 13}) {
      for (int diagonal : {-14, -12, -8, -5, -1, 0, 1, 2, 6, 13, 20}) {
        for (int tile_m : {1, 2, 3, 4}) {
          for (int tile_n : {1, 3, 4}) {
            // One tile more than there are: a second warpgroup's keys may all be past the end.
            for (int begin = 0; begin < seqlen_k + tile_n; begin += tile_n) {
              const QuerySteps steps =
                  query_steps<kMask>(begin, begin + tile_n, seqlen_q, seqlen_k, diagonal, tile_m);
              const std::string where =
                  "keys " + std::to_string(begin) + " of " + std::to_string(seqlen_k) + " by " +
                  std::to_string(tile_n) + ", " + std::to_string(seqlen_q) + " queries by " +
                  std::to_string(tile_m) + ", diagonal " + std::to_string(diagonal);
              const int count = ceil_div(seqlen_q, tile_m);
              ASSERT_LE(0, steps.begin) << where;
              ASSERT_LE(steps.begin, steps.unmasked_begin) << where;
              ASSERT_LE(steps.unmasked_begin, steps.end) << where;
              ASSERT_EQ(steps.end, count) << where;  // later queries see whatever earlier ones do
              for (int step = 0; step < count; ++step) {
                bool any = false, all = true;
                for (int row = step * tile_m; row < (step + 1) * tile_m; ++row) {
                  for (int key = begin; key < begin + tile_n; ++key) {
                    const bool visible = sees<kMask>(row, key, seqlen_k, diagonal);
                    any |= visible && row < seqlen_q;
                    all &= visible;
                  }
                }
                // No step with a visible pair is left out, no masked one taken for whole. Rows past
                // the end need no mask: their lse is infinite.
                EXPECT_TRUE(!any || step >= steps.begin) << where << ", step " << step;
                EXPECT_EQ(all, step >= steps.unmasked_begin) << where << ", step " << step;
                // And none is visited in vain, but for a last one whose visible rows are all past
                // the end of the queries.
                if (step >= steps.begin && step + 1 < count) {
                  EXPECT_TRUE(any) << where << ", step " << step;
                }
              }
            }
          }
        }
      }
    }
  }
}

TEST(Mask, FullStepsEqualBruteForce) { expect_steps_of_brute_force<MaskKind::kFull>(); }
TEST(Mask, CausalStepsEqualBruteForce) { expect_steps_of_brute_force<MaskKind::kCausal>(); }

TEST(Mask, KeysThatNoQuerySeesHaveNoStep) {
  constexpr MaskKind kCausal = MaskKind::kCausal;
  // Keys past the last query's diagonal: dK and dV are zeros.
  const QuerySteps future = query_steps<kCausal>(128, 256, 70, 300, 0, 64);
  EXPECT_EQ(future.begin, future.end);
  const QuerySteps shifted = query_steps<kCausal>(0, 128, 70, 300, -128, 64);
  EXPECT_EQ(shifted.begin, shifted.end);
  const QuerySteps no_queries = query_steps<MaskKind::kFull>(0, 128, 0, 300, 0, 64);
  EXPECT_EQ(no_queries.begin, 0);
  EXPECT_EQ(no_queries.end, 0);
}

TEST(Mask, TheLargestLengthsDoNotOverflow) {
  constexpr int32_t kMax = (1 << 29) - 1;
  EXPECT_EQ(visible_keys<MaskKind::kCausal>(kMax, kMax, 1 << 29), kMax);
  EXPECT_EQ(visible_keys<MaskKind::kCausal>(0, kMax, -(1 << 29)), 0);
  EXPECT_EQ((key_blocks<MaskKind::kCausal>(kMax - 64, kMax, kMax, 1 << 29, 192).end),
            (kMax + 191) / 192);
  EXPECT_EQ(first_visible_query<MaskKind::kCausal>(kMax - 1, kMax, -(1 << 29)),
            kMax - 1 + (1 << 29));
  EXPECT_EQ(first_visible_query<MaskKind::kCausal>(kMax - 1, kMax, 1 << 29), 0);
  const QuerySteps steps =
      query_steps<MaskKind::kCausal>(kMax - 127, kMax + 1, kMax, kMax, -(1 << 29), 64);
  EXPECT_EQ(steps.begin, (kMax + 63) / 64);
  EXPECT_EQ(steps.end, (kMax + 63) / 64);
}

}  // namespace
}  // namespace jax_fa3
