"""Training samples: a function of seed and position alone, cut as asked, and broken images replaced and counted."""

import io
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from conftest import SIZE, image_rows, picture
from PIL import Image
from torch.utils.data import DataLoader

from maep_hf.attacks import AttackMixture
from maep_hf.data import DataError, ImageDataset, load_image_dataset
from maep_hf.training import Augmentation, PositionedImages, StreamedImages
from maep_hf.training import samples as samples_module
from maep_hf.training.purification import PairDraw
from maep_hf.training.samples import Share, collate, read_first

CUT = Augmentation(SIZE)
DRAW = PairDraw(AttackMixture(num_surrogates=2), SIZE, patches=16)
TOTAL = 40  # of 24 images: into the second epoch


@pytest.fixture(params=["positioned", "streamed"])
def samples(request, image_folder):
    """A function that builds the run's samples from `start` on."""
    streaming = request.param == "streamed"
    dataset = load_image_dataset(str(image_folder), streaming=streaming)

    def build(seed: int = 0, start: int = 0, total: int = TOTAL):
        if streaming:
            return StreamedImages(dataset, total, CUT, DRAW, seed, start, shuffle_buffer=8)
        return PositionedImages(dataset, total, CUT, DRAW, seed)

    return build


def batches(samples, batch_size: int, start: int = 0, **options) -> list[dict[str, torch.Tensor]]:
    streaming = isinstance(samples, StreamedImages)
    sampler = None if streaming else range(start, len(samples))
    return list(DataLoader(samples, batch_size, sampler=sampler, collate_fn=collate, **options))


def joined(found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([batch[key] for batch in found]) for key in found[0]}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_a_sample_depends_on_seed_and_position_alone(samples):
    whole = joined(batches(samples(), batch_size=1))
    assert whole["position"].tolist() == list(range(TOTAL))
    assert_same(whole, joined(batches(samples(), batch_size=7)))
    for start in (1, 17, 30):
        tail = joined(batches(samples(start=start), batch_size=4, start=start))
        assert_same({key: value[start:] for key, value in whole.items()}, tail)
    assert_same({k: v[:10] for k, v in whole.items()}, joined(batches(samples(total=10), batch_size=5)))


def test_a_worker_changes_nothing(samples):
    worker = {"num_workers": 1, "multiprocessing_context": "forkserver"}
    assert_same(joined(batches(samples(total=20), 4)), joined(batches(samples(total=20), 4, **worker)))


def test_a_stream_takes_one_worker(image_folder, monkeypatch):
    stream = StreamedImages(load_image_dataset(str(image_folder), streaming=True), 8, CUT)
    monkeypatch.setattr(samples_module, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ValueError, match="dataloader_num_workers=2"):
        next(iter(stream))


def test_another_seed_draws_everything_anew(samples):
    first, second = joined(batches(samples(), 4)), joined(batches(samples(seed=1), 4))
    for key in ("pixel_values", "labels", "mask_noise", "attack_eps", "attack_kind", "attack_start"):
        assert not torch.equal(first[key], second[key]), key


def test_epochs_are_whole_and_shuffled_anew(image_folder):
    dataset = load_image_dataset(str(image_folder))
    for streaming in (False, True):
        plain = Augmentation(SIZE, crop="center", flip=False)
        if streaming:
            found = StreamedImages(load_image_dataset(str(image_folder), streaming=True), 48, plain)
        else:
            found = PositionedImages(dataset, 48, plain)
        keys = [sample["pixel_values"].numpy().tobytes() for sample in map(dict, _each(found))]
        assert len(set(keys[:24])) == 24 and set(keys[:24]) == set(keys[24:])
        assert keys[:24] != keys[24:]


def _each(samples):
    return samples if isinstance(samples, StreamedImages) else (samples[i] for i in range(len(samples)))


# --- broken images -------------------------------------------------------------------------------------------------


