"""The tables of a purifier on images that it was not trained on, from stored records."""

import json

import pytest
from made_up_records import record
from matplotlib.container import ErrorbarContainer

from maep_hf.evaluation.tables import percent
from train import transfer_table


def made(figure, purifier="maep", dataset="nips", n=500, clean=90.0, **options):
    one = record(
        figure, attack=options.pop("attack", "AutoAttack"), eps=4.0, purifier=purifier, n=n, clean=91.0,
        purified_clean=clean, attacked=0.0, purifier_options=options,
        dataset={"name": dataset, "split": "test", "images": f"the first {n}", "n": n, "fingerprint": dataset},
    )  # fmt: skip
    return one | {"ms_per_image": {"attack": 1.0, "purify": 30.0, "classify": 12.0}}


RECORDS = [
    made(40.0),
    made(38.0, mode="interpolate"),
    made(70.0, "adapted", clean=88.0),
    made(60.0, "adapted", dataset="cifar10"),
    made(80.0, dataset="cifar10"),
    made(82.0, dataset="cifar10", attack="PGD-20"),
]


def test_a_domain_has_a_line_for_every_purifier_and_option():
    (domain, rows), _ = transfer_table.domains(RECORDS).items()
    lines = transfer_table.domain_table(rows)
    assert domain == ("nips test, the first 500", "resnet56") and len(lines) == 2 + 4
    header, _, bare, plain, interpolated, adapted = lines
    assert header.count("PSNR") == 2 and bare.startswith("| none (undefended) | 91.0")
    undefended = percent(RECORDS[0]["accuracy"]["attacked"])
    assert bare == f"| none (undefended) | {percent(RECORDS[0]['accuracy']['clean'])} |  | {undefended} |  |  |  |"
    cells = [cell.split(" (")[0] for cell in plain.strip("| ").split(" | ")]
    assert cells == ["maep", "90.0", "38.1", "40.0", "33.3", "30.0", "2.5"]  # in the order of the header
    assert "40.0 (" in plain and "33.3" in plain and plain.endswith("| 30.0 | 2.5 |")
    assert plain.startswith("| maep |") and interpolated.startswith("| maep, mode interpolate |")
    assert "38.0 (" in interpolated
    assert adapted.startswith("| adapted") and "88.0 (" in adapted and "70.0 (" in adapted


def test_across_domains_one_line_a_purifier_under_each_domains_first_attack():
    lines, figures = transfer_table.across(transfer_table.domains(RECORDS))
    assert list(figures) == ["maep", "adapted"] and len(lines) == 4
    assert figures["maep"] == [(90.0, 40.0), (90.0, 80.0)] and figures["adapted"] == [(88.0, 70.0), (90.0, 60.0)]
    assert "interpolate" not in "".join(lines)


def test_another_strength_is_another_line_across_domains():
    stronger = [made(45.0, strength=1.3), made(70.0, dataset="cifar10", strength=1.3)]
    stronger.append(made(44.0, "adapted", strength=2))  # in one domain: no comparison
    _, figures = transfer_table.across(transfer_table.domains([*RECORDS, *stronger]))
    assert list(figures) == ["maep", "adapted", "maep, strength 1.3"]
    assert figures["maep, strength 1.3"] == [(90.0, 45.0), (90.0, 70.0)]


def of_weights(mark, one):
    one["protocol"]["purifier"] |= {"fingerprint": mark * 16}
    return one | {"key": one["key"] + mark}


def test_two_purifiers_of_one_name_have_lines_of_their_own():
    records = [
        of_weights("a", made(40.0, "adapter")),
        of_weights("1", made(10.0, "adapter")),
        of_weights("a", made(60.0, "adapter", dataset="cifar10")),
    ]
    lines = transfer_table.domain_table(next(iter(transfer_table.domains(records).values())))
    named = [f"adapter [fingerprint={mark * 8}…]" for mark in "a1"]
    assert [line.split(" | ")[0] for line in lines[-2:]] == [f"| {name}" for name in named]
    assert "40.0 (" in lines[-2] and "10.0 (" in lines[-1]
    _, figures = transfer_table.across(transfer_table.domains(records))
    assert figures == {named[0]: [(90.0, 40.0), (90.0, 60.0)]}


