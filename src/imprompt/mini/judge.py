"""Mini against its bars: held-out prompts, drawn and scored by the judge and the second encoder.

The judge is a classifier of drawings that no other part has seen; CLIP-I and CLIP-T come from an encoder trained on its
own, with another architecture and other random numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, ResNetForImageClassification

from imprompt.mini import world
from imprompt.mini.tokenizer import tokenise
from imprompt.models.hub import MINI
from imprompt.models.image_prompt import ImagePrompt, Prompter, load
from imprompt.unet.injection import attach

Progress = Callable[[int, int], None]
BATCH = 50
ELSEWHERE = 5_000_000  # added to a scene's seed: another photograph of the same subject

# mini-world.md: task → what is scored → the least share that counts as reached.
BARS: dict[str, dict[str, float]] = {
    "real": {"kind": 0.98, "colour": 0.98, "background": 0.98, "pattern": 0.98},
    "text": {"kind": 0.97, "colour": 0.97, "background": 0.97, "pattern": 0.80, "all four": 0.75},
    "image": {"kind": 0.90, "colour": 0.95, "background": 0.97, "pattern": 0.70},
    "image-plus": {"kind": 0.95, "colour": 0.97, "pattern": 0.85},
    "image-text": {"kind (text)": 0.95, "colour (image)": 0.92, "background (image)": 0.97, "all three": 0.85},
    "multimodal": {"kind (text)": 0.9, "look (image)": 0.9},  # the same at the λ where both are right most often
    "edges": {"IoU, with ÷ without": 0.95, "colour (image)": 0.9, "pattern (image)": 0.9},
    "silhouette": {"IoU, with ÷ without": 0.95, "colour (image)": 0.9, "pattern (image)": 0.9},
    "inpaint": {"kind (image)": 0.9, "colour (image)": 0.9, "pattern (image)": 0.9},
    "regions": {"kind": 0.9, "colour": 0.9, "pattern": 0.9, "background": 0.9},
}
SCALES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Case:
    """One held-out prompt: a subject that nothing was trained on, in a combination never trained on, in a new scene."""

    subject: world.Subject
    scene: world.Scene
    other_kind: str  # what the text asks for in image + text

    @property
    def text(self) -> str:
        return world.full_caption(self.subject, self.scene)

    @property
    def photo(self) -> Image.Image:
        return world.draw(self.subject, self.scene)

    @property
    def truth(self) -> dict[str, str]:
        s = self.subject
        return {"kind": s.kind, "colour": s.colour, "background": self.scene.background, "pattern": s.pattern}


def cases(count: int) -> list[Case]:
    """The first `count` held-out prompts; always the same."""
    draws = world.subjects(held_out=True)
    found = []
    for i in range(count):
        subject = next(draws)
        other = world.KINDS[(world.KINDS.index(subject.kind) + 1 + i % (len(world.KINDS) - 1)) % len(world.KINDS)]
        found.append(Case(subject, world.scene(world.HELD_OUT_SCENES + i), other))
    return found


class Judge:
    """Reads the attributes of pictures, and compares them with pictures and texts."""

    def __init__(self, folder: Path = MINI):
        self.folder = folder
        self.classifier = ResNetForImageClassification.from_pretrained(folder / "judge").float().eval()
        self.clip = CLIPModel.from_pretrained(folder / "judge_clip").float().eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "judge_clip")
        self._names = [self.classifier.config.id2label[i].split(":") for i in range(self.classifier.config.num_labels)]

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        """The value of every attribute in each picture."""
        logits = torch.cat([self.classifier(pixel_values=part).logits for part in pixels(images).split(100)])
        found: list[dict[str, str]] = [{} for _ in images]
        for attribute in dict.fromkeys(name for name, _ in self._names):
            columns = self.columns(attribute)
            for row, best in zip(found, logits[:, columns].argmax(1).tolist(), strict=True):
                row[attribute] = self._names[columns[best]][1]
        return found

    @cached_property
    def _finder(self) -> UNet2DModel:
        return UNet2DModel.from_pretrained(self.folder / "judge_silhouette").float().eval()

    @torch.no_grad()
    def silhouettes(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Where the subject is seen in each picture: (pictures, height, width), bool."""
        return torch.cat([self._finder(part, 0).sample[:, 0] > 0 for part in pixels(images).split(100)]).numpy()

    def columns(self, attribute: str) -> list[int]:
        """Which of the classifier's outputs are the values of an attribute."""
        return [i for i, (name, _) in enumerate(self._names) if name == attribute]

    @torch.no_grad()
    def image_embeddings(self, images: Sequence[Image.Image]) -> Tensor:
        """(pictures, width), of length 1."""
        parts = pixels(images).split(100)
        return F.normalize(torch.cat([self.clip.get_image_features(pixel_values=p).pooler_output for p in parts]), dim=1)

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> Tensor:
        """(texts, width), of length 1."""
        return F.normalize(self.clip.get_text_features(input_ids=tokenise(self.tokenizer, list(texts))).pooler_output, dim=1)


