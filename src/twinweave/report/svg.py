"""A matplotlib figure as inline SVG that follows the page: its colours, its fonts, its dark mode.

The figure is drawn in sentinel colours (see `palette`), which become CSS variables here; ids get a prefix, so
several figures share one page. Knows nothing about what is drawn.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle

from .palette import SENTINEL

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched, scaled and read aloud
    "text.parse_math": False,  # a task called "$x$" is a name, not a formula
    "font.size": 12,
    "axes.unicode_minus": True,
    "path.simplify": False,
}
_VARIABLES = {colour: f"var(--{name})" for name, colour in SENTINEL.items()}


@contextmanager
def figure_style(salt: str = "twinweave") -> Iterator[None]:
    """Everything that makes a figure look and hash the same on every machine."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": salt})
        yield


def inline_svg(figure: Figure, prefix: str, label: str) -> Markup:
    """The figure as an `<svg>` element whose ids start with `prefix` and whose text alternative is `label`."""
    buffer = io.StringIO()
    with figure_style(prefix), warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's font lacks; only the measure of their width is off.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    _strip_namespaces(root)
    for parent in list(root.iter()):
        for child in list(parent):
            # A <style> inside inline SVG would rule the whole page; the page's own style sheet has its content.
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    _rename_ids(root, prefix)
    for element in root.iter():
        _restyle(element)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": label}
    return Markup(re.sub(r">\s+<", "><", ET.tostring(root, encoding="unicode", method="html")))


def marker_svg(shape: str, series: int, hollow: bool, line: bool) -> Markup:
    """A small picture of a marker for legends, in the colour of its series."""
    style = MarkerStyle(shape)
    (polygon,) = map(np.asarray, style.get_path().transformed(style.get_transform()).to_polygons())
    reach = max(np.abs(polygon).max(), 0.5)
    points = " ".join(f"{x / reach * 5:.2f},{-y / reach * 5:.2f}" for x, y in polygon)
    colour = f"var(--series-{series})"
    stroke = f'<path d="M-11 0H11" stroke="{colour}" stroke-width="1.6"></path>' if line else ""
    fill = "var(--card)" if hollow else colour
    return Markup(
        f'<svg class="key" viewBox="-12 -8 24 16" aria-hidden="true">{stroke}'
        f'<polygon points="{points}" fill="{fill}" stroke="{colour}" stroke-width="1.6"></polygon></svg>'
    )


def _strip_namespaces(root: ET.Element) -> None:
    """HTML knows SVG without namespace declarations, so the page names no address at all."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}


def _rename_ids(root: ET.Element, prefix: str) -> None:
    """Keep only the ids that something refers to, and make them unique in the page."""
    referred = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            found = re.fullmatch(r"#(.+)", value) if key == "href" else re.fullmatch(r"url\(#(.+)\)", value)
            if found and key in ("href", "clip-path"):
                referred.add(found[1])
                element.attrib[key] = value.replace("#", f"#{prefix}-")
    for element in root.iter():
        identity = element.attrib.pop("id", None)
        if identity in referred:
            element.attrib["id"] = f"{prefix}-{identity}"


def _restyle(element: ET.Element) -> None:
    style = element.attrib.get("style")
    if style is not None:
        style = re.sub(r"font-family:[^;]*;?\s*", "", style)  # the page's own font
        style = re.sub(r"#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), style)
        element.attrib["style"] = style.strip()
    if element.attrib.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
