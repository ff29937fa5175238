"""The paper's ablation on mini (arXiv:2308.06721, section 4.4.1): decoupled cross-attention beside the simple adapter.

Both are trained by `imprompt.train` with the same steps, data and seeds; then they draw after held-out photographs, with
empty text. CLIP-I comes from the encoder that nothing was trained with.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from imprompt.config import Train
from imprompt.methods import create
from imprompt.mini.judge import Judge, agreement, cases
from imprompt.models import hub
from imprompt.models.base_pipelines import MINI_GUIDANCE, drawing, load_base, pick_dtype
from imprompt.models.checkpoints import load_module
from imprompt.models.image_encoders import ImageEncoder
from imprompt.training import recorded, train

PAIR = ("ip-adapter", "simple")


def trained(method: str, seed: int, steps: int, folder: Path) -> Path:
    """The folder of a finished run; one begun there is continued."""
    out = folder / f"{method}-{seed}-{steps}"
    choice = Train(method=method, seed=seed, steps=steps, out=str(out), validation=0, preflight=False, save_every=200, keep=1)
    for step in recorded(choice, train(choice)):
        if step.index % 50 == 0:
            print(f"{out.name}: {step.index}/{steps} loss {step.loss:.4f} {step.images_per_second:.0f} images/s", flush=True)
    return out


@torch.no_grad()
def measured(method: str, run: Path, prompts: int, steps: int) -> dict[str, float]:
    """CLIP-I and what the judge reads, over held-out photographs."""
    pipe = load_base("mini", "cpu", pick_dtype("auto", "cpu", True))
    encoder = ImageEncoder.load(hub.MINI / "image_encoder")
    made = create(method, pipe, encoder)
    load_module(made.module, run / "adapter.safetensors")
    chosen, judge, images = cases(prompts), Judge(), []
    photos = [case.photo for case in chosen]
    for start in range(0, prompts, 50):
        features = made.encoder.encode(photos[start : start + 50], made.grid)[:, None]
        with made.attached(pipe, features, made.null()[None]):
            images += drawing(pipe, [""] * len(features), steps, range(start, start + len(features)), (64, 64), MINI_GUIDANCE)
    right = agreement(judge.read(images), [case.truth for case in chosen], "all four")
    return right | {"CLIP-I": float((judge.image_embeddings(images) * judge.image_embeddings(photos)).sum(1).mean())}


def main(words: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks ablation", description=__doc__)
    parser.add_argument("--small", action="store_true", help="two steps, one seed: says whether it runs")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=list(PAIR))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    chosen = parser.parse_args(words)
    if chosen.small:
        chosen.steps, chosen.seeds, chosen.prompts = 2, [0], 4
    console = Console(highlight=False, soft_wrap=True)
    table: dict[str, list[float]] = {}
    for seed in chosen.seeds:
        for method in chosen.methods:
            run = trained(method, seed, chosen.steps, chosen.out)
            found = measured(method, run, chosen.prompts, 4 if chosen.small else 30)
            (run / "measured.json").write_text(json.dumps(found))
            table.setdefault(method, []).append(found["CLIP-I"])
            console.print(f"ablation: {method}, seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    for method, values in table.items():
        console.print(
            f"ablation: {method}: CLIP-I {np.mean(values):.3f} ± {np.std(values):.3f} over {len(values)} seeds, {chosen.steps} steps"
        )
