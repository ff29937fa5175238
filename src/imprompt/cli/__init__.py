"""The command line, built with cyclopts from the configuration dataclasses. Imports no torch until a command runs."""

import inspect
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.exceptions import UnknownCommandError, UnknownOptionError, UnusedCliTokensError

from imprompt import __version__, config
from imprompt.cli.console import output_errors_explained, prepare_streams, print_notices
from imprompt.config.common import UNSET, Option, Options, all_options, describe_limits, is_wide, shorten
from imprompt.errors import UserError, redact_secrets
from imprompt.utils.processes import check_memory_limit
from imprompt.utils.signals import report_interrupt
from imprompt.utils.text import escape

GROUPS = {"data": "Look at training data.", "mini": "The embedded synthetic model: rebuild it, look at it, evaluate it."}

# The words of a command → its options, and the function in a module of this package that runs it.
COMMANDS: dict[tuple[str, ...], tuple[type[Options], str]] = {
    ("generate",): (config.GenerateConfig, "generate:run_generate"),
    ("personalize",): (config.PersonalizeConfig, "personalize:run_personalize"),
    ("train",): (config.TrainConfig, "train:run_train"),
    ("encode",): (config.EncodeConfig, "train:run_encode"),
    ("evaluate",): (config.EvaluateConfig, "evaluate:run_evaluate"),
    ("reproduce",): (config.ReproduceConfig, "evaluate:run_reproduce"),
    ("inspect",): (config.InspectConfig, "files:run_inspect"),
    ("convert",): (config.ConvertConfig, "files:run_convert"),
    ("data", "validate"): (config.ValidateDataConfig, "data:run_validate_data"),
    ("mini", "build"): (config.MiniBuildConfig, "mini:run_build"),
    ("mini", "style"): (config.MiniStyleConfig, "mini:run_style"),
    ("mini", "preview"): (config.MiniPreviewConfig, "mini:run_preview"),
    ("mini", "evaluate"): (config.MiniEvaluateConfig, "mini:run_evaluate_mini"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. 0 when it did its work, 2 with one sentence for what the user can correct, 128 + signal when interrupted."""
    prepare_streams()
    try:
        with print_notices(), output_errors_explained():
            build_app()(
                sys.argv[1:] if arguments is None else list(arguments),
                exit_on_error=False, print_error=False, help_on_error=False, result_action="return_none",
            )  # fmt: skip
    except CycloptsError as error:
        print(f"imprompt: {escape(_describe(error))}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"imprompt: {escape(redact_secrets(str(error)))}", file=sys.stderr)
        return 2
    except MemoryError:
        print("imprompt: out of memory; close other programs, or take smaller images or batches", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return report_interrupt(error)
    return 0


def build_app() -> App:
    """Every command with its options."""
    app = App(
        name="imprompt", help="Image prompts for text-to-image diffusion models.", version=__version__, help_format="plaintext",
        suppress_keyboard_interrupt=False, default_parameter=Parameter(negative_iterable=(), negative_none=()),
    )  # fmt: skip
    groups = {name: App(name=name, help=text) for name, text in GROUPS.items()}
    for (*group, name), (kind, entry_point) in COMMANDS.items():
        _add_command(groups[group[0]] if group else app, name, kind, entry_point)
    for group_app in groups.values():
        app.command(group_app)
    return app


def _add_command(app: App, name: str, kind: type[Options], entry_point: str) -> None:
    """A command whose flags are the options of a configuration, and that reads a TOML file of them with --config."""
    options = {one.name: one for one in all_options(kind)}
    positional = [one.name for one in options.values() if one.field.metadata["positional"]]

    def run(*arguments: str | None, **flags: Any) -> None:
        given = dict(zip(positional, arguments, strict=False)) | flags
        file, json = given.pop("config", None), given.pop("json", False)
        values = {name: _parse(options[name], value) for name, value in given.items() if value is not UNSET}
        settings = kind.from_options(**(config.read_options(file) if file else {}) | values)
        settings.report_unused()
        check_memory_limit()
        _entry_point(entry_point)(settings, json=bool(json))

    groups = {one.group: Group(one.group, sort_key=number) for number, one in enumerate(options.values()) if one.group}
    run.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
        *sorted((_parameter(one, groups) for one in options.values()), key=lambda parameter: parameter.kind),
        _flag("config", str, Parameter(help="read options from a TOML file or a generated image; flags override it", metavar="FILE")),
        _flag("json", bool, Parameter(help="print the result as JSON", negative=())),
    ])  # fmt: skip
    app.command(run, name=name, help=kind.__doc__)


def _parameter(one: Option, groups: dict[str, Group]) -> inspect.Parameter:
    described = Parameter(
        help=describe_option(one),
        alias=one.field.metadata["alias"],
        group=(groups[one.group],) if one.group else None,
        metavar=one.field.metadata["metavar"] or one.type.__name__.upper(),
        show_default=False,
        consume_multiple=False,
        allow_repeating=None if one.repeatable else True,  # the last one counts
        allow_leading_hyphen=one.type in (int, float),
    )
    kind: Any = list[str] if one.repeatable else bool if one.type is bool else str  # numbers are parsed here, strictly
    if one.field.metadata["positional"]:
        return inspect.Parameter(
            one.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=UNSET, annotation=Annotated[kind | None, described]
        )
    return _flag(one.name, kind, described)


def _parse(one: Option, value: Any) -> Any:
    """Numbers from the command line's text. Raises UserError."""
    if one.type not in (int, float):
        return value
    try:
        return tuple(map(one.type, value)) if one.repeatable else one.type(value)
    except ValueError as error:
        raise UserError(f"{one.name}: expected {one.type.__name__}, received {shorten(value)}") from error


def _flag(name: str, kind: Any, described: Parameter) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=UNSET, annotation=Annotated[kind | None, described])


def describe_option(one: Option) -> str:
    """An option's help, with its range and its default."""
    limits = one.field.metadata["limits"]
    if is_wide(limits):
        limits = {name: bound for name, bound in limits.items() if name != "le" and bound >= 0}
    facts = [f"one of {', '.join(filter(None, one.choices))}"] if one.choices else [describe_limits(limits)] if limits else []
    default = one.field.default
    if "default" not in one.field.metadata["help"] and default not in (UNSET, (), "", "auto"):
        facts.append(f"default: {default}")
    return one.field.metadata["help"] + (f" [{'; '.join(facts)}]" if facts else "")


def _entry_point(name: str) -> Callable[..., None]:
    """A function of this package, imported only when its command runs."""
    module, function = name.split(":")
    loaded: Callable[..., None] = getattr(import_module(f"imprompt.cli.{module}"), function)
    return loaded


def _describe(error: CycloptsError) -> str:
    """A parsing error in one sentence."""
    command = " ".join(("imprompt", *(error.command_chain or ())))
    if isinstance(error, UnknownOptionError) and error.token:
        text = f"unknown option {error.token.keyword or error.token.value}"
    elif isinstance(error, UnusedCliTokensError):
        text = f"unexpected argument {' '.join(error.unused_tokens or ())}"
    elif isinstance(error, UnknownCommandError):
        text = f"unknown command {(error.unused_tokens or [''])[0]!r}"
    else:
        text = " ".join(str(error).split()).rstrip(".")
    return f"{text}; see {command} --help"
