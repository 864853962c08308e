"""The report's colours, light and dark, and the marker shapes: the one place where either is chosen.

Series 0 and 1 are strong and belong to IMSM and plain PEFT; the others, for what they are compared with, are muted.
Every series also has a shape of its own. Knows nothing about figures or pages.
"""

from itertools import pairwise

SERIES = 8
STRONG = 2
LENS_LEVELS = 11
# Shapes that stay apart at small size; seven of them against six muted colours repeat only after 42 methods.
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
    "series-2": "#4f8a76",
    "series-3": "#86739c",
    "series-4": "#8d7a45",
    "series-5": "#a06d84",
    "series-6": "#5b8593",
    "series-7": "#777f87",
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
    "series-2": "#86b3a3",
    "series-3": "#b3a4c8",
    "series-4": "#bfae80",
    "series-5": "#cb9fb2",
    "series-6": "#9cbcc7",
    "series-7": "#9aa3ab",
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
