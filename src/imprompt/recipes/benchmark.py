"""Benchmarks of mini on held-out samples: text and image prompts, and every task of `generate`.

An attribute classifier and a segmentation model that no other part was trained with evaluate the images. CLIP-I (mini) and
CLIP-T (mini) come from a CLIP with another architecture, trained separately. The benchmark of tasks calls `generate` image by
image, as a user would.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imprompt.config import GenerateConfig
from imprompt.dit.attach import attach
from imprompt.generation.generate import LoadedModels, generate_images
from imprompt.mini import world
from imprompt.mini.attribute_classifier import AttributeClassifier
from imprompt.mini.held_out import WorldSample
from imprompt.models.base_pipelines import sample_images
from imprompt.models.clip_score import CLIPScorer
from imprompt.models.image_prompt import ImagePrompt, ImagePromptEncoder, load
from imprompt.utils.files import atomic_path
from imprompt.utils.images import make_contact_sheet
from imprompt.utils.plots import Curve, plot_panels
from imprompt.utils.protocols import UNetPipeline
from imprompt.utils.statistics import Interval

# The minimum of each score of a task that counts as reached.
THRESHOLDS: dict[str, dict[str, float]] = {
    "real": {"category": 0.98, "color": 0.98, "background": 0.98, "pattern": 0.98},
    "text": {"category": 0.97, "color": 0.97, "background": 0.97, "pattern": 0.80, "all four": 0.75},
    "image": {"category": 0.90, "color": 0.95, "background": 0.97, "pattern": 0.70},
    "image-plus": {"category": 0.95, "color": 0.97, "pattern": 0.85},
    "image-text": {"category (text)": 0.95, "color (image)": 0.92, "background (image)": 0.97, "all three": 0.85},
    "multimodal": {"category (text)": 0.9, "appearance (image)": 0.9},  # image-text at the scale λ that maximizes the smaller of the two
    "edges": {"IoU ratio, with ÷ without image": 0.95, "color (image)": 0.9, "pattern (image)": 0.9},
    "silhouette": {"IoU ratio, with ÷ without image": 0.95, "color (image)": 0.9, "pattern (image)": 0.9},
    "inpaint": {"category (image)": 0.9, "color (image)": 0.9, "pattern (image)": 0.9},
    "regions": {"category": 0.9, "color": 0.9, "pattern": 0.9, "background": 0.9},
}
SWEEP_SCALES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
SCALE = 0.8  # λ where text names the category: at this scale category and appearance are correct most often (task image-text)
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
NUM_SHEET_ROWS = 6
APPEARANCE_LABELS = {"color": "color (image)", "pattern": "pattern (image)"}
_BATCH_SIZE = 50


def generate_samples(
    pipe: UNetPipeline,
    prompts: Sequence[str],
    references: Sequence[Image.Image],
    encoder: ImagePromptEncoder | None,
    *,
    scale: float,
    num_inference_steps: int,
    guidance_scale: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Image.Image]:
    """One image for each prompt, conditioned on its own reference where there is an image prompt encoder; seeds count from 0."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), _BATCH_SIZE):
        seeds = range(start, min(start + _BATCH_SIZE, len(prompts)))
        batch = slice(seeds.start, seeds.stop)
        with ExitStack() as stack:
            if encoder is not None:
                patches = encoder.spec.uses_patch_features
                features = encoder.encoder.encode_images(references[batch], patches=patches)[:, None]
                uncond_features = encoder.encoder.uncond_features(patches=patches)[None]
                stack.enter_context(attach(pipe, ImagePrompt(encoder.adapter, features, uncond_features, scale)))
            images += sample_images(pipe, prompts[batch], num_inference_steps, seeds, (world.SIZE, world.SIZE), guidance_scale)
        on_progress(seeds.stop, len(prompts))
    return images


def compute_attribute_accuracy(
    predictions: Sequence[dict[str, str]], targets: Sequence[dict[str, str]], all_correct: str
) -> dict[str, float]:
    """The fraction of images whose attribute equals its target, for each attribute; under `all_correct`, for all of them at once."""
    names = list(targets[0])
    correct = np.array([[p[name] == t[name] for name in names] for p, t in zip(predictions, targets, strict=True)])
    return {name: float(share) for name, share in zip(names, correct.mean(0), strict=True)} | {all_correct: float(correct.all(1).mean())}


