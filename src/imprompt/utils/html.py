"""HTML pages that open offline: everything inside one file."""

import base64
import html
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from imprompt.utils.files import atomic_path

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "img{max-width:100%}th{text-align:left;font-weight:500;padding-right:2rem}h1,h2{font-weight:600}"
    ".figures{border-collapse:collapse;font-size:14px;line-height:1.25;font-variant-numeric:tabular-nums}.figures small{color:#777}"
    ".figures td,.figures th{padding:.3rem .9rem .3rem 0;border-bottom:1px solid #eee;white-space:nowrap}"
)


def write_page(path: Path, title: str, body: str, heading: str | None = None) -> None:
    """Write a page whose body is HTML; the title and the heading are plain text."""
    with atomic_path(path) as partial:
        partial.write_text(
            f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
            f"<h1>{html.escape(heading or title)}</h1>{body}\n",
            "utf-8",
            "backslashreplace",
        )


def inline(picture: bytes | Image.Image, what: str = "") -> str:
    """A picture, or the content of a PNG file, inside the page; `what` it is, for those who do not see it."""
    if isinstance(picture, Image.Image):
        buffer = BytesIO()
        picture.save(buffer, format="png")
        picture = buffer.getvalue()
    return f"<img alt='{html.escape(what)}' src='data:image/png;base64,{base64.b64encode(picture).decode()}'>"


def table(facts: Mapping[str, Any]) -> str:
    """Names and values, one to a line."""
    return "<table>" + "".join(f"<tr><th>{html.escape(str(name))}<td>{_shown(value)}" for name, value in facts.items()) + "</table>"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else html.escape(str(value))
