"""docs/performance.md is what the committed results say."""

import json
from pathlib import Path

from benchmarks import decode, report
from benchmarks.measure import RESULTS


def test_the_page_is_generated_from_the_committed_results() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == report.render(RESULTS), "run python -m benchmarks.report"


def test_a_page_without_results_has_no_sections(tmp_path: Path) -> None:
    page = report.render(tmp_path)
    assert page.startswith("# Performance")
    assert "## " not in page
    assert page.endswith("No results yet.\n")


def test_a_result_becomes_its_section(tmp_path: Path) -> None:
    flags = ["--shape", "tiny", "--threads", "1", "--repeats", "1", "--batch", "1", "--context", "4"]
    out = tmp_path / "results" / "decode-tiny-cpu.json"
    result = decode.main([*flags, "--new-tokens", "2", "--out", str(out)])
    report.main(["--results", str(out.parent), "--out", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "## Decoding" in page
    assert "## Training" not in page
    assert result["provenance"]["command"] in page
    ratio = result["rows"][0]["ratios"]["auto/plain"]["median"]
    assert f"| {ratio:.2f}×" in page
    assert "Stopped" not in page
    out.write_text(json.dumps(result | {"complete": False}), encoding="utf-8")
    assert "Stopped before its end" in report.render(out.parent)
