"""Purify, attack, evaluate and train on a second device, then on the CPU, and write what both found to a file."""

import json
import os
import sys
import tempfile
from pathlib import Path

import second_device
import torch
from running import run, words
from safetensors.torch import load_file

from maep_hf import MAEPModel, PurifiedClassifier, load_classifier
from maep_hf.attacks import base as attacks_base
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
    "learning_rate": 0.0003,  # AdamW's first steps are of its size, even where a gradient is rounding alone
}  # fmt: skip


def purified(device: torch.device) -> dict:
    purifier = MAEPModel.from_pretrained(PURIFIER).to(device)
    defended = PurifiedClassifier(purifier, load_classifier(CLASSIFIER).to(device))
    large, small = (torch.rand(2, 3, *size).to(device) for size in ((40, 50), (32, 32)))
    labels = torch.tensor([3, 5], device=device)
    found = {"windows": purifier.purify(large), "whole": purifier.purify(large, mode="interpolate")}
    found |= {"native": purifier.purify(small), "grown": grow_local_branch(purifier, 40, 5).purify(small)}
    for name, options in ATTACKS.items():
        found[name] = make_attack(name, **options)(defended, small, labels, seed=0)
    pgd, inner = make_attack("pgd", norm="L2", eps=0.5), small / 2 + 0.25
    over = inner + pgd.radius * (1 + 8e-6) / inner[0].numel() ** 0.5  # by more than rounding: it is projected back
    found["projected"] = attacks_base.check_attacked(pgd, inner, over)
    assert all(value.device == device for value in found.values())
    return {name: value.detach().cpu() for name, value in found.items()}


def evaluated(device: torch.device) -> dict:
    checks.STEPS, checks.SWEEP_STEPS, checks.SQUARE_QUERIES = (1, 2), 2, 3
    purifier, classifier = MAEPModel.from_pretrained(PURIFIER), load_classifier(CLASSIFIER)
    pixels = torch.rand(4, 3, 32, 32)
    images = EvaluationImages(pixels, PurifiedClassifier(purifier, classifier)(pixels).argmax(-1))  # all right
    options = {"attack": "pgd", "attack_options": {"steps": 2}, "progress": False, "device": device}
    found = {}
    for threat_model, eps in (("gray-box", 8), ("white-box", 0.2)):
        record = benchmark(classifier, purifier, images, threat_model=threat_model, eps=eps, **options).record
        assert record["environment"]["device"] == device.type
        found[threat_model] = {name: record[name] for name in ("accuracy", "psnr_db", "checks")}
    return found


def trained(device: torch.device) -> dict:
    os.environ |= {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": str(device)}
    found = {}
    with tempfile.TemporaryDirectory() as out:
        for name, options in (("all", {"start_share": 0.5}), ("decoder_lora", {"ema_decay": 0})):
            given = TRAINING | options | {"trainable": name, "output_dir": f"{out}/{name}"}
            if name == "all":
                run("finetune", words(**given), stop=("log", 2))  # and goes on from the checkpoint of the first step
            folder = run("finetune", words(**given))
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            found[name] = [line.get("validation") or line["loss"] for line in lines]
            found[f"{name}: weights"] = load_file(folder / "model.safetensors")
    return found


def both(device: torch.device) -> dict:
    found, operations = {}, {}
    for part in (purified, evaluated, trained):
        torch.manual_seed(0)
        before = second_device.operations
        found[part.__name__] = part(device)
        operations[part.__name__] = second_device.operations - before
    return {"found": found, "operations": operations}


def refused(device: torch.device) -> list[bool]:
    """Whether each of what a GPU refuses is."""
    here, there, number = torch.ones(2), torch.ones(2, device=device), torch.ones(())
    mistakes = [
        lambda: there + here,
        lambda: here[there.long()],
        lambda: there.index_put_((torch.tensor([0]),), here[:1]),
        lambda: torch.stack([there[0], number]),
        lambda: number.add_(there[0]),
        lambda: torch.rand(2, device=device, generator=torch.Generator()),
        lambda: there.uniform_(generator=torch.Generator()),
        lambda: there.double(),
    ]
    return [_is_refused(mistake) for mistake in mistakes]


def _is_refused(mistake) -> bool:
    try:
        mistake()
    except (second_device.MixedDevicesError, second_device.NoFloat64Error):
        return True
    return False


if __name__ == "__main__":
    attacks_base.NO_FLOAT64.add(second_device.NAME)
    with second_device.second_device() as there:
        result = {"there": both(there), "refused": refused(there)}
    torch.save(result | {"here": both(torch.device("cpu"))}, Path(sys.argv[1]))
