// core/mask.h against brute force on a small grid.
#include "cuda/core/mask.h"

#include <gtest/gtest.h>

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

TEST(Mask, TheLargestLengthsDoNotOverflow) {
  constexpr int32_t kMax = (1 << 29) - 1;
  EXPECT_EQ(visible_keys<MaskKind::kCausal>(kMax, kMax, 1 << 29), kMax);
  EXPECT_EQ(visible_keys<MaskKind::kCausal>(0, kMax, -(1 << 29)), 0);
  EXPECT_EQ((key_blocks<MaskKind::kCausal>(kMax - 64, kMax, kMax, 1 << 29, 192).end),
            (kMax + 191) / 192);
}

}  // namespace
}  // namespace jax_fa3
