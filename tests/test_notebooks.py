"""The notebooks run from top to bottom, offline, anywhere; what is stored of them is whole and free of machine traces.

Their outputs are renewed by `python notebooks/execute.py`.
"""

import ast
import base64
import importlib.util
import io
import json
import os
import re
import sys
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

pytest_plugins = ["hub_client"]

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
FIRST, SECOND = "01_purify_and_evaluate.ipynb", "02_lora_adaptation.ipynb"


def load_execute():
    spec = importlib.util.spec_from_file_location("notebooks_execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXECUTE = load_execute()


@cache
def stored(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / name, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A notebook without its outputs, run in an empty folder."""

    @cache
    def run(name: str) -> nbformat.NotebookNode:
        notebook = nbformat.read(FOLDER / name, as_version=4)
        for cell in code(notebook):
            cell.outputs, cell.execution_count = [], None
        folder = tmp_path_factory.mktemp("notebook")
        EXECUTE.execute(notebook, folder, timeout=500)
        assert not list(folder.iterdir()), "it leaves files where it is run"
        return notebook

    return run


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook, kind: str) -> dict[str, list[str]]:
    """Cell id -> its outputs of a MIME type, or what it printed for `stdout`."""
    found: dict[str, list[str]] = {}
    for cell in code(notebook):
        for output in cell.outputs:
            value = output.text if output.get("name") == kind else output.get("data", {}).get(kind)
            if value is not None:
                found.setdefault(cell.id, []).append(value)
    return found


def table(text: str) -> list[list[str]]:
    """The cells of a Markdown table, its header first."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if set("".join(row)) - set("-: ")]


def test_all_notebooks_are_known():
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == sorted(EXECUTE.NOTEBOOKS) == [FIRST, SECOND]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.checkpoint
@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_it_runs_offline_from_an_empty_folder(executed, name):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    notebook = executed(name)
    assert EXECUTE.faults(notebook) == []
    # what is stored is what it puts out: pictures and tables in the same cells
    for kind in ("image/png", "text/markdown", "stdout"):
        fresh, kept = outputs(notebook, kind), outputs(stored(name), kind)
        assert {cell: len(found) for cell, found in fresh.items()} == {cell: len(found) for cell, found in kept.items()}


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_what_is_stored_is_whole(name):
    assert EXECUTE.faults(stored(name)) == []
    nbformat.validate(stored(name))


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_parameters_come_first_and_are_plain_values(name):
    first, *others = code(stored(name))
    assert first.id == "parameters"
    values = {}
    for node in ast.parse(first.source).body:
        assert isinstance(node, ast.Assign) and node.targets[0].id.isupper()
        values[node.targets[0].id] = ast.literal_eval(node.value)
    used = {node.id for cell in others for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)}
    assert set(values) <= used, "a parameter that changes nothing"
    assert values["DEVICE"] == "auto" and values["DATASET"].startswith("embedded:")
    assert values.get("REPO_ID") is None


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_it_reads_as_a_tutorial(name):
    notebook = stored(name)
    assert notebook.cells[0].source.startswith("# ")
    assert max(len(cell.source.splitlines()) for cell in code(notebook)) <= 45
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert prose.count("\n## ") >= 5
    # a figure in the text would stand there whatever is measured
    assert re.findall(r"\d[\d.]* ?(?:%(?! interval)|dB|points|percent)", prose) == []


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_pictures_show_something(name):
    pictures = outputs(stored(name), "image/png")
    assert sum(map(len, pictures.values())) >= 4
    for cell, found in pictures.items():
        for picture in found:
            image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
            assert min(image.size) >= 80 and np.asarray(image).std() > 10, cell


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.checkpoint
def test_the_first_measures_two_threat_models_in_two_columns(executed):
    (text,) = outputs(executed(FIRST), "text/markdown")["benchmark"]
    header, row = table(text)
    measured = dict(zip(header, row, strict=True))
    assert {"clean", "purified clean", "undefended", "gray-box", "white-box"} <= set(header)
    percent = {name: float(value.split()[0]) for name, value in measured.items() if name != "attack"}
    assert percent["clean"] == 95.0  # of the twenty images, by the released classifier
    assert percent["undefended"] < 10 < 50 < percent["gray-box"]
    assert percent["white-box"] < percent["gray-box"] and "not checked" in measured["white-box"]
    assert re.search(r"all 20, gray-box: 0\.[4-9]", outputs(executed(FIRST), "stdout")["cosine"][0])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.checkpoint
def test_the_second_compares_on_the_same_images_and_hides_nothing(executed):
    found = outputs(executed(SECOND), "text/markdown")
    header, *rows = table(found["compare"][0])
    before, after = (dict(zip(header, row, strict=True)) for row in rows)
    assert before["purifier"].startswith("before") and after["purifier"].startswith("after")
    assert before["undefended"] == after["undefended"]
    assert before["clean"].startswith("100.0 ")  # of its own predictions
    _, attacked, purified, _ = table(found["compare"][1])
    assert attacked[1] == attacked[2] and purified[1] != purified[2], "the adapter changes nothing"
    shares = {name: int(trained.replace(",", "")) for name, _, trained in table(found["share"][0])[1:]}
    printed = outputs(executed(SECOND), "stdout")
    share = float(re.search(r"([\d.]+)%", printed["share"][0])[1])
    assert min(shares.values()) > 0 and share < 5
    for step in (0, 10):
        assert f"step {step}:" in printed["train"][0]
    assert "accelerate launch train/adapt_lora.py" in printed["train"][0]
    assert printed["save"][0].count("largest difference") == 3
    assert "nothing is pushed" in printed["push"][0]


def push_from_notebook(source: str, base: str, repo: str, run: Path) -> None:
    """In the process of the Hub's client."""
    import torch
    from peft import PeftModel

    from maep_hf import MAEPConfig, MAEPModel
    from maep_hf.adaptation import add_lora, default_lora_config, save_adapter

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    decoder = {f"decoder_{name}": value for name, value in sizes.items()}
    model = MAEPModel(MAEPConfig(image_size=16, **sizes, **decoder, local_branch_layers=1, local_branch_channels=8))
    for head in (model.local_branch.head, model.decoder.head):
        torch.nn.init.normal_(head.weight, std=0.02)  # zeros would be an untrained one
    model.save_pretrained(run / "base")
    model.push_to_hub(base)
    model = MAEPModel.from_pretrained(run / "base")
    adapted = add_lora(model, default_lora_config(model, rank=2))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    save_adapter(adapted, run / "adapter")
    exec(source, {"REPO_ID": repo, "BASE_REPO_ID": base, "run": run})
    loaded = PeftModel.from_pretrained(MAEPModel.from_pretrained(base), repo).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in adapted.state_dict().items())


