"""The report of a profiling: what it says, in each state; escaped; the same bytes each time."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import msgspec
import pytest

from dynctl.perfmodel.choice import Demand, Refused
from dynctl.perfmodel.interpolate import linear
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.offers import Ask
from dynctl.perfmodel.profile import PrefillCurve
from dynctl.perfmodel.split import choose
from dynctl.profiler.outcome import Confirmed, Measurement
from dynctl.profiler.phrases import figure, milliseconds, span, tokens
from dynctl.profiler.report.draw import png, svg
from dynctl.profiler.report.front import Point, batches, best_of, front
from dynctl.profiler.report.page import page, verdict
from dynctl.profiler.report.palette import LIGHT
from dynctl.profiler.report.plots import plots
from dynctl.profiler.report.told import Told
from dynctl.profiler.report.write import HTML, PNG, write_report
from tests.unit.report_samples import LOOSE, WHOLE, alone, estimated, infeasible, law, measured, none_at_all

NASTY = "<script>alert('x')</script> & \"$a_b$\" {{ 7 * 7 }}"


class Text(HTMLParser):
    """The words of a page by the id of their section, plots and styles left out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self._at, self._deaf = "", 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("svg", "style"):
            self._deaf += 1
        if tag == "section":
            self._at = dict(attrs)["id"] or ""

    def handle_endtag(self, tag: str) -> None:
        if tag in ("svg", "style"):
            self._deaf -= 1

    def handle_data(self, data: str) -> None:
        if not self._deaf and data.strip():
            words = f"{self.sections.get(self._at, '')} {' '.join(data.split())}"
            self.sections[self._at] = words.strip()


def page_of(told: Told) -> str:
    return page(told, plots(told), svg)


def words_of(told: Told) -> dict[str, str]:
    """The words by section, without the plots, which take their time."""
    return Text(page(told, plots(told), lambda plot: "")).sections


def confirmed_as(**changes: object) -> Told:
    """The measured sample with its confirmation changed."""
    told = measured()
    assert told.measured is not None
    made = msgspec.structs.replace(told.measured.rounds[0], **changes)
    return replace(told, measured=msgspec.structs.replace(told.measured, rounds=(made,)))


def test_the_answer_comes_first_with_predicted_beside_measured() -> None:
    told = measured()
    text = words_of(told)
    assert next(iter(name for name in text if name)) == "answer"
    assert text["answer"] == (
        "✓ Keeps the SLA, measured 1 x TP2 aggregated, 2 GPUs "
        "1 x TP2 aggregated keeps p95 TTFT and ITL at 8 requests/s. "
        "asked predicted measured at 8/s difference "
        "TTFT, p95 ≤ 400ms 173ms 180ms +4% "
        "ITL, p95 ≤ 12.0ms 9.8ms 9.5ms -3% "
        "Requests/s within the SLA 8 9.21 7.74 "
        "Answer tokens/s a GPU 1,200 1,200 0% "
        "Answer tokens/s a user 102 105 +3% "
        "Run it: dynctl up profile-chat/recipe.yaml"
    )


def test_all_that_was_found_is_told() -> None:
    text = words_of(measured())
    assert "runner-up" in text["options"]
    assert "aggregated 1 TP2 2 48 8,192 50%" in text["pools"]
    assert "TP8 - 0 0 - 31 s the engine ended with exit code 1" in text["candidates"]
    assert "INFO loading weights <1/4> torch.OutOfMemoryError: CUDA out of memory." in text["candidates"]
    assert "decode 256 x 3150 refused: the client was the bottleneck" in text["candidates"]
    assert "TP2 42 s 3 5 1 6 min 28 s measured, but for decode 256 x 3150 refused" in text["candidates"]
    assert "TP16 decode 16 GPUs, the nodes have 8" in text["refused"]
    assert "96.8% (96.0% to 97.5%) ✓ enough" in text["confirmed"]
    how = text["how"]
    for words in (
        "Run chat-7f3a, begun 2025-06-15T15:06:40.000Z",
        "21 min 52 s of 30 min 00 s allowed, 2 h 31 min of one GPU in all",
        "Probes 19, 4 more from the journal",
        "Engine mocker 1.0",
        "Samples 24 prompts, 2000 decode steps",
        "Cached when steps were timed 0.2%",
        "Left open by the budget TP8 as prefill",
    ):
        assert words in how


def test_the_best_aggregated_is_told_when_the_split_is_apart() -> None:
    told = estimated(msgspec.structs.replace(estimated().choice.sla, itl_s=0.0065))
    assert told.choice.chosen is not None
    assert told.choice.chosen.mode == "disaggregated"
    text = words_of(told)
    assert "best aggregated" in text["options"] or "runner-up" in text["options"]
    ranks = [told.choice.rank(option) for option in told.choice.options]
    assert ranks.count("chosen") == 1
    assert ranks.count("runner-up") == 1


def test_an_estimate_is_not_sold_as_measured() -> None:
    text = words_of(estimated())
    assert "Should keep the SLA" in text["answer"]
    assert "nothing was measured" in text["answer"]
    assert "asked estimated TTFT" in text["answer"]
    assert "What it rests on" in text["how"]
    assert "confirmed" not in text
    assert "candidates" not in text


