"""Identity encoders, and the gallery of subjects that generated images are compared with.

An encoder must not evaluate a method that it conditions. The metrics are in metrics.py.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import ResNetForImageClassification

from imprompt.errors import ImageError, UserError, summarize_error
from imprompt.evaluation.metrics import identity_centroid
from imprompt.evaluation.samples import SubjectEvalSet
from imprompt.evaluation.store import compute_checksum
from imprompt.mini.attribute_classifier import images_to_tensor
from imprompt.models.face_encoders import FaceNet, InsightFace
from imprompt.models.hub import MINI_PATH
from imprompt.utils.files import atomic_path

MAX_GALLERY_IMAGES = 16  # per subject


class IdentityEncoder(Protocol):
    """Embeds the identity that an image shows."""

    name: str

    def embed(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Embeddings (n, width) at unit length, zeros where no identity was detected; and whether one was, (n,) bool. On the CPU."""
        ...


def load_identity_encoder(source: str, device: str = "cpu") -> IdentityEncoder:
    """`mini` for mini's subjects; for faces `insightface` or `facenet`, which need packages and download their models.

    Raises UserError for any other source, for missing packages (with the line that installs them) and for models that do not load.
    """
    encoders: dict[str, Callable[[str], IdentityEncoder]] = {"mini": MiniIdentityEncoder, "insightface": InsightFace, "facenet": FaceNet}
    if source not in encoders:
        raise UserError(f"identity_encoder: expected one of {', '.join(encoders)}, received {source!r}")
    return encoders[source](device)


class MiniIdentityEncoder:
    """The encoder of mini's subjects (imprompt.recipes.identity). Every image of mini's world has one, so it is always detected."""

    name = "mini identity"

    def __init__(self, device: str = "cpu"):
        self.device = device
        path, remedy = MINI_PATH / "identity", "reinstall imprompt, or build mini again with: imprompt mini build --install"
        if not path.is_dir():  # transformers would take it for a hub id
            raise UserError(f"identity_encoder: mini's encoder is not there; expected it in {path}: {remedy}")
        try:
            model = ResNetForImageClassification.from_pretrained(path, dtype=torch.float32)
        except Exception as error:  # for damaged files the library raises nearly anything
            raise UserError(f"identity_encoder: mini's encoder in {path} does not load ({summarize_error(error)}): {remedy}") from error
        self.model = model.to(device).eval()

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Embeddings, (n, width), at unit length on the CPU; the identity is detected in every image."""
        logits = [self.model(pixel_values=batch.to(self.device)).logits for batch in images_to_tensor(images).split(100)]
        return F.normalize(torch.cat(logits), dim=1).cpu(), torch.ones(len(images), dtype=torch.bool)


class IdentityGallery(NamedTuple):
    """The subjects of an evaluation, by their real images."""

    centroids: Tensor  # (subjects, width): the mean embedding of a subject's images, L2-normalized; zeros where no identity was detected
    has_embedding: Tensor  # (subjects,) bool: whether the identity was detected in any of them


@torch.no_grad()
def build_gallery(encoder: IdentityEncoder, eval_set: SubjectEvalSet) -> IdentityGallery:
    """Embed at most MAX_GALLERY_IMAGES images of each subject that are not targets. Raises UserError where no identity is detected."""
    centroids: dict[int, Tensor] = {}
    for subject in range(len(eval_set.subjects)):
        with suppress(ImageError):  # none of its images can be opened
            embeddings, detected = encoder.embed(eval_set.gallery_images(subject, MAX_GALLERY_IMAGES))
            if detected.any():
                centroids[subject] = identity_centroid(embeddings, detected)
    if not centroids:
        raise UserError("no identity was detected in any image; expected other data, or another --identity-encoder")
    zeros = torch.zeros_like(next(iter(centroids.values())))
    stacked = torch.stack([centroids.get(subject, zeros) for subject in range(len(eval_set.subjects))])
    return IdentityGallery(stacked.float(), stacked.any(1))


def load_or_build_gallery(path: Path, encoder: IdentityEncoder, eval_set: SubjectEvalSet) -> IdentityGallery:
    """The gallery from its file; rebuilt if the images or the encoder changed, or the file cannot be read."""
    metadata = {"built from": f"{encoder.name} {eval_set.fingerprint} {len(eval_set.subjects)}"}
    gallery = _read_gallery(path, metadata)
    if gallery is None:
        gallery = build_gallery(encoder, eval_set)
        with atomic_path(path) as partial:
            tensors = gallery._asdict()
            safetensors.torch.save_file(tensors, partial, metadata | {"checksum": compute_checksum(tensors, "")})
    return gallery


def _read_gallery(path: Path, expected: Mapping[str, str]) -> IdentityGallery | None:
    """A stored gallery; None where there is none, or it is damaged or of something else."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum = compute_checksum(tensors, "")
            return IdentityGallery(**tensors) if file.metadata() == {**expected, "checksum": checksum} else None
    except Exception:  # a damaged header can raise nearly any exception
        return None
