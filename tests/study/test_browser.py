"""The page in a real browser: what html.parser cannot see.

Needs Chromium or Chrome in the PATH (``apt-get install chromium``, as the README says). Without one these
tests are reported as skipped; test_report.py tests what the page's script relies on in any case.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cut_reports import REPORT
from regrow.study import records
from regrow.study.prune_page import prune_page
from regrow.study.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser in the PATH ({', '.join(NAMES)}): apt-get install chromium"
)
OFFLINE = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
# Clicks, and leaves what it saw in the page, where --dump-dom shows it.
PROBE = """
<script>
window.addEventListener("load", () => {
  const table = document.querySelector("#results table");
  const button = column => table.tHead.rows[0].cells[column].querySelector("button");
  const read = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent.trim());
  const sorts = () => [...table.tHead.rows[0].cells].map(cell => cell.getAttribute("aria-sort"));
  const seen = {orders: [read()], sorts: [sorts()]};
  for (const column of [2, 2, 0, 3]) {
    button(column).click();
    seen.orders.push(read());
    seen.sorts.push(sorts());
  }
  button(1).focus();
  seen.focus = document.activeElement === button(1) && button(1).tabIndex === 0;
  seen.pictures = [...document.images].map(image => [image.alt, image.naturalWidth, image.clientWidth]);
  seen.width = [window.innerWidth, document.documentElement.scrollWidth];
  seen.hints = [...document.querySelectorAll(".scroll")].map(box =>
    [box.scrollWidth > box.clientWidth + 1, !box.previousElementSibling.hidden]);
  seen.links = [...document.querySelectorAll("nav a")].map(a => document.querySelector(a.hash) !== null);
  const probe = document.createElement("pre");
  probe.id = "probe";
  probe.textContent = JSON.stringify(seen);
  document.body.append(probe);
});
</script>
"""


def browse(page: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Open ``page`` headless, with a profile of its own; what its console says is on standard error."""
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", *OFFLINE]
    profile = f"--user-data-dir={home / 'profile'}"
    log = ["--enable-logging=stderr", "--v=0"]
    command = [str(BROWSER), *quiet, *log, profile, *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines a page wrote to the console: errors, and what its security policy forbade."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def make_run(folder: Path, method: str, seed: int, accuracy: float) -> None:
    """A finished run of three epochs; RePr drops a filter for one of them."""
    records.write_yaml(records.config_path(folder), {"version": 1, "method": method, "seed": seed})
    records.write_json(records.environment_path(folder), records.environment("cpu", 1) | {"command": "it"})
    for epoch in (1, 2, 3):
        off = method == "repr" and epoch == 2
        line = {"version": 1, "epoch": epoch, "phase": "sub" if off else "full", "learning_rate": 0.1}
        line |= {"train_loss": 1.0, "train_accuracy": 0.5, "validation_loss": 1.0, "seconds": 1.0}
        line |= {"validation_accuracy": 0.2 * epoch, "overlap": 2.0, "alive": 3 - off, "filters": 3}
        records.append_line(records.epochs_path(folder), line)
    for epoch, kind in ((1, "drop"), (2, "restore")) if method == "repr" else ():
        event = {
            "version": 1,
            "epoch": epoch,
            "kind": kind,
            "cycle": 1,
            "filters": {"conv": [0]},
            "notes": [],
        }
        records.append_line(records.events_path(folder), event)
    result = {"version": 1, "test_accuracy": accuracy, "test_loss": 1.0, "validation_accuracy": 0.6}
    result |= {"train_seconds": 3.0, "seconds": 3.0, "parameters": 10, "filters": {"conv": 3}}
    records.write_json(records.result_path(folder), result)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    # 9.5 comes before 10.5 as a number and after it as text; a hostile name is a name.
    for method, accuracy in (("standard", 0.1), ("repr", 0.105), ("<b onclick=alert(1)>", 0.095)):
        for seed in (0, 1):
            make_run(root / f"{len(list(root.iterdir()))}", method, seed, accuracy + 0.01 * seed)
    return write_report(records.find_runs(root), root / "report.html")


def probed(page: Path, home: Path, *arguments: str) -> tuple[dict, list[str]]:
    """What the probe saw in ``page``, and the console."""
    copy = home / "probed.html"
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    done = browse(copy, home, "--dump-dom", *arguments)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), console(done)


def test_it_renders_sorts_and_is_silent(page: Path, tmp_path: Path) -> None:
    seen, said = probed(page, tmp_path, "--window-size=1200,900")
    assert said == []
    first, rising, falling, named, by_difference = seen["orders"]
    standard, regrown, hostile = "Standard training", "RePr", "<b onclick=alert(1)>"
    assert first[0] == standard
    assert rising == [hostile, standard, regrown]
    assert falling == [regrown, standard, hostile]
    assert named == [hostile, regrown, standard]
    assert by_difference == [hostile, regrown, standard]  # −0.5, +0.5, and the baseline has none
    before, *_, named_sort, _ = seen["sorts"]
    assert set(before) == {None}
    assert seen["sorts"][1][2] == "ascending"
    assert seen["sorts"][2][2] == "descending"
    assert (named_sort[0], named_sort[2]) == ("ascending", None)
    assert seen["focus"]
    assert all(seen["links"])
    assert len(seen["pictures"]) == 5
    assert all(alt and natural > 900 and shown > 900 for alt, natural, shown in seen["pictures"])
    assert seen["width"][1] <= seen["width"][0]


def test_on_a_phone_it_has_pictures_of_its_own_and_does_not_scroll_sideways(
    page: Path, tmp_path: Path
) -> None:
    seen, said = probed(page, tmp_path, "--window-size=400,800")
    assert said == []
    width, scrolled = seen["width"]
    assert scrolled <= width
    assert all(natural < 400 and shown <= width for _, natural, shown in seen["pictures"])
    assert any(wider for wider, _ in seen["hints"])
    assert all(wider == hinted for wider, hinted in seen["hints"])


WIDTHS = """
<script>
const shown = document.createElement("pre");
const inside = [...document.querySelectorAll("td, th, i, pre")].every(each =>
  each.getBoundingClientRect().right <= window.innerWidth || each.tagName === "PRE");
shown.id = "probe";
shown.textContent = JSON.stringify([window.innerWidth, document.documentElement.scrollWidth, inside]);
document.body.append(shown);
</script>
"""


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_of_a_cut_fits_the_screen(tmp_path: Path, width: int) -> None:
    name = "features.stages.12.0.a_rather_long_name_of_a_branch.conv1"
    report = REPORT | {"layers": REPORT["layers"] | {name: {"before": 2048, "after": 1024}}}
    text = prune_page(report).replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    (tmp_path / "cut.html").write_text(text.replace("</body>", f"{WIDTHS}</body>"), encoding="utf-8")
    done = browse(tmp_path / "cut.html", tmp_path, "--dump-dom", f"--window-size={width},900")
    assert console(done) == []
    found = re.search(r'<pre id="probe">\[(\d+),(\d+),(\w+)\]</pre>', done.stdout)
    assert found, done.stderr
    assert int(found[2]) <= int(found[1])
    assert found[3] == "true"


def test_it_prints(page: Path, tmp_path: Path) -> None:
    done = browse(page, tmp_path, f"--print-to-pdf={tmp_path / 'report.pdf'}", "--no-pdf-header-footer")
    assert console(done) == []
    printed = (tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) > 1


def test_an_error_in_a_page_would_be_noticed(tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><script>nowhere.to()</script>")
    assert any("nowhere is not defined" in line for line in console(browse(broken, tmp_path, "--dump-dom")))
