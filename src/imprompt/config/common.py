"""Declared options: each field declares what it accepts; the command line, TOML files and keyword arguments are checked by it.

A command's configuration is a frozen dataclass of small frozen dataclasses (its parts); a function receives the part it
uses. Users see a flat list of options: option names are unique within a command. Standard library only, so that `--help` is instant.
"""

import inspect
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Self, Union, get_args, get_origin, get_type_hints

from imprompt.errors import UserError, notify

UNSET = None  # marks an option that was not given; its default depends on other options (`with_defaults` of each command)

Scheduler = Literal["ddim", "pndm", "dpm++", "euler", "euler-a", "heun", "unipc", "lcm"]
ResizeMode = Literal["crop", "pad", "squash", "tile"]
RESIZE_MODES: tuple[str, ...] = get_args(ResizeMode)
DType = Literal["auto", "float32", "bfloat16", "float16"]

# Upper bounds: beyond them a number is a typing error, and would fill the memory or never end.
MAX_STEPS = 10**8
MAX_DENOISING_STEPS = 10_000
MAX_IMAGES = 10**6
MAX_REFERENCES = 1_000
MAX_BATCH_SIZE = 65_536
MAX_SIDE = 65_535  # pixels, as of JPEG
MAX_WORKERS = 256
MAX_SEED = 2**32 - 1  # of numpy
MAX_SCALE = 100.0  # of an image prompt, a block, a control model or guidance


def option(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    alias: tuple[str, ...] = (),
    positional: bool = False,
    path: bool = False,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A field with its help text, shorter names and range (greater or equal, greater, less or equal, less).

    `path`: the value names a file or folder, and `~` is expanded. With UNSET as default, the annotation is the type after
    `with_defaults`: `float` where that fills it in, `str | None` where it may stay unset.
    """
    limits = {name: value for name, value in (("ge", ge), ("gt", gt), ("le", le), ("lt", lt)) if value is not None}
    metadata = {"help": help, "metavar": metavar, "alias": alias, "positional": positional, "path": path, "limits": limits}
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

    def find_unused(self) -> Iterator[str]:
        """A sentence for each option that was given and has no effect together with the others; subclasses override it."""
        yield from ()

    def report_unused(self) -> None:
        """Report every option that was given and has no effect, those of the parts included."""
        parts = [value for f in fields(self) if isinstance(value := getattr(self, f.name), Options)]
        for one in (*parts, self):
            for sentence in one.find_unused():
                notify(sentence)

    def given(self, *names: str) -> list[str]:
        """Those of these options whose value is not the default."""
        defaults = {one.name: one.field.default for one in all_options(type(self))}
        return [name for name, value in self.to_options().items() if name in names and _differs(value, defaults[name])]

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


def _differs(value: Any, default: Any) -> bool:
    """Whether a value is not the default; images in memory do not compare as one value."""
    return value is not UNSET if default is UNSET else bool(value != default)


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
    """Wrap the only value of a repeatable option in a tuple; convert each value."""
    if not one.repeatable:
        return _convert_one(one, value)
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return tuple(_convert_one(one, each) for each in values)


def _convert_one(one: Option, value: Any) -> Any:
    """A path or an int as text where text is expected, and `~` expanded in a path."""
    if one.type is str and not one.repeatable and isinstance(value, int) and not isinstance(value, bool):
        value = shorten(value)
    if one.type is str and isinstance(value, Path):
        value = str(value)
    return expand_home(value) if one.field.metadata["path"] else value


def expand_home(path: Any) -> Any:
    """A path with `~` replaced by the home folder; anything else is returned as it is."""
    return os.path.expanduser(path) if isinstance(path, (str, Path)) and str(path).startswith("~") else path


def _check_value(one: Option, value: Any) -> None:
    """Raise UserError unless the value, or each of a repeatable option, has the declared type and range."""
    if one.repeatable:
        for each in value:
            _check_one(one, each)
    elif not (value is UNSET and one.optional):
        _check_one(one, value)


def _check_one(one: Option, value: Any) -> None:
    if one.type not in (int, float, str, bool):
        return
    allowed = (int, float) if one.type is float else one.type
    if isinstance(value, bool) != (one.type is bool) or not isinstance(value, allowed):
        raise UserError(f"{one.name}: expected {one.type.__name__}, received {shorten(value)}")
    if isinstance(value, str) and _has_surrogates(value):
        raise UserError(f"{one.name}: expected text in UTF-8, received {shorten(value)}")
    if one.choices and value not in one.choices:
        raise UserError(f"{one.name}: expected one of {', '.join(one.choices)}; received {shorten(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{one.name}: expected a finite number, received {value}")
    limits = one.field.metadata["limits"]
    if broken := {name: bound for name, bound in limits.items() if not _WITHIN[name](value, bound)}:
        expected = describe_limits(broken if is_wide(limits) else limits)
        raise UserError(f"{one.name}: expected {expected}, received {shorten(value)}")


def _has_surrogates(text: str) -> bool:
    """Whether the text has bytes that are not UTF-8, as Python passes them on from a command line."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def shorten(value: object, length: int = 80) -> str:
    """A value as code, cut where it is long: it may have thousands of digits."""
    try:
        text = repr(value)
    except ValueError:  # Python converts no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= length else f"{text[:length]} …"


_WITHIN = {
    "ge": lambda value, bound: value >= bound,
    "gt": lambda value, bound: value > bound,
    "le": lambda value, bound: value <= bound,
    "lt": lambda value, bound: value < bound,
}
_PHRASES = {"ge": "at least {}", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}


def is_wide(limits: Mapping[str, float]) -> bool:
    """Whether the upper end only excludes typing errors, so that it is named where it is exceeded, and nowhere else."""
    return limits.get("le", 0) >= 100


def describe_limits(limits: Mapping[str, float]) -> str:
    """A range in words: 0 … 1, at least 1, more than 0 and less than 1."""
    if set(limits) == {"ge", "le"}:
        return f"{_format_bound(limits['ge'])} … {_format_bound(limits['le'])}"
    return " and ".join(_PHRASES[name].format(_format_bound(bound)) for name, bound in limits.items())


def _format_bound(bound: float) -> str:
    return f"{bound:g}" if abs(bound) < 1e6 else str(bound)


def parse_weighted(text: str) -> tuple[str, float]:
    """PATH:WEIGHT as a pair; the weight is 1 if omitted."""
    match = re.fullmatch(r"(.+):(-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|-?inf|nan)", text)
    return (match[1], float(match[2])) if match else (text, 1.0)


def check_scale(name: str, value: float) -> float:
    """The scale, if it is usable. Raises UserError for one that is not finite or beyond MAX_SCALE."""
    if not abs(value) <= MAX_SCALE:
        raise UserError(f"{name}: expected a scale of {-MAX_SCALE:g} … {MAX_SCALE:g}, received {value:g}")
    return value


NO_OPTIONS = ("version", "batch")  # further keys of a generated image's metadata
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_options(path: str | Path) -> dict[str, Any]:
    """The options in a TOML file, or those that are stored in an image which imprompt generated. Raises UserError."""
    path = Path(expand_home(path))
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"no configuration at {path}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable TOML file: {getattr(error, 'strerror', None) or error}") from error
    return _parse_metadata(path, content) if content.startswith(PNG_SIGNATURE) else _parse_toml(path, content)


