"""The CIFAR ResNet: architecture, saving, remote code, conversion of published weights."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

from maep_hf.configuration_cifar_resnet import CifarResNetConfig
from maep_hf.convert_cifar_resnet import convert_file, convert_state_dict
from maep_hf.data import CIFAR10_CLASSES
from maep_hf.folding import fold_batch_norm
from maep_hf.modeling_cifar_resnet import CifarResNetBlock, CifarResNetForImageClassification


def tiny_model(**kwargs) -> CifarResNetForImageClassification:
    torch.manual_seed(0)
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=4, **(kwargs or {"num_labels": 10})))
    # Statistics that are not those of a fresh network, so that losing them shows.
    model.train()
    model(torch.randn(8, model.config.num_channels, 16, 16))
    return model.eval()


def published_state_dict(depth: int = 14, width: int = 4) -> dict[str, torch.Tensor]:
    """Random weights under the published names, written out independently of the model."""
    torch.manual_seed(1)
    tensors = {"conv1.weight": torch.randn(width, 3, 3, 3) * 0.2}

    def batch_norm(name: str, channels: int) -> None:
        tensors[f"{name}.weight"] = torch.rand(channels) + 0.5
        tensors[f"{name}.bias"] = torch.randn(channels) * 0.1
        tensors[f"{name}.running_mean"] = torch.randn(channels) * 0.1
        tensors[f"{name}.running_var"] = torch.rand(channels) + 0.5

    batch_norm("bn1", width)
    inside = width
    for stage in range(3):
        outside = width * 2**stage
        for block in range((depth - 2) // 6):
            name = f"layer{stage + 1}.{block}"
            tensors[f"{name}.conv1.weight"] = torch.randn(outside, inside, 3, 3) * 0.2
            tensors[f"{name}.conv2.weight"] = torch.randn(outside, outside, 3, 3) * 0.2
            batch_norm(f"{name}.bn1", outside)
            batch_norm(f"{name}.bn2", outside)
            inside = outside
    tensors["linear.weight"] = torch.randn(10, inside)
    tensors["linear.bias"] = torch.randn(10)
    return tensors


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018)])
def test_size_of_the_published_networks(depth, parameters):
    with torch.device("meta"):
        model = CifarResNetForImageClassification(CifarResNetConfig(depth=depth, num_labels=10))
    assert model.num_parameters() == parameters
    weighted = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == depth


def test_shortcut_subsamples_and_pads_channels_on_both_sides():
    block = CifarResNetBlock(4, 8, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # the residual branch is silent
    x = torch.rand(2, 4, 9, 12)
    out = block(x)
    assert out.shape == (2, 8, 5, 6)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert out[:, :2].abs().max() == 0 and out[:, 6:].abs().max() == 0


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (19, 41), (64, 33)])
def test_any_image_size(size):
    logits = tiny_model()(torch.randn(2, 3, *size)).logits
    assert logits.shape == (2, 10) and logits.isfinite().all()


def test_outputs():
    model = tiny_model()
    x, labels = torch.randn(3, 3, 16, 16), torch.tensor([1, 0, 9])
    output = model(x, labels=labels, output_hidden_states=True)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    assert [tuple(h.shape[1:]) for h in output.hidden_states] == [(4, 16, 16), (4, 16, 16), (8, 8, 8), (16, 4, 4)]
    soft = torch.nn.functional.one_hot(labels, 10).float()
    assert torch.allclose(model(x, labels=soft).loss, output.loss)
    as_tuple = model(x, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits)
    assert model(x).loss is None


def test_bfloat16_weights_take_float32_images():
    assert tiny_model().to(torch.bfloat16)(torch.randn(1, 3, 16, 16)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth": 21}, "6n \\+ 2.*20 and 26"),
        ({"depth": 2}, "6n \\+ 2"),
        ({"depth": 20.0}, "depth.*positive integer"),
        ({"width": 0}, "width.*positive integer"),
        ({"num_channels": True}, "num_channels.*positive integer"),
        ({"id2label": {0: "a", 2: "b"}}, "id2label"),
        ({"id2label": {0: "a", 1: "a"}}, "distinct"),
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"a": 1, "b": 0}}, "inverse"),
    ],
)
def test_configuration_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CifarResNetConfig(**kwargs)


def test_configuration_labels():
    config = CifarResNetConfig(id2label={0: "cat", 1: "dog", 2: "cow"})
    assert config.num_labels == 3 and config.label2id == {"cat": 0, "dog": 1, "cow": 2}


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 1, 32, 32), "num_channels=3"), ((3, 32, 32), "shape"), ((2, 3, 7, 32), "at least 8")],
)
def test_image_errors(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.zeros(shape))


def test_label_errors():
    with pytest.raises(ValueError, match="labels"):
        tiny_model()(torch.zeros(2, 3, 8, 8), labels=torch.zeros(3, dtype=torch.long))


def test_save_and_load_through_the_auto_classes(tmp_path):
    model = tiny_model(id2label={0: "cat", 1: "dog"})
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CifarResNetConfig)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is CifarResNetForImageClassification
    assert loaded.config.id2label == {0: "cat", 1: "dog"}
    own = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_another_number_of_classes_on_loading(tmp_path):
    model = tiny_model(id2label={0: "cat", 1: "dog"})
    model.save_pretrained(tmp_path)
    loaded = CifarResNetForImageClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert loaded.config.num_labels == 5 and loaded.classifier.weight.shape[0] == 5
    assert torch.equal(loaded.conv1.weight, model.conv1.weight)


def test_batch_norm_buffers_that_a_file_lacks_are_not_garbage(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    kept = {name: tensor for name, tensor in model.state_dict().items() if "running" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = CifarResNetForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.bn1.running_mean, torch.zeros(4)) and torch.equal(loaded.bn1.running_var, torch.ones(4))


def test_remote_code_without_the_package(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    assert "auto_map" in json.loads((tmp_path / "model" / "config.json").read_text())
    torch.manual_seed(2)
    x = torch.randn(1, 3, 16, 16)
    code = f"""
