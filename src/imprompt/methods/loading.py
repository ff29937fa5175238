"""A method from its file, ready to draw."""

from collections.abc import Mapping
from typing import Any

import torch

from imprompt.config import PERSONAL, READS
from imprompt.core.adapter import Adapter
from imprompt.errors import CheckpointError, UserError
from imprompt.methods import Method, create
from imprompt.methods.dreambooth import RANK, DreamBooth
from imprompt.methods.inversion import TOKEN, VECTORS, Inversion
from imprompt.methods.ip_adapter import IPAdapter
from imprompt.models import checkpoints, hub
from imprompt.models.checkpoints import Spec
from imprompt.models.image_encoders import ImageEncoder
from imprompt.models.image_prompt import find_encoder, load
from imprompt.unet.injection import check_fit
from imprompt.unet.mkldnn import pack

LARGE = 5_000_000  # parameters of a module that is worth laying out for the processor


def load_method(source: str, pipe: Any, base: str, encoder: str | None = None) -> Method:
    """A method with its weights: a file that `imprompt train` wrote, a public adapter, an embedded one, or reference-only.

    Raises UserError where there is none, or where it does not fit the base.
    """
    method = _loaded(source, pipe, base, encoder)
    method.module.to(pipe.unet.device).requires_grad_(False).eval()
    large = sum(p.numel() for p in method.module.parameters()) > LARGE
    if large and base == "mini" and pipe.unet.device.type == "cpu" and pipe.unet.dtype == torch.bfloat16:
        method.module.to(torch.bfloat16)
        pack(method.module)
    return method


def method_of(source: str) -> str:
    """By what method a file was trained, without reading its tensors."""
    path, _ = hub.find_adapter(source)
    return str(checkpoints.about(path).get("method", "ip-adapter")) if path.suffix == ".safetensors" else "ip-adapter"


def _loaded(source: str, pipe: Any, base: str, encoder: str | None) -> Method:
    if source == "reference-only":
        return create(source, pipe, _own_encoder(base, encoder, pipe))
    path, _ = hub.find_adapter(source)
    about = checkpoints.about(path) if path.suffix == ".safetensors" else {}
    name = str(about.get("method", "ip-adapter"))
    if name.startswith("ip-adapter"):
        prompter = load(source, encoder=encoder).to(pipe.unet.device)
        check_fit(prompter.adapter, pipe.unet)
        return IPAdapter(pipe.unet, prompter.encoder, prompter.adapter)
    if name not in READS:
        raise CheckpointError(f"{path.name} was trained by method {name!r}; expected one of {', '.join(READS)}")
    method = remade(name, pipe, about) if name in PERSONAL else create(name, pipe, _own_encoder(base, encoder, pipe))
    checkpoints.load_module(method.module, path)
    return method


def to_train(source: str) -> tuple[Adapter, Spec]:
    """An adapter that a training goes on from. Raises UserError for one that is not trained here."""
    adapter, spec = checkpoints.load_adapter(hub.find_adapter(source)[0])
    if spec.faces:
        raise UserError(
            f"adapter: {source} is of the FaceID family, which draws but is not trained here; expected a global, fine-grained or "
            "full-face one; for faces, leave --adapter out and take --method ip-adapter-full-face"
        )
    return adapter, spec


def remade(name: str, pipe: Any, about: Mapping[str, Any]) -> DreamBooth | Inversion:
    """A method of one subject as the file of which this is said wants it, untrained."""
    made: DreamBooth | Inversion
    if name == "inversion":
        made = Inversion(pipe, str(about.get("token", TOKEN)), int(about.get("vectors", VECTORS)))
    elif name == "dreambooth-lora":
        made = DreamBooth.create_low_rank(pipe, int(about.get("rank", RANK)))
    else:
        made = DreamBooth.create(pipe)
    made.about |= {key: str(about[key]) for key in ("noun", "token") if key in about}
    return made


def _own_encoder(base: str, encoder: str | None, pipe: Any) -> ImageEncoder:
    found = find_encoder(base, encoder)
    found.model.to(pipe.unet.device)  # type: ignore[arg-type]
    return found
