"""Where adapters, encoders and bases are found: inside the package, in folders, on the hub."""

import os
from pathlib import Path

from imprompt.errors import UserError
from imprompt.models.checkpoints import Spec

MINI = Path(__file__).parent.parent / "mini" / "weights"
EMBEDDED = {"mini": "adapter.safetensors", "mini-plus": "adapter-plus.safetensors", "mini-subject": "adapter-subject.safetensors"}

# Encoders of the public releases: (hub id, subfolder) by what an adapter reads.
_RELEASE = "h94/IP-Adapter"
_ENCODERS = {"CLIP ViT-H/14": (_RELEASE, "models/image_encoder"), "CLIP ViT-bigG/14": (_RELEASE, "sdxl_models/image_encoder")}

RELEASED_ENCODER = _ENCODERS["CLIP ViT-H/14"]  # what the public adapters read, but for a few of SDXL

EncoderPlace = tuple[str | Path, str | None]


def find_adapter(source: str, weight: str | None = None) -> tuple[Path, EncoderPlace | None]:
    """The adapter's file, and its encoder where the place tells it."""
    if source in EMBEDDED:
        path = MINI / EMBEDDED[source]
        if not path.is_file():
            raise UserError(f"the embedded adapter {source} is not there yet; build it with: imprompt mini make")
        return path, (MINI / "image_encoder", None)
    if os.path.isfile(source):  # unlike Path.is_file, it does not raise for a name too long
        return Path(source), None
    if os.path.isdir(source):
        if weight is None:
            raise UserError(f"{source} is a folder; name the adapter's file in it")
        return Path(source) / weight, None
    if weight is None and source.count("/") >= 2 and not _is_path(source):
        owner, name, weight = source.split("/", 2)
        source = f"{owner}/{name}"
    if weight is None or not may_be_id(source):
        raise UserError(
            f"no adapter at {source}; give a file, one of {', '.join(EMBEDDED)}, "
            "or a hub file such as h94/IP-Adapter/models/ip-adapter_sd15.safetensors"
        )
    return _download(source, weight), None


def may_be_id(source: str) -> bool:
    """Whether a name has the form of a hub id: owner/name."""
    return source.count("/") == 1 and not _is_path(source)


def _is_path(source: str) -> bool:
    return source.startswith((".", "/", "~"))


def default_encoder(spec: Spec) -> EncoderPlace:
    """The encoder that an adapter of this shape was trained with."""
    if spec.base == "mini":
        return MINI / "image_encoder", None
    for name, place in _ENCODERS.items():
        if spec.encoder.startswith(name):
            return place
    raise UserError(
        f"which image encoder the adapter needs cannot be told from its shapes (it reads {spec.encoder}); give one with --encoder"
    )


def _download(repository: str, weight: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, weight))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise UserError(
            f"{repository}/{weight} is neither in the local cache nor to be had from the hub ({type(error).__name__}); "
            "check the name and the connection"
        ) from error
