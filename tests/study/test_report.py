import base64
import csv
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from regrow.cli import app
from regrow.study import drawing, records
from regrow.study.gather import gather
from regrow.study.page import cut_shares
from regrow.study.report import _cell, write_report

HOSTILE = '<img src=x onerror="alert(1)">&'
# Test accuracies by seed: differences 1, 2, 3 points, so 2 ± 4.303 · 1/√3 = [−0.48, +4.48].
ACCURACY = {"standard": (0.80, 0.81, 0.82), "repr": (0.81, 0.83, 0.85)}


def make_run(
    folder,
    method="standard",
    seed=0,
    *,
    finished=True,
    layer="features.1.conv",
    epochs=12,
    flops=None,
    **settings,
):
    """A run folder as training leaves it: a cycle of 6 full and 3 sub epochs for repr.

    ``flops`` is what an epoch takes; without it the run is as the first version of records has it.
    """
    is_repr = method == "repr"
    layers = {"features.0.conv": 4, layer: 8}
    config = {"version": 1, "method": method, "seed": seed, "data": "digits", "epochs": 12, "fraction": 0.3}
    records.write_yaml(records.config_path(folder), config | settings)
    environment = records.environment("cpu", threads=1) | {
        "processor": "A <fine> processor",
        "command": "regrow it",
    }
    records.write_json(records.environment_path(folder), environment)
    for epoch in range(1, epochs + 1):
        off = is_repr and 7 <= epoch <= 9
        records.append_line(
            records.epochs_path(folder),
            {
                "version": 1,
                "epoch": epoch,
                "phase": "sub" if off else "full",
                "learning_rate": 0.1 if epoch < 10 else 0.01,
                "train_loss": 1 / epoch,
                "train_accuracy": 0.9,
                "validation_loss": 1.1 / epoch,
                "validation_accuracy": 0.9 - 0.5 / epoch,
                "overlap": 3.0 - off,
                "alive": 10 if off else 12,
                "filters": 12,
                "seconds": 0.5,
            }
            | ({} if flops is None else {"flops": flops}),
        )
    if is_repr:
        for epoch, kind in ((6, "drop"), (9, "restore")):
            records.append_line(
                records.events_path(folder),
                {
                    "version": 1,
                    "epoch": epoch,
                    "kind": kind,
                    "cycle": 1,
                    "filters": {layer: list(range(2 + seed))},
                    "least_covered": [layer] if kind == "restore" and seed == 0 else [],
                    "notes": [f"a note on {layer}"] if kind == "drop" else [],
                },
            )
    if finished:
        records.write_json(
            records.result_path(folder),
            {
                "version": 1,
                "test_accuracy": ACCURACY.get(method, ACCURACY["standard"])[seed],
                "test_loss": 0.5,
                "validation_accuracy": 0.85,
                "train_seconds": 30.0 if is_repr else 20.0,
                "seconds": 40.0,
                "parameters": 1234,
                "filters": layers,
            }
            | ({} if flops is None else {"train_flops": epochs * flops}),
        )
    return folder


@pytest.fixture
def drawn():
    """For a test that looks at what the figures do with its records."""


@pytest.fixture(autouse=True)
def _undrawn(request, monkeypatch):
    # Drawing takes most of a report's time, and most tests here read its text.
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(drawing, "svg", lambda _draw, _width: "<svg/>")


class Page(HTMLParser):
    """What the tests look at in a page: tags, attributes, the text of cells, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.rows, self.text, self.ids = [], [], [], [], []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        self.ids += [value for key, value in attrs if key == "id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.text.append(data)
        if self.in_cell and data.strip():
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()

    def row(self, *start):
        return next(row for row in self.rows if row[: len(start)] == list(start))

    def words(self):
        return " ".join(" ".join(self.text).replace("\u00a0", " ").split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A comparison of two methods over three seeds, with an unfinished run, and its report."""
    root = tmp_path_factory.mktemp("comparison")
    for method in ("standard", "repr"):
        for seed in range(3):
            make_run(records.run_folder(root, method, seed), method, seed)
    make_run(root / "repr-seed7", "repr", 7, finished=False, epochs=4)
    assert (
        write_report(records.find_runs(root), root / "report.html", title="A title & more")
        == root / "report.html"
    )
    return root


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_asks_for_nothing_from_outside(folder, page):
    for tag, key, value in page.attributes:
        if key in ("src", "href", "srcset", "data", "action", "poster"):
            assert value.startswith(("data:", "#")), (tag, key, value[:60])
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not {"link", "iframe", "object", "embed", "base"} & {
        tag
        for tag, key, value in page.attributes
        if key in ("href", "src") and not value.startswith(("data:", "#"))
    }
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text


