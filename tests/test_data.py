"""Images in: every kind of source, columns found or named, every mode of picture, and errors that name the argument."""

import hashlib
import io
import re
import shutil
from collections import Counter

import datasets
import numpy as np
import pandas
import pytest
import torch
from conftest import CLASSES, image_rows, picture
from PIL import Image

from maep_hf.data import (
    DataError,
    ImageDataset,
    decode_image,
    load_image_dataset,
    names_that_differ,
    numbers_as_text,
    same_names_in_order,
    to_rgb,
)
from maep_hf.evaluation import EvaluationImages, read_images
from maep_hf.evaluation.images import _count_labels
from maep_hf.training import Augmentation, DataArguments, PositionedImages, StreamedImages
from maep_hf.training import arguments as arguments_module


def test_names_of_classes_are_the_same_in_other_letters():
    own, wanted = ["Airplane", "fire-truck", "Cat"], ["cat", "airplane", "fire_truck"]
    assert same_names_in_order(own, wanted) == [2, 0, 1]
    assert same_names_in_order(own, [name.upper() for name in own]) is None
    assert same_names_in_order(["a b", "a_b"], ["a_b", "a b"]) == [1, 0]  # as they are written
    assert same_names_in_order(["a b", "a_b"], ["A_b", "A b"]) is None  # which is which is not known
    assert names_that_differ(own, wanted) is None


def test_names_of_classes_that_match_nothing_are_told():
    known = ["airplane", "cat", "dog"]
    assert names_that_differ(known, ["cat", "dog", "zairplane"]) == "airplane / zairplane"
    assert names_that_differ(known, known + ["ship"]) == "none / ship"
    assert names_that_differ([f"n{i:08}" for i in range(1000)], [f"word {i}" for i in range(1000)]).count(",") == 6
    for silent in (None, [], ["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"]):
        assert names_that_differ(known, silent) is None and names_that_differ(silent, known) is None


def test_names_that_are_repeated_in_another_order_are_told(caplog):
    """As ImageNet's two cranes: nothing says which is which."""
    own, wanted = ["crane", "Crane", "cat"], ["cat", "crane", "crane"]
    assert "both repeat a name, as crane" in names_that_differ(own, wanted)
    assert names_that_differ(own, ["CRANE", "crane", "cat"]) is None
    assert names_that_differ(["a b", "a_b"], ["a_b", "a b"]) is None  # as they are written
    images = EvaluationImages(torch.rand(3, 3, 4, 4), torch.arange(3), class_names=tuple(wanted))
    assert images.in_order_of(own) is images and "crane, and stand in different orders); taken by" in caplog.text


def test_numbers_in_the_order_of_the_alphabet_are_doubted(caplog):
    listed = sorted(str(index) for index in range(12))  # 0, 1, 10, 11, 2, ...
    for own in (None, [f"LABEL_{index}" for index in range(12)], [f"class {index}" for index in range(12)]):
        assert re.search(r"class 11 the one of index 3.*pad .*\(00, \.\.\.\)", numbers_as_text(own, listed))
    in_order = [str(index) for index in range(12)]
    assert numbers_as_text(in_order, listed) is None  # they are matched by name
    for sure in (None, in_order, in_order[:10], [name.zfill(2) for name in in_order], ["1", "a", "10"], ["5", "3"]):
        assert numbers_as_text(None, sure) is None
    images = EvaluationImages(torch.zeros(2, 3, 4, 4), torch.tensor([0, 2]), class_names=tuple(listed))
    assert images.in_order_of(None) is images and "in the order of the alphabet" in caplog.text
    assert images.in_order_of(in_order).labels.tolist() == [0, 10]
    for unnamed in (-1, 12):
        with pytest.raises(DataError, match="labels go from .* and it names 12 classes"):
            EvaluationImages(images.pixels, torch.tensor([3, unnamed]), class_names=tuple(listed)).in_order_of(in_order)


