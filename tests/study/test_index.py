from pathlib import Path

from regrow.study.index import IndexRow, write_index


def test_the_page_links_every_report_and_escapes_what_it_shows(tmp_path: Path) -> None:
    rows = [
        IndexRow("a <b>", tmp_path / "convnet digits" / "report.html", "RePr: one.\nDropout: two.", 3, 4),
        IndexRow("c", tmp_path / "c" / "report.html", "no gain shown", 2, 2),
    ]
    page = write_index(tmp_path / "index.html", "a & b", rows, file="study.yaml").read_text()
    assert '<a href="convnet%20digits/report.html">a &lt;b&gt;</a>' in page
    assert '<a href="c/report.html">c</a>' in page
    assert "<p>RePr: one.</p>\n<p>Dropout: two.</p>" in page
    assert "3 of 4 runs finished" in page
    assert "<title>a &amp; b</title>" in page
    assert 'href="study.yaml"' in page
    assert "<script" not in page