def with_broken(broken: set[int], count: int = 12, streaming: bool = False) -> ImageDataset:
    """Pictures whose red level is their index; those in `broken` are no images."""
    cells = []
    for index in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (SIZE, SIZE), (index, 0, 0)).save(buffer, "PNG")
        cells.append({"bytes": b"broken" if index in broken else buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": cells, "label": list(range(count))}, features=features)
    return ImageDataset(rows.to_iterable_dataset() if streaming else rows, "image", "label", streaming=streaming)


def test_a_broken_image_is_replaced_by_the_next_good_one():
    found = [PositionedImages(with_broken({3, 4}), 12, CUT)[i] for i in range(12)]
    levels = [int(sample["pixel_values"][0, 0, 0]) for sample in found]
    assert levels == [sample["labels"] for sample in found]
    order = [PositionedImages(with_broken(set()), 12, CUT)[i]["labels"] for i in range(12)]
    assert levels == [5 if index in (3, 4) else index for index in order]
    assert {sample["broken"] for sample in found} == {-1, 3, 4}


def test_a_broken_image_of_a_stream_is_replaced_by_the_next_good_one():
    order = [sample["labels"] for sample in StreamedImages(with_broken(set(), streaming=True), 24, CUT)]
    broken = {order[4], order[5]}  # each once an epoch
    found = list(StreamedImages(with_broken(broken, streaming=True), 24, CUT))
    assert [sample["position"] for sample in found] == list(range(24))
    waiting = [position for position, index in enumerate(order) if index in broken]
    assert [sample["broken"] for sample in found if sample["broken"] >= 0] == waiting and len(waiting) == 4
    for position, sample in enumerate(found):
        next_good = next(index for index in (order * 2)[position:] if index not in broken)
        assert sample["labels"] == next_good == int(sample["pixel_values"][0, 0, 0])
    for start in (5, 6, 20):
        tail = list(StreamedImages(with_broken(broken, streaming=True), 24, CUT, start=start))
        assert_same(collate(found[start:]), collate(tail))


def test_a_stream_ends_whole_when_its_last_image_is_broken():
    order = [sample["labels"] for sample in StreamedImages(with_broken(set(), streaming=True), 12, CUT)]
    found = list(StreamedImages(with_broken({order[-1]}, streaming=True), 12, CUT))
    assert [sample["position"] for sample in found] == list(range(12)) and found[-1]["broken"] == 11


@pytest.mark.parametrize("start", [0, 12])
@pytest.mark.parametrize("broken", [set(), {3, 4, 9}])
def test_each_process_decodes_its_own_samples_of_a_stream(broken, start, monkeypatch):
    """With Accelerate's own division of a stream, the processes have together what one has, decoded once."""
    made: list[int] = []

    def counting(dataset, row, augmentation, draw, seed, position):
        made.append(position)
        return make_sample(dataset, row, augmentation, draw, seed, position)

    make_sample = samples_module.make_sample
    monkeypatch.setattr(samples_module, "make_sample", counting)
    whole = list(StreamedImages(with_broken(broken, streaming=True), 24, CUT, start=start))
    at_once, batch, processes = len(made), 2, 3
    made.clear()
    found = []
    for process in range(processes):
        share = Share(process, processes, batch)
        stream = StreamedImages(with_broken(broken, streaming=True), 24, CUT, start=start, share=share)
        own = list(IterableDatasetShard(stream, batch, num_processes=processes, process_index=process))
        assert len(own) * processes == len(whole) and all(share.has(sample["position"]) for sample in own)
        found += own
    assert_same(collate(whole), collate(sorted(found, key=lambda sample: sample["position"])))
    assert sorted(set(made)) == list(range(start, 24))
    assert len(made) == len(whole) if not broken else len(made) < 2 * at_once


@pytest.mark.timeout(60)
def test_nothing_readable_is_an_error():
    everything = set(range(12))
    with pytest.raises(DataError, match="none of the dataset's images"):
        PositionedImages(with_broken(everything), 12, CUT)[0]
    with pytest.raises(DataError, match="none of the dataset's images"):
        next(iter(StreamedImages(with_broken(everything, streaming=True), 12, CUT)))
    for streaming in (False, True):
        with pytest.raises(DataError, match="none of the dataset's images"):
            read_first(with_broken(everything, streaming=streaming), CUT, 4)
    with pytest.raises(DataError, match="no images"):
        empty = ImageDataset(with_broken(set(), streaming=True).rows.take(0), "image", streaming=True)
        next(iter(StreamedImages(empty, 12, CUT)))


def test_validation_skips_broken_images_and_keeps_the_order():
    for streaming in (False, True):
        found = read_first(with_broken({0, 2}, streaming=streaming), CUT, 4)
        assert [sample["labels"] for sample in found] == [1, 3, 4, 5]


# --- cutting -------------------------------------------------------------------------------------------------------


def coordinates(width: int, height: int) -> Image.Image:
    """Red is the column, green the row: a cut tells where it was made and at what scale."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).astype("u1"))


def cut(crop: str, image: Image.Image, seed: int = 0, **options) -> np.ndarray:
    (tensor,) = Augmentation(SIZE, crop, **options)([image], np.random.default_rng(seed))
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, SIZE, SIZE)
    return tensor.numpy().astype(int)


def test_native_cut_keeps_the_scale():
    corners = set()
    for seed in range(200):
        red, green, _ = cut("native", coordinates(40, 30), seed, flip=False)
        assert (np.diff(red, axis=1) == 1).all() and (np.diff(green, axis=0) == 1).all()
        corners.add((red[0, 0], green[0, 0]))
    assert {x for x, _ in corners} == set(range(25)) and {y for _, y in corners} == set(range(15))


def test_resized_cut_spans_the_short_side():
    lefts = set()
    for seed in range(40):
        red, green, _ = cut("resized", coordinates(96, 48), seed, flip=False)
        assert green.min() < 3 and green.max() > 44  # all 48 rows
        assert 42 <= np.ptp(red) <= 48
        lefts.add(red[0, 0])
    assert min(lefts) < 6 and max(lefts) > 40


def test_mixed_cut_is_either():
    spans = [np.ptp(cut("mixed", coordinates(64, 64), seed)[0]) for seed in range(40)]
    native = [span == SIZE - 1 for span in spans]
    assert 10 < sum(native) < 30 and all(
        span > 55 for span, is_native in zip(spans, native, strict=True) if not is_native
    )


def test_center_cut_is_fixed_and_central():
    red, green, _ = cut("center", coordinates(96, 48), flip=False)
    assert all(np.array_equal(cut("center", coordinates(96, 48), seed, flip=False)[0], red) for seed in range(5))
    assert abs(red.mean() - 47.5) < 1 and abs(green.mean() - 23.5) < 1


@pytest.mark.parametrize("crop", ["native", "resized", "mixed", "center"])
@pytest.mark.parametrize("size", [(5, 9), (16, 16), (16, 90), (200, 17), (1, 1)])
def test_every_shape_of_picture_is_cut(crop, size):
    for seed in range(4):
        cut(crop, picture(0, *size), seed, padding=2)


def test_half_of_the_pictures_are_mirrored():
    flipped = [np.diff(cut("native", coordinates(40, 30), seed)[0])[0, 0] < 0 for seed in range(200)]
    assert 70 < sum(flipped) < 130
    assert not any(np.diff(cut("native", coordinates(40, 30), seed, flip=False)[0])[0, 0] < 0 for seed in range(20))


def test_padding_reflects_the_border():
    image = picture(0, SIZE, SIZE)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect").transpose(2, 0, 1)
    windows = {padded[:, y : y + SIZE, x : x + SIZE].tobytes() for y in range(9) for x in range(9)}
    found = {cut("native", image, seed, padding=4, flip=False).astype("u1").tobytes() for seed in range(40)}
    assert found <= windows and len(found) > 20


def test_zoomed_windows_show_less_of_the_picture():
    spans = [np.ptp(cut("native", coordinates(64, 64), seed, max_zoom=4.0, zoom_share=0.5)[0]) for seed in range(200)]
    zoomed = [span for span in spans if span < SIZE - 1]
    assert 60 < len(zoomed) < 140 and min(zoomed) < SIZE / 3 and min(zoomed) >= SIZE / 4 - 3
    assert 0.36 < np.mean([span > SIZE / 2 - 1 for span in zoomed]) < 0.64  # log-uniform: half by less than two
    assert all(np.ptp(cut("center", coordinates(64, 64), seed, max_zoom=4.0)[0]) > 40 for seed in range(20))


def test_without_zoom_nothing_else_is_drawn():
    image = coordinates(40, 30)
    for seed in range(20):
        assert np.array_equal(cut("mixed", image, seed), cut("mixed", image, seed, max_zoom=1.0, zoom_share=1.0))


def test_windows_are_cut_from_pictures_brought_to_a_size():
    """The short side of 96 becomes 48: neighbouring pixels are two apart, and the cut may lie anywhere."""
    lefts, tops = set(), set()
    for seed in range(100):
        red, green, _ = cut("resized", coordinates(192, 96), seed, flip=False, resize=48)
        assert 28 <= np.ptp(red) <= 32 and 28 <= np.ptp(green) <= 32
        lefts.add(red[0, 0]), tops.add(green[0, 0])
    assert min(lefts) < 10 and max(lefts) > 150 and min(tops) < 5 and max(tops) > 60
    native = [np.ptp(cut("mixed", coordinates(192, 96), seed, resize=48)[0]) == SIZE - 1 for seed in range(40)]
    assert 10 < sum(native) < 30
    red, *_ = cut("center", coordinates(192, 96), flip=False, resize=48)
    assert abs(red.mean() - 95.5) < 1 and 28 <= np.ptp(red) <= 32


def test_resize_of_small_pictures_enlarges_them():
    red, *_ = cut("resized", coordinates(24, 24), flip=False, resize=48)
    assert 6 <= np.ptp(red) <= 8


@pytest.mark.parametrize("wrong", [{"max_zoom": 0.5}, {"zoom_share": 1.5}, {"resize": SIZE - 1}])
def test_a_wrong_scale_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(SIZE, **wrong)


def test_unknown_crop_is_named():
    with pytest.raises(ValueError, match="crop='middle'"):
        Augmentation(SIZE, "middle")


def test_the_attacked_image_is_cut_alike():
    rows = image_rows(12)
    twins = rows.add_column("adversarial_image", list(rows.cast_column("image", datasets.Image(decode=False))["image"]))
    dataset = ImageDataset(twins, "image", "label", "adversarial_image")
    found = collate([PositionedImages(dataset, 24, Augmentation(SIZE, padding=2))[i] for i in range(24)])
    assert torch.equal(found["pixel_values"], found["adversarial_pixel_values"])


def test_collated_pictures_are_unit_floats():
    batch = collate([PositionedImages(with_broken(set()), 12, CUT)[i] for i in range(12)])
    assert batch["pixel_values"].dtype == torch.float32 and batch["pixel_values"].shape == (12, 3, SIZE, SIZE)
    torch.testing.assert_close(batch["pixel_values"][:, 0, 0, 0] * 255, batch["labels"].float())