def test_labels_that_are_no_indices_are_told_at_once(tmp_path):
    rows = image_rows(3).remove_columns("label").add_column("label", ["cat", "dog", "cat"])
    rows.to_parquet(tmp_path / "text.parquet")
    dataset = load_image_dataset(str(tmp_path / "text.parquet"))
    assert dataset.label_column is None
    with pytest.raises(DataError, match=r"its column 'label' holds Value\('string'\).*class_encode_column"):
        read_images(dataset)
    numbers = saved(tmp_path / "numbers", image=[picture(0)], label=[1.0])
    with pytest.raises(
        DataError, match=r"holds Value\('float64'\).*cast_column\(..., Value\('int64'\)\) if .* numbers"
    ):
        read_images(load_image_dataset(numbers))


def test_a_table_of_paths_says_how_it_is_done(tmp_path):
    pandas.DataFrame({"image": ["a.png"], "label": [0]}).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(DataError, match="paths in a column are not read.*metadata.csv"):
        load_image_dataset(str(tmp_path))


@pytest.mark.parametrize("kind", ["int32", "uint8", "bool", "names"])
def test_labels_are_counted_where_they_are_stored(monkeypatch, kind):
    """Row by row the labels of a large dataset take a minute."""
    labels = [1, 0, None, 1, 1, 0, None] * 3
    feature = datasets.ClassLabel(names=["a", "b"]) if kind == "names" else datasets.Value(kind)
    columns = {"image": datasets.Image(), "label": feature}
    rows = {"image": [{"bytes": b"none", "path": None}] * len(labels), "label": labels}
    stored = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
    for dataset in (stored, stored.shuffle(seed=0).select(range(9))):  # the latter by indices
        found = ImageDataset(dataset, "image", "label")
        expected = Counter(dataset["label"])
        monkeypatch.setattr(datasets.arrow_dataset.Column, "__iter__", lambda self: pytest.fail("row by row"))
        assert _count_labels(found) == expected
        monkeypatch.undo()


def test_images_sorted_by_class_are_warned_of(tmp_path, caplog):
    rows = image_rows(60)  # three classes in turns
    rows.save_to_disk(tmp_path / "turns")
    rows.sort("label").save_to_disk(tmp_path / "sorted")

    def said(name: str, count: int) -> str:
        caplog.clear()
        read_images(load_image_dataset(str(tmp_path / name)), count, image_size=8)
        return caplog.text

    assert "the first 20 images are of 1 of 3 classes" in said("sorted", 20)
    assert said("turns", 20) == said("sorted", 50) == said("sorted", 10) == ""
    many = datasets.ClassLabel(names=[f"class {index}" for index in range(1000)])
    rows.cast_column("label", many).save_to_disk(tmp_path / "few of many")
    rows.map(lambda row, index: {"label": index // 59}, with_indices=True).save_to_disk(tmp_path / "one is rare")
    rows.sort("label").select(range(20)).save_to_disk(tmp_path / "whole")
    assert said("few of many", 50) == said("one is rare", 20) == said("whole", 20) == ""


def pixels(dataset) -> list[np.ndarray]:
    return [np.asarray(decode_image(row[dataset.image_column])) for row in dataset.rows]


def check_train_split(dataset, count: int = 24) -> None:
    found = pixels(dataset)
    assert len(found) == count and dataset.class_names == CLASSES and dataset.num_classes == 3
    assert all(np.array_equal(image, np.asarray(picture(i))) for i, image in enumerate(found))
    assert [dataset.label(row) for row in dataset.rows] == [i % 3 for i in range(count)]


@pytest.fixture(scope="module")
def sources(image_folder, tmp_path_factory):
    """The same 24 + 9 images in every form."""
    root = tmp_path_factory.mktemp("sources")
    splits = datasets.DatasetDict({"train": image_rows(24), "test": image_rows(9, first=24)})
    splits.save_to_disk(root / "saved_dict")
    splits["train"].save_to_disk(root / "saved")
    for i in range(33):
        path = root / "imagefolder" / ("train" if i < 24 else "test") / CLASSES[i % 3] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return {
        "parquet": image_folder / "train.parquet",
        "folder": image_folder,
        "saved": root / "saved",
        "saved_dict": root / "saved_dict",
        "imagefolder": root / "imagefolder",
    }


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "folder", "saved", "saved_dict"])
def test_local_sources(sources, kind, streaming):
    dataset = load_image_dataset(str(sources[kind]), streaming=streaming)
    check_train_split(dataset)
    assert dataset.streaming == streaming and dataset.fingerprint
    if kind in ("folder", "saved_dict"):
        test = load_image_dataset(str(sources[kind]), "test", streaming=streaming)
        assert np.array_equal(pixels(test)[0], np.asarray(picture(24)))
        assert test.fingerprint != dataset.fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_image_folder(sources, streaming):
    dataset = load_image_dataset(str(sources["imagefolder"]), streaming=streaming)
    assert dataset.class_names == sorted(CLASSES)
    found = {(dataset.class_names[dataset.label(row)], decode_image(row["image"]).tobytes()) for row in dataset.rows}
    assert found == {(CLASSES[i % 3], picture(i).tobytes()) for i in range(24)}