def test_the_pictures_ask_for_nothing_from_outside(page):
    pictures = [value for tag, key, value in page.attributes if key in ("src", "srcset")]
    assert len(pictures) == 10  # dots, compute, curves, overlap and map, wide and narrow
    for picture in pictures:
        drawing = base64.b64decode(picture.removeprefix("data:image/svg+xml;base64,")).decode()
        assert drawing.startswith("<svg")
        links = re.findall(r'(?:xlink:)?href="([^"]*)"', drawing)
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def test_every_section_is_there_and_linked(page):
    sections = ["results", "sure", "seeds", "compute", "curves", "overlap", "map", "cuts"]
    sections += ["settings", "environment", "repeat"]
    assert page.ids == sections
    links = [value for tag, key, value in page.attributes if tag == "a" and key == "href"]
    assert links == [*(f"#{section}" for section in sections), "#compute"]
    assert ("meta", "name", "viewport") in page.attributes


def test_every_picture_has_a_text_for_those_who_cannot_see_it(page):
    assert page.tags.count("img") == len(
        [value for tag, key, value in page.attributes if key == "alt" and value]
    )


def test_the_headline_says_no_gain_shown_and_the_cost(page):
    assert (
        "RePr: +2.0 points test accuracy over standard training (95 % interval −0.5 to +4.5, n = 3 seeds): "
        "no gain shown. A difference of this size would take about 5 seeds to show. It took 1.50 × the "
        "training time." in page.words()
    )


def test_the_numbers_in_the_table_of_methods(page):
    assert page.row("Standard training", "3") == [
        "Standard training",
        "3",
        "81.00 ± 1.00 %",
        "—",
        "baseline",
        "—",
        "—",
    ]
    # The epochs of both take the same time and reach the same validation accuracy.
    assert page.row("RePr", "3") == [
        "RePr",
        "3",
        "83.00 ± 2.00 %",
        "+2.00 [−0.48, +4.48]",
        "no gain shown",
        "1.50",
        "+0.00",
    ]


def test_the_numbers_that_say_how_sure_it_is(page):
    (row,) = [row for row in page.rows if row[:2] == ["RePr", "3"] and "3–0–0" in row]
    # t = 2 / (1 / √3) = 3.46 with 2 degrees of freedom; three gains have p = 2 / 8.
    assert row[2] == "+2.00 [−0.48, +4.48]"
    assert row[4:] == ["3–0–0", "0.250", "0.074", "no gain shown", "5"]
    low, high = (float(text.replace("−", "-")) for text in row[3].strip("[]").split(", "))
    assert 1 <= low < 2 < high <= 3  # of means of resamples of 1, 2 and 3


def test_the_numbers_at_equal_compute(page):
    (row,) = [row for row in page.rows if row[:2] == ["RePr", "30.0 ± 0.0 s"]]
    assert row[2:] == ["85.00 ± 0.00 %", "85.83 ± 0.00 %", "3", "+0.00"]
    assert "within the seconds of training that the cheapest method of that seed spent in all" in page.words()


def test_every_finished_run_has_its_row_and_the_unfinished_one_has_none(page):
    assert page.row("RePr", "1") == [
        "RePr",
        "1",
        "83.00 %",
        "85.00 %",
        "+2.00",
        "30.0",
        "12",
        "1,234",
        "repr-seed1",
    ]
    assert not [row for row in page.rows if "repr-seed7" in row]
    assert "RePr, seed 7: 4 of 12 epochs" in page.words()


