"""Purify, attack, evaluate and train on a second device, then on the CPU, and write the figures of both to a file."""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from running import run, words
from second_device import MixedDevicesError, second_device

from maep_hf import MAEPModel, PurifiedClassifier, load_classifier
from maep_hf.attacks import make_attack
from maep_hf.evaluation import EvaluationImages, benchmark, checks
from maep_hf.growth import grow_local_branch

ATTACKS = {
    "fgsm": {}, "mi-fgsm": {"steps": 2}, "pgd": {"steps": 2}, "eot-pgd": {"steps": 2, "eot_samples": 2},
    "apgd-ce": {"n_iter": 2}, "square": {"n_queries": 3}, "deepfool": {"steps": 2}, "gaussian-noise": {}, "jpeg": {},
}  # fmt: skip
PURIFIER, CLASSIFIER = "checkpoints/maep-tiny-cifar10", "checkpoints/resnet20-cifar10"
TRAINING = {
    "dataset": "embedded:cifar10", "model": PURIFIER, "surrogates": [CLASSIFIER, CLASSIFIER], "max_steps": 2,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "warmup_steps": 0, "validation_images": 2,
    "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "clean": 0.2, "pgd_l2": 0.2, "square": 0.2,
    "input_diversity": 0.5, "smoothed_gradient": 0.5, "guidance_weight": 0.1, "guidance_kl_weight": 0.1,
}  # fmt: skip


def purified(device) -> dict:
    purifier = MAEPModel.from_pretrained(PURIFIER).to(device)
    defended = PurifiedClassifier(purifier, load_classifier(CLASSIFIER).to(device))
    large, small = (torch.rand(2, 3, *size).to(device) for size in ((40, 50), (32, 32)))
    labels = torch.tensor([3, 5], device=device)
    figures = {"windows": purifier.purify(large), "whole": purifier.purify(large, mode="interpolate")}
    figures |= {"native": purifier.purify(small), "grown": grow_local_branch(purifier, 40, 5).purify(small)}
    for name, options in ATTACKS.items():
        figures[name] = make_attack(name, **options)(defended, small, labels, seed=0)
    assert all(value.device.type == torch.device(device).type for value in figures.values())
    return {name: value.detach().square().mean().item() for name, value in figures.items()}


def evaluated(device) -> dict:
    checks.STEPS, checks.SWEEP_STEPS, checks.SQUARE_QUERIES = (1, 2), 2, 3
    purifier, classifier = MAEPModel.from_pretrained(PURIFIER), load_classifier(CLASSIFIER)
    pixels = torch.rand(4, 3, 32, 32)
    images = EvaluationImages(pixels, classifier(pixels).argmax(-1))
    options = {"attack": "pgd", "attack_options": {"steps": 2}, "progress": False, "device": device}
    found = {}
    for threat_model, eps in (("gray-box", 8), ("white-box", 0.2)):
        record = benchmark(classifier, purifier, images, threat_model=threat_model, eps=eps, **options).record
        found[threat_model] = {name: record[name] for name in ("accuracy", "psnr_db", "checks")}
    return found


def trained(device) -> dict:
    os.environ["ACCELERATE_USE_CPU"] = "false"
    PartialState.default_device = property(lambda self: torch.device(device))
    found = {}
    with tempfile.TemporaryDirectory() as out:
        for name, options in (("all", {"start_share": 0.5}), ("decoder_lora", {"ema_decay": 0})):
            given = TRAINING | options | {"trainable": name, "output_dir": f"{out}/{name}"}
            if name == "all":
                run("finetune", words(**given), stop=("log", 2))  # and goes on from the checkpoint of the first step
            lines = (run("finetune", words(**given)) / "metrics.jsonl").read_text().splitlines()
            found[name] = [json.loads(line).get("validation") or json.loads(line)["loss"] for line in lines]
    return found


def figures(device) -> dict:
    found = {}
    for part in (purified, evaluated, trained):
        torch.manual_seed(0)
        found[part.__name__] = part(device)
    return found


if __name__ == "__main__":
    with second_device() as device:
        there = figures(device)
        try:
            torch.ones(2).to(device) + torch.ones(2)
        except MixedDevicesError:
            there["mixed"] = "an error"
    Path(sys.argv[1]).write_text(json.dumps([there, figures("cpu")]))