def test_a_saved_split_that_goes_by_another_name_is_said(sources, tmp_path, caplog):
    load_image_dataset(str(sources["saved"]), "test")
    assert not caplog.text  # of a dataset made by hand no split is known
    datasets.load_dataset(str(sources["folder"]), split="train").save_to_disk(tmp_path)
    load_image_dataset(str(tmp_path), "train")
    assert not caplog.text
    load_image_dataset(str(tmp_path), "test")
    assert "it was saved as one split, 'train' by its record, and is taken for 'test'" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "kept", [{"type": "torch"}, {"type": "numpy"}, {"type": "pandas"}, {"type": "torch", "columns": ["label"]}]
)
def test_the_format_of_a_saved_dataset_is_left(sources, tmp_path, kept, streaming):
    rows = image_rows(24)
    rows.set_format(**kept)
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "one")
    for name in ("splits", "one"):
        dataset = load_image_dataset(str(tmp_path / name), streaming=streaming)
        check_train_split(dataset)
        plain = load_image_dataset(str(sources["saved"]), streaming=streaming)
        assert streaming or dataset.fingerprint == plain.fingerprint


def test_validation_on_training_images_is_warned_of(sources, caplog):
    DataArguments(dataset=str(sources["folder"])).load()
    DataArguments(dataset="embedded:cifar10").load()  # a demonstration
    assert not caplog.text
    DataArguments(dataset=str(sources["parquet"])).load()
    assert "training and validation images are the same: name others with validation_dataset" in caplog.text


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (CLASSES[1:], True),  # each has the index of another
        ([CLASSES[0], "noise", CLASSES[2]], True),
        ([*CLASSES, "noise"], True),
        (CLASSES[:2], False),  # the same indices, of which some do not occur
        (["noise", "checks"], False),  # other names for them, maybe
        ([CLASSES[0].upper(), *CLASSES[1:]], False),  # the same, one in other letters
        ([name.upper() for name in CLASSES[1:]], True),
    ],
)
def test_validation_on_other_classes_is_refused(sources, tmp_path, names, refused):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [picture(i) for i in range(4)], "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path)
    arguments = DataArguments(dataset=str(sources["folder"]), validation_dataset=str(tmp_path))
    if refused:
        with pytest.raises(DataError, match=f"validation_dataset=.*names {len(names)} classes.*align_labels_with"):
            arguments.load()
    arguments.load(labelled=not refused)  # other classes do no harm where labels are not used


def test_named_columns_are_those_of_the_validation_dataset_that_has_them(tmp_path):
    rows = image_rows(6).cast_column("label", datasets.Value("int64"))
    two = rows.add_column("mask", list(rows.cast_column("image", datasets.Image(decode=False))["image"]))
    two = two.cast_column("mask", datasets.Image())
    two.rename_column("label", "category").save_to_disk(tmp_path / "train")
    rows.rename_column("label", "category").save_to_disk(tmp_path / "named")
    rows.save_to_disk(tmp_path / "other")
    two.save_to_disk(tmp_path / "two")
    for streaming in (False, True):
        for name, label in (("train", "category"), ("named", "category"), ("other", "label"), ("two", "label")):
            arguments = DataArguments(
                dataset=str(tmp_path / "train"), validation_dataset=str(tmp_path / name), validation_split="train",
                image_column="image", label_column="category", streaming=streaming,
            )  # fmt: skip
            train_data, own = arguments.load()
            assert (train_data.label_column, own.image_column, own.label_column) == ("category", "image", label)
    with pytest.raises(DataError, match="label_column='category' is not in"):  # of the dataset itself it must be there
        DataArguments(dataset=str(tmp_path / "two"), image_column="image", label_column="category").load()


