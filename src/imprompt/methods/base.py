"""The interface of a method, which is all that training and evaluation know of it: a method rewrites a call of the UNet.

`Method` is the protocol. Most methods are a `ConditioningMethod`: its `ConditioningModule` encodes image features and then calls the
UNet with them, and the same two functions serve training and generation.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from imprompt.core.guidance import expand_to_cfg_batch
from imprompt.errors import UserError
from imprompt.models.image_encoders import FeatureEncoder
from imprompt.unet.calls import find_denoiser_call, read_cfg_layout
from imprompt.utils.protocols import UNetPipeline

Conditioning = dict[str, Tensor]  # what a UNet call needs of the reference images; the first dimension of each tensor is the batch
UNetForward = Callable[..., UNet2DConditionOutput]  # the `forward` of a UNet of diffusers


class Method(Protocol):
    """One system in training and in use.

    `module` holds everything that is trained; its `state_dict` is the file, in the layout that other libraries read. `encoder` computes
    the image features, of patches where `uses_patch_features`. `metadata` is stored in the header of the file.
    """

    name: str
    encoder: FeatureEncoder
    uses_patch_features: bool
    module: nn.Module
    metadata: dict[str, str]

    def uncond_features(self) -> Tensor:
        """The image features that stand for no image, (1, patches, features)."""
        ...

    def predict(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, image_features: Tensor, **unet_kwargs: object) -> Tensor:
        """The prediction in training. timesteps: (batch,); prompt_embeds: (batch, tokens, cross).

        image_features: (batch, references, patches, features). Returns (batch, channels, height, width).
        """
        ...

    def remove_from_unet(self) -> None:
        """Remove everything that the method has installed in the UNet."""
        ...

    def apply_to(
        self, pipe: UNetPipeline, image_features: Tensor, uncond_features: Tensor, scale: float = 1.0
    ) -> AbstractContextManager[object]:
        """Within the context the pipeline generates images conditioned on these features.

        image_features: (1 or prompts, references, patches, features); uncond_features: (1, 1, patches, features); scale: λ.
        """
        ...


class ConditioningModule(nn.Module):
    """The trained part of a method, and how it rewrites a call of the UNet."""

    also_in_uncond_rows: tuple[str, ...] = ()  # the entries of the conditioning that unconditional rows receive too

    def encode_features(self, image_features: Tensor) -> Conditioning:
        """Image features, (batch, references, patches, features), to what the UNet call needs."""
        raise NotImplementedError

    def call_unet(
        self,
        unet: UNetForward,
        latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        cond: Conditioning,
        **unet_kwargs: object,
    ) -> Tensor:
        """The prediction. `unet` is the base model's own forward; timesteps: (batch,)."""
        raise NotImplementedError

    def scale_conditioning(self, uncond: Conditioning, cond: Conditioning, scale: float) -> Conditioning:
        """Linear interpolation from no image (scale 0) to the image (scale 1), for methods without a scale of their own."""
        if scale == 1:
            return cond
        return {name: uncond[name] + scale * (value - uncond[name]) for name, value in cond.items()}

    def forward(
        self, unet: UNetForward, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, image_features: Tensor, **unet_kwargs: object
    ) -> Tensor:
        """The prediction from image features."""
        return self.call_unet(unet, latents, timesteps, prompt_embeds, self.encode_features(image_features), **unet_kwargs)


