"""Image prompts attached to the UNet of a diffusers pipeline: `attach` changes the UNet, `detach` restores it exactly.

A processor in every cross-attention layer (`unet.attn_processors`) adds finished keys and values; one forward pre-hook on the UNet
passes them as a cross-attention argument. Neither has parameters.
"""

import threading
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, Self, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from imprompt.core.adapter import Adapter, LoRALinear
from imprompt.core.attention import ImageBranch, KeyValues
from imprompt.core.conditioning import Scale, downsample_mask, layer_scale, unknown_blocks, window_gate
from imprompt.core.guidance import CFGLayout, expand_to_cfg_batch, read_cfg_layout
from imprompt.errors import CheckpointError, UserError
from imprompt.unet.attn_processors import (
    CROSS_ATTENTION_KWARG,
    CrossAttentionInputs,
    CrossAttentionLayer,
    InstalledAttnProcessors,
    compute_text_key_values,
    find_cross_attention_layers,
    infer_adapter_shape,
)
from imprompt.utils.compat import tensor_version, unwrap_compiled
from imprompt.utils.protocols import UNetPipeline


class ImagePromptLike(Protocol):
    """What is needed of an image prompt to attach it to a UNet."""

    @property
    def adapter(self) -> Adapter:
        """The adapter that computes its keys and values."""
        ...

    @property
    def scale(self) -> Scale:
        """λ, of all layers or by block."""
        ...

    @property
    def mask(self) -> Tensor | None:
        """(height, width) in 0 … 1, or None for 1 everywhere."""

    @property
    def start_at(self) -> float:
        """The beginning of the conditioning window as a fraction of denoising, 0 … 1."""
        ...

    @property
    def end_at(self) -> float:
        """The end of the conditioning window."""
        ...

    def key_values(self) -> tuple[dict[int, KeyValues], dict[int, KeyValues]]:
        """For each layer n the keys and values of the unconditional embedding and of the image: (1 or prompts, tokens, hidden)."""
        ...

    def attention_bias(self) -> Tensor | None:
        """The logarithm of the weight of each image token, (1 or prompts, tokens); None where all weights are equal."""
        ...


