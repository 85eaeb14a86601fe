"""The whole chain on the embedded images, as a newcomer starts it: classifier, pairs, both stages, report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maep_hf import MAEPModel, load_classifier
from maep_hf.data import load_image_dataset
from maep_hf.records import read_jsonl

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_smoke_chain(tmp_path):
    script, out = ROOT / "train" / "smoke.py", tmp_path / "smoke"
    command = [sys.executable, str(script), "--output_dir", str(out), "--cpu_threads", "1"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = read_jsonl(out / "report" / "results.jsonl")
    assert result["protocol"]["threat_model"] == "gray-box" and result["protocol"]["dataset"]["n"] == 20
    accuracy = {name: share["correct"] for name, share in result["accuracy"].items()}
    assert accuracy["clean"] == 20 and accuracy["attacked"] == 0
    assert accuracy["purified_clean"] >= 18  # a purifier that harms clean images is broken, however little it saw
    assert accuracy["purified_attacked"] > 0
    (picture,) = (out / "report" / "pictures").glob("*.png")
    assert picture.stat().st_size > 10_000
    assert len(load_image_dataset(str(out / "pairs"))) == 20
    assert load_classifier(str(out / "classifier")).num_labels == 10
    assert not MAEPModel.from_pretrained(out / "finetune").training
    lines = [json.loads(line) for line in (out / "finetune" / "metrics.jsonl").read_text().splitlines()]
    assert {"guidance_loss", "attack_time_share"} <= set().union(*lines)
    assert len(list((out / "finetune" / "previews").glob("*.png"))) == 2
