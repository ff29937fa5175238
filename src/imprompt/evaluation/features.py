"""What looks at the pictures. None of it may be what conditions the models that are compared."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from imprompt.errors import UserError, brief
from imprompt.mini.judge import Judge, pixels
from imprompt.models.clip_score import Similarity

Look = Callable[[Sequence[Image.Image]], dict[str, Tensor]]


class Eyes:
    """Pictures → features: `clip` for CLIP-I, CLIP-T and CMMD; `features` for FID and KID; `classes` for the Inception
    Score; `patches` for self-similarity.

    judge: a CLIP model. features: mini (the judge's classifier), clip, inception (an extra), or an image model.
    """

    def __init__(self, judge: str, features: str, device: str = "cpu", lpips: bool = False):
        self.similarity = Similarity.load(judge)
        self.similarity.model.to(device)
        self.names = {"CLIP-I, CLIP-T, CMMD": judge, "FID, KID": features, "device": device}
        self._look = _look(features, device)
        self.lpips = _lpips(device) if lpips else None

    @torch.no_grad()
    def see(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """A row for each picture."""
        clip = self.similarity.images(images).float().cpu()
        more = {"features": clip} if self._look is None else self._look(images)
        return {"clip": clip} | {name: value.float().cpu() for name, value in more.items()}

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        """(texts, width), of length 1: for CLIP-T."""
        return self.similarity.texts(texts).float().cpu()


def _look(features: str, device: str) -> Look | None:
    match features:
        case "clip":
            return None
        case "mini":
            return _mini()
        case "inception":
            return _inception(device)
    return _model(features, device)


def _mini() -> Look:
    """The judge: its pooled features, and what kind and colour it sees as one posterior of 90 classes."""
    judge = Judge()
    model: Any = judge.classifier
    groups = {name: judge.columns(name) for name in ("kind", "colour")}

    def look(images: Sequence[Image.Image]) -> dict[str, Tensor]:
        seen = model.resnet(pixels(images), output_hidden_states=True)
        logits = model.classifier(seen.pooler_output)
        kind, colour = (logits[:, groups[name]].softmax(1) for name in ("kind", "colour"))
        return {
            "features": F.normalize(seen.pooler_output.flatten(1), dim=1) * seen.pooler_output.shape[1] ** 0.5,
            "classes": (kind[:, :, None] * colour[:, None]).flatten(1),
            "patches": seen.hidden_states[-2].flatten(2).transpose(1, 2),
        }

    return look


def _inception(device: str) -> Look:
    """Inception v3 as publications use it, for figures that compare with theirs."""
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        model = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).to(device)
    except (ImportError, ModuleNotFoundError) as error:
        raise UserError("Inception needs torch-fidelity; install it with: pip install 'imprompt[inception]'") from error

    def look(images: Sequence[Image.Image]) -> dict[str, Tensor]:
        found = [
            model(torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1)[None].to(device)) for i in images
        ]  # references differ in size
        seen, logits = (torch.cat(column) for column in zip(*found, strict=True))
        return {"features": seen, "classes": logits.softmax(1)}

    return look


def _lpips(device: str) -> Callable[[Sequence[Image.Image], Sequence[Image.Image]], Tensor]:
    """Perceptual distance of pairs of pictures (arXiv:1801.03924), by torchmetrics: (pairs,), 0 …, lower is more alike."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        measure = LearnedPerceptualImagePatchSimilarity("alex", reduction="none").to(device)
    except (ImportError, RuntimeError) as error:
        raise UserError("LPIPS needs a torchvision that works; install it with: pip install 'imprompt[inception]'") from error

    def distance(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> Tensor:
        size = a[0].size
        left, right = (torch.cat([pixels([i], size) for i in images]).to(device) for images in (a, [i.resize(size) for i in b]))
        found = measure(left, right).float().cpu().reshape(-1)
        measure.reset()  # it would keep every value
        return found

    return distance


def _model(source: str, device: str) -> Look:
    """Any image model of transformers: its class token (DINO), else its pooled output, else the mean of its patches."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor, model = AutoImageProcessor.from_pretrained(source), AutoModel.from_pretrained(source).to(device).eval()
    except Exception as error:  # for missing, damaged and other models the library raises nearly anything
        raise UserError(
            f"features: no image model at {source} ({brief(error)}); expected mini, clip, inception, a folder or hub id"
        ) from error

    classed = any(name.endswith(("cls_token", "class_embedding")) for name, _ in model.named_parameters())

    def look(images: Sequence[Image.Image]) -> dict[str, Tensor]:
        seen = model(**processor(images=list(images), return_tensors="pt").to(device))
        states = seen.last_hidden_state
        patches = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states[:, 1:] if classed else states
        summary = states[:, 0] if classed and states.ndim == 3 else getattr(seen, "pooler_output", None)
        return {"features": patches.mean(1) if summary is None else summary.flatten(1), "patches": patches}

    return look
