"""Tables of records: nothing mixed, nothing lost, doubtful results marked; errors that name file, line and field."""

import csv
import io
import json
import re

import pytest
from made_up_records import PASSED, failed, many, record
from markdown_it import MarkdownIt
from rich.cells import cell_len
from rich.console import Console

from maep_hf.evaluation.results import ResultsError, attack_name, check_record
from maep_hf.evaluation.tables import csv_table, markdown_table, read_results, rich_table, worst_of

THREATS = ("gray-box", "bpda", "white-box", "black-box", "transfer")
FORMS = {
    "markdown": markdown_table,
    "rich": lambda records, **options: terminal(records, 400, **options),
    "csv": csv_table,
}


def terminal(records, width, **options) -> str:
    console = Console(width=width, file=io.StringIO(), legacy_windows=False)
    console.print(rich_table(records, **options))
    return console.file.getvalue()


def tables_of(markdown: str) -> list[list[dict[str, str]]]:
    """Each table as rows of {column: text}, as a renderer of GitHub's Markdown sees them."""
    found, row = [], None
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    for index, token in enumerate(tokens):
        if token.type == "table_open":
            header, rows = [], []
        elif token.type == "tr_open":
            row = []
        elif token.type in ("th_open", "td_open"):
            text = "".join(part.content for part in tokens[index + 1].children if part.type != "html_inline")
            row.append(text)
        elif token.type == "tr_close":
            if not header:
                header = row
            else:
                assert len(row) == len(header)
                rows.append(dict(zip(header, row, strict=True)))
        elif token.type == "table_close":
            found.append(rows)
    return found


def shown(share) -> str:
    low, high = share["interval_95"]
    return f"{share['percent']:.1f} ({low:.1f}–{high:.1f})"


# ---------------------------------------------------------------------------------------------------------- columns


def test_every_figure_stands_once_in_the_column_of_its_threat_model():
    records = many()
    attacks, controls = tables_of(markdown_table(records))
    expected = {}
    for entry in records:
        protocol, purifier = entry["protocol"], entry["protocol"]["purifier"]
        place = protocol["classifier"]["name"], purifier["name"] if purifier else "none (undefended)"
        figure = entry["accuracy"]["purified_attacked" if purifier else "attacked"]
        column = protocol["threat_model"] if purifier else "undefended"
        key = (*place, attack_name(protocol["attack"]), column)
        assert key not in expected
        expected[key] = shown(figure)
    found = {}
    for row in attacks + controls:
        place = row["classifier"], row.get("purifier", "maep-tiny"), row["attack"]
        for column in THREATS if place[1] != "none (undefended)" else (*THREATS, "undefended"):
            if row.get(column, "–") != "–":
                assert (*place, column) not in found
                found[(*place, column)] = re.match(r"[\d.]+ \([\d.]+–[\d.]+\)", row[column])[0]
    assert found == expected
    assert {row["attack"] for row in controls} == {"Gaussian noise", "JPEG"}
    assert not {row["attack"] for row in attacks} & {"Gaussian noise", "JPEG"}


def test_threat_models_of_one_attack_share_a_row():
    records = [record(82.3), record(40, "bpda"), record(3.1, "white-box", checks=PASSED)]
    ((row,),) = tables_of(markdown_table(records))
    assert row == {
        "attack": "PGD-20, Linf 8/255",
        "clean": "94.0 (92.4–95.3)",
        "purified clean": "92.5 (90.7–94.0)",
        "undefended": "0.0 (0.0–0.4)",
        "gray-box": "82.3 (79.8–84.5)",
        "bpda": "40.0 (37.0–43.1) not checked",
        "white-box": "3.1 (2.2–4.4)",
    }


def test_bare_classifier_has_its_own_row_before_the_others():
    ((bare, purified),) = tables_of(markdown_table([record(82.3, attacked=1), record(0.5, "white-box", purifier=None)]))
    assert bare["purifier"] == "none (undefended)" and bare["undefended"].startswith("0.5 (")
    assert bare["purified clean"] == bare["gray-box"] == "–"
    assert purified["undefended"].startswith("1.0 (") and purified["gray-box"].startswith("82.3 (")