@pytest.mark.parametrize(
    ("changes", "said", "tone"),
    [
        ({"meets": "no", "ttft_s": 0.401}, "✗ Misses the SLA, measured", "bad"),
        ({"meets": "unsure", "itl_s": 0.0121}, "✗ Misses the SLA, measured", "bad"),
        ({"problems": ("the client was late",)}, "not to be relied on: the client was late", "open"),
        ({"meets": "no"}, "TTFT and ITL are each kept, measured, but not both at once", "open"),
        ({"meets": "unsure"}, "Keeps the SLA, measured, but too close to be sure", "open"),
        (
            {"meets": "", "ttft_s": None, "itl_s": None, "failure": "the frontend did not come up"},
            "Not confirmed: the frontend did not come up",
            "open",
        ),
    ],
)
def test_a_split_that_was_not_kept_is_not_called_good(
    changes: dict[str, object], said: str, tone: str
) -> None:
    told = confirmed_as(**changes)
    assert said in words_of(told)["answer"]
    assert verdict(told)[0] == tone


def test_a_confirmation_of_another_split_is_not_taken_for_the_chosen_one() -> None:
    told = measured()
    other = told.choice.options[1]
    text = words_of(confirmed_as(option=other, meets="no"))
    assert f"Not tried: {other.label} was, and missed" in text["answer"]
    assert other.label in text["confirmed"]


def test_an_sla_that_nothing_keeps_says_why_and_what_is_nearest() -> None:
    text = words_of(infeasible())
    assert text["answer"].startswith(
        "✗ Nothing keeps this SLA nearest: 1 x TP8 aggregated a TTFT of 10 ms cannot"
    )
    assert "What comes nearest, with nobody else there" in text["options"]
    assert "19.3 ms, 10 ms wanted" in text["options"]
    assert "runner-up" not in text["options"]
    assert "Run it" not in text["answer"]
    assert "pools" not in text
    assert "Star" not in text["plots"]


def test_no_layout_at_all_is_a_page_too() -> None:
    made = page_of(none_at_all())
    assert Text(made).sections["answer"].endswith("no layout can be: each is refused with its reason")
    assert made.count("no layout can be: nothing to draw") == 3
    assert "nothing to vary" in made


@pytest.mark.parametrize("itl_s", [1e-5, 1e-3, 1 / 170.0])
def test_an_itl_that_no_stream_comes_near_leaves_the_plots_their_room(itl_s: float) -> None:
    """matplotlib warns, which is an error here, when what lies outside the axes takes all their room."""
    told = estimated(msgspec.structs.replace(LOOSE, itl_s=itl_s))
    drawn = plots(told)
    assert png(drawn, told.name)
    front_svg = svg(next(plot for plot in drawn if plot.key == "front"))
    assert (f"{1 / itl_s:,.0f} tokens/s, further right" in front_svg) == (told.choice.chosen is None)


@pytest.mark.parametrize("name", ["measured", "none_at_all"])
def test_a_page_stands_alone(name: str) -> None:
    """No script, nothing from elsewhere, four plots with ids of their own, colours by variables."""
    made = page_of(WHOLE[name]())
    assert made.count("<svg ") == made.count("</svg>") == 4
    assert "<script" not in made
    assert not re.findall(r'(?:src|href|action|data)="(?!#|data:,)[^"]*"', made)
    assert not re.findall(r"url\((?!#)|@import|@font-face", made)
    ids = re.findall(r'\bid="([^"]+)"', made)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', made)) <= {
        pair for one in ids for pair in ((one, ""), ("", one))
    }
    left = set(re.findall(r"#[0-9a-f]{6}\b", made[made.index("<figure") :]))
    assert not left, f"colours that dark mode would not change: {left}"
    assert all(f"--{colour}" in made for colour in LIGHT)


def test_what_others_wrote_is_shown_and_not_run() -> None:
    told = measured(estimated(name=NASTY))
    found = told.measured
    assert isinstance(found, Measurement)
    run = msgspec.structs.replace(found.layouts[-1], failure=NASTY, lines=(NASTY,), stopped=NASTY)
    round_ = msgspec.structs.replace(found.rounds[0], problems=(NASTY,), failure="")
    told = replace(
        told,
        recipe=NASTY,
        next_command=NASTY,
        choice=msgspec.structs.replace(
            told.choice, refused=(Refused(layout=Layout(), reason=NASTY),), why=NASTY
        ),
        measured=msgspec.structs.replace(
            found, layouts=(*found.layouts[:-1], run), rounds=(round_,), unmeasured=(NASTY,), verdict=NASTY
        ),
    )
    made = page_of(told)
    assert "<script" not in made
    assert made.count("&lt;script&gt;") >= 8
    assert "{{ 7 * 7 }}" in made
    assert Text(made).sections["refused"].endswith(NASTY)
    assert png(plots(told), told.name), "a name with dollars is no formula"


