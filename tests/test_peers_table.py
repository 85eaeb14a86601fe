"""The table of defences beside each other, from stored records."""

import json

import pytest
from made_up_records import record

from maep_hf.evaluation.tables import percent
from train import peers_table


def made(figure, purifier, attack="AutoAttack (standard)", ms=5.0, n=1000, **options):
    one = record(figure, attack=attack, purifier=purifier, n=n, **options)
    return one | {"ms_per_image": {"attack": 1.0, "purify": ms, "classify": 12.0}}


RECORDS = [
    made(85.0, "maep", purified_clean=93.0),
    made(78.0, "maep", "MI-FGSM", ms=7.0, n=500),
    made(80.0, "maep", "Square", ms=6.0, n=500),
    made(60.0, "disco", ms=50.0, purified_clean=89.0),
    made(45.0, "disco", "MI-FGSM", ms=50.0, n=500),
    made(30.0, "disco", "Square", ms=50.0, n=500),
    made(99.0, "maep", "Gaussian noise", control=True, ms=1.0),
    made(0.0, "maep", threat_model="white-box", ms=1.0),
]


def test_drop_gap_worst_attack_and_time():
    maep, disco = peers_table.lines_of(RECORDS)
    assert (maep.name, maep.clean_drop, maep.gap, maep.ms_per_image) == ("maep", 1.0, 8.0, 6.0)
    assert maep.worst.attack.startswith("MI-FGSM") and maep.worst.figure["percent"] == 78.0
    assert (disco.clean_drop, disco.gap) == (5.0, 29.0) and disco.worst.attack.startswith("Square")


def test_the_main_attack_is_on_the_same_images_for_all():
    few = [made(figure, name, n=100) for figure, name in ((75.0, "maep"), (55.0, "disco"))]
    maep, disco = peers_table.lines_of([few[0], *RECORDS, few[1]])
    assert (maep.main.figure["n"], disco.main.figure["n"]) == (1000, 1000) and (maep.gap, disco.gap) == (8.0, 29.0)


def test_bars_are_of_purified_clean_images_the_main_attack_and_the_worst(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(peers_table, "save_figure", lambda figure, *args, **options: drawn.append(figure))
    peers_table.picture(RECORDS, tmp_path / "peers.png")
    (axis,) = drawn[0].axes
    bars = [[patch.get_width() for patch in axis.patches[first : first + 3]] for first in (0, 3)]
    assert bars == [[93.0, 85.0, 78.0], [89.0, 60.0, 30.0]]
    assert [text.get_text() for text in axis.texts] == [f"{value:.1f}" for line in bars for value in line]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["maep\n6.0 ms an image", "disco\n50.0 ms an image"]
    assert axis.get_legend_handles_labels()[1] == ["clean images", "AutoAttack", "worst attack"]


def test_command_writes_table_and_picture(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in RECORDS))
    peers_table.main([str(tmp_path)])
    text = (tmp_path / "peers.md").read_text()
    assert text in capsys.readouterr().out and "worst of 3 attacks" in text
    bare, maep, disco = text.splitlines()[-3:]
    assert bare.startswith("| none (undefended) | 94.0") and "| 8.0 | 78.0 (" in maep and maep.endswith("| 6.0 |")
    assert "| 29.0 | 30.0 (" in disco and "Square" in disco
    wilson = (percent(each) for each in (RECORDS[0]["accuracy"]["clean"], RECORDS[0]["accuracy"]["attacked"]))
    assert bare == "| none (undefended) | {} |  | {} |  |  |  |".format(*wilson)
    cells = [cell.split(" (")[0] for cell in maep.strip("| ").split(" | ")]
    assert cells == ["maep", "93.0", "1.0", "85.0", "8.0", "78.0", "6.0"]  # in the order of the header
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (RECORDS[-1:], "no gray-box"),
        (RECORDS[:5], "disco was not measured under Square"),
        ([*RECORDS, made(50.0, "maep", n=100)], "disco was not measured under AutoAttack"),  # on those images
        ([made(50.0, "maep", "PGD-20")], "AutoAttack.*is missing"),
        ([*RECORDS, made(50.0, "maep", classifier="resnet44")], "one classifier.*resnet44"),
        ([*RECORDS, made(84.0, "maep", seed=1)], "of maep, AutoAttack.*several times on 1000 images.*leave one in"),
    ],
)
def test_what_cannot_be_compared_is_refused(records, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        peers_table.markdown(records)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    with pytest.raises(SystemExit):
        peers_table.main([str(tmp_path)])
    assert not (tmp_path / "peers.md").exists() and "error" in capsys.readouterr().err
