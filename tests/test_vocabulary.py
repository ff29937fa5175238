"""The words that docs/glossary.md rejects stand nowhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GLOSSARY = ROOT / "docs" / "glossary.md"
HISTORY = ("docs/log.md", "docs/glossary.md")

# Plain English or other libraries' names with one of these words, where it means something else.
ALLOWED = (
    r"\brandom\.choice\b",
    r'"a picture of "',  # of mini's captions
    r"\br(ng)?\.choice\(",
    r"\.choices?\(",
    r"\bchoices\b",
    r"photographs of \{name\}",  # seed of a random order, which must not change
)


def rejected_words() -> list[str]:
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \|([^|]*)\|$", GLOSSARY.read_text("utf-8"), re.M)
    return [word.strip() for row in rows[1:] for word in row.split(",") if word.strip()]


def checked_files() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for folder in ("src", "tests", "benchmarks"):
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".toml", ".html", ".jinja")]
    return [path for path in found if path != Path(__file__) and not path.relative_to(ROOT).as_posix().startswith(HISTORY)]


def find_rejected(text: str, words: list[str]) -> list[str]:
    """Lines with a rejected word; a name in snake case or camel case counts as the words that it is made of."""
    pattern = re.compile(rf"(?<![A-Za-z])({'|'.join(words)})(?![a-z])", re.I)
    return [line.strip() for line in text.splitlines() if pattern.search(re.sub("|".join(ALLOWED), "", line))]


def test_the_glossary_rejects_words():
    words = rejected_words()
    assert {"heard", "contender", "shelf", "choice"} <= set(words)
    assert find_rejected("an adapter hears_it\nrng.choice(names)\nheard_by = 1\nsheared", words) == ["an adapter hears_it", "heard_by = 1"]


@pytest.mark.parametrize("path", checked_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_rejected_words_stand_nowhere(path):
    lines = find_rejected(path.read_text("utf-8"), rejected_words())
    assert not lines, f"docs/glossary.md has other words for these: {lines[:5]}"
