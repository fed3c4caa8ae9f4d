"""dashboards/dynctl.json asks for what there is: metrics of the catalogue, by labels they have."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dynctl.observability.catalogue import FRONTEND, Metric
from dynctl.observability.metrics import PREFIX

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "dashboards" / "dynctl.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
CATALOGUE = {f"{PREFIX}_{metric.scope}{metric.name}": metric for metric in FRONTEND}
UNITS = {"reqps", "short", "s", "ms", "percentunit", "bool_yes_no"}
SELECTOR = re.compile(r"(\w+)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"by \(([^)]*)\)")


def asked(query: str) -> list[tuple[Metric, str, set[str]]]:
    """The metrics of a query: each with its suffix ("" for none) and the labels it is selected by."""
    found = []
    for name, selector in SELECTOR.findall(query):
        if not name.startswith(f"{PREFIX}_"):
            continue
        suffix = next(
            (s for s in ("_bucket", "_sum", "_count") if name.endswith(s) and name not in CATALOGUE), ""
        )
        base = name.removesuffix(suffix)
        assert base in CATALOGUE, f"{name} is not in the catalogue"
        found.append((CATALOGUE[base], suffix, set(re.findall(r"(\w+)\s*[=!]", selector))))
    return found


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_asks_for_metrics_and_labels_that_there_are(panel: dict[str, Any]) -> None:
    assert panel["description"]
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["targets"]
    for target in panel["targets"]:
        query = target["expr"]
        assert query.count("(") == query.count(")")
        grouped = {label.strip() for labels in GROUPED.findall(query) for label in labels.split(",")}
        metrics = asked(query)
        assert metrics, query
        for metric, suffix, selected in metrics:
            assert bool(suffix) == (metric.kind == "histogram"), query
            assert ("rate(" in query) == (metric.kind != "gauge"), query
            assert selected <= set(metric.labels), query
            assert grouped <= {*metric.labels, *(("le",) if suffix == "_bucket" else ())}, query
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert shown <= grouped


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    assert DASHBOARD["schemaVersion"] >= 36
    assert {"uid", "title", "templating", "time", "panels"} <= set(DASHBOARD)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    cells = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        for x in range(grid["x"], grid["x"] + grid["w"]):
            for y in range(grid["y"], grid["y"] + grid["h"]):
                assert (x, y) not in cells, f"{panel['title']} lies over another"
                cells.add((x, y))
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval"}
    assert used == variables


def test_the_dashboard_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included["dashboards"] == "dynctl/_data/dashboards"