@pytest.mark.parametrize("threat_model", ["bpda", "white-box", "black-box", "transfer"])
def test_undefended_is_no_figure_of_images_attacked_through_the_purifier(threat_model):
    table = markdown_table([record(50, threat_model, attacked=77.7)])
    assert "77.7" not in table and "undefended" not in table
    assert "77.7" in csv_table([record(50, threat_model, attacked=77.7)])


def test_transfer_to_the_bare_classifier_does_not_mix_with_attacks_on_it():
    records = [record(0, "white-box", purifier=None), record(60, "transfer", purifier=None)]
    ((row,),) = tables_of(markdown_table(records))
    assert row["undefended"].startswith("0.0 (") and row["undefended (transfer)"].startswith("60.0 (")


@pytest.mark.parametrize("threat_model", ["gray-box", "bpda", "white-box"])
def test_without_a_purifier_all_that_see_the_classifier_are_one_column(threat_model):
    ((row,),) = tables_of(markdown_table([record(3, threat_model, purifier=None)]))
    assert list(row) == ["attack", "clean", "undefended"] and row["undefended"].startswith("3.0 (")


def test_what_is_the_same_everywhere_is_said_above():
    text = markdown_table([record(), record(attack="FGSM")])
    first = text.splitlines()[0]
    assert "cifar10 test, the first 1000; classifier resnet56; purifier maep-tiny; n = 1000" in first
    ((row, _),) = tables_of(text)
    assert not {"dataset", "classifier", "purifier", "n"} & set(row)
    rows = tables_of(markdown_table([record(), record(n=500)]))[0]
    assert [(row["dataset"], row["n"]) for row in rows] == [
        ("cifar10 test, the first 1000", "1000"),
        ("cifar10 test, the first 500", "500"),
    ]


# ------------------------------------------------------------------------------------------------------- one row each


def labels(records, column="attack"):
    return [row[column] for row in tables_of(markdown_table(records))[0]]


def test_seeds_have_rows_of_their_own_and_still_share_them_across_threat_models():
    records = [record(80), record(81, seed=1), record(2, "white-box"), record(3, "white-box", seed=1)]
    rows = tables_of(markdown_table(records))[0]
    found = [(row["attack"], row["gray-box"][:4], row["white-box"][:3]) for row in rows]
    assert found == [("PGD-20, Linf 8/255 [seed=0]", "80.0", "2.0"), ("PGD-20, Linf 8/255 [seed=1]", "81.0", "3.0")]


def test_another_seed_of_another_threat_model_needs_no_row():
    assert len(labels([record(80), record(2, "white-box", seed=1, passes=10)])) == 1


def test_figures_before_the_attack_hold_for_the_whole_row():
    rows = tables_of(markdown_table([record(80), record(2, "white-box", purified_clean=90, seed=1)]))[0]
    assert [(row["purified clean"][:4], row["gray-box"][:4], row["white-box"][:3]) for row in rows] == [
        ("92.5", "80.0", "–"),
        ("90.0", "–", "2.0"),
    ]
    assert labels([record(80), record(79, purified_clean=90, seed=1)]) == [
        "PGD-20, Linf 8/255 [seed=0]",
        "PGD-20, Linf 8/255 [seed=1]",
    ]


def test_parameters_tell_attacks_and_purifiers_of_one_name_apart():
    found = labels(
        [record(attack_options={"steps": 20, "restarts": 1}), record(attack_options={"steps": 20, "restarts": 5})]
    )
    assert found == ["PGD-20, Linf 8/255 [restarts=1]", "PGD-20, Linf 8/255 [restarts=5]"]
    options = [{"purifier": "JPEG", "purifier_options": {"quality": quality}} for quality in (50, 75)]
    found = labels([record(**each) for each in options], "purifier")
    assert found == ["JPEG [options.quality=50]", "JPEG [options.quality=75]"]


