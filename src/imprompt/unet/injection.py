"""Image prompts attached to the UNet of a diffusers pipeline: `attach` changes the UNet, `detach` restores it exactly.

A processor in every cross-attention layer (`unet.attn_processors`) adds finished keys and values; one forward pre-hook on the UNet
passes them as a cross-attention argument. Neither has parameters.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from imprompt.core.adapter import Adapter, LoRALinear
from imprompt.core.attention import ImageBranch, KeyValues
from imprompt.core.conditioning import downsample_mask, layer_scale
from imprompt.core.guidance import CFGLayout, expand_to_cfg_batch
from imprompt.errors import CheckpointError, UserError
from imprompt.unet.attachment import (
    AttachedPrompts,
    Branches,
    ImagePromptLike,
    PromptKeyValues,
    apply_gate,
    check_bare_layout,
    find_exclusive_call,
    name_arguments,
)
from imprompt.unet.attn_processors import (
    CROSS_ATTENTION_KWARG,
    CrossAttentionInputs,
    CrossAttentionLayer,
    InstalledAttnProcessors,
    UNet,
    compute_text_key_values,
    find_attention_layers,
    find_cross_attention_layers,
    infer_adapter_shape,
)
from imprompt.unet.calls import DenoiserCall, read_cfg_layout
from imprompt.unet.progress import read_denoising_progress
from imprompt.utils.compat import tensor_version, unwrap_compiled
from imprompt.utils.protocols import UNetPipeline


class _Batch(NamedTuple):
    """The batch of one UNet call: what the image branches are laid out for."""

    rows: int  # of the layers: each frame of a video is one
    frames: int
    height: int  # of the latents
    width: int
    cfg_layout: CFGLayout


class AttachedImagePrompts(AttachedPrompts):
    """Image prompts attached to a pipeline with a UNet, or to a bare UNet, until `detach()`. Also a context manager."""

    def __init__(self, target: UNetPipeline | nn.Module, prompts: Sequence[ImagePromptLike], cfg_layout: CFGLayout | None = None):
        is_bare = not hasattr(target, "unet")
        unet = cast(nn.Module, target if is_bare else cast(UNetPipeline, target).unet)
        self._unet, self._is_compiled = cast(UNet, unwrap_compiled(unet)), unwrap_compiled(unet) is not unet
        _check_unet(target, self._unet, is_bare=is_bare)
        if is_bare:
            check_bare_layout("UNet", cfg_layout)
        self._layers = find_cross_attention_layers(self._unet)
        self._text_cache = _TextCache()
        self._lora_hooks: list[RemovableHandle] = []
        super().__init__(unet, [layer.name for layer in self._layers], prompts, cfg_layout)

    def _check_compatible(self, prompt: ImagePromptLike) -> None:
        check_compatible(prompt.adapter, self._unet)

    def _install_processors(self) -> None:
        self._processors = InstalledAttnProcessors(self._unet, compiled=self._is_compiled)

    def _restore_processors(self) -> None:
        self._remove_lora_hooks()
        self._processors.restore()
        self._text_cache.clear()

    def _update_prompts(self) -> None:
        self._text_cache.clear()
        self._add_lora_hooks()

    def _add_lora_hooks(self) -> None:
        """Apply the low-rank updates of FaceID adapters to all attention layers, as hooks; none for prompts whose scale is 0 everywhere."""
        self._remove_lora_hooks()
        updates = [p.adapter.lora_layers for p in self._prompts if any(layer_scale(p.scale, layer.name) for layer in self._layers)]
        if not any(updates):
            return
        attentions = [self._unet.get_submodule(name) for name in find_attention_layers(self._unet)]
        for lora_layers in updates:
            for n, projections in lora_layers.items():
                for projection, lora in projections.items():
                    linear = attentions[n].get_submodule("to_out.0" if projection == "out" else f"to_{projection}")
                    self._lora_hooks.append(linear.register_forward_hook(_LoRAForwardHook(lora)))

    def _remove_lora_hooks(self) -> None:
        for hook in self._lora_hooks:
            hook.remove()
        self._lora_hooks.clear()

    def _pre_forward_hook(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before every call of the UNet: pass each layer its keys and values."""
        arguments = name_arguments(("sample", "timestep", "encoder_hidden_states"), args, kwargs)
        sample, timestep, prompt_embeds = (arguments[name] for name in ("sample", "timestep", "encoder_hidden_states"))
        call = find_exclusive_call(self._unet)
        batch = _read_batch(sample, self._cfg_layout or read_cfg_layout(call, len(sample), prompt_embeds))
        with self._lock:
            self._processors.check_installed()
            build = partial(self._build_branches, sample, batch)
            branches = self._cached_branches((batch, sample.dtype, sample.device), build)
            text = self._text_cache.get(self._unet, self._layers, prompt_embeds, timestep)
        gates = self._window_gates(timestep, call, batch.rows)
        inputs = {
            layer.name: CrossAttentionInputs(text[layer.index] if text else None, list(map(apply_gate, branches[layer.index], gates)))
            for layer in self._layers
        }
        cross_attention_kwargs = {**(kwargs.get("cross_attention_kwargs") or {}), CROSS_ATTENTION_KWARG: inputs}
        return args, {**kwargs, "cross_attention_kwargs": cross_attention_kwargs}

    def _build_branches(self, sample: Tensor, batch: _Batch, key_values: Sequence[PromptKeyValues]) -> Branches:
        return {layer.index: self._layer_branches(layer, sample, batch, key_values) for layer in self._layers}

    def _layer_branches(
        self, layer: CrossAttentionLayer, sample: Tensor, batch: _Batch, key_values: Sequence[PromptKeyValues]
    ) -> list[ImageBranch]:
        branches = []
        for prompt, (uncond, cond), bias in zip(self._prompts, key_values, self._biases, strict=True):
            key, value = (_expand(u, c, batch) for u, c in zip(uncond[layer.index], cond[layer.index], strict=True))
            value = value * layer_scale(prompt.scale, layer.name)
            mask = _build_mask(prompt, batch, layer.downsampling_level)
            scores = None if bias is None else _expand(bias, bias, batch)[:, None, None].to(sample)
            branches.append(ImageBranch(key.to(sample), value.to(sample), None if mask is None else mask.to(sample), scores))
        return branches

    def _read_progress(self, timestep: Tensor | float, call: DenoiserCall | None, rows: int) -> Tensor:
        progress = read_denoising_progress(call.scheduler if call else None, timestep)
        return progress.repeat_interleave(rows // len(progress)) if len(progress) > 1 else progress


def _check_unet(target: object, unet: object, *, is_bare: bool) -> None:
    if not isinstance(unet, (UNet2DConditionModel, UNetMotionModel)):
        raise TypeError(
            "expected a diffusers pipeline with a UNet2DConditionModel or UNetMotionModel, or such a UNet; "
            f"received {type(target).__name__}" + ("" if is_bare else f" with {type(unet).__name__}")
        )


def _read_batch(sample: Tensor, cfg_layout: CFGLayout) -> _Batch:
    """sample: (rows, channels, height, width), or for videos (rows, channels, frames, height, width)."""
    frames = sample.shape[2] if sample.ndim == 5 else 1
    return _Batch(len(sample) * frames, frames, sample.shape[-2], sample.shape[-1], cfg_layout)


def _expand(uncond: Tensor, cond: Tensor, batch: _Batch) -> Tensor:
    return expand_to_cfg_batch(uncond, cond, batch.cfg_layout, batch.rows, batch.frames)


def _build_mask(prompt: ImagePromptLike, batch: _Batch, downsampling_level: int) -> Tensor | None:
    """The weight of each position, (1 or rows, 1 or positions, 1): the mask times the weights of the frames."""
    mask = None if prompt.mask is None else downsample_mask(prompt.mask, batch.height, batch.width, downsampling_level)
    weights = None if prompt.frame_weights is None else prompt.frame_weights[:, None, None]
    for name, factor in {"mask": mask, "frame_weights": weights}.items():
        if factor is not None and len(factor) not in (1, batch.frames):
            received = f"a video of {batch.frames} frames" if batch.frames > 1 else "an image"
            raise UserError(f"{name}: given for {len(factor)} frames, and the pipeline generates {received}")
    if weights is not None:
        mask = weights if mask is None else mask.to(weights.device) * weights
    return mask if mask is None or len(mask) == 1 else mask.repeat(batch.rows // batch.frames, 1, 1)


class _LoRAForwardHook:
    """A forward hook that adds a low-rank update to a linear layer's output, in the layer's own dtype."""

    def __init__(self, lora: LoRALinear):
        self._lora = lora

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0]
        return out + F.linear(F.linear(x, self._lora.down.weight.to(x)), self._lora.up.weight.to(x))


class _TextCache:
    """The text's keys and values, reused while the UNet is called with the same prompt embeddings.

    They are the same at every step of a generation. A timestep that does not decrease marks the beginning of the next generation.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop the cached keys and values."""
        self._prompt_embeds: Tensor | None = None
        self._version = -1
        self._timestep = -1.0
        self._key_values: dict[int, KeyValues] = {}

    def get(
        self, unet: UNet, layers: Sequence[CrossAttentionLayer], prompt_embeds: Tensor, timestep: Tensor | float
    ) -> dict[int, KeyValues] | None:
        """Keys and values for each layer n; None where the layers themselves must compute them."""
        if torch.is_grad_enabled() or unet.encoder_hid_proj is not None:
            return None
        if not all(_can_cache_text(layer.attention, prompt_embeds) for layer in layers):
            return None
        t = float(torch.as_tensor(timestep).flatten()[0])
        version = tensor_version(prompt_embeds)
        if self._prompt_embeds is not prompt_embeds or self._version != version or t >= self._timestep:
            self._key_values = {layer.index: compute_text_key_values(layer.attention, prompt_embeds) for layer in layers}
            self._prompt_embeds, self._version = prompt_embeds, version
        self._timestep = t
        return self._key_values


def _can_cache_text(attn: Attention, prompt_embeds: Tensor) -> bool:
    """Whether the layer's projections are plain linear layers at hand, without LoRA, offloading or quantization."""
    return (
        type(attn.to_k) is nn.Linear
        and type(attn.to_v) is nn.Linear
        and attn.to_k.weight.device == prompt_embeds.device
        and attn.to_k.weight.dtype == prompt_embeds.dtype
    )


def check_compatible(adapter: Adapter, unet: UNet) -> None:
    """Raise CheckpointError where the adapter was made for another UNet."""
    hidden_dims, cross_attention_dim = infer_adapter_shape(unet)
    lora_layers = adapter.lora_layers
    has_unknown_lora = bool(lora_layers) and max(lora_layers) >= len(find_attention_layers(unet))
    if adapter.cross_attention_dim != cross_attention_dim or adapter.hidden_dims != hidden_dims or has_unknown_lora:
        raise CheckpointError(
            f"the adapter does not fit this model: it was made for {len(adapter.hidden_dims)} cross-attention layers and text embeddings "
            f"of width {adapter.cross_attention_dim}, the model has {len(hidden_dims)} and width {cross_attention_dim}; "
            "use an adapter of the same base family (imprompt inspect FILE)"
        )
