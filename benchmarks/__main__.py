"""Run the speed benchmarks with `python -m benchmarks`, or any one with its own flags: `python -m benchmarks unet_overhead --small`.

Speed: mini_generation, four images on the embedded model next to plain diffusers; unet_overhead, what an image prompt costs a UNet;
full_size_generation, SD 1.5 from disk to image; training_step, a step next to the original recipe; evaluation_throughput, batches next to a
loop, and flat memory; reference_count, 64 references next to one. Others: streaming_memory, 100 000 records in flat memory;
decoupled_vs_simple, the ablation of decoupled cross-attention; custom_model, an adapter on a fine-tuned model; prior_preservation, what
DreamBooth's prior preservation keeps; self_attention_init, how the initialization of the self-attention aggregator decides its result;
identity_gallery, ID similarity against images that no row was conditioned on; equal_text_alignment, nine references next to one at the same
CLIP-T. Each has --help; all have --small.
"""

import sys
import traceback
from importlib import import_module

from imprompt.cli.console import silence_third_party_logs

SPEED = ("mini_generation", "unet_overhead", "full_size_generation", "training_step", "evaluation_throughput", "reference_count")
OTHERS = (
    "streaming_memory", "decoupled_vs_simple", "custom_model", "prior_preservation", "self_attention_init", "identity_gallery",
    "equal_text_alignment",
)  # fmt: skip


def main(arguments: list[str]) -> None:
    """The first argument names a benchmark; without one, the speed benchmarks get all flags. An error in one does not stop the next."""
    if arguments[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return
    names, flags = (arguments[:1], arguments[1:]) if arguments and arguments[0] in SPEED + OTHERS else (SPEED, arguments)
    silence_third_party_logs()
    for name in names:
        try:
            import_module(f"benchmarks.{name}").main(flags)
        except Exception:
            traceback.print_exc()


main(sys.argv[1:])
