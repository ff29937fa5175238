"""What DreamBooth's prior preservation keeps: ID similarity of the subject and diversity of its class, with it and without.

Every method is fine-tuned on each subject, with nine images, three times: with class images in every second place of a batch, without them,
and without them in half as many steps, which contain as many images of the subject as with them. Then the model generates the subject in
the scenes of its test images and, from a prompt with the class noun only, images of the class.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from imprompt.config import EvaluateConfig, TrainConfig
from imprompt.evaluation.identity import build_gallery, load_identity_encoder
from imprompt.evaluation.metrics import cosine_similarity, pairwise_diversity
from imprompt.evaluation.samples import EvalSample, SamplingParams, SubjectEvalSet, load_eval_set
from imprompt.evaluation.systems import PerSubjectSystem, System, SystemLoader, TextOnlyBaseline
from imprompt.methods.prompt_templates import format_class_prompt
from imprompt.models.clip_score import CLIPScorer
from imprompt.utils.images import make_contact_sheet
from imprompt.utils.statistics import mean_interval

METHODS = ("dreambooth", "dreambooth-lora")
GALLERY_SIZE, NUM_REFERENCES, TARGETS_PER_SUBJECT, NUM_CLASS_SAMPLES = 16, 9, 2, 8
FIRST_CLASS_SEED = 1000  # of the class samples: the class images of the training were generated with seeds from 0 on
COLUMNS = ("ID similarity", "class: diversity", "class: ID similarity")


def main(arguments: Sequence[str] = ()) -> None:
    """Fine-tune and measure every row on every subject."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks prior_preservation", description=__doc__)
    parser.add_argument("--small", action="store_true", help="two subjects in two steps: shows only that it runs")
    parser.add_argument("--num-subjects", type=int, default=12)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/prior-preservation"), help="folder of class images and contact sheet")
    args = parser.parse_args(arguments)
    num_subjects = 2 if args.small else args.num_subjects
    config = EvaluateConfig.from_options(
        data="mini", min_images_per_subject=GALLERY_SIZE + TARGETS_PER_SUBJECT, num_references=NUM_REFERENCES,
        targets_per_subject=TARGETS_PER_SUBJECT, num_prompts=TARGETS_PER_SUBJECT * num_subjects, scheduler="dpm++",
        num_inference_steps=2 if args.small else 8, output_dir=str(args.output_dir),
    ).with_defaults()  # fmt: skip
    eval_set, identity_encoder, clip_scorer = load_eval_set(config.dataset), load_identity_encoder("mini"), CLIPScorer.load("mini")
    assert isinstance(eval_set, SubjectEvalSet)
    centroids = build_gallery(identity_encoder, eval_set).centroids
    params = SamplingParams(config.sampling.num_inference_steps, config.sampling.guidance_scale or 0.0, (64, 64))
    scores: dict[str, list[tuple[float, ...]]] = {}
    cells: list[Image.Image] = []
    with Progress(transient=True) as progress:
        systems = load_systems(config, small=args.small)
        task = progress.add_task("subjects × rows", total=num_subjects * len(systems))
        for name, system in systems.items():
            for number in range(num_subjects):
                samples = [eval_set[number * TARGETS_PER_SUBJECT + i] for i in range(TARGETS_PER_SUBJECT)]
                subject_images, class_images = generate_images(system, samples, params)
                centroid = centroids[number : number + 1]
                similarities = [
                    float(cosine_similarity(embeddings, centroid.expand(len(embeddings), -1)).mean())
                    for embeddings, _ in map(identity_encoder.embed, (subject_images, class_images))
                ]
                diversity = float(pairwise_diversity(clip_scorer.embed_images(class_images)[None])[0])
                scores.setdefault(name, []).append((similarities[0], diversity, similarities[1]))
                if number == 0:
                    cells += [samples[0].references[0], *subject_images[:1], *class_images[:6]]
                progress.advance(task)
    console = Console(highlight=False, soft_wrap=True, width=120)
    console.print(results_table(f"{num_subjects} subjects, {NUM_REFERENCES} images each", scores))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    make_contact_sheet([], cells, columns=8, cell_size=128).save(args.output_dir / "sheet.png")
    console.print(f"rows of {args.output_dir / 'sheet.png'}: {', '.join(scores)}; a reference, the subject, six of the class")


def load_systems(config: EvaluateConfig, *, small: bool) -> dict[str, System]:
    """Every method without class images, without them in half the steps, and with them; and the base model."""
    systems = {}
    for method in METHODS:
        defaults = TrainConfig.from_options(method=method, class_noun="thing", data="one").with_defaults()
        steps = 2 if small else defaults.optimization.max_train_steps
        for name, finetune_steps, num_class_images in (
            ("without prior", steps, 0),
            ("in half the steps", steps // 2, 0),
            ("with prior", steps, 2 if small else None),
        ):
            options = config.with_options(finetune_steps=finetune_steps, num_class_images=num_class_images)
            systems[f"{method}, {name}"] = SystemLoader.from_config(options).load_system(method)
    return systems | {"base model": SystemLoader.from_config(config).load_system("text")}


def generate_images(system: System, samples: Sequence[EvalSample], params: SamplingParams) -> tuple[list[Image.Image], list[Image.Image]]:
    """Images of the subject, one for each sample; and NUM_CLASS_SAMPLES of its class, from a prompt without the subject's token."""
    class_prompts = [format_class_prompt(samples[0].class_noun)] * NUM_CLASS_SAMPLES
    with TemporaryDirectory() as folder:
        finetuned: Any = system.finetune(samples[0], Path(folder)) if isinstance(system, PerSubjectSystem) else system
        subject_images = finetuned.generate(samples, [sample.prompt for sample in samples], range(len(samples)), params)
        untokened = finetuned if isinstance(finetuned, TextOnlyBaseline) else replace(finetuned, format_prompt=str)
        seeds = range(FIRST_CLASS_SEED, FIRST_CLASS_SEED + NUM_CLASS_SAMPLES)
        return subject_images, untokened.generate([samples[0]] * NUM_CLASS_SAMPLES, class_prompts, seeds, params)


def results_table(title: str, scores: dict[str, list[tuple[float, ...]]]) -> Table:
    """The mean over the subjects of every column, row by row."""
    table = Table(title=title, box=box.SIMPLE)
    for heading in ("", *COLUMNS):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, by_subject in scores.items():
        columns = torch.tensor(by_subject, dtype=torch.float64).unbind(1)
        intervals = [mean_interval(values, torch.arange(len(values))) for values in columns]
        table.add_row(name, *(f"{interval.value:.3f} ± {interval.half_width:.3f}" for interval in intervals))
    return table
