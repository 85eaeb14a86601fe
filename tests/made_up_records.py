"""Evaluation records without an evaluation, for the tests of tables and charts."""

import hashlib
import json

from maep_hf.evaluation.statistics import wilson_interval

PURIFIER = {"name": "maep-tiny", "fingerprint": "b" * 16, "options": {}, "randomised": False}
PASSED = {"reliable": True, "failed": [], "results": []}


def failed(*names):
    return {"reliable": False, "failed": list(names), "results": []}


def share(percent: float, n: int) -> dict:
    correct = round(percent * n / 100)
    interval = [100 * bound for bound in wilson_interval(correct, n)]
    return {"correct": correct, "n": n, "percent": 100 * correct / n, "interval_95": interval}


def record(
    figure=82.3, threat_model="gray-box", attack="PGD-20", eps=8.0, norm="Linf", *, classifier="resnet56",
    purifier="maep-tiny", n=1000, clean=94.0, purified_clean=92.5, attacked=0.0, checks=None, control=False, seed=0,
    attack_options=None, purifier_options=None, gradient=None, **protocol,
):  # fmt: skip
    """One record; `purifier=None` is the bare classifier, whose figure is `figure`."""
    if purifier is None:
        purified, attacked = (None, None), figure
    else:
        purified = share(purified_clean, n), share(figure, n)
        purifier = PURIFIER | {"name": purifier, "options": purifier_options or {}}
    described = {"name": attack, "norm": norm, "eps": eps, "eps_unit": "1/255" if norm == "Linf" else "pixels"}
    described |= ({"control": True} if control else {}) | (attack_options or {})
    protocol = {
        "threat_model": threat_model,
        "attack": described,
        "seed": seed,
        "batch_size": 100,
        "dataset": {
            "name": "cifar10", "split": "test", "images": f"the first {n}", "n": n, "size": [32, 32],
            "fingerprint": "d" * 16,
        },
        "classifier": {"name": classifier, "fingerprint": "c" * 16},
        "purifier": purifier,
    } | protocol  # fmt: skip
    return {
        "schema": 1,
        "key": hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16],
        "protocol": protocol,
        "accuracy": {
            "clean": share(clean, n),
            "purified_clean": purified[0],
            "attacked": share(attacked, n),
            "purified_attacked": purified[1],
        },
        "psnr_db": {"purified_clean": 38.1, "attacked": 31.2, "purified_attacked": 33.3} if purifier else None,
        "checks": checks,
        **({"gradient": gradient} if gradient else {}),
        "environment": {"command": ["maep", "evaluate"]},
    }


LONG_ATTACKS = [
    "AutoAttack (standard)", "AutoAttack (plus)", "APGD-CE", "APGD-DLR (targeted)", "FAB (targeted)", "Square",
    "FGSM", "FGSM with random start (FGSM-RS)", "BIM", "MI-FGSM", "PGD-20", "PGD-100 with 10 restarts",
    "Elastic-net attack (EAD), L1 decision rule", "HopSkipJump",
]  # fmt: skip


def many() -> list[dict]:
    """Three classifiers, two purifiers, 14 attacks under three threat models, controls, and every kind of mark."""
    records = []
    for index, classifier in enumerate(("resnet56", "wide-resnet-28-10", "vit-base-patch16-224-in21k-finetuned")):
        for number, attack in enumerate(LONG_ATTACKS):
            records.append(record(number % 3, "white-box", attack, purifier=None, classifier=classifier))
            records.append(record(85 - 2 * number - index, "gray-box", attack, classifier=classifier))
            records.append(
                record(50 - 3 * number, "white-box", attack, classifier=classifier,
                       checks=failed("eps sweep", "white-box <= black-box") if number == 2 else PASSED)
            )  # fmt: skip
            if number % 2:
                records.append(record(55 - 3 * number, "bpda", attack, classifier=classifier))
        for name, figure in (("Gaussian noise", 88.0), ("JPEG", 90.1)):
            options = {"attacked": 85.0, "control": True, "norm": None, "eps": None}
            records.append(record(figure, "gray-box", name, classifier=classifier, **options))
        records.append(record(77, "black-box", "Square", classifier=classifier))
        records.append(record(79, "transfer", "PGD-20", classifier=classifier, source={"name": "resnet20 + maep-tiny"}))
        records.append(record(61, "gray-box", "PGD-20", classifier=classifier, purifier="JPEG", purified_clean=81))
    return records


def sweep() -> list[dict]:
    """Accuracy over eps in two norms, under three threat models."""
    records = []
    for norm, radii in (("Linf", (1, 2, 4, 8, 16)), ("L2", (0.25, 0.5, 1.0, 2.0))):
        for step, eps in enumerate(radii, 1):
            fall = 100 / len(radii) * step
            records += [
                record(max(0, 90 - 2.2 * fall), "white-box", purifier=None, eps=eps, norm=norm),
                record(90 - 0.4 * fall, "gray-box", eps=eps, norm=norm),
                record(max(0, 88 - fall), "white-box", eps=eps, norm=norm, checks=PASSED),
                record(90 - 0.6 * fall, "black-box", "Square", eps=eps, norm=norm),
            ]
    return records
