"""Image prompts attached to a diffusion transformer: `attach` changes its attention processors, `detach` restores them exactly."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from imprompt.core.adapter import Adapter
from imprompt.core.attention import ImageBranch, SelfAttention
from imprompt.core.conditioning import downsample_mask, layer_scale
from imprompt.core.guidance import CFGLayout, expand_to_cfg_batch
from imprompt.dit.attn_processors import PROCESSORS, DiTAttnProcessor, SiteBranch
from imprompt.dit.sites import AttentionSite, Host, TokenGrid, find_host, find_sites
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
from imprompt.unet.calls import DenoiserCall
from imprompt.unet.progress import read_denoising_progress
from imprompt.utils.compat import unwrap_compiled

_MAX_REMEMBERED_STEPS = 200  # of keys and values that depend on the timestep


class _Batch(NamedTuple):
    """One call of the transformer: what the branches are laid out for."""

    rows: int
    grid: TokenGrid
    text_tokens: int
    cfg_layout: CFGLayout
    timestep: float  # 0 … 1000; 0 where no adapter depends on it


class AttachedToTransformer(AttachedPrompts):
    """Image prompts attached to a pipeline with a transformer, or to a bare transformer, until `detach()`. Also a context manager."""

    def __init__(self, target: Any, prompts: Sequence[ImagePromptLike], cfg_layout: CFGLayout | None = None):
        is_bare = isinstance(target, nn.Module)
        transformer = target if is_bare else target.transformer
        self._transformer: Any = unwrap_compiled(transformer)
        self._host: Host = find_host(self._transformer)
        if is_bare:
            check_bare_layout("transformer", cfg_layout)
        self._sites = find_sites(self._transformer)
        super().__init__(transformer, [site.name for site in self._sites], prompts, cfg_layout)

    def _check_compatible(self, prompt: ImagePromptLike) -> None:
        check_compatible(prompt.adapter, self._transformer)
        if prompt.frame_weights is not None or (prompt.mask is not None and prompt.mask.ndim > 2):
            raise UserError("frame_weights, mask: given for the frames of a video, and this transformer generates an image")

    def _install_processors(self) -> None:
        self._processors = _install_processors(self._sites)

    def _restore_processors(self) -> None:
        for site, processor in zip(self._sites, self._processors, strict=True):
            attention: Any = site.attention
            if attention.processor is processor:
                attention.set_processor(processor.replaced)

    def _update_prompts(self) -> None:
        """Find the prompts whose adapters have each site, in their order."""
        indices = [prompt.adapter.hidden_dims.keys() for prompt in self._prompts]
        self._prompts_of_site = {site.index: [n for n, known in enumerate(indices) if site.index in known] for site in self._sites}
        self._is_per_step = any(prompt.adapter.family.is_per_step for prompt in self._prompts)

    def _pre_forward_hook(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every call of the transformer: give each processor its branches."""
        self._check_installed()
        arguments = name_arguments(type(self._transformer).forward.__code__.co_varnames[1:], args, kwargs)
        call, sample = find_exclusive_call(self._transformer), arguments["hidden_states"]
        batch = self._read_batch(arguments, call)
        with self._lock:
            branches = self._cached_branches(
                (batch, sample.dtype, sample.device), partial(self._build_branches, sample, batch), batch.timestep,
                max_cached=2 * _MAX_REMEMBERED_STEPS if self._is_per_step else 2,
            )  # fmt: skip
        gates = self._window_gates(arguments["timestep"], call, batch.rows)
        families = [prompt.adapter.family for prompt in self._prompts]
        for site, processor in zip(self._sites, self._processors, strict=True):
            pairs = zip(self._prompts_of_site[site.index], branches[site.index], strict=True)
            processor.branches = [SiteBranch(apply_gate(branch, gates[n]), families[n]) for n, branch in pairs]

    def _check_installed(self) -> None:
        for site, processor in zip(self._sites, self._processors, strict=True):
            if site.attention.processor is not processor:
                raise RuntimeError(
                    f"after attach(), {site.name} was given {type(site.attention.processor).__name__}, and the image prompt would be "
                    "ignored: attach last"
                )

    def _read_batch(self, arguments: Mapping[str, Any], call: DenoiserCall | None) -> _Batch:
        hidden_states, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        layout = self._cfg_layout or read_cfg_layout(self._host, call, arguments)
        grid = self._host.read_grid(self._transformer, arguments)
        timestep = float(torch.as_tensor(arguments["timestep"]).flatten()[0]) * self._host.timestep_scale if self._is_per_step else 0.0
        return _Batch(len(hidden_states), grid, text.shape[1], layout, timestep)

    def _build_branches(self, sample: Tensor, batch: _Batch, key_values: Sequence[PromptKeyValues]) -> Branches:
        layouts = [_PromptLayout.create(prompt, bias, sample, batch) for prompt, bias in zip(self._prompts, self._biases, strict=True)]
        return {
            site.index: [_build_branch(layouts[n], site, key_values[n], sample, batch) for n in self._prompts_of_site[site.index]]
            for site in self._sites
        }

    def _read_progress(self, timestep: Tensor | float, call: DenoiserCall | None, rows: int) -> Tensor:
        """1 − σ of flow matching, whose timestep is 1000 σ; the scheduler's own timesteps for other models."""
        scheduler = call.scheduler if call else None
        timesteps = torch.as_tensor(timestep).flatten().double() * self._host.timestep_scale
        if scheduler is not None and "FlowMatch" not in type(scheduler).__name__:
            return read_denoising_progress(scheduler, timesteps)
        return 1 - timesteps / 1000


