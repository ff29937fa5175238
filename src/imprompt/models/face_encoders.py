"""Faces: found, turned upright and embedded by InsightFace or FaceNet; embeddings that are in files; what FaceID hears."""

import contextlib
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from imprompt.errors import ImageError, UserError, brief
from imprompt.models import checkpoints
from imprompt.models.image_encoders import Encoder

_FACE = 512  # width of both face embeddings
_CROP = 160  # pixels of the face that FaceNet sees
_UPRIGHT = 224  # pixels of the face that FaceID-Plus sees


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


class Face(NamedTuple):
    """A face that was found."""

    embedding: Tensor  # (512,), as the encoder gives it: not of length 1
    picture: Image.Image | None = None  # turned upright and cut out


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
                self.analysis = FaceAnalysis("buffalo_l", allowed_modules=["detection", "recognition"], providers=providers)
                self.analysis.prepare(ctx_id=(place.index or 0) if cuda else -1, det_size=(640, 640))
        except Exception as error:  # a download, an archive, ONNX: nearly anything
            message = f"insightface's models do not load ({brief(error)}); they are fetched once, to ~/.insightface/models/buffalo_l"
            raise UserError(message) from error

    def embed(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        return _gathered([face and face.embedding for face in self.faces(images)])

    def faces(self, images: Sequence[Image.Image], upright: bool = False) -> list[Face | None]:
        """The largest face of each picture, None where there is none; with `upright` its picture too."""
        return [self._largest(np.asarray(image.convert("RGB"))[:, :, ::-1].copy(), upright) for image in images]

    def _largest(self, bgr: np.ndarray, upright: bool) -> Face | None:
        found: list[Any] = self.analysis.get(bgr)
        if not found:
            height, width = bgr.shape[:2]
            bgr = np.pad(bgr, ((height // 2, height // 2), (width // 2, width // 2), (0, 0)))
            found = self.analysis.get(bgr)
        if not found:
            return None
        largest = max(found, key=lambda face: (face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1]))
        embedding = torch.from_numpy(np.asarray(largest.embedding)).float()
        return Face(embedding, _upright(bgr, largest.kps) if upright else None)


def _upright(bgr: np.ndarray, points: np.ndarray) -> Image.Image:
    """The face turned and cut out so that its five points stand where ArcFace wants them."""
    from insightface.utils import face_align

    return Image.fromarray(np.ascontiguousarray(face_align.norm_crop(bgr, landmark=points, image_size=_UPRIGHT)[:, :, ::-1]))


@lru_cache(maxsize=1)
def insightface(device: str = "cpu") -> InsightFace:
    """The same one again: its models take seconds to load."""
    return InsightFace(device)


class FaceEncoder:
    """What adapters of the FaceID family hear: who is in a picture, by InsightFace; of Plus, the upright face's grid behind it.

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
        return [face is not None for face in self._faces(images, upright=False)]

    def _faces(self, images: Sequence[Image.Image], upright: bool) -> list[Face | None]:
        return insightface(str(self.model.place.device)).faces(images, upright)

    def beside(self, who: Tensor, images: Sequence[Image.Image]) -> Tensor:
        """Features of identities, (pictures, face), and of pictures of their faces. Raises UserError where one is missing."""
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
        faces: list[Face] = []
        for number, face in enumerate(self._faces(images, upright=self.picture is not None), 1):
            if face is None:
                raise ImageError(f"no face was found in picture {number}; expected one in each")
            faces.append(face)
        return self.beside(torch.stack([face.embedding for face in faces]), [face.picture for face in faces if face.picture])

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
