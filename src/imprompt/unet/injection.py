"""Image prompts attached to the UNet of a diffusers pipeline: `attach` changes the UNet, `detach` restores it exactly.

A processor in every cross-attention layer (`unet.attn_processors`) adds finished keys and values; one forward pre-hook on the UNet
passes them as a cross-attention argument. Neither has parameters.
"""

import threading
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, Self, cast

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from imprompt.core.adapter import Adapter, LoRALinear
from imprompt.core.attention import ImageBranch, KeyValues
from imprompt.core.conditioning import Scale, check_scale, check_window, downsample_mask, layer_scale, unknown_blocks, window_gate
from imprompt.core.guidance import CFGLayout, expand_to_cfg_batch
from imprompt.errors import CheckpointError, UserError
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
from imprompt.unet.calls import UNetCall, check_exclusive, find_unet_call, read_cfg_layout
from imprompt.unet.progress import read_denoising_progress
from imprompt.utils.compat import is_compiled_in_place, tensor_version, unwrap_compiled
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
        """(height, width) or (frames, height, width) in 0 … 1, or None for 1 everywhere."""

    @property
    def frame_weights(self) -> Tensor | None:
        """(frames,): a factor of λ for each frame of a video, or None for 1."""

    @property
    def requires_grad(self) -> bool:
        """Whether gradients are wanted of what its keys and values are computed from."""
        ...

    @property
    def start_at(self) -> float:
        """The beginning of the conditioning window as a fraction of denoising, 0 … 1."""
        ...

    @property
    def end_at(self) -> float:
        """The end of the conditioning window."""
        ...

    def key_values(self, timestep: float | None = None) -> tuple[dict[int, KeyValues], dict[int, KeyValues]]:
        """For each layer n the keys and values of the unconditional embedding and of the image: (1 or prompts, tokens, hidden).

        With gradients, where autograd is on and `requires_grad` is.
        """
        ...

    def attention_bias(self) -> Tensor | None:
        """The logarithm of the weight of each image token, (1 or prompts, tokens); None where all weights are equal."""
        ...


class _Batch(NamedTuple):
    """The batch of one UNet call: what the image branches are laid out for."""

    rows: int  # of the layers: each frame of a video is one
    frames: int
    height: int  # of the latents
    width: int
    cfg_layout: CFGLayout


