"""Colours of the report: told apart by people who see no red or green, and in grey by marker and dash.

Plots are drawn in the light ones; on the page each stands for a CSS variable, so that plots follow dark mode.
"""

from __future__ import annotations

LIGHT = {
    "ink": "#1b2430",
    "soft": "#5a6675",
    "grid": "#dfe4ea",
    "band": "#eef3f1",
    "together": "#0b62a8",
    "apart": "#c2510a",
    "good": "#0a7a55",
    "bad": "#b3261e",
    "one": "#8fb8d9",
    "two": "#3d8bc4",
    "three": "#0b5c9e",
    "four": "#072f57",
    "page": "#fdfdfe",
}
DARK = {
    "ink": "#e6eaf0",
    "soft": "#a3adba",
    "grid": "#323a45",
    "band": "#1c2a27",
    "together": "#6db6f2",
    "apart": "#f59a4c",
    "good": "#4fd1a1",
    "bad": "#ff8a80",
    "one": "#41698c",
    "two": "#5c97c7",
    "three": "#8ac3ef",
    "four": "#d6ecff",
    "page": "#14181e",
}
SHADES = ("one", "two", "three", "four")
"""Of an order, from few to many."""


def css(colours: dict[str, str]) -> str:
    """Declarations of the variables."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def as_variables(svg: str) -> str:
    """Plots drawn in the light colours, with variables in their place."""
    for name, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{name})")
    return svg
