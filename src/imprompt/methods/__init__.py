"""The systems that are trained and compared: one small file each."""

from collections.abc import Callable
from functools import partial
from typing import Any

from imprompt.encoders import ImageEncoder
from imprompt.methods.base import Method
from imprompt.methods.ip_adapter import IPAdapter
from imprompt.methods.simple import Simple

Maker = Callable[[Any, ImageEncoder], Method]

# What `--method` may say, and how each is made, untrained, for a UNet and an image encoder.
METHODS: dict[str, Maker] = {
    "ip-adapter": IPAdapter.create,
    "ip-adapter-plus": partial(IPAdapter.create, grid=True),
    "simple": Simple.create,
    "simple-plus": partial(Simple.create, grid=True),
}
