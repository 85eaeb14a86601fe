"""The model card: from the records, complete, and honest about what is not there."""

import json
import re

import pytest
import torch
from jinja2 import UndefinedError

from maep_hf import MAEPConfig, MAEPModel
from maep_hf.hub import render_model_card

SHARE = {"correct": 16, "n": 20, "percent": 80.0, "interval_95": [58.4, 91.9]}
PROTOCOL = {
    "threat_model": "gray-box",
    "attack": {"name": "PGD-20", "norm": "Linf", "eps": 8.0, "steps": 20},
    "dataset": {"name": "CIFAR-10", "split": "test", "images": "the first 20", "n": 20},
    "classifier": {"name": "resnet20-cifar10"},
    "purifier": {"name": "my-purifier"},
}
RESULT = {
    "protocol": PROTOCOL,
    "accuracy": {name: SHARE for name in ("clean", "attacked", "purified_clean", "purified_attacked")},
    "checks": None,
}
RUN = {
    "arguments": {"data": {"dataset": "/home/someone/cifar10.parquet", "eps": 8}, "loop": {"output_dir": "/tmp/x"}},
    "data": {"train": "fingerprint-1"},
    "versions": {"torch": "2.13.0", "peft": None},
    "git_revision": "abc123",
}


@pytest.fixture
def folder(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {f"decoder_{name}": value for name, value in sizes.items()}
    torch.manual_seed(0)
    MAEPModel(MAEPConfig(local_branch_layers=0, **sizes)).save_pretrained(tmp_path / "my-purifier")
    return tmp_path / "my-purifier"


def test_card_shows_protocol_recipe_and_versions(folder):
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "results.jsonl").write_text(json.dumps(RESULT) + "\n")
    card = render_model_card(folder, repo_id="someone/my-purifier")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    text = card.text
    assert "| gray-box | PGD-20, Linf 8/255 | CIFAR-10 test, the first 20 (n = 20)" in text
    assert "80.0 (58.4 to 91.9) |" in text
    assert "Not measured: bpda, white-box, black-box." in text
    assert 'from_pretrained("someone/my-purifier")' in text
    assert "dataset: cifar10.parquet" in text and "eps: 8" in text and "abc123" in text and "torch 2.13.0" in text
    assert "fingerprint-1" in text
    assert not re.search(r"/home/|/tmp/|peft|None|\{\{|\{%", text)


def test_card_without_records_names_what_is_missing(folder):
    text = render_model_card(folder).text
    assert "Not measured: gray-box, bpda, white-box, black-box." in text
    assert "No record of the training run" in text
    assert "| threat model |" not in text
    assert not re.search(r"None|\{\{|\{%|\}\}", text)


def test_table_has_no_broken_lines(folder):
    lines = render_model_card(folder, results=[RESULT, RESULT]).text.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4 and {line.count("|") for line in table} == {9}
    first = lines.index(table[0])
    assert lines[first : first + 4] == table


def test_template_that_asks_for_more_is_refused(folder, tmp_path):
    (tmp_path / "card.md").write_text("---\n{{ card_data }}\n---\n{{ unheard_of }}\n")
    with pytest.raises(UndefinedError, match="unheard_of"):
        render_model_card(folder, template=tmp_path / "card.md")


def test_result_without_its_protocol_is_refused(folder):
    for name in ("threat_model", "attack", "dataset", "classifier"):
        with pytest.raises(ValueError, match=f"no '{name}'"):
            protocol = {key: value for key, value in PROTOCOL.items() if key != name}
            render_model_card(folder, results=[RESULT | {"protocol": protocol}])
    with pytest.raises(ValueError, match="threat model 'grey'"):
        render_model_card(folder, results=[RESULT | {"protocol": PROTOCOL | {"threat_model": "grey"}}])


def test_unreliable_results_say_so(folder):
    checks = {"reliable": False, "failed": ["gradient", "transfer"], "results": []}
    result = RESULT | {"protocol": PROTOCOL | {"threat_model": "white-box"}, "checks": checks}
    assert "⚠ unreliable: gradient, transfer failed |" in render_model_card(folder, results=[result]).text
    unchecked = render_model_card(folder, results=[result | {"checks": None}]).text
    assert "(not checked for gradient masking) |" in unchecked
    assert "| – |" in unchecked  # what was attacked through the purifier says nothing of the bare classifier


def test_what_is_no_purifier_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        render_model_card(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no config.json"):
        render_model_card(tmp_path / "empty")
