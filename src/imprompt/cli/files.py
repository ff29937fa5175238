"""`imprompt inspect` and `imprompt convert`."""

import argparse
import json

from rich.console import Console
from rich.table import Table
from rich.text import Text


def inspect(arguments: argparse.Namespace) -> None:
    """Tell kind, tokens, layers, base family, encoder and parameters of an adapter file."""
    from imprompt.models.checkpoints import read, recognise

    spec = recognise(*read(arguments.file))
    facts = {
        "kind": spec.kind,
        "tokens": spec.tokens or "one per patch",
        "layers": len(spec.layers),
        "base": spec.base,
        "encoder": spec.encoder,
        "cross_width": spec.cross,
        "parameters": spec.parameters,
        "dtype": spec.dtype,
    }
    facts |= {key: value for key, value in spec.metadata.items() if key not in facts}
    if arguments.json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if name == "parameters" else Text(str(value)))
    Console().print(table)


def convert(arguments: argparse.Namespace) -> None:
    """Rewrite an adapter file."""
    from imprompt.models import checkpoints

    spec = checkpoints.convert(arguments.source, arguments.target, arguments.plain)
    print(f"{arguments.target}: {spec.kind} adapter for {spec.base}, {spec.parameters:,} parameters")
