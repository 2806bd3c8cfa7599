"""Pictures of the visited blocks, the speed-up and the quality of PBS, with matplotlib (`pip
install 'pbs-attn[plot]'`).

`draw_attention` takes tensors. The other functions take rows of `pbs-attn bench` or its CSV files.
"""

from .attention import GATHERED_MASS, WINDOW, HeadView, KeyOrder, compare_orders, draw_attention
from .results import draw_heads, draw_quality, draw_rates, draw_speedup, draw_stages

__all__ = [
    "GATHERED_MASS",
    "WINDOW",
    "HeadView",
    "KeyOrder",
    "compare_orders",
    "draw_attention",
    "draw_heads",
    "draw_quality",
    "draw_rates",
    "draw_speedup",
    "draw_stages",
]
