"""The distribution of an image encoder's features over the training images of its model; a reference far from them is recognized by it."""

from pathlib import Path
from typing import Protocol, Self

import safetensors.torch
import torch
from torch import Tensor

from imprompt.errors import UserError, summarize_error

FILE_NAME = "feature_distribution.safetensors"  # next to the weights of the image encoder
MAX_FALSE_ALARMS = 0.01  # share of images of the same world that may count as far


class FeatureDistribution:
    """Mean and covariance of feature vectors, and the Mahalanobis distance beyond which an image is not like them."""

    def __init__(self, mean: Tensor, whitening: Tensor, max_distance: float):
        self.mean, self.whitening, self.max_distance = mean, whitening, max_distance

    @classmethod
    def fit(cls, features: Tensor, held_out: Tensor) -> Self:
        """From the features of training images, and of held-out ones, of which MAX_FALSE_ALARMS are beyond `max_distance`.

        features and held_out: (images, dim), many more images than dimensions.
        """
        features = features.double()
        mean, (values, vectors) = features.mean(0), torch.linalg.eigh(torch.cov(features.T))
        whitening = vectors / values.clamp(min=1e-6 * float(values.max())).sqrt()
        fitted = cls(mean.float(), whitening.float(), 0.0)
        fitted.max_distance = float(fitted.distances(held_out).quantile(1 - MAX_FALSE_ALARMS))
        return fitted

    def distances(self, features: Tensor) -> Tensor:
        """The Mahalanobis distance of each feature vector: (images, dim) → (images,)."""
        return ((features.float().cpu() - self.mean) @ self.whitening).norm(dim=-1)

    def save(self, folder: Path) -> None:
        """Write it into the folder of the image encoder."""
        tensors = {"mean": self.mean, "whitening": self.whitening.contiguous(), "max_distance": torch.tensor(self.max_distance)}
        safetensors.torch.save_file(tensors, folder / FILE_NAME)

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """That of an image encoder's folder; None where there is none. Raises UserError for a damaged file."""
        path = folder / FILE_NAME
        if not path.is_file():
            return None
        try:
            tensors = safetensors.torch.load_file(path)
            return cls(tensors["mean"], tensors["whitening"], float(tensors["max_distance"]))
        except Exception as error:  # safetensors has its own error types
            raise UserError(f"{path} is damaged ({summarize_error(error)}); delete it, or install imprompt again") from error


class EncodesPixels(Protocol):
    """An encoder of preprocessed images."""

    def encode_pixels(self, pixels: Tensor, *, patches: bool) -> Tensor:
        """(images, 3, side, side) → (images, patches, embed_dim)."""
        ...


def distribution_features(encoder: EncodesPixels, pixels: Tensor) -> Tensor:
    """What the distribution is of: the pooled embedding and the mean of the patch features, (images, dim)."""
    parts = [encoder.encode_pixels(pixels, patches=patches).float().mean(1) for patches in (False, True)]
    return torch.cat(parts, dim=1)
