"""The command line: every verb reads `--config FILE.toml` plus any field as a flag. Imports no torch until a verb runs."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from imprompt import __version__, config
from imprompt.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb. 0 when it did its work, 2 with one sentence for what the user can mend, 130 when interrupted."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if not hasattr(chosen, "run"):
        (chosen.parser if hasattr(chosen, "parser") else parser).print_help()
        return 0
    try:
        chosen.run(chosen)
    except UserError as error:
        print(f"imprompt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("imprompt: interrupted", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    """Says in one sentence what it did not understand."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"imprompt: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="imprompt", description="Image prompts for text-to-image diffusion models.")
    parser.add_argument("--version", action="version", version=f"imprompt {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    generate = _verb(verbs, "generate", "draw pictures after reference pictures", "generate:run")
    _fields(generate, config.Generate)
    generate.add_argument("--json", action="store_true", help="print the result for a program")

    personalise = _verb(verbs, "personalise", "draw a person or a thing again, after several photographs", "personalise:run")
    _fields(personalise, config.Personalise)
    personalise.add_argument("--json", action="store_true", help="print the result for a program")

    train = _verb(verbs, "train", "train an adapter on your own pictures", "train:run")
    _fields(train, config.Train)
    train.add_argument("--json", action="store_true", help="print the result for a program")

    encode = _verb(verbs, "encode", "encode data into a feature cache, to train from", "train:encode")
    _fields(encode, config.Encode)
    encode.add_argument("--json", action="store_true", help="print the result for a program")

    data = verbs.add_parser("data", help="look at training data")
    data.set_defaults(parser=data)
    validate = _verb(
        data.add_subparsers(title="verbs", metavar="VERB"),
        "validate",
        "report what is in the data, and what is wrong with it",
        "data:validate",
    )
    _fields(validate, config.Validate)
    validate.add_argument("--json", action="store_true", help="print the whole report for a program")

    evaluate = _verb(verbs, "evaluate", "measure an adapter against copies, real pictures, text and other methods", "evaluate:run")
    _fields(evaluate, config.Evaluate)
    evaluate.add_argument("--json", action="store_true", help="print the result for a program")

    reproduce = _verb(verbs, "reproduce", "regenerate a paper's comparison and judge its claims", "evaluate:reproduce")
    _fields(reproduce, config.Reproduce)
    reproduce.add_argument("--json", action="store_true", help="print the result for a program")

    inspect = _verb(verbs, "inspect", "tell what an adapter file is", "files:inspect")
    inspect.add_argument("file")
    inspect.add_argument("--json", action="store_true", help="print the result for a program")

    convert = _verb(verbs, "convert", "rewrite an adapter file or training state as a public file", "files:convert")
    convert.add_argument("source")
    convert.add_argument("target", help="a name ending in .safetensors, or .bin for old readers")
    convert.add_argument("--plain", action="store_true", help="only what every reader knows: without a trained way of several references")

    mini = verbs.add_parser("mini", help="the embedded world: rebuild it, look at it")
    mini.set_defaults(parser=mini)
    parts = mini.add_subparsers(title="verbs", metavar="VERB")
    make = _verb(parts, "make", "train every part of mini from nothing (resumable)", "mini:make")
    make.add_argument("--out", default="runs/mini", help="work folder; a run found there is continued")
    make.add_argument("--budget", type=float, default=1.0, help="share of the full number of steps (0.001 for a trial)")
    make.add_argument("--only", action="append", default=[], metavar="PART", help="just this part; repeat it for several")
    make.add_argument("--install", action="store_true", help="make the result the embedded model")
    style = _verb(parts, "style", "fine-tune a custom model from mini, in another drawing style (resumable)", "mini:style")
    style.add_argument("style", help="ink or mosaic")
    style.add_argument("--out", help="folder; a run found there is continued (default: runs/mini-STYLE)")
    style.add_argument("--budget", type=float, default=1.0, help="share of the full number of steps (0.01 for a trial)")
    show = _verb(parts, "show", "draw a sheet of the world and of what mini draws", "mini:show")
    show.add_argument("--out", default="mini.png")
    show.add_argument("--seed", type=int, default=0)
    judge = _verb(parts, "judge", "measure mini against its bars", "mini:judge")
    judge.add_argument("--prompts", type=int, default=1000)
    judge.add_argument("--steps", type=int, default=50)
    judge.add_argument("--guidance", type=float, default=None)
    judge.add_argument("--task", action="append", default=[], metavar="TASK", help="just this task; repeat it for several")
    judge.add_argument("--scale", type=float, action="append", default=[], metavar="λ", help="of image-text; repeat it for several")
    judge.add_argument("--scheduler", choices=config.SCHEDULERS, default="ddim")
    judge.add_argument("--out", help="folder for sheets and curves of what is judged")
    judge.add_argument("--json", action="store_true", help="print the result for a program")
    return parser


def _verb(verbs: Any, name: str, text: str, door: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=_later(door))
    return parser


def _later(door: str) -> Callable[[argparse.Namespace], None]:
    """Import the verb's module only when it runs."""
    module, function = door.split(":")
    return lambda chosen: getattr(import_module(f"imprompt.cli.{module}"), function)(chosen)


def _fields(parser: argparse.ArgumentParser, kind: type) -> None:
    """One flag for each field; those not given stay out, so that a configuration file can speak."""
    parser.add_argument("--config", metavar="FILE.toml", help="read fields from a file; flags go before it")
    for f, one, many in config.options(kind):
        default = "" if f.default in (None, (), "", "auto", 0, -1) or "default" in f.metadata["help"] else f" (default: {f.default})"
        text = (f.metadata["help"] + default).replace("%", "%%")
        if f.metadata.get("place"):
            parser.add_argument(f.name, nargs="?", default=argparse.SUPPRESS, metavar=f.name.upper(), help=text)
            continue
        if one is bool:
            flag = "--" + f.name.replace("_", "-")
            parser.add_argument(flag, dest=f.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            continue
        parser.add_argument(
            "--" + f.name.replace("_", "-"),
            dest=f.name,
            type=one,
            action="append" if many else "store",
            default=argparse.SUPPRESS,
            metavar=f.metadata.get("metavar", f.name.upper()),
            help=text,
        )


def chosen_fields(chosen: argparse.Namespace, kind: type[config.Config]) -> config.Config:
    """The verb's dataclass from the configuration file and the flags given."""
    names = {f.name for f, _, _ in config.options(kind)}
    flags = {name: value for name, value in vars(chosen).items() if name in names}
    return config.build(kind, (config.read_toml(chosen.config) if chosen.config else {}) | flags)