import os, sys
os.environ["HF_MODULES_CACHE"] = {str(tmp_path / "modules")!r}
sys.modules["maep_hf"] = None  # importing it raises
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
torch.manual_seed(2)
print(model(torch.randn(1, 3, 16, 16)).logits.flatten().tolist())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    logits = torch.tensor(json.loads(result.stdout.strip().splitlines()[-1]))
    assert torch.allclose(logits, model(x).logits.flatten(), atol=1e-5)


def reference_forward(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network of the published weights in functional form."""
    F = torch.nn.functional

    def norm(name: str, h: torch.Tensor) -> torch.Tensor:
        mean, var, weight, bias = (tensors[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(h, mean, var, weight, bias)

    h = F.relu(norm("bn1", F.conv2d(x, tensors["conv1.weight"], padding=1)))
    blocks = sorted({key.rsplit(".", 2)[0] for key in tensors if key.startswith("layer")})
    for name in blocks:
        weight = tensors[f"{name}.conv1.weight"]
        stride = 1 if weight.shape[0] == weight.shape[1] else 2
        new = F.relu(norm(f"{name}.bn1", F.conv2d(h, weight, stride=stride, padding=1)))
        new = norm(f"{name}.bn2", F.conv2d(new, tensors[f"{name}.conv2.weight"], padding=1))
        if stride == 2:
            zeros = torch.zeros_like(new[:, : weight.shape[0] // 4])
            h = torch.cat([zeros, h[:, :, ::2, ::2], zeros], dim=1)
        h = F.relu(new + h)
    return F.linear(h.flatten(2).mean(-1), tensors["linear.weight"], tensors["linear.bias"])


def save_published(tensors, path):
    """As the authors have it: a training checkpoint of a model in `DataParallel`."""
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}, "best_prec1": 9.0}, path)


@pytest.mark.parametrize("file, save", [("weights.safetensors", save_file), ("weights.th", save_published)])
def test_converted_weights_compute_the_published_function(tmp_path, file, save):
    tensors = published_state_dict()
    save(tensors, tmp_path / file)
    convert_file(tmp_path / file, tmp_path / "model")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    assert model.config.depth == 14 and model.config.width == 4
    assert tuple(model.config.id2label.values()) == CIFAR10_CLASSES
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model(x).logits, reference_forward(tensors, x), atol=1e-4)

    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert dict(processor.size) == {"height": 32, "width": 32} and processor.image_mean[0] == 0.485
    classify = pipeline("image-classification", model=str(tmp_path / "model"))
    from PIL import Image

    assert classify(Image.new("L", (50, 40), 128))[0]["label"] in CIFAR10_CLASSES


def test_converter_refuses_other_files(tmp_path):
    tensors = published_state_dict()
    with pytest.raises(ValueError, match="no `conv1.weight`"):
        convert_state_dict({"fc.weight": torch.zeros(10, 3)})
    with pytest.raises(ValueError, match="unexpected layer1.0.extra"):
        convert_state_dict(tensors | {"layer1.0.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="lacks stages.2.1.bn2.bias"):
        convert_state_dict({k: v for k, v in tensors.items() if k != "layer3.1.bn2.bias"})
    with pytest.raises(ValueError, match="other shapes for bn1.weight: \\(7,\\)"):
        convert_state_dict(tensors | {"bn1.weight": torch.zeros(7)})
    with pytest.raises(ValueError, match="`labels` has 2"):
        convert_state_dict(tensors, labels=("a", "b"))
    with pytest.raises(FileNotFoundError, match="absent"):
        convert_file(tmp_path / "absent.safetensors", tmp_path / "out")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        convert_file(tmp_path / "text.safetensors", tmp_path / "out")
    (tmp_path / "text.th").write_text("not tensors")
    with pytest.raises(ValueError, match="no checkpoint of torch"):
        convert_file(tmp_path / "text.th", tmp_path / "out")
    (tmp_path / "text.th").write_text("hello world")  # bytes that mean something to pickle
    with pytest.raises(ValueError, match="no checkpoint of torch"):
        convert_file(tmp_path / "text.th", tmp_path / "out")
    for held, named in (
        ([torch.zeros(1)], "holds a list, not tensors"),
        ({"state_dict": None}, "holds a NoneType, not tensors"),
        ({0: torch.zeros(1)}, "holds a Tensor under 0,"),
        ({"epoch": 3}, "holds a int under 'epoch'"),
    ):
        torch.save(held, tmp_path / "other.th")
        with pytest.raises(ValueError, match=f"other.th {named}"):
            convert_file(tmp_path / "other.th", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folded_batch_norm_gives_the_same_logits():
    torch.manual_seed(0)
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=4, num_labels=3))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight)
    images = torch.randn(4, 3, 16, 16)
    expected = model.eval()(images).logits
    fold_batch_norm(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(images).logits, expected, atol=1e-4, rtol=1e-4)
