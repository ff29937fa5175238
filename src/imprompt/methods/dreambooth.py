"""DreamBooth (arXiv:2208.12242): a UNet fine-tuned on photographs of one subject; all of it, or low-rank updates (arXiv:2106.09685)."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from imprompt.data.dreambooth import named
from imprompt.errors import UserError
from imprompt.methods.base import speaking_for
from imprompt.models.image_encoders import Encoder, NothingEncoder

RANK = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention layer


class DreamBooth:
    """The subject's name is a rare token in the text; nothing but the UNet learns what it means.

    `module` is a copy of the UNet, in float32, or its `LowRank` updates; either way its tensors are a file that diffusers reads.
    `tuned` is what draws: the trainer may wrap `module`.
    """

    grid = False

    def __init__(self, name: str, unet: Any, module: nn.Module):
        self.name, self.unet, self.module = name, unet, module
        self.encoder: Encoder = NothingEncoder()
        self.about: dict[str, str] = {"rank": str(module.rank)} if isinstance(module, LowRank) else {}
        self.tuned: Any = module.whole if isinstance(module, LowRank) else module

    @classmethod
    def create(cls, pipe: Any) -> "DreamBooth":
        """All weights of the UNet are trained."""
        return cls("dreambooth", pipe.unet, duplicate(pipe.unet).float().requires_grad_(True))

    @classmethod
    def create_low_rank(cls, pipe: Any, rank: int = RANK) -> "DreamBooth":
        """Beside each projection of the attention layers a product of two narrow matrices is trained. Needs peft."""
        return cls("dreambooth-lora", pipe.unet, LowRank(pipe.unet, rank))

    def said(self, text: str) -> str:
        """A text about the noun as one about the subject: "a cat on a beach" → "a sks cat on a beach"."""
        return named(text, self.about.get("noun", ""), self.about.get("token", "sks"))

    def null(self) -> Tensor:
        return self.encoder.null(self.grid)

    def denoise(self, x: Tensor, time: Tensor, text: Tensor, image: Tensor, **extra: Any) -> Tensor:
        return self._predicted(self.module, x, time, text, **extra)

    def _predicted(self, unet: nn.Module, x: Tensor, time: Any, text: Tensor, **extra: Any) -> Tensor:
        """A call in the copy's own precision."""
        dtype = self.tuned.conv_in.weight.dtype
        found = unet(x.to(dtype), time, text.to(dtype), return_dict=False, **_in_precision(extra, dtype))[0]
        return cast(Tensor, found).to(x.dtype)

    def release(self) -> None:
        """Nothing was placed in the UNet."""

    @contextmanager
    def attached(self, pipe: Any, image: Tensor, null: Tensor, scale: float = 1.0) -> Iterator[None]:
        """The copy speaks for the UNet, in every row. scale: how far to go from what the UNet says to what the copy says."""
        unet = pipe.unet
        own = unet.forward

        def tuned(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, return_dict: bool = True, **extra: Any) -> Any:
            said = self._predicted(self.tuned, sample, timestep, encoder_hidden_states, **extra)
            if scale != 1:
                said = torch.lerp(own(sample, timestep, encoder_hidden_states, return_dict=False, **extra)[0], said, scale)
            return UNet2DConditionOutput(sample=said) if return_dict else (said,)

        with speaking_for(unet, tuned):
            yield


class LowRank(nn.Module):
    """LoRA layers under the names that `pipe.load_lora_weights` reads: `unet.<layer>.lora_A.weight`, and `lora_B` beside it.

    `whole` is the UNet that has them in place. All else in it is the base's own memory, so the base is neither copied nor
    changed. α is the rank: files then need no word about it. Raises UserError without peft.
    """

    def __init__(self, unet: Any, rank: int):
        super().__init__()
        self.rank = rank
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise UserError("dreambooth-lora needs peft; install it with: pip install 'imprompt[lora]'") from error
        trained = {tensor: tensor.requires_grad for tensor in unet.parameters()}
        whole = duplicate(unet, (*unet.parameters(), *unet.buffers()))
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS), whole)
        for tensor, was in trained.items():  # peft froze them
            tensor.requires_grad_(was)
        self._whole = (whole,)  # in a tuple, so that its weights do not count as ours
        for path, layer in whole.named_modules():
            if isinstance(layer, LoraLayer):
                for part in ("lora_A", "lora_B"):
                    _place(self, f"unet.{path}.{part}", getattr(layer, part)["default"])
        self.float()

    @property
    def whole(self) -> Any:
        return self._whole[0]

    def forward(self, *inputs: Any, **extra: Any) -> Any:
        return self.whole(*inputs, **extra)


def duplicate(unet: Any, shared: tuple[Tensor, ...] = ()) -> Any:
    """A copy of a UNet as it was loaded: what is attached to it at present stays behind. `shared` tensors are not copied."""
    copied = copy.deepcopy(unet, {id(tensor): tensor for tensor in shared})
    vars(copied).pop("forward", None)
    return copied


def _place(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Register a layer under a path, the modules between made as needed."""
    *rooms, last = path.split(".")
    for room in rooms:
        if room not in module._modules:
            module.add_module(room, nn.Module())
        module = module.get_submodule(room)
    module.add_module(last, layer)


def _in_precision(value: Any, dtype: torch.dtype) -> Any:
    """The same with floating-point tensors in this dtype: of SDXL's added conditions, of a ControlNet's residuals."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _in_precision(part, dtype) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_in_precision(part, dtype) for part in value)
    return value
