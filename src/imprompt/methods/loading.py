"""Methods from their files, ready to generate or to be fine-tuned."""

from collections.abc import Mapping
from pathlib import Path

import torch

from imprompt.config.methods import METHODS, PER_SUBJECT_METHODS
from imprompt.core.adapter import Adapter
from imprompt.errors import CheckpointError, UserError
from imprompt.methods import Method, build_method
from imprompt.methods.dreambooth import DreamBooth
from imprompt.methods.inversion import PLACEHOLDER_TOKEN, TextualInversion
from imprompt.methods.ip_adapter import IPAdapter
from imprompt.models import checkpoints, hub
from imprompt.models.checkpoints import AdapterSpec
from imprompt.models.image_encoders import ImageEncoder
from imprompt.models.image_prompt import load, resolve_image_encoder
from imprompt.models.tensor_files import read_metadata, read_tensors
from imprompt.unet.injection import check_compatible
from imprompt.unet.mkldnn import prepack_weights
from imprompt.utils.protocols import UNetPipeline

PREPACK_MIN_PARAMS = 5_000_000  # prepacking the weights of a smaller module does not pay off


def load_method(source: str, pipe: UNetPipeline, model: str, image_encoder: str | None = None) -> Method:
    """A method with its weights: a file of `imprompt train`, a public or bundled adapter, or reference-only.

    model: the base model, `mini` or another. Raises UserError where there is no such source, or where it does not fit the base model.
    """
    method = _load_weights(source, pipe, model, image_encoder)
    method.module.to(pipe.unet.device).requires_grad_(False).eval()
    is_large = sum(p.numel() for p in method.module.parameters()) > PREPACK_MIN_PARAMS
    if is_large and model == "mini" and pipe.unet.device.type == "cpu" and pipe.unet.dtype == torch.bfloat16:
        method.module.to(torch.bfloat16)
        prepack_weights(method.module)
    return method


def read_method_name(source: str) -> str:
    """The name of the method that a file was trained with, read without its tensors."""
    path, _ = hub.resolve_adapter(source)
    return str(read_metadata(path).get("method", "ip-adapter"))


def _load_weights(source: str, pipe: UNetPipeline, model: str, image_encoder: str | None) -> Method:
    if source == "reference-only":
        return build_method(source, pipe, _load_image_encoder(model, image_encoder, pipe))
    path, _ = hub.resolve_adapter(source)
    metadata = read_metadata(path)
    name = str(metadata.get("method", "ip-adapter"))
    if name.startswith("ip-adapter"):
        prompt_encoder = load(source, image_encoder=image_encoder).to(pipe.unet.device)
        check_compatible(prompt_encoder.adapter, pipe.unet)
        return IPAdapter(pipe.unet, prompt_encoder.encoder, prompt_encoder.adapter)
    if name not in METHODS:
        raise CheckpointError(f"{path.name} was trained with method {name!r}; expected one of {', '.join(METHODS)}")
    if name in PER_SUBJECT_METHODS:
        method = _rebuild_per_subject_method(name, pipe, metadata, path)
    else:
        method = build_method(name, pipe, _load_image_encoder(model, image_encoder, pipe))
    checkpoints.load_module(method.module, path)
    return method


def load_for_finetuning(source: str) -> tuple[Adapter, AdapterSpec]:
    """An adapter to continue training from. Raises UserError for one of the FaceID family."""
    adapter, spec = checkpoints.load_adapter(hub.resolve_adapter(source)[0])
    if spec.is_faceid:
        raise UserError(
            f"adapter: {source} is of the FaceID family, which generates but cannot be trained here; expected a base, plus or full-face "
            "adapter; for faces, leave --adapter out and use --method ip-adapter-full-face"
        )
    return adapter, spec


def _rebuild_per_subject_method(name: str, pipe: UNetPipeline, metadata: Mapping[str, object], path: Path) -> Method:
    """A per-subject method with the sizes of a file's tensors and the words in its metadata, untrained."""
    method: DreamBooth | TextualInversion
    words = {key: str(metadata[key]) for key in ("noun", "token") if key in metadata}
    if not all(word.isprintable() for word in words.values()):
        raise CheckpointError(
            f"{path.name}: expected printable words as its noun and token, received {', '.join(map(ascii, words.values()))}"
        )
    if name == "inversion":
        method = TextualInversion(pipe, words.get("token", PLACEHOLDER_TOKEN), _read_size(path))
    elif name == "dreambooth-lora":
        method = DreamBooth.create_lora(pipe, _read_size(path, ".lora_A.weight"))
    else:
        method = DreamBooth.create_full(pipe)
    method.metadata |= words
    return method


def _read_size(path: Path, suffix: str = "") -> int:
    """The first dimension of all tensors whose names end so: the rank of LoRA, or the number of placeholder embeddings."""
    tensors = [tensor for key, tensor in read_tensors(path)[0].items() if key.endswith(suffix)]
    sizes = {tensor.shape[0] if tensor.ndim and tensor.numel() else 0 for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise CheckpointError(f"{path.name}: expected tensors of one size, received {', '.join(map(str, sorted(sizes))) or 'none'}")
    return sizes.pop()


def _load_image_encoder(model: str, image_encoder: str | None, pipe: UNetPipeline) -> ImageEncoder:
    encoder = resolve_image_encoder(model, image_encoder)
    encoder.model.to(pipe.unet.device)
    return encoder
