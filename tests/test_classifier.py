"""PixelClassifier, PurifiedClassifier, load_classifier: preprocessing as tensors, gradients, plain logits."""

import json
import types
import warnings
from dataclasses import replace
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import tiny_purifier
from PIL import Image
from torch import nn
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.modeling_outputs import ImageClassifierOutput

from maep_hf.classifier import PixelClassifier, PurifiedClassifier, call_purifier, load_classifier
from maep_hf.classifier_sources import load_frozen_classifier
from maep_hf.configuration_cifar_resnet import CifarResNetConfig
from maep_hf.convert_cifar_resnet import image_processor
from maep_hf.modeling_cifar_resnet import CifarResNetForImageClassification
from maep_hf.preprocessing import (
    PixelPreprocessing,
    PreprocessingSpec,
    check_against_processor,
    explicit_preprocessing,
    read_preprocessing,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def cifar_resnet(**kwargs) -> CifarResNetForImageClassification:
    torch.manual_seed(0)
    return CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=4, **(kwargs or {"num_labels": 10})))


class Flat(nn.Module):
    """A classifier that remembers what it was given."""

    def __init__(self, classes: int = 5):
        super().__init__()
        torch.manual_seed(0)
        self.classes = classes
        self.fc = nn.Linear(3, classes)

    def forward(self, x):
        self.seen = x
        return self.fc(x.mean((2, 3)))


class Shift(nn.Module):
    """A purifier with a method of its own and a linear layer for LoRA."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.mix.weight)

    def purify(self, pixel_values, strength: float = 1.0):
        return self.mix(pixel_values.movedim(1, -1)).movedim(-1, 1) * strength

    def forward(self, pixel_values):
        raise AssertionError("purify is the method to call")


def test_normalises_and_leaves_a_fitting_image_unresized():
    model = Flat()
    pixels = torch.rand(2, 3, 32, 32)
    logits = PixelClassifier(model, image_processor())(pixels)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(model.seen, (pixels - mean) / std, atol=1e-6)
    assert isinstance(logits, torch.Tensor) and logits.shape == (2, 5)


def photo(width: int, height: int) -> Image.Image:
    """Smooth random colours, as photographs are beside noise; in all three channels different."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


