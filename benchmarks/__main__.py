"""Run every bench with `python -m benchmarks`, or one, with its own flags: `python -m benchmarks unet --small`.

mini: four pictures on the embedded model. unet: what an image prompt costs a UNet. full_size: SD 1.5 from disk to
picture. training: a step beside the original recipe. Each has --help; all have --small, which takes seconds.
"""

import sys
import traceback
from importlib import import_module

from imprompt.cli.console import quiet_libraries

BENCHES = ("mini", "unet", "full_size", "training", "memory", "ablation")


def main(words: list[str]) -> None:
    """The first word names a bench; without it all of them get the flags. A bench that breaks does not stop the next."""
    if words[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return
    chosen, flags = (words[:1], words[1:]) if words and words[0] in BENCHES else (BENCHES, words)
    quiet_libraries()
    for name in chosen:
        try:
            import_module(f"benchmarks.{name}").main(flags)
        except Exception:
            traceback.print_exc()


main(sys.argv[1:])
