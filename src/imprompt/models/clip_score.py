"""CLIP-I and CLIP-T: how like a picture is to another, and to a text, in the eyes of a CLIP."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from imprompt.errors import UserError, brief
from imprompt.models.hub import MINI
from imprompt.models.image_encoders import ImageEncoder


class Similarity:
    """An image-text encoder as a measure. Best one that nothing was trained with."""

    def __init__(self, model: CLIPModel, processor: CLIPImageProcessor, tokenizer: CLIPTokenizer):
        self.model, self.processor, self.tokenizer = model.eval().requires_grad_(False), processor, tokenizer

    @classmethod
    def load(cls, source: str | Path) -> "Similarity":
        """`mini`, a folder or a hub id such as openai/clip-vit-large-patch14, the paper's choice."""
        place = MINI / "judge_clip" if source == "mini" else source
        try:
            model = CLIPModel.from_pretrained(place, dtype=torch.float32)
            return cls(model, CLIPImageProcessor.from_pretrained(place), CLIPTokenizer.from_pretrained(place))
        except Exception as error:  # for missing, damaged and other models the library raises nearly anything
            raise UserError(f"no CLIP model at {source} ({brief(error)}); expected mini, a folder or a hub id") from error

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """(pictures, width), of length 1."""
        pixels = self.processor(images=list(images), return_tensors="pt").pixel_values.to(self.model.device, self.model.dtype)
        return F.normalize(torch.cat([self.model.get_image_features(pixel_values=part).pooler_output for part in pixels.split(100)]), dim=1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(texts, width), of length 1."""
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids.to(self.model.device)
        return F.normalize(self.model.get_text_features(input_ids=tokens).pooler_output, dim=1)

    def figures(self, drawn: Sequence[Image.Image], references: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, float]:
        """Mean cosines of the drawn pictures with their references, CLIP-I, and with their texts, CLIP-T."""
        mine = self.images(drawn)
        return {
            "CLIP-I": float((mine * self.images(references)).sum(1).mean()),
            "CLIP-T": float((mine * self.texts(texts)).sum(1).mean()),
        }


class OwnEyes:
    """CLIP-I by the very encoder that conditions: what is left where no other is given. It flatters, so it is named so."""

    def __init__(self, encoder: ImageEncoder):
        self.encoder = encoder

    def figures(self, drawn: Sequence[Image.Image], references: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, float]:
        """The mean cosine of the drawn pictures with their references."""
        a, b = (F.normalize(self.encoder.encode(images, grid=False)[:, 0].float(), dim=1) for images in (drawn, references))
        return {"CLIP-I (its own encoder)": float((a * b).sum(1).mean())}