PROCESSORS = [
    ("ViTImageProcessorPil", {}),
    ("ViTImageProcessorPil", {"size": {"height": 96, "width": 64}, "resample": 3}),
    ("ViTImageProcessorPil", {"resample": 0}),
    ("ViTImageProcessorPil", {"do_normalize": False}),
    ("ViTImageProcessorPil", {"do_resize": False}),
    ("ViTImageProcessorPil", {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
    ("ViTImageProcessorPil", {"do_rescale": False}),
    ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 224}}),
    ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 384}}),
    ("BitImageProcessorPil", {"size": {"shortest_edge": 256}}),
    ("BitImageProcessorPil", {"size": {"shortest_edge": 64}, "crop_size": {"height": 96, "width": 80}}),
    ("CLIPImageProcessorPil", {}),
    ("DeiTImageProcessorPil", {}),
    ("EfficientNetImageProcessorPil", {}),
    ("EfficientNetImageProcessorPil", {"rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False}),
    ("LevitImageProcessorPil", {}),
    ("PoolFormerImageProcessorPil", {}),
    ("MobileViTImageProcessorPil", {}),
    (
        "BitImageProcessorPil",
        {"size": {"shortest_edge": 64, "longest_edge": 80}, "resample": 2, "do_center_crop": False},
    ),
    ("BitImageProcessorPil", {"size": {"shortest_edge": 64, "longest_edge": 90}, "crop_size": 56}),
    ("TextNetImageProcessorPil", {"size": {"shortest_edge": 96}}),
    ("TextNetImageProcessorPil", {"size": {"shortest_edge": 90}, "size_divisor": 7, "do_center_crop": True}),
]


@pytest.mark.parametrize(("name", "options"), PROCESSORS)
@pytest.mark.parametrize("shape", [(300, 231), (160, 240)])
def test_preprocessing_equals_the_image_processor(name, options, shape):
    """PIL rounds to 8 bits after each of its two resize passes: half a level on average is the tolerance."""
    processor = getattr(transformers, name)(**options)
    image = photo(*shape)
    expected = torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"]).float()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    preprocessing = PixelPreprocessing(read_preprocessing(processor), always_resize=True)
    actual = preprocessing(pixels)
    assert actual.shape == expected.shape
    error = (actual - expected).abs() * preprocessing.std * 255
    assert error.mean() < 0.5 and error.max() < 6


def test_an_edge_that_may_become_so_long_is_as_long_as_transformers_has_it():
    for height, width in [(333, 500), (500, 333), (64, 300), (65, 66), (53, 80), (100, 100), (7, 9), (300, 231)]:
        for longest in (65, 79, 80, 97, 500):
            spec = PreprocessingSpec(shortest_edge=64, longest_edge=longest)
            assert spec.resized(height, width) == get_size_with_aspect_ratio((height, width), 64, longest)


def test_a_specification_reads_as_it_did_where_it_says_no_more():
    """Fingerprints of stored records are of what it reads as."""
    spec = PreprocessingSpec(shortest_edge=64, num_channels=3)
    assert repr(spec) == (
        "PreprocessingSpec(size=None, shortest_edge=64, longest_edge=None, cover=None, crop_size=None, "
        "interpolation='bilinear', reverse_channels=False, mean=(0.0,), std=(1.0,), num_channels=3)"
    )
    assert repr(replace(spec, multiple_of=32)).endswith("num_channels=3, multiple_of=32)")


def test_an_image_of_the_input_size_is_fed_as_it_is_unless_told_otherwise():
    processor = transformers.DeiTImageProcessorPil()  # resizes to 256, crops 224
    pixels = torch.rand(1, 3, 224, 224)
    plain = PixelClassifier(Flat(), processor)
    assert torch.allclose(plain.preprocessing(pixels) * plain.preprocessing.std + plain.preprocessing.mean, pixels)
    enlarged = PixelClassifier(Flat(), processor, always_resize=True).preprocessing(pixels)
    assert enlarged.shape == pixels.shape and not torch.allclose(enlarged, plain.preprocessing(pixels), atol=1e-2)


def test_what_a_processor_does_beyond_its_options_is_refused():
    with pytest.raises(ValueError, match="PerceiverImageProcessor.*not fully described"):
        PixelClassifier(Flat(), transformers.PerceiverImageProcessorPil())
    # ... unless everything is said explicitly
    PixelClassifier(Flat(), transformers.PerceiverImageProcessorPil(), size=64, image_mean=MEAN, image_std=STD)

    class Inverting(transformers.ViTImageProcessorPil):
        def rescale(self, image, scale, **kwargs):
            return 1 - super().rescale(image, scale)

    processor = Inverting()
    with pytest.raises(ValueError, match="mean difference"):
        check_against_processor(PixelPreprocessing(read_preprocessing(processor)), processor)


@pytest.mark.parametrize("turned", ["landscape", "portrait"])
def test_a_stretch_of_a_few_per_cent_is_refused(turned):
    """A smooth image shows none, and a processor may treat images of one aspect ratio in another way."""

    class Stretching(transformers.ViTImageProcessorPil):
        def resize(self, image, size, **kwargs):
            height, width = image.shape[-2:]
            if (height > width) == (turned == "portrait"):
                image = image[..., : height - height // 40, width // 40 :]
            return super().resize(image, size, **kwargs)

    with pytest.raises(ValueError, match="Stretching is not fully described .*mean difference"):
        PixelClassifier(Flat(), Stretching(size={"height": 48, "width": 48}))


def test_the_check_says_once_what_fails_on_every_image():
    class Failing(transformers.ViTImageProcessorPil):
        def resize(self, image, size, **kwargs):
            raise RuntimeError("no resize")

    with pytest.warns(UserWarning, match="could not be run on a test image: no resize") as caught:
        PixelClassifier(Flat(), Failing())
    assert len(caught) == 1


@pytest.mark.parametrize("shape", [(2, 3, 40, 56), (1, 3, 16, 20), (1, 3, 32, 32)])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"size": 32},
        {"size": 32, "interpolation": "bicubic"},
        {"size": {"shortest_edge": 24}},
        {"do_resize": False},
    ],
)
def test_gradients_reach_the_pixels(shape, kwargs):
    pixels = torch.rand(shape, requires_grad=True)
    classifier = PixelClassifier(cifar_resnet(), image_mean=MEAN, image_std=STD, **kwargs)
    (gradient,) = torch.autograd.grad(classifier(pixels)[:, 0].sum(), pixels)
    assert gradient.isfinite().all() and (gradient.abs().amax((1, 2, 3)) > 0).all()


