"""CLIP-I and CLIP-T: cosine similarity of images with reference images and with prompts, in the embedding space of a CLIP model."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from imprompt.errors import UserError
from imprompt.models import hub
from imprompt.models.hub import MINI_PATH
from imprompt.models.image_encoders import FeatureEncoder

CLIP_VIT_L = "openai/clip-vit-large-patch14"  # computes CLIP-I and CLIP-T in IP-Adapter (Ye et al., 2023, arXiv:2308.06721, table 1)


def metric_with_model(metric: str, model: str | Path, published_model: str = "") -> str:
    """The label of a metric with the model that computed it, `KD (mini) × 1000`; without it for the model that publications use."""
    if str(model) == published_model:
        return metric
    name, times, factor = metric.partition(" × ")
    return f"{name} ({Path(model).name if Path(model).is_dir() else model}){times}{factor}"


class CLIPScorer:
    """A CLIP model used as a metric; best one that no evaluated method was trained with. `source` names it in the metrics' labels."""

    def __init__(self, model: CLIPModel, processor: CLIPImageProcessor, tokenizer: CLIPTokenizer, source: str | Path):
        self.model, self.processor, self.tokenizer = model.eval().requires_grad_(False), processor, tokenizer
        self.source = source

    @classmethod
    def load(cls, source: str | Path) -> "CLIPScorer":
        """`mini`, a folder or a hub id, such as CLIP_VIT_L. Raises UserError."""
        location = MINI_PATH / "judge_clip" if source == "mini" else source
        hub.prepare(location)
        try:
            model = CLIPModel.from_pretrained(location, dtype=torch.float32)
            processor, tokenizer = CLIPImageProcessor.from_pretrained(location), CLIPTokenizer.from_pretrained(location)
        except Exception as error:  # missing, damaged and other models make the library raise nearly any exception
            raise UserError(f"no CLIP model at {source} ({hub.explain_failure(error)}); expected mini, a folder or a hub id") from error
        return cls(model, processor, tokenizer, source)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Normalized image embeddings, (images, embed_dim)."""
        pixels = self.processor(images=list(images), return_tensors="pt").pixel_values.to(self.model.device, self.model.dtype)
        return F.normalize(torch.cat([self.model.get_image_features(pixel_values=part).pooler_output for part in pixels.split(100)]), dim=1)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Normalized text embeddings, (prompts, embed_dim)."""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids.to(self.model.device)
        return F.normalize(self.model.get_text_features(input_ids=tokens).pooler_output, dim=1)

    def compute_scores(self, images: Sequence[Image.Image], references: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, float]:
        """Mean cosine similarity of generated images with their references, CLIP-I, and with their prompts, CLIP-T; −1 … 1 each."""
        embeds = self.embed_images(images)
        return {
            metric_with_model("CLIP-I", self.source, CLIP_VIT_L): float((embeds * self.embed_images(references)).sum(1).mean()),
            metric_with_model("CLIP-T", self.source, CLIP_VIT_L): float((embeds * self.embed_prompts(prompts)).sum(1).mean()),
        }


class EncoderSimilarity:
    """CLIP-I by the image encoder that the method is conditioned with, where no other model is available. It is biased upwards."""

    def __init__(self, encoder: FeatureEncoder):
        self.encoder = encoder

    def compute_scores(self, images: Sequence[Image.Image], references: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, float]:
        """Mean cosine similarity of generated images with their references, −1 … 1. `prompts` are not used."""
        a, b = (F.normalize(self.encoder.encode_images(i, patches=False)[:, 0].float(), dim=1) for i in (images, references))
        return {"CLIP-I (own encoder)": float((a * b).sum(1).mean())}