def test_fingerprint_tells_apart_what_nothing_else_does():
    other = record(81)
    other["protocol"]["classifier"]["fingerprint"], other["key"] = "0123456789abcdef", "other"
    assert labels([record(), other], "classifier") == [
        "resnet56 [fingerprint=cccccccc…]",
        "resnet56 [fingerprint=01234567…]",
    ]


def of_weights(mark, figure, **options):
    made = record(figure, **options)
    made["protocol"]["purifier"] = made["protocol"]["purifier"] | {"fingerprint": mark * 16}
    return made | {"key": f"{mark} {made['key']}"}


def test_an_option_does_not_hide_that_weights_differ():
    """Two trainings of one name, each used in two ways."""
    strong = {"purifier_options": {"strength": 1.3}}
    records = [
        of_weights("a", 60), of_weights("a", 70, **strong), of_weights("b", 40), of_weights("b", 50, **strong),
    ]  # fmt: skip
    names = ("[fingerprint=aaaaaaaa…", "[fingerprint=bbbbbbbb…")
    expected = [f"maep-tiny {name}{more}]" for name in names for more in ("", ", options.strength=1.3")]
    assert labels(records, "purifier") == expected
    assert worst_of(records) == records
    apart = [records[0], records[1], of_weights("b", 5, threat_model="white-box", **strong)]
    assert [row["gray-box"][:4] for row in tables_of(markdown_table(apart))[0]] == ["60.0", "70.0", "–"]
    # where what can be read singles them out, it does
    assert labels(records[:2], "purifier") == ["maep-tiny", "maep-tiny [options.strength=1.3]"]
    assert labels([records[0], records[3]], "purifier")[1] == "maep-tiny [options.strength=1.3]"


def test_sources_of_transfer_are_named():
    records = [record(60 + index, "transfer", source={"name": f"surrogate {index}"}) for index in range(2)]
    text = markdown_table(records)
    assert labels(records) == [f"PGD-20, Linf 8/255 [source.name=surrogate {index}]" for index in range(2)]
    assert "<sup>1</sup> attack made on surrogate 0" in text and "<sup>2</sup> attack made on surrogate 1" in text


def test_later_record_replaces_one_of_the_same_protocol():
    first, later = record(80), record(80)
    later["accuracy"]["purified_attacked"] = record(70)["accuracy"]["purified_attacked"]
    ((row,),) = tables_of(markdown_table([first, later]))
    assert row["gray-box"].startswith("70.0 (")


@pytest.mark.parametrize(
    ("norm", "eps", "name"),
    [
        ("Linf", 8.0, "A, Linf 8/255"), ("Linf", 0.5, "A, Linf 0.5/255"), ("L2", 0.5, "A, L2 0.5"),
        ("L1", 12.0, "A, L1 12"),        ("L2", None, "A, L2 minimum norm"), (None, None, "A"),
    ],
)  # fmt: skip
def test_norm_and_eps_are_part_of_the_attacks_name(norm, eps, name):
    assert labels([record(attack="A", norm=norm, eps=eps)]) == [name]
    control = labels([record(attack="A", norm=norm, eps=eps, control=True)])
    assert control == ["A" if eps is None else name]


# ------------------------------------------------------------------------------------------------------------ marks


@pytest.mark.parametrize("form", FORMS)
def test_failed_checks_are_marked_and_named(form):
    doubtful = record(60, "white-box", checks=failed("eps_sweep", "white_box<=black_box"))
    text = FORMS[form]([record(), doubtful])
    assert text.count("unreliable") == (1 if form == "csv" else 2)
    assert "eps_sweep" in text and re.search(r"white_box\\?<=black_box", text)
    assert "⚠ unreliable" in text
    assert "unreliable" not in FORMS[form]([record(), record(60, "white-box", checks=PASSED)])