def test_gradient_of_the_preprocessing_is_exact():
    spec = PreprocessingSpec(shortest_edge=7, crop_size=(6, 9), mean=MEAN, std=STD)
    pixels = torch.rand(1, 3, 9, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PixelPreprocessing(spec), (pixels,))


def test_explicit_arguments_override_the_processor():
    processor = image_processor()
    spec = PixelClassifier(Flat(), processor, size=(20, 24), image_mean=0.5, interpolation="bicubic").preprocessing.spec
    assert spec.size == (20, 24) and spec.mean == (0.5,) and spec.std == STD and spec.interpolation == "bicubic"
    spec = PixelClassifier(Flat(), processor, do_resize=False).preprocessing.spec
    assert not spec.resizes and spec.mean == MEAN
    crop = transformers.BitImageProcessorPil()
    assert PixelClassifier(Flat(), crop, size=64).preprocessing.spec.crop_size is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"size": -1}, "size"),
        ({"size": (1, 2, 3)}, "size"),
        ({"size": {"longest_edge": 4}}, "shortest_edge"),
        ({"size": 8, "do_resize": False}, "contradicts"),
        ({"do_resize": True}, "needs a `size`"),
        ({"image_std": (0.1, 0.0, 0.1)}, "image_std"),
        ({"image_mean": (0.1, 0.2, 0.3), "image_std": (0.1, 0.2)}, "channels"),
        ({"image_mean": float("nan")}, "finite"),
        ({"interpolation": "lanczos"}, "interpolation"),
    ],
)
def test_explicit_argument_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        explicit_preprocessing(PreprocessingSpec(), **kwargs)


def test_a_filter_without_tensor_form_needs_a_word():
    processor = transformers.ViTImageProcessorPil(resample=1)
    with pytest.raises(ValueError, match="lanczos.*python:MODULE:FUNCTION"):
        PixelClassifier(Flat(), processor)
    assert PixelClassifier(Flat(), processor, interpolation="bicubic").preprocessing.spec.interpolation == "bicubic"
    with pytest.raises(TypeError, match="image_processor"):
        PixelClassifier(Flat(), lambda image: image)
    with pytest.raises(TypeError, match="AutoImageProcessor"):
        PixelClassifier(Flat(), processor.to_dict())


def test_timm_configuration_without_timm():
    model = Flat()
    model.pretrained_cfg = {
        "input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bicubic", "mean": MEAN, "std": STD,
    }  # fmt: skip
    model.num_classes = 5
    classifier = PixelClassifier(model)
    spec = classifier.preprocessing.spec
    assert (spec.shortest_edge, spec.crop_size, spec.interpolation) == (256, (224, 224), "bicubic")
    assert spec.mean == MEAN and spec.num_channels == 3 and classifier.num_labels == 5
    classifier(torch.rand(1, 3, 300, 400))
    assert model.seen.shape == (1, 3, 224, 224)
    # the same recipe as an image processor of transformers states it
    bit = transformers.BitImageProcessorPil(size={"shortest_edge": 256}, image_mean=MEAN, image_std=STD)
    pixels = torch.rand(1, 3, 301, 417)
    assert torch.allclose(classifier.preprocessing(pixels), PixelPreprocessing(read_preprocessing(bit))(pixels))

    unsaid = read_preprocessing({"input_size": (3, 240, 240)})  # timm's defaults; it rounds the edge down
    assert (unsaid.shortest_edge, unsaid.crop_size, unsaid.interpolation) == (274, (240, 240), "bicubic")
    squash = read_preprocessing({"input_size": (3, 32, 64), "crop_pct": 1.0, "crop_mode": "squash"})
    assert squash.size == (32, 64)
    cover = read_preprocessing({"input_size": (3, 32, 64), "crop_pct": 1.0})
    assert PixelPreprocessing(cover)(torch.rand(1, 3, 100, 90)).shape == (1, 3, 32, 64)
    with pytest.raises(ValueError, match="crop_mode='border'"):
        read_preprocessing({"input_size": (3, 32, 32), "crop_mode": "border"})


