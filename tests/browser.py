"""A page in a real browser without a screen: how it is laid out at some widths, and what it asks for.

Debian's chromium, with an empty profile of its own and no way to any host.
"""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
)
_DEADLINE_S = 100.0
_LOOK = """
function box(element) {
  const r = element.getBoundingClientRect();
  return {id: element.id, left: r.left, top: r.top, right: r.right, bottom: r.bottom};
}
function look(frame) {
  const page = frame.contentDocument, root = page.documentElement;
  const svgs = Array.from(page.querySelectorAll("figure svg"));
  return {
    width: frame.contentWindow.innerWidth,
    scroll_width: Math.max(root.scrollWidth, page.body.scrollWidth),
    figures: Array.from(page.querySelectorAll("figure")).map(box),
    svgs: svgs.map(box),
    outside: svgs.flatMap(svg => {
      const whole = svg.getBoundingClientRect();
      return Array.from(svg.querySelectorAll("text")).filter(text => {
        const r = text.getBoundingClientRect();
        return r.left < whole.left - 1 || r.right > whole.right + 1 || r.top < whole.top - 1
          || r.bottom > whole.bottom + 1;
      }).map(text => text.textContent);
    }),
    small: svgs.flatMap(svg => Array.from(svg.querySelectorAll("text")).filter(
      text => text.getBoundingClientRect().height < 7).map(text => text.textContent)),
    text: page.body.innerText,
    svg_text: svgs.map(svg => svg.textContent),
    loaded: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    scripts: page.scripts.length,
  };
}
window.onload = () => {
  const seen = Array.from(document.querySelectorAll("iframe")).map(look);
  document.body.replaceChildren();
  document.body.textContent = "SEEN" + JSON.stringify(seen) + "END";
};
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """`layouts`: what `_LOOK` found, one a width; `console`: what the browser had to say of the page."""

    layouts: list[dict[str, Any]]
    console: list[str]


def look(page: Path, widths: tuple[int, ...], scratch: Path) -> Seen:
    """The page as it is, in a frame of each width."""
    text = html.escape(page.read_text(encoding="utf-8"))
    frames = "".join(
        f'<iframe style="border:0" width="{width}" height="900" srcdoc="{text}"></iframe>' for width in widths
    )
    around = scratch / "around.html"
    around.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body>{frames}<script>{_LOOK}</script></body>',
        encoding="utf-8",
    )
    out, err = _run(("--dump-dom", "--window-size=1400,1000", around.as_uri()), scratch)
    found = re.search(r"SEEN(.*)END", out, re.DOTALL)
    assert found, f"the browser did not get as far as to look:\n{err[-2000:]}"
    layouts: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
    return Seen(layouts, [line for line in err.splitlines() if "CONSOLE" in line])


def screenshot(page: Path, width: int, height: int, scratch: Path) -> Path:
    """A picture of the page."""
    picture = scratch / "screen.png"
    _run((f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri()), scratch)
    return picture


def _run(args: tuple[str, ...], scratch: Path) -> tuple[str, str]:
    home = scratch / "home"
    home.mkdir(exist_ok=True)
    env = {**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(home), "LANG": "C.UTF-8"}
    done = subprocess.run(
        ["chromium", *_FLAGS, f"--user-data-dir={scratch / 'profile'}", *args],
        capture_output=True,
        text=True,
        env=env,
        timeout=_DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr
