"""The report of a profiling in a real browser: laid out at both widths, silent, and asking for nothing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dynctl.profiler.report.told import Told
from dynctl.profiler.report.write import HTML, write_report
from tests.browser import Seen, look, screenshot
from tests.unit.report_samples import alone, infeasible, measured, none_at_all

pytestmark = [pytest.mark.debian("chromium"), pytest.mark.timeout(240)]
WIDTHS = (1200, 420)


def seen_of(told: Told, folder: Path) -> Seen:
    write_report(folder, told)
    return look(folder / HTML, WIDTHS, folder)


def apart(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(
        one["right"] <= other["left"] + 0.5
        or other["right"] <= one["left"] + 0.5
        or one["bottom"] <= other["top"] + 0.5
        or other["bottom"] <= one["top"] + 0.5
    )


def check(seen: Seen) -> None:
    assert seen.console == []
    assert [layout["width"] for layout in seen.layouts] == list(WIDTHS)
    for layout in seen.layouts:
        assert layout["scroll_width"] <= layout["width"], "the page is wider than its window"
        assert [one["id"] for one in layout["figures"]] == [
            "figure-ttft",
            "figure-itl",
            "figure-front",
            "figure-sensitivity",
        ]
        assert len(layout["svgs"]) == 4
        for svg in layout["svgs"]:
            assert svg["right"] - svg["left"] > 300
            assert svg["bottom"] - svg["top"] > 200
            assert svg["right"] <= layout["width"]
        for one, other in itertools.combinations(layout["figures"], 2):
            assert apart(one, other), f"{one['id']} lies over {other['id']}"
        assert layout["outside"] == [], "text that a plot cuts off"
        assert layout["small"] == [], "text too small to read"
        assert layout["loaded"] == [], "the page asked for something"
        assert layout["scripts"] == 0


def test_a_measured_profile_is_laid_out_at_both_widths_and_loads_nothing(tmp_path: Path) -> None:
    seen = seen_of(measured(), tmp_path)
    check(seen)
    for layout in seen.layouts:
        for words in ("Keeps the SLA, measured", "runner-up", "dynctl up profile-chat", "CUDA out of memory"):
            assert words in layout["text"]
        ttft, itl, front, sensitivity = layout["svg_text"]
        assert "TTFT, ms" in ttft
        assert "SLA p95 400ms" in ttft
        assert "sequences in the batch" in itl
        assert "disaggregated" in front
        assert "prompts +20%" in sensitivity
    wide, narrow = seen.layouts
    assert len({round(one["left"]) for one in wide["figures"]}) == 2, "two columns"
    assert len({round(one["left"]) for one in narrow["figures"]}) == 1, "one column"


@pytest.mark.parametrize("told", [infeasible, alone, none_at_all])
def test_states_with_little_to_show_are_laid_out_too(tmp_path: Path, told: Any) -> None:
    check(seen_of(told(), tmp_path))


def test_the_check_sees_a_page_that_asks_for_something(tmp_path: Path) -> None:
    """What the others rest on: a picture from elsewhere is seen as blocked, and a wide box as overflow."""
    write_report(tmp_path, none_at_all())
    page = tmp_path / HTML
    more = '<img src="http://192.0.2.1/x.png"><div style="width: 1500px">wide</div></main>'
    page.write_text(page.read_text(encoding="utf-8").replace("</main>", more), encoding="utf-8")
    seen = look(page, WIDTHS, tmp_path)
    assert any("Content Security Policy" in line for line in seen.console)
    assert all(layout["scroll_width"] > layout["width"] for layout in seen.layouts)


def test_a_screenshot_shows_colours_of_the_plots(tmp_path: Path) -> None:
    write_report(tmp_path, measured())
    with Image.open(screenshot(tmp_path / HTML, 1200, 2600, tmp_path)) as picture:
        assert picture.size == (1200, 2600)
        colours = picture.convert("RGB").getcolors(1_000_000) or []
    most = {colour for count, colour in colours if count > 200}
    assert (0x0B, 0x5C, 0x9E) in most or (0x0B, 0x62, 0xA8) in most, "a line in the colour of the palette"
    assert (0x0A, 0x7A, 0x55) in most, "the verdict"