def test_timm_wrapper_configuration_is_found():
    model = Flat()
    model.config = types.SimpleNamespace(
        pretrained_cfg={"input_size": [3, 32, 32], "crop_pct": 1.0, "mean": MEAN, "std": STD}, num_labels=5
    )
    spec = PixelClassifier(model).preprocessing.spec
    assert spec.crop_size == (32, 32) and spec.mean == MEAN


def test_accepts_what_classifiers_return():
    pixels = torch.rand(2, 3, 8, 8)
    expected = pixels.mean((2, 3))
    for classifier in (
        lambda x: x.mean((2, 3)),
        lambda x: ImageClassifierOutput(logits=x.mean((2, 3))),
        lambda x: {"logits": x.mean((2, 3))},
        lambda x: types.SimpleNamespace(logits=x.mean((2, 3))),
    ):
        assert torch.equal(PixelClassifier(classifier)(pixels), expected)
    with pytest.raises(TypeError, match="got tuple"):
        PixelClassifier(lambda x: (x,))(pixels)
    with pytest.raises(ValueError, match=r"shape \(B, K\)"):
        PixelClassifier(lambda x: x)(pixels)


def test_a_real_transformers_classifier_of_another_size():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    classifier = PixelClassifier(model, transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}))
    assert classifier(torch.rand(2, 3, 50, 70)).shape == (2, 3)
    assert classifier.config is config and classifier.num_labels == 3 and classifier.id2label[2] == "LABEL_2"


def test_a_transformers_model_without_processor_warns():
    with pytest.warns(UserWarning, match="without normalisation"):
        PixelClassifier(cifar_resnet())


def test_nan_is_not_hidden():
    assert PixelClassifier(lambda x: x.mean((2, 3)) * float("nan"))(torch.rand(1, 3, 8, 8)).isnan().all()


def test_precision_follows_the_classifier():
    model = cifar_resnet().to(torch.bfloat16)
    classifier = PixelClassifier(model, image_processor())
    logits = classifier(torch.rand(1, 3, 32, 32))
    assert logits.dtype == torch.float32
    classifier.half()
    assert torch.equal(classifier.preprocessing.mean.flatten(), torch.tensor(MEAN))
    assert classifier.preprocessing.mean.dtype == torch.float32
    assert not classifier.preprocessing.state_dict()


def test_eval_mode_and_gradients_of_parameters():
    model, purifier = cifar_resnet().train(), Shift().train()
    defended = PurifiedClassifier(purifier, model, image_processor())
    assert not any(module.training for module in defended.modules())
    assert all(p.requires_grad for p in defended.parameters())
    defended(torch.rand(2, 3, 32, 32)).sum().backward()
    assert purifier.mix.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "/ 255"),
        (np.zeros((1, 3, 32, 32)), TypeError, "tensor"),
        (torch.zeros(3, 32, 32), ValueError, "batch dimension"),
        (torch.zeros(1, 1, 32, 32), ValueError, "grey"),
        (torch.zeros(1, 32, 32, 3), ValueError, "channels come second"),
    ],
)
@pytest.mark.parametrize("purifier", [None, Shift()])
def test_input_errors(pixels, error, message, purifier):
    defended = PurifiedClassifier(purifier, cifar_resnet(), image_processor())
    if isinstance(purifier, Shift):
        purifier.config = types.SimpleNamespace(num_channels=3)
    with pytest.raises(error, match=message):
        defended(pixels)


def test_grey_classifier():
    model = cifar_resnet(num_channels=1, num_labels=10)
    classifier = PixelClassifier(model, image_mean=0.5, image_std=0.5)
    assert classifier(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ValueError, match="takes 1"):
        classifier(torch.rand(2, 3, 28, 28))


