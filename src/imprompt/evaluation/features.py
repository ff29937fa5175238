"""Feature extractors of the metrics. None may be a model that conditions the systems under comparison."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from imprompt.config.evaluation import MetricsConfig
from imprompt.errors import UserError
from imprompt.mini.attribute_classifier import AttributeClassifier, images_to_tensor
from imprompt.models import hub
from imprompt.models.clip_score import CLIPScorer

FeatureFn = Callable[[Sequence[Image.Image]], dict[str, Tensor]]


class FeatureExtractors:
    """The models that an evaluation's metrics need, on one device.

    Features by name: `clip_embeds` for CLIP-I, CLIP-T and CMMD; `features` for Fréchet and kernel distance and feature cosine;
    `class_probs` for the Inception Score; `patches` for self-similarity distance.
    """

    def __init__(self, metrics: MetricsConfig, device: str = "cpu"):
        assert metrics.clip_model is not None and metrics.feature_extractor is not None
        self.clip = CLIPScorer.load(metrics.clip_model)
        self.clip.model.to(device)
        self._extract_features = _load_feature_fn(metrics.feature_extractor, device)
        self.lpips = _load_lpips(device) if metrics.lpips else None

    @torch.no_grad()
    def extract_features(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Features by name, a row for each image, in float32 on the CPU."""
        clip_embeds = self.clip.embed_images(images).float().cpu()
        others = {"features": clip_embeds} if self._extract_features is None else self._extract_features(images)
        return {"clip_embeds": clip_embeds} | {name: value.float().cpu() for name, value in others.items()}

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """(prompts, width), at unit length: for CLIP-T."""
        return self.clip.embed_prompts(prompts).float().cpu()


def _load_feature_fn(feature_extractor: str, device: str) -> FeatureFn | None:
    """mini, inception or an image model; None for clip, whose embeddings are the features."""
    match feature_extractor:
        case "clip":
            return None
        case "mini":
            return _load_mini()
        case "inception":
            return _load_inception(device)
    return _load_image_model(feature_extractor, device)


def _load_mini() -> FeatureFn:
    """Mini's attribute classifier: its pooled features, and the joint posterior of category and color, 90 classes."""
    classifier = AttributeClassifier()
    model: Any = classifier.model
    category_indices, color_indices = (classifier.logit_indices(name) for name in ("category", "color"))

    def extract(images: Sequence[Image.Image]) -> dict[str, Tensor]:
        output = model.resnet(images_to_tensor(images), output_hidden_states=True)
        logits = model.classifier(output.pooler_output)
        category, color = logits[:, category_indices].softmax(1), logits[:, color_indices].softmax(1)
        return {
            "features": F.normalize(output.pooler_output.flatten(1), dim=1) * output.pooler_output.shape[1] ** 0.5,
            "class_probs": (category[:, :, None] * color[:, None]).flatten(1),
            "patches": output.hidden_states[-2].flatten(2).transpose(1, 2),
        }

    return extract


def _load_inception(device: str) -> FeatureFn:
    """Inception-v3 with the weights that publications use for FID, KID and Inception Score."""
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        model = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).to(device)
    except (ImportError, ModuleNotFoundError) as error:
        raise UserError("Inception needs torch-fidelity; install it with: pip install 'imprompt[inception]'") from error

    def extract(images: Sequence[Image.Image]) -> dict[str, Tensor]:
        tensors = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] for image in images]
        outputs = [model(tensor.to(device)) for tensor in tensors]  # one by one: references differ in size
        features, logits = (torch.cat(column) for column in zip(*outputs, strict=True))
        return {"features": features, "class_probs": logits.softmax(1)}

    return extract


def _load_lpips(device: str) -> Callable[[Sequence[Image.Image], Sequence[Image.Image]], Tensor]:
    """LPIPS (arXiv:1801.03924) of pairs of images, by torchmetrics: (pairs,), 0 …, lower is more similar."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity("alex", reduction="none").to(device)
    except (ImportError, RuntimeError) as error:
        raise UserError("LPIPS needs a torchvision that works; install it with: pip install 'imprompt[inception]'") from error

    def compute(images: Sequence[Image.Image], targets: Sequence[Image.Image]) -> Tensor:
        size = images[0].size
        pairs = (images, [target.resize(size) for target in targets])
        a, b = (torch.cat([images_to_tensor([image], size) for image in side]).to(device) for side in pairs)
        distances = metric(a, b).float().cpu().reshape(-1)
        metric.reset()  # it would keep every value
        return distances

    return compute


def _load_image_model(source: str, device: str) -> FeatureFn:
    """Any image model of transformers: its class token (DINO), else its pooled output, else the mean of its patches."""
    from transformers import AutoImageProcessor, AutoModel

    hub.prepare(source)
    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        model = AutoModel.from_pretrained(source, trust_remote_code=False).to(device).eval()
    except Exception as error:  # for missing, damaged and other models the library raises nearly anything
        raise UserError(
            f"feature_extractor: no image model at {source} ({hub.explain_failure(error)}); "
            "expected mini, clip, inception, a folder or hub id"
        ) from error

    has_class_token = any(name.endswith(("cls_token", "class_embedding")) for name, _ in model.named_parameters())

    def extract(images: Sequence[Image.Image]) -> dict[str, Tensor]:
        output = model(**processor(images=list(images), return_tensors="pt").to(device))
        states = output.last_hidden_state
        patches = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states[:, 1:] if has_class_token else states
        pooled = states[:, 0] if has_class_token and states.ndim == 3 else getattr(output, "pooler_output", None)
        return {"features": patches.mean(1) if pooled is None else pooled.flatten(1), "patches": patches}

    return extract
