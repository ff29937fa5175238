"""HTML pages that open offline, with everything in one file. Jinja2 renders them and escapes every value."""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import jinja2
from markupsafe import Markup
from PIL import Image

from imprompt.utils.files import write_file

_PAGE = """\
<!doctype html>
<meta charset=utf-8>
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100% }
th { text-align: left; font-weight: 500; padding-right: 2rem }
h1, h2 { font-weight: 600 }
.results { border-collapse: collapse; font-size: 14px; line-height: 1.25; font-variant-numeric: tabular-nums }
.results small { color: #777 }
.results td, .results th { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #eee; white-space: nowrap }
.results tr:first-child th:not(:only-of-type) { white-space: normal; vertical-align: bottom }
</style>
<h1>{{ heading or title }}</h1>
{{ body }}
"""


def write_page(path: Path, title: str, body: Markup, heading: str | None = None) -> None:
    """Write a page from an HTML body; the title and the heading (default: the title) are plain text."""
    page = render_html(_PAGE, title=title, heading=heading, body=body)
    write_file(path, page.encode("utf-8", "backslashreplace"))


def render_html(template: str, **values: object) -> Markup:
    """A Jinja2 template with these values: strings are escaped, Markup is inserted as it is. `inline_image` and the tables are
    available in it."""
    return Markup(_environment.from_string(template).render(values))


def inline_image(image: bytes | Image.Image, alt: str = "") -> Markup:
    """An `<img>` that contains an image, or the content of a PNG file; `alt` is its textual description."""
    if isinstance(image, Image.Image):
        buffer = BytesIO()
        image.save(buffer, format="png")
        image = buffer.getvalue()
    return Markup("<img alt='{}' src='data:image/png;base64,{}'>").format(alt, base64.b64encode(image).decode())


def key_value_table(values: Mapping[str, object]) -> Markup:
    """A table with one name and its value per row."""
    return render_html("<table>{% for k, v in values.items() %}<tr><th>{{ k }}<td>{{ v | number }}{% endfor %}</table>", values=values)


def results_table(rows: Sequence[Sequence[str]]) -> Markup:
    """A table whose first row is its header and whose first column holds names. In "value ± margin" the margin goes below the value."""
    template = """\
<table class=results>
<tr>{% for cell in rows[0] %}<th>{{ cell }}{% endfor %}

{% for row in rows[1:] %}
<tr>{% for cell in row %}<t{{ "h" if loop.first else "d" }}>{{ cell | replace(" ± ", "<br><small>± " | safe) }}{% endfor %}

{% endfor %}
</table>"""
    return render_html(template, rows=rows)


def image_table(images: Mapping[str, Image.Image]) -> Markup:
    """A table with one name and its image per row."""
    template = "<table class=results>{% for k, v in images.items() %}<tr><th>{{ k }}<td>{{ inline_image(v, k) }}{% endfor %}</table>"
    return render_html(template, images=images)


def _format_number(value: object) -> str:
    """Numbers with four significant digits, or with thousands separated; other values as text."""
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if is_count else str(value)


_environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
_environment.filters["number"] = _format_number
for _function in (inline_image, key_value_table, results_table, image_table):
    _environment.globals[_function.__name__] = _function