@pytest.mark.parametrize("form", FORMS)
def test_figures_of_a_classifier_without_gradient_are_marked(form):
    few = record(80, attacked=60, gradient={"images": 100, "zero": 5})
    many = record(80, attacked=60, gradient={"images": 100, "zero": 6})
    broken = record(80, attacked=0, gradient={"images": 100, "zero": 6})  # the attack needed none
    bare = record(60, "white-box", purifier=None, gradient={"images": 100, "zero": 6})
    said, sign = "gradient (zero for 6 of 100 images)", "unreliable"
    for sound in (few, broken):
        assert sign not in FORMS[form]([sound])
    for doubtful in (many, bare):
        text = FORMS[form]([doubtful])
        assert said in text and sign in text


def test_a_failed_check_and_a_missing_gradient_are_both_named():
    doubtful = record(60, "bpda", attacked=50, checks=failed("eps sweep"), gradient={"images": 100, "zero": 6})
    assert "unreliable: failed eps sweep, gradient (zero for 6 of 100 images)" in markdown_table([doubtful])


def test_the_undefended_figure_beside_a_marked_one_is_marked():
    text = markdown_table([record(80, attacked=60, gradient={"images": 100, "zero": 6})])
    (row,) = tables_of(text)[0]
    assert "⚠ unreliable" in row["undefended"] and "⚠ unreliable" in row["gray-box"]
    assert text.count("failed gradient") == 1


@pytest.mark.parametrize("form", FORMS)
def test_adaptive_results_without_checks_say_so(form):
    for threat_model in ("white-box", "bpda"):
        assert FORMS[form]([record(3, threat_model)]).count("not checked") == 1
        assert "not checked" not in FORMS[form]([record(3, threat_model, checks=PASSED)])
    for unmarked in ({"threat_model": "gray-box"}, {"threat_model": "transfer"}, {"threat_model": "black-box"}):
        assert "not checked" not in FORMS[form]([record(3, **unmarked)])
    assert "not checked" not in FORMS[form]([record(3, "white-box", purifier=None)])
    assert "not checked" not in FORMS[form]([record(88, "white-box", "JPEG", control=True, norm=None, eps=None)])


def test_notes_belong_to_their_cells():
    records = [
        record(60, "white-box", "A", checks=failed("first")),
        record(61, "white-box", "B", checks=failed("second", "third")),
        record(62, "white-box", "C", checks=failed("first")),
    ]
    text = markdown_table(records)
    assert re.findall(r"(\d\d)\.0 \([^)]*\) ⚠ unreliable <sup>(\d)</sup>", text) == [
        ("60", "1"),
        ("61", "2"),
        ("62", "1"),
    ]
    assert "<sup>1</sup> ⚠ unreliable: failed first\n" in text
    assert "<sup>2</sup> ⚠ unreliable: failed second, third\n" in text
    assert "[2] ⚠ unreliable: failed second, third" in terminal(records, 200)


def test_unreliable_without_a_name_is_still_marked():
    assert "failed checks that the record does not name" in markdown_table([record(60, "white-box", checks=failed())])


def test_controls_are_a_part_of_their_own():
    control = record(88, "gray-box", "JPEG", control=True, norm=None, eps=None, attacked=80)
    for text in (markdown_table([record(), control]), terminal([record(), control], 200)):
        attacks, controls = text.split("Corruptions (control, no attacks)")
        assert "PGD-20" in attacks and "JPEG" not in attacks and "JPEG" in controls and "PGD-20" not in controls
    assert [line["part"] for line in csv.DictReader(io.StringIO(csv_table([control, record()])))] == [
        "attack",
        "control",
    ]
    assert "Attacks" not in markdown_table([control])


# ------------------------------------------------------------------------------------------------------------ forms


@pytest.mark.parametrize("form", ["markdown", "rich"])
def test_percent_digits(form):
    entry = record(82.3, n=3000)
    low, high = entry["accuracy"]["purified_attacked"]["interval_95"]
    assert f"82.300 ({low:.3f}–{high:.3f})" in FORMS[form]([entry], percent_digits=3)
    assert f"82 ({low:.0f}–{high:.0f})" in FORMS[form]([entry], percent_digits=0)
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="percent_digits"):
            FORMS[form]([entry], percent_digits=wrong)


