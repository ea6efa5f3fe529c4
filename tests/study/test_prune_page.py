"""The page that ``regrow prune`` writes: the numbers of the report, every layer, and nothing from outside."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import regrow
from cut_reports import HOSTILE, REPORT
from regrow.pruning.report import layer_rows, milliseconds, whole_rows
from regrow.study import prune_page
from regrow.study.prune_page import asked, curve, loading, reconstruction_rows, write_prune_page


class Page(HTMLParser):
    """The rows of the tables by section, the attributes, and the text; it refuses tags that do not close."""

    void = ("meta", "link", "br", "hr", "img", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self._open: list[str] = []
        self._section = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.attributes += [(tag, key, value) for key, value in given.items()]
        if tag not in self.void:
            self._open.append(tag)
        if tag == "section":
            self._section = given["id"]
        if tag == "tr":
            self.rows.setdefault(self._section, []).append([])
        if tag in ("td", "th"):
            self.rows[self._section][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words += data
        if "td" in self._open or "th" in self._open:
            self.rows[self._section][-1][-1] += data


def page_of(report: dict) -> Page:
    return Page(prune_page.prune_page(report, "small/pruned.safetensors"))


def test_it_has_the_numbers_of_the_report() -> None:
    page = page_of(REPORT)
    rows = page.rows["whole"]
    for row in whole_rows(REPORT)[1:]:
        assert [cell.strip() for cell in row] in [[cell.strip() for cell in each] for each in rows]
    assert rows[1][0] == "validation accuracy"
    assert ["file", "79.6 kB", "41.1 kB", "51.6 %"] in rows
    assert ["cut", "60.70%", "52.90%", "100 k", "1 ms", "41.1 kB"] in rows
    assert "Asked: remove as many filters as cost at most 1 point of validation accuracy." in page.words
    assert "Reached: 0.05 points were lost; 26 of 64 ranked filters are gone." in page.words
    latency = {row[0]: row[-1] for row in page.rows["latency"]}
    assert latency["before1.5 ms – 12.5 ms, 50 passes"] == milliseconds(0.002)
    assert "A bar that reaches the right edge goes on" in page.words
    assert ["30 of 64", "45 %", "94.70%", "3.00"] in page.rows["curve"]
    for words in ("regrow.load_run('runs/one')", "9.9", "regrow.load(network, 'small/pruned.safetensors')"):
        assert words in page.words


def test_no_layer_is_missing_and_its_bars_are_its_filters() -> None:
    page = page_of(REPORT)
    rows = page.rows["layers"][1:]
    assert len(rows) == len(REPORT["layers"])
    for row, (name, before, after, left, _) in zip(rows, layer_rows(REPORT)[1:], strict=True):
        assert row[0].startswith(name)
        assert row[2:] == [f"{before} → {after}", left]
    assert "left alone: excluded" in rows[1][0]
    assert "at 0, not cut: not confirmed" in rows[2][0]
    widths = [
        value for tag, key, value in page.attributes if (tag, key) == ("i", "style") and "left" not in value
    ]
    assert widths == [f"width:{100 * n / 64:.2f}%" for n in (64, 38, 8, 8, 9, 6)]
    assert f"excluded: {HOSTILE}" in page.words


def test_what_reconstruction_did_in_each_layer() -> None:
    assert [(row["name"], row["how"], row["error"]) for row in reconstruction_rows(REPORT)] == [
        ("a", "nothing", ""),
        (HOSTILE, "least squares", "25 %"),
        ("c.0.depthwise", "nothing", ""),
        ("head", "shift of the mean", "50 %"),
    ]
    rows = page_of(REPORT).rows["reconstruction"]
    assert ["c.0.depthwiseit shares its weight with another layer", "nothing", ""] in rows
    switched_off = page_of(REPORT | {"compensation": None})
    assert "it was switched off" in switched_off.words


def test_the_curve_has_the_cuts_of_the_search_at_their_places() -> None:
    found = curve(REPORT)
    assert found is not None
    assert [(p["look"], p["macs"], p["accuracy"]) for p in found["points"]] == [
        ("tried", 0.45, 0.947),
        ("tried", 0.51, 0.9765),
        ("uncut", 1.0, 0.977),
        ("result", 0.5, 0.9765),
    ]
    assert [each["macs"] for each in found["line"]] == [0.45, 0.51, 1.0]
    assert all(0 <= each[axis] <= 1 for each in found["points"] for axis in "xy")
    heights = sorted(found["points"], key=lambda each: each["accuracy"])
    assert heights == sorted(found["points"], key=lambda each: each["y"])
    searched = REPORT | {"tried": [], "target": {"kind": "macs", "value": 0.5, "reached": 0.5}}
    assert {p["look"] for p in curve(searched)["points"]} == {"uncut", "plain", "result"}
    assert curve(REPORT | {"accuracy": None, "networks": None, "tried": []}) is None


@pytest.mark.parametrize("accuracies", [(0.0, 0.0), (1.0, 1.0), (0.1, 1.0), (0.912, 0.9121)])
def test_the_ticks_enclose_the_accuracies_and_are_few(accuracies: tuple[float, float]) -> None:
    ticks = prune_page._ticks(*accuracies)
    assert 3 <= len(ticks) <= 7
    assert -1e-9 <= ticks[0] <= accuracies[0] <= accuracies[1] <= ticks[-1] <= 1 + 1e-9


@pytest.mark.parametrize(
    ("kind", "value", "reached", "sentences"),
    [
        ("fraction", 0.5, 0.406, ("remove 50 % of the filters.", "ranked filters are gone (40.6 %).")),
        ("fraction", {"a": 0.25}, 0.25, ("(25 % of a).", "26 of 64 ranked filters are gone.")),
        ("macs", 0.5, 0.497, ("leave at most 50 % of the multiply-accumulates.", "49.7 % are left;")),
        ("latency", 0.5, 0.4, ("leave at most 50 % of the latency.", "40 % is left;")),
        ("max_drop", 2.0, -0.25, ("at most 2 points of validation accuracy.", "0.25 points were gained;")),
    ],
)
def test_what_was_asked_and_reached(kind: str, value: object, reached: float, sentences) -> None:
    target = {"kind": kind, "value": value, "reached": reached}
    found = asked(REPORT | {"target": target})
    assert sentences[0] in found[0]
    assert sentences[1] in found[1]
    page_of(REPORT | {"target": target})


def test_it_asks_for_nothing_from_outside_and_obeys_no_name() -> None:
    text = prune_page.prune_page(REPORT)
    page = Page(text)
    assert HOSTILE not in text
    assert HOSTILE in page.words
    assert "script" not in {tag for tag, _, _ in page.attributes}
    assert "default-src 'none'" in text
    assert "<script" not in text
    assert "url(" not in text
    assert not any(key.startswith("on") for _, key, _ in page.attributes)
    for _, key, value in page.attributes:
        if key in ("src", "href"):
            assert value.startswith(("data:", "#"))
    sections = [value for tag, key, value in page.attributes if (tag, key) == ("section", "id")]
    links = [value for tag, key, value in page.attributes if (tag, key) == ("a", "href")]
    assert links == [f"#{section}" for section in sections]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"function": "nets.small:Net.make", "weights": None}, ["from nets.small import Net", "Net.make()"]),
        ({"model": "timm:resnet10t", "weights": "none"}, ["library_model('timm:resnet10t', 'none').model"]),
        ({}, ["MyNet()"]),
    ],
)
def test_how_to_load_it(source: dict, expected: list[str]) -> None:
    lines = loading(source, "it's.safetensors")
    compile("\n".join(lines), "page", "exec")
    for part in expected:
        assert part in "\n".join(lines)


def test_of_a_report_in_python(tmp_path: Path) -> None:
    """The report of ``regrow.prune`` itself has no source, no environment and no file."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 2))
    x = torch.randn(128, 3, 8, 8)
    report = regrow.prune(model, macs=0.5, example_inputs=x[:1], calibration=[x])
    page = Page(write_prune_page(report, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert {row[0] for row in page.rows["layers"][1:]} == set(report["layers"])
    assert "Accuracy was not measured" in page.words
    assert len(page.rows["curve"]) == 1 + len(report["tried"]) > 1
    assert json.loads(json.dumps(report)) == report
    with pytest.raises(ValueError, match=r"one HTML file: write .*report\.html"):
        write_prune_page(report, tmp_path)


def test_it_needs_no_torch() -> None:
    code = "import regrow.study.prune_page, sys; assert not {'torch', 'matplotlib'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
