"""Figures of the notebooks: one look, a palette for colour-blind readers, alt text on each."""

from nlutils.plots.attention import AttentionMap, attention_picture
from nlutils.plots.figures import COLOURS, figure_html, show, style
from nlutils.plots.pictures import flow_to_rgb, heatmap, strip

__all__ = [
    "COLOURS",
    "AttentionMap",
    "attention_picture",
    "figure_html",
    "flow_to_rgb",
    "heatmap",
    "show",
    "strip",
    "style",
]
