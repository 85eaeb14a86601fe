"""Stored pairs: inside the ball in 8 bits, the same after any interruption, and read back by training."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessor

from maep_hf import MAEPConfig, MAEPModel, pairs
from maep_hf.attacks import KINDS
from maep_hf.configuration_cifar_resnet import CifarResNetConfig
from maep_hf.data import DataError, decode_image, load_image_dataset
from maep_hf.modeling_cifar_resnet import CifarResNetForImageClassification
from maep_hf.pairs import PairsArguments, make_pairs, quantise
from maep_hf.training import Augmentation, DataArguments, RunFolderError
from maep_hf.training.purification import PurificationArguments
from maep_hf.training.run_folder import LOCK
from maep_hf.training.samples import PositionedImages, collate
from maep_hf.training.stages import AttackArguments, purification_task

SCRIPT = Path(__file__).resolve().parent.parent / "train" / "make_pairs.py"
ATTACK = AttackArguments(attack_steps=3, square=0.2)
IMAGES = 13


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def save_classifier(folder, seed=0, labels=4, names=None):
    torch.manual_seed(seed)
    named = {"id2label": dict(enumerate(names))} if names else {"num_labels": labels}
    config = CifarResNetConfig(depth=8, width=4, **named)
    CifarResNetForImageClassification(config).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def surrogate(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("surrogate"))


def write_source(folder, sizes=((8, 8),), broken=()):
    """A saved dataset of noise pictures, among them one nearly black and one nearly white."""
    rng = np.random.default_rng(0)
    cells = []
    for index in range(IMAGES):
        height, width = sizes[index % len(sizes)]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if index < 2:
            pixels[1:] = 255 * index
        path = folder.parent / f"{folder.name}-{index}.png"
        Image.fromarray(pixels).save(path)
        cells.append({"bytes": b"no image" if index in broken else path.read_bytes(), "path": None})
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])}
    rows = {"image": cells, "label": [index % 4 for index in range(IMAGES)]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source")


def test_pairs_are_made_where_everything_else_runs(source, surrogate, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moved.append(device) or self)
    args = arguments(source, surrogate, tmp_path, attack_labels="predicted")
    attacker = pairs._Attacker(args, None, [torch.nn.Identity()], None)
    assert attacker.device == torch.device("mps") == moved[0]


def arguments(source, surrogate, out, **more):
    options = {"batch_size": 3, "shard_images": 5} | more
    return PairsArguments(dataset=source, surrogates=[surrogate], output_dir=str(out), **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted((Path(folder) / "data").iterdir())}


def read(folder):
    return datasets.load_dataset(str(folder), split="train")


def levels(row):
    """(clean, adversarial) as integers."""
    return [np.asarray(row[name]).astype(int) for name in ("image", "adversarial_image")]


@pytest.mark.parametrize("eps", [1.0, 2.5, 7.0, 7.999, 8.0, 12.0])
def test_rounding_stays_in_the_ball_and_in_range(eps):
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    clean[0], clean[1] = 0, 255
    x = clean.float() / 255
    at_random = x + (torch.rand(x.shape, generator=generator) * 2 - 1) * eps / 255
    for adversarial in (x + eps / 255, x - eps / 255, at_random):
        adversarial = adversarial.clamp(0, 1)
        stored = quantise(adversarial, clean, torch.full((4,), eps))
        assert stored.dtype == torch.uint8
        assert (stored.int() - clean.int()).abs().max() <= eps
        # no more is lost than rounding to a level inside the ball must lose
        assert (stored.float() / 255 - adversarial).abs().max() * 255 <= max(0.5, eps - int(eps)) + 1e-3
    whole = quantise((x + eps / 255).clamp(0, 1), clean, torch.full((4,), eps))
    assert torch.equal(whole.int(), (clean.int() + int(eps)).clamp(max=255))


def test_dataset_has_every_image_inside_its_ball(source, surrogate, tmp_path):
    out = make_pairs(arguments(source, surrogate, tmp_path / "pairs", copies=4), ATTACK)
    assert sorted(contents(out)) == [f"train-{i:05d}-of-00011.parquet" for i in range(11)]
    made = read(out)
    assert made["index"] == [*range(IMAGES)] * 4
    assert made.features["label"].names == ["a", "b", "c", "d"]
    assert set(made["attack"]) == set(KINDS) - {"pgd_l2"}  # refused in stored pairs
    original = load_image_dataset(source)
    for row in made:
        clean, adversarial = levels(row)
        source_row = original.rows[row["index"]]
        assert np.array_equal(clean, np.asarray(decode_image(source_row["image"])))
        assert row["label"] == source_row["label"]
        distance = abs(adversarial - clean).max()
        if row["attack"] == "clean":
            assert distance == 0 and row["eps"] == 0 and row["surrogate"] is None
        else:
            assert 0 < distance <= row["eps"]
            assert row["surrogate"] == (None if row["attack"] == "square" else surrogate)
            assert ATTACK.eps_min <= row["eps"] <= ATTACK.eps_max
    record = json.loads((out / "make_pairs.json").read_text())
    assert record["result"]["pairs"] == 4 * IMAGES and record["result"]["broken_images"] == []
    assert sum(record["result"]["attacks"].values()) == 4 * IMAGES
    assert record["arguments"]["pairs"]["dataset"] == source and record["versions"]["torch"]
    assert not (out / ".unfinished").exists()
    copies = np.array(made["eps"]).reshape(4, IMAGES)
    assert len(np.unique(copies[:, 5])) == 4  # every copy has its own draw


def test_fgsm_pairs_are_the_attack_itself(source, surrogate, tmp_path):
    attack = AttackArguments(clean=0, fgsm=1, fgsm_rs=0, mi_fgsm=0, pgd=0, eps_min=8, eps_max=8)
    out = make_pairs(arguments(source, surrogate, tmp_path / "pairs"), attack)
    for row in read(out):
        clean, adversarial = levels(row)
        assert row["eps"] == 8
        inside = (clean > 8) & (clean < 247)
        distances = abs(adversarial - clean)[inside]
        assert set(distances) <= {0, 8} and (distances == 8).mean() > 0.5  # 0 where the gradient vanishes


@pytest.mark.parametrize(("kind", "told"), [("true", True), ("predicted", False)])
def test_an_attack_is_told_the_labels_only_where_it_starts_from_them(
    source, surrogate, tmp_path, monkeypatch, kind, told
):
    seen, perturb = [], pairs.perturb
    monkeypatch.setattr(pairs, "perturb", lambda models, x, y, *more: seen.append(y) or perturb(models, x, y, *more))
    args = arguments(source, surrogate, tmp_path / "pairs", batch_size=IMAGES, shard_images=IMAGES, attack_labels=kind)
    assert read(make_pairs(args, ATTACK))["label"] == [index % 4 for index in range(IMAGES)]
    assert [labels.tolist() if told else labels for labels in seen] == [
        [index % 4 for index in range(IMAGES)] if told else None
    ]


def test_several_surrogates_share_the_images(source, surrogate, tmp_path):
    second = save_classifier(tmp_path / "second", seed=1)
    args = arguments(source, surrogate, tmp_path / "pairs", copies=3)
    args.surrogates.append(second)
    attack = AttackArguments(clean=0)
    assert set(read(make_pairs(args, attack))["surrogate"]) == {surrogate, second}


def test_own_sizes_and_center_crop(surrogate, tmp_path):
    source = write_source(tmp_path / "source", sizes=((8, 8), (12, 9), (20, 31)))
    kept = read(make_pairs(arguments(source, surrogate, tmp_path / "kept"), ATTACK))
    assert [image.size for image in kept["image"]][:3] == [(8, 8), (9, 12), (31, 20)]
    assert all(row["image"].size == row["adversarial_image"].size for row in kept)
    assert all(abs(np.subtract(*levels(row))).max() <= row["eps"] for row in kept)
    cut = read(make_pairs(arguments(source, surrogate, tmp_path / "cut", image_size=10), ATTACK))
    assert {image.size for image in cut["image"]} == {(10, 10)}


def test_large_batches_are_split_by_pixels(source, surrogate, tmp_path, monkeypatch):
    sizes = []
    attack = pairs.perturb
    monkeypatch.setattr(pairs, "PIXELS_AT_ONCE", 150)
    monkeypatch.setattr(pairs, "perturb", lambda models, x, *rest: sizes.append(len(x)) or attack(models, x, *rest))
    make_pairs(arguments(source, surrogate, tmp_path / "pairs"), ATTACK)
    assert max(sizes) == 2 and sum(sizes) == IMAGES


def test_images_are_attacked_before_too_many_are_read(surrogate, tmp_path, monkeypatch):
    source = write_source(tmp_path / "source", sizes=((8, 8), (12, 9), (20, 31)))
    whole = read(make_pairs(arguments(source, surrogate, tmp_path / "whole", batch_size=IMAGES), ATTACK))
    waiting, most, attack, decode = 0, 0, pairs.perturb, pairs.decode_image

    def decoded(cell):
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        return decode(cell)

    def attacked(models, x, *rest):
        nonlocal waiting
        waiting -= len(x)
        return attack(models, x, *rest)

    monkeypatch.setattr(pairs, "PIXELS_AT_ONCE", 150)
    monkeypatch.setattr(pairs, "decode_image", decoded)
    monkeypatch.setattr(pairs, "perturb", attacked)
    made = read(make_pairs(arguments(source, surrogate, tmp_path / "pairs", batch_size=IMAGES), ATTACK))
    assert most == 2 and waiting == 0
    assert made["index"] == whole["index"] and made["eps"] == whole["eps"]


def test_classes_of_another_order_are_matched_by_name(tmp_path):
    """The same images with the same labels by name: the same attacked images."""
    surrogate = save_classifier(tmp_path / "surrogate", names="abcd")
    straight = datasets.load_from_disk(write_source(tmp_path / "source"))
    turned = straight.map(lambda row: {"label": 3 - row["label"]}, load_from_cache_file=False)
    turned.cast_column("label", datasets.ClassLabel(names=list("dcba"))).save_to_disk(tmp_path / "turned")
    found = [
        read(make_pairs(arguments(str(tmp_path / name), surrogate, tmp_path / f"{name}-pairs"), ATTACK))
        for name in ("source", "turned")
    ]
    assert found[0]["label"] == [3 - label for label in found[1]["label"]]
    for one, other in zip(*found, strict=True):
        assert np.array_equal(levels(one)[1], levels(other)[1])


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the package catches it."""


