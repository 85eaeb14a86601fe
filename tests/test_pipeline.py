"""`pipeline("image-purification")`: every input, batches of mixed sizes, options, and loading it as remote code."""

import json
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import picture, tiny_purifier
from PIL import Image
from transformers import ViTImageProcessor, pipeline

from maep_hf import ImagePurificationPipeline, MAEPImageProcessor
from maep_hf.figures import difference_image

TASK = "image-purification"


@pytest.fixture(scope="module")
def pipe():
    return ImagePurificationPipeline(tiny_purifier().eval(), task=TASK)


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "purifier"
    pipe.save_pretrained(folder)
    return folder


def pixels(image: Image.Image) -> torch.Tensor:
    return MAEPImageProcessor()(image, return_tensors="pt").pixel_values


def equal(one: Image.Image, other: Image.Image, levels: int = 0) -> bool:
    """Of one mode and size, and no value further apart than that."""
    same = (one.mode, one.size) == (other.mode, other.size)
    return same and np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() <= levels


def test_result_is_that_of_the_model(pipe):
    image = picture(0)
    expected = pipe.model.purify(pixels(image))
    assert (expected - pixels(image)).abs().max() > 0.01  # else this shows nothing
    assert equal(pipe(image), MAEPImageProcessor().post_process(expected)[0])


def test_all_kinds_of_input_agree(pipe, tmp_path):
    image, path = picture(1), tmp_path / "picture.png"
    image.save(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = pipe(image)
    assert expected.size == image.size
    for one in (path, str(path), array, array.transpose(2, 0, 1), tensor, tensor / 255):
        assert equal(pipe(one), expected)
    for many in ([image, path], (image, path), np.stack([array, array]), torch.stack([tensor, tensor]) / 255):
        results = pipe(many)
        assert isinstance(results, list) and len(results) == 2 and all(equal(each, expected) for each in results)
    lazily = pipe(each for each in (image, path))
    assert not isinstance(lazily, list) and all(equal(each, expected) for each in lazily)
    assert pipe([]) == []


def test_url(pipe, tmp_path):
    image = picture(2)
    image.save(tmp_path / "picture.png")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert equal(pipe(f"{url}/picture.png"), pipe(image))
        with pytest.raises(ValueError, match=f"{url}/gone.png: .*404"):
            pipe(f"{url}/gone.png")
        server.shutdown()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_modes(pipe, mode):
    grey, colour = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100), picture(3)
    image = {"I;16": grey, "F": Image.fromarray(np.asarray(grey) / np.float32(65535))}.get(mode)
    image = colour.convert(mode) if image is None else image
    expected = MAEPImageProcessor().post_process(pipe.model.purify(pixels(image)))[0]
    assert expected.mode == "RGB" and equal(pipe(image), expected)
    kept = pipe(image, keep_mode=True)
    assert (kept.mode, kept.size) == (image.mode, image.size)


def test_files_keep_sixteen_bits_and_are_turned_upright(pipe, tmp_path):
    grey = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    grey.save(tmp_path / "grey.png")
    assert equal(pipe(tmp_path / "grey.png", keep_mode=True), pipe(grey, keep_mode=True))
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture(4)
    image.save(tmp_path / "turned.png", exif=exif)
    for turned in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert equal(pipe(turned), pipe(image.transpose(Image.Transpose.ROTATE_270)))


def test_grey_arrays(pipe):
    grey = np.asarray(picture(0).convert("L"))
    assert pipe(grey).mode == "RGB"
    for array in (grey, grey[None], grey[..., None]):
        assert equal(pipe(array, keep_mode=True), pipe(Image.fromarray(grey), keep_mode=True))


@pytest.mark.parametrize(
    ("shape", "mode"),
    [((3, 10, 1), "RGB"), ((10, 1, 3), "RGB"), ((1, 10, 3), "L"), ((10, 3, 1), "L"), ((2, 10, 1), "L"), ((10, 1), "L")],
)
def test_the_mode_of_an_array_is_that_of_its_channels(pipe, shape, mode):
    array = np.random.default_rng(0).random(shape, dtype=np.float32)
    for image in (array, torch.from_numpy(array)):
        assert pipe(image, keep_mode=True).mode == mode


def test_purifier_of_one_channel():
    grey = ImagePurificationPipeline(tiny_purifier(num_channels=1).eval(), task=TASK)
    results = grey(picture(0).convert("L"), return_difference=True)
    assert results["purified"].mode == results["difference"].mode == "L"
    with pytest.raises(ValueError, match=r"3 channels, the purifier takes 1: .*convert\('L'\)"):
        grey(picture(0))


def test_batches_of_mixed_sizes(pipe, monkeypatch):
    sizes = [(16, 16), (40, 7), (16, 16), (3, 3), (40, 7), (16, 16), (1, 50)]
    images = [picture(index, *size) for index, size in enumerate(sizes)]
    expected = [pipe(image) for image in images]
    assert [each.size for each in expected] == sizes
    shapes, purify = [], pipe.model.purify
    monkeypatch.setattr(pipe.model, "purify", lambda x, **kw: shapes.append(tuple(x.shape)) or purify(x, **kw))
    for batch_size in (1, 2, 3, 7, 100):
        results = pipe(images, batch_size=batch_size, return_difference=True)
        # one level: sums of another order in larger matrix products
        assert all(equal(each["purified"], one, levels=1) for each, one in zip(results, expected, strict=True))
        assert [each["difference"].size for each in results] == sizes
    assert shapes[-4:] == [(3, 3, 16, 16), (2, 3, 7, 40), (1, 3, 3, 3), (1, 3, 50, 1)]