def test_a_validation_dataset_has_a_configuration_of_its_own(monkeypatch, image_folder):
    asked, load = [], arguments_module.load_image_dataset

    def spied(*args, config_name, **more):
        asked.append(config_name)
        return load(*args, **more)

    monkeypatch.setattr(arguments_module, "load_image_dataset", spied)
    folder = str(image_folder)
    DataArguments(dataset=folder, validation_dataset=folder, dataset_config="a", validation_config="b").load()
    DataArguments(dataset=folder, validation_dataset=folder, dataset_config="a").load()
    DataArguments(dataset=folder, dataset_config="a").load()
    assert asked == ["a", "b", "a", None, "a", "a"]
    with pytest.raises(ValueError, match="validation_config='b'.*dataset_config"):
        DataArguments(validation_config="b")
    with pytest.raises(ValueError, match="max_train_images=0: must be at least 1"):
        DataArguments(max_train_images=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_beside_pictures(sources, tmp_path, streaming):
    folder = shutil.copytree(sources["imagefolder"], tmp_path / "captioned")
    for path in list(folder.rglob("*.png")):
        path.with_suffix(".txt").write_text("a picture")
    found = load_image_dataset(str(folder), streaming=streaming)
    assert found.class_names == sorted(CLASSES) and len(pixels(found)) == 24


def test_max_images(sources):
    check_train_split(load_image_dataset(str(sources["folder"]), max_images=5), 5)
    check_train_split(load_image_dataset(str(sources["folder"]), max_images=5, streaming=True), 5)
    check_train_split(load_image_dataset(str(sources["folder"]), max_images=99))
    with pytest.raises(DataError, match="max_images"):
        load_image_dataset(str(sources["folder"]), max_images=0)


def test_fingerprint_follows_content(sources):
    def fingerprint(**options):
        return load_image_dataset(str(sources["saved"]), **options).fingerprint

    assert fingerprint() == fingerprint() != fingerprint(max_images=3)
    assert fingerprint(streaming=True) == fingerprint(streaming=True) != fingerprint(streaming=True, max_images=3)


def test_fingerprint_is_of_the_images_their_labels_and_attacked_images(tmp_path):
    columns = {"image": [picture(0), picture(1)], "adversarial_image": [picture(2), picture(3)], "label": [0, 1]}
    others = [{"image": [picture(0), picture(4)]}, {"adversarial_image": [picture(2), picture(4)]}, {"label": [0, 2]}]
    found = [
        load_image_dataset(saved(tmp_path / str(number), **columns | other)).fingerprint
        for number, other in enumerate([{}, *others, {"more": [1, 2]}])
    ]
    assert len(set(found[:-1])) == 4 and found[-1] == found[0]  # wherever it lies, with a column that is not used


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_out_of_reach_says_how_to_go_on(streaming):
    with pytest.raises(DataError, match="--dataset FOLDER.*--dataset FILE.parquet.*embedded:cifar10"):
        load_image_dataset("uoft-cs/cifar10", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_unusable_local_sources(tmp_path, image_folder, streaming):
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "notes.txt").write_text("not images")
    (tmp_path / "nothing").mkdir()
    for name in ("torn.parquet", "notes.txt", "nothing"):
        with pytest.raises(DataError, match=name):
            load_image_dataset(str(tmp_path / name), streaming=streaming)
    with pytest.raises(DataError, match="split='dev'"):
        load_image_dataset(str(image_folder), "dev", streaming=streaming)


def test_split_that_a_saved_dataset_lacks(sources):
    with pytest.raises(DataError, match="split='dev'.*train, test"):
        load_image_dataset(str(sources["saved_dict"]), "dev")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "folder", "saved", "saved_dict", "embedded"])
