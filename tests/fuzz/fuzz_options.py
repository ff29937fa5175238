"""Every flag of every command with hostile values, and mutated TOML files, through the parser: python tests/fuzz/fuzz_options.py

A command is parsed and its configuration built and checked, as the command line does, but not run. Anything but a configuration or one
printable sentence is a finding, as is a value of a number that is accepted beyond its range, and a round that takes too long.
"""

import argparse
import io
import math
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from imprompt import cli
from imprompt.config.common import Option, Options, all_options

MAX_SECONDS = 5.0  # of one round
WORDS = (
    "", " ", "0", "-1", "1", "2.5", "1e308", "-1e308", "1e-320", "nan", "inf", "-inf", "0x10", "1_000", "٣", "²", "9" * 401, "9" * 5_000,
    str(2**31), str(2**32), str(2**63), str(2**64), str(10**12), "true", "False", "none", "mini", "a" * 5_000,
    "猫", "\udcff\udcfe", "a\x00b", "a\nb",
    "\x1b[2J", "[bold]", "[/x]", "{}", "{0}", "%s", "~", "~/x", "~stranger/x", "-", "--", "-x", "--steps", "=", ",", ":", "a=b", "a=", "=b",
    "a=b:c", "a=b:1e309", "a=b:nan", "a=b:-inf", "image=", "image=a,scale=nan", "image=a,scale=1e999", "image=a,start_at=2",
    "image=a,image=b,x=1",
    "up_blocks=nan", "up_blocks=1e400", "up_blocks=", "=1", "style,layout,style", "1,nan", "1,-1", ",,", "1x1", "0x0",
    "1x1x1", "9" * 30 + "x1", "x", "/",
    "/dev/null", "pipe:true", "hf://a/b", "http://[", "..", "*", "?", "[", "**/*", "dreambooth", "inversion", "style", "ink",
)  # fmt: skip
TOML_VALUES = (
    "1", "-1", "1.5", "1e400", "nan", "inf", "true", '""', '"a"', '"\\u001b[2J"', "[]", "[1]", '["a"]', "[[]]", "[true]", "{}", "{a = 1}",
    "1979-05-27", "07:32:00", "9" * 401, "9" * 5_000, "0x" + "f" * 40, "[" * 500 + "]" * 500, "'''x", '"""', "[{a = [1]}]",
    "1e-400", '"\\ud800"',
)  # fmt: skip


def fuzz(minutes: float, seed: int = 0) -> tuple[Counter[str], dict[str, str]]:
    """Outcomes by kind, and the findings: a sentence or traceback by what it is about."""
    rng, outcomes, findings = random.Random(seed), Counter[str](), dict[str, str]()
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder, parsed_only():
        while time.monotonic() < end:
            words, (kind, _) = rng.choice(list(cli.COMMANDS.items()))
            make = rng.choice((hostile_flags, hostile_flags, hostile_toml))
            arguments = [*words, *make(kind, rng, Path(folder))]
            start = time.monotonic()
            outcome, finding = run(arguments)
            outcomes[outcome] += 1
            if time.monotonic() - start > MAX_SECONDS:
                finding = f"took {time.monotonic() - start:.1f} s"
            if finding:
                findings.setdefault(finding.splitlines()[-1][:200], f"{arguments!r}\n{finding}")
    return outcomes, findings


class parsed_only:
    """Within the context commands build and check their configurations, and do nothing with them."""

    def __enter__(self) -> None:
        self._original = cli._entry_point
        cli._entry_point = lambda name: check_numbers

    def __exit__(self, *_: object) -> None:
        cli._entry_point = self._original


def check_numbers(config: Options, *, json: bool) -> None:
    """No number is accepted that is not finite, or absurdly large; what a command derives from its options can be derived."""
    values = config.to_options()
    for name in (one.name for one in all_options(type(config)) if one.type in (int, float)):
        for number in values[name] if isinstance(values[name], tuple) else (values[name],):
            if number is not None and not (math.isfinite(number) and abs(number) < 2**63):
                raise AssertionError(f"{name} is {number}")
    for derive in ("with_defaults", "parse_image_prompts", "format_prompts"):
        if hasattr(config, derive):
            getattr(config, derive)()


def run(arguments: list[str]) -> tuple[str, str]:
    """The outcome, accepted or refused, and the finding: empty, or what is wrong."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.main(arguments)
    except SystemExit as stop:
        return "exit", "" if stop.code in (0, None) else f"exit status {stop.code}"
    except BaseException:
        return "traceback", traceback.format_exc()
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("imprompt: note: ")]
    if code == 0:
        return "accepted", ""
    is_sentence = code == 2 and len(lines) == 1 and lines[0].startswith("imprompt: ") and lines[0].isprintable() and len(lines[0]) < 6_000
    return "refused", "" if is_sentence else f"exit status {code} with {err.getvalue()[:300]!r}"


def hostile_flags(kind: type[Options], rng: random.Random, folder: Path) -> list[str]:
    """One to three flags with hostile values, in one of the forms that a shell passes on."""
    flags = []
    for one in rng.choices(all_options(kind), k=rng.randint(1, 3)):
        flag, value = "--" + one.name.replace("_", "-"), hostile_word(one, rng)
        flags += rng.choice(([f"{flag}={value}"], [flag, value], [value], [flag]))
    return flags


def hostile_word(one: Option, rng: random.Random) -> str:
    """A word of the list, a valid one of the option, or a mutation of it."""
    valid = [*one.choices, str(one.field.default), *map(str, one.field.metadata["limits"].values())]
    word = rng.choice((rng.choice(WORDS), rng.choice(WORDS), rng.choice(valid)))
    if rng.random() < 0.3:
        place = rng.randint(0, len(word))
        word = word[:place] + rng.choice(WORDS)[:100] + word[place:]
    return word


def hostile_toml(kind: type[Options], rng: random.Random, folder: Path) -> list[str]:
    """A configuration file with hostile values, possibly with bytes changed."""
    lines = [f"{one.name} = {rng.choice(TOML_VALUES)}" for one in rng.choices(all_options(kind), k=rng.randint(1, 3))]
    if rng.random() < 0.2:
        lines.insert(0, rng.choice(("[a]", "[a.b]", "[[a]]", "\ufeff", "x = 1", "[" + "a." * 600 + "b]")))
    content = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice((0, 0, 1, 5))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.1:
        content = bytearray(b"\x89PNG\r\n\x1a\n") + rng.randbytes(rng.randint(0, 60)) + b"tEXtimprompt\x00" + content
    path = folder / "options.toml"
    path.write_bytes(content)
    return ["--config", str(path)]


def main(arguments: list[str]) -> int:
    """Print the outcomes and every finding; 1 where there is any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    outcomes, findings = fuzz(options.minutes, options.seed)
    print(dict(outcomes))
    for finding in findings.values():
        print(finding, end="\n\n")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
