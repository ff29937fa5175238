"""`python -m benchmarks` runs every bench; `python -m benchmarks unet --small` runs one, with its own flags."""

import sys
import traceback
from importlib import import_module

BENCHES = ("mini", "unet", "full_size")


def main(words: list[str]) -> None:
    """The first word names a bench; without it all of them get the flags. A bench that breaks does not stop the next."""
    chosen, flags = (words[:1], words[1:]) if words and words[0] in BENCHES else (BENCHES, words)
    for name in chosen:
        try:
            import_module(f"benchmarks.{name}").main(flags)
        except Exception:
            traceback.print_exc()


main(sys.argv[1:])