def test_a_grey_classifier_behind_a_colour_purifier_names_the_way_out():
    purifier = Shift()
    purifier.config = types.SimpleNamespace(num_channels=3)
    classifier = PixelClassifier(cifar_resnet(num_channels=1), image_mean=0.5, image_std=0.5)
    grey = torch.rand(2, 1, 28, 28)
    with pytest.raises(ValueError, match="has 1 channels, but the purifier takes 3 .*expand\\(-1, 3, -1, -1\\)"):
        PurifiedClassifier(purifier, classifier)(grey)
    pixels = grey.expand(-1, 3, -1, -1).clone().requires_grad_()
    with pytest.raises(ValueError, match="has 3 channels, but the classifier takes 1 ") as caught:
        PurifiedClassifier(purifier, classifier)(pixels)
    way_out = str(caught.value).split("`")[-2]  # as it stands in the message
    averaged = eval(way_out, {"torch": torch, "PixelClassifier": PixelClassifier, "classifier": classifier})
    torch.testing.assert_close(averaged(pixels), classifier(grey))
    PurifiedClassifier(purifier, averaged)(pixels).sum().backward()
    assert pixels.grad.abs().sum((0, 2, 3)).min() > 0


def test_grey_timm_classifier():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), Flat())
    model.in_chans = 1
    for channels in (1, 3):  # as timm says, or as the weights of the colour network did
        model.pretrained_cfg = {"input_size": (channels, 28, 28), "crop_pct": 1.0, "mean": MEAN, "std": STD}
        with pytest.raises(ValueError, match="takes 1 channels.*of 3: pass `image_mean` and `image_std`"):
            PixelClassifier(model)
        assert PixelClassifier(model, image_mean=0.5, image_std=[0.25])(torch.rand(2, 1, 28, 28)).shape == (2, 5)


def test_a_purifier_around_another_is_not_bypassed():
    """Only what wraps for several devices stands for what it holds."""

    class Blank(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, pixels):
            return 0 * self.module.purify(pixels)

    purifier, pixels = tiny_purifier().eval(), torch.rand(2, 3, 16, 16)
    assert call_purifier(Blank(purifier), pixels).eq(0).all()
    assert torch.equal(call_purifier(nn.DataParallel(purifier), pixels), purifier.purify(pixels))


def test_parallel_wrappers_keep_the_preprocessing(tmp_path):
    cifar_resnet(num_labels=10).save_pretrained(tmp_path)
    image_processor().save_pretrained(tmp_path)
    plain, pixels = load_classifier(str(tmp_path)), torch.rand(2, 3, 32, 32)
    wrapped = PixelClassifier(nn.DataParallel(plain.classifier))
    assert wrapped.preprocessing.spec == plain.preprocessing.spec != PreprocessingSpec()
    assert wrapped.num_labels == 10 and wrapped.id2label == plain.id2label
    assert torch.equal(wrapped(pixels), plain(pixels))


@pytest.mark.parametrize("wrapper", ["compile", "peft", "compiled peft"])
def test_other_wrappers_keep_the_preprocessing_too(tmp_path, wrapper):
    from peft import LoraConfig, get_peft_model

    cifar_resnet(num_labels=10).save_pretrained(tmp_path)
    image_processor().save_pretrained(tmp_path)
    plain, pixels = load_classifier(str(tmp_path)), torch.rand(2, 3, 32, 32)
    model = plain.classifier
    if "peft" in wrapper:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["classifier"]))
    if "compile" in wrapper:
        model = torch.compile(model, backend="eager")
    wrapped = PixelClassifier(nn.DataParallel(model))
    assert wrapped.preprocessing.spec == plain.preprocessing.spec != PreprocessingSpec()
    assert wrapped.num_labels == 10
    if wrapper == "peft":  # to compile takes its time, and torch 2.6 cannot
        torch.testing.assert_close(wrapped(pixels), plain(pixels))


class Normalising(nn.Module):
    """A module of one's own from [0, 1] pixels to logits, which carries the configuration of the model inside."""

    def __init__(self, folder):
        super().__init__()
        self.model = transformers.AutoModelForImageClassification.from_pretrained(folder)
        self.config = self.model.config

    def forward(self, pixels):
        return self.model((pixels - 0.5) / 0.5).logits


