"""The attribute classifier and the segmentation model that evaluate images of the embedded model and of its synthetic dataset, `world`.

Both were trained on subjects and scenes of their own, and no other part of mini was trained with them.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor
from transformers import ResNetForImageClassification

from imprompt.mini import world
from imprompt.models.hub import MINI_PATH

_BATCH_SIZE = 100
_ATTRIBUTE_OF_LABEL = {"kind": "category", "colour": "color", "second_colour": "second_color"}  # as the shipped weights name them


class AttributeClassifier:
    """A ResNet with one group of logits per attribute of an image, and a UNet that segments the subject."""

    def __init__(self, folder: Path = MINI_PATH):
        self.folder = folder
        self.model = ResNetForImageClassification.from_pretrained(folder / "judge").float().eval()
        labels = [self.model.config.id2label[i].split(":") for i in range(self.model.config.num_labels)]
        self._labels = [(_ATTRIBUTE_OF_LABEL.get(attribute, attribute), value) for attribute, value in labels]

    @torch.no_grad()
    def classify(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        """The most probable value of every attribute in each image."""
        logits = torch.cat([self.model(pixel_values=batch).logits for batch in images_to_tensor(images).split(_BATCH_SIZE)])
        predictions: list[dict[str, str]] = [{} for _ in images]
        for attribute in dict.fromkeys(attribute for attribute, _ in self._labels):
            indices = self.logit_indices(attribute)
            for prediction, best in zip(predictions, logits[:, indices].argmax(1).tolist(), strict=True):
                prediction[attribute] = self._labels[indices[best]][1]
        return predictions

    def logit_indices(self, attribute: str) -> list[int]:
        """Indices of the logits that belong to the values of an attribute."""
        return [i for i, (name, _) in enumerate(self._labels) if name == attribute]

    @cached_property
    def _segmenter(self) -> UNet2DModel:
        return UNet2DModel.from_pretrained(self.folder / "judge_silhouette").float().eval()

    @torch.no_grad()
    def segment(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Masks of the subject, (images, height, width), bool."""
        return torch.cat([self._segmenter(batch, 0).sample[:, 0] > 0 for batch in images_to_tensor(images).split(_BATCH_SIZE)]).numpy()


def images_to_tensor(images: Sequence[Image.Image], size: tuple[int, int] = (world.SIZE, world.SIZE)) -> Tensor:
    """(images, 3, height, width) in −1 … 1, resized to `size` (width, height) by bicubic interpolation."""
    arrays = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
