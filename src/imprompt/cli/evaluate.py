"""`imprompt evaluate`."""

import argparse
import json

from imprompt.cli import chosen_fields
from imprompt.cli.console import progress_bar, quiet_libraries
from imprompt.config import Evaluate, Reproduce


def run(arguments: argparse.Namespace) -> None:
    """Draw, score, and say where the report is."""
    choice = chosen_fields(arguments, Evaluate).settled()
    quiet_libraries()
    with progress_bar("evaluating", show=not arguments.json) as bar:
        from imprompt.evaluation import report
        from imprompt.evaluation import runner as suite
        from imprompt.utils.memory import enough_memory

        with enough_memory("take a smaller --batch"):
            for at in suite.draw(choice):
                bar.advance(at.done, at.total, f"{at.row} · {at.pictures_per_second:.1f} pictures/s")
        bar.rename("scoring")
        studio, found = suite.Studio(choice), []
        rows = suite.rows_of(choice, studio.cases)
        for row in rows:
            found.append(report.score_row(studio, row, studio.out))
            bar.advance(len(found), len(rows), row.name)
        page = report.write(choice, found, suite.protocol(choice, studio))
    if arguments.json:
        print(json.dumps({"page": str(page), "rows": [report.as_dict(score) for score in found]}, ensure_ascii=False))
        return
    print(report.markdown([score for score in found if not score.curve]))
    for row in rows:
        lost = report.Seen(studio.out, row.name, studio.chunks(row)).lost
        for name, why in list(lost.items())[:5]:
            print(f"left out of {row.name}: prompt {name}: {why}")
        if lost and row.name == "copy":
            print(f"once they are mended, delete {studio.out} or choose another --out")
    print(page)


def reproduce(arguments: argparse.Namespace) -> None:
    """Do what is missing, and print the claims with their verdicts."""
    choice = chosen_fields(arguments, Reproduce)
    quiet_libraries()
    with progress_bar("reproducing", show=not arguments.json) as bar:
        from imprompt.studies.base import report_of
        from imprompt.studies.base import run as work

        done, total = 0, 1
        for at in work(choice):
            if not at.row:
                done, total = at.done, at.total
                if at.stage != "rows":
                    bar.say(f"{at.stage} done ({done} of {total})")
            bar.advance(done, total, f"{at.row}: {at.stage} {at.done}/{at.total}" if at.row else "")
        page, claims = report_of(choice)
    if arguments.json:
        print(
            json.dumps(
                {"page": str(page), "claims": [claim._asdict() | {"verdict": claim.verdict} for claim in claims]}, ensure_ascii=False
            )
        )
        return
    print((page.parent / "README.md").read_text("utf-8"))
    print(page)