def test_other_threat_models_are_not_in_a_table_of_gray_box_figures():
    white_box = made(1.0) | {"key": "white-box"}
    white_box["protocol"]["threat_model"] = "white-box"
    assert transfer_table.markdown([white_box, *RECORDS]) == transfer_table.markdown(RECORDS)


def test_two_results_for_one_place_are_refused():
    other = made(10.0)
    other["protocol"]["seed"], other["key"] = 1, "other"
    with pytest.raises(ValueError, match="two of maep, AutoAttack.*they differ in seed.*take one out"):
        transfer_table.markdown([*RECORDS, other])


def test_a_domain_of_one_purifier_is_left_out_where_others_have_several():
    more = transfer_table.domains([*RECORDS, made(74.0, n=100), made(73.0, n=100, overlap=0.0)])
    assert list(transfer_table.compared(more)) == list(transfer_table.domains(RECORDS)) != list(more)
    alone = transfer_table.domains([made(40.0), made(80.0, dataset="cifar10")])
    assert transfer_table.compared(alone) == alone


def test_a_purifier_measured_in_one_domain_is_no_comparison():
    assert not transfer_table.across(transfer_table.domains(RECORDS[:2]))[1]
    assert "Trained on one" not in transfer_table.markdown(RECORDS[:2])


def test_the_command_writes_table_and_picture(tmp_path, capsys):
    dollars = [made(each, r"d $x_{$", dataset=dataset) for each, dataset in ((50.0, "nips"), (55.0, "cifar10"))]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [*RECORDS, *dollars]))
    transfer_table.main([str(tmp_path)])
    text = (tmp_path / "transfer.md").read_text()
    assert text in capsys.readouterr().out and text.count("| adapted |") == 3
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_rows_of_two_panels_with_their_n_and_intervals(tmp_path, monkeypatch):
    drawn, save = [], transfer_table.save_figure
    monkeypatch.setattr(
        transfer_table, "save_figure", lambda figure, *a, **b: drawn.append(save(figure, *a, **b) and figure)
    )
    third = [made(30.0, dataset="svhn", n=200), made(35.0, "adapted", dataset="svhn", n=200)]
    stronger = [made(45.0, strength=1.3), made(70.0, dataset="cifar10", strength=1.3)]
    transfer_table.picture([*RECORDS, *third, *stronger], tmp_path / "transfer.png")
    (figure,) = drawn
    places = [axis.get_position() for axis in figure.axes]
    assert len({round(place.x0, 2) for place in places}) == len({round(place.y0, 2) for place in places}) == 2
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert [title.split("\n")[0] for title in titles] == [
        "nips test, the first 500", "cifar10 test, the first 500", "svhn test, the first 200",
    ]  # fmt: skip
    labels = [label.get_text().replace("\xa0", " ") for label in figure.axes[0].get_yticklabels()]
    assert labels == ["none (undefended)", "maep", "adapted", "maep, strength 1.3"]
    ends = [
        segment[:, 0].tolist()
        for bars in figure.axes[0].containers if isinstance(bars, ErrorbarContainer)
        for segment in bars[2][0].get_segments()
    ]  # fmt: skip
    assert ends[:2] == [pytest.approx(RECORDS[0]["accuracy"][kind]["interval_95"]) for kind in ("clean", "attacked")]
    assert ends[2:4] == [pytest.approx(RECORDS[0]["accuracy"][kind]["interval_95"]) for kind in
                         ("purified_clean", "purified_attacked")]  # fmt: skip
    assert [text.get_text() for text in figure.axes[2].texts][-1] == "– not measured"  # of the strength
    for axis in figure.axes:  # nothing of a panel lies in another one, over the legend or outside
        box = axis.get_tightbbox()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert box.y0 >= figure.legends[0].get_window_extent().y1
        assert not any(box.overlaps(other.get_window_extent()) for other in figure.axes if other is not axis)


@pytest.mark.parametrize("lines", [None, "", '{"schema": 1}\n'])
def test_nothing_to_show_is_one_line(tmp_path, capsys, lines):
    if lines is not None:
        (tmp_path / "results.jsonl").write_text(lines)
    with pytest.raises(SystemExit):
        transfer_table.main([str(tmp_path)])
    assert "error:" in capsys.readouterr().err and not (tmp_path / "transfer.md").exists()
