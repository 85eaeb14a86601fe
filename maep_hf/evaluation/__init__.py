"""Evaluation: the gray-box measurement and the figures it is stated in."""

from .gray_box import THREAT_MODEL, GrayBoxResult, evaluate_gray_box, predict, print_table
from .statistics import mean_cosine, psnr, share, wilson_interval

__all__ = [
    "THREAT_MODEL",
    "GrayBoxResult",
    "evaluate_gray_box",
    "mean_cosine",
    "predict",
    "print_table",
    "psnr",
    "share",
    "wilson_interval",
]
