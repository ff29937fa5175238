"""Line plots as PNG files, with confidence intervals where there are any."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from imprompt.utils.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[float, Interval | float]]  # points of x and y
_MAX_MARKED_POINTS = 40  # of a curve without intervals; beyond, markers would merge


def plot_panels(panels: Mapping[str, Mapping[str, Curve]], xlabel: str, xticks: Sequence[float] = ()) -> bytes:
    """Panels next to each other, as a PNG. panels: title → curve's name → points. Panels with the same curves share one legend."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    shared_legend = len({tuple(curves) for curves in panels.values()}) == 1
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        x_max = max((x for curve in curves.values() for x, _ in curve), default=0.0)
        for index, (name, curve) in enumerate(curves.items()):
            _plot_curve(axis, name, curve, offset=(index - (len(curves) - 1) / 2) * 0.008 * x_max)
        axis.set(title=title, xlabel=xlabel)
        if xticks:
            axis.set_xticks(xticks, [f"{tick:g}" for tick in xticks])
        axis.grid(alpha=0.25)
        if curves and not shared_legend:
            axis.legend(frameon=False, fontsize="small")
    if shared_legend:
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def _plot_curve(axis: "Axes", name: str, curve: Curve, offset: float) -> None:
    """One curve; with intervals it is shifted by `offset` along x, so that no interval hides another."""
    values = [y if isinstance(y, Interval) else Interval(y, y, y) for _, y in curve]
    if all(isinstance(y, Interval) for _, y in curve):
        x = [x + offset for x, _ in curve]
        errors = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
        axis.errorbar(x, [v.value for v in values], errors, marker="o", markersize=3, linewidth=1.2, elinewidth=0.7, label=name)
    else:
        marker = "o" if len(curve) < _MAX_MARKED_POINTS else None
        axis.plot([x for x, _ in curve], [v.value for v in values], marker=marker, markersize=3, linewidth=1.2, label=name)
