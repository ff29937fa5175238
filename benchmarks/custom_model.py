"""An adapter trained on mini, unchanged, on a custom model that was fine-tuned from mini to another drawing style.

`imprompt mini style ink` makes such a model. Images are generated from held-out images, with an empty prompt, on both models. Neither
the attribute classifier nor the CLIP model has seen the style, so CLIP-I is also computed to the held-out image in that style.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from imprompt.mini.attribute_classifier import AttributeClassifier
from imprompt.mini.held_out import WorldSample, make_held_out_samples
from imprompt.models.base_pipelines import MINI_GUIDANCE_SCALE, load_pipeline, resolve_dtype
from imprompt.models.clip_score import CLIPScorer
from imprompt.models.image_prompt import load
from imprompt.recipes.benchmark import compute_attribute_accuracy, generate_samples
from imprompt.recipes.style import STYLES, train_style
from imprompt.utils.images import make_contact_sheet

NUM_SHEET_COLUMNS = 8


def main(arguments: Sequence[str] = ()) -> None:
    """Make the custom model unless it is there, generate on both models, and compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks custom_model", description=__doc__)
    parser.add_argument("--small", action="store_true", help="a model of three steps and four prompts: shows only that it runs")
    parser.add_argument("--style", default="ink", choices=list(STYLES))
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--num-inference-steps", type=int, default=30)
    parser.add_argument("--output-dir", type=Path, help="work folder of the custom model (default: runs/mini-STYLE)")
    args = parser.parse_args(arguments)
    out = args.output_dir or Path("runs") / f"mini-{args.style}{'-small' if args.small else ''}"
    if args.small:
        args.num_prompts, args.num_inference_steps = 4, 4
    if not (out / "model" / "model_index.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        train_style(args.style, out, lambda part, done, total, loss: None, budget=0.004 if args.small else 1.0)
    samples = make_held_out_samples(args.num_prompts)
    references = [sample.image for sample in samples]
    styled = [STYLES[args.style](image) for image in references]
    images = {"references": references, "references, styled": styled}
    for name, base_model in (("mini", "mini"), (args.style, str(out / "model"))):
        generated = generate_rows(base_model, samples, args.num_inference_steps)
        images |= {f"{name}: {label}": row for label, row in generated.items()}
    console = Console(highlight=False, soft_wrap=True)
    console.print(score_rows(f"{args.style}: {len(references)} held-out images", images, samples, styled))
    sheet_rows = ["references", "mini: image", *(f"{args.style}: {label}" for label in ("text only", "image", "image, fine-grained"))]
    cells: list[Image.Image] = [image for row in sheet_rows for image in images[row][:NUM_SHEET_COLUMNS]]
    make_contact_sheet([], cells, columns=min(NUM_SHEET_COLUMNS, len(references)), cell_size=128).save(out / "sheet.png")
    console.print(f"rows of {out / 'sheet.png'}: {', '.join(sheet_rows)}")


def generate_rows(base_model: str, samples: Sequence[WorldSample], num_inference_steps: int) -> dict[str, list[Image.Image]]:
    """Images on a base model from text only, and from the reference images through both adapters."""
    pipe, references = load_pipeline(base_model, "cpu", resolve_dtype("auto", "cpu", is_mini=True)), [sample.image for sample in samples]
    rows = {}
    for label, adapter in (("text only", None), ("image", "mini"), ("image, fine-grained", "mini-plus")):
        prompts = [""] * len(samples) if adapter else [sample.caption for sample in samples]
        encoder = load(adapter) if adapter else None
        rows[label] = generate_samples(
            pipe, prompts, references, encoder, scale=1.0, num_inference_steps=num_inference_steps, guidance_scale=MINI_GUIDANCE_SCALE
        )
    return rows


def score_rows(title: str, rows: dict[str, list[Image.Image]], samples: Sequence[WorldSample], styled: Sequence[Image.Image]) -> Table:
    """CLIP-I to the references and to the styled references, and the accuracy of the attributes that a classifier finds."""
    table, classifier, clip = Table(title=title, box=box.SIMPLE), AttributeClassifier(), CLIPScorer.load("mini")
    for heading in ("", "CLIP-I (mini)", "to style", "category", "color", "pattern", "background"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    targets = [clip.embed_images(images) for images in ([sample.image for sample in samples], styled)]
    for name, images in rows.items():
        embeddings = clip.embed_images(images)
        accuracy = compute_attribute_accuracy(classifier.classify(images), [sample.attributes for sample in samples], "all")
        clip_i = (float((embeddings * target).sum(1).mean()) for target in targets)
        attributes = (accuracy[attribute] for attribute in ("category", "color", "pattern", "background"))
        table.add_row(name, *(f"{value:.3f}" for value in (*clip_i, *attributes)))
    return table
