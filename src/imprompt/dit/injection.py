"""Image prompts attached to a diffusion transformer: `attach` changes its attention processors, `detach` restores them exactly."""

import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from imprompt.core.adapter import Adapter
from imprompt.core.attention import ImageBranch, SelfAttention
from imprompt.core.conditioning import check_scale, check_window, downsample_mask, layer_scale, unknown_blocks, window_gate
from imprompt.core.guidance import CFGLayout, expand_to_cfg_batch
from imprompt.dit.attn_processors import PROCESSORS, DiTAttnProcessor, SiteBranch
from imprompt.dit.sites import AttentionSite, Host, TokenGrid, find_host, find_sites
from imprompt.errors import CheckpointError, UserError
from imprompt.unet.calls import UNetCall, check_exclusive, find_unet_call
from imprompt.unet.injection import ImagePromptLike, PromptKeyValues
from imprompt.unet.progress import read_denoising_progress
from imprompt.utils.compat import is_compiled_in_place, unwrap_compiled

_MAX_REMEMBERED_STEPS = 200  # of keys and values that depend on the timestep


class _Batch(NamedTuple):
    """One call of the transformer: what the branches are laid out for."""

    rows: int
    grid: TokenGrid
    text_tokens: int
    cfg_layout: CFGLayout
    timestep: float  # 0 … 1000; 0 where no adapter depends on it


