"""`imprompt data validate`."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from imprompt.cli import chosen_fields
from imprompt.cli.console import progress_bar
from imprompt.config import Validate
from imprompt.errors import UserError
from imprompt.utils.files import writable_folder


def validate(arguments: argparse.Namespace) -> None:
    """Count, look at and compare every record once; write the report. An error where no record can be used."""
    from imprompt.data.report import census

    choice = chosen_fields(arguments, Validate)
    folder = writable_folder(choice.out)
    with progress_bar("reading", show=not arguments.json) as progress:
        found = census(choice.data, choice.least, choice.workers, lambda done, total: progress.advance(done, total))
    page = found.write(folder, Path(choice.data).name)
    if not found.records:
        first = next(iter(found.unreadable.items()), ("", "it is empty"))
        raise UserError(f"no record of {choice.data} can be used ({': '.join(filter(None, first))}); see {page}")
    if arguments.json:
        print(json.dumps(found.report(), ensure_ascii=False))
        return
    table = Table(show_header=False, box=None)
    for name, value in found.figures().items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else Text(str(value)))
    Console().print(table)
    for key, why in list(found.unreadable.items())[:3]:
        print(f"unreadable: {key}: {why}")
    print(page)
