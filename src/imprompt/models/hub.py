"""Locations of adapters and image encoders: in the package, in folders, on the hub."""

import os
from functools import cache
from pathlib import Path
from threading import Thread
from typing import IO, cast
from urllib.request import Request, urlopen

from imprompt.errors import UserError, notify, summarize_error
from imprompt.models.checkpoints import AdapterSpec

MINI_PATH = Path(__file__).parent.parent / "mini" / "weights"
BUNDLED_ADAPTERS = {"mini": "adapter.safetensors", "mini-plus": "adapter-plus.safetensors", "mini-subject": "adapter-subject.safetensors"}

HUB_TIMEOUT = 4.0  # seconds that an unreachable hub may cost

_IP_ADAPTER_REPO = "h94/IP-Adapter"
EncoderLocation = tuple[str | Path, str | None]  # folder or hub id, subfolder
_RELEASED_ENCODERS: dict[str, EncoderLocation] = {
    "CLIP ViT-H/14": (_IP_ADAPTER_REPO, "models/image_encoder"), "CLIP ViT-bigG/14": (_IP_ADAPTER_REPO, "sdxl_models/image_encoder"),
    "CLIP ViT-L/14": ("openai/clip-vit-large-patch14", None), "SigLIP so400m": ("google/siglip-so400m-patch14-384", None),
}  # fmt: skip

DEFAULT_IMAGE_ENCODER = _RELEASED_ENCODERS["CLIP ViT-H/14"]  # of all public adapters except a few for SDXL


def resolve_adapter(source: str, weight_name: str | None = None) -> tuple[Path, EncoderLocation | None]:
    """The adapter's file, and the location of its image encoder for bundled adapters.

    `source` is the name of a bundled adapter, a file, a folder or a hub id, the last two with the file's path in `weight_name`;
    or all of a hub file in one, such as h94/IP-Adapter/models/ip-adapter_sd15.safetensors. Raises UserError.
    """
    location = locate_adapter(source, weight_name)
    path = location if isinstance(location, Path) else _download_adapter(*location)
    return path, (MINI_PATH / "image_encoder", None) if source in BUNDLED_ADAPTERS else None


def locate_adapter(source: str, weight_name: str | None = None) -> Path | tuple[str, str]:
    """The adapter's file, or the repository and path of one on the hub; nothing is downloaded. Raises UserError."""
    if source in BUNDLED_ADAPTERS:
        path = MINI_PATH / BUNDLED_ADAPTERS[source]
        if not path.is_file():
            raise UserError(f"the bundled adapter {source} is not built yet; build it with: imprompt mini build")
        return path
    if os.path.isfile(source):  # unlike Path.is_file, it does not raise for a name too long
        return Path(source)
    if os.path.isdir(source):
        if weight_name is None:
            raise UserError(f"{source} is a folder; pass the path of the adapter's file in it as weight_name")
        return Path(source) / weight_name
    if weight_name is None and source.count("/") >= 2 and not _is_path(source):
        owner, name, weight_name = source.split("/", 2)
        source = f"{owner}/{name}"
    if weight_name is None or not is_hub_id(source):
        raise UserError(
            f"no adapter at {source}; give a file, one of {', '.join(BUNDLED_ADAPTERS)}, "
            "or a hub file such as h94/IP-Adapter/models/ip-adapter_sd15.safetensors"
        )
    return source, weight_name


def is_hub_id(source: str) -> bool:
    """Whether a string has the form of a hub id: owner/name."""
    return source.count("/") == 1 and not _is_path(source)


def _is_path(source: str) -> bool:
    return source.startswith((".", "/", "~"))


def default_image_encoder(spec: AdapterSpec) -> EncoderLocation:
    """The image encoder that such an adapter was trained with. Raises UserError where its shapes do not tell."""
    if spec.base_model == "mini":
        return MINI_PATH / "image_encoder", None
    for name, location in _RELEASED_ENCODERS.items():
        if spec.image_encoder.startswith(name):
            return location
    raise UserError(
        f"the adapter's shapes do not determine its image encoder (it takes {spec.image_encoder}); pass one with --image-encoder"
    )


def _download_adapter(repository: str, weight_name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    _connect()
    try:
        return Path(hf_hub_download(repository, weight_name))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise UserError(
            f"{repository}/{weight_name} is neither in the local cache nor available from the hub ({explain_failure(error)}); "
            "check the name and the connection"
        ) from error


def open_hub_file(url: str) -> IO[bytes]:
    """The content of a file of the hub, `hf://datasets/owner/name/path`, as a stream. Raises UserError where there is none."""
    from huggingface_hub import HfFileSystem

    _connect()
    try:
        return cast(IO[bytes], HfFileSystem().open(url, "rb", block_size=0))
    except (OSError, ValueError, RuntimeError) as error:
        reason = type(error).__name__
        raise UserError(f"{url} cannot be read from the hub ({reason}); check the name, the token and the connection") from error


def prepare(source: str | Path) -> None:
    """To be called before a library loads `source`, which may be on the hub; nothing for a file or folder."""
    if not os.path.exists(source):
        _connect()


@cache
def _connect() -> None:
    """Where the hub does not answer within HUB_TIMEOUT, only the local cache is used from then on."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not _answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
        notify(f"the hub ({constants.ENDPOINT}) cannot be reached; only what is in the local cache is used")


def explain_failure(error: Exception) -> str:
    """Why something could not be loaded that may be on the hub: the hub is not used, or what the library says."""
    from huggingface_hub import constants

    reason = summarize_error(error)
    return f"the hub cannot be reached, or HF_HUB_OFFLINE is set; {reason}" if constants.HF_HUB_OFFLINE else reason


def _answers(url: str) -> bool:
    """Whether a server answers at all within HUB_TIMEOUT, name resolution included, which has no time limit of its own."""
    answers = list[bool]()

    def ask() -> None:
        try:
            with urlopen(Request(url, method="HEAD"), timeout=HUB_TIMEOUT):
                answers.append(True)
        except Exception as error:  # a page that does not exist is an answer, too
            answers.append(getattr(error, "code", None) is not None)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    return any(answers)