class AttachedImagePrompts:
    """Image prompts attached to a pipeline or to a bare UNet, until `detach()`. Also a context manager.

    `prompts` may be replaced at any time. The UNet's `state_dict` never changes, and `detach` restores its processors. Several threads may
    generate with one UNet, each with a scheduler of its own.
    """

    def __init__(self, target: UNetPipeline | nn.Module, prompts: Sequence[ImagePromptLike], cfg_layout: CFGLayout | None = None):
        is_bare = not hasattr(target, "unet")
        unet = cast(nn.Module, target if is_bare else cast(UNetPipeline, target).unet)
        self._unet = cast(UNet, unwrap_compiled(unet))
        _check_target(target, self._unet, cfg_layout, is_bare=is_bare)
        self._cfg_layout = cfg_layout
        self._layers = find_cross_attention_layers(self._unet)
        self._lock = threading.Lock()
        self._text_cache = _TextCache()
        self._branch_cache: dict[Hashable, dict[int, list[ImageBranch]]] = {}
        self._lora_hooks: list[RemovableHandle] = []
        self.prompts = tuple(prompts)
        self._processors: InstalledAttnProcessors | None = InstalledAttnProcessors(self._unet, compiled=self._unet is not unet)
        hook: Any = self._pre_forward_hook
        if is_compiled_in_place(unet):
            hook = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
        self._pre_hook = unet.register_forward_pre_hook(hook, with_kwargs=True)

    def __setattr__(self, name: str, value: object) -> None:
        if name != "prompts" and not name.startswith("_"):
            raise AttributeError(f"there is no {name} to set; expected for example: attached.prompts = [prompt.with_scale(0.5)]")
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UserError("a pipeline with image prompts attached cannot be copied or pickled; detach() them first, and attach to the copy")

    @property
    def prompts(self) -> tuple[ImagePromptLike, ...]:
        """The image prompts that condition the UNet. Assign others to replace them."""
        return self._prompts

    @prompts.setter
    def prompts(self, prompts: Sequence[ImagePromptLike] | ImagePromptLike) -> None:
        prompts = tuple(prompts) if isinstance(prompts, (list, tuple)) else (cast(ImagePromptLike, prompts),)
        for prompt in prompts:
            _check_prompt(prompt)
            check_compatible(prompt.adapter, self._unet)
            _check_scale(prompt.scale, self._layers)
        with self._lock:
            self._prompts = prompts
            self._compute_key_values()
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

    @torch.no_grad()
    def _compute_key_values(self) -> None:
        """Keys and values for generation. Those for training are computed in each call of the UNet, with gradients."""
        self._adapter_versions = self._read_adapter_versions()
        self._key_values = [prompt.key_values() for prompt in self._prompts]
        self._biases = [prompt.attention_bias() for prompt in self._prompts]
        self._branch_cache.clear()

    def _read_adapter_versions(self) -> list[int]:
        """Numbers that change with every step of an optimizer."""
        return [tensor_version(parameter) for prompt in self._prompts if prompt.requires_grad for parameter in prompt.adapter.parameters()]

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

    def _pre_forward_hook(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before every call of the UNet: pass each layer its keys and values."""
        assert self._processors is not None
        names = ("sample", "timestep", "encoder_hidden_states")
        sample, timestep, prompt_embeds = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(names))
        call = find_unet_call(self._unet)
        if call is not None:
            check_exclusive(call)
        batch = _read_batch(sample, self._cfg_layout or read_cfg_layout(call, len(sample), prompt_embeds))
        with self._lock:
            self._processors.check_installed()
            branches = self._read_branches(sample, batch)
            text = self._text_cache.get(self._unet, self._layers, prompt_embeds, timestep)
        gates = self._window_gates(timestep, call, batch.rows)
        inputs = {
            layer.name: CrossAttentionInputs(text[layer.index] if text else None, _apply_gates(branches[layer.index], gates))
            for layer in self._layers
        }
        cross_attention_kwargs = {**(kwargs.get("cross_attention_kwargs") or {}), CROSS_ATTENTION_KWARG: inputs}
        return args, {**kwargs, "cross_attention_kwargs": cross_attention_kwargs}

    def _read_branches(self, sample: Tensor, batch: _Batch) -> dict[int, list[ImageBranch]]:
        """For every layer n one branch per image prompt, expanded to the rows of the batch.

        Cached until the batch has another shape or an optimizer has changed an adapter; computed anew where gradients are wanted.
        """
        if torch.is_grad_enabled() and any(prompt.requires_grad for prompt in self._prompts):
            return self._build_branches(sample, batch, [prompt.key_values() for prompt in self._prompts])
        if self._adapter_versions != self._read_adapter_versions():
            self._compute_key_values()
        key = (batch, sample.dtype, sample.device)
        if key not in self._branch_cache:
            self._branch_cache.clear()
            self._branch_cache[key] = self._build_branches(sample, batch, self._key_values)
        return self._branch_cache[key]

    def _build_branches(self, sample: Tensor, batch: _Batch, key_values: Sequence["PromptKeyValues"]) -> dict[int, list[ImageBranch]]:
        return {layer.index: self._layer_branches(layer, sample, batch, key_values) for layer in self._layers}

    def _layer_branches(
        self, layer: CrossAttentionLayer, sample: Tensor, batch: _Batch, key_values: Sequence["PromptKeyValues"]
    ) -> list[ImageBranch]:
        branches = []
        for prompt, (uncond, cond), bias in zip(self._prompts, key_values, self._biases, strict=True):
            key, value = (_expand(u, c, batch) for u, c in zip(uncond[layer.index], cond[layer.index], strict=True))
            value = value * layer_scale(prompt.scale, layer.name)
            mask = _build_mask(prompt, batch, layer.downsampling_level)
            scores = None if bias is None else _expand(bias, bias, batch)[:, None, None].to(sample)
            branches.append(ImageBranch(key.to(sample), value.to(sample), None if mask is None else mask.to(sample), scores))
        return branches

    def _window_gates(self, timestep: Tensor | float, call: UNetCall | None, rows: int) -> list[Tensor | None]:
        """For each image prompt the gate of its conditioning window, (1, 1, 1) or (rows, 1, 1); None for a window that is always open."""
        windows = [(prompt.start_at, prompt.end_at) for prompt in self._prompts]
        if all(window == (0.0, 1.0) for window in windows):
            return [None] * len(windows)
        progress = read_denoising_progress(call.scheduler if call else None, timestep)
        if len(progress) > 1:
            progress = progress.repeat_interleave(rows // len(progress))
        return [None if window == (0.0, 1.0) else window_gate(progress, *window)[:, None, None] for window in windows]


PromptKeyValues = tuple[dict[int, KeyValues], dict[int, KeyValues]]  # of the unconditional embedding, and of the image


def _check_target(target: object, unet: object, cfg_layout: CFGLayout | None, *, is_bare: bool) -> None:
    if not isinstance(unet, (UNet2DConditionModel, UNetMotionModel)):
        raise TypeError(
            "expected a diffusers pipeline with a UNet2DConditionModel or UNetMotionModel, or such a UNet; "
            f"received {type(target).__name__}" + ("" if is_bare else f" with {type(unet).__name__}")
        )
    if is_bare and cfg_layout is None:
        raise UserError(
            "cfg_layout: a bare UNet does not know which rows of its batch are conditional; "
            'expected cfg_layout=("uncond", "cond"), or cfg_layout=("cond",) without guidance'
        )
    if cfg_layout is not None and (not cfg_layout or not all(group in ("uncond", "cond") for group in cfg_layout)):
        raise UserError(f'cfg_layout: expected groups such as ("uncond", "cond") or ("cond",), received {cfg_layout!r}')


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


def _apply_gates(branches: list[ImageBranch], gates: list[Tensor | None]) -> list[ImageBranch]:
    return [
        branch if gate is None else branch._replace(value=branch.value * gate.to(branch.value))
        for branch, gate in zip(branches, gates, strict=True)
    ]


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


def _check_prompt(prompt: object) -> None:
    if not hasattr(prompt, "key_values"):
        raise UserError(f"expected image prompts, as imprompt.load(ADAPTER)(images) returns them; received {type(prompt).__name__}")
    prompt = cast(ImagePromptLike, prompt)
    check_scale(prompt.scale)
    check_window(prompt.start_at, prompt.end_at)


def _check_scale(scale: Scale, layers: Sequence[CrossAttentionLayer]) -> None:
    unknown = unknown_blocks(scale, [layer.name for layer in layers])
    if unknown:
        raise UserError(
            f"scale names blocks that this model does not have: {', '.join(unknown)}; its layers have names like {layers[0].name}"
        )