class AttachedImagePrompts:
    """Image prompts attached to a pipeline or to a bare UNet, until `detach()`. Also a context manager.

    `prompts` may be replaced at any time. The UNet's `state_dict` never changes, and `detach` restores its processors.
    """

    def __init__(self, target: UNetPipeline | nn.Module, prompts: Sequence[ImagePromptLike], cfg_layout: CFGLayout | None = None):
        self._pipe = cast(UNetPipeline, target) if hasattr(target, "unet") else None
        unet = cast(nn.Module, target if self._pipe is None else self._pipe.unet)
        self._unet: UNet2DConditionModel = unwrap_compiled(unet)
        if not isinstance(self._unet, UNet2DConditionModel):
            raise TypeError(f"expected a diffusers pipeline with a UNet2DConditionModel, or such a UNet; received {type(target).__name__}")
        if self._pipe is None and cfg_layout is None:
            raise UserError(
                "cfg_layout: a bare UNet does not know which rows of its batch are conditional; "
                'expected cfg_layout=("uncond", "cond"), or cfg_layout=("cond",) without guidance'
            )
        self._cfg_layout = cfg_layout
        self._layers = find_cross_attention_layers(self._unet)
        self._lock = threading.Lock()
        self._text_cache = _TextCache()
        self._branch_cache: dict[Hashable, dict[int, list[ImageBranch]]] = {}
        self._lora_hooks: list[RemovableHandle] = []
        self.prompts = tuple(prompts)
        self._processors: InstalledAttnProcessors | None = InstalledAttnProcessors(self._unet, compiled=self._unet is not unet)
        self._pre_hook = unet.register_forward_pre_hook(self._pre_forward_hook, with_kwargs=True)

    @property
    def prompts(self) -> tuple[ImagePromptLike, ...]:
        """The image prompts that condition the UNet. Assign others to replace them."""
        return self._prompts

    @prompts.setter
    def prompts(self, prompts: Sequence[ImagePromptLike]) -> None:
        prompts = tuple(prompts)
        for prompt in prompts:
            check_compatible(prompt.adapter, self._unet)
            _check_scale(prompt.scale, self._layers)
        key_values = [(*prompt.key_values(), prompt.attention_bias()) for prompt in prompts]
        with self._lock:
            self._prompts, self._key_values = prompts, key_values
            self._branch_cache.clear()
            self._text_cache.clear()
            self._add_lora_hooks()

    def detach(self) -> None:
        """Restore the UNet exactly. A second call does nothing."""
        if self._processors is None:
            return
        self._pre_hook.remove()
        self._remove_lora_hooks()
        self._processors.restore()
        self._processors = None
        self._branch_cache.clear()
        self._text_cache.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _add_lora_hooks(self) -> None:
        """Apply the low-rank updates of FaceID adapters to all attention layers, as hooks; none for prompts whose scale is 0 everywhere."""
        self._remove_lora_hooks()
        updates = [p.adapter.lora_layers for p in self._prompts if any(layer_scale(p.scale, layer.name) for layer in self._layers)]
        if not any(updates):
            return
        attentions = [self._unet.get_submodule(name.removesuffix(".processor")) for name in self._unet.attn_processors]
        for lora_layers in updates:
            for n, projections in lora_layers.items():
                for projection, lora in projections.items():
                    linear = attentions[n].get_submodule("to_out.0" if projection == "out" else f"to_{projection}")
                    self._lora_hooks.append(linear.register_forward_hook(_LoRAForwardHook(lora)))

    def _remove_lora_hooks(self) -> None:
        for hook in self._lora_hooks:
            hook.remove()
        self._lora_hooks.clear()

    def _pre_forward_hook(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before every call of the UNet: pass each layer its keys and values."""
        assert self._processors is not None
        self._processors.check_installed()
        names = ("sample", "timestep", "encoder_hidden_states")
        sample, timestep, prompt_embeds = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(names))
        with self._lock:
            branches = self._cached_branches(sample, self._cfg_layout or read_cfg_layout(self._pipe))
            text = self._text_cache.get(self._unet, self._layers, prompt_embeds, timestep)
        gates = self._window_gates(timestep)
        inputs = {
            layer.name: CrossAttentionInputs(text[layer.index] if text else None, _apply_gates(branches[layer.index], gates))
            for layer in self._layers
        }
        cross_attention_kwargs = {**(kwargs.get("cross_attention_kwargs") or {}), CROSS_ATTENTION_KWARG: inputs}
        return args, {**kwargs, "cross_attention_kwargs": cross_attention_kwargs}

    def _cached_branches(self, sample: Tensor, cfg_layout: CFGLayout) -> dict[int, list[ImageBranch]]:
        """For every layer n one branch per image prompt, expanded to the rows of the batch; cached until its shape changes."""
        key = (sample.shape, sample.dtype, sample.device, cfg_layout)
        if key not in self._branch_cache:
            self._branch_cache.clear()
            self._branch_cache[key] = {layer.index: self._layer_branches(layer, sample, cfg_layout) for layer in self._layers}
        return self._branch_cache[key]

    def _layer_branches(self, layer: CrossAttentionLayer, sample: Tensor, cfg_layout: CFGLayout) -> list[ImageBranch]:
        rows, _, height, width = sample.shape
        branches = []
        for prompt, (uncond, cond, bias) in zip(self._prompts, self._key_values, strict=True):
            key, value = (expand_to_cfg_batch(u, c, cfg_layout, rows) for u, c in zip(uncond[layer.index], cond[layer.index], strict=True))
            value = value * layer_scale(prompt.scale, layer.name)
            mask = None if prompt.mask is None else downsample_mask(prompt.mask, height, width, layer.downsampling_level).to(sample)
            scores = None if bias is None else expand_to_cfg_batch(bias, bias, cfg_layout, rows)[:, None, None].to(sample)
            branches.append(ImageBranch(key.to(sample), value.to(sample), mask, scores))
        return branches

    def _window_gates(self, timestep: Tensor | float) -> list[Tensor | None]:
        """For each image prompt the gate of its conditioning window; None for a window that is always open."""
        total = self._num_train_timesteps()
        return [None if (p.start_at, p.end_at) == (0.0, 1.0) else window_gate(timestep, total, p.start_at, p.end_at) for p in self._prompts]

    def _num_train_timesteps(self) -> int:
        scheduler = getattr(self._pipe, "scheduler", None)
        return 1000 if scheduler is None else int(scheduler.config.num_train_timesteps)


def _apply_gates(branches: list[ImageBranch], gates: list[Tensor | None]) -> list[ImageBranch]:
    return [
        branch if gate is None else branch._replace(value=branch.value * gate.to(branch.value))
        for branch, gate in zip(branches, gates, strict=True)
    ]


class _LoRAForwardHook:
    """A forward hook that adds a low-rank update to a linear layer's output, in the layer's own dtype."""

    def __init__(self, lora: LoRALinear):
        self._weights = lora.down.weight.detach(), lora.up.weight.detach()

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0]
        down, up = self._weights
        if down.dtype != x.dtype or down.device != x.device:
            self._weights = down, up = down.to(x), up.to(x)
        return out + (x @ down.T) @ up.T


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
        self, unet: UNet2DConditionModel, layers: Sequence[CrossAttentionLayer], prompt_embeds: Tensor, timestep: Tensor | float
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
        and not attn.norm_cross
        and attn.to_k.weight.device == prompt_embeds.device
        and attn.to_k.weight.dtype == prompt_embeds.dtype
    )


def check_compatible(adapter: Adapter, unet: UNet2DConditionModel) -> None:
    """Raise CheckpointError where the adapter was made for another UNet."""
    hidden_dims, cross_attention_dim = infer_adapter_shape(unet)
    lora_layers = adapter.lora_layers
    has_unknown_lora = bool(lora_layers) and max(lora_layers) >= len(unet.attn_processors)
    if adapter.cross_attention_dim != cross_attention_dim or adapter.hidden_dims != hidden_dims or has_unknown_lora:
        raise CheckpointError(
            f"the adapter does not fit this model: it was made for {len(adapter.hidden_dims)} cross-attention layers and text embeddings "
            f"of width {adapter.cross_attention_dim}, the model has {len(hidden_dims)} and width {cross_attention_dim}; "
            "use an adapter of the same base family (imprompt inspect FILE)"
        )


def _check_scale(scale: Scale, layers: Sequence[CrossAttentionLayer]) -> None:
    unknown = unknown_blocks(scale, [layer.name for layer in layers])
    if unknown:
        raise UserError(
            f"scale names blocks that this model does not have: {', '.join(unknown)}; its layers have names like {layers[0].name}"
        )


def attach(target: UNetPipeline | nn.Module, *prompts: ImagePromptLike, cfg_layout: CFGLayout | None = None) -> AttachedImagePrompts:
    """Attach image prompts to a diffusers pipeline with a UNet, or to a bare UNet.

    Use the result as a context manager, or keep it: its `prompts` may be replaced, and `detach()` restores the UNet exactly.

    A bare UNet needs `cfg_layout`, the groups of rows of its batch: ("uncond", "cond") with guidance, ("cond",) without. Raises UserError
    without it or for unknown blocks in a scale, CheckpointError for an adapter of another model, RuntimeError for a UNet whose attention
    processors are not diffusers' default.
    """
    return AttachedImagePrompts(target, prompts, cfg_layout)
