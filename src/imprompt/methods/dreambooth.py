"""DreamBooth (Ruiz et al., 2022, arXiv:2208.12242): a UNet fine-tuned on images of one subject, fully or with LoRA (arXiv:2106.09685)."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from imprompt.errors import UserError
from imprompt.methods.base import patched_forward
from imprompt.methods.prompt_templates import insert_subject_token
from imprompt.models.image_encoders import FeatureEncoder, NullEncoder
from imprompt.utils.protocols import UNetPipeline

LORA_RANK = 16
LORA_TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention layer
T = TypeVar("T")


class DreamBooth:
    """A rare token in the prompt stands for the subject, and only the UNet is trained.

    `module` is a copy of the UNet in float32, or a `LoRAUNet`; diffusers reads the file of either. `finetuned_unet` is the UNet that
    generates, whatever the trainer wraps around `module`.
    """

    uses_patch_features = False

    def __init__(self, name: str, unet: UNet2DConditionModel, module: nn.Module):
        self.name, self.unet, self.module = name, unet, module
        self.encoder: FeatureEncoder = NullEncoder()
        self.metadata: dict[str, str] = {"rank": str(module.rank)} if isinstance(module, LoRAUNet) else {}
        self.finetuned_unet: UNet2DConditionModel = module.lora_unet if isinstance(module, LoRAUNet) else module

    @classmethod
    def create_full(cls, pipe: UNetPipeline) -> "DreamBooth":
        """All weights of the UNet are trained."""
        return cls("dreambooth", pipe.unet, copy_unet(pipe.unet).float().requires_grad_(True))

    @classmethod
    def create_lora(cls, pipe: UNetPipeline, rank: int = LORA_RANK) -> "DreamBooth":
        """Low-rank updates of the attention projections are trained. Raises UserError without peft."""
        return cls("dreambooth-lora", pipe.unet, LoRAUNet(pipe.unet, rank))

    def format_prompt(self, prompt: str) -> str:
        """A prompt about the class noun as one about the subject: "a cat on a beach" → "a sks cat on a beach"."""
        return insert_subject_token(prompt, self.metadata.get("noun", ""), self.metadata.get("token", "sks"))

    def uncond_features(self) -> Tensor:
        """The one zero of the null encoder, (1, 1, 1)."""
        return self.encoder.uncond_features(patches=False)

    def predict(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, image_features: Tensor, **unet_kwargs: object) -> Tensor:
        """The prediction in training, see `Method`."""
        return self._predict_in_own_dtype(self.module, latents, timesteps, prompt_embeds, **unet_kwargs)

    def _predict_in_own_dtype(
        self, unet: nn.Module, latents: Tensor, timestep: Tensor | float, prompt_embeds: Tensor, **unet_kwargs: object
    ) -> Tensor:
        dtype = self.finetuned_unet.conv_in.weight.dtype
        prediction = unet(latents.to(dtype), timestep, prompt_embeds.to(dtype), return_dict=False, **_cast_floats(unet_kwargs, dtype))[0]
        return cast(Tensor, prediction).to(latents.dtype)

    def remove_from_unet(self) -> None:
        """Does nothing: the base model's UNet is not changed."""

    @contextmanager
    def apply_to(self, pipe: UNetPipeline, image_features: Tensor, uncond_features: Tensor, scale: float = 1.0) -> Iterator[None]:
        """The fine-tuned UNet predicts in place of the base model's, in every row. scale: of the interpolation from base to fine-tuned."""
        base_forward = pipe.unet.forward

        def forward(
            sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, *, return_dict: bool = True, **unet_kwargs: object
        ) -> UNet2DConditionOutput | tuple[Tensor]:
            prediction = self._predict_in_own_dtype(self.finetuned_unet, sample, timestep, encoder_hidden_states, **unet_kwargs)
            if scale != 1:
                base = base_forward(sample, timestep, encoder_hidden_states, return_dict=False, **unet_kwargs)[0]
                prediction = torch.lerp(base, prediction, scale)
            return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

        with patched_forward(pipe.unet, forward):
            yield


class LoRAUNet(nn.Module):
    """LoRA layers under the names that `pipe.load_lora_weights` reads: `unet.<layer>.lora_A.weight` and `unet.<layer>.lora_B.weight`.

    `lora_unet` is the UNet that contains them. It shares all other tensors with the base model, which is neither copied nor changed. α
    equals the rank, and so files need not store it. Raises UserError without peft.
    """

    def __init__(self, unet: UNet2DConditionModel, rank: int):
        super().__init__()
        self.rank = rank
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise UserError("dreambooth-lora needs peft; install it with: pip install 'imprompt[lora]'") from error
        requires_grad = {tensor: tensor.requires_grad for tensor in unet.parameters()}
        lora_unet = copy_unet(unet, (*unet.parameters(), *unet.buffers()))
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGET_MODULES)
        inject_adapter_in_model(config, lora_unet)
        for tensor, value in requires_grad.items():  # peft freezes the shared tensors
            tensor.requires_grad_(value)
        self._lora_unet = (lora_unet,)  # in a tuple, so that the UNet is no submodule
        for path, layer in lora_unet.named_modules():
            if isinstance(layer, LoraLayer):
                for matrix in ("lora_A", "lora_B"):
                    _add_module_at(self, f"unet.{path}.{matrix}", getattr(layer, matrix)["default"])
        self.float()

    @property
    def lora_unet(self) -> UNet2DConditionModel:
        """The UNet with the LoRA layers."""
        return self._lora_unet[0]

    def forward(self, *args: object, **kwargs: object) -> UNet2DConditionOutput | tuple[Tensor]:
        """A call of the UNet with the LoRA layers."""
        return self.lora_unet(*args, **kwargs)


def copy_unet(unet: UNet2DConditionModel, shared: tuple[Tensor, ...] = ()) -> UNet2DConditionModel:
    """A copy of a UNet without anything that is attached to it at present. `shared` tensors are not copied."""
    copied = copy.deepcopy(unet, {id(tensor): tensor for tensor in shared})
    vars(copied).pop("forward", None)
    return copied


def _add_module_at(parent: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module under a dotted path, creating the modules in between."""
    *names, last = path.split(".")
    for name in names:
        if name not in dict(parent.named_children()):
            parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.add_module(last, module)


def _cast_floats(value: T, dtype: torch.dtype) -> T:
    """The same arguments with all floating-point tensors in this dtype: SDXL's added conditions, the residuals of a ControlNet."""
    if isinstance(value, Tensor):
        return cast(T, value.to(dtype) if value.is_floating_point() else value)
    if isinstance(value, dict):
        return cast(T, {name: _cast_floats(part, dtype) for name, part in value.items()})
    if isinstance(value, (list, tuple)):
        return cast(T, type(value)(_cast_floats(part, dtype) for part in value))
    return value


def build_dreambooth(pipe: UNetPipeline, encoder: FeatureEncoder) -> DreamBooth:
    """DreamBooth with all weights of the UNet, untrained."""
    return DreamBooth.create_full(pipe)


def build_dreambooth_lora(pipe: UNetPipeline, encoder: FeatureEncoder) -> DreamBooth:
    """DreamBooth with LoRA, untrained. Raises UserError without peft."""
    return DreamBooth.create_lora(pipe)