@pytest.mark.parametrize("carried", ["processor", "timm"])
def test_a_module_that_carries_a_configuration_is_not_normalised_a_second_time(tmp_path, carried):
    cifar_resnet().save_pretrained(tmp_path)
    if carried == "processor":
        image_processor().save_pretrained(tmp_path)
    model = Normalising(tmp_path)
    if carried == "timm":
        model.config.pretrained_cfg = {"input_size": [3, 32, 32], "crop_pct": 1.0, "mean": MEAN, "std": STD}
    with pytest.warns(UserWarning, match="without normalisation.*0 and 1 where it normalises itself"):
        classifier = PixelClassifier(model)
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(classifier(pixels), model(pixels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PixelClassifier(model, image_mean=0, image_std=1).preprocessing.spec == PreprocessingSpec(num_channels=3)


def test_offloaded_models_are_fed_where_they_compute(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                                    image_size=16, patch_size=8, num_labels=4)  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    pixels, purifier = torch.rand(2, 3, 16, 16), tiny_purifier().eval()
    expected = PurifiedClassifier(purifier, load_classifier(str(tmp_path / "vit")))(pixels)
    places = {"device_map": {"vit": "disk", "classifier": "cpu"}, "offload_folder": str(tmp_path / "disk")}
    classifier = load_classifier(str(tmp_path / "vit"), **places)
    assert any(parameter.device.type == "meta" for parameter in classifier.parameters())
    offloaded = PurifiedClassifier(accelerate.cpu_offload(purifier, torch.device("cpu")), classifier)
    torch.testing.assert_close(offloaded(pixels), expected)


def exported() -> nn.Module:
    torch.manual_seed(0)
    model, size = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), {0: torch.export.Dim("batch", max=64)}
    return torch.export.export(model.eval(), (torch.rand(4, 3, 8, 8),), dynamic_shapes=(size,)).module()


@pytest.mark.parametrize("nested", [False, True])
def test_exported_programs_are_taken(nested):
    """They have no train() and eval(); what stands beside them has, in whatever order."""
    inner = nn.Sequential(nn.Sequential(exported()), nn.Dropout()) if nested else exported()
    defended, pixels = PurifiedClassifier(nn.Dropout(), inner), torch.rand(2, 3, 8, 8)
    assert not any(module.training for module in defended.modules())
    assert torch.allclose(defended(pixels), exported()(pixels))
    assert defended.train() is defended and defended.purifier.training


def test_logits_that_are_none_are_a_wrong_value_too():
    """A `ValueError` is what the command line tells in one line."""
    classifier = PixelClassifier(lambda pixels: (pixels.mean((2, 3)),))
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match="must return a tensor .* got tuple"):
            classifier(torch.rand(1, 3, 4, 4))


def test_construction_errors():
    with pytest.raises(TypeError, match="load_classifier"):
        PixelClassifier("some/name")
    with pytest.raises(TypeError, match="callable"):
        PixelClassifier(3)
    with pytest.raises(TypeError, match="from_pretrained"):
        PurifiedClassifier("some/name", Flat())
    with pytest.raises(TypeError, match="purify"):
        PurifiedClassifier(3, Flat())
    with pytest.raises(TypeError, match="purify_kwargs"):
        PurifiedClassifier(None, Flat(), purify_kwargs={"strength": 1})
    with pytest.raises(TypeError, match="give size to that one"):
        PurifiedClassifier(None, PixelClassifier(Flat()), size=3)
    with pytest.raises(TypeError, match="already"):
        PixelClassifier(PixelClassifier(Flat()))


def test_every_kind_of_purifier():
    pixels = torch.rand(2, 3, 8, 8)
    bare = PixelClassifier(Flat(), image_mean=MEAN, image_std=STD)
    expected = bare(pixels * 0.5)
    for purifier, kwargs in (
        (Shift(), {"purify_kwargs": {"strength": 0.5}}),
        (lambda x: x * 0.5, {}),
        (lambda x, factor: x * factor, {"purify_kwargs": {"factor": 0.5}}),
        (types.SimpleNamespace(purify=lambda x: x * 0.5), {}),
        (lambda x: types.SimpleNamespace(purified_pixel_values=x * 0.5), {}),
    ):
        defended = PurifiedClassifier(purifier, bare, **kwargs)
        assert torch.allclose(defended(pixels), expected, atol=1e-6)
        assert torch.allclose(defended.purify(pixels), pixels * 0.5, atol=1e-6)
    assert torch.equal(PurifiedClassifier(None, bare)(pixels), bare(pixels))