def _install_processors(sites: Sequence[AttentionSite]) -> list[DiTAttnProcessor]:
    """One of ours at every site. Raises RuntimeError where a site has another processor than diffusers' default."""
    installed: list[DiTAttnProcessor] = []
    for site in sites:
        replaced = site.attention.processor
        if isinstance(replaced, DiTAttnProcessor):
            raise RuntimeError("this transformer already has image prompts attached: detach them, or pass all to one attach()")
        matching = [cls for cls in PROCESSORS if type(replaced) in cls.replaces]
        if not matching:
            raise RuntimeError(
                f"{site.name} uses {type(replaced).__name__}, which image prompts cannot be added to; expected diffusers' default attention"
            )
        installed.append(matching[0](replaced))
    for site, processor in zip(sites, installed, strict=True):
        cast(Any, site.attention).set_processor(processor)
    return installed


def read_cfg_layout(host: Host, call: DenoiserCall | None, arguments: Mapping[str, Any]) -> CFGLayout:
    """The groups of rows of this call's batch. Raises UserError outside a pipeline.

    Where guidance takes two calls, the unconditional one has the embeddings of the negative prompt.
    """
    if call is None:
        raise UserError(
            "the transformer was called, and not by a pipeline that has it: which rows of its batch are conditional is not known; "
            'attach with cfg_layout=("uncond", "cond"), or cfg_layout=("cond",) without guidance'
        )
    if not host.batches_guidance:
        return ("uncond",) if arguments["encoder_hidden_states"] is call.variables.get("negative_prompt_embeds") else ("cond",)
    if arguments.get("skip_layers") is not None:  # skip-layer guidance repeats the conditional rows
        return ("cond",)
    layout: CFGLayout = ("uncond", "cond") if call.is_guided else ("cond",)
    return (*layout, "cond") if getattr(call.pipeline, "do_perturbed_attention_guidance", False) else layout


class _PromptLayout(NamedTuple):
    """What all branches of one image prompt share in a batch."""

    prompt: ImagePromptLike
    bias: Tensor | None  # (rows, 1, 1, tokens)
    mask: Tensor | None  # (1, image tokens, 1)

    @classmethod
    def create(cls, prompt: ImagePromptLike, bias: Tensor | None, sample: Tensor, batch: _Batch) -> Self:
        """From the bias of one prompt or of each."""
        bias = None if bias is None else expand_to_cfg_batch(bias, bias, batch.cfg_layout, batch.rows)[:, None, None].to(sample)
        return cls(prompt, bias, None if prompt.mask is None else _build_mask(prompt.mask, batch.grid).to(sample))


def _build_branch(layout: _PromptLayout, site: AttentionSite, key_values: PromptKeyValues, sample: Tensor, batch: _Batch) -> ImageBranch:
    pairs = zip(*(part[site.index] for part in key_values), strict=True)
    key, value = (expand_to_cfg_batch(uncond, cond, batch.cfg_layout, batch.rows).to(sample) for uncond, cond in pairs)
    prompt, mask = layout.prompt, layout.mask
    scale, norms = layer_scale(prompt.scale, site.name), prompt.adapter.self_attention_norms(site.index)
    if mask is not None and prompt.mask is not None and site.side == "single":  # text positions have the share that the mask covers
        mask = torch.cat([prompt.mask.float().mean().expand(1, batch.text_tokens, 1).to(mask), mask], 1)
    if norms is None:
        return ImageBranch(key, scale * value, mask, layout.bias)
    own = SelfAttention(norms[0].to(sample), norms[1].to(sample), torch.full((1, 1, 1), scale).to(sample))
    return ImageBranch(key, value, mask, layout.bias, own)


def _build_mask(mask: Tensor, grid: TokenGrid) -> Tensor:
    """The weight of each image token, (1, tokens, 1). Tokens of a reference (Kontext) are not part of the generated image: 0."""
    weights = downsample_mask(mask, grid.height, grid.width)
    return torch.cat([weights, weights.new_zeros(1, grid.num_tokens - weights.shape[1], 1)], 1)


def check_compatible(adapter: Adapter, transformer: nn.Module) -> None:
    """Raise CheckpointError where the adapter was made for another model."""
    host, family, hidden_dims = find_host(transformer), adapter.family, adapter.hidden_dims
    if family.hosts and host.family not in family.hosts:
        raise CheckpointError(
            f"the adapter was made for {' or '.join(family.hosts)}, and the model is {host.family} ({type(transformer).__name__}); "
            f"use an adapter for {host.family} (imprompt inspect FILE)"
        )
    sites = {site.index: site.hidden_dim for site in find_sites(transformer) if site.side in family.sides}
    if hidden_dims != sites:
        raise CheckpointError(
            f"the adapter does not fit this model: it was made for {len(hidden_dims)} attention layers of width "
            f"{max(hidden_dims.values(), default=0)}, the model has {len(sites)} of width {max(sites.values(), default=0)}; "
            f"use an adapter for this {host.family} model (imprompt inspect FILE)"
        )
