"""Who is in a picture, for encoders of identity. None may be the one that conditions what is compared: it would score itself.

The figures (`centroid`, `likeness`, `recognised`, `threshold`) are in metrics.py.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import ResNetForImageClassification

from imprompt.errors import UserError, brief
from imprompt.mini.judge import pixels
from imprompt.models.face_encoders import FaceNet, InsightFace
from imprompt.models.hub import MINI


class Identity(Protocol):
    """Pictures → who is in them."""

    name: str

    def embed(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Embeddings (n, width) of length 1, zeros where nobody was found; and whether someone was, (n,) bool. On the CPU."""
        ...


def load_identity(source: str, device: str = "cpu") -> Identity:
    """`mini` for mini's subjects; for faces `insightface` or `facenet`, which need packages and fetch their models.

    UserError for any other source, for missing packages (with the line that installs them) and for models that do not load.
    """
    sources: dict[str, Callable[[str], Identity]] = {"mini": Subjects, "insightface": InsightFace, "facenet": FaceNet}
    if source not in sources:
        raise UserError(f"identity: expected one of {', '.join(sources)}, received {source!r}")
    return sources[source](device)


class Subjects:
    """Mini's own (imprompt.recipes.identity). A picture of mini's world holds a subject, so someone is always found."""

    name = "mini identity"

    def __init__(self, device: str = "cpu"):
        self.device = device
        place, remedy = MINI / "identity", "reinstall imprompt, or build mini anew with: imprompt mini make --install"
        if not place.is_dir():  # else taken for a name on the hub
            raise UserError(f"identity: mini's encoder is not there; expected it in {place}: {remedy}")
        try:
            model = ResNetForImageClassification.from_pretrained(place, dtype=torch.float32)
        except Exception as error:  # for damaged files the library raises nearly anything
            raise UserError(f"identity: mini's encoder in {place} does not load ({brief(error)}): {remedy}") from error
        self.model = model.to(device).eval()

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        parts = [self.model(pixel_values=part.to(self.device)).logits for part in pixels(images).split(100)]
        return F.normalize(torch.cat(parts), dim=1).cpu(), torch.ones(len(images), dtype=torch.bool)