def test_what_was_cut_and_regrown(page):
    # Of 8 filters, seeds 0, 1, 2 dropped 2, 3, 4; of all 12 filters that is 17 to 33 %.
    assert page.row("features.0.conv") == ["features.0.conv", "4", "0 %"]
    assert page.row("features.1.conv") == ["features.1.conv", "8", "38 % 25–50"]
    assert page.row("all layers") == ["all layers", "12", "25 % 17–33"]
    assert "features.1.conv (1 of 3 restores)" in page.words()
    assert "a note on features.1.conv (3 times)" in page.words()


def test_settings_environment_and_command(page):
    assert page.row("fraction") == ["fraction", "—", "0.3"]
    assert page.row("data") == ["data", "digits"]
    assert page.row("processor") == ["processor", "A <fine> processor"]
    assert "regrow train --config repr-seed2/config.yaml --out again" in page.words()
    assert "regrow it" in page.words()


def test_results_json_has_every_run_and_method(folder):
    results = json.loads((folder / "results.json").read_text())
    assert (results["version"], results["baseline"]) == (records.VERSION, "standard")
    assert results["title"] == "A title & more"
    standard, other = results["methods"]
    assert standard["difference_points"] is None
    assert other["difference_points"] == pytest.approx(2)
    assert other["difference_low"] == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)
    assert (other["verdict"], other["gains"], other["time_ratio"]) == ("no gain shown", 3, 1.5)
    assert [(run["method"], run["seed"], run["finished"]) for run in results["runs"]] == [
        ("standard", 0, True),
        ("standard", 1, True),
        ("standard", 2, True),
        ("repr", 0, True),
        ("repr", 1, True),
        ("repr", 2, True),
        ("repr", 7, False),
    ]


def test_results_csv_has_a_row_per_run_and_per_method(folder):
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["level"] for row in rows] == ["run"] * 7 + ["method"] * 2
    assert (rows[0]["test_accuracy"], rows[0]["difference_points"]) == ("0.8", "")
    assert float(rows[4]["difference_points"]) == pytest.approx(2)
    assert rows[6]["test_accuracy"] == ""
    assert (rows[8]["method"], rows[8]["n"], rows[8]["verdict"]) == ("repr", "3", "no gain shown")


@pytest.mark.usefixtures("drawn")
def test_hostile_names_are_shown_and_not_obeyed(tmp_path):
    make_run(tmp_path / "a", "repr", layer=HOSTILE, note=HOSTILE)
    make_run(tmp_path / "=cmd()", HOSTILE, note=HOSTILE)
    runs = records.find_runs(tmp_path)
    text = write_report(runs, tmp_path / "report.html", title=HOSTILE, baseline=HOSTILE).read_text(
        encoding="utf-8"
    )
    assert "<img src=x" not in text
    assert "&lt;img src=x onerror=&#34;alert(1)&#34;&gt;&amp;" in text
    hostile = Page(text)
    assert not [key for _, key, _ in hostile.attributes if key.startswith("on")]
    assert hostile.row(HOSTILE, "8") == [HOSTILE, "8", "25 %"]
    assert "'=cmd()" in (tmp_path / "results.csv").read_text()


@pytest.mark.parametrize(
    "sign", ["=", "+", "-", "−", "@", "|", "＝", "＋", "－", "＠", "﹦", "﹢", "﹣", "﹫"]
)
@pytest.mark.parametrize(
    "before", ["", " ", "\n", "\t", "\r", "\r\n \n", "\u00a0", "\u3000", "\ufeff", "\u200b", "\0"]
)
def test_no_cell_begins_like_a_formula(before, sign):
    assert _cell(f"{before}{sign}1+1") == f"'{before}{sign}1+1"


@pytest.mark.parametrize(
    "value", [-0.5, -3, 0, None, True, "plain", " plain", "a=1", "a\n=1", "3-4", "", "ünï"]
)
def test_numbers_and_other_texts_stay_as_they_are(value):
    assert _cell(value) == value


@pytest.mark.parametrize("blank", ["\n", "\r", "\t"])
def test_a_cell_that_begins_with_a_line_end_is_a_text(blank):
    assert _cell(f"{blank}plain") == f"'{blank}plain"