def test_the_second_pushes_where_it_is_told_to(client, hub, tmp_path):
    (source,) = (cell.source for cell in stored(SECOND).cells if cell.id == "push")
    client(push_from_notebook, source, "someone/notebook-base", "someone/notebook-adapter", tmp_path)
    assert b"someone/notebook-base" in hub.files("someone/notebook-adapter")["README.md"]


def test_the_installed_kernelspecs_are_never_used(tmp_path, monkeypatch):
    spec = tmp_path / "share" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["no-such-python"], "display_name": "x", "language": "x"}))
    monkeypatch.setenv("JUPYTER_PATH", str(spec.parents[1]))
    source = "import sys\nfrom pathlib import Path\nprint(sys.prefix)\nprint(Path.cwd())"
    notebook = EXECUTE.execute(new_notebook(cells=[new_code_cell(source)]), tmp_path)
    assert notebook.cells[0].outputs[0].text.split("\n")[:2] == [sys.prefix, str(tmp_path.resolve())]
    assert any("path" in fault for fault in EXECUTE.faults(notebook))
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        EXECUTE.execute(new_notebook(cells=[new_code_cell("1 / 0")]), tmp_path)


def ran(*found, source: str = "pass", count: int = 1):
    return new_notebook(cells=[new_code_cell(source, outputs=list(found), execution_count=count)])


@pytest.mark.parametrize(
    ("notebook", "named"),
    [
        (ran(count=2), "not run from top to bottom"),
        (ran(new_output("error", ename="ValueError", evalue="", traceback=[])), "error ValueError"),
        (ran(new_output("stream", name="stderr", text="50%|###")), "stderr"),
        (ran(new_output("stream", name="stdout", text="saved in /srv/someone/run")), "path '/srv/someone/run'"),
        (ran(new_output("stream", name="stdout", text="saved\n/srv/run")), "path '/srv/run'"),
        (ran(new_output("stream", name="stdout", text=r"in C:\Users\x")), "path"),
        (ran(new_output("display_data", data={"text/html": "<b>/srv/run/x</b>"})), "path"),
        (ran(new_output("stream", name="stdout", text="from http://mirror/simple")), "address"),
        (ran(new_output("stream", name="stdout", text="at 10.0.0.7")), "address"),
        (ran(source="folder = '/srv/data'"), "path"),
        (ran(new_output("display_data", data={"image/png": "A" * 2_000_000})), "bytes"),
        (new_notebook(cells=[new_markdown_cell("see `/srv/data/x`"), new_markdown_cell("in ~/x")]), "path"),
    ],
)
def test_faults_are_found(notebook, named):
    assert any(named in fault for fault in EXECUTE.faults(notebook)), EXECUTE.faults(notebook)


def test_what_is_no_fault():
    text = "8/255 of 3/20, gray-box / white-box, runs/lora/adapter, and/or, 1 / 2\n| a | 5.1 (1.0–2.0) |"
    good = ran(new_output("stream", name="stdout", text=text), source="x = 'checkpoints/resnet20-cifar10'  # ../data")
    good.cells.append(new_markdown_cell("[arXiv 2501.16904](https://arxiv.org/abs/2501.16904) and `../README.md`"))
    assert EXECUTE.faults(good) == []


def test_a_notebook_that_fails_is_left_as_it_was(tmp_path, capsys):
    path = Path(tmp_path / "x.ipynb")
    nbformat.write(ran(source="print(__import__('tempfile').gettempdir() + '/x/y')"), path)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="not stored"):
        EXECUTE.main([str(path)])
    assert path.read_bytes() == before
    nbformat.write(ran(source="print('well')", count=7), path)
    EXECUTE.main([str(path)])
    (cell,) = nbformat.read(path, as_version=4).cells
    assert cell.outputs[0].text == "well\n" and cell.execution_count == 1
