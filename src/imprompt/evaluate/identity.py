"""Who is in a picture, for encoders of identity. None may be the one that conditions what is compared: it would score itself.

The figures (`centroid`, `likeness`, `recognised`, `threshold`) are in metrics.py.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import ResNetForImageClassification

from imprompt.errors import UserError, brief
from imprompt.hub import MINI
from imprompt.mini.judging import pixels

_FACE = 512  # width of both face embeddings
_CROP = 160  # pixels of the face that FaceNet sees


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
    """Mini's own (imprompt.mini.identity). A picture of mini's world holds a subject, so someone is always found."""

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


class InsightFace:
    """ArcFace (arXiv:1801.07698) on the largest face that SCRFD finds, turned upright by its five points. For research only:
    the models' licence is not commercial.

    SCRFD misses faces that fill the picture. Where it finds none, it looks once more with a margin of half the picture around.
    """

    name = "insightface buffalo_l"

    def __init__(self, device: str = "cpu"):
        try:
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise UserError("insightface is not installed; install it with: pip install 'imprompt[faces]'") from error
        place = torch.device(device)
        cuda = place.type == "cuda"
        providers = ["CUDAExecutionProvider"] * cuda + ["CPUExecutionProvider"]
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints every model that it finds
                self.faces = FaceAnalysis("buffalo_l", allowed_modules=["detection", "recognition"], providers=providers)
                self.faces.prepare(ctx_id=(place.index or 0) if cuda else -1, det_size=(640, 640))
        except Exception as error:  # a download, an archive, ONNX: nearly anything
            message = f"insightface's models do not load ({brief(error)}); they are fetched once, to ~/.insightface/models/buffalo_l"
            raise UserError(message) from error

    def embed(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        return _gathered([self._largest(np.asarray(image.convert("RGB"))[:, :, ::-1].copy()) for image in images])

    def _largest(self, bgr: np.ndarray) -> Tensor | None:
        height, width = bgr.shape[:2]
        margin = ((height // 2, height // 2), (width // 2, width // 2), (0, 0))
        faces: list[Any] = self.faces.get(bgr) or self.faces.get(np.pad(bgr, margin))
        if not faces:
            return None
        largest = max(faces, key=lambda face: (face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1]))
        return torch.from_numpy(np.asarray(largest.normed_embedding)).float()


class FaceNet:
    """FaceNet (arXiv:1503.03832), trained on VGGFace2, on the largest face that MTCNN (arXiv:1604.02878) finds.

    The face is cut out and scaled, not turned: facenet-pytorch aligns no further, and its weights are trained on such crops.
    """

    name = "facenet vggface2"

    def __init__(self, device: str = "cpu"):
        try:
            from facenet_pytorch import MTCNN, InceptionResnetV1
        except ImportError as error:
            raise UserError(
                "facenet-pytorch is not installed, or torchvision is not; install it without the old torch that it pins: "
                "pip install --no-deps facenet-pytorch"
            ) from error
        self.device = device
        try:
            self.detector = MTCNN(image_size=_CROP, margin=0, select_largest=True, device=device)
            self.model = InceptionResnetV1(pretrained="vggface2").to(device).eval()
        except Exception as error:  # a download, an archive: nearly anything
            raise UserError(f"FaceNet's weights do not load ({brief(error)}); they are fetched once, from github.com") from error

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        crops = [self.detector(image.convert("RGB")) for image in images]  # in a batch all would have to be of one size
        return _gathered([None if crop is None else self.model(crop[None].to(self.device))[0].float().cpu() for crop in crops])


def _gathered(rows: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Embeddings as `Identity.embed` promises them, None for nobody."""
    found = torch.tensor([row is not None for row in rows], dtype=torch.bool)
    embeddings = torch.zeros(len(rows), _FACE)
    for i, row in enumerate(rows):
        if row is not None:
            embeddings[i] = F.normalize(row, dim=0)
    return embeddings, found