@dataclass
class MiniBenchmark:
    """Scores of mini with text and image prompts. `on_progress(task, done, total)` reports progress."""

    pipe: UNetPipeline
    samples: Sequence[WorldSample]
    num_inference_steps: int
    guidance_scale: float
    on_progress: Callable[[str, int, int], None]

    def __post_init__(self) -> None:
        self.classifier = AttributeClassifier()
        self.clip = CLIPScorer.load("mini")
        self.references = [sample.image for sample in self.samples]

    def score_real_images(self) -> dict[str, float]:
        """Accuracy of the classifier on the rendered reference images."""
        return self._accuracy(self.references)

    def score_text_to_image(self) -> dict[str, float]:
        """Text to image."""
        images = self._generate("text", [sample.caption for sample in self.samples], None)
        return self._accuracy(images) | self._clip_scores(images)

    def score_image_prompts(self, adapter: str = "mini", task: str = "image") -> dict[str, float]:
        """Image prompts at scale λ = 1 with an empty text prompt."""
        images = self._generate(task, [""] * len(self.samples), adapter)
        return self._accuracy(images) | self._clip_scores(images)

    def score_plus_image_prompts(self) -> dict[str, float]:
        """Image prompts of the adapter on patch features."""
        return self.score_image_prompts("mini-plus", "image-plus")

    def score_image_and_text(self, scale: float) -> dict[str, float]:
        """An image prompt and a text that names another category: color, pattern and background should come from the image."""
        prompts = [f"a {sample.other_category}" for sample in self.samples]
        images = self._generate(f"image-text λ {scale}", prompts, "mini", scale)
        names = {"category": "category (text)", "color": "color (image)", "background": "background (image)", "pattern": "pattern (image)"}
        targets = [sample.attributes | {"category": sample.other_category} for sample in self.samples]
        predicted, wanted = ([{names[k]: row[k] for k in names} for row in rows] for rows in (self.classifier.classify(images), targets))
        first_three = list(names.values())[:3]
        accuracy = compute_attribute_accuracy(predicted, [{k: row[k] for k in first_three} for row in wanted], "all three")
        appearance = ["color (image)", "pattern (image)"]
        both = compute_attribute_accuracy(predicted, [{k: row[k] for k in appearance} for row in wanted], "appearance (image)")
        return accuracy | both | self._clip_scores(images, prompts)

    def score_reference_rows(self) -> dict[str, float]:
        """CLIP-I (mini) of the reference itself and of another image of the same subject."""
        others = [sample.other_image for sample in self.samples]
        rows = {"target (upper bound)": self.references, "another real image": others}
        return {name: self._clip_scores(images)["CLIP-I (mini)"] for name, images in rows.items()}

    def _generate(self, task: str, prompts: Sequence[str], adapter: str | None, scale: float = 1.0) -> list[Image.Image]:
        return generate_samples(
            self.pipe, prompts, self.references, load(adapter) if adapter else None, scale=scale,
            num_inference_steps=self.num_inference_steps, guidance_scale=self.guidance_scale,
            on_progress=lambda done, total: self.on_progress(task, done, total),
        )  # fmt: skip

    def _accuracy(self, images: Sequence[Image.Image]) -> dict[str, float]:
        predictions = self.classifier.classify(images)
        return compute_attribute_accuracy(predictions, [sample.attributes for sample in self.samples], "all four")

    def _clip_scores(self, images: Sequence[Image.Image], prompts: Sequence[str] | None = None) -> dict[str, float]:
        return self.clip.compute_scores(images, self.references, prompts or [sample.caption for sample in self.samples])


