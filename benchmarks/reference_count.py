"""64 references next to one, for every aggregation, on the embedded model."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image
from rich.console import Console

from benchmarks.timing import interleave
from imprompt.core.aggregation import AGGREGATORS, Aggregator
from imprompt.data.readers import MiniWorld
from imprompt.dit.attach import attach
from imprompt.models import hub
from imprompt.models.base_pipelines import load_pipeline, resolve_dtype, sample_images
from imprompt.models.image_prompt import ImagePrompt, ImagePromptEncoder, load

MAX_RATIO, NUM_REFERENCES = 1.1, 64  # the ratio is a goal
GLOBAL_AGGREGATIONS = ("concat", "average", "max", "self-attention", "attention")
TOKEN_AGGREGATIONS = ("joint", "average-tokens", "attention-tokens")  # of the fine-grained adapter


def encode_prompt(encoder: ImagePromptEncoder, images: Sequence[Image.Image], aggregator: Aggregator) -> ImagePrompt:
    """The image prompt of these images, encoded here."""
    features, uncond = encoder.encode_references(images)[0], encoder.encode_negative()
    return ImagePrompt(encoder.adapter, features[None], uncond[None], aggregator=aggregator)


def load_aggregation(name: str) -> tuple[ImagePromptEncoder, Aggregator]:
    """The embedded adapter of an aggregation, and the aggregator: trained where a trained one is embedded."""
    if name == "attention-tokens" and (hub.MINI_PATH / hub.BUNDLED_ADAPTERS["mini-subject"]).is_file():
        encoder = load("mini-subject")
        return encoder, encoder.adapter.aggregator
    encoder = load("mini-plus" if name in TOKEN_AGGREGATIONS else "mini")
    return encoder, AGGREGATORS[name](encoder.spec.image_embed_dim, encoder.spec.cross_attention_dim)


def main(arguments: Sequence[str] = ()) -> None:
    """Time every aggregation with one reference and with many."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks reference_count", description=__doc__)
    parser.add_argument("--small", action="store_true", help="one image in three steps")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    num_images, steps = (1, 3) if args.small else (4, 30)
    pipe = load_pipeline("mini", "cpu", resolve_dtype("auto", "cpu", is_mini=True))
    records = MiniWorld(NUM_REFERENCES, held_out=True, images_per_subject=NUM_REFERENCES, describe_appearance=False)
    references: Any = [records[i].target for i in range(NUM_REFERENCES)]
    for name in (*GLOBAL_AGGREGATIONS, *TOKEN_AGGREGATIONS):
        encoder, aggregator = load_aggregation(name)

        def generate(count: int, encoder: ImagePromptEncoder = encoder, aggregator: Aggregator = aggregator) -> Any:
            with attach(pipe, encode_prompt(encoder, references[:count], aggregator)):
                return sample_images(pipe, ["a cat"] * num_images, steps, range(num_images), (64, 64), 3.0)

        def generate_from_one(generate: Any = generate) -> Any:
            return generate(1)

        def generate_from_many(generate: Any = generate) -> Any:
            return generate(NUM_REFERENCES)

        times = interleave({"one": generate_from_one, "many": generate_from_many}, args.rounds, time.process_time)
        start = time.process_time()
        encoder.encode_references(references)
        encoding = time.process_time() - start
        ratio = times.ratio("many")
        verdict = "goal met" if ratio.median <= MAX_RATIO else "goal missed"
        console.print(
            f"reference_count: {name}: {NUM_REFERENCES} next to one, {num_images} images × {steps} steps: {ratio} "
            f"({verdict}: ≤ {MAX_RATIO}); "
            f"encoding {NUM_REFERENCES} images takes {encoding:.2f} s of {times.median('many'):.2f} s"
        )
