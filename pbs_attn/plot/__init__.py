"""Pictures of what PBS visits, gains and costs, with matplotlib (`pip install 'pbs-attn[plot]'`).

`draw_attention` works on tensors; the others on the rows of `pbs-attn bench`, or on its CSV files.
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
