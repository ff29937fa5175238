"""`imprompt data validate`."""

from pathlib import PurePosixPath

from rich.console import Console
from rich.table import Table
from rich.text import Text

from imprompt.cli.console import print_json, progress_bar
from imprompt.config import ValidateDataConfig
from imprompt.errors import UserError, redact_secrets
from imprompt.utils.files import ensure_writable_folder
from imprompt.utils.text import escape


def run_validate_data(config: ValidateDataConfig, *, json: bool) -> None:
    """Read every record once, count, look for duplicates, and write the report. An error where no record can be used."""
    from imprompt.data.report import analyze_dataset

    folder = ensure_writable_folder(config.output_dir)
    with progress_bar("reading") as progress:
        report = analyze_dataset(config.data, config.min_image_size, config.dataloader_num_workers, progress.advance)
    page = report.write(folder, PurePosixPath(redact_secrets(config.data)).name)
    if not report.records:
        key, reason = next(iter(report.unreadable.items()), ("", "it is empty"))
        raise UserError(f"no record of {config.data} can be used ({': '.join(filter(None, (key, reason)))}); see {page}")
    if json:
        print_json(**report.to_dict())
        return
    table = Table(show_header=False, box=None)
    for name, value in report.summary().items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else Text(str(value)))
    Console().print(table)
    for key, reason in list(report.unreadable.items())[:3]:
        print(f"unreadable: {escape(key)}: {escape(reason)}")
    print(page)
