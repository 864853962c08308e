"""The report's colours, light and dark, and the marker shapes: the one place where either is chosen.

Series colours keep their order under the common kinds of colour blindness, and every series also has a shape
of its own. Knows nothing about figures or pages.
"""

from itertools import pairwise

SERIES = 8
LENS_LEVELS = 11
# Shapes that stay apart at small size; seven of them against eight colours repeat only after 56 methods.
MARKERS = ("o", "s", "D", "^", "v", "P", "X")

LIGHT = {
    "paper": "#fbfaf7",
    "card": "#ffffff",
    "ink": "#1c2126",
    "muted": "#5d666f",
    "rule": "#dedbd3",
    "grid": "#ebe8e1",
    "accent": "#0a6aa8",
    "series-0": "#c8500a",
    "series-1": "#0a6aa8",
    "series-2": "#0b8a64",
    "series-3": "#8350b5",
    "series-4": "#9a6b00",
    "series-5": "#c0407f",
    "series-6": "#3b8fa8",
    "series-7": "#68727c",
}
DARK = {
    "paper": "#14171a",
    "card": "#1b1f23",
    "ink": "#e9e6df",
    "muted": "#a3abb3",
    "rule": "#343a40",
    "grid": "#2a2f34",
    "accent": "#6cb8ee",
    "series-0": "#ff9152",
    "series-1": "#5fb2ee",
    "series-2": "#45cf9f",
    "series-3": "#bd9af3",
    "series-4": "#e2b44a",
    "series-5": "#f08bbd",
    "series-6": "#7fd3e8",
    "series-7": "#aab3bb",
}
# From all new memory, over an even mix, to all original memory.
_LENS_LIGHT = ("#ffc999", "#f1eee8", "#a9d3f5")
_LENS_DARK = ("#73390c", "#2c3136", "#0c4a75")


def _mix(low: str, high: str, share: float) -> str:
    channels = zip(bytes.fromhex(low[1:]), bytes.fromhex(high[1:]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in channels)


def _lens(stops: tuple[str, ...]) -> dict[str, str]:
    scale = []
    for level in range(LENS_LEVELS):
        place = level / (LENS_LEVELS - 1) * (len(stops) - 1)
        segment = min(int(place), len(stops) - 2)
        low, high = list(pairwise(stops))[segment]
        scale.append(_mix(low, high, place - segment))
    return {f"lens-{level}": colour for level, colour in enumerate(scale)}


LIGHT |= _lens(_LENS_LIGHT)
DARK |= _lens(_LENS_DARK)

# Colours no figure would use by chance; the SVG writer turns them into CSS variables.
SENTINEL = {name: f"#fe01{index:02x}" for index, name in enumerate(LIGHT)}


def css_variables(colours: dict[str, str]) -> str:
    """The colours as CSS custom properties, in one line."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())
