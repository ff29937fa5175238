"""Plots are PNG files, whatever the panels contain."""

import io

import pytest
from PIL import Image

from imprompt.utils.plots import plot_panels
from imprompt.utils.statistics import Interval


@pytest.mark.parametrize(
    "panels",
    [
        {"loss": {"loss": [(1, 0.5), (2, 0.4)], "val/loss": []}, "similarity": {}},
        {"CLIP-I": {"base": [(0.0, Interval(0.5, 0.4, 0.6)), (1.0, Interval(0.7, 0.6, 0.8))]}, "CLIP-T": {"base": []}},
        {"nothing yet": {}},
    ],
)
@pytest.mark.parametrize("xticks", [(), (1, 2)])
def test_panels_become_a_png(panels, xticks):
    image = Image.open(io.BytesIO(plot_panels(panels, "step", xticks)))
    assert image.format == "PNG" and image.width > 500 * len(panels)