class AttachedToTransformer:
    """Image prompts attached to a pipeline with a transformer, or to a bare one, until `detach()`. Also a context manager."""

    def __init__(self, target: Any, prompts: Sequence[ImagePromptLike], cfg_layout: CFGLayout | None = None):
        is_bare = isinstance(target, nn.Module)
        transformer = target if is_bare else target.transformer
        self._transformer: Any = unwrap_compiled(transformer)
        self._host: Host = find_host(self._transformer)
        if is_bare and cfg_layout is None:
            raise UserError(
                "cfg_layout: a bare transformer does not know which rows of its batch are conditional; "
                'expected cfg_layout=("uncond", "cond"), or cfg_layout=("cond",) without guidance'
            )
        self._cfg_layout = cfg_layout
        self._sites = find_sites(self._transformer)
        self._lock = threading.Lock()
        self._branch_cache: dict[Hashable, dict[int, list[ImageBranch]]] = {}
        self.prompts = tuple(prompts)
        self._processors: list[DiTAttnProcessor] | None = _install_processors(self._sites)
        hook: Any = self._pre_forward_hook
        if is_compiled_in_place(transformer):
            hook = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
        self._pre_hook = transformer.register_forward_pre_hook(hook, with_kwargs=True)

    @property
    def prompts(self) -> tuple[ImagePromptLike, ...]:
        """The image prompts that condition the transformer. Assign others to replace them."""
        return self._prompts

    @prompts.setter
    def prompts(self, prompts: Sequence[ImagePromptLike] | ImagePromptLike) -> None:
        prompts = tuple(prompts) if isinstance(prompts, (list, tuple)) else (cast(ImagePromptLike, prompts),)
        names = [site.name for site in self._sites]
        for prompt in prompts:
            check_scale(prompt.scale)
            check_window(prompt.start_at, prompt.end_at)
            check_compatible(prompt.adapter, self._transformer)
            if unknown := unknown_blocks(prompt.scale, names):
                raise UserError(
                    f"scale names blocks that this model does not have: {', '.join(unknown)}; its layers have names like {names[0]}"
                )
        self._prompts = prompts
        self._branch_cache.clear()

    def detach(self) -> None:
        """Restore the transformer exactly. A second call does nothing."""
        if self._processors is None:
            return
        self._pre_hook.remove()
        for site, processor in zip(self._sites, self._processors, strict=True):
            attention: Any = site.attention
            if attention.processor is processor:
                attention.set_processor(processor.replaced)
        self._processors = None
        self._branch_cache.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _pre_forward_hook(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every call of the transformer: give each processor its branches."""
        assert self._processors is not None
        self._check_installed()
        arguments = _name_arguments(self._transformer, args, kwargs)
        call = find_unet_call(self._transformer)
        if call is not None:
            check_exclusive(call)
        batch = self._read_batch(arguments, call)
        branches = self._read_branches(arguments["hidden_states"], batch)
        gates = self._window_gates(arguments["timestep"], call)
        for site, processor in zip(self._sites, self._processors, strict=True):
            processor.branches = [
                SiteBranch(branch if gate is None else _apply_gate(branch, gate), prompt.adapter.family)
                for prompt, branch, gate in zip(self._active_prompts(site), branches[site.index], self._active(gates, site), strict=True)
            ]

    def _active_prompts(self, site: AttentionSite) -> list[ImagePromptLike]:
        return [prompt for prompt in self._prompts if site.index in prompt.adapter.hidden_dims]

    def _active(self, values: Sequence[Any], site: AttentionSite) -> list[Any]:
        return [value for prompt, value in zip(self._prompts, values, strict=True) if site.index in prompt.adapter.hidden_dims]

    def _check_installed(self) -> None:
        for site, processor in zip(self._sites, self._processors or (), strict=True):
            if site.attention.processor is not processor:
                raise RuntimeError(
                    f"after attach(), {site.name} was given {type(site.attention.processor).__name__}, and the image prompt would be "
                    "ignored: attach last"
                )

    def _read_batch(self, arguments: Mapping[str, Any], call: UNetCall | None) -> _Batch:
        hidden_states, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        layout = self._cfg_layout or read_cfg_layout(self._host, call, arguments)
        grid = self._host.read_grid(self._transformer, arguments)
        is_per_step = any(prompt.adapter.family.is_per_step for prompt in self._prompts)
        timestep = float(torch.as_tensor(arguments["timestep"]).flatten()[0]) * self._host.timestep_scale if is_per_step else 0.0
        return _Batch(len(hidden_states), grid, text.shape[1], layout, timestep)

    def _read_branches(self, sample: Tensor, batch: _Batch) -> dict[int, list[ImageBranch]]:
        """For every site one branch per image prompt whose adapter has this site, expanded to the rows of the batch."""
        if torch.is_grad_enabled() and any(prompt.requires_grad for prompt in self._prompts):
            return self._build_branches(sample, batch)
        key = (batch, sample.dtype, sample.device)
        with self._lock:
            if key not in self._branch_cache:
                if len(self._branch_cache) >= 2 * _MAX_REMEMBERED_STEPS or (not batch.timestep and len(self._branch_cache) >= 2):
                    self._branch_cache.clear()
                with torch.no_grad():
                    self._branch_cache[key] = self._build_branches(sample, batch)
            return self._branch_cache[key]

    def _build_branches(self, sample: Tensor, batch: _Batch) -> dict[int, list[ImageBranch]]:
        branches: dict[int, list[ImageBranch]] = {site.index: [] for site in self._sites}
        for prompt in self._prompts:
            key_values = prompt.key_values(batch.timestep) if prompt.adapter.family.is_per_step else prompt.key_values()
            for site in self._sites:
                if site.index in prompt.adapter.hidden_dims:
                    branches[site.index].append(_build_branch(prompt, site, key_values, sample, batch))
        return branches

    def _window_gates(self, timestep: Tensor, call: UNetCall | None) -> list[Tensor | None]:
        """For each image prompt the gate of its conditioning window, (1 or rows, 1, 1); None for a window that is always open."""
        windows = [(prompt.start_at, prompt.end_at) for prompt in self._prompts]
        if all(window == (0.0, 1.0) for window in windows):
            return [None] * len(windows)
        progress = self._read_progress(timestep, call)
        return [None if window == (0.0, 1.0) else window_gate(progress, *window)[:, None, None] for window in windows]

    def _read_progress(self, timestep: Tensor, call: UNetCall | None) -> Tensor:
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


def _name_arguments(transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    names = type(transformer).forward.__code__.co_varnames[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def read_cfg_layout(host: Host, call: UNetCall | None, arguments: Mapping[str, Any]) -> CFGLayout:
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


def _build_branch(prompt: ImagePromptLike, site: AttentionSite, key_values: PromptKeyValues, sample: Tensor, batch: _Batch) -> ImageBranch:
    pairs = zip(*(part[site.index] for part in key_values), strict=True)
    key, value = (expand_to_cfg_batch(uncond, cond, batch.cfg_layout, batch.rows).to(sample) for uncond, cond in pairs)
    scale, norms = layer_scale(prompt.scale, site.name), prompt.adapter.self_attention_norms(site.index)
    bias = prompt.attention_bias()
    bias = None if bias is None else expand_to_cfg_batch(bias, bias, batch.cfg_layout, batch.rows)[:, None, None].to(sample)
    mask = None if prompt.mask is None else _build_mask(prompt.mask, site, batch).to(sample)
    if norms is None:
        return ImageBranch(key, scale * value, mask, bias)
    own = SelfAttention(norms[0].to(sample), norms[1].to(sample), torch.full((1, 1, 1), scale).to(sample))
    return ImageBranch(key, value, mask, bias, own)


def _build_mask(mask: Tensor, site: AttentionSite, batch: _Batch) -> Tensor:
    """The weight of each position, (1, positions, 1).

    Tokens of a reference in the sequence (Kontext) are not part of the generated image: 0. Text positions of a single block have the
    share of the image that the mask covers.
    """
    grid = batch.grid
    weights = downsample_mask(mask, grid.height, grid.width)
    weights = torch.cat([weights, weights.new_zeros(1, grid.num_tokens - weights.shape[1], 1)], 1)
    if site.side != "single":
        return weights
    return torch.cat([mask.float().mean().expand(1, batch.text_tokens, 1).to(weights), weights], 1)


def _apply_gate(branch: ImageBranch, gate: Tensor) -> ImageBranch:
    if branch.self_attention is None:
        return branch._replace(value=branch.value * gate.to(branch.value))
    own = branch.self_attention
    return branch._replace(self_attention=own._replace(scale=own.scale * gate.to(own.scale)))


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