def _parse_toml(path: Path, content: bytes) -> dict[str, Any]:
    """Flat: tables are only headings."""
    try:
        values = tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits, and values nested too deeply
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is not a readable TOML file: {reason}") from error
    flat: dict[str, Any] = {}
    for name, value in values.items():
        for option_name, option_value in (value if isinstance(value, dict) else {name: value}).items():
            if option_name in flat:
                raise UserError(f"{path} gives {option_name} twice; expected each option once")
            flat[option_name] = option_value
    return flat


def _parse_metadata(path: Path, content: bytes) -> dict[str, Any]:
    """The options of a generated image: the batch that it was generated in, since batches of another size round differently."""
    try:
        metadata = json.loads(_read_png_text(content)["imprompt"])
        batch = dict(zip(("seed", "num_images"), metadata["batch"], strict=True))
        return {name: value for name, value in metadata.items() if value is not None and name not in NO_OPTIONS} | batch
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} holds no options; expected a TOML file, or an image that imprompt generated with its metadata") from error


def _read_png_text(content: bytes) -> dict[str, str]:
    """The uncompressed text chunks of a PNG file. Raises ValueError for a file that is cut off."""
    texts, position = {}, len(PNG_SIGNATURE)
    while position + 8 <= len(content):
        length, kind = int.from_bytes(content[position : position + 4]), content[position + 4 : position + 8]
        if kind == b"tEXt":
            keyword, _, text = content[position + 8 : position + 8 + length].partition(b"\0")
            texts[keyword.decode("latin-1")] = text.decode("latin-1")
        position += length + 12
    return texts


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

    model: str = option("mini", "base model: mini, a folder, a single .safetensors file or a hub id", path=True)
    model_config: str | None = option(
        UNSET, "for a single file: a folder in diffusers format of a model of the same family (default: from the hub)", path=True
    )
    device: str = option("auto", "auto, cpu, cuda, mps …")

    def find_unused(self) -> Iterator[str]:
        if self.model_config and not self.model.endswith((".safetensors", ".ckpt", ".bin")):
            yield f"model_config: has an effect with a single file only; {self.model} is none"

    @property
    def is_mini(self) -> bool:
        """Whether the base model is the embedded mini."""
        return self.model == "mini"