def pixels(images: Sequence[Image.Image], size: tuple[int, int] = (world.SIZE, world.SIZE)) -> Tensor:
    """(pictures, 3, height, width) in −1 … 1, all brought to one size."""
    arrays = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_cases(
    pipe: Any,
    texts: Sequence[str],
    references: Sequence[Image.Image] | None,
    prompter: Prompter | None,
    scale: float,
    steps: int,
    guidance: float,
    progress: Progress,
) -> list[Image.Image]:
    """One picture for each text, each with its own reference and its own seed."""
    images: list[Image.Image] = []
    for start in range(0, len(texts), BATCH):
        part = slice(start, min(start + BATCH, len(texts)))
        settings = {
            "prompt": list(texts[part]),
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "generator": [torch.Generator().manual_seed(seed) for seed in range(part.start, part.stop)],
        }
        if prompter is None or references is None:
            images += pipe(**settings).images
        else:
            features = prompter.encoder.encode(references[part], prompter.spec.grid)[:, None]
            null = prompter.encoder.null(prompter.spec.grid)[None]
            with attach(pipe, ImagePrompt(prompter.adapter, features, null, scale)):
                images += pipe(**settings).images
        progress(part.stop, len(texts))
    return images


def agreement(seen: Sequence[dict[str, str]], wanted: Sequence[dict[str, str]], together: str) -> dict[str, float]:
    """The share of pictures in which each attribute is as wanted, and in which all of them are."""
    names = list(wanted[0])
    right = np.array([[s[name] == w[name] for name in names] for s, w in zip(seen, wanted, strict=True)])
    return {name: float(share) for name, share in zip(names, right.mean(0), strict=True)} | {together: float(right.all(1).mean())}


@dataclass
class Bench:
    """The tasks, each giving its figures. `say(task, done, total)` reports progress."""

    pipe: Any
    prompts: Sequence[Case]
    steps: int
    guidance: float
    say: Callable[[str, int, int], None]

    def __post_init__(self) -> None:
        self.judge = Judge()
        self.photos = [case.photo for case in self.prompts]

    def _draw(self, task: str, texts: Sequence[str], adapter: str | None, scale: float = 1.0) -> list[Image.Image]:
        prompter = load(adapter) if adapter else None
        note: Progress = lambda done, total: self.say(task, done, total)  # noqa: E731
        return draw_cases(self.pipe, texts, self.photos, prompter, scale, self.steps, self.guidance, note)

    def real(self) -> dict[str, float]:
        """The judge on real held-out photographs."""
        return agreement(self.judge.read(self.photos), [c.truth for c in self.prompts], "all four")

    def text(self) -> dict[str, float]:
        """Text → picture."""
        images = self._draw("text", [c.text for c in self.prompts], None)
        return agreement(self.judge.read(images), [c.truth for c in self.prompts], "all four") | self._clip(images)

    def image(self, adapter: str = "mini", task: str = "image") -> dict[str, float]:
        """Image → picture, empty text, λ = 1."""
        images = self._draw(task, [""] * len(self.prompts), adapter)
        return agreement(self.judge.read(images), [c.truth for c in self.prompts], "all four") | self._clip(images)

    def image_plus(self) -> dict[str, float]:
        """The same with the fine-grained adapter."""
        return self.image("mini-plus", "image-plus")

    def image_text(self, scale: float) -> dict[str, float]:
        """An image and the name of another kind: kind from the text; colour, pattern (the look) and background from the image."""
        images = self._draw(f"image-text λ {scale}", [f"a {c.other_kind}" for c in self.prompts], "mini", scale)
        names = {"kind": "kind (text)", "colour": "colour (image)", "background": "background (image)"}
        read = self.judge.read(images)
        seen = [{names[k]: v for k, v in row.items() if k in names} for row in read]
        wanted = [
            {names["kind"]: c.other_kind, names["colour"]: c.subject.colour, names["background"]: c.scene.background} for c in self.prompts
        ]
        texts = self.judge.text_embeddings([f"a {c.other_kind}" for c in self.prompts])
        clip = self._clip(images) | {"CLIP-T": float((self.judge.image_embeddings(images) * texts).sum(1).mean())}
        look = [[row[k] == c.truth[k] for k in ("colour", "pattern")] for row, c in zip(read, self.prompts, strict=True)]
        more = {"pattern (image)": float(np.mean([p for _, p in look])), "look (image)": float(np.mean([all(both) for both in look]))}
        return agreement(seen, wanted, "all three") | more | clip

    def clip_rows(self) -> dict[str, float]:
        """CLIP-I of a copy of the reference, and of another real photograph of the same subject."""
        others = [world.draw(c.subject, world.scene(c.scene.seed + ELSEWHERE)) for c in self.prompts]
        return {"copy": self._clip(self.photos)["CLIP-I"], "real": self._clip(others)["CLIP-I"]}

    def _clip(self, images: Sequence[Image.Image]) -> dict[str, float]:
        drawn, wanted = self.judge.image_embeddings(images), self.judge.image_embeddings(self.photos)
        texts = self.judge.text_embeddings([c.text for c in self.prompts])
        return {"CLIP-I": float((drawn * wanted).sum(1).mean()), "CLIP-T": float((drawn * texts).sum(1).mean())}
