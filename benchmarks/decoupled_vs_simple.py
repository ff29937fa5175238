"""Decoupled cross-attention next to the simple adapter on mini: the ablation of IP-Adapter (arXiv:2308.06721, section 4.4.1).

IP-Adapter: Ye et al., 2023. Both are trained by `imprompt.train` with the same steps, data and seeds; then they generate from held-out
images with an empty prompt. CLIP-I comes from a CLIP model that was not used for conditioning.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from imprompt.config import TrainConfig
from imprompt.methods import build_method
from imprompt.mini.attribute_classifier import AttributeClassifier
from imprompt.mini.held_out import make_held_out_samples
from imprompt.models import hub
from imprompt.models.base_pipelines import MINI_GUIDANCE_SCALE, load_pipeline, resolve_dtype, sample_images
from imprompt.models.checkpoints import load_module
from imprompt.models.clip_score import CLIPScorer
from imprompt.models.image_encoders import ImageEncoder
from imprompt.recipes.benchmark import compute_attribute_accuracy
from imprompt.training import log_steps, train_adapter

METHODS = ("ip-adapter", "simple")


def train_method(method: str, seed: int, steps: int, folder: Path) -> Path:
    """The folder of a finished run; one begun there is continued."""
    out = folder / f"{method}-{seed}-{steps}"
    config = TrainConfig.from_options(
        method=method, seed=seed, max_train_steps=steps, output_dir=str(out), num_validation_images=0, sanity_check=False,
        checkpointing_steps=200, checkpoints_total_limit=1,
    )  # fmt: skip
    for step in log_steps(config, train_adapter(config)):
        if step.index % 50 == 0:
            print(f"{out.name}: {step.index}/{steps} loss {step.loss:.4f} {step.images_per_second:.0f} images/s", flush=True)
    return out


@torch.no_grad()
def score_method(method: str, run: Path, num_prompts: int, num_inference_steps: int) -> dict[str, float]:
    """CLIP-I and the accuracy of the attributes that a classifier finds, over held-out images."""
    pipe = load_pipeline("mini", "cpu", resolve_dtype("auto", "cpu", is_mini=True))
    conditioning = build_method(method, pipe, ImageEncoder.load(hub.MINI_PATH / "image_encoder"))
    load_module(conditioning.module, run / "adapter.safetensors")
    samples, classifier, images = make_held_out_samples(num_prompts), AttributeClassifier(), []
    clip = CLIPScorer.load("mini")
    references = [sample.image for sample in samples]
    for start in range(0, num_prompts, 50):
        features = conditioning.encoder.encode_images(references[start : start + 50], patches=conditioning.uses_patch_features)[:, None]
        seeds = range(start, start + len(features))
        with conditioning.apply_to(pipe, features, conditioning.uncond_features()[None]):
            images += sample_images(pipe, [""] * len(features), num_inference_steps, seeds, (64, 64), MINI_GUIDANCE_SCALE)
    accuracy = compute_attribute_accuracy(classifier.classify(images), [sample.attributes for sample in samples], "all four")
    similarity = (clip.embed_images(images) * clip.embed_images(references)).sum(1)
    return accuracy | {"CLIP-I (mini)": float(similarity.mean())}


def main(arguments: Sequence[str] = ()) -> None:
    """Train and score both methods with every seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks decoupled_vs_simple", description=__doc__)
    parser.add_argument("--small", action="store_true", help="two steps, one seed: shows only that it runs")
    parser.add_argument("--max-train-steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/decoupled-vs-simple"))
    args = parser.parse_args(arguments)
    if args.small:
        args.max_train_steps, args.seeds, args.num_prompts = 2, [0], 4
    console = Console(highlight=False, soft_wrap=True)
    clip_i: dict[str, list[float]] = {}
    for seed in args.seeds:
        for method in args.methods:
            run = train_method(method, seed, args.max_train_steps, args.output_dir)
            scores = score_method(method, run, args.num_prompts, 4 if args.small else 30)
            (run / "scores.json").write_text(json.dumps(scores))
            clip_i.setdefault(method, []).append(scores["CLIP-I (mini)"])
            formatted = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
            console.print(f"decoupled_vs_simple: {method}, seed {seed}: {formatted}")
    for method, values in clip_i.items():
        spread = f"{np.mean(values):.3f} ± {np.std(values):.3f} over {len(values)} seeds"
        console.print(f"decoupled_vs_simple: {method}: CLIP-I (mini) {spread}, {args.max_train_steps} steps")
