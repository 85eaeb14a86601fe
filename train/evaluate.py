"""Measure a purifier on several processes: `maep evaluate` with the same options, the images shared between them.

accelerate launch train/evaluate.py --classifier CLASSIFIER --dataset data/cifar10 --threat-model white-box --out OUT
"""

import sys
from pathlib import Path

# This file has the name of a library that others import: its folder must not be the first place to look.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from maep_hf.cli import app  # noqa: E402

if __name__ == "__main__":
    app(["evaluate", *sys.argv[1:]], prog_name="evaluate.py", standalone_mode=True)
