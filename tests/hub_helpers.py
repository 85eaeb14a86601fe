"""What the functions that run in the client's process build on; see `hub_client.py`."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from made_up_records import PASSED, record

OTHER_TOKEN = "hf_tokenofsomebodyelsewhoisnotknown"
TINY = {
    "image_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32, "local_branch_layers": 1, "local_branch_channels": 8,
}  # fmt: skip


def purifier(seed: int = 0, **config):
    """A tiny purifier that is not the identity."""
    import torch

    from maep_hf import MAEPConfig, MAEPModel

    torch.manual_seed(seed)
    model = MAEPModel(MAEPConfig(**TINY | config))
    for head in (model.local_branch.head, model.decoder.head):
        torch.nn.init.normal_(head.weight, std=0.02)  # zeros would be the identity, with any adapter
    return model.eval()


def same(one, other) -> bool:
    """Whether two modules have the same weights."""
    import torch

    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def failure(function, *args, **options) -> str:
    """The error as text; the client's own exceptions do not travel between processes."""
    try:
        function(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def classifier(classes: int = 2):
    """An untrained CIFAR ResNet."""
    from maep_hf import CifarResNetConfig, CifarResNetForImageClassification

    names = {index: f"class{index}" for index in range(classes)}
    return CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=4, id2label=names))


def transformers_classifier():
    """A tiny classifier whose code is in transformers."""
    from transformers import RegNetConfig, RegNetForImageClassification

    small = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}
    return RegNetForImageClassification(RegNetConfig(**small, id2label={0: "cat", 1: "dog"}))


def push(folder, repo: str, **options) -> dict:
    from maep_hf.hub import push_to_hub

    return vars(push_to_hub(folder, repo, **options))


def overwrite_readme(repo: str, text: str) -> None:
    from huggingface_hub import HfApi

    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo)


def write_records(folder: Path, fingerprint: str, results) -> None:
    lines = []
    for threat_model, figure in results:
        made = record(figure, threat_model, checks=PASSED if threat_model == "white-box" else None)
        made["protocol"]["purifier"] = made["protocol"]["purifier"] | {"fingerprint": fingerprint}
        made["protocol"]["classifier"]["name"] = f"{folder.parent}/resnet56"
        lines.append(json.dumps(made) + "\n")
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(lines))


@contextmanager
def warnings_of(logger: str) -> Iterator[list[str]]:
    """The warnings that a logger gives meanwhile."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: found.append(entry.getMessage())
    logging.getLogger(logger).addHandler(handler)
    yield found
    logging.getLogger(logger).removeHandler(handler)


def python_blocks(text: str) -> list[str]:
    """The Python code of a page."""
    return [block.split("```")[0] for block in text.split("```python\n")[1:]]