class ConditioningMethod:
    """A method made of a `ConditioningModule`, a UNet and the encoder of its image features."""

    def __init__(
        self,
        name: str,
        unet: UNet2DConditionModel,
        encoder: FeatureEncoder,
        module: ConditioningModule,
        *,
        patches: bool = False,
        uncond_features: Tensor | None = None,
    ):
        self.name, self.unet, self.encoder, self.uses_patch_features = name, unet, encoder, patches
        self.module: nn.Module = module  # the trainer may wrap it
        self.conditioning_module = module
        self._uncond_features = uncond_features
        self.metadata: dict[str, str] = {}

    def uncond_features(self) -> Tensor:
        """The method's own features of no image, or else the encoder's."""
        if self._uncond_features is not None:
            return self._uncond_features
        return self.encoder.uncond_features(patches=self.uses_patch_features)

    def predict(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, image_features: Tensor, **unet_kwargs: object) -> Tensor:
        """The prediction in training, see `Method`."""
        return cast(Tensor, self.module(self.unet.forward, latents, timesteps, prompt_embeds, image_features, **unet_kwargs))

    def remove_from_unet(self) -> None:
        """Does nothing: in training nothing is installed in the UNet."""

    @contextmanager
    def apply_to(self, pipe: UNetPipeline, image_features: Tensor, uncond_features: Tensor, scale: float = 1.0) -> Iterator[None]:
        """Rewrite the UNet's calls in the rows of each guidance group."""
        module, original_forward = self.conditioning_module, pipe.unet.forward
        with torch.no_grad():
            uncond = module.encode_features(uncond_features.expand(1, image_features.shape[1], -1, -1))
            cond = module.scale_conditioning(uncond, module.encode_features(image_features), scale)

        def forward(
            sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, *, return_dict: bool = True, **unet_kwargs: object
        ) -> tuple[Tensor]:
            layout = read_cfg_layout(find_denoiser_call(pipe.unet), len(sample), encoder_hidden_states)
            rows_cond = {
                name: expand_to_cfg_batch((cond if name in module.also_in_uncond_rows else uncond)[name], value, layout, len(sample))
                for name, value in cond.items()
            }
            timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
            passed_kwargs = {name: value for name, value in unet_kwargs.items() if value is not None}
            return (module.call_unet(original_forward, sample, timesteps, encoder_hidden_states, rows_cond, **passed_kwargs),)

        with patched_forward(pipe.unet, forward):
            yield


@contextmanager
def patched_forward(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Within the context calls of the module go to `forward`."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:  # accelerate's offloading patches it too
            module.forward = before


def get_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of the module's first parameter."""
    return next(module.parameters()).dtype


def get_pooled_embedding(image_features: Tensor) -> Tensor:
    """The pooled embedding of the first reference image: (batch, references, 1, features) → (batch, features)."""
    return image_features[:, 0, 0]


def unflatten_pixels(image_features: Tensor) -> Tensor:
    """Pixels or latents of the first reference image: (batch, references, side · side, channels) → (batch, channels, side, side)."""
    side = round(image_features.shape[2] ** 0.5)
    first = image_features[:, 0].transpose(1, 2)
    return first.reshape(*first.shape[:2], side, side)


def is_null(image_features: Tensor) -> Tensor:
    """Which rows stand for no image, their features being zeros: (batch,) of bool."""
    return (image_features == 0).flatten(1).all(1)


def extend_unet(unet: UNet2DConditionModel, **config_changes: object) -> UNet2DConditionModel:
    """A trainable float32 copy of a UNet with additional inputs.

    The output layers of new modules are scaled down, so that the copy starts close to the base model. Raises UserError for a UNet that
    has additional inputs already, such as SDXL's.
    """
    if unet.config.addition_embed_type or unet.config.class_embed_type:
        raise UserError("this method adds inputs to a UNet: expected SD 1.5, SD 2.1 or mini as the base model; use an adapter for this one")
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}  # such as _name_or_path
    extended = UNet2DConditionModel.from_config({**config, **config_changes})
    missing, _ = extended.load_state_dict(unet.state_dict(), strict=False)
    with torch.no_grad():
        for name in missing:
            weight = extended.get_parameter(name)
            if name.startswith("encoder_hid_proj.text_proj."):  # an identity, which leaves the prompt embeddings unchanged
                weight.copy_(torch.eye(len(weight)) if weight.ndim == 2 else torch.zeros(len(weight)))
            elif re.search(OUTPUT_LAYERS, name):
                weight.mul_(0.1)
    if unet.is_gradient_checkpointing:
        extended.enable_gradient_checkpointing()
    return cast(UNet2DConditionModel, extended.float().train())


# New layers whose output is added to, or concatenated with, an input of the base model.
OUTPUT_LAYERS = r"^class_embedding(\.linear_2)?\.(weight|bias)$|^add_embedding\.(text_norm|image_proj)\.|^encoder_hid_proj\.image_embeds\."


class FineTunedUNet(ConditioningModule):
    """A method that trains all weights of the UNet, in a copy."""

    def __init__(self, unet: UNet2DConditionModel, **config_changes: object):
        super().__init__()
        self.unet = extend_unet(unet, **config_changes)

    def predict_with_finetuned_unet(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, **unet_kwargs: object) -> Tensor:
        """A call of the copy in its own dtype; the prediction has the dtype of the latents."""
        dtype = get_dtype(self.unet)
        unet_kwargs = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in unet_kwargs.items()}
        out = self.unet(latents.to(dtype), timesteps, prompt_embeds.to(dtype), **unet_kwargs)
        return cast(Tensor, out.sample).to(latents.dtype)