@pytest.mark.parametrize("name", ["measured", "infeasible"])
def test_the_same_profiling_gives_the_same_bytes_whatever_the_users_style(tmp_path: Path, name: str) -> None:
    write_report(tmp_path / "one", WHOLE[name]())
    with matplotlib.rc_context({"font.size": 23, "axes.grid": True, "svg.fonttype": "path"}):
        write_report(tmp_path / "two", WHOLE[name]())
    for file in (HTML, PNG):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_without_matplotlib_the_page_is_whole_but_for_its_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written, missing = write_report(tmp_path, measured())
    assert written == [tmp_path / HTML]
    assert "pip install 'dynctl[profile]'" in missing
    made = (tmp_path / HTML).read_text(encoding="utf-8")
    assert "<svg" not in made
    text = Text(made).sections
    assert "Keeps the SLA" in text["answer"]
    assert "pip install 'dynctl[profile]'" in text["plots"]


def test_measured_points_are_drawn_each_once() -> None:
    def marks(told: Told) -> tuple[int, int]:
        made = page_of(told)
        ttft, itl = (
            re.search(rf'id="figure-{key}".*?</figure>', made, re.DOTALL)[0]  # type: ignore[index]
            for key in ("ttft", "itl")
        )
        return ttft.count("<use "), itl.count("<use ")

    with_points, told = marks(measured()), measured()
    assert told.measured is not None
    bare = [msgspec.structs.replace(run, prefill=(), decode=()) for run in told.measured.layouts]
    without = marks(replace(told, measured=msgspec.structs.replace(told.measured, layouts=tuple(bare))))
    assert with_points[0] > without[0]
    assert with_points[1] - without[1] >= 3


def test_one_layout_alone_is_its_own_best() -> None:
    told = alone()
    text = words_of(told)
    assert "1 x TP1 aggregated, 1 GPU " in text["answer"]
    assert len({option.label for option in told.shown()}) == len(told.shown())


def test_the_front_holds_no_point_that_another_one_beats() -> None:
    points = [Point(10, 5, "a"), Point(10, 7, "b"), Point(5, 6, "c"), Point(20, 1, "d"), Point(5, 9, "e")]
    assert [one.label for one in best_of(points)] == ["e", "b", "d"]


@pytest.mark.parametrize("mode", ["aggregated", "disaggregated"])
def test_no_option_lies_beyond_the_front(mode: str) -> None:
    slow_steps = msgspec.structs.replace(law(1), prefill=PrefillCurve(tokens=(0, 4096), seconds=(0.03, 0.16)))
    known = {Layout(): slow_steps}
    costly = replace(
        alone(),
        profiles=known,
        choice=choose(
            Ask(
                sla=LOOSE,
                demand=Demand(rate=1.0, lengths=((500, 60),)),
                profiles={"aggregated": known, "prefill": known, "decode": known},
                gpus=3,
                most=True,
            )
        ),
    )
    assert costly.choice.chosen is not None
    for told in (estimated(), alone(), costly):
        line = front(mode, told.profiles, told.mix, told.choice.sla.ttft_s)  # type: ignore[arg-type]
        for option in told.choice.options:
            if option.mode != mode:
                continue
            predicted = option.predicted
            at, wanted = predicted.tokens_per_s_per_user, predicted.tokens_per_s_per_gpu
            users, gpus = [point.user for point in line], [point.gpu for point in line]
            there = max(gpus) if at <= users[0] else linear(users, gpus, at)
            assert wanted <= there * 1.01, option.label


def test_layouts_that_read_too_slowly_are_not_on_the_front() -> None:
    told = estimated()
    assert front("aggregated", told.profiles, told.mix, 0.001) == []
    assert front("disaggregated", told.profiles, told.mix, 0.001) == []
    assert front("aggregated", {}, told.mix, None) == []


def test_batches_rise_to_the_last_one() -> None:
    assert batches(0) == []
    assert batches(1) == [1]
    found = batches(256)
    assert found[0] == 1
    assert found[-1] == 256
    assert found == sorted(set(found))


def test_figures_in_words() -> None:
    assert [milliseconds(x) for x in (0.0086, 0.231, 0.9996, 2.2604, 3.0, 12.4)] == [
        "8.6ms", "231ms", "1000ms", "2.26s", "3s", "12.4s",
    ]  # fmt: skip
    assert [figure(x) for x in (0.7391, 5.5, 31, 1234.4)] == ["0.739", "5.50", "31.0", "1,234"]
    assert [tokens(x) for x in (500, 4250, 131072)] == ["500", "4.25k", "131k"]
    assert [span(x) for x in (0.42, 42, 185, 3725)] == ["0.4 s", "42 s", "3 min 05 s", "1 h 02 min"]


def test_a_confirmation_without_all_figures_leaves_them_open() -> None:
    told = confirmed_as(itl_s=None, output_rate=None, goodput=None, attainment_low=None)
    text = words_of(told)
    assert "ITL, p95 ≤ 12.0ms 9.8ms -" in text["answer"]
    assert "96.8% ✓" in text["confirmed"]
    assert isinstance(told.confirmed, Confirmed)
