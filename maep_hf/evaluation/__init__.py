"""Evaluation: `benchmark` over the threat models, gradient-masking checks, records, tables and pictures."""

from .benchmark import BenchmarkResult, benchmark
from .checks import CheckResult, MaskingReport, gradient_masking_checks
from .images import EvaluationImages, read_images
from .protocol import Protocol
from .statistics import mean_cosine, psnr, share, wilson_interval
from .threat_models import THREAT_MODELS, attacked_model

__all__ = [
    "THREAT_MODELS",
    "BenchmarkResult",
    "CheckResult",
    "EvaluationImages",
    "MaskingReport",
    "Protocol",
    "attacked_model",
    "benchmark",
    "gradient_masking_checks",
    "mean_cosine",
    "psnr",
    "read_images",
    "share",
    "wilson_interval",
]
