"""Training on images larger than the purifier's windows: attacked whole, purified as in use, judged whole."""

import datasets
import pytest
import torch
from conftest import CLASSES, picture, save_classifier, tiny_purifier

from maep_hf.adaptation import add_lora, default_lora_config
from maep_hf.training import DataArguments
from maep_hf.training import purification as purification_module
from maep_hf.training.purification import PurificationArguments
from maep_hf.training.samples import collate
from maep_hf.training.stages import AttackArguments, purification_task

LARGE = 40  # pixels: 3 x 3 windows of 16


@pytest.fixture
def task_of(image_folder, classifier_folder):
    """A function of the image size and of what is changed, to a task on the tiny purifier."""

    def build(
        image_size=LARGE, dataset=image_folder, surrogates=None, model=None, validation_images=4, data=None, **loss
    ):
        names = [str(folder) for folder in surrogates or [classifier_folder]]
        return purification_task(
            tiny_purifier() if model is None else model,
            DataArguments(
                dataset=str(dataset), validation_dataset=str(image_folder), validation_images=validation_images,
                image_size=image_size, **data or {},
            ),
            AttackArguments(attack_steps=2),
            PurificationArguments(surrogates=names, **{"mask_ratio": 0.0, "attack_labels": "predicted"} | loss),
        )  # fmt: skip

    return build


def batch_of(task, count: int) -> dict[str, torch.Tensor]:
    samples = task.samples(total=count, start=0, seed=0)
    return task.prepare(collate([samples[i] for i in range(count)]))


@pytest.mark.parametrize("size", [16, LARGE, 32, 33, 10])
def test_what_is_trained_is_what_purify_does(task_of, size):
    task, model = task_of(size), tiny_purifier()
    batch = batch_of(task, 3)
    assert batch["attacked"].shape == (3, 3, size, size)
    trained = task.purify(model.train(), batch["attacked"]).purified_pixel_values
    expected = model.eval().purify(batch["attacked"])
    assert (expected - batch["attacked"]).abs().mean() > 1e-3
    torch.testing.assert_close(trained, expected, atol=1e-6, rtol=0)


def test_the_overlap_is_the_models_unless_it_is_given(task_of):
    task = task_of(model=tiny_purifier(window_overlap=0.6))
    pixels = batch_of(task, 1)["attacked"]
    expected = task.model.eval().purify(pixels)
    torch.testing.assert_close(task.purify(task.model, pixels).purified_pixel_values, expected, atol=1e-6, rtol=0)
    other = task.model.purify(pixels, overlap=0.25)
    assert (other - expected).abs().max() > 1e-4
    chosen = task_of(model=task.model, window_overlap=0.25).purify(task.model, pixels).purified_pixel_values
    torch.testing.assert_close(chosen, other, atol=1e-6, rtol=0)


def test_attacks_are_of_whole_images(task_of, monkeypatch):
    seen, perturb = [], purification_module.perturb

    def watching(surrogates, pixel_values, *rest):
        seen.append(pixel_values.shape)
        return perturb(surrogates, pixel_values, *rest)

    monkeypatch.setattr(purification_module, "perturb", watching)
    batch = batch_of(task_of(), 4)
    assert seen == [(4, 3, LARGE, LARGE)]
    distance = (batch["attacked"] - batch["pixel_values"]).abs().amax(dim=(1, 2, 3))
    assert (distance <= batch["attack_eps"] + 1e-6).all() and distance.max() > 0


def test_losses_are_of_windows_and_guidance_of_the_whole_image(task_of):
    task = task_of(guidance_weight=0.5)
    batch = batch_of(task, 3)
    losses = task.loss(task.model.eval(), batch)
    windows = task._windows(LARGE, LARGE)
    assert len(windows) == 9
    parts = task.model(windows.cut(batch["attacked"]), clean_pixel_values=windows.cut(batch["pixel_values"]))
    torch.testing.assert_close(losses["purification_loss"], parts.purification_loss)
    surrogate = task.surrogates[0]
    whole = task.model.purify(batch["attacked"])
    guidance = (surrogate(whole) - surrogate(batch["pixel_values"])).abs().mean()
    torch.testing.assert_close(losses["guidance_loss"], guidance, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(losses["loss"], losses["purification_loss"] + 0.5 * losses["guidance_loss"])


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_the_loss_of_a_batch_is_the_mean_of_its_images(task_of, mask_ratio):
    task = task_of(guidance_weight=0.5, mask_ratio=mask_ratio)
    batch = batch_of(task, 4)
    whole = task.loss(task.model, batch)
    singles = [task.loss(task.model, {key: value[i : i + 1] for key, value in batch.items()}) for i in range(4)]
    assert (mask_ratio > 0) == bool(whole["reconstruction_loss"] > 0)
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.stack([each[name] for each in singles]).mean(), atol=1e-6, rtol=1e-5)


