"""The skew and its end, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from netslot.bench.report import words
from netslot.errors import HostError, UsageError

FORMATS = (".svg", ".png")

_STYLES = {"root": ("o-", 1.6), "slot": ("s-", 2.6), "none": ("--", 1.2), "nat-": (":", 1.2)}
_SLOT_COLOURS = ("#00695c", "#00897b", "#4db6ac")
_ROOT_COLOURS = ("#b71c1c", "#e53935", "#ef6c00", "#f9a825", "#8e24aa", "#3949ab")


def check_name(file: str) -> None:
    """UsageError for a name that says no picture format that we write."""
    if Path(file).suffix.lower() not in FORMATS:
        raise UsageError(f"{file}: a picture is written as {' or '.join(FORMATS)}")


def draw(result: dict[str, Any], file: str | Path) -> None:
    """Write the picture of a skew result. HostError when matplotlib is not installed."""
    check_name(str(file))
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HostError("matplotlib is not installed", hint="pip install 'netslot[plot]'") from error
    with mpl.rc_context({"font.size": 11, "svg.hashsalt": "netslot"}):
        figure = Figure(figsize=(11, 6.5), layout="constrained")
        axes = figure.add_subplot()
        for place, shape in enumerate(result["shapes"]):
            _draw_shape(axes, shape, place)
        axes.set_yscale("log")
        axes.set_xlabel("the tenant's position among all tenants of the host")
        axes.set_ylabel("TCP connect through the host, µs (p50; log scale)")
        rules = result["rules_per_tenant"]
        axes.set_title(f"{result['slots']:,} tenants, {rules} rules each: in the root namespace and in slots")
        axes.grid(True, which="both", alpha=0.25)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)


def _draw_shape(axes: Any, shape: dict[str, Any], place: int) -> None:
    name = shape["shape"]
    style, width = _STYLES[name[:4]]
    colour = "#757575"
    if name.startswith("slots-"):
        colour = _SLOT_COLOURS[place % len(_SLOT_COLOURS)]
    elif name.startswith("root-"):
        colour = _ROOT_COLOURS[place % len(_ROOT_COLOURS)]
    positions = shape["positions"]
    x = [position["slot"] for position in positions]
    y = [position["p50_us"] for position in positions]
    axes.plot(x, y, style, color=colour, linewidth=width, markersize=5, label=words(name))
