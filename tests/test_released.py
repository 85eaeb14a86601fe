"""The weights that come with the repository: what they do on real images, and that their records are all there."""

import json
import re
from pathlib import Path

import pytest
import torch

from maep_hf import MAEPModel, load_classifier
from maep_hf.checkpoints import CLASSIFIER, PURIFIER, load_purifier, released_checkpoint
from maep_hf.demo import embedded_images
from maep_hf.evaluation import benchmark
from maep_hf.hub import render_model_card

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.checkpoint


def test_released_purifier_defends_the_released_classifier():
    classifier = load_classifier(str(released_checkpoint(CLASSIFIER)))
    result = benchmark(classifier, load_purifier(), embedded_images("cifar10"), attack="pgd-20", eps=8, progress=False)
    correct = {name: share["correct"] for name, share in result.record["accuracy"].items()}
    assert correct["clean"] >= 16 and correct["attacked"] <= 1
    assert correct["purified_clean"] >= correct["clean"] - 1
    assert correct["purified_attacked"] >= 15
    assert result.record["cosine"]["true_direction"] > 0.2  # the correction points back to the clean image


def test_released_purifier_takes_larger_images_and_passes_gradients():
    purifier = MAEPModel.from_pretrained(released_checkpoint(PURIFIER))
    image = torch.rand(1, 3, 45, 70, generator=torch.Generator().manual_seed(0), requires_grad=True)
    purified = purifier.purify(image)
    assert purified.shape == image.shape and 0 <= purified.min() and purified.max() <= 1
    purified.sum().backward()
    assert torch.isfinite(image.grad).all() and (image.grad != 0).float().mean() > 0.99


def test_records_lie_beside_the_weights_and_name_no_machine():
    folder = released_checkpoint(PURIFIER)
    for name in ("run.json", "metrics.jsonl", "pretrain_run.json", "pretrain_metrics.jsonl", "results.json"):
        text = (folder / name).read_text()
        assert text and not re.search(r'"/(work|root|home|tmp)/', text)
    arguments = json.loads((folder / "run.json").read_text())["arguments"]
    assert arguments["purification"]["surrogates"] == [f"checkpoints/{CLASSIFIER}"]
    weights = sum(path.stat().st_size for path in (ROOT / "checkpoints").rglob("*.safetensors"))
    assert weights <= 25 * 2**20


def test_card_and_readme_state_the_recorded_results():
    folder = released_checkpoint(PURIFIER)
    card, readme = (folder / "README.md").read_text(), (ROOT / "README.md").read_text()
    assert card == str(render_model_card(folder))
    for record in json.loads((folder / "results.json").read_text())["results"]:
        assert record["threat_model"] == "gray-box" and record["n"] == 1000
        (row,) = (line for line in readme.splitlines() if line.startswith(f"| {record['classifier']} |"))
        for name in ("clean", "attacked", "purified_clean", "purified_attacked"):
            assert f"{record['accuracy'][name]['percent']:.1f}" in row


def test_code_beside_the_weights_is_the_packages():
    for copy in (ROOT / "checkpoints").glob("*/*.py"):
        assert copy.read_text() == (ROOT / "maep_hf" / copy.name).read_text(), f"{copy}: copy maep_hf/{copy.name} again"
