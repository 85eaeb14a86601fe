"""What the tests of data, training and adaptation share: tiny images, a tiny classifier and a tiny purifier."""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

# A worker of pytest-xdist keeps to one core: threads of several workers on the same cores wait for each other, which is
# many times slower than no threads. Processes that tests start inherit it.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if _WORKER and hasattr(os, "sched_setaffinity"):
    _CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_CORES[int(_WORKER.removeprefix("gw")) % len(_CORES)]})

# Read when the libraries are imported: no network, no cache in the user's home, no accelerator.
_CACHE = tempfile.mkdtemp(prefix="maep-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = _CACHE
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # of 5 seconds after each epoch of a shuffled stream

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "train"))  # as for a script that is started there, but train/evaluate.py hides no library
CLASSES = ["stripes", "blob", "ramp"]
SIZE = 16
TINY = {
    "image_size": SIZE, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32, "local_branch_layers": 1,
    "local_branch_channels": 8, "pixel_loss": "l2",
}  # fmt: skip


def pytest_sessionfinish() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state in the process, and the loop sets the number of threads."""
    from accelerate.state import AcceleratorState, GradientState

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def picture(index: int, width: int = 24, height: int = 20) -> Image.Image:
    """A picture of class `index % 3`, different for every index."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[0:height, 0:width]
    shift, tint = rng.integers(0, 8), rng.uniform(0.4, 1, 3)
    pattern = [
        ((x + shift) // 4 % 2) * 200,
        255 * np.exp(-((x - 8 - shift) ** 2 + (y - 10) ** 2) / 40),
        255 * x / width,
    ][index % 3]
    return Image.fromarray(
        (pattern[..., None] * tint + rng.uniform(0, 40, (height, width, 3))).clip(0, 255).astype("u1")
    )


def image_rows(count: int, first: int = 0, labelled: bool = True):
    """A `datasets.Dataset` of [`picture`]s with the columns image and label."""
    rows: dict = {"image": [picture(i) for i in range(first, first + count)]}
    features = {"image": datasets.Image()}
    if labelled:
        rows["label"] = [i % 3 for i in range(first, first + count)]
        features["label"] = datasets.ClassLabel(names=CLASSES)
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """24 training and 9 test images, as parquet files of a folder."""
    folder = tmp_path_factory.mktemp("images")
    image_rows(24).to_parquet(folder / "train.parquet")
    image_rows(9, first=24).to_parquet(folder / "test.parquet")
    return folder


def save_classifier(folder: Path, classes: int = 3, seed: int = 0, width: int = 4) -> Path:
    """An untrained CIFAR ResNet-8 with its image processor."""
    from transformers import ViTImageProcessor

    from maep_hf import CifarResNetConfig, CifarResNetForImageClassification

    torch.manual_seed(seed)
    names = {i: f"class{i}" for i in range(classes)}
    config = CifarResNetConfig(depth=8, width=width, id2label=names, label2id={v: k for k, v in names.items()})
    model = CifarResNetForImageClassification(config)
    for module in model.modules():  # untrained statistics would not show whether they are left alone
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"))


def tiny_purifier(trained: bool = True, **overrides):
    """A purifier of a few thousand weights; `trained` gives its last layer small weights instead of zeros."""
    from maep_hf import MAEPConfig, MAEPModel

    torch.manual_seed(3)
    model = MAEPModel(MAEPConfig(**TINY | overrides))
    if trained:
        if model.local_branch is not None:
            torch.nn.init.normal_(model.local_branch.head.weight, std=0.02)
        torch.nn.init.normal_(model.decoder.head.weight, std=0.02)
    return model


class FragileClassifier(torch.nn.Module):
    """Classes by random projections of what sets an image apart from the mean of `pixels`: as accurate on its own
    predictions as it is easy to attack."""

    def __init__(self, pixels: torch.Tensor, num_classes: int = 3):
        super().__init__()
        self.num_classes = num_classes
        generator = torch.Generator().manual_seed(0)
        self.projection = torch.nn.Linear(pixels[0].numel(), self.num_classes, bias=False).requires_grad_(False)
        self.projection.weight.copy_(torch.randn(self.projection.weight.shape, generator=generator))
        self.register_buffer("mean", pixels.mean(0))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection((pixel_values - self.mean).flatten(1))


def pixels_of(count: int) -> torch.Tensor:
    """The first pictures as (N, 3, SIZE, SIZE) uint8."""
    arrays = [np.asarray(picture(i, SIZE, SIZE)) for i in range(count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="session")
def purifier_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("purifier")
    tiny_purifier().save_pretrained(folder)
    return folder


def load_script(name: str):
    """`train/NAME.py` as a module."""
    spec = importlib.util.spec_from_file_location(f"train_{name}", ROOT / "train" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
