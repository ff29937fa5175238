"""Run the speed benches with `python -m benchmarks`, or any one, with its own flags: `python -m benchmarks unet --small`.

Speed: mini, four pictures on the embedded model; unet, what an image prompt costs a UNet; full_size, SD 1.5 from disk to
picture; training, a step beside the original recipe; evaluate, batches beside a loop, and flat memory; references, 64 of
them beside one. Others: memory, 100 000 records in flat memory; ablation, decoupled beside simple; custom, an adapter on a
fine-tuned model; prior, what DreamBooth's prior preservation keeps; controls, why the second paper's self-attention stays
behind; gallery, identity against photographs that no row has heard; equal, nine references beside one that hears the text as
well. Each has --help; all have --small.
"""

import sys
import traceback
from importlib import import_module

from imprompt.cli.console import quiet_libraries

SPEED = ("mini", "unet", "full_size", "training", "evaluate", "references")
OTHERS = ("memory", "ablation", "custom", "prior", "controls", "gallery", "equal")


def main(words: list[str]) -> None:
    """The first word names a bench; without it the speed benches get the flags. A bench that breaks does not stop the next."""
    if words[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return
    chosen, flags = (words[:1], words[1:]) if words and words[0] in SPEED + OTHERS else (SPEED, words)
    quiet_libraries()
    for name in chosen:
        try:
            import_module(f"benchmarks.{name}").main(flags)
        except Exception:
            traceback.print_exc()


main(sys.argv[1:])