@pytest.mark.usefixtures("drawn")
def test_names_from_strangers_are_neutral_in_the_table_of_a_report(tmp_path):
    names = ["\n=cmd|' /C calc'!A0", " ＝SUM(A1)", "|x|<b>y</b>\\textbf{z} $a_b$"]
    make_run(tmp_path / "a", seed=0)
    for number in range(len(names)):
        make_run(tmp_path / str(number), "repr", seed=number)
    runs = records.find_runs(tmp_path)
    variants = {run.folder: names[int(run.folder.name)] for run in runs if run.folder.name != "a"}
    text = write_report(runs, tmp_path / "report.html", variants=variants).read_text(encoding="utf-8")
    assert "<b>y" not in text
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"standard", *(f"'{name}" for name in names)}


@pytest.mark.usefixtures("drawn")
def test_one_run_without_events(tmp_path):
    make_run(tmp_path / "run")
    page = Page(write_report(records.find_runs(tmp_path), tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Standard training: 80.00 % test accuracy (n = 1 seed)" in page.words()
    assert {"map", "cuts"}.isdisjoint(page.ids)
    assert {"results", "seeds", "compute", "curves", "overlap", "settings"} <= set(page.ids)
    assert "sure" not in page.ids
    assert page.row("Standard training", "1") == ["Standard training", "1", "80.00 %", "85.00 %", "20.0 s"]


@pytest.mark.usefixtures("drawn")
def test_one_seed_of_two_methods_and_no_epochs(tmp_path):
    for method in ("standard", "repr"):
        make_run(tmp_path / method, method, epochs=0)
    page = Page(write_report(records.find_runs(tmp_path), tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "(n = 1 seed, too few for an interval): no gain shown." in page.words()
    assert {"curves", "compute", "map"}.isdisjoint(page.ids)
    assert page.row("RePr", "1")[3:5] == ["+1.00", "no gain shown"]


@pytest.mark.usefixtures("drawn")
def test_the_same_runs_give_the_same_bytes(tmp_path):
    make_run(tmp_path / "run")
    runs = records.find_runs(tmp_path)
    first = write_report(runs, tmp_path / "page.html").read_bytes()
    assert write_report(runs, tmp_path / "page.html").read_bytes() == first


def test_nothing_is_written_when_there_is_nothing_to_say(tmp_path):
    make_run(tmp_path / "run", finished=False)
    runs = records.find_runs(tmp_path)
    with pytest.raises(ValueError, match="none of the 1 runs is finished"):
        write_report(runs, tmp_path / "out" / "report.html")
    assert not (tmp_path / "out").exists()


def test_the_report_is_a_page(tmp_path):
    with pytest.raises(ValueError, match=r"write .*report\.html instead of"):
        write_report([], tmp_path)
    with pytest.raises(ValueError, match="one HTML page"):
        write_report([], tmp_path / "results.json")


def test_runs_elsewhere_are_named_without_their_place(tmp_path):
    make_run(tmp_path / "far" / "run")
    text = write_report(records.find_runs(tmp_path / "far"), tmp_path / "near" / "report.html").read_text()
    assert str(tmp_path) not in text


def test_settings_and_machines_that_differ_are_listed_with_their_runs(tmp_path):
    for seed in (0, 1):
        run = make_run(tmp_path / f"run{seed}", seed=seed)
        environment = json.loads(records.environment_path(run).read_text()) | {"cores": 2 + seed}
        records.write_json(records.environment_path(run), environment)
    page = Page(write_report(records.find_runs(tmp_path), tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.row("cores") == ["cores", "2 (run0)"]
    assert page.rows[page.rows.index(page.row("cores")) + 1][-1] == "3 (run1)"


def test_cut_shares_by_hand(tmp_path):
    runs = [records.read_run(make_run(tmp_path / str(seed), "repr", seed)) for seed in (0, 2)]
    shares = cut_shares(runs)
    assert shares["events"] == [(1, 6)]
    assert shares["rows"] == [
        {"name": "features.0.conv", "filters": 4, "shares": [(0, 0, 0)]},
        {"name": "features.1.conv", "filters": 8, "shares": [(3 / 8, 2 / 8, 4 / 8)]},
        {"name": "all layers", "filters": 12, "shares": [(3 / 12, 2 / 12, 4 / 12)]},
    ]
    assert cut_shares([records.read_run(make_run(tmp_path / "standard"))]) is None


def test_reading_runs_and_writing_reports_imports_neither_torch_nor_matplotlib_early():
    code = (
        "import sys, regrow.study.records, regrow.study.compare, regrow.study.report;"
        "print([name for name in ('torch', 'matplotlib', 'scipy', 'jinja2', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def add_curve(run, accuracies, *, criterion="l2"):
    """A curve record at 0, 25 and 50 % in the reading zeroed."""
    records.write_text(records.weights_path(run), str(run))
    records.write_json(
        records.curve_path(run, "test", criterion, "layer"),
        {
            "version": 1,
            "split": "test",
            "criterion": criterion,
            "scope": "layer",
            "seed": None,
            "weights": records.weights_hash(run),
            "classes": 10,
            "images": 100,
            "calibration_images": 50,
            "layers": {},
            "left_out": {},
            "points": [
                {"reading": "zeroed", "fraction": fraction, "dropped": 1, "accuracy": accuracy}
                for fraction, accuracy in zip((0, 0.25, 0.5), accuracies, strict=True)
            ],
        },
    )


@pytest.fixture
def measured(tmp_path):
    """Two seeds of two methods with curves: means over 0–50 % are 0.6, 0.5 (standard) and 0.7, 0.8 (repr)."""
    curves = {
        ("standard", 0): (0.9, 0.6, 0.3),
        ("standard", 1): (0.8, 0.5, 0.2),
        ("repr", 0): (0.9, 0.7, 0.5),
        ("repr", 1): (0.9, 0.8, 0.7),
    }
    for (method, seed), accuracies in curves.items():
        add_curve(make_run(records.run_folder(tmp_path, method, seed), method, seed), accuracies)
    return tmp_path


def page_of(folder):
    return Page(write_report(records.find_runs(folder), folder / "report.html").read_text(encoding="utf-8"))


def test_curves_have_a_section_with_figure_and_table(measured):
    page = page_of(measured)
    assert page.ids[:5] == ["results", "sure", "seeds", "compute", "pruned"]
    assert ("a", "href", "#pruned") in page.attributes
    assert len([1 for _, key, _ in page.attributes if key in ("src", "srcset")]) == 12
    assert page.row("zeroed", "Standard training") == [
        "zeroed",
        "Standard training",
        "2",
        "55.00 ± 5.00 %",
        "0.275 ± 0.025",
        "—",
    ]
    # Differences of 10 and 30 points: 20 ± 12.706 · 10.
    assert page.row("zeroed", "RePr") == [
        "zeroed",
        "RePr",
        "2",
        "75.00 ± 5.00 %",
        "0.375 ± 0.025",
        "+20.00 [−107.06, +147.06]",
    ]
    assert "Zeroed : the filter’s weights are 0" in page.words()
    assert "Compensated" not in page.words()
    (curves,) = json.loads((measured / "results.json").read_text())["curves"]
    assert curves["criterion"] == "l2"
    assert curves["curves"][1]["mean_0_50"] == pytest.approx(0.75)


@pytest.mark.usefixtures("drawn")
def test_curves_of_two_criteria_have_a_figure_each(measured):
    add_curve(measured / "repr-seed0", (0.9, 0.8, 0.7), criterion="ortho")
    page = page_of(measured)
    assert "l2, same share of each layer, test pictures" in page.words()
    assert "ortho, same share of each layer, test pictures" in page.words()
    assert len([1 for _, key, _ in page.attributes if key in ("src", "srcset")]) == 14


def test_curves_of_old_weights_are_named_and_left_out(measured):
    records.weights_path(measured / "repr-seed1").write_text("trained again")
    page = page_of(measured)
    assert page.row("zeroed", "RePr")[2:4] == ["1", "70.00 %"]
    assert "These runs were trained again since their curve was measured" in page.words()
    assert "repr-seed1 ." in page.words()
    for run in measured.glob("*-seed*"):
        records.weights_path(run).write_text("all of them")
    page = page_of(measured)
    assert "pruned" in page.ids
    assert not [row for row in page.rows if row[0] == "zeroed"]


def test_without_curves_there_is_no_such_section(folder, page):
    assert "pruned" not in page.ids
    assert json.loads((folder / "results.json").read_text())["curves"] == []


def test_flops_have_columns_and_are_what_equal_compute_goes_by(tmp_path):
    for seed in range(2):
        make_run(tmp_path / f"a{seed}", "standard", seed, flops=2_000_000)
        make_run(tmp_path / f"b{seed}", "repr", seed, flops=3_000_000)
    page = page_of(tmp_path)
    (row,) = [row for row in page.rows if row[:2] == ["RePr", "2"] and row[2].startswith("82")]
    # 24 million are 8 epochs of repr: 0.9 − 0.5 / 8 against 0.9 − 0.5 / 12, the same for both seeds.
    assert row[-3:] == ["1.50", "1.50", "−2.08"]
    (row,) = [row for row in page.rows if row[:2] == ["RePr", "30.0 ± 0.0 s"]]
    assert row[2:] == ["36.00 MFLOPs", "85.00 ± 0.00 %", "83.75 ± 0.00 %", "2", "−2.08"]
    assert page.row("RePr", "1")[6] == "36.00 MFLOPs"
    assert "within the training FLOPs that the cheapest method" in page.words()
    standard, other = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert (standard["train_flops"], other["flops_ratio"], other["equal_compute_in"]) == (24e6, 1.5, "flops")
    assert other["equal_compute_accuracy"] == pytest.approx(0.8375)


def test_runs_that_only_partly_know_their_flops_are_compared_by_time(tmp_path):
    make_run(tmp_path / "a", "standard", flops=2_000_000)
    make_run(tmp_path / "b", "repr")
    page = page_of(tmp_path)
    assert "within the seconds of training" in page.words()
    assert "(some records have no FLOPs)" in page.words()


def test_variants_are_shown_and_compared_by_their_names(tmp_path):
    variants = {}
    for seed in range(2):
        make_run(tmp_path / f"standard-seed{seed}", "standard", seed)
        for fraction in (0.2, 0.3):
            folder = make_run(tmp_path / f"repr{fraction}-seed{seed}", "repr", seed, fraction=fraction)
            variants[folder] = f"RePr, fraction {fraction}"
    runs = records.find_runs(tmp_path)
    with pytest.raises(ValueError, match="with seed 0: leave one out"):
        write_report(runs, tmp_path / "report.html")
    path = write_report(runs, tmp_path / "report.html", variants=variants)
    page = Page(path.read_text(encoding="utf-8"))
    for name in ("Standard training", "RePr, fraction 0.2", "RePr, fraction 0.3"):
        assert page.row(name, "2")[0] == name
        assert page.row(name, "1")[1] == "1"
    assert "p = 0.410 corrected for 2 comparisons" in page.words()  # 2 · 0.205: t = 3, 1 degree of freedom
    assert page.row("fraction") == ["fraction", "—", "0.2", "0.3"]
    methods = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert [each["method"] for each in methods] == ["standard", "RePr, fraction 0.2", "RePr, fraction 0.3"]


def test_of_many_methods_one_sentence_comes_first(tmp_path):
    variants = {}
    for name, accuracies in {"a": ACCURACY["repr"], "b": (0.9, 0.911, 0.92), "c": (0.7, 0.711, 0.72)}.items():
        for seed in range(3):
            folder = make_run(tmp_path / f"{name}{seed}", "repr", seed)
            result = json.loads(records.result_path(folder).read_text())
            records.write_json(records.result_path(folder), result | {"test_accuracy": accuracies[seed]})
            variants[folder] = name
    for seed in range(3):
        make_run(tmp_path / f"standard{seed}", "standard", seed)
        variants[make_run(tmp_path / f"d{seed}", "repr", seed)] = "d"
    runs, _ = gather(tmp_path)
    page = Page(write_report(runs, tmp_path / "report.html", variants=variants).read_text(encoding="utf-8"))
    sentence = (
        "4 methods compared with standard training in test accuracy: 1 gain (b), 1 loss (c), no gain "
        "shown for 2. Each in a sentence a: +2.0 points"
    )
    assert sentence in page.words()


def test_runs_that_cannot_be_read_are_named_and_the_page_is_written(tmp_path):
    make_run(tmp_path / "good")
    make_run(tmp_path / "torn", seed=1)
    records.epochs_path(tmp_path / "torn").write_text("{}\n")
    runs, left_out = gather(tmp_path)
    path = write_report(runs, tmp_path / "report.html", left_out=left_out)
    page = Page(path.read_text(encoding="utf-8"))
    assert "torn : torn/epochs.jsonl, line 1 has no 'version'." in page.words()
    assert page.row("Standard training", "1")[2] == "80.00 %"
    assert list(json.loads((tmp_path / "results.json").read_text())["left_out"]) == ["torn"]


def test_a_damaged_curve_is_named_and_the_page_is_written(measured):
    records.curve_path(measured / "repr-seed1", "test", "l2", "layer").write_text("torn")
    page = page_of(measured)
    assert "repr-seed1/curve-test-l2-layer.json is not valid JSON" in page.words()
    assert page.row("zeroed", "RePr")[2] == "1"


@pytest.mark.usefixtures("drawn")
def test_odd_but_readable_events_do_not_take_the_page_down(tmp_path):
    run = make_run(tmp_path / "run", "repr")
    event = {"version": 1, "epoch": 3, "kind": "restore", "cycle": 1, "notes": [], "least_covered": 7}
    records.append_line(records.events_path(run), event | {"filters": {"no such layer": []}})
    assert "map" in page_of(tmp_path).ids


def test_sortable_tables_are_regular_and_say_what_to_sort_by(folder):
    """What the script in the page relies on; tests/study/test_browser.py clicks."""
    tables = ET.fromstring(
        "<tables>"
        + "".join(
            re.sub(r"&nbsp;|&#39;", " ", table)
            for table in re.findall(r"<table class=\"sortable.*?</table>", page_text(folder), re.DOTALL)
        )
        + "</tables>"
    )
    assert len(tables) == 4
    for table in tables:
        heads = table.findall("./thead/tr/th")
        rows = [list(row) for row in table.findall("./tbody/tr")]
        assert rows
        assert {len(row) for row in rows} == {len(heads)}
        for index, head in enumerate(heads):
            values = [row[index].get("data-value", "".join(row[index].itertext())) for row in rows]
            if head.get("class") == "text":
                assert all(values)
            else:  # a number or nothing: a dash or a unit would be sorted as text
                assert all(re.fullmatch(r"|-?\d+(\.\d+)?(e[-+]\d+)?", value) for value in values)


def page_text(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_command_reports_what_can_be_read_and_writes_event_files(tmp_path):
    make_run(tmp_path / "runs" / "standard")
    for fraction in (0.2, 0.3):
        make_run(tmp_path / "runs" / f"repr{fraction}", "repr", fraction=fraction)
    torn = make_run(tmp_path / "runs" / "torn", seed=1)
    records.result_path(torn).write_text("{")
    arguments = ["report", str(tmp_path / "runs"), "--tensorboard", str(tmp_path / "tb")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "left out: " in done.output
    assert "3 event files: tensorboard --logdir" in done.output
    assert len(list((tmp_path / "tb").glob("*/events.out.tfevents.*"))) == 3
    page = Page((tmp_path / "runs" / "report.html").read_text(encoding="utf-8"))
    assert page.row("RePr, fraction 0.2", "1")
    assert "torn : torn/result.json is not valid JSON" in page.words()


# Accuracies of three tasks by method and seed; of tasks 2 and 3 the means are 75, 77 and 78, 82: +3 and +5.
TASKS = {
    "standard": ((0.95, 0.80, 0.70), (0.95, 0.80, 0.74)),
    "repr": ((0.90, 0.80, 0.76), (0.90, 0.84, 0.80)),
}


@pytest.fixture(scope="module")
def sequence(tmp_path_factory):
    """A comparison of two methods that trained three tasks each, and its report."""
    root = tmp_path_factory.mktemp("sequence")
    for method, seeds in TASKS.items():
        for seed, accuracies in enumerate(seeds):
            folder = make_run(
                records.run_folder(root, method, seed),
                method,
                seed,
                flops=100,
                tasks=3,
                regime="new-pictures",
            )
            lines = [
                line | {"task": (line["epoch"] + 3) // 4}
                for line in records.read_lines(records.epochs_path(folder))
            ]
            records.write_lines(records.epochs_path(folder), lines)
            result = json.loads(records.result_path(folder).read_text())
            mean = sum(accuracies[1:]) / 2
            more = {
                "task_accuracies": accuracies,
                "mean_accuracy_after_switch": mean,
                "test_accuracy": accuracies[-1],
            }
            records.write_json(records.result_path(folder), result | more)
    write_report(records.find_runs(root), root / "report.html")
    return root


def test_a_sequence_is_reported_by_its_mean_without_the_first_task(sequence):
    page = Page((sequence / "report.html").read_text(encoding="utf-8"))
    assert "convnet on digits, 3 tasks of new pictures" in page.words()
    assert "RePr: +4.0 points mean test accuracy in tasks 2 to 3 over standard training" in page.words()
    assert page.rows[0][2].replace("\u00a0", " ") == "Mean test accuracy in tasks 2 to 3"
    assert page.row("Standard training", "2")[2] == "76.00 ± 1.41 %"
    assert page.row("RePr", "2")[2:4] == ["80.00 ± 2.83 %", "+4.00 [−8.71, +16.71]"]
    assert page.row("RePr", "0")[2:5] == ["78.00 %", "85.00 %", "+3.00"]
    assert "Its number here is the mean over tasks 2 to 3" in page.words()
    assert "Accuracy at equal compute is left out" in page.words()
    assert "Dotted: the next task begins." in page.words()


def test_the_table_over_tasks_has_paired_differences(sequence):
    page = Page((sequence / "report.html").read_text(encoding="utf-8"))
    assert "tasks" in page.ids
    (head,) = [row for row in page.rows if "Task 1" in [cell.replace("\u00a0", " ") for cell in row]]
    assert [cell.replace("\u00a0", " ") for cell in head] == [
        "Method", "n", "Mean of tasks 2 to 3", "Task 1", "Task 2", "Task 3",
    ]  # fmt: skip
    (row,) = [row for row in page.rows if row[:1] == ["RePr"] and len(row) == 6 and "−5.00" in row[3]]
    assert row[2] == "80.00 ± 2.83 % +4.00 [−8.71, +16.71]"
    assert row[3] == "90.00 ± 0.00 % −5.00"
    assert row[4] == "82.00 ± 2.83 % +2.00 [−23.41, +27.41]"


def test_the_numbers_of_a_sequence_are_in_the_files_too(sequence):
    results = json.loads((sequence / "results.json").read_text())
    assert results["compared"] == "mean test accuracy in tasks 2 to 3"
    assert results["methods"][1]["mean_accuracy_after_switch"] == pytest.approx(0.8)
    assert results["methods"][1]["test_accuracy"] == pytest.approx(0.78)
    assert [(row["method"], row["task"]) for row in results["tasks"]] == [
        (method, task) for method in ("standard", "repr") for task in (1, 2, 3)
    ]
    assert results["tasks"][3]["difference_points"] == pytest.approx(-5)
    assert results["tasks"][4]["difference_low"] == pytest.approx(2 - 12.7062 * 2, abs=1e-3)
    with (sequence / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["mean_accuracy_after_switch"]) == pytest.approx(0.75)


@pytest.mark.usefixtures("drawn")
def test_a_sequence_of_two_tasks_is_drawn(tmp_path):
    folder = make_run(tmp_path / "a", "standard", tasks=2)
    result = json.loads(records.result_path(folder).read_text())
    more = {"task_accuracies": [0.9, 0.7], "mean_accuracy_after_switch": 0.7, "test_accuracy": 0.7}
    records.write_json(records.result_path(folder), result | more)
    page = Page(
        write_report(records.find_runs(tmp_path), tmp_path / "report.html").read_text(encoding="utf-8")
    )
    assert "Its number here is that of task 2" in page.words()
    assert not any("Mean of tasks" in cell for row in page.rows for cell in row)


def test_a_report_of_single_tasks_has_no_section_over_tasks(page):
    assert "tasks" not in page.ids
