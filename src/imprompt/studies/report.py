"""A report, told once and read in two places: README.md with its pictures beside it, index.html with them inside."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from imprompt.evaluation.report import Cells, as_csv, as_html, as_markdown, below, html_strips
from imprompt.evaluation.scoring import Score
from imprompt.studies.claims import Claim
from imprompt.utils.files import atomic_path, writable_folder, write_file
from imprompt.utils.html import inline, table, write_page


class Document:
    """Sections in the order in which they are told. `write` puts them into the folder."""

    def __init__(self, folder: Path, title: str):
        self.folder, self.title = writable_folder(folder), title
        self.words, self.body = [f"# {title}", ""], ""

    def section(self, heading: str) -> None:
        self._told(f"## {heading}", f"<h2>{escape(heading)}</h2>")

    def text(self, words: str) -> None:
        self._told(words, f"<p>{escape(words)}</p>")

    def command(self, words: str) -> None:
        self._told(f"`{words}`", f"<p><code>{escape(words)}</code></p>")

    def claims(self, found: Sequence[Claim]) -> None:
        lines = "\n".join(f"- ({c.letter}) {c.text}: **{c.verdict}**. {c.figures}" for c in found)
        items = "".join(f"<li>({c.letter}) {escape(c.text)}: <b>{c.verdict}</b>. {escape(c.figures)}" for c in found)
        self._told(lines, f"<ul>{items}</ul>")

    def table(self, lines: Cells) -> None:
        self._told(as_markdown(lines).rstrip(), as_html(lines))

    def picture(self, name: str, png: bytes, what: str) -> None:
        """A file of this name, told in words for those who do not see it."""
        write_file(self.folder / name, png)
        self._told(f"![{what}]({name})", inline(png, what))

    def strips(self, strips: Mapping[str, Image.Image]) -> None:
        """Pictures of every row: one sheet in the folder."""
        with atomic_path(self.folder / "sheet.png") as partial:
            below(strips).save(partial)
        self._told("![one row of pictures for each row of the table](sheet.png)", html_strips(strips))

    def facts(self, found: Mapping[str, str]) -> None:
        self._told("\n".join(f"- {field}: {value}" for field, value in found.items()), table(found))

    def write(self, rows: Sequence[Score], results: Mapping[str, Any]) -> Path:
        """README.md, index.html, rows as table.csv and results.json; the page's path."""
        write_file(self.folder / "README.md", "\n".join(self.words))
        write_file(self.folder / "table.csv", as_csv(rows))
        write_file(self.folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False))
        page = self.folder / "index.html"
        write_page(page, self.title, self.body)
        return page

    def _told(self, words: str, body: str) -> None:
        self.words += [words, ""]
        self.body += body