def test_slices_of_splits(sources, kind, streaming):
    source, count = ("embedded:cifar10", 20) if kind == "embedded" else (str(sources[kind]), 24)
    if streaming and kind in ("parquet", "folder"):
        with pytest.raises(DataError, match=r"split='train\[:50%\]': a stream has no slices; leave streaming out"):
            load_image_dataset(source, "train[:50%]", streaming=True)
        return
    every = [image.tobytes() for image in pixels(load_image_dataset(source))]

    def rows(split: str) -> list[int]:
        found = pixels(load_image_dataset(source, split, streaming=streaming))
        return [every.index(image.tobytes()) for image in found]

    assert rows("train[:50%]") + rows("train[50%:]") == list(range(count))
    assert rows("train[:3]+train[-2:]") == [0, 1, 2, count - 2, count - 1]
    with pytest.raises(DataError, match=r"train\[5:2\].*no images"):
        rows("train[5:2]")
    with pytest.raises(DataError, match=r"train\[0\.5:\]"):
        rows("train[0.5:]")
    with pytest.raises(DataError, match="other"):
        rows("train[:50%]+other[:2]")


def test_a_slice_that_was_saved_is_not_cut_again(sources, tmp_path, caplog):
    datasets.load_dataset(str(sources["folder"]), split="train[:50%]").save_to_disk(tmp_path)
    assert len(load_image_dataset(str(tmp_path), "train[:50%]")) == 12 and not caplog.text
    assert len(load_image_dataset(str(tmp_path), "train")) == 12 and "saved as one split" in caplog.text


def test_splits_are_added_up_across_a_saved_dataset(sources):
    assert len(load_image_dataset(str(sources["saved_dict"]), "train[20:]+test[:2]")) == 6
    read = read_images(load_image_dataset(str(sources["saved_dict"]), "test[:4]"), image_size=8)
    assert read.labels.tolist() == [0, 1, 2, 0]


def test_missing_validation_split_names_its_argument(sources):
    arguments = DataArguments(dataset=str(sources["folder"]), validation_split="dev")
    with pytest.raises(DataError, match="'dev'.*validation_split"):
        arguments.load()


def test_no_images_at_all(tmp_path):
    empty = image_rows(3).select([])
    empty.to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="empty.parquet.*no data"):
        load_image_dataset(str(tmp_path / "empty.parquet"))
    empty.save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="saved"):
        load_image_dataset(str(tmp_path / "saved"))


def saved(tmp_path, **columns) -> str:
    """A saved dataset with the given columns; a list of pictures becomes an image column."""
    features = {}
    for name, values in columns.items():
        if isinstance(values[0], Image.Image):
            features[name] = datasets.Image()
        else:
            features[name] = datasets.Dataset.from_dict({name: values}).features[name]
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(tmp_path)
    return str(tmp_path)


def test_unusual_column_names(tmp_path):
    source = saved(tmp_path, photo=[picture(0)], target=[2], size=[3])
    found = load_image_dataset(source)
    assert (found.image_column, found.label_column, found.num_classes) == ("photo", "target", 3)
    named = load_image_dataset(source, image_column="photo", label_column="size")
    assert named.label(named.rows[0]) == 3


@pytest.mark.parametrize(
    ("numbers", "named", "expected"),
    [
        (["label"], ["domain"], "label"),  # not any column with named classes
        ([], ["domain"], "domain"),
        (["label"], ["target"], "target"),  # of two usual names that with named classes
        ([], ["label", "domain"], "label"),
        ([], ["coarse_label", "fine_label"], "fine_label"),
        (["size"], ["breed", "domain"], None),
    ],
)
def test_the_label_column_is_found(tmp_path, numbers, named, expected):
    features = dict.fromkeys(numbers, datasets.Value("int64"))
    features |= dict.fromkeys(named, datasets.ClassLabel(names=["a", "b"])) | {"image": datasets.Image()}
    rows = dict.fromkeys([*numbers, *named], [1]) | {"image": [picture(0)]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path)
    assert load_image_dataset(str(tmp_path)).label_column == expected