def test_every_window_has_its_own_mask(task_of):
    task = task_of(mask_ratio=0.5)
    batch = batch_of(task, 2)
    assert batch["mask_noise"].shape == (2, 9 * 16)
    masks = task.purify(task.model, batch["attacked"], None, 0.5, batch["mask_noise"]).mask
    assert masks.shape == (18, 16) and (masks.sum(1) == 8).all()
    assert len({tuple(mask.tolist()) for mask in masks}) > 15
    first = task.purify(task.model, batch["attacked"][1:], None, 0.5, batch["mask_noise"][1:]).mask
    assert torch.equal(masks[9:], first)


def test_gradients_reach_the_update_and_the_head_alone(task_of):
    model = tiny_purifier()
    task = task_of(model=add_lora(model, default_lora_config(model)), guidance_weight=0.5)
    task.loss(task.model.train(), batch_of(task, 2))["loss"].backward()
    reached = {name for name, parameter in task.model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or "local_branch.head.modules_to_save" in name for name in reached)
    moved = {name for name, p in task.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {name for name in reached if ".lora_A" not in name}  # B is zero at the start, so A's gradient is
    assert all(parameter.grad is None for parameter in task.surrogates[0].parameters())


def test_validation_is_of_whole_images_too(task_of, monkeypatch, tmp_path):
    task = task_of(validation_images=7)
    model, data = task.model.eval(), task._validation_set()
    assert data["attacked"].shape == (7, 3, LARGE, LARGE)
    found = task.evaluate(model)
    assert "reconstruction_loss" not in found and "accuracy_clean" not in found
    purified = model.purify(data["attacked"])
    surrogate = task.surrogates[0]
    same = (surrogate(purified).argmax(-1) == surrogate(data["clean"]).argmax(-1)).float().mean().item()
    assert found["agreement_attacked_purified"] == pytest.approx(100 * same)
    expected = {
        "attacked": data["attacked"],
        "attacked_purified": purified,
        "clean_purified": model.purify(data["clean"]),
    }
    with monkeypatch.context() as patch:
        patch.setattr(task, "_score", lambda pixels, labels: pixels.double().mean().item())
        judged = task.evaluate(model)
    for name, images in expected.items():
        assert judged[f"agreement_{name}"] == pytest.approx(images.double().mean().item(), abs=1e-7)
    error = (purified - data["clean"]).square().flatten(1).mean(1)
    assert found["psnr_purified"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)
    monkeypatch.setattr(purification_module, "CHUNK", 20)  # two images of 9 windows
    monkeypatch.setattr(purification_module, "PIXELS_AT_ONCE", 3 * LARGE**2)
    largest = []
    model.encoder.register_forward_pre_hook(lambda _, args: largest.append(len(args[0])))
    again = task.evaluate(model)
    assert max(largest) == 18
    assert again == pytest.approx(found, rel=1e-4)
    task.preview(model, tmp_path / "preview.png")
    assert max(largest) == 18 and (tmp_path / "preview.png").stat().st_size > 0


def test_masks_are_validated_where_they_are_trained(task_of):
    task = task_of(mask_ratio=0.5, attack_labels="true")
    found = task.evaluate(task.model.eval())
    assert found["reconstruction_loss"] > 0 and 0 <= found["accuracy_clean"] <= 100


@pytest.mark.parametrize(("size", "crop"), [(LARGE, "mixed"), (16, "native")])
def test_stored_pairs_of_large_images(task_of, tmp_path, monkeypatch, size, crop):
    """Whole, or cut at their own scale: the attacked image stays beside its clean one."""
    clean = [picture(i, 56, LARGE) for i in range(8)]
    attacked = [image.point(lambda level: min(255, level + 3)) for image in clean]
    features = {"image": datasets.Image(), "adversarial_image": datasets.Image(),
                "label": datasets.ClassLabel(names=CLASSES)}  # fmt: skip
    rows = {"image": clean, "adversarial_image": attacked, "label": [i % 3 for i in range(8)]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("no attack is needed")

    monkeypatch.setattr(purification_module, "perturb", refuse)
    task = task_of(size, dataset=tmp_path, guidance_weight=0.1, data={"crop": crop})
    batch = batch_of(task, 8)
    assert batch["attacked"].shape == (8, 3, size, size)
    difference = (batch["attacked"] - batch["pixel_values"]) * 255
    assert difference.min() >= -1e-3 and difference.max() < 3.01 and difference.mean() > 2
    assert torch.isfinite(task.loss(task.model, batch)["loss"])


class Bare(torch.nn.Module):
    """A network that says nothing of its classes."""

    def __init__(self, classes: int):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, classes, 3, stride=4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.layer(pixel_values).mean(dim=(2, 3))


def test_a_bare_network_as_a_surrogate(task_of, classifier_folder, monkeypatch):
    from maep_hf import PixelClassifier, load_classifier
    from maep_hf.training import stages

    torch.manual_seed(0)
    made = {"bare": lambda: PixelClassifier(Bare(7))}
    loaded = lambda names: [made[name]() if name in made else load_classifier(name) for name in names]  # noqa: E731
    monkeypatch.setattr(stages, "load_surrogates", loaded)
    task = task_of(surrogates=["bare", classifier_folder], guidance_weight=1)
    assert task.surrogates[0].num_labels is None and task.num_classes == [7, 3]
    batch = batch_of(task, 8)
    assert batch["clean_values"].shape == (8, 7) and set(batch["guidance_surrogate"].tolist()) == {0, 1}
    assert task.loss(task.model, batch)["guidance_loss"] > 0
    for i in range(8):  # as wide for a batch that knows only one of the surrogates
        single = {key: value[i : i + 1] for key, value in batch.items()}
        logits = task._guide_values(single["pixel_values"], single["guidance_surrogate"])
        torch.testing.assert_close(logits, batch["clean_values"][i : i + 1])
    with pytest.raises(ValueError, match="3 classes and a surrogate 7"):
        task_of(surrogates=["bare"], attack_labels="true")


def test_the_classes_of_a_surrogate_are_those_of_its_logits(task_of, classifier_folder, monkeypatch):
    """What it says of them is stale where its head was replaced, in a bare network and in one of transformers."""
    from maep_hf import PixelClassifier, load_classifier
    from maep_hf.training import stages

    def with_head(classes, says):
        torch.manual_seed(5)
        bare, loaded = PixelClassifier(Bare(classes)), load_classifier(classifier_folder)
        head = loaded.classifier.classifier
        loaded.classifier.classifier = torch.nn.Linear(head.in_features, classes)
        bare.classifier.num_classes = loaded.config.num_labels = says
        return [bare, loaded]

    found = []
    for says in (3, 50, 0):
        monkeypatch.setattr(stages, "load_surrogates", lambda names, says=says: with_head(3, says))
        task = task_of(surrogates=["a", "b"], attack_labels="true", guidance_weight=1, guidance_kl_weight=1)
        assert [surrogate.num_labels for surrogate in task.surrogates] == [says, says] and task.num_classes == [3, 3]
        losses = task.loss(task.model, batch_of(task, 4))
        found.append({name: loss.item() for name, loss in losses.items()})
    assert found[0] == found[1] == found[2] and found[0]["guidance_loss"] > 0
    monkeypatch.setattr(stages, "load_surrogates", lambda names: with_head(2, 3))
    with pytest.raises(ValueError, match="3 classes and a surrogate only 2"):
        task_of(surrogates=["a", "b"], attack_labels="true")


def test_a_size_that_is_not_trained_on_is_said_before_surrogates_run(task_of, monkeypatch):
    from maep_hf import PixelClassifier
    from maep_hf.training import stages

    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
    monkeypatch.setattr(stages, "load_surrogates", lambda names: [PixelClassifier(flat)])
    with pytest.raises(ValueError, match=f"image_size={LARGE}"):
        task_of(model=tiny_purifier(purify_mode="interpolate"))


def test_native_size_is_one_pass_as_before(task_of, tmp_path):
    task = task_of(16, surrogates=[save_classifier(tmp_path / "other")])
    calls = []
    task.model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    batch = batch_of(task, 3)
    task.loss(task.model, batch)
    assert len(calls) == 1 and calls[0]["pixel_values"] is batch["attacked"]
    assert batch["mask_noise"].shape == (3, 16)
