"""Faces: found, turned upright and embedded by InsightFace or FaceNet; embeddings that are in files; what FaceID hears."""

import contextlib
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from imprompt import checkpoints
from imprompt.encoders import Encoder
from imprompt.errors import ImageError, UserError, brief

_FACE = 512  # width of both face embeddings
_CROP = 160  # pixels of the face that FaceNet sees


def read_faces(source: Tensor | np.ndarray | str | Path, width: int) -> Tensor:
    """Identity embeddings, (faces, width), from a tensor, an array or a file: `.npy`, or `.safetensors` with one tensor."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        try:
            if path.suffix == ".npy":
                source = np.load(path, allow_pickle=False)
            elif path.suffix == ".safetensors":
                (source,) = checkpoints.read_tensors(path)[0].values()
            else:
                raise UserError(
                    f"{path.name}: expected an identity embedding as .npy or .safetensors, received {path.suffix or 'no suffix'}"
                )
        except (OSError, ValueError) as error:
            raise UserError(f"{path.name} holds no identity embedding that can be read ({brief(error)})") from error
    try:
        found = torch.as_tensor(source).float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"expected identity embeddings as a tensor, an array or a file, received {type(source).__name__}") from error
    found = found[None] if found.ndim == 1 else found.flatten(0, -2)
    if found.shape[1] != width or not len(found) or not found.isfinite().all():
        raise UserError(f"expected identity embeddings of {width} finite numbers, received shape {tuple(found.shape)}")
    return found


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


@lru_cache(maxsize=1)
def insightface(device: str = "cpu") -> InsightFace:
    """The same one again: its models take seconds to load."""
    return InsightFace(device)


class FaceEncoder:
    """What adapters of the FaceID family hear: who is in a picture, by InsightFace; of Plus, the picture's grid behind it.

    `face` is the identity's width. `picture` encodes the grid; None for those that hear the identity alone. Features are
    (pictures, 1, face), or (pictures, 1 + patches, width) with the identity in the first row, zeros behind it.
    """

    def __init__(self, face: int, picture: Encoder | None = None, normalised: bool = True):
        self.face, self.picture, self.normalised = face, picture, normalised
        self.side = picture.side if picture else 1
        self.model: Any = nn.ModuleDict({"picture": picture.model} if picture else {})
        self.model.register_buffer("place", torch.zeros(0), persistent=False)  # so that it is known where `model` was moved

    def width(self, grid: bool) -> int:
        return self.picture.width(True) if self.picture else self.face

    def found(self, images: Sequence[Image.Image]) -> list[bool]:
        """In which pictures there is somebody. Raises UserError without InsightFace."""
        return self._embedded(images)[1].tolist()

    def who(self, images: Sequence[Image.Image]) -> Tensor:
        """Identities, (pictures, face). Raises ImageError for a picture without a face, and UserError without InsightFace."""
        embedded, there = self._embedded(images)
        if not there.all():
            raise ImageError(f"no face was found in picture {there.tolist().index(False) + 1}; expected one in each")
        return embedded

    def _embedded(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        return insightface(str(self.model.place.device)).embed(images)

    def beside(self, who: Tensor, images: Sequence[Image.Image]) -> Tensor:
        """Features of identities, (pictures, face), and of the pictures that they are from. Raises UserError where one is missing."""
        found = F.normalize(who, dim=1) if self.normalised else who
        if self.picture is None:
            return found[:, None]
        if len(images) != len(found):
            raise UserError(f"FaceID-Plus hears faces and their pictures; expected as many, received {len(found)} and {len(images)}")
        grid = self.picture.encode(images, True)
        first = torch.zeros(len(found), 1, grid.shape[2])
        first[:, 0, : self.face] = found
        return torch.cat([first.to(grid), grid], 1)

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        """The features themselves: faces are found in whole pictures. Raises ImageError for a picture without one."""
        return self.beside(self.who(images), images)

    def features(self, pixels: Tensor, grid: bool) -> Tensor:
        return pixels

    def encode(self, images: Sequence[Image.Image], grid: bool) -> Tensor:
        return self.prepare(images)

    def null(self, grid: bool) -> Tensor:
        """Nobody; of Plus, before the grid of no picture."""
        if self.picture is None:
            return torch.zeros(1, 1, self.face)
        nothing = self.picture.null(True)
        return torch.cat([torch.zeros_like(nothing[:, :1]), nothing], 1)


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