def test_several_image_columns_must_be_named(tmp_path):
    source = saved(tmp_path, left=[picture(0)], right=[picture(1)])
    with pytest.raises(DataError, match="2 image columns.*image_column"):
        load_image_dataset(source)
    right = load_image_dataset(source, image_column="right")
    assert np.array_equal(pixels(right)[0], np.asarray(picture(1)))


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_not_in_use_are_not_read(tmp_path, streaming):
    rows = {"image": [picture(i) for i in range(6)], "eps": [0.5] * 6, "label": [0, 1, 2] * 2}
    plain = load_image_dataset(saved(tmp_path / "plain", **rows), streaming=streaming)
    rows["mask"] = [{"bytes": b"broken", "path": None}] * 3 + [encoded(picture(i)) for i in range(3)]
    rows |= {"raw": [b"bytes"] * 6, "boxes": [[1, 2]] * 6, "caption": ["a picture"] * 6}
    every = saved(tmp_path / "every", **rows)
    features = datasets.load_from_disk(every).features | {"mask": datasets.Image(), "image": datasets.Image()}
    datasets.load_from_disk(every).cast(datasets.Features(features)).save_to_disk(tmp_path / "masked")
    found = load_image_dataset(str(tmp_path / "masked"), streaming=streaming, image_column="image")
    assert list(next(iter(found.rows))) == ["image", "eps", "label", "caption"]  # in the order they are stored in
    assert all(np.array_equal(*pair) for pair in zip(pixels(found), pixels(plain), strict=True))
    assert [found.label(row) for row in found.rows] == [0, 1, 2] * 2
    if streaming:  # the fingerprint is what it was when all columns were in the rows
        features["image"] = datasets.Image(decode=False)
        told = f"{found.origin} {datasets.Features({name: features[name] for name in rows})}"
        assert found.fingerprint == hashlib.sha256(told.encode()).hexdigest()[:16]
        cut = Augmentation(16)
        labels = [[row["labels"] for row in StreamedImages(data, 20, cut)] for data in (found, plain)]
        assert labels[0] == labels[1]
    else:
        assert found.fingerprint == plain.fingerprint
        samples = PositionedImages(found, 6, Augmentation(16))
        assert [samples[i]["broken"] for i in range(6)] == [-1] * 6


@pytest.mark.parametrize("argument", ["image_column", "label_column", "adversarial_column"])
def test_wrong_column_is_named(image_folder, argument):
    with pytest.raises(DataError, match=rf"{argument}='nonsense'.*\['image', 'label'\]"):
        load_image_dataset(str(image_folder), **{argument: "nonsense"})


@pytest.mark.parametrize("argument", ["image_column", "adversarial_column"])
def test_column_without_images_is_named(image_folder, argument):
    with pytest.raises(DataError, match=f"{argument}='label'.*not images"):
        load_image_dataset(str(image_folder), **{argument: "label"})


def test_labels_must_be_indices(tmp_path):
    source = saved(tmp_path, image=[picture(0)], label=["cat"])
    assert load_image_dataset(source).label_column is None
    with pytest.raises(DataError, match="label_column='label'.*not class indices"):
        load_image_dataset(source, label_column="label")


def test_unlabelled_and_missing_labels(tmp_path):
    image_rows(2, labelled=False).save_to_disk(tmp_path / "none")
    dataset = load_image_dataset(str(tmp_path / "none"))
    assert dataset.label_column is None and dataset.num_classes is None and dataset.label(dataset.rows[0]) == -1
    dataset = load_image_dataset(saved(tmp_path / "some", image=[picture(0), picture(1)], label=[1, None]))
    assert [dataset.label(row) for row in dataset.rows] == [1, -1] and dataset.num_classes == 2


def test_adversarial_column_is_found(tmp_path):
    source = saved(tmp_path, image=[picture(0)], adversarial_image=[picture(1)], label=[0])
    dataset = load_image_dataset(source)
    assert (dataset.image_column, dataset.adversarial_column) == ("image", "adversarial_image")


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_of_another_library(tmp_path, streaming):
    """Without the Hub's metadata an image column is a struct, or plain bytes."""
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    struct = {"bytes": buffer.getvalue(), "path": None}
    pandas.DataFrame({"image": [struct], "raw": [buffer.getvalue()], "label": [1]}).to_parquet(tmp_path / "x.parquet")
    source = str(tmp_path / "x.parquet")
    for dataset in (
        load_image_dataset(source, streaming=streaming),
        load_image_dataset(source, image_column="raw", streaming=streaming),
    ):
        assert np.array_equal(pixels(dataset)[0], np.asarray(picture(0)))
        assert [dataset.label(row) for row in dataset.rows] == [1]