def test_purifier_output_is_checked():
    pixels = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="keep the shape"):
        PurifiedClassifier(lambda x: x[..., 1:], Flat())(pixels)
    with pytest.raises(TypeError, match="must return a tensor"):
        PurifiedClassifier(lambda x: (x,), Flat())(pixels)


def test_lora_layers_of_a_wrapped_purifier_are_active():
    from peft import LoraConfig, get_peft_model

    purifier = get_peft_model(Shift(), LoraConfig(r=2, target_modules=["mix"]))
    defended = PurifiedClassifier(purifier, Flat())
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.allclose(defended.purify(pixels), pixels, atol=1e-6)
    for name, parameter in purifier.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(parameter, 0.5)
    assert (defended.purify(pixels) - pixels).abs().max() > 1e-3
    with purifier.disable_adapter():
        assert torch.allclose(defended.purify(pixels), pixels, atol=1e-6)


def test_load_classifier(tmp_path):
    model = cifar_resnet(id2label={0: "cat", 1: "dog"}).eval()
    model.save_pretrained(tmp_path)
    image_processor().save_pretrained(tmp_path)
    classifier = load_classifier(str(tmp_path))
    assert not classifier.classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())
    assert classifier.num_labels == 2 and classifier.id2label == {0: "cat", 1: "dog"}
    pixels = torch.rand(2, 3, 48, 40)
    resized = F.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(classifier(pixels), model((resized - mean) / std).logits, atol=1e-4)
    assert load_classifier(tmp_path, dtype=torch.bfloat16)(pixels).dtype == torch.float32
    # a model that was loaded by hand finds the processor that lies beside its weights
    by_hand = PixelClassifier(transformers.AutoModelForImageClassification.from_pretrained(tmp_path))
    assert torch.equal(by_hand(pixels), classifier(pixels))


@pytest.mark.parametrize("load", [load_classifier, load_frozen_classifier])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_loaded_in_float32(tmp_path, load, stored):
    """In float16 the gradients of a confident classifier are rounded to zero, and every attack fails."""
    model, pixels = cifar_resnet(num_labels=4).eval(), torch.rand(1, 3, 32, 32, requires_grad=True)
    with torch.no_grad():
        best, second = PixelClassifier(model, image_processor())(pixels)[0].topk(2).values
        model.classifier.weight.mul_(30 / (best - second))  # exp(-30) is none of float16's numbers
        model.classifier.bias.zero_()
    model.to(stored).save_pretrained(tmp_path)
    image_processor().save_pretrained(tmp_path)
    classifier = load(str(tmp_path))
    logits = classifier(pixels)
    F.cross_entropy(logits, logits.argmax(1)).backward()
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32} and pixels.grad.any()


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_that_is_asked_for_is_given(tmp_path, name):
    cifar_resnet().save_pretrained(tmp_path)
    image_processor().save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, "float16"):
        classifier = load_classifier(tmp_path, **{name: dtype}).classifier
        assert str(classifier.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")


def test_load_classifier_errors(tmp_path):
    with pytest.raises(OSError, match="could not be loaded"):
        load_classifier(str(tmp_path / "absent"), local_files_only=True)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="classifier.weight"):
        load_classifier(tmp_path / "headless")
    transformers.BertConfig().save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="as an image classifier"):
        load_classifier(tmp_path / "text")
    cifar_resnet().save_pretrained(tmp_path / "bare")
    with pytest.warns(UserWarning, match="without normalisation"):
        load_classifier(tmp_path / "bare")


