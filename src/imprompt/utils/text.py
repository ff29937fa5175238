"""Text from files and file names, made safe to print."""


def shorten(name: str, length: int = 80) -> str:
    """A name from a file, of which a sentence takes so many characters."""
    return name if len(name) <= length else name[:length] + "…"


def escape(text: object) -> str:
    """The text in one printable line: control characters, line breaks, terminal escapes and invisible characters as `\\x1b`, `\\n`, ….

    Whatever a file contains, printing the result neither changes the terminal nor looks like a line of our own.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
