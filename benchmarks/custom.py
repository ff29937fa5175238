"""An adapter trained on mini, untouched, on a custom model that was fine-tuned from mini to another drawing style.

`imprompt mini style ink` makes such a model. Pictures are drawn after held-out photographs, with empty text, on both; the
judge and CLIP-I have never seen the style, so CLIP-I is also given beside the photograph brought to that style.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from imprompt.mini.judge import Judge, agreement, cases, draw_cases
from imprompt.models.base_pipelines import MINI_GUIDANCE, load_base, pick_dtype
from imprompt.models.image_prompt import load
from imprompt.recipes.style import STYLES, make_style
from imprompt.utils.images import sheet

SHOWN = 8


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks custom", description=__doc__)
    parser.add_argument("--small", action="store_true", help="a model of three steps and four prompts: says whether it runs")
    parser.add_argument("--style", default="ink", choices=list(STYLES))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, help="work folder of the custom model (default: runs/mini-STYLE)")
    chosen = parser.parse_args(words)
    out = chosen.out or Path("runs") / f"mini-{chosen.style}{'-small' if chosen.small else ''}"
    if chosen.small:
        chosen.prompts, chosen.steps = 4, 4
    console = Console(highlight=False, soft_wrap=True)
    if not (out / "model" / "model_index.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        make_style(chosen.style, out, lambda part, done, total, loss: None, budget=0.004 if chosen.small else 1.0)
    prompts, judge = cases(chosen.prompts), Judge()
    photos = [case.photo for case in prompts]
    styled = [STYLES[chosen.style](photo) for photo in photos]
    seen = {"photographs": photos, "photographs, styled": styled}
    for name, base in (("mini", "mini"), (chosen.style, str(out / "model"))):
        pipe = load_base(base, "cpu", pick_dtype("auto", "cpu", True))
        for label, adapter in (("text only", None), ("image", "mini"), ("image, fine-grained", "mini-plus")):
            texts = [""] * len(photos) if adapter else [case.text for case in prompts]
            prompter = load(adapter) if adapter else None
            images = draw_cases(pipe, texts, photos, prompter, 1.0, chosen.steps, MINI_GUIDANCE, lambda done, total: None)
            seen[f"{name}: {label}"] = images
    table = Table(title=f"{chosen.style}: {len(photos)} held-out photographs", box=box.SIMPLE)
    for column in ("", "CLIP-I", "to style", "kind", "colour", "pattern", "ground"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=bool(column))
    wanted, wanted_styled = judge.image_embeddings(photos), judge.image_embeddings(styled)
    for name, images in seen.items():
        mine = judge.image_embeddings(images)
        right = agreement(judge.read(images), [case.truth for case in prompts], "all")
        likeness = (float((mine * other).sum(1).mean()) for other in (wanted, wanted_styled))
        table.add_row(name, *(f"{v:.3f}" for v in (*likeness, *(right[k] for k in ("kind", "colour", "pattern", "background")))))
    console.print(table)
    rows = [
        "photographs",
        "mini: image",
        f"{chosen.style}: text only",
        f"{chosen.style}: image",
        f"{chosen.style}: image, fine-grained",
    ]
    shown: list[Image.Image] = [image for row in rows for image in seen[row][:SHOWN]]
    sheet([], shown, columns=min(SHOWN, len(photos)), cell=128).save(out / "sheet.png")
    console.print(f"rows of {out / 'sheet.png'}: {', '.join(rows)}")