DAMAGE = {
    "cut off": lambda text: text[: len(text) // 2],
    "own code": lambda text: text.replace(
        '"image_processor_type": "ViTImageProcessor"',
        '"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}',
    ),
    "no such class": lambda text: text.replace("ViTImageProcessor", "NoImageProcessor"),
}


def damaged(folder: Path, damage: str) -> Path:
    cifar_resnet().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(DAMAGE[damage](path.read_text()))
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_image_processor_that_cannot_be_loaded_is_not_taken_for_none(tmp_path, monkeypatch, damage):
    """Without it the classifier would run on pixels that are not normalised, with a figure that is wrong."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "n")
    folder = damaged(tmp_path / "model", damage)
    by_hand = transformers.AutoModelForImageClassification.from_pretrained(folder)
    ways_out = "model' could not be loaded .*`image_processor`.*`image_mean`.*python:MODULE:FUNCTION"
    for load in (load_classifier, load_frozen_classifier, lambda _: PixelClassifier(by_hand)):
        with pytest.raises(ValueError, match=ways_out) as error:
            load(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 1200
    assert not asked
    # what says all of it needs no processor
    said = {"size": 16, "image_mean": MEAN, "image_std": STD}
    for options in (said, said | {"size": None, "do_resize": False}):
        for spec in (
            load_classifier(folder, **options).preprocessing.spec,
            PixelClassifier(by_hand, **options).preprocessing.spec,
        ):
            assert spec.mean == MEAN and spec.size == ((16, 16) if options["size"] else None)
    assert load_classifier(folder, image_processor=image_processor()).preprocessing.spec.mean == MEAN
    with pytest.raises(ValueError, match="could not be loaded"):
        load_classifier(folder, image_mean=MEAN, image_std=STD)  # of any size?


def test_timms_configuration_stands_in_for_an_image_processor_that_cannot_be_loaded(tmp_path):
    folder = damaged(tmp_path / "model", "no such class")
    path = folder / "config.json"
    timm = {"input_size": [3, 32, 32], "crop_pct": 1.0, "mean": MEAN, "std": STD}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pretrained_cfg": timm}))
    assert load_classifier(folder).preprocessing.spec.mean == MEAN


def test_a_processor_of_text_alone_is_no_image_processor(tmp_path):
    cifar_resnet().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "TextProcessor"}')
    with pytest.warns(UserWarning, match="without normalisation"):
        load_classifier(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"image_processor_type": "NoImageProcessor"}}')
    with pytest.raises(ValueError, match="could not be loaded"):
        load_classifier(tmp_path)


@pytest.mark.parametrize("damage", [None, "cut off"])
def test_a_repository_that_is_stored_here_is_read_like_a_folder(tmp_path, damage):
    """Offline: what is not stored is not there."""
    cache = tmp_path / "models--someone--model"
    folder = cache / "snapshots" / ("0" * 40)
    damaged(folder, damage or "cut off")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(folder.name)
    if damage:
        with pytest.raises(ValueError, match="'someone/model' could not be loaded"):
            load_classifier("someone/model", cache_dir=str(tmp_path))
        return
    (folder / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="without normalisation"):
        load_classifier("someone/model", cache_dir=str(tmp_path))


def attacked_model() -> tuple[PurifiedClassifier, torch.Tensor, torch.Tensor]:
    defended = PurifiedClassifier(lambda x: x.clamp(0.02, 0.98), cifar_resnet(), image_processor())
    torch.manual_seed(3)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        return defended, pixels, defended(pixels).argmax(1)


def test_foolbox_attacks_it():
    import foolbox

    defended, pixels, labels = attacked_model()
    model = foolbox.PyTorchModel(defended, bounds=(0, 1), device="cpu")
    assert foolbox.accuracy(model, pixels, labels) == 1
    _, clipped, success = foolbox.attacks.LinfPGD(steps=10)(model, pixels, labels, epsilons=[0.0, 0.25])
    assert not success[0].any() and success[1].all()
    assert (clipped[1] - pixels).abs().max() <= 0.25 + 1e-6


def test_autoattack_attacks_it():
    import pyautoattack

    defended, pixels, labels = attacked_model()
    attack = pyautoattack.AutoAttack(defended, attacks=["apgd-ce"], eps=0.25, seed=0, version="custom")
    attack.apgd.n_iter, attack.apgd.n_restarts = 10, 1
    adversarial, _ = attack.run_standard_evaluation(pixels, labels, batch_size=2)
    assert (defended(adversarial).argmax(1) != labels).all()
    assert (adversarial - pixels).abs().max() <= 0.25 + 1e-6