def test_difference(pipe):
    image = picture(5)
    before, after = pixels(image), pipe.model.purify(pixels(image))
    for options, factor in (({}, 8.0), ({"difference_factor": 2}, 2.0)):
        results = pipe(image, return_difference=True, **options)
        assert equal(results["purified"], pipe(image))
        expected = MAEPImageProcessor().post_process(difference_image(after, before, factor))[0]
        assert equal(results["difference"], expected) and np.asarray(expected).std() > 1


def test_options_of_the_call_and_of_the_constructor(pipe, monkeypatch):
    seen, purify = [], pipe.model.purify
    monkeypatch.setattr(pipe.model, "purify", lambda x, **options: seen.append(options) or purify(x, **options))
    options = {"mode": "interpolate", "overlap": 0.5, "window_batch_size": 2, "strength": 1.2}
    pipe(picture(0), **options)
    made = ImagePurificationPipeline(pipe.model, task=TASK, return_difference=True, **options)
    assert set(made(picture(0))) == {"purified", "difference"}
    made(picture(0), mode="windows")
    pipe(picture(0))
    assert seen == [options, options, options | {"mode": "windows"}, {"mode": None}]


def test_resize_of_the_image_processor(pipe):
    processor = MAEPImageProcessor(do_resize=True, size={"height": 12, "width": 10})
    assert ImagePurificationPipeline(pipe.model, processor, task=TASK)(picture(0)).size == (10, 12)


def test_what_is_wrong_is_named(pipe, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(b"")
    picture(0).save(tmp_path / "cut.bmp")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "cut.bmp").read_bytes()[:200])
    for name in ("gone.png", "notes.png", "cut.png", "cut.bmp"):
        with pytest.raises(ValueError, match=f"{name}: not an image file"):
            pipe(tmp_path / name)
    for wrong in (None, 5, {"image": 1}, np.zeros(3), np.zeros((5, 5, 7))):
        with pytest.raises(ValueError, match="[Ii]mages? must "):
            pipe(wrong)
    with pytest.raises(ValueError, match=r"not lie in \[0, 1\]"):
        pipe(np.full((8, 8, 3), 200.0))
    with pytest.raises(ValueError, match="one flat list"):
        pipe([[picture(0)]])
    with pytest.raises(TypeError, match="windows: no such option of image-purification; there are .*window_batch_size"):
        pipe(picture(0), windows=3)
    for options in (
        {"difference_factor": 0},
        {"mode": "best"},
        {"overlap": 1},
        {"window_batch_size": 0},
        {"strength": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            pipe(picture(0), **options)
    with pytest.raises(ValueError, match="model: Linear is not a purifier"):
        ImagePurificationPipeline(torch.nn.Linear(1, 1), task=TASK)
    with pytest.raises(ValueError, match="image_processor: ViTImageProcessor.* does not"):
        ImagePurificationPipeline(pipe.model, ViTImageProcessor(), task=TASK)


@pytest.mark.parametrize("options", [{"task": TASK}, {}, {"task": TASK, "trust_remote_code": True}])
def test_installed_package_serves_saved_pipelines_without_trust(pipe, saved, options, tmp_path):
    loaded = pipeline(model=str(saved), device="cpu", **options)
    assert type(loaded) is ImagePurificationPipeline and equal(loaded(picture(0)), pipe(picture(0)))
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads((saved / "config.json").read_text())


def test_models_saved_without_pipeline_or_image_processor(pipe, purifier_folder):
    assert not (purifier_folder / "preprocessor_config.json").exists()
    loaded = pipeline(TASK, model=str(purifier_folder), device="cpu", batch_size=2)
    assert equal(loaded([picture(0), picture(1)])[0], pipe(picture(0)), levels=1)


def test_adapter(pipe, saved, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    adapted = get_peft_model(tiny_purifier(), LoraConfig(target_modules=["fc1"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    from maep_hf import MAEPModel

    model = PeftModel.from_pretrained(MAEPModel.from_pretrained(saved), tmp_path / "adapter").eval()
    result = ImagePurificationPipeline(model, task=TASK)(picture(0))
    assert not equal(result, pipe(picture(0)))
    assert equal(result, MAEPImageProcessor().post_process(model.purify(pixels(picture(0))).detach())[0])


def test_saved_code_imports_only_what_lies_beside_it(saved):
    names = {path.name for path in saved.iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "preprocessor_config.json"),
        *("configuration_maep.py", "image_processing_maep.py", "modeling_maep.py", "pipeline_maep.py"),
    }
    config = json.loads((saved / "config.json").read_text())
    entry = {"impl": "pipeline_maep.ImagePurificationPipeline", "pt": ["AutoModel"], "type": "image"}
    assert config["custom_pipelines"] == {TASK: entry}


def test_a_purifier_saved_without_the_pipeline_does_not_name_it(saved, tmp_path):
    from maep_hf import MAEPModel

    model, before = MAEPModel.from_pretrained(saved), (saved / "config.json").read_text()
    named = dict(model.config.custom_pipelines)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "custom_pipelines" not in config and not (tmp_path / "pipeline_maep.py").exists()
    assert model.config.custom_pipelines == named == json.loads(before)["custom_pipelines"]
    (tmp_path / "pipeline_maep.py").write_bytes((saved / "pipeline_maep.py").read_bytes())
    model.config.custom_pipelines = {**named, "another": {"impl": "another.Pipeline", "pt": ["AutoModel"]}}
    model.save_pretrained(tmp_path)  # where its code lies
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(before)
