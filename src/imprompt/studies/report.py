"""Builder of a study's report: README.md with image files next to it, and index.html with the same content in one file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from imprompt.config import ReproduceConfig
from imprompt.evaluation.report import TableCells, metric_legend, score_cells, scores_to_csv, stack_strips, table_to_markdown
from imprompt.evaluation.scoring import RowScore
from imprompt.studies.base import RowId, result_path
from imprompt.studies.claims import Claim, Rows, merge_protocols
from imprompt.utils.files import atomic_path, ensure_writable_folder, write_file
from imprompt.utils.html import image_table, inline_image, key_value_table, render_html, results_table, write_page


class ReportBuilder:
    """Sections in the order in which they are added; `write` saves them to OUT/report."""

    def __init__(self, config: ReproduceConfig, title: str):
        self.folder, self.title = ensure_writable_folder(Path(config.output_dir) / "report"), title
        self.markdown, self.html = [f"# {title}", ""], Markup()
        command = f"imprompt reproduce {config.paper} --budget {config.budget}"
        self._append(f"`{command}`", render_html("<p><code>{{ command }}</code></p>", command=command))

    def add_section(self, heading: str) -> None:
        """A heading."""
        self._append(f"## {heading}", render_html("<h2>{{ heading }}</h2>", heading=heading))

    def add_paragraph(self, text: str) -> None:
        """Plain text."""
        self._append(text, render_html("<p>{{ text }}</p>", text=text))

    def add_table(self, lines: TableCells) -> None:
        """A table, whose first line is its head."""
        self._append(table_to_markdown(lines).rstrip(), results_table(lines))

    def add_claims(self, claims: Sequence[Claim], notes: str) -> None:
        """The section of the claims with their verdicts."""
        self.add_section("Claims")
        lines = "\n".join(f"- ({c.letter}) {c.text}: **{c.verdict}**. {c.evidence}" for c in claims)
        items = "<ul>{% for c in claims %}<li>({{ c.letter }}) {{ c.text }}: <b>{{ c.verdict }}</b>. {{ c.evidence }}{% endfor %}</ul>"
        self._append(lines, render_html(items, claims=claims))
        self.add_paragraph(notes)

    def add_scores(self, scores: Sequence[RowScore], *, by_subject: bool) -> None:
        """The section of all metrics, with what they mean."""
        self.add_section("All metrics")
        self.add_table(score_cells(scores))
        self.add_paragraph(metric_legend(scores, by_subject=by_subject))

    def add_images(self, strips: Mapping[str, Image.Image]) -> None:
        """The section of images: one strip for each row, all in one file of the folder."""
        self.add_section("Images")
        with atomic_path(self.folder / "sheet.png") as partial:
            stack_strips(strips).save(partial)
        self._append("![one strip of images for each row of the table](sheet.png)", image_table(strips))

    def add_plot(self, heading: str, file_name: str, png: bytes, alt: str, notes: str) -> None:
        """The section of a plot."""
        self.add_section(heading)
        write_file(self.folder / file_name, png)
        self._append(f"![{alt}]({file_name})", inline_image(png, alt))
        self.add_paragraph(notes)

    def add_protocol(self, rows: Rows) -> None:
        """The section of everything that the rows have in common."""
        self.add_section("Protocol")
        fields = merge_protocols(rows)
        self._append("\n".join(f"- {field}: {value}" for field, value in fields.items()), key_value_table(fields))

    def write(self, scores: Sequence[RowScore], results: Mapping[str, Any]) -> Path:
        """Save README.md, index.html, the scores as table.csv, and results.json. Returns the path of the page."""
        write_file(self.folder / "README.md", "\n".join(self.markdown))
        write_file(self.folder / "table.csv", scores_to_csv(scores))
        write_file(self.folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False))
        page = self.folder / "index.html"
        write_page(page, self.title, self.html)
        return page

    def _append(self, markdown: str, html: Markup) -> None:
        self.markdown += [markdown, ""]
        self.html += html


def load_strips(out: Path, row_ids: Mapping[str, RowId]) -> dict[str, Image.Image]:
    """The saved images of finished rows: label → strip."""
    return {label: Image.open(result_path(out, row_id).with_suffix(".png")).convert("RGB") for label, row_id in row_ids.items()}
