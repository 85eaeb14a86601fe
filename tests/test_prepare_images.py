"""Public collections as parquet: pictures bit for bit under the right labels and splits."""

import pytest
from conftest import load_script, picture
from datasets import Dataset, Image, load_dataset

prepare = load_script("prepare_images")


def save_pictures(folder, names) -> None:
    folder.mkdir(parents=True)
    for index, name in enumerate(names):
        picture(index, 12, 9).save(folder / name)


def stored(path, split="train"):
    return load_dataset("parquet", data_files=str(path), split=split).cast_column("image", Image(decode=False))


def test_nips2017(tmp_path):
    save_pictures(tmp_path / "in" / "images", ["a.png", "b.png"])
    (tmp_path / "in" / "dev_dataset.csv").write_text("ImageId,URL,TrueLabel\nb,u,1000\na,u,1\n")
    prepare.main(["nips2017", str(tmp_path / "in"), str(tmp_path / "out")])
    rows = stored(tmp_path / "out" / "test-00000-of-00001.parquet")
    assert rows["label"] == [999, 0]
    assert rows[0]["image"]["bytes"] == (tmp_path / "in" / "images" / "b.png").read_bytes()
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_one_a_class_with_what_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "IMAGENET_CLASSES", 3)
    monkeypatch.setattr(prepare, "HELD_OUT", range(1, 2))
    test_nips2017(tmp_path / "nips")
    save_pictures(tmp_path / "in", ["n02000002_b.png", "n01000001_a.png", "n03000003_c.png", "README.md.png"])
    words = ["one-a-class", str(tmp_path / "in"), str(tmp_path / "out")]
    prepare.main([*words, "--validation", str(tmp_path / "nips" / "out")])
    rows = stored(tmp_path / "out" / "train-00000-of-00001.parquet")
    assert [(row["image"]["path"], row["label"]) for row in rows] == [
        ("n01000001_a.png", 0), ("n02000002_b.png", 1), ("n03000003_c.png", 2)
    ]  # fmt: skip
    assert stored(tmp_path / "out" / "validation-00000-of-00001.parquet")["label"] == [0]


def test_no_file_of_images_is_half_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "IMAGENET_CLASSES", 1)
    monkeypatch.setattr(prepare, "HELD_OUT", range(1, 2))
    test_nips2017(tmp_path / "nips")
    save_pictures(tmp_path / "in", ["n01000001_a.png"])
    whole, write = [], Dataset.to_parquet

    def full(self, path):
        write(self, path)
        if whole:  # the second file does not fit
            path.write_bytes(path.read_bytes()[:10])
            raise OSError("disk full")
        whole.append(path)

    monkeypatch.setattr(Dataset, "to_parquet", full)
    words = ["one-a-class", str(tmp_path / "in"), str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        prepare.main([*words, "--validation", str(tmp_path / "nips" / "out")])
    assert "disk full" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["train-00000-of-00001.parquet"]


def test_what_is_held_out_is_looked_at_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "IMAGENET_CLASSES", 1)
    test_nips2017(tmp_path / "nips")
    save_pictures(tmp_path / "in", ["n01000001_a.png"])
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--validation", str(tmp_path / "nips" / "out")]
    for kind, said in (("one-a-class", "2 images, and those from 560 to 687 are needed"), ("nips2017", "takes none")):
        with pytest.raises(SystemExit):
            prepare.main([kind, *words])
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_tiny_imagenet(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "wnids.txt").write_text("n2\nn1\n")
    names = [f"{index}.png" for index in range(6002)]
    save_pictures(tmp_path / "val" / "images", ["picture.png"])
    for name in names:
        (tmp_path / "val" / "images" / name).hardlink_to(tmp_path / "val" / "images" / "picture.png")
    lines = [f"{name}\tn{2 if index % 3 else 1}\t0\t0\t1\t1" for index, name in enumerate(names)]
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines))
    prepare.main(["tiny-imagenet", str(tmp_path), str(tmp_path / "out")])
    splits = {
        name: stored(tmp_path / "out" / f"{name}-00000-of-00001.parquet") for name in ("train", "validation", "test")
    }
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 5000, "validation": 1000, "test": 2}
    assert splits["train"]["label"][:4] == [0, 1, 1, 0]


@pytest.mark.parametrize("kind", ["nips2017", "one-a-class", "tiny-imagenet"])
def test_a_wrong_folder_is_one_line(tmp_path, capsys, kind):
    with pytest.raises(SystemExit):
        prepare.main([kind, str(tmp_path), str(tmp_path / "out")])
    assert "error:" in capsys.readouterr().err and not (tmp_path / "out").exists()
