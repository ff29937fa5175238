"""Face encoders: faces detected, aligned and embedded by InsightFace or FaceNet, embeddings from files, and the features of FaceID."""

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

from imprompt.errors import ImageError, UserError, notify, summarize_error
from imprompt.models.image_encoders import FeatureEncoder
from imprompt.models.tensor_files import read_tensors

_EMBED_DIM = 512  # of the identity embeddings of both models
_FACENET_CROP_SIZE = 160  # side in pixels of FaceNet's input
_ALIGNED_SIZE = 224  # side in pixels of the face image that FaceID-Plus takes


def load_id_embeds(source: Tensor | np.ndarray | str | Path, dim: int) -> Tensor:
    """Identity embeddings, (faces, dim), from a tensor, an array or a file: `.npy`, or one tensor as `.safetensors` or of PyTorch.

    Rows of zeros stand for no face: diffusers' `ip_adapter_image_embeds` begin with them. They are left out, and that is reported.
    Raises UserError for anything else.
    """
    if isinstance(source, (str, Path)):
        source = _read_id_embeds(Path(source))
    try:
        embeds = torch.as_tensor(source).float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"expected identity embeddings as a tensor, an array or a file, received {type(source).__name__}") from error
    embeds = embeds[None] if embeds.ndim < 2 else embeds.flatten(0, -2)
    if embeds.shape[-1:] != (dim,) or not len(embeds) or not embeds.isfinite().all():
        raise UserError(f"expected identity embeddings of {dim} finite numbers, received shape {tuple(embeds.shape)}")
    is_face = embeds.any(1)
    if not is_face.any():
        raise UserError("expected identity embeddings of faces, received nothing but zeros, which stand for no face")
    if not is_face.all():
        notify(f"identity embeddings: {int((~is_face).sum())} of {len(embeds)} are zeros, which stand for no face, and are left out")
    return embeds[is_face]


def _read_id_embeds(path: Path) -> Tensor | np.ndarray:
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        (tensor,) = read_tensors(path)[0].values()
        return tensor
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} contains no identity embedding that can be read ({summarize_error(error)})") from error


class Face(NamedTuple):
    """A detected face."""

    embedding: Tensor  # (512,), not normalized
    aligned: Image.Image | None = None  # the face, rotated upright and cropped


