"""A purifier from the Hub in a fresh environment: its code comes from the repository, for this package is not there."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fresh_environment import clean_variables, make_environment, required
from hub_helpers import purifier
from PIL import Image

pytest_plugins = ["hub_client"]
REPO = "someone/remote-code"

ABSENT = """
import importlib.util, sys
for name in {absent}:
    assert importlib.util.find_spec(name) is None, name + " can be imported"
"""

# With torch and transformers alone
MODEL = """
import torch
from transformers import AutoModel

try:
    AutoModel.from_pretrained("{repo}", trust_remote_code=False)
    raise SystemExit("ran code without being trusted to")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
for revision in ("v1", None):
    model = AutoModel.from_pretrained("{repo}", trust_remote_code=True, revision=revision)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
pixels = torch.linspace(0, 1, 3 * 21 * 40).reshape(1, 3, 21, 40)
torch.save(model.purify(pixels).detach(), "purified.pt")
"""

# With Pillow too, which transformers asks for before it makes any image processor
PICTURES = """
from transformers import AutoImageProcessor, pipeline

processor = AutoImageProcessor.from_pretrained("{repo}", trust_remote_code=True, revision="v1")
assert processor("picture.png", return_tensors="pt").pixel_values.shape == (1, 3, 21, 40)
try:
    pipeline("image-purification", model="{repo}")
    raise SystemExit("ran code without being trusted to")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
for task in ("image-purification", None):
    pipe = pipeline(task, model="{repo}", trust_remote_code=True, device="cpu")
results = pipe(["picture.png", "picture.png"], batch_size=2, return_difference=True)
results[0]["purified"].save("purified.png")
results[1]["difference"].save("difference.png")
pipe.save_pretrained("again")
again = pipeline("image-purification", model="./again", trust_remote_code=True, device="cpu")
assert again("picture.png").tobytes() == results[0]["purified"].tobytes()
for part in (pipe, pipe.model, pipe.image_processor, processor):
    assert type(part).__module__.startswith("transformers_modules."), type(part)
"""


def push(folder: Path) -> None:
    from maep_hf.hub import push_to_hub

    purifier(3).save_pretrained(folder)
    push_to_hub(folder, REPO, tag="v1")


@pytest.fixture(scope="module")
def pushed(client, hub, tmp_path_factory):
    client(push, tmp_path_factory.mktemp("pushed"))
    return hub


def run(hub, folder: Path, distributions: dict, code: str, absent: tuple[str, ...]) -> None:
    python = make_environment(folder / "environment", distributions)
    code = ABSENT.format(absent=absent) + code.format(repo=REPO)
    variables = clean_variables(**hub.environment(str(folder / "home")))
    done = subprocess.run([python, "-c", code], cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


OTHERS = ("maep_hf", "peft", "datasets", "accelerate", "matplotlib", "evaluate", "pandas")


def test_torch_and_transformers_alone_purify(pushed, tmp_path):
    import torch

    run(pushed, tmp_path, required("torch", "transformers"), MODEL, (*OTHERS, "PIL"))
    pixels = torch.linspace(0, 1, 3 * 21 * 40).reshape(1, 3, 21, 40)
    expected = purifier(3).purify(pixels).detach()
    assert (expected - pixels).abs().max() > 0.01  # else this shows nothing
    torch.testing.assert_close(torch.load(tmp_path / "purified.pt"), expected, atol=1e-6, rtol=0)


def test_pictures_and_the_custom_pipeline(pushed, tmp_path):
    from maep_hf import ImagePurificationPipeline

    picture = Image.effect_noise((40, 21), 60).convert("RGB")
    picture.save(tmp_path / "picture.png")
    run(pushed, tmp_path, required("torch", "transformers", "pillow"), PICTURES, OTHERS)
    expected = ImagePurificationPipeline(purifier(3), task="image-purification")(picture)
    found = np.asarray(Image.open(tmp_path / "purified.png")).astype(int)
    assert np.abs(found - np.asarray(expected).astype(int)).max() <= 1
    assert Image.open(tmp_path / "difference.png").size == (40, 21)
    saved = json.loads((tmp_path / "again/config.json").read_text())
    assert saved["custom_pipelines"]["image-purification"]["pt"] == ["AutoModel"]