@pytest.mark.parametrize("streaming", [False, True])
def test_interrupted_at_every_write_gives_the_same_files(source, surrogate, tmp_path, monkeypatch, streaming):
    loaded = pairs.load_surrogates([surrogate])
    monkeypatch.setattr(pairs, "load_surrogates", lambda names: loaded)
    monkeypatch.setattr(pairs, "describe_environment", dict)
    options = {"streaming": streaming}
    whole = contents(make_pairs(arguments(source, surrogate, tmp_path / "whole", **options), ATTACK))
    assert list(whole) == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    if streaming:
        assert whole == contents(make_pairs(arguments(source, surrogate, tmp_path / "map-style"), ATTACK))
    replace, rmtree = os.replace, pairs.shutil.rmtree
    args = arguments(source, surrogate, tmp_path / "pairs", **options)
    interruptions, broken_off = 0, True
    while broken_off:  # each start gets through one more write than the one before
        calls = 0

        def interrupt(function, limit=interruptions):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > limit:
                    raise Killed
                return function(*args, **kwargs)

            return call

        args.overwrite_output_dir = False
        rmtree(args.output_dir, ignore_errors=True)
        monkeypatch.setattr(os, "replace", interrupt(replace))
        monkeypatch.setattr(pairs.shutil, "rmtree", interrupt(rmtree))
        try:
            make_pairs(args, ATTACK)
            broken_off = False
        except Killed:
            interruptions += 1
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(pairs.shutil, "rmtree", rmtree)
        assert contents(make_pairs(args, ATTACK)) == whole
    assert interruptions >= 9  # the record, three times a summary and a file, the end
    assert not (tmp_path / "pairs" / ".unfinished").exists()