class InsightFace:
    """ArcFace (arXiv:1801.07698) on the largest face that SCRFD detects, aligned by its five landmarks. For research only:
    the license of the models is not commercial.

    SCRFD misses faces that fill the image. Where it detects none, it tries once more with a margin of half the image around.
    """

    name = "insightface buffalo_l"

    def __init__(self, device: str = "cpu"):
        try:
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise UserError("insightface is not installed; install it with: pip install 'imprompt[faces]'") from error
        index, is_cuda = torch.device(device).index or 0, torch.device(device).type == "cuda"
        providers = ["CUDAExecutionProvider"] * is_cuda + ["CPUExecutionProvider"]
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints the name of every model file
                self.analysis = FaceAnalysis("buffalo_l", allowed_modules=["detection", "recognition"], providers=providers)
                self.analysis.prepare(ctx_id=index if is_cuda else -1, det_size=(640, 640))
        except Exception as error:  # a download, an archive or ONNX can raise nearly any exception
            message = (
                f"insightface's models do not load ({summarize_error(error)}); they are downloaded once, to ~/.insightface/models/buffalo_l"
            )
            raise UserError(message) from error

    def embed(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Normalized identity embeddings, (images, 512), zeros where no face was detected; and where one was, (images,)."""
        return _stack_embeddings([face and face.embedding for face in self.detect_faces(images)])

    def detect_faces(self, images: Sequence[Image.Image], *, align: bool = False) -> list[Face | None]:
        """The largest face of each image, None where there is none; with `align` its aligned image too."""
        return [self._detect_largest(np.asarray(image.convert("RGB"))[:, :, ::-1].copy(), align=align) for image in images]

    def _detect_largest(self, bgr: np.ndarray, *, align: bool) -> Face | None:
        faces: list[Any] = self.analysis.get(bgr)
        if not faces:
            height, width = bgr.shape[:2]
            bgr = np.pad(bgr, ((height // 2, height // 2), (width // 2, width // 2), (0, 0)))
            faces = self.analysis.get(bgr)
        if not faces:
            return None
        largest = max(faces, key=lambda face: (face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1]))
        embedding = torch.from_numpy(np.asarray(largest.embedding)).float()
        return Face(embedding, _align_face(bgr, largest.kps) if align else None)


def _align_face(bgr: np.ndarray, landmarks: np.ndarray) -> Image.Image:
    """The face, rotated and cropped so that its five landmarks are where ArcFace expects them."""
    from insightface.utils import face_align

    return Image.fromarray(np.ascontiguousarray(face_align.norm_crop(bgr, landmark=landmarks, image_size=_ALIGNED_SIZE)[:, :, ::-1]))


@lru_cache(maxsize=1)
def shared_insightface(device: str = "cpu") -> InsightFace:
    """One InsightFace per process: its models take seconds to load. Raises UserError without the package or the models."""
    return InsightFace(device)


class FaceEncoder:
    """The feature encoder of the FaceID family: identity embeddings by InsightFace, and for Plus the patch features of the aligned face.

    `image_encoder` computes the patch features; None for adapters that take the identity embedding alone. Without `detects`, only given
    identity embeddings are taken: the adapter was trained with those of another model (InstantID: antelopev2). Features are
    (images, 1, id_embed_dim), or (images, 1 + patches, embed_dim) with the identity embedding in the first row, padded with zeros.
    """

    def __init__(self, id_embed_dim: int, image_encoder: FeatureEncoder | None = None, *, normalized: bool = True, detects: bool = True):
        if image_encoder and image_encoder.embed_dim(patches=True) < id_embed_dim:
            raise UserError(
                f"FaceID-Plus needs an image encoder with features as wide as the identity embedding: expected at least {id_embed_dim}, "
                f"received {image_encoder.embed_dim(patches=True)}; choose another with --image-encoder"
            )
        self.id_embed_dim, self.image_encoder, self.normalized, self.detects = id_embed_dim, image_encoder, normalized, detects
        self.image_size = image_encoder.image_size if image_encoder else 1
        self.model: nn.Module = nn.ModuleDict({"image_encoder": image_encoder.model} if image_encoder else {})
        self.model.register_buffer("device_marker", torch.zeros(0), persistent=False)  # follows `model` to its device

    def embed_dim(self, *, patches: bool) -> int:
        """The dimension of the patch features, or of the identity embedding without them."""
        return self.image_encoder.embed_dim(patches=True) if self.image_encoder else self.id_embed_dim

    def has_face(self, images: Sequence[Image.Image]) -> list[bool]:
        """Whether a face is detected in each image. Raises UserError without InsightFace."""
        return [face is not None for face in self._detect_faces(images, align=False)]

    def _detect_faces(self, images: Sequence[Image.Image], *, align: bool) -> list[Face | None]:
        if not self.detects:
            raise UserError(
                "InstantID takes identity embeddings of InsightFace's antelopev2, which are not computed here; give them as --face-embeds"
            )
        return shared_insightface(str(self.model.get_buffer("device_marker").device)).detect_faces(images, align=align)

    def combine_features(self, id_embeds: Tensor, face_images: Sequence[Image.Image]) -> Tensor:
        """Features from identity embeddings, (images, id_embed_dim), and for Plus as many images of faces. Raises UserError."""
        id_embeds = F.normalize(id_embeds, dim=1) if self.normalized else id_embeds
        if self.image_encoder is None:
            return id_embeds[:, None]
        if len(face_images) != len(id_embeds):
            raise UserError(
                "FaceID-Plus takes an image of the face with each identity embedding; "
                f"expected as many, received {len(id_embeds)} embeddings and {len(face_images)} images"
            )
        patch_features = self.image_encoder.encode_images(face_images, patches=True)
        first_row = torch.zeros(len(id_embeds), 1, patch_features.shape[2])
        first_row[:, 0, : self.id_embed_dim] = id_embeds
        return torch.cat([first_row.to(patch_features), patch_features], 1)

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """The features themselves: faces are detected in whole images. Raises ImageError for an image without a face."""
        faces: list[Face] = []
        for number, face in enumerate(self._detect_faces(images, align=self.image_encoder is not None), 1):
            if face is None:
                raise ImageError(f"no face was detected in image {number}; expected one in each")
            faces.append(face)
        return self.combine_features(torch.stack([face.embedding for face in faces]), [face.aligned for face in faces if face.aligned])

    def encode_pixels(self, pixels: Tensor, *, patches: bool) -> Tensor:
        """What `preprocess` returned, unchanged."""
        return pixels

    def encode_images(self, images: Sequence[Image.Image], *, patches: bool) -> Tensor:
        """Features of the faces in whole images. Raises ImageError for an image without a face."""
        return self.preprocess(images)

    def uncond_features(self, *, patches: bool) -> Tensor:
        """Zeros; for Plus, zeros in the first row and the image encoder's features of no image."""
        if self.image_encoder is None:
            return torch.zeros(1, 1, self.id_embed_dim)
        features = self.image_encoder.uncond_features(patches=True)
        return torch.cat([torch.zeros_like(features[:, :1]), features], 1)


class FaceNet:
    """FaceNet (arXiv:1503.03832), trained on VGGFace2, on the largest face that MTCNN (arXiv:1604.02878) detects.

    The face is cropped and scaled, not rotated: facenet-pytorch aligns no further, and its weights were trained on such crops.
    """

    name = "facenet vggface2"

    def __init__(self, device: str = "cpu"):
        try:
            from facenet_pytorch import MTCNN, InceptionResnetV1
        except ImportError as error:
            raise UserError(
                "facenet-pytorch is not installed, or torchvision is not; install it without the old version of torch that it pins: "
                "pip install --no-deps facenet-pytorch"
            ) from error
        self.device = device
        try:
            self.detector = MTCNN(image_size=_FACENET_CROP_SIZE, margin=0, select_largest=True, device=device)
            self.model = InceptionResnetV1(pretrained="vggface2").to(device).eval()
        except Exception as error:  # a download or an archive can raise nearly any exception
            raise UserError(
                f"FaceNet's weights do not load ({summarize_error(error)}); they are downloaded once, from github.com"
            ) from error

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Normalized identity embeddings, (images, 512), zeros where no face was detected; and where one was, (images,)."""
        crops = [self.detector(image.convert("RGB")) for image in images]  # one by one: a batch would need images of one size
        return _stack_embeddings([None if crop is None else self.model(crop[None].to(self.device))[0].float().cpu() for crop in crops])


def _stack_embeddings(rows: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Normalized embeddings, (images, 512), with zeros for None; and which are not None, (images,)."""
    detected = torch.tensor([row is not None for row in rows], dtype=torch.bool)
    embeddings = torch.zeros(len(rows), _EMBED_DIM)
    for i, row in enumerate(rows):
        if row is not None:
            embeddings[i] = F.normalize(row, dim=0)
    return embeddings, detected
