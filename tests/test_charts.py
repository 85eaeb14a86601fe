"""Charts of records: what is drawn is what was measured, nothing overlaps or is cut off, doubt can be seen."""

import os

import numpy as np
import pytest
from made_up_records import LONG_ATTACKS, PASSED, failed, record, sweep
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.container import BarContainer
from PIL import Image
from rich.console import Console

from maep_hf.evaluation import charts
from maep_hf.evaluation.charts import COLORS, accuracy_against_eps, bars_over_attacks
from maep_hf.evaluation.report import report
from maep_hf.evaluation.results import ResultsError
from maep_hf.records import as_jsonl

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib warns where a layout or a glyph fails


@pytest.fixture
def build(monkeypatch):
    """Make a chart and hand back its figure undrawn, which saves most of the time."""
    figures = []
    monkeypatch.setattr(charts, "save_figure", lambda figure, path: figures.append(figure))
    return lambda function, records: function(records, "not written") or figures[-1]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draw a chart and hand back its figure, after its file has been looked at."""
    figures = []
    save = charts.save_figure
    monkeypatch.setattr(charts, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path))

    def call(function, records):
        path = function(records, tmp_path / "new" / "chart.png")
        figure = figures[-1]
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.mode == "RGB"
            assert picture.size == tuple(figure.canvas.get_width_height())
            assert len(picture.getcolors(1 << 24)) > 20
        assert os.listdir(path.parent) == ["chart.png"]
        return figure

    return call


def all_attacks(classifiers=("resnet56",), attacks=LONG_ATTACKS):
    records = []
    for classifier in classifiers:
        for index, attack in enumerate(attacks):
            doubt = failed("eps sweep") if index == 1 else None if index == 2 else PASSED
            records.append(record(80 - 2 * index, "gray-box", attack, classifier=classifier, attacked=index))
            records.append(record(40 - 2 * index, "white-box", attack, classifier=classifier, checks=doubt))
        records.append(
            record(88, "gray-box", "JPEG", classifier=classifier, control=True, norm=None, eps=None, attacked=85)
        )
    return records


def with_few_white_box():
    """As the records of a released purifier: many attacks of one classifier, one of them in white-box."""
    standard = "AutoAttack (standard)"
    records = [record(80, "gray-box", attack) for attack in (*(f"PGD-{steps}" for steps in range(10, 24)), standard)]
    records += [record(60, "gray-box", f"noise {n}", control=True, norm=None, eps=None) for n in range(3)]
    records.append(record(0, "white-box", standard, checks=PASSED))
    return records + [record(70, "gray-box", standard, classifier=name) for name in ("wide-resnet-28-10", "resnet20")]


THREE = ("resnet56", "wide-resnet-28-10", "vit-base-patch16-224-in21k-finetuned")
PURIFIERS = [
    record(60 + 5 * index, threat_model, attack, purifier=purifier, checks=PASSED)
    for index, purifier in enumerate(("maep-tiny", "JPEG", "a purifier of a rather long name"))
    for threat_model in ("gray-box", "white-box")
    for attack in ("PGD-20", "Square")
]
CASES = {
    "one record": (bars_over_attacks, [record()]),
    "one bare record": (bars_over_attacks, [record(0, "white-box", purifier=None)]),
    "14 long names": (bars_over_attacks, all_attacks()),
    "3 classifiers": (bars_over_attacks, all_attacks(THREE, LONG_ATTACKS[:3])),
    "3 purifiers": (bars_over_attacks, PURIFIERS),
    "few white-box": (bars_over_attacks, with_few_white_box()),
    "one eps": (accuracy_against_eps, [record()]),
    "one eps of the bare classifier": (accuracy_against_eps, [record(0, "white-box", purifier=None)]),
    "two norms": (accuracy_against_eps, sweep()),
    "eps, 3 classifiers": (accuracy_against_eps, all_attacks(THREE, LONG_ATTACKS[:3])),
    "eps, 3 purifiers": (accuracy_against_eps, PURIFIERS),
}


def boxes(figure) -> list:
    """(what, box in pixels) of all that is written outside the data."""
    renderer = figure.canvas.get_renderer()
    found = [("title", figure._suptitle.get_window_extent(renderer))]
    found += [("legend", legend.get_window_extent(renderer)) for legend in figure.legends]
    for axis in figure.axes:
        texts = [axis._left_title, axis.xaxis.label, axis.yaxis.label]
        for ticks in (axis.xaxis, axis.yaxis):
            low, high = sorted(ticks.get_view_interval())
            shown = [tick for tick in ticks.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [tick.label1 for tick in shown if tick.label1.get_visible()]
        texts += axis.texts
        found += [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    return found


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_cut_off_or_overlaps(draw, case):
    figure = draw(*CASES[case])
    found = boxes(figure)
    width, height = figure.canvas.get_width_height()
    for what, box in found:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"{what!r} is cut off"
    for index, (what, box) in enumerate(found):
        for other, another in found[index + 1 :]:
            apart = box.x1 <= another.x0 + 1 or another.x1 <= box.x0 + 1
            apart |= box.y1 <= another.y0 + 1 or another.y1 <= box.y0 + 1
            assert apart, f"{what!r} overlaps {other!r}"
    panels = [axis.get_window_extent() for axis in figure.axes]
    for what, box in found:
        if what in ("title", "legend"):
            assert not any(box.overlaps(panel) for panel in panels), f"{what} lies over a panel"
    for panel in panels:
        assert panel.width > 120 and panel.height > 30


# ------------------------------------------------------------------------------------------------ accuracy against eps


def lines_of(axis) -> dict:
    """{colour: (eps, accuracy)} of the lines with at least two points."""
    return {to_hex(line.get_color()): line.get_xydata() for line in axis.lines if len(line.get_xdata()) > 1}


def test_lines_are_the_measured_ones(build):
    figure = build(accuracy_against_eps, sweep())
    linf, l2 = figure.axes
    for axis, radii in ((linf, [0, 1, 2, 4, 8, 16]), (l2, [0, 0.25, 0.5, 1, 2])):
        lines = lines_of(axis)
        assert set(lines) == {COLORS[name] for name in ("undefended", "gray-box", "white-box", "black-box")}
        for points in lines.values():
            assert points[:, 0].tolist() == radii
        bands = [band for band in axis.collections if isinstance(band, PolyCollection)]
        assert len(bands) == len(lines)
    step = 100 / 5
    expected = [92.5, *(100 * round(10 * max(0, 88 - step * i)) / 1000 for i in range(1, 6))]
    assert lines_of(linf)[COLORS["white-box"]][:, 1] == pytest.approx(expected)
    bare = lines_of(linf)[COLORS["undefended"]][:, 1]
    # from the records of the bare classifier, not from the figures beside the gray-box ones
    assert bare[:3] == pytest.approx([94, 46, 2])
    assert "Linf" in linf.get_xlabel() and "1/255" in linf.get_xlabel() and "L2" in l2.get_xlabel()
    title = figure._suptitle.get_text()
    assert "undefended, gray-box, white-box, black-box" in title and "maep-tiny" in title and "resnet56" in title
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "undefended, PGD-20", "gray-box, PGD-20", "white-box, PGD-20", "black-box, Square",
    ]  # fmt: skip


def test_band_is_the_interval(build):
    entry = record(60)
    (axis,) = build(accuracy_against_eps, [entry]).axes
    low, high = entry["accuracy"]["purified_attacked"]["interval_95"]
    ends = [
        sorted(y for x, y in band.get_paths()[0].vertices if x == 8)
        for band in axis.collections
        if to_hex(band.get_facecolor()[0]) == COLORS["gray-box"]
    ]
    assert min(ends[0]) == pytest.approx(low) and max(ends[0]) == pytest.approx(high)


def test_undefended_comes_from_gray_box_and_never_from_other_attacks(build):
    (axis,) = build(accuracy_against_eps, [record(60, attacked=5)]).axes
    assert lines_of(axis)[COLORS["undefended"]].tolist() == [[0, 94], [8, 5]]
    (axis,) = build(accuracy_against_eps, [record(60, "white-box", attacked=5, checks=PASSED)]).axes
    assert set(lines_of(axis)) == {COLORS["white-box"]}


def test_of_several_figures_beside_those_of_purifiers_the_lowest_is_drawn(build):
    records = [
        record(70, eps=4.0, attacked=40), record(60, attacked=30),
        record(60, eps=4.0, attacked=10, purifier="B", seed=1), record(50, attacked=0, purifier="B", seed=1),
    ]  # fmt: skip
    (axis,) = build(accuracy_against_eps, records).axes
    grey = [line for line in axis.lines if to_hex(line.get_color()) == COLORS["undefended"]]
    assert [line.get_xydata().tolist() for line in grey] == [[[0, 94], [4, 10], [8, 0]]]
    bare = build(bars_over_attacks, records).axes[0]
    assert [width for width, *_ in bars_of(bare)] == [10, 0]
    alone = [*records, record(20, "white-box", purifier=None)]  # what was measured alone stays
    assert [width for width, *_ in bars_of(build(bars_over_attacks, alone).axes[0])] == [20, 10]


def test_strongest_of_several_seeds_is_drawn(build):
    (axis,) = build(accuracy_against_eps, [record(60), record(50, seed=1), record(55, seed=2)]).axes
    assert lines_of(axis)[COLORS["gray-box"]][-1].tolist() == [8, 50]


def test_doubtful_points_are_ringed_and_unchecked_lines_named(build):
    records = [
        record(60, "white-box", checks=failed("eps sweep")), record(70, "white-box", eps=4.0, checks=PASSED),
        record(50, "bpda"), record(55, "bpda", eps=4.0),
    ]  # fmt: skip
    figure = build(accuracy_against_eps, records)
    rings = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_markersize() > 10]
    assert rings == [[[8, 60]]]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["bpda (not checked)", "white-box", "⚠ unreliable: failed a check for gradient masking"]
    partly = build(accuracy_against_eps, [record(60, "white-box", checks=PASSED), record(70, "white-box", eps=4.0)])
    assert partly.legends[0].get_texts()[0].get_text() == "white-box (checked in part)"


def test_every_line_lies_inside_its_axes_though_rows_share_them(build):
    records = [record(60, eps=4.0), record(50, eps=8.0)]
    records += [record(60, eps=4.0, classifier="other"), record(40, eps=16.0, classifier="other")]
    figure = build(accuracy_against_eps, records)
    for axis in figure.axes:
        low, high = axis.get_xlim()
        assert low == 0 and high >= 16 and all(max(line.get_xdata()) <= high for line in axis.get_lines())


def test_attacks_of_one_radius_give_way_to_those_of_several(build):
    (axis,) = build(accuracy_against_eps, [record(60, eps=4.0), record(50), record(70, attack="FGSM")]).axes
    assert {70.0} & {float(y) for line in axis.get_lines() for y in line.get_ydata()} == set()


def test_controls_and_unbounded_attacks_have_no_eps(build):
    control = record(88, attack="noise", control=True)
    unbounded = record(1, attack="CW-L2", norm="L2", eps=None)
    figure = build(accuracy_against_eps, [record(), control, unbounded])
    assert len(figure.axes) == 1 and "CW-L2" not in figure._suptitle.get_text()
    with pytest.raises(ResultsError, match="none is of an attack with an eps"):
        accuracy_against_eps([control, unbounded], "chart.png")


def test_a_report_leaves_no_chart_of_an_earlier_one(tmp_path):
    path = tmp_path / "results.jsonl"
    drawn = {"attacks.png": record(70, attack="FGSM"), "accuracy_against_eps.png": record(70, eps=4.0)}
    for name, more in drawn.items():
        path.write_text(as_jsonl([record(60), more]))
        report(path, tmp_path, Console(quiet=True))
        assert {found.name for found in tmp_path.glob("*.png")} == {name}
    (tmp_path / "resnet56.png").write_bytes(b"")  # not its own
    path.write_text(as_jsonl([record(60)]))
    report(path, tmp_path, Console(quiet=True))
    assert [found.name for found in tmp_path.glob("*.png")] == ["resnet56.png"]


# ------------------------------------------------------------------------------------------------------------- bars


def bars_of(axis) -> list[tuple[float, str, str | None]]:
    """(width, colour of the edge, hatch) of the bars from top to bottom."""
    bars = [bar for group in axis.containers if isinstance(group, BarContainer) for bar in group]
    bars.sort(key=lambda bar: bar.get_y())
    return [(bar.get_width(), to_hex(bar.get_edgecolor()), bar.get_hatch()) for bar in bars]


def test_each_panel_holds_one_threat_model(build):
    figure = build(bars_over_attacks, all_attacks(attacks=LONG_ATTACKS[:4]))
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
    assert list(panels) == ["undefended", "gray-box", "white-box"]
    widths = {name: [width for width, _, _ in bars_of(axis)] for name, axis in panels.items()}
    assert widths["undefended"] == pytest.approx([0, 1, 2, 3, 85])
    assert widths["gray-box"] == pytest.approx([80, 78, 76, 74, 88])
    assert widths["white-box"] == pytest.approx([40, 38, 36, 34])
    for name, axis in panels.items():
        assert {color for _, color, _ in bars_of(axis)} == {COLORS[name]}
    labels = [label.get_text() for label in panels["undefended"].get_yticklabels()]
    assert labels[2].replace("\xa0", " ") == "APGD-CE, Linf 8/255" and labels[-1] == "JPEG (control)"
    assert [axis.get_legend() for axis in figure.axes] == [None] * 3


def test_doubt_shows_in_the_bars(build):
    figure = build(bars_over_attacks, all_attacks(attacks=LONG_ATTACKS[:4]))
    white_box = figure.axes[2]
    assert [bool(hatch) for _, _, hatch in bars_of(white_box)] == [False, True, False, False]
    assert not any(hatch for axis in figure.axes[:2] for _, _, hatch in bars_of(axis))
    texts = sorted((text.get_position()[1], text.get_text()) for text in white_box.texts)
    assert [text for _, text in texts] == ["40.0", "38.0 ⚠", "36.0 ?", "34.0", "–"]
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == [
        "accuracy without an attack", "⚠ unreliable: failed a check for gradient masking",
        "? not checked for gradient masking",
    ]  # fmt: skip


def test_the_bare_classifier_is_marked_as_in_the_table(build):
    blind = record(60, attacked=20.0, gradient={"images": 10, "zero": 9})
    figure = build(bars_over_attacks, [blind])
    for axis in figure.axes:
        assert [bool(hatch) for _, _, hatch in bars_of(axis)] == [True]
        assert [text.get_text().endswith("⚠") for text in axis.texts] == [True]


def test_whiskers_and_reference_line(build):
    entry = record(60, purified_clean=91)
    figure = build(bars_over_attacks, [entry])
    axis = figure.axes[1]
    (whisker,) = [group[2][0] for group in axis.containers if not isinstance(group, BarContainer)]
    ends = whisker.get_segments()[0][:, 0]
    assert ends.tolist() == pytest.approx(entry["accuracy"]["purified_attacked"]["interval_95"])
    references = [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--"]
    assert references == [91]
    assert [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_linestyle() == "--"] == [94]


def test_purifiers_have_colours_of_their_own(build):
    figure = build(bars_over_attacks, PURIFIERS)
    gray_box = bars_of(figure.axes[1])
    assert [width for width, _, _ in gray_box] == pytest.approx([60, 65, 70, 60, 65, 70])
    colors = [color for _, color, _ in gray_box]
    assert colors[:3] == colors[3:] and len(set(colors)) == 3
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said[:4] == ["maep-tiny", "JPEG", "a purifier of a rather long name", "no purifier"]


def test_classifiers_have_rows_of_panels(build):
    figure = build(bars_over_attacks, all_attacks(THREE, LONG_ATTACKS[:2]))
    assert len(figure.axes) == 9
    assert [axis.get_title(loc="left").split("\n")[0] for axis in figure.axes[::3]] == list(THREE)
    assert "classifier" not in figure._suptitle.get_text()


def test_a_threat_model_has_no_panel_where_nothing_was_measured_under_it(draw):
    figure = draw(bars_over_attacks, with_few_white_box())
    titles = [axis.get_title(loc="left").split("\n")[-1] for axis in figure.axes]
    assert titles == ["undefended", "gray-box", "white-box", "undefended", "gray-box", "undefended", "gray-box"]
    labelled = [bool(axis.get_xlabel()) for axis in figure.axes]
    assert labelled == [False, False, True, False, False, True, True]  # the lowest of each
    ticks = [axis.xaxis.get_major_ticks()[0].label1.get_visible() for axis in figure.axes]
    assert ticks == labelled


def test_the_rule_above_the_controls_touches_no_label(draw):
    axis = draw(bars_over_attacks, with_few_white_box()).axes[0]
    (rule,) = [line for line in axis.lines if len({*line.get_ydata()}) == 1 and line.get_linestyle() == "-"]
    height = axis.transData.transform((0, rule.get_ydata()[0]))[1]
    renderer = axis.figure.canvas.get_renderer()
    spans = {label.get_text(): label.get_window_extent(renderer) for label in axis.get_yticklabels()}
    assert any("\n" in text for text in spans)
    assert not [text for text, box in spans.items() if box.y0 - 1 <= height <= box.y1 + 1]


# ------------------------------------------------------------------------------------------------------------- both


def test_colours_stay_apart_for_colour_blind_eyes():
    """Deuteranopia and protanopia after Viénot, Brettel and Mollon 1999, in linear RGB."""
    blind = {
        "protan": np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
        "deutan": np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
    }
    for name, matrix in blind.items():
        seen = {key: (matrix @ np.array(to_rgb(color)) ** 2.2).clip(0, 1) ** (1 / 2.2) for key, color in COLORS.items()}
        for first in seen:
            for second in seen:
                if first < second:
                    distance = np.linalg.norm(seen[first] - seen[second])
                    assert distance > 0.14, f"{first} and {second} look the same ({name})"


@pytest.mark.parametrize("function", [accuracy_against_eps, bars_over_attacks])
def test_errors_leave_the_old_picture(function, tmp_path, monkeypatch):
    path = tmp_path / "chart.png"
    path.write_bytes(b"old")
    with pytest.raises(ResultsError, match="records: "):
        function([], path)
    with pytest.raises(ResultsError, match=r"records\[0\]: there is no "):
        function([{}], path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        function([record()], path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["chart.png"]


def test_purifiers_and_attacks_beyond_the_styles_are_told_apart(build):
    """Twenty purifiers have eight colours, fourteen attacks eleven markers, and lines four plain styles."""
    many = [f"p{index}" for index in range(20)]
    figure = build(bars_over_attacks, [record(60, purifier=name) for name in many])
    bars = [bar for group in figure.axes[1].containers if isinstance(group, BarContainer) for bar in group]
    assert len({(to_hex(bar.get_facecolor()), bar.get_hatch()) for bar in bars}) == 20
    shown = figure.legends[0].get_patches()[:20]
    assert [(to_hex(patch.get_facecolor()), patch.get_hatch() or "") for patch in shown] == [
        (to_hex(bar.get_facecolor()), bar.get_hatch() or "") for bar in sorted(bars, key=lambda bar: bar.get_y())
    ]
    assert not any(patch.get_hatch() for patch in shown[:8])
    for names in ({"purifier": many}, {"attack": [f"A-{index}" for index in range(14)]}):
        ((kind, values),) = names.items()
        figure = build(accuracy_against_eps, [record(60, eps=eps, **{kind: name}) for name in values for eps in (4, 8)])
        lines = [line for line in figure.axes[0].lines if to_hex(line.get_color()) == COLORS["gray-box"]]
        styles = {(str(line._unscaled_dash_pattern), line.get_marker(), line.get_fillstyle()) for line in lines}
        assert len(lines) == len(styles) == len(values)
