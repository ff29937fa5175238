"""LoRA of the base model (Hu et al., 2021, arXiv:2106.09685), loaded by diffusers; what does not fit is refused or reported."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffusers.utils import convert_unet_state_dict_to_peft, logging
from torch import Tensor, nn

from imprompt.config import parse_weighted
from imprompt.errors import UserError, notify
from imprompt.models import hub
from imprompt.models.tensor_files import check_weights
from imprompt.utils.text import shorten

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")  # of a pipeline, that a LoRA may change


@contextmanager
def use_lora(pipe: Any, lora: Sequence[str]) -> Iterator[None]:
    """Within the context the base has these LoRA, each SOURCE or SOURCE:SCALE. Raises UserError where one cannot be loaded."""
    if not lora:
        yield
        return
    names, scales = [], []
    try:
        for number, (source, scale) in enumerate(map(parse_weighted, lora)):
            names.append(f"lora{number}")
            scales.append(scale)
            _load_lora(pipe, source, names[-1])
        pipe.set_adapters(names, scales)
        yield
    finally:
        with suppress(ValueError):  # without peft nothing was loaded
            pipe.unload_lora_weights()  # also after a failure, which leaves its layers around the base model's


def _load_lora(pipe: Any, source: str, name: str) -> None:
    """Load one LoRA. Raises UserError where it changes nothing or is no LoRA; reports the tensors that do not fit."""
    hub.prepare(source)
    file = Path(source)
    weight_name = {"weight_name": file.name} if file.is_file() else {}
    location = file.parent if weight_name else source
    try:
        with _silenced_diffusers():
            tensors: dict[str, Tensor] = pipe.lora_state_dict(location, unet_config=pipe.unet.config, **weight_name)[0]
            check_weights(tensors, f"lora: {source}")
            if any("lora" in key for key in tensors):
                pipe.load_lora_weights(location, adapter_name=name, **weight_name)
    except UserError:
        raise
    except Exception as error:  # for missing, damaged and other files the libraries raise nearly anything
        peft_missing = "peft" in str(error).lower()
        remedy = "install peft with: pip install 'imprompt[lora]'" if peft_missing else "expected a LoRA of this base model"
        raise UserError(f"lora: {source} cannot be loaded ({hub.explain_failure(error)}); {remedy}") from error
    _check_loaded(tensors, _lora_weights(pipe, name), source)


@contextmanager
def _silenced_diffusers() -> Iterator[None]:
    """Within the context diffusers logs nothing: what it has to say about a LoRA takes hundreds of lines."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_loaded(tensors: Mapping[str, Tensor], loaded: Collection[str], source: str) -> None:
    """Raise UserError where no tensor of a LoRA was loaded, or where some are missing; report how many do not fit."""
    if not loaded:
        raise UserError(
            f"lora: {source} changes no layer of this base model; expected a LoRA of its family in the form of diffusers or kohya, "
            f"received {', '.join(map(shorten, sorted(tensors)[:2])) or 'no tensors'}"
        )
    if len(loaded) > len(tensors):
        raise UserError(f"lora: {source} is incomplete: expected {len(loaded)} tensors, received {len(tensors)}; download it again")
    if dropped := len(tensors) - len(loaded):
        names = convert_unet_state_dict_to_peft({key: value for key, value in tensors.items() if key.startswith("unet.")})
        example = next((f", such as {key}" for key in names if key not in loaded), "")
        notify(f"lora: {source}: {dropped} of {len(tensors)} tensors fit no layer of this base model and are left out{example}")


def _lora_weights(pipe: Any, name: str) -> set[str]:
    """The names, as in files of peft, of the tensors of a loaded LoRA."""
    components = ((prefix, getattr(pipe, prefix, None)) for prefix in _COMPONENTS)
    return {
        f"{prefix}.{key}".replace(f".{name}", "")
        for prefix, component in components
        if isinstance(component, nn.Module)
        for key, _ in component.named_parameters()
        if f".{name}." in f"{key}."
    }