def test_embedded_images():
    dataset = load_image_dataset("embedded:cifar10", "whatever")
    assert len(dataset) == 20 and dataset.num_classes == 10
    assert all(image.shape == (32, 32, 3) for image in pixels(dataset))
    # the test set's first ten: cat, ship, ship, airplane, frog, frog, automobile, frog, cat, automobile
    assert [dataset.label(row) for row in dataset.rows][:10] == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert len(load_image_dataset("embedded:cifar10", max_images=3)) == 3
    assert len(load_image_dataset("embedded:imagenet")) == 20


def test_unknown_embedded_name():
    with pytest.raises(DataError, match="embedded:mnist.*embedded:cifar10"):
        load_image_dataset("embedded:mnist")


def encoded(image: Image.Image, format: str = "PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


GREY = np.arange(64, dtype="u1").reshape(8, 8) * 4


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREY),
        Image.fromarray(GREY).convert("LA"),
        Image.fromarray(GREY).convert("RGBA"),
        Image.fromarray(GREY).convert("P"),
        Image.fromarray(GREY.astype("u2") * 257),
        Image.fromarray(GREY.astype("i4") * 257),
        Image.fromarray(GREY.astype("f4") / 255),
    ],
    ids=lambda image: image.mode,
)
def test_every_mode_becomes_the_same_rgb(image):
    expected = np.stack([GREY] * 3, axis=-1)
    for value in (image, encoded(image, "TIFF" if image.mode in "IF" else "PNG")):
        decoded = decode_image(value)
        assert decoded.mode == "RGB" and np.array_equal(np.asarray(decoded), expected)


@pytest.mark.parametrize(
    "array", [GREY.astype("f4"), GREY.astype("i4") * 2**20, -GREY.astype("i4"), GREY.astype("f4") * np.nan]
)
def test_grey_of_no_known_scale_is_not_read(array):
    with pytest.raises(OSError, match="not a readable image"):
        decode_image(Image.fromarray(array))


def test_wide_grey_goes_to_the_nearest_level():
    levels = np.array([[128.4, 128.6, 254.6]])
    for array in (np.rint(levels * 257).astype(np.uint16), (levels / 255).astype(np.float32)):
        assert np.asarray(to_rgb(Image.fromarray(array)))[0, :, 1].tolist() == [128, 129, 255]


def test_transparent_pixels_show_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert np.asarray(to_rgb(image)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    colour, grey = palette.convert("RGB"), Image.fromarray(np.array([[10, 40]], "u1"))
    for cell in (encoded(palette, transparency=1), encoded(colour, transparency=(40, 50, 60))):
        assert np.asarray(decode_image(cell)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert np.asarray(decode_image(encoded(grey, transparency=40))).tolist() == [[[10] * 3, [255] * 3]]


def test_pictures_come_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    turned = encoded(picture(0, width=24, height=20), "JPEG", exif=exif)
    assert decode_image(turned).size == (20, 24)
    with Image.open(io.BytesIO(turned["bytes"])) as decoded:  # as a row of a column that was decoded
        assert decode_image(decoded).size == (20, 24)


@pytest.mark.parametrize(
    "value",
    [None, 7, {"bytes": None, "path": None}, {"bytes": b"text", "path": None}, {"bytes": None, "path": "/nowhere.png"}],
)
def test_what_is_no_image_raises_oserror(value):
    with pytest.raises(OSError):
        decode_image(value)


def test_torn_images_raise_oserror():
    for name, options in (("PNG", {}), ("JPEG", {}), ("TIFF", {}), ("GIF", {}), ("WEBP", {"lossless": True})):
        whole = encoded(picture(1), name, **options)["bytes"]
        for share in (0.2, 0.5, 0.8):
            with pytest.raises(OSError):
                decode_image({"bytes": whole[: int(len(whole) * share)], "path": None})