def test_killed_process_goes_on_after_the_last_whole_file(source, surrogate, tmp_path, caplog):
    out = tmp_path / "pairs"
    words = ["--dataset", source, "--surrogates", surrogate, "--output_dir", str(out)]
    words += ["--batch_size", "3", "--shard_images", "5", "--attack_steps", "3", "--square", "0.2"]
    code = f"""
import os, runpy, signal, sys
from maep_hf import pairs
calls, attack = 0, pairs.perturb
def perturb(*args):
    global calls
    calls += 1
    if calls == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return attack(*args)
pairs.perturb = perturb
sys.argv = ["make_pairs.py", *{words!r}]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "hf-cache")}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (out / "data").exists() and len(list((out / ".unfinished/data").iterdir())) == 1
    with pytest.raises(DataError):  # half a dataset must not be taken for a whole one
        load_image_dataset(str(out))
    with caplog.at_level(logging.INFO):
        made = make_pairs(arguments(source, surrogate, out), ATTACK)
    assert "going on after 1 whole files" in caplog.text
    assert contents(made) == contents(make_pairs(arguments(source, surrogate, tmp_path / "whole"), ATTACK))


def test_complete_folder_is_left_alone(source, surrogate, tmp_path, monkeypatch, caplog):
    args = arguments(source, surrogate, tmp_path / "pairs")
    make_pairs(args, ATTACK)
    monkeypatch.setattr(pairs, "perturb", lambda *_: pytest.fail("attacked again"))
    with caplog.at_level(logging.INFO):
        make_pairs(args, ATTACK)
    assert "nothing is left to do" in caplog.text


def test_pairs_in_the_home_of_the_user_are_found_there(source, surrogate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    args = arguments(source, surrogate, "~/pairs")
    assert make_pairs(args, ATTACK) == make_pairs(args, ATTACK) == tmp_path / "home" / "pairs"
    assert len(contents(tmp_path / "home" / "pairs")) == 3 and not (tmp_path / "~").exists()
    assert load_image_dataset("~/pairs").rows.num_rows == IMAGES  # by the name that it was made by


def test_other_arguments_are_refused_and_overwrite_starts_over(source, surrogate, tmp_path):
    first = contents(make_pairs(arguments(source, surrogate, tmp_path / "pairs"), ATTACK))
    with pytest.raises(RunFolderError, match="pairs.seed: 0 there, 1 now.*--overwrite_output_dir"):
        make_pairs(arguments(source, surrogate, tmp_path / "pairs", seed=1), ATTACK)
    with pytest.raises(RunFolderError, match="attack.eps_max"):
        make_pairs(arguments(source, surrogate, tmp_path / "pairs"), AttackArguments(attack_steps=3, eps_max=9))
    args = arguments(source, surrogate, tmp_path / "pairs", seed=1, overwrite_output_dir=True)
    assert contents(make_pairs(args, ATTACK)) != first


def test_changed_surrogate_or_data_is_refused(tmp_path):
    source, surrogate = write_source(tmp_path / "source"), save_classifier(tmp_path / "surrogate")
    args = arguments(source, surrogate, tmp_path / "pairs")
    make_pairs(args, ATTACK)
    save_classifier(tmp_path / "surrogate", seed=1)
    with pytest.raises(RunFolderError, match="the data: .*surrogates"):
        make_pairs(args, ATTACK)
    save_classifier(tmp_path / "surrogate")
    write_source(tmp_path / "source", broken=[3])
    with pytest.raises(RunFolderError, match="the data: .*dataset"):
        make_pairs(args, ATTACK)


def test_changed_preprocessing_of_a_surrogate_is_refused(source, tmp_path):
    surrogate = save_classifier(tmp_path / "surrogate")
    args = arguments(source, surrogate, tmp_path / "pairs")
    whole = contents(make_pairs(args, ATTACK))
    make_pairs(args, ATTACK)
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.4] * 3, image_std=[0.25] * 3).save_pretrained(
        surrogate
    )
    with pytest.raises(RunFolderError, match=r"preprocessing\[\S*surrogate\]: .*0.5.* there, .*mean=.0.4.* now"):
        make_pairs(args, ATTACK)
    record = tmp_path / "pairs" / "make_pairs.json"
    record.write_text(
        json.dumps({key: value for key, value in json.loads(record.read_text()).items() if key != "start"})
    )
    assert contents(make_pairs(args, ATTACK)) == whole  # of an older version: what it was is not known


def test_folder_with_other_files_is_never_touched(source, surrogate, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    args = arguments(source, surrogate, tmp_path / "mine", overwrite_output_dir=True)
    with pytest.raises(RunFolderError, match="thesis.txt"):
        make_pairs(args, ATTACK)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="cannot be written"):
        make_pairs(arguments(source, surrogate, tmp_path / "file" / "pairs"), ATTACK)


def test_second_start_leaves_pairs_that_are_being_made_alone(source, surrogate, tmp_path, monkeypatch):
    whole = contents(make_pairs(arguments(source, surrogate, tmp_path / "whole"), ATTACK))
    perturb, refused = pairs.perturb, []

    def start_another(*args):
        monkeypatch.setattr(pairs, "perturb", perturb)
        for overwrite in (False, True):
            with pytest.raises(RunFolderError, match="output_dir='.*pairs': a run is still going on in this folder"):
                make_pairs(arguments(source, surrogate, tmp_path / "pairs", overwrite_output_dir=overwrite), ATTACK)
            refused.append(overwrite)
        return perturb(*args)

    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / LOCK).touch()  # of a process that was killed before it had a record
    monkeypatch.setattr(pairs, "perturb", start_another)
    assert contents(make_pairs(arguments(source, surrogate, tmp_path / "pairs"), ATTACK)) == whole
    assert refused == [False, True] and not (tmp_path / "pairs" / LOCK).exists()


def test_full_disk_says_so_and_can_go_on(source, surrogate, tmp_path, monkeypatch):
    write, files = pairs.pq.ParquetWriter.write_table, []

    def full(self, table, **kwargs):
        if self not in files:
            files.append(self)
        if len(files) == 2:
            raise OSError(28, "No space left on device")
        write(self, table, **kwargs)

    args = arguments(source, surrogate, tmp_path / "pairs")
    monkeypatch.setattr(pairs.pq.ParquetWriter, "write_table", full)
    with pytest.raises(RunFolderError, match="No space left.*after the 1 files"):
        make_pairs(args, ATTACK)
    monkeypatch.setattr(pairs.pq.ParquetWriter, "write_table", write)
    assert len(read(make_pairs(args, ATTACK))) == IMAGES


def test_a_source_that_breaks_off_is_not_taken_for_the_disk(source, surrogate, tmp_path, monkeypatch):
    def torn(*args):
        raise ConnectionError("the stream broke off")
        yield

    monkeypatch.setattr(pairs, "_rows", torn)
    with pytest.raises(ConnectionError, match="the stream broke off"):
        make_pairs(arguments(source, surrogate, tmp_path / "pairs"), ATTACK)


def test_broken_images_are_skipped_and_counted(surrogate, tmp_path, caplog):
    source = write_source(tmp_path / "source", broken=(0, 6, 7, 8, 9))
    out = make_pairs(arguments(source, surrogate, tmp_path / "pairs", copies=2), ATTACK)
    assert "5 images could not be decoded" in caplog.text
    assert read(out)["index"] == [1, 2, 3, 4, 5, 10, 11, 12] * 2
    assert json.loads((out / "make_pairs.json").read_text())["result"]["broken_images"] == [0, 6, 7, 8, 9]
    good = read(make_pairs(arguments(write_source(tmp_path / "good"), surrogate, tmp_path / "p2", copies=2), ATTACK))
    draws = {(i // IMAGES, row["index"]): row["eps"] for i, row in enumerate(good)}
    assert [row["eps"] for row in read(out)][8:] == [draws[1, index] for index in (1, 2, 3, 4, 5, 10, 11, 12)]
    hopeless = write_source(tmp_path / "hopeless", broken=range(IMAGES))
    with pytest.raises(DataError, match="none of the dataset's images"):
        make_pairs(arguments(hopeless, surrogate, tmp_path / "p3"), ATTACK)


def test_labels_that_do_not_fit_are_refused(source, surrogate, tmp_path):
    two = save_classifier(tmp_path / "two", labels=2)
    with pytest.raises(DataError, match="4 classes.*only 2"):
        make_pairs(arguments(source, two, tmp_path / "a"), ATTACK)
    rows = load_image_dataset(source).rows
    plain = rows.cast_column("label", datasets.Value("int64")).cast_column("image", datasets.Image())
    plain.save_to_disk(tmp_path / "plain")
    with pytest.raises(DataError, match="at least 3 classes.*only 2"):
        make_pairs(arguments(str(tmp_path / "plain"), two, tmp_path / "b"), ATTACK)
    plain.remove_columns("label").save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(DataError, match="attack_labels=predicted"):
        make_pairs(arguments(str(tmp_path / "unlabelled"), two, tmp_path / "c"), ATTACK)
    plain.cast_column("label", datasets.Value("string")).save_to_disk(tmp_path / "text")
    with pytest.raises(DataError, match="'label' holds Value.*class_encode_column.*attack_labels=predicted"):
        make_pairs(arguments(str(tmp_path / "text"), two, tmp_path / "c"), ATTACK)
    args = arguments(str(tmp_path / "unlabelled"), two, tmp_path / "c", attack_labels="predicted")
    assert "label" not in read(make_pairs(args, ATTACK)).column_names


@pytest.mark.parametrize("image_size", [None, 10])
def test_the_classes_of_a_surrogate_are_those_of_its_logits(source, surrogate, tmp_path, monkeypatch, image_size):
    """What it says of them is stale where its head was replaced."""
    load = pairs.load_surrogates

    def saying(classes, kept=4):
        def loaded(names):
            for classifier in (models := load(names)):
                head = classifier.classifier.classifier
                head.weight.data, head.bias.data = head.weight.data[:kept], head.bias.data[:kept]
                classifier.config.num_labels = classes
            return models

        return loaded

    made = []
    for classes in (4, 1000, 3):
        monkeypatch.setattr(pairs, "load_surrogates", saying(classes))
        args = arguments(source, surrogate, tmp_path / str(classes), image_size=image_size)
        made.append(contents(make_pairs(args, ATTACK)))
    assert made[0] == made[1] == made[2]
    monkeypatch.setattr(pairs, "load_surrogates", saying(4, kept=2))
    with pytest.raises(DataError, match="4 classes.*only 2"):
        make_pairs(arguments(source, surrogate, tmp_path / "two", image_size=image_size), ATTACK)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"copies": 0}, "copies=0"), ({"batch_size": 0}, "batch_size"), ({"shard_images": -1}, "shard_images"),
     ({"image_size": 0}, "image_size"), ({"seed": -1}, "seed"), ({"attack_labels": "all"}, "attack_labels")],
)  # fmt: skip
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PairsArguments(**options)
    with pytest.raises(ValueError, match="surrogates"):
        PairsArguments(surrogates=[])


def spoil(folder):
    """A surrogate whose logits are NaN."""
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"classifier.bias": weights["classifier.bias"] * np.nan}, path, metadata={"format": "pt"})
    return str(folder)


def test_a_surrogate_without_finite_gradients_makes_no_pairs(source, tmp_path):
    broken = spoil(save_classifier(tmp_path / "broken"))
    with pytest.raises(ValueError, match="logits or gradients of .*broken are not finite.*give other surrogates"):
        make_pairs(arguments(source, broken, tmp_path / "pairs"), ATTACK)
    assert not (tmp_path / "pairs" / "data").exists()


def test_radius_below_one_level_and_missing_surrogate(source, surrogate, tmp_path):
    with pytest.raises(ValueError, match="eps_min=0.5.*8 bits"):
        make_pairs(arguments(source, surrogate, tmp_path / "pairs"), AttackArguments(eps_min=0.5))
    with pytest.raises(ValueError, match="pgd_l2=0.1.*8 bits"):
        make_pairs(arguments(source, surrogate, tmp_path / "pairs"), AttackArguments(pgd_l2=0.1))
    with pytest.raises(OSError, match="could not be loaded"):
        make_pairs(arguments(source, str(tmp_path / "nowhere"), tmp_path / "pairs"), ATTACK)
    assert not (tmp_path / "pairs").exists()


def test_command_line_and_recipe(source, surrogate, tmp_path, capsys):
    import runpy

    main = runpy.run_path(str(SCRIPT))["main"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"surrogates: [{surrogate}]\neps_max: 6\nattack_steps: 2\ncopies: 2\nshard_images: 20\n")
    out = tmp_path / "pairs"
    main(["--config", str(recipe), "--dataset", source, "--output_dir", str(out), "--copies", "1"])
    assert list(contents(out)) == ["train-00000-of-00001.parquet"]
    assert max(read(out)["eps"]) <= 6
    with pytest.raises(RunFolderError, match="pairs.copies"):
        main(["--config", str(recipe), "--dataset", source, "--output_dir", str(out)])
    with pytest.raises(DataError, match="neither a local path nor reachable"):
        main(["--dataset", str(tmp_path / "nothing"), "--output_dir", str(tmp_path / "other")])
    with pytest.raises(SystemExit):
        main(["--config", str(recipe), "--eps_min", "many"])
    assert "eps_min" in capsys.readouterr().err


@pytest.fixture
def tiny_purifier():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    sizes |= {f"decoder_{name}": value for name, value in sizes.items()}
    return MAEPModel(MAEPConfig(image_size=8, patch_size=4, local_branch_layers=0, **sizes))


def test_training_reads_the_pairs_back(source, surrogate, tmp_path, tiny_purifier):
    out = make_pairs(arguments(source, surrogate, tmp_path / "pairs"), ATTACK)
    data = DataArguments(dataset=str(out), validation_dataset=source, validation_split="train", validation_images=4)
    settings = PurificationArguments(surrogates=[surrogate], guidance_weight=0.1)
    task = purification_task(tiny_purifier, data, AttackArguments(clean=0, fgsm=1), settings)
    assert task.train_data.adversarial_column == "adversarial_image"
    assert task.train_data.image_column == "image" and task.train_data.label_column == "label"
    samples = task.samples(total=IMAGES, start=0, seed=0)
    assert isinstance(samples, PositionedImages)
    batch = collate([samples[i] for i in range(IMAGES)])
    assert "attack_start" not in batch  # nothing is drawn that the stored pair has
    batch = task.prepare(batch)
    stored = {tuple(levels(row)[0].ravel()): (levels(row)[1], row["eps"]) for row in read(out)}
    for clean, attacked in zip(batch["pixel_values"], batch["attacked"], strict=True):
        clean, attacked = ((255 * x).round().int().permute(1, 2, 0).numpy() for x in (clean, attacked))
        mirrored = tuple(clean.ravel()) not in stored
        if mirrored:
            clean, attacked = clean[:, ::-1], attacked[:, ::-1]
        expected, eps = stored[tuple(clean.ravel())]
        assert np.array_equal(attacked, expected) and abs(attacked - clean).max() <= eps
    losses = task.loss(tiny_purifier, batch)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"]) and losses["guidance_loss"] >= 0


def test_files_of_ones_own_beside_the_pairs_stop_no_overwrite(source, surrogate, tmp_path):
    out = make_pairs(arguments(source, surrogate, tmp_path / "pairs"), ATTACK)
    (out / "config.json").write_text("mine")
    before = contents(out)
    make_pairs(arguments(source, surrogate, out, seed=1, overwrite_output_dir=True), ATTACK)
    assert contents(out) != before and (out / "config.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("kind", "labels"), [("bool", [True, False]), ("uint8", [0, None, 3]), ("int32", [2, None]), ("int64", [1])]
)
def test_labels_of_every_type_are_stored(surrogate, tmp_path, kind, labels):
    pictures = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    rows.save_to_disk(tmp_path / "source")
    args = arguments(str(tmp_path / "source"), surrogate, tmp_path / "pairs", attack_labels="predicted")
    made = read(make_pairs(args, ATTACK))
    assert made["label"][:] == [-1 if label is None else int(label) for label in labels]
    assert made.features["label"] == datasets.Value("int64")


def test_training_reads_a_stream_of_pairs(source, surrogate, tmp_path):
    out = make_pairs(arguments(source, surrogate, tmp_path / "pairs"), ATTACK)
    data = load_image_dataset(str(out), streaming=True)
    assert data.adversarial_column == "adversarial_image" and data.class_names == ["a", "b", "c", "d"]
    row = next(iter(data.rows))
    tensors = Augmentation(8, "center", flip=False)(
        [decode_image(row[name]) for name in ("image", "adversarial_image")], np.random.default_rng(0)
    )
    assert (tensors[0].int() - tensors[1].int()).abs().max() <= row["eps"]
