"""Declared options: each field declares what it accepts; the command line, TOML files and keyword arguments are checked by it.

A command's configuration is a frozen dataclass of small frozen dataclasses (its parts); a function receives the part it
uses. Users see a flat list of options: option names are unique within a command. Standard library only, so that `--help` is instant.
"""

import inspect
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from imprompt.errors import UserError

UNSET = None  # marks an option that was not given; its default depends on other options (`with_defaults` of each command)

Scheduler = Literal["ddim", "pndm", "dpm++", "euler", "euler-a", "heun", "unipc", "lcm"]
ResizeMode = Literal["crop", "pad", "squash", "tile"]
RESIZE_MODES: tuple[str, ...] = get_args(ResizeMode)
DType = Literal["auto", "float32", "bfloat16", "float16"]


def option(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    alias: tuple[str, ...] = (),
    positional: bool = False,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A field with its help text, shorter names and range (greater or equal, greater, less or equal, less).

    With UNSET as default, the annotation is the type after `with_defaults`: `float` where that fills it in, `str | None`
    where it may stay unset.
    """
    limits = {name: value for name, value in (("ge", ge), ("gt", gt), ("le", le), ("lt", lt)) if value is not None}
    metadata = {"help": help, "metavar": metavar, "alias": alias, "positional": positional, "limits": limits}
    return field(default=default, metadata=metadata)


class Option(NamedTuple):
    """One option of a command, as a command line or a signature needs it."""

    name: str
    field: Field[Any]
    type: type  # of one value: int, float, str or bool
    choices: tuple[str, ...]  # of a Literal; empty otherwise
    repeatable: bool
    optional: bool  # may be UNSET
    part: str  # attribute of the part that holds it; empty at the top level
    group: str  # heading in the help


@dataclass(frozen=True)
class Options:
    """Base of every configuration and of its parts: types, choices and ranges are checked on construction."""

    def __post_init__(self) -> None:
        for one in own_options(type(self)):
            _check_value(one, getattr(self, one.name))
        self.check()

    def check(self) -> None:
        """Check constraints between options; subclasses override it. Raises UserError."""

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """From flat option values. Raises UserError for an unknown option, a wrong type or a value out of range."""
        known = {one.name: one for one in all_options(cls)}
        values: dict[str, dict[str, Any]] = {}
        for name, value in options.items():
            if name not in known:
                raise UserError(f"unknown option {name!r}; expected one of {', '.join(known)}")
            values.setdefault(known[name].part, {})[name] = _convert_value(known[name], value)
        hints = get_type_hints(cls)
        parts = {part: hints[part](**inner) for part, inner in values.items() if part}
        return cls(**values.get("", {}), **parts)

    def with_options(self, **options: Any) -> Self:
        """A copy in which these options are replaced."""
        return type(self).from_options(**(self.to_options() | options))

    def to_options(self) -> dict[str, Any]:
        """Every option with its value, flat."""
        return {one.name: getattr(getattr(self, one.part) if one.part else self, one.name) for one in all_options(type(self))}

    def fill_unset(self, defaults: Mapping[str, Any]) -> Self:
        """A copy in which options that were not given have these values; an option that was given is never overridden."""
        values = self.to_options()
        return type(self).from_options(**values | {name: value for name, value in defaults.items() if values[name] is UNSET})


def part(kind: type[Any]) -> Any:
    """A field that holds a part of a configuration."""
    return field(default_factory=kind)


def own_options(kind: type) -> tuple[Option, ...]:
    """The options declared on a dataclass itself, without those of its parts."""
    return tuple(one for one in all_options(kind) if not one.part)


def all_options(kind: type) -> tuple[Option, ...]:
    """The options of a configuration, those of its parts included, in the order of their declaration."""
    if kind not in _option_cache:
        _option_cache[kind] = tuple(_iterate_options(kind))
    return _option_cache[kind]


_option_cache: dict[type, tuple[Option, ...]] = {}  # reading type hints is slow


def _iterate_options(kind: type, part: str = "", group: str = "") -> Iterator[Option]:
    hints = get_type_hints(kind)
    for f in fields(kind):
        hint = hints[f.name]
        if isinstance(hint, type) and issubclass(hint, Options):
            yield from _iterate_options(hint, f.name, (hint.__doc__ or "").splitlines()[0].rstrip("."))
        else:
            yield _make_option(f, hint, part, group)


def _make_option(f: Field[Any], hint: Any, part: str, group: str) -> Option:
    inner = [a for a in get_args(hint) if a is not type(None)] if get_origin(hint) in (Union, UnionType) else [hint]
    one = inner[0]
    repeatable = get_origin(one) is tuple
    if repeatable:
        one = get_args(one)[0]
    choices = get_args(one) if get_origin(one) is Literal else ()
    return Option(f.name, f, str if choices else one, choices, repeatable, f.default is UNSET, part, group)


def _convert_value(one: Option, value: Any) -> Any:
    """Wrap the only value of a repeatable option in a tuple; convert a path or an int where a string is expected."""
    if one.repeatable:
        return (value,) if isinstance(value, (str, Path)) or not isinstance(value, (list, tuple)) else tuple(value)
    if one.type is str and isinstance(value, (int, Path)) and not isinstance(value, bool):
        return str(value)
    return value


def _check_value(one: Option, value: Any) -> None:
    if value is UNSET and one.optional:
        return
    if one.repeatable or one.type not in (int, float, str, bool):
        return
    allowed = (int, float) if one.type is float else one.type
    if isinstance(value, bool) != (one.type is bool) or not isinstance(value, allowed):
        raise UserError(f"{one.name}: expected {one.type.__name__}, received {value!r}")
    if one.choices and value not in one.choices:
        raise UserError(f"{one.name}: expected one of {', '.join(one.choices)}; received {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{one.name}: expected a finite number, received {value}")
    limits = one.field.metadata["limits"]
    if not all(_WITHIN[name](value, bound) for name, bound in limits.items()):
        raise UserError(f"{one.name}: expected {describe_limits(limits)}, received {value}")


_WITHIN = {
    "ge": lambda value, bound: value >= bound,
    "gt": lambda value, bound: value > bound,
    "le": lambda value, bound: value <= bound,
    "lt": lambda value, bound: value < bound,
}
_PHRASES = {"ge": "at least {}", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}


def describe_limits(limits: Mapping[str, float]) -> str:
    """A range in words: 0 … 1, at least 1, more than 0 and less than 1."""
    if set(limits) == {"ge", "le"}:
        return f"{_format_bound(limits['ge'])} … {_format_bound(limits['le'])}"
    return " and ".join(_PHRASES[name].format(_format_bound(bound)) for name, bound in limits.items())


def _format_bound(bound: float) -> str:
    return f"{bound:g}" if abs(bound) < 1e6 else str(bound)


def parse_weighted(text: str) -> tuple[str, float]:
    """PATH:WEIGHT as a pair; the weight is 1 if omitted."""
    match = re.fullmatch(r"(.+):(-?(?:\d+\.?\d*|\.\d+))", text)
    return (match[1], float(match[2])) if match else (text, 1.0)


Config = TypeVar("Config", bound=Options)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The options in a TOML file, flat; tables are only headings. Raises UserError."""
    try:
        values = tomllib.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no configuration at {path}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} is not a readable TOML file: {error}") from error
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def keyword_signature(function: Callable[..., Any], kind: type, *leading: str) -> inspect.Signature:
    """The signature of a function with some leading parameters and the options of a configuration as typed keywords."""
    own = inspect.signature(function)
    kept = [own.parameters[name] for name in leading]
    keywords = [
        inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=one.field.default,
            annotation=Sequence[one.type] if one.repeatable else one.type | None if one.optional else one.type,  # type: ignore[name-defined]
        )
        for one in all_options(kind)
        if one.name not in leading
    ]
    return own.replace(parameters=[*kept, *keywords])


@dataclass(frozen=True)
class PipelineConfig(Options):
    """Base model."""

    model: str = option("mini", "base model: mini, a folder, a single .safetensors file or a hub id")
    model_config: str | None = option(
        UNSET, "for a single file: a folder in diffusers format of a model of the same family (default: from the hub)"
    )
    device: str = option("auto", "auto, cpu, cuda, mps …")

    @property
    def is_mini(self) -> bool:
        """Whether the base model is the embedded mini."""
        return self.model == "mini"
