"""The page of a report, from records made in memory: what it says, counts and escapes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from regrow.study import drawing
from regrow.study.compare import summarise
from regrow.study.page import Content, cut_shares, near, render, replaced_counts
from regrow.study.pruned import Curve, CurveSet
from regrow.study.records import RunRecord
from regrow.study.report import run_rows

HOME = Path("/reports/one")


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "svg", lambda _draw, _width: "<svg/>")


def event(epoch: int, filters: dict[str, list[int]], kind: str = "drop", **more: Any) -> dict[str, Any]:
    return {"epoch": epoch, "cycle": 1, "kind": kind, "filters": filters, "notes": [], **more}


def run(
    name: str = "run",
    method: str = "standard",
    seed: int = 0,
    *,
    accuracy: float | None = 0.8,
    events: Sequence[dict[str, Any]] = (),
    epochs: int = 0,
    filters: dict[str, int] | None = None,
    environment: dict[str, Any] | None = None,
    **settings: Any,
) -> RunRecord:
    """A finished run in ``HOME``; an unfinished one for an accuracy of None."""
    result = {
        "test_accuracy": accuracy,
        "validation_accuracy": 0.7,
        "train_seconds": 10.0,
        "parameters": 1234,
        "filters": filters or {"conv": 4},
    }
    lines = [
        {
            "epoch": number,
            "phase": "full",
            "learning_rate": 0.1,
            "validation_accuracy": 0.7,
            "overlap": 1.0,
            "seconds": 1.0,
        }
        for number in range(1, epochs + 1)
    ]
    return RunRecord(
        folder=HOME / name,
        config={"version": 2, "method": method, "seed": seed, "data": "digits", "epochs": 12, **settings},
        environment={"version": 2, "regrow": "0.1", "command": "regrow train", **(environment or {})},
        epochs=lines,
        events=list(events),
        result=None if accuracy is None else result,
    )


def page(runs: Sequence[RunRecord], variants: dict[Path, str] | None = None, **more: Any) -> str:
    summaries = summarise(runs, variants=variants)
    content: dict[str, Any] = {
        "title": "Title",
        "summaries": summaries,
        "runs": runs,
        "groups": {each.folder: (variants or {}).get(each.folder, each.method) for each in runs},
        "rows": run_rows(runs, summaries, HOME, variants),
        "curves": [],
        "outdated": [],
        "left_out": {},
        "home": HOME,
    }
    return render(Content(**content | more))


def words(html: str) -> str:
    """What is between the tags, in one line; scripts and styles are left out."""
    html = re.sub(r"<(script|style)>.*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", html).replace("&nbsp;", " ").split())


# --- near ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/reports/one/a/b", "a/b"),
        ("/reports/one", "."),
        ("/reports/one/../one/a", "a"),
        ("/reports/two/a", "a"),
        ("/reports/onetwo/a", "a"),
    ],
)
def test_folders_as_seen_from_the_page(folder: str, expected: str) -> None:
    assert near(Path(folder), HOME) == expected


def test_relative_folders_are_those_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert near(Path("runs/a"), tmp_path / "runs") == "a"
    assert near(tmp_path / "runs" / "a", Path("runs")) == "a"


# --- cut_shares ------------------------------------------------------------------------------------


def test_shares_are_means_over_the_runs_that_have_the_event() -> None:
    sizes = {"first": 4, "second": 8}
    runs = [
        run(
            filters=sizes,
            events=[
                event(9, {"second": [0, 1]}, cycle=2),
                event(3, {"first": [0], "second": [5, 5, 6]}),  # a filter that is named twice went once
                event(6, {"first": [0, 1, 2, 3]}, kind="restore"),
            ],
        ),
        run(filters=sizes, events=[event(3, {"first": [1, 2]})]),
    ]
    assert cut_shares(runs) == {
        "events": [(1, 3), (2, 9)],
        "rows": [
            {"name": "first", "filters": 4, "shares": [(3 / 8, 1 / 4, 2 / 4), (0, 0, 0)]},
            {"name": "second", "filters": 8, "shares": [(1 / 8, 0, 2 / 8), (2 / 8, 2 / 8, 2 / 8)]},
            # Of 12 filters: 3 and 2 at the first event, 2 at the second.
            {
                "name": "all layers",
                "filters": 12,
                "shares": [(pytest.approx(5 / 24), 2 / 12, 3 / 12), (2 / 12, 2 / 12, 2 / 12)],
            },
        ],
        "at_once": False,
    }
    assert cut_shares([run(events=[event(3, {"conv": [0]}, kind="restart")])])["at_once"]


def test_a_layer_without_filters_has_a_share_of_zero() -> None:
    shares = cut_shares([run(filters={"empty": 0}, events=[event(1, {})])])
    assert [row["shares"] for row in shares["rows"]] == [[(0, 0, 0)], [(0, 0, 0)]]


def test_there_are_no_shares_where_nothing_was_dropped_or_nothing_is_finished() -> None:
    assert cut_shares([run()]) is None
    assert cut_shares([run(events=[event(3, {"conv": [0]}, kind="restore")])]) is None
    assert cut_shares([run(accuracy=None, events=[event(3, {"conv": [0]})])]) is None


# --- replaced_counts -------------------------------------------------------------------------------


def test_counts_of_filters_drawn_anew_are_means_over_the_runs() -> None:
    sizes = {"first": 4, "second": 8, "third": 8}
    runs = [
        run(
            method="redo",
            filters=sizes,
            events=[
                event(3, {"first": [0], "second": [1, 2]}, kind="replace"),
                event(6, {"first": [0]}, kind="replace"),
                event(6, {"third": [0]}, kind="restart"),  # not one by one
            ],
        ),
        run(method="redo", filters=sizes, events=[event(3, {"second": [7]}, kind="replace")]),
    ]
    assert replaced_counts(runs) == {
        "rows": [
            {"name": "first", "filters": 4, "counts": (1, 0, 2)},
            {"name": "second", "filters": 8, "counts": (1.5, 1, 2)},
            {"name": "all layers", "filters": 20, "counts": (2.5, 1, 4)},
        ]
    }


def test_there_are_no_counts_for_methods_that_replace_nothing_one_by_one() -> None:
    assert replaced_counts([run(events=[event(3, {"conv": [0]}, kind="replace")])]) is None
    assert replaced_counts([run(method="redo+new-head", accuracy=None)]) is None
    assert replaced_counts([run(method="redo+new-head")]) == {
        "rows": [{"name": "all layers", "filters": 4, "counts": (0, 0, 0)}]
    }


# --- render ----------------------------------------------------------------------------------------


def test_names_are_escaped_and_control_characters_shown() -> None:
    html = page([run("<b>&\u202e", note="<i>\x00")], title="<script>alert(1)</script>\x07")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;�" in html
    assert "&lt;b&gt;&amp;�" in html
    assert "&lt;i&gt;�" in html
    assert not {"\x00", "\x07", "\u202e"} & set(html)


def test_a_number_and_its_unit_stay_on_one_line() -> None:
    runs = [run(f"{method}{seed}", method, seed) for method in ("standard", "dropout") for seed in (0, 1)]
    html = page(runs)
    assert "n\u00a0=\u00a02 seeds with the same difference each" in html
    assert "n = 2" not in html


def methods(count: int) -> tuple[list[RunRecord], dict[Path, str]]:
    """Standard training and ``count`` variants of dropout, of one seed."""
    runs = [run("base"), *(run(f"v{number}", "dropout", p=number / 10) for number in range(count))]
    return runs, {each.folder: each.folder.name for each in runs[1:]} | {runs[0].folder: "standard"}


@pytest.mark.parametrize(("count", "leads"), [(1, 1), (3, 3), (4, 1)])
def test_of_more_than_three_methods_one_sentence_leads(count: int, leads: int) -> None:
    runs, variants = methods(count)
    html = page(runs, variants)
    assert html.count('<p class="lead">') == leads
    assert ("4 methods compared with standard training" in html) == (count == 4)
    for number in range(count):
        assert f"v{number}: +0.0 points test accuracy over standard training" in html


def test_settings_are_shared_or_belong_to_a_method() -> None:
    runs = [
        run("a", lr=None, exclude=[], weight_decay=0.1, p=0.3, fraction=0.3),
        run("b", "dropout", lr=None, exclude=["x", "y"], weight_decay=0.2, p=0.3, fraction=0.3),
    ]
    html = page(runs)
    own, shared = (
        dict(re.findall(r"<code>(\w+)</code></th>\s*(.*?)</tr>", table, re.DOTALL))
        for table in re.search(r'<section id="settings">(.*?)</section>', html, re.DOTALL)[1].split(
            "<caption>"
        )[1:]
    )
    assert {name: words(cells) for name, cells in own.items()} == {
        "weight_decay": "0.1 0.2",
        "p": "— 0.3",  # standard training has no use for it
    }
    # Neither method has a fraction or layers to exclude: these are RePr's.
    assert {name: words(cells) for name, cells in shared.items()} == {
        "data": "digits", "epochs": "12", "lr": "not set",
    }  # fmt: skip


def test_one_method_alone_shares_all_its_settings_with_itself() -> None:
    html = page([run(batch_norm=True, compact=False)])
    assert ">yes</td>" in html
    assert "At equal compute" not in html
    assert 'id="sure"' not in html


def test_environments_commands_and_the_command_that_repeats_a_run() -> None:
    runs = [
        run("a b", environment={"command": "regrow one", "cores": 2, "threads": 1}),
        run("it's", seed=1, environment={"command": "regrow two", "cores": 4, "threads": 1}),
        run("c", seed=2, environment={"command": "regrow one", "cores": 2, "threads": 1}),
    ]
    html = page(runs)
    text = words(html)
    assert "cores 2 (a b, c) 4 (it&#39;s) threads 1 Repeat it" in text
    assert "<pre>regrow one\nregrow two\n</pre>" in html
    assert "regrow train --config c/config.yaml --out again" in text
    assert "--config &#39;a b/config.yaml&#39; --out" in page(runs[:1])
    assert "Written by regrow 0.1 from 3 finished runs." in text


def test_unfinished_unreadable_and_outdated_runs_are_named() -> None:
    unfinished = run("stopped", "repr", 7, accuracy=None, epochs=5)
    text = words(
        page(
            [run(), unfinished],
            left_out={"torn": "torn/epochs.jsonl, line 3 has no 'epoch'."},
            outdated=[run("old")],
        )
    )
    assert "RePr, seed 7: 5 of 12 epochs ( stopped )" in text
    assert "torn : torn/epochs.jsonl, line 3 has no &#39;epoch&#39;." in text
    assert "old ." in text
    assert "from 1 finished run." in text
    clean = words(page([run()]))
    assert "left out of every number" not in clean
    assert "Accuracy with filters cut" not in clean


@pytest.mark.parametrize(("seeds", "sentence"), [(3, False), (4, True)])
def test_at_most_three_maps_of_a_method_are_drawn(seeds: int, sentence: bool) -> None:
    runs = [run(f"{seed}", "repr", seed, epochs=2, events=[event(1, {"conv": [0]})]) for seed in range(seeds)]
    html = page(runs)
    assert 'id="map"' in html
    assert ("The first 3 of 4 seeds are shown." in html) == sentence
    assert f"mean over {seeds} seeds" in html


def test_notes_and_least_covered_layers_are_counted() -> None:
    restore = {"kind": "restore", "notes": ["a <note>"]}
    runs = [
        run(
            "a", "repr", 0, events=[event(1, {"conv": [0]}), event(2, {}, least_covered=["conv"], **restore)]
        ),
        run("b", "repr", 1, events=[event(1, {"conv": [0]}), event(2, {}, least_covered=None, **restore)]),
    ]
    text = words(page(runs))
    assert "conv (1 of 2 restores)." in text
    assert "a &lt;note&gt; (2 times)" in text


def test_only_the_readings_that_were_measured_are_explained() -> None:
    curves = CurveSet(
        "test", "l2", "layer", "standard", 0.1, (Curve("standard", "removed", (0.0, 0.5), {0: (0.9, 0.5)}),)
    )
    text = words(page([run()], curves=[curves]))
    assert "Removed :" in text
    assert "Zeroed :" not in text
    assert "Compensated :" not in text
    # The mean of 0.9 and 0.5; the area of a trapezoid half as wide as it is high on average, 0.7.
    assert "removed Standard training 1 70.00 % 0.350" in text


def test_the_page_says_that_nothing_was_drawn_anew_and_draws_no_empty_map() -> None:
    still = event(3, {}, kind="replace")
    runs = [run("a", epochs=6), run("b", "redo", events=[still], epochs=6)]
    html = page(runs)
    assert "No filter was drawn anew." in words(html)
    assert "What was drawn anew" in words(html)
    assert "Which filter was off when" not in words(html)


def test_a_restart_has_a_table_of_shares_and_no_map() -> None:
    html = page(
        [run("a", epochs=6), run("b", "restart", events=[event(3, {"conv": [0]}, kind="restart")], epochs=6)]
    )
    assert "Share of each layer’s filters that started anew" in words(html)
    assert "Which filter was off when" not in words(html)


def test_methods_that_replace_filters_have_a_table_of_counts() -> None:
    new = event(3, {"conv": [0, 2]}, kind="replace")
    html = page([run("a", epochs=6), run("b", "continual-backprop", events=[new], epochs=6)])
    assert "Filters that were drawn anew in the whole training" in words(html)
    assert "conv 4 2.0 all layers 4 2.0" in words(html)