@dataclass
class TaskBenchmark:
    """Scores of mini in every task of `generate`. Contact sheets, and the images that `generate` reads as files, go to `folder`.

    `on_progress(task, done, total)` reports progress.
    """

    samples: Sequence[WorldSample]
    folder: Path
    config: GenerateConfig  # scheduler, denoising steps, guidance scale
    on_progress: Callable[[str, int, int], None]
    classifier: AttributeClassifier
    clip: CLIPScorer

    def __post_init__(self) -> None:
        self.models = LoadedModels.empty()
        self.references = [self._sample_of_other_category(i) for i in range(len(self.samples))]

    def score_edges(self) -> dict[str, float]:
        """The shape from a ControlNet, the appearance from an image of another subject."""
        return self._score_structure("edges", world.render_edges)

    def score_silhouette(self) -> dict[str, float]:
        """The same with a T2I-Adapter."""
        return self._score_structure("silhouette", world.render_silhouette)

    def _score_structure(self, task: str, render: Callable[[world.Subject, world.Scene], Image.Image]) -> dict[str, float]:
        control_images = [render(sample.subject, sample.scene) for sample in self.samples]
        controls = [f"{task}={path}" for path in self._save_images(task, control_images)]
        references = self._save_images("reference", [reference.image for reference in self.references])
        prompts = [f"a {sample.subject.category}" for sample in self.samples]
        control_options = [{"prompt": prompt, "control": (control,)} for prompt, control in zip(prompts, controls, strict=True)]
        image_options = [{"prompt": prompt, "image": (path,), "scale": SCALE} for prompt, path in zip(prompts, references, strict=True)]
        control_only = self._generate(f"{task} only", control_options)
        both = self._generate(f"{task} and image", [a | b for a, b in zip(control_options, image_options, strict=True)])
        image_only = self._generate(f"{task}, image only", image_options)
        self._save_sheet(task, control_images, [reference.image for reference in self.references], control_only, both, image_only)
        truth = [world.render_silhouette(sample.subject, sample.scene) for sample in self.samples]
        rows = {"control only": control_only, "control and image": both, "image only": image_only}
        iou = {f"IoU, {name}": self._mean_iou(images, truth) for name, images in rows.items()}
        iou["IoU ratio, with ÷ without image"] = iou["IoU, control and image"] / iou["IoU, control only"]
        labels = {"category": "category (text)"} | APPEARANCE_LABELS | {"background": "background (image)"}
        return iou | self._accuracy(both, labels, self.samples, self.references)

    def score_inpainting(self) -> dict[str, float]:
        """Another subject inpainted in place of the subject of an image."""
        images = [sample.image for sample in self.samples]
        masks = [_bounding_box_mask(world.render_silhouette(sample.subject, sample.scene)) for sample in self.samples]
        reference_images = [reference.image for reference in self.references]
        files = (
            self._save_images(name, content) for name, content in (("image", images), ("mask", masks), ("reference", reference_images))
        )
        options = [
            {"inpaint_image": image, "mask_image": mask, "image": (path,), "prompt": f"a {reference.subject.category}"}
            for image, mask, path, reference in zip(*files, self.references, strict=True)
        ]
        generated = self._generate("inpaint", options)
        self._save_sheet("inpaint", images, masks, reference_images, generated)
        changes = [
            float(np.abs(np.asarray(new, float) - np.asarray(old, float))[np.asarray(mask) == 0].max(initial=0))
            for new, old, mask in zip(generated, images, masks, strict=True)
        ]
        labels = {"category": "category (image)"} | APPEARANCE_LABELS
        return {"max change outside the mask": max(changes)} | self._accuracy(generated, labels, self.references, self.references)

    def score_img2img(self) -> dict[str, float]:
        """From an initial image towards an image of another subject, with increasing strength."""
        initial, references = [sample.image for sample in self.samples], [reference.image for reference in self.references]
        initial_files, reference_files = self._save_images("image", initial), self._save_images("reference", references)
        initial_embeds, reference_embeds = self.clip.embed_images(initial), self.clip.embed_images(references)
        scores, columns = dict[str, float](), [initial, references]
        for strength in STRENGTHS:
            options = [
                {"init_image": start, "strength": strength, "image": (path,)}
                for start, path in zip(initial_files, reference_files, strict=True)
            ]
            generated = self._generate(f"img2img {strength}", options)
            embeds = self.clip.embed_images(generated)
            scores[f"CLIP-I (mini) to the initial image, strength {strength}"] = float((embeds * initial_embeds).sum(1).mean())
            scores[f"CLIP-I (mini) to the reference, strength {strength}"] = float((embeds * reference_embeds).sum(1).mean())
            columns.append(generated)
        self._save_sheet("img2img", *columns)
        return scores

    def score_regions(self) -> dict[str, float]:
        """Two image prompts, each masked to one half of an image of double width, with and without edges of the two subjects.

        Without edges the task is out of distribution: mini was trained on images with a single subject.
        """
        sides = (self.samples, self.references)
        left, right = (self._save_images(f"reference-{n}", [sample.image for sample in side]) for n, side in enumerate(sides))
        halves = [_concatenate([Image.new("L", (world.SIZE,) * 2, 255 * (m == n)) for m in range(2)]) for n in range(2)]
        edges = [_concatenate([world.render_edges(s.subject, s.scene) for s in pair]) for pair in zip(*sides, strict=True)]
        masks, controls = self._save_images("half", halves), self._save_images("edges", edges)
        resolution = f"{2 * world.SIZE}x{world.SIZE}"
        options: list[dict[str, Any]] = [
            {"image": (a,), "image_mask": masks[0], "image_prompt": (f"image={b},image_mask={masks[1]}",), "resolution": resolution}
            for a, b in zip(left, right, strict=True)
        ]
        with_edges = [o | {"control": (f"edges={control}",)} for o, control in zip(options, controls, strict=True)]
        generated, without_edges = self._generate("regions", with_edges), self._generate("regions without edges", options)
        self._save_sheet("regions", *([sample.image for sample in side] for side in sides), generated, without_edges)
        targets = [*self.samples, *self.references]
        labels = {name: name for name in ("category", "color", "pattern", "background")}
        accuracy, accuracy_without = (
            self._accuracy(_split_halves(images), labels, targets, targets) for images in (generated, without_edges)
        )
        return accuracy | {f"{name}, without edges": value for name, value in accuracy_without.items()}

    def _sample_of_other_category(self, i: int) -> WorldSample:
        category = self.samples[i].subject.category
        others = (self.samples[(i + n) % len(self.samples)] for n in range(1, len(self.samples)))
        return next((sample for sample in others if sample.subject.category != category), self.samples[i])

    def _save_images(self, name: str, images: Sequence[Image.Image]) -> list[str]:
        folder = self.folder / "inputs"
        folder.mkdir(parents=True, exist_ok=True)
        paths = [str(folder / f"{name}-{i}.png") for i in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            image.save(path)
        return paths

    def _generate(self, task: str, options: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
        """One image for each set of options; seeds count from 0."""
        images = []
        for seed, one in enumerate(options):
            images.append(generate_images(self.config.with_options(seed=seed, num_images=1, **one), self.models)[0].image)
            self.on_progress(task, seed + 1, len(options))
        return images

    def _mean_iou(self, images: Sequence[Image.Image], silhouettes: Sequence[Image.Image]) -> float:
        """Mean intersection over union of the segmented subjects with the silhouettes."""
        masks, truth = self.classifier.segment(images), np.stack([np.asarray(silhouette) > 127 for silhouette in silhouettes])
        return float(((masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2)).clip(1)).mean())

    def _accuracy(
        self, images: Sequence[Image.Image], labels: dict[str, str], categories: Sequence[WorldSample], others: Sequence[WorldSample]
    ) -> dict[str, float]:
        """Accuracy of the labeled attributes, where the category should be that of `categories` and everything else that of `others`."""
        targets = [o.attributes | {"category": c.subject.category} for c, o in zip(categories, others, strict=True)]
        predicted, expected = (
            [{labels[k]: row[k] for k in labels} for row in rows] for rows in (self.classifier.classify(images), targets)
        )
        return compute_attribute_accuracy(predicted, expected, "all")

    def _save_sheet(self, name: str, *columns: Sequence[Image.Image]) -> None:
        cells = [image for row in list(zip(*columns, strict=True))[:NUM_SHEET_ROWS] for image in row]
        with atomic_path(self.folder / f"{name}.png") as partial:
            make_contact_sheet([], cells, len(columns), 128).save(partial)


def plot_accuracy_vs_scale(scores: Mapping[float, Mapping[str, float]], num_samples: int) -> bytes:
    """The scores of the task image-text over the scale λ, with 95 % intervals of the accuracies, as a PNG."""

    def make_curve(name: str, *, interval: bool) -> Curve:
        half = {x: 1.96 * math.sqrt(s[name] * (1 - s[name]) / num_samples) if interval else 0.0 for x, s in scores.items()}
        return [(x, Interval(s[name], s[name] - half[x], s[name] + half[x])) for x, s in sorted(scores.items())]

    accuracies = ("category (text)", "appearance (image)", "background (image)", "all three")
    panels = {"accuracy": {name: make_curve(name, interval=True) for name in accuracies}}
    panels["cosine similarity"] = {name: make_curve(name, interval=False) for name in ("CLIP-I (mini)", "CLIP-T (mini)")}
    return plot_panels(panels, "scale λ of the image prompt")


def _bounding_box_mask(silhouette: Image.Image, margin: int = 4) -> Image.Image:
    """White in the bounding box of a silhouette."""
    left, top, right, bottom = silhouette.getbbox() or (0, 0, *silhouette.size)
    mask = Image.new("L", silhouette.size)
    mask.paste(255, (max(0, left - margin), max(0, top - margin), right + margin, bottom + margin))
    return mask


def _concatenate(images: Sequence[Image.Image]) -> Image.Image:
    """Images next to each other."""
    row = Image.new(images[0].mode, (world.SIZE * len(images), world.SIZE))
    for n, image in enumerate(images):
        row.paste(image, (n * world.SIZE, 0))
    return row


def _split_halves(images: Sequence[Image.Image]) -> list[Image.Image]:
    """The left halves of all images, and then the right ones."""
    return [image.crop((n * world.SIZE, 0, (n + 1) * world.SIZE, world.SIZE)) for n in range(2) for image in images]
