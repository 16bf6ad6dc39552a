"""Sizes of Kimi K2.5 that several ops share, and which of them an ordinary run has."""

from __future__ import annotations

DECODE = (1, 2, 4, 8, 16, 32, 64)
PREFILL = (512, 1024, 2048, 4096, 8192)
CONTEXTS = (4096, 32768, 131072, 262144)
HEADS = (64, 32, 16, 8, 4)  # of a rank, tensor parallel 1 to 16
D, F, EXPERTS, CHOSEN = 7168, 2048, 384, 8
Q_LORA, C, R, NOPE, V = 1536, 512, 64, 128, 128
SCALE = 0.1446796  # of scores: 192**-0.5 times the square of the YaRN factor
ROUTED_SCALE = 2.827
PAGE = 64
VISION_HEADS, VISION_DIM, VISION_WIDTH = 16, 72, 1152
# Pictures and clips, [frames, rows, columns] of patches of 14 pixels.
GRIDS = {
    "picture 224x224": [[1, 16, 16]],
    "picture 896x896": [[1, 64, 64]],
    "picture at the limit, 1792x1792": [[1, 128, 128]],
    "mixed batch of pictures": [[1, 16, 16], [1, 64, 48], [1, 24, 80], [1, 46, 36]],
    "clip, 4 frames": [[4, 36, 46]],
}


def tokens_text(tokens: int) -> str:
    """``1 token``, ``4,096 tokens``."""
    return f"{tokens:,} token{'s' * (tokens != 1)}"
