"""DenseNet-BC for CIFAR images, read from a checkpoint file."""

import pytest
import torch

from maep_hf.cifar_densenet import CifarDenseNet, published
from maep_hf.classifier_sources import load_frozen_classifier
from maep_hf.folding import fold_batch_norm


def small(seed: int = 0) -> CifarDenseNet:
    """A network of 2 layers a block whose normalisations have seen data."""
    torch.manual_seed(seed)
    network = CifarDenseNet(num_labels=7, growth=4, layers=2).train()
    with torch.no_grad():
        network(torch.randn(16, 3, 32, 32) * 2 + 1)
    return network.eval()


def test_published_size_is_that_of_the_paper():
    network = CifarDenseNet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 769_162  # 0.8 million (their table 2)
    assert sum(isinstance(module, torch.nn.Conv2d | torch.nn.Linear) for module in network.modules()) == 100


def test_folding_changes_nothing():
    network, pixels = small(), torch.rand(2, 3, 32, 32)
    before = network(pixels)
    fold_batch_norm(network)
    assert sum(isinstance(module, torch.nn.Identity) for module in network.modules()) == 3 * 2
    torch.testing.assert_close(network(pixels), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrapped", [True, False])
def test_file_gives_a_classifier_of_pixels(wrapped, tmp_path):
    network, file = small(), tmp_path / "checkpoint.pth.tar"
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"epoch": 100, "state_dict": state} if wrapped else state, file)
    classifier = load_frozen_classifier(f"python:maep_hf.cifar_densenet:published:{file}")
    kernels = [weight for weight in classifier.parameters() if weight.dim() == 4]
    assert kernels and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    logits = classifier(pixels)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    torch.testing.assert_close(logits, network((pixels - mean) / std), atol=1e-5, rtol=1e-4)
    assert torch.autograd.grad(logits.sum(), pixels)[0].abs().min(dim=0).values.max() > 0


def test_other_files_are_named(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        published(str(tmp_path / "nowhere.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="text.pth is no checkpoint"):
        published(str(tmp_path / "text.pth"))
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no DenseNet-BC"):
        published(str(tmp_path / "other.pth"))
    state = small().state_dict()
    del state["trans1.conv1.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="trans1.conv1.weight"):
        published(str(tmp_path / "part.pth"))
