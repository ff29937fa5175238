"""What attached image prompts have in common, whether they condition a UNet or a transformer."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NoReturn, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from imprompt.core.adapter import Adapter
from imprompt.core.attention import ImageBranch, KeyValues
from imprompt.core.conditioning import Scale, check_scale, check_window, unknown_blocks, window_gate
from imprompt.core.guidance import CFGLayout
from imprompt.errors import UserError
from imprompt.unet.calls import DenoiserCall, check_exclusive, find_denoiser_call
from imprompt.utils.compat import is_compiled_in_place, tensor_version

Branches = dict[int, list[ImageBranch]]  # for every layer n those of the image prompts, laid out for the rows of a batch
PromptKeyValues = tuple[dict[int, KeyValues], dict[int, KeyValues]]  # of the unconditional embedding, and of the image


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


class AttachedPrompts(ABC):
    """Image prompts attached to a pipeline or to a bare denoiser, until `detach()`. Also a context manager.

    `prompts` may be replaced at any time. The denoiser's `state_dict` never changes, and `detach` restores its processors. Several threads
    may generate with one denoiser, each with a scheduler of its own.
    """

    def __init__(self, denoiser: nn.Module, layer_names: Sequence[str], prompts: Sequence[ImagePromptLike], cfg_layout: CFGLayout | None):
        """denoiser: as the pipeline calls it, possibly compiled. Subclasses have found its layers before, and installed nothing yet."""
        if cfg_layout is not None and (not cfg_layout or not all(group in ("uncond", "cond") for group in cfg_layout)):
            raise UserError(f'cfg_layout: expected groups such as ("uncond", "cond") or ("cond",), received {cfg_layout!r}')
        self._cfg_layout, self._layer_names = cfg_layout, layer_names
        self._lock = threading.Lock()
        self._branch_cache: dict[Hashable, Branches] = {}
        self.prompts = tuple(prompts)
        self._install_processors()
        hook: Any = self._pre_forward_hook
        if is_compiled_in_place(denoiser):
            hook = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
        self._pre_hook: RemovableHandle | None = denoiser.register_forward_pre_hook(hook, with_kwargs=True)

    @abstractmethod
    def _check_compatible(self, prompt: ImagePromptLike) -> None:
        """Raise CheckpointError where the adapter was made for another model, UserError for what this model cannot use."""

    @abstractmethod
    def _install_processors(self) -> None:
        """Replace the attention processors of all layers. Raises RuntimeError where they are not diffusers' default."""

    @abstractmethod
    def _restore_processors(self) -> None:
        """Put the replaced processors back."""

    @abstractmethod
    def _pre_forward_hook(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """Before every call of the denoiser: give each layer its branches."""

    @abstractmethod
    def _read_progress(self, timestep: Tensor | float, call: DenoiserCall | None, rows: int) -> Tensor:
        """The progress through denoising, 0 … 1, (1,) or (rows,)."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "prompts" and not name.startswith("_"):
            raise AttributeError(f"there is no {name} to set; expected for example: attached.prompts = [prompt.with_scale(0.5)]")
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UserError("a pipeline with image prompts attached cannot be copied or pickled; detach() them first, and attach to the copy")

    @property
    def prompts(self) -> tuple[ImagePromptLike, ...]:
        """The image prompts that condition the denoiser. Assign others to replace them."""
        return self._prompts

    @prompts.setter
    def prompts(self, prompts: Sequence[ImagePromptLike] | ImagePromptLike) -> None:
        prompts = tuple(prompts) if isinstance(prompts, (list, tuple)) else (cast(ImagePromptLike, prompts),)
        for prompt in prompts:
            _check_prompt(prompt)
            self._check_compatible(prompt)
            self._check_scale(prompt.scale)
        with self._lock:
            self._prompts = prompts
            self._compute_key_values()
            self._update_prompts()

    @abstractmethod
    def _update_prompts(self) -> None:
        """Called when there are other prompts, whose keys and values are computed."""

    def _check_scale(self, scale: Scale) -> None:
        unknown = unknown_blocks(scale, list(self._layer_names))
        if unknown:
            raise UserError(
                f"scale names blocks that this model does not have: {', '.join(unknown)}; its layers have names like {self._layer_names[0]}"
            )

    def detach(self) -> None:
        """Restore the denoiser exactly. A second call does nothing."""
        if self._pre_hook is None:
            return
        self._pre_hook.remove()
        self._pre_hook = None
        self._restore_processors()
        self._branch_cache.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @torch.no_grad()
    def _compute_key_values(self) -> None:
        """Keys and values for generation, None where they depend on the timestep. Those for training are computed in each call."""
        self._adapter_versions = self._read_adapter_versions()
        self._key_values = [None if prompt.adapter.family.is_per_step else prompt.key_values() for prompt in self._prompts]
        self._biases = [prompt.attention_bias() for prompt in self._prompts]
        self._branch_cache.clear()

    def _read_adapter_versions(self) -> list[int]:
        """Numbers that change with every step of an optimizer."""
        return [tensor_version(parameter) for prompt in self._prompts if prompt.requires_grad for parameter in prompt.adapter.parameters()]

    def _cached_branches(
        self, key: Hashable, build: Callable[[Sequence[PromptKeyValues]], Branches], timestep: float = 0.0, max_cached: int = 1
    ) -> Branches:
        """The branches of a call, from the keys and values of every prompt.

        Cached for the `max_cached` latest keys, until an optimizer has changed an adapter; computed anew where gradients are wanted.
        """
        if torch.is_grad_enabled() and any(prompt.requires_grad for prompt in self._prompts):
            return build([prompt.key_values(timestep) for prompt in self._prompts])
        if self._adapter_versions != self._read_adapter_versions():
            self._compute_key_values()
        if key not in self._branch_cache:
            if len(self._branch_cache) >= max_cached:
                self._branch_cache.clear()
            with torch.no_grad():
                key_values = [
                    prompt.key_values(timestep) if known is None else known
                    for prompt, known in zip(self._prompts, self._key_values, strict=True)
                ]
                self._branch_cache[key] = build(key_values)
        return self._branch_cache[key]

    def _window_gates(self, timestep: Tensor | float, call: DenoiserCall | None, rows: int) -> list[Tensor | None]:
        """For each image prompt the gate of its conditioning window, (1, 1, 1) or (rows, 1, 1); None for a window that is always open."""
        windows = [(prompt.start_at, prompt.end_at) for prompt in self._prompts]
        if all(window == (0.0, 1.0) for window in windows):
            return [None] * len(windows)
        progress = self._read_progress(timestep, call, rows)
        return [None if window == (0.0, 1.0) else window_gate(progress, *window)[:, None, None] for window in windows]


def apply_gate(branch: ImageBranch, gate: Tensor | None) -> ImageBranch:
    """The branch within its conditioning window. gate: (1 or rows, 1, 1), or None for a window that is always open."""
    if gate is None:
        return branch
    own = branch.self_attention
    if own is None:
        return branch._replace(value=branch.value * gate.to(branch.value))
    return branch._replace(self_attention=own._replace(scale=own.scale * gate.to(own.scale)))


def find_exclusive_call(denoiser: nn.Module) -> DenoiserCall | None:
    """The call that is being made; None outside a pipeline. Raises UserError while another thread uses the same scheduler."""
    call = find_denoiser_call(denoiser)
    if call is not None:
        check_exclusive(call)
    return call


def name_arguments(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_bare_layout(kind: str, cfg_layout: CFGLayout | None) -> None:
    """Raise UserError where a bare denoiser has no layout: it does not know which rows of its batch are conditional."""
    if cfg_layout is None:
        raise UserError(
            f"cfg_layout: a bare {kind} does not know which rows of its batch are conditional; "
            'expected cfg_layout=("uncond", "cond"), or cfg_layout=("cond",) without guidance'
        )


def _check_prompt(prompt: object) -> None:
    if not hasattr(prompt, "key_values"):
        raise UserError(f"expected image prompts, as imprompt.load(ADAPTER)(images) returns them; received {type(prompt).__name__}")
    prompt = cast(ImagePromptLike, prompt)
    check_scale(prompt.scale)
    check_window(prompt.start_at, prompt.end_at)
