"""Problem sizes with a name, each taken from a model or a paper.

Head counts, head dims and their ratios are the model's; lengths and batches are cut down by the
tests (`shape.cut(...)`), which need the pattern and not the weight.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention call: query [B, T, N, H], key [B, S, K, H], value [B, S, K, D]."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_k: int
    head_dim: int
    source: str
    head_dim_v: int | None = None  # None: head_dim

    def cut(self, **sizes) -> Shape:
        """The same call with some sizes replaced, for a test that must stay small."""
        return dataclasses.replace(self, **sizes)

    @property
    def query(self) -> tuple[int, ...]:
        return (self.batch, self.seqlen_q, self.heads_q, self.head_dim)

    @property
    def key(self) -> tuple[int, ...]:
        return (self.batch, self.seqlen_k, self.heads_k, self.head_dim)

    @property
    def value(self) -> tuple[int, ...]:
        return (self.batch, self.seqlen_k, self.heads_k, self.head_dim_v or self.head_dim)


SHAPES = {
    # Multi-head.
    "gpt2": Shape(8, 1024, 1024, 12, 12, 64, "GPT-2 small, Radford et al. 2019"),
    "vit_b16": Shape(8, 197, 197, 12, 12, 64, "ViT-B/16 at 224 pixels: 196 patches and a class"),
    "gemma_7b": Shape(1, 8192, 8192, 16, 16, 256, "Gemma 7B, arXiv:2403.08295"),
    # Grouped-query.
    "llama3_8b": Shape(1, 8192, 8192, 32, 8, 128, "Llama 3 8B, arXiv:2407.21783"),
    "llama3_70b": Shape(1, 8192, 8192, 64, 8, 128, "Llama 3 70B, arXiv:2407.21783"),
    "gemma2_9b": Shape(1, 8192, 8192, 16, 8, 256, "Gemma 2 9B, soft cap 50, arXiv:2408.00118"),
    "gpt_oss_20b": Shape(1, 8192, 8192, 64, 8, 64, "gpt-oss-20b: sinks, window of 128 tokens"),
    # Multi-query.
    "falcon_7b": Shape(1, 2048, 2048, 71, 1, 64, "Falcon 7B, arXiv:2311.16867"),
    "gemma_2b": Shape(1, 8192, 8192, 8, 1, 256, "Gemma 2B, arXiv:2403.08295"),
    # Query and key lengths that differ.
    "whisper_cross": Shape(4, 448, 1500, 20, 20, 64, "Whisper large decoder, arXiv:2212.04356"),
    # Head dims that differ.
    "deepseek_v3": Shape(
        1, 4096, 4096, 128, 128, 192, "DeepSeek-V3 MLA, expanded, arXiv:2412.19437", head_dim_v=128
    ),
    # The benchmark grid of the FlashAttention-3 paper: 16k tokens, hidden size 2048.
    "fa3_hdim64": Shape(2, 8192, 8192, 32, 32, 64, "Shah et al. 2024, figure 5"),
    "fa3_hdim128": Shape(2, 8192, 8192, 16, 16, 128, "Shah et al. 2024, figure 5"),
    "fa3_hdim256": Shape(2, 8192, 8192, 8, 8, 256, "Shah et al. 2024, figure 5"),
}

# One row of the table for each head dim and head ratio that the kernels must get right.
KERNEL_SHAPES = ("gpt2", "llama3_8b", "gemma_2b")

# Causal calls, (B, T, S, N, K, H), for which the forward's plan is another with the diagonal at the
# bottom right than at the top left, and its workspace too.
PLANNED_BY_THE_DIAGONAL = (
    (2, 200, 1, 32, 32, 64),
    (8, 129, 1, 8, 8, 128),
    (8, 129, 200, 16, 8, 128),
)

# Query and key tiles of the kernels and of the designs near them (rows a CTA, keys a stage).
TILES = (64, 80, 96, 112, 128, 160, 176, 192)


def edge_lengths(tile: int, multiples=(1, 2)) -> tuple[int, ...]:
    """Lengths where an off-by-one in a tile loop shows: tile * k + {-1, 0, 1}."""
    return tuple(tile * k + d for k in multiples for d in (-1, 0, 1))