def test_names_do_not_break_markdown():
    name = "a|b *c* <b>d</b> `e` [f](g) ~h~ _i_ j_k \\ l\nm"
    (rows,) = tables_of(markdown_table([record(attack=name), record(attack="other", purifier="p|q")]))
    assert rows[0]["attack"] == name.replace("\n", " ") + ", Linf 8/255"
    assert rows[1]["purifier"] == "p|q"


@pytest.mark.parametrize("width", [50, 80, 120, 300])
def test_terminal_of_any_width_loses_nothing(width):
    records = [entry for entry in many() if entry["protocol"]["classifier"]["name"] != "wide-resnet-28-10"]
    text = terminal(records, width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text
    words = text.split()
    for entry in records:
        share = entry["accuracy"]["purified_attacked"] or entry["accuracy"]["attacked"]
        assert f"{share['percent']:.1f}" in words and shown(share).split()[1] in words
    assert text.count("unreliable") == 3 and all(name in text for name in ("gray-box", "white-box", "transfer"))


def test_terminal_shows_brackets_in_names_as_they_are():
    assert "[red]A[/red], Linf 8/255" in terminal([record(attack="[red]A[/red]")], 200)


def test_csv_has_raw_numbers_and_the_whole_protocol():
    entry = record(82.3, "white-box", checks=failed("a", "b"), purifier_options={"mask_ratio": 0.25}, passes=10)
    bare = record(1 / 3, "white-box", purifier=None, n=7, attack_options={"steps": 100})
    lines = list(csv.DictReader(io.StringIO(csv_table([entry, bare]))))
    assert len(lines) == 2 and lines[0]["status"] == "⚠ unreliable: a; b" and lines[0]["column"] == "white-box"
    assert lines[1]["column"] == "undefended" and lines[1]["status"] == ""

    def compare(value, name, line):
        if isinstance(value, dict):
            for key, inner in value.items():
                compare(inner, f"{name}.{key}" if name else key, line)
        elif name.endswith("interval_95"):
            assert [float(line[f"{name}.{end}"]) for end in ("low", "high")] == value
        elif isinstance(value, float):
            assert float(line[name]) == value
        elif isinstance(value, list):
            assert json.loads(line[name]) == value
        else:
            assert line.get(name, "") == ("" if value is None else str(value))

    for line, original in zip(lines, [entry, bare], strict=True):
        compare({key: original[key] for key in ("schema", "key", "protocol", "accuracy")}, "", line)
        assert not [name for name in line if name.startswith(("environment", "checks"))]
    header = list(lines[0])
    attack = [index for index, name in enumerate(header) if name.startswith("protocol.attack.")]
    assert attack == list(range(attack[0], attack[-1] + 1)), "a field met late stands apart"


def test_worst_of():
    def names(records, **options):
        return [
            (entry["protocol"]["threat_model"], entry["protocol"]["attack"]["name"], entry["protocol"]["attack"]["eps"])
            for entry in worst_of(records, **options)
        ]

    records = [
        record(80, attack="A"), record(70, attack="B"), record(75, attack="C"), record(10, attack="B", eps=32.0),
        record(5, "white-box", "A"), record(6, "white-box", "B"), record(1, attack="noise", control=True),
    ]  # fmt: skip
    assert names(records) == [("gray-box", "B", 8.0), ("gray-box", "B", 32.0), ("white-box", "A", 8.0)]
    assert names(records, per_budget=False) == [("gray-box", "B", 32.0), ("white-box", "A", 8.0)]
    assert worst_of(records)[0] is records[1]
    equal = [record(70, attack="B"), record(70, attack="A")]
    assert worst_of(equal) == equal[:1]
    apart = [
        record(80),
        record(70, classifier="vit"),
        record(60, purifier="JPEG"),
        record(0, "white-box", purifier=None),
    ]
    assert worst_of(apart) == apart


@pytest.mark.parametrize("function", [markdown_table, rich_table, csv_table, worst_of])
def test_no_records_and_broken_ones(function):
    with pytest.raises(ResultsError, match="records: there are none"):
        function([])
    broken = record()
    del broken["protocol"]["threat_model"]
    with pytest.raises(ResultsError, match=r"records\[1\]: there is no protocol\.threat_model"):
        function([record(), broken])


# ---------------------------------------------------------------------------------------------------------- reading


def test_reading_gives_what_was_written(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(json.dumps(entry) for entry in many()) + "\n\n", encoding="utf-8")
    assert read_results(path) == many()
    assert markdown_table(read_results(path)) == markdown_table(many())
    path.write_text("")
    assert read_results(path) == []
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        read_results(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps(record())[:200], "not a whole JSON object"),
        ("[1, 2]", "list, not a JSON object"),
        (
            "{}",
            "there is no key, protocol.threat_model, protocol.purifier, protocol.classifier.name, protocol.attack.name",
        ),
    ],
)
def test_broken_lines_are_named(tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{json.dumps(record())}\n\n{line}\n")
    with pytest.raises(ResultsError, match=rf"results\.jsonl, line 3: {message}"):
        read_results(path)


def changed(field, value=None, purifier="maep-tiny"):
    entry = record(3, "white-box", purifier=purifier)
    *parents, last = field.split(".")
    inner = entry
    for name in parents:
        inner = inner[name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return entry


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *((name, None, f"there is no {name}$") for name in (
            "key", "checks", "protocol.purifier.name", "protocol.classifier.name", "protocol.dataset.n",
            "protocol.attack.eps", "accuracy.clean", "accuracy.attacked", "accuracy.purified_clean",
            "accuracy.purified_attacked",
        )),
        ("protocol", None, "there is no protocol.threat_model, "),
        ("schema", 2, "schema 2, but this version reads schema 1"),
        ("protocol.threat_model", "adaptive", "threat_model 'adaptive' is none of gray-box, bpda"),
        ("protocol.attack.eps", "8", "protocol.attack.eps '8' is neither null nor a number"),
        ("protocol.attack.eps", -1, "protocol.attack.eps -1 is neither"),
        ("accuracy.clean.percent", 50.0, "accuracy.clean must have"),
        ("accuracy.clean.percent", float("nan"), "accuracy.clean must have"),
        ("accuracy.attacked.interval_95", [1.0], "accuracy.attacked must have"),
        ("accuracy.purified_attacked.interval_95", [50.0, 60.0], "accuracy.purified_attacked must have"),
        ("accuracy.purified_clean", 92.5, "accuracy.purified_clean must have"),
        ("accuracy.attacked.n", None, "accuracy.attacked must have"),
        ("checks", {"reliable": "no", "failed": []}, "checks must be null or have reliable"),
        ("checks", {"reliable": False}, "checks must be null or have reliable"),
        ("gradient", {"images": 4}, "gradient must be null or have images and zero"),
        ("gradient", {"images": 4, "zero": 5}, "gradient must be null or have images and zero"),
    ],
)  # fmt: skip
def test_fields_are_checked(field, value, message):
    with pytest.raises(ResultsError, match=rf"^here: {message}"):
        check_record(changed(field, value), "here")


def test_predictions_that_are_kept_are_named_as_no_accuracy():
    kept = record(80, dataset={"name": "embedded:imagenet", "n": 1000}) | {"counted": "kept: the prediction is its own"}
    right = record(70) | {"counted": "right: the prediction is the label"}
    names = labels([kept, right], "dataset")
    assert names[0] == "embedded:imagenet (share of predictions kept, no accuracy)" and "kept" not in names[1]


def test_what_may_be_missing():
    check_record(record(3, "white-box", purifier=None))
    for field in ("environment", "psnr_db", "schema", "protocol.dataset.split", "protocol.attack.eps_unit"):
        check_record(changed(field))
    averaged = record()  # over ten passes: 82.34 % of 1,000 images, rounded to 823
    averaged["accuracy"]["purified_attacked"]["percent"] = 82.34
    check_record(averaged)
    averaged["accuracy"]["purified_attacked"]["percent"] = 82.36
    with pytest.raises(ResultsError):
        check_record(averaged)
