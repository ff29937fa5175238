"""UNets of diffusers (SD 1.5, 2.1, SDXL and what is shaped like them) as hosts of image prompts.

Two small things are placed in the UNet, both without parameters: a processor in every cross-attention layer, which adds
up finished keys and values, and one forward pre-hook, which hands them over as a cross-attention argument. Training
passes the same argument itself.
"""

import inspect
import threading
import types
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from imprompt.core import conditioning as schedule
from imprompt.core import guidance
from imprompt.core.adapter import Adapter, LowRank
from imprompt.core.attention import Branch, Kernel, KeyValues, classic, decoupled_attention, fused
from imprompt.core.conditioning import Scale, mask_weights, scale_of, unmatched
from imprompt.core.guidance import Groups
from imprompt.errors import CheckpointError, UserError

ARGUMENT = "ip_hidden_states"  # a cross-attention argument that diffusers' self-attention ignores without a warning


class Prompt(Protocol):
    """What a host needs to know of an image prompt."""

    @property
    def adapter(self) -> Adapter: ...
    @property
    def scale(self) -> Scale: ...
    @property
    def mask(self) -> Tensor | None:
        """(H, W) in 0 … 1."""

    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...

    def key_values(self) -> tuple[dict[int, KeyValues], dict[int, KeyValues]]:
        """Of the null and of the image, for each layer: (1 or prompts, tokens, hidden)."""
        ...

    def bias(self) -> Tensor | None:
        """The logarithm of each token's weight, (1 or prompts, tokens); None where all weigh the same."""
        ...


class LayerInput(NamedTuple):
    """All that one layer reads: the text's keys and values, if they are known already, and the branches."""

    text: KeyValues | None
    branches: list[Branch]


class Layer(NamedTuple):
    """One cross-attention layer of a UNet."""

    number: int  # n, the public one
    name: str  # such as up_blocks.1.attentions.0.transformer_blocks.0.attn2
    attention: Attention
    level: int  # resolution: 0 is the latents' own, each further one half of it


def cross_attention_layers(unet: UNet2DConditionModel) -> list[Layer]:
    """The cross-attention layers in public order: n is the position in `attn_processors` (down, up, mid)."""
    levels = len(unet.config.block_out_channels)
    found = []
    for n, key in enumerate(unet.attn_processors):
        name = key.removesuffix(".processor")
        if not name.endswith("attn2"):
            continue
        block, number = name.split(".")[:2]
        level = {"down_blocks": lambda i: i, "up_blocks": lambda i: levels - 1 - i}.get(block, lambda _: levels - 1)
        found.append(Layer(n, name, unet.get_submodule(name), level(int(number) if number.isdigit() else 0)))
    return found


def adapter_shape(unet: UNet2DConditionModel) -> tuple[dict[int, int], int]:
    """What an adapter for this UNet looks like: hidden width for each layer n, and the width of the text states."""
    layers = cross_attention_layers(unet)
    return {layer.number: layer.attention.to_k.out_features for layer in layers}, unet.config.cross_attention_dim


def initialise(adapter: Adapter, unet: UNet2DConditionModel) -> None:
    """Start W'k and W'v from the layer's own W_k and W_v (IP-Adapter, section 3.2)."""
    with torch.no_grad():
        for layer in cross_attention_layers(unet):
            mine = adapter.layer(layer.number)
            mine.to_k_ip.weight.copy_(layer.attention.to_k.weight)
            mine.to_v_ip.weight.copy_(layer.attention.to_v.weight)


class DecoupledProcessor:
    """The attention processor: reads its layer's input from the argument. Holds no parameters and no state."""

    def __init__(self, layer: Layer, replaced: Any):
        self.name = layer.name
        self.replaced = replaced
        self.kernel: Kernel = partial(_like_diffusers, layer.attention) if type(replaced) is AttnProcessor else fused

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_hidden_states: Mapping[str, LayerInput] | None = None,
    ) -> Tensor:
        if ip_hidden_states is None:
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        mine = ip_hidden_states[self.name]
        text = mine.text or text_key_values(attn, encoder_hidden_states)
        if attention_mask is not None:
            rows, tokens = text.key.shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, rows).unflatten(0, (rows, attn.heads))
        query = attn.to_q(hidden_states)
        few = classic if query.device.type == "cpu" and query.dtype is torch.bfloat16 else fused
        out = decoupled_attention(query, text, mine.branches, attn.heads, self.kernel, few, attention_mask)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def _with_signature(function: Any) -> Any:
    """The same function, whose signature stands ready."""
    same = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    same.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return same


class QuickProcessor(DecoupledProcessor):
    """The same, for UNets that are not compiled: diffusers asks for the signature at every call, and worked out anew each time it
    costs more than a small layer's matrix products. Dynamo cannot trace one that stands ready, and asks only once.
    """

    __call__ = _with_signature(DecoupledProcessor.__call__)


def text_key_values(attn: Attention, states: Tensor) -> KeyValues:
    """The layer's own keys and values. states: (rows, tokens, cross)."""
    return KeyValues(attn.to_k(states), attn.to_v(states))


class Processors:
    """Our processors in place of a UNet's own, until `restore()`. Training needs only these and `layer_inputs`."""

    def __init__(self, unet: UNet2DConditionModel, compiled: bool = False):
        self.layers = cross_attention_layers(unet)
        kind = DecoupledProcessor if compiled or any(part._compiled_call_impl for part in unet.modules()) else QuickProcessor
        for layer in self.layers:
            now = layer.attention.processor
            if isinstance(now, DecoupledProcessor):
                raise RuntimeError("this UNet has image prompts attached already: detach them, or pass all prompts to one attach()")
            if type(now) not in (AttnProcessor, AttnProcessor2_0):
                raise RuntimeError(
                    f"{layer.name} uses {type(now).__name__}, which image prompts cannot be added to; expected the default "
                    "attention: call unet.set_default_attn_processor() (switches off slicing, xFormers and other adapters) before attach()"
                )
        self._placed = [kind(layer, layer.attention.processor) for layer in self.layers]
        for layer, processor in zip(self.layers, self._placed, strict=True):
            layer.attention.set_processor(processor)

    def check(self) -> None:
        """Raise where something replaced a processor of ours: the image prompt would be dropped in silence."""
        for layer, processor in zip(self.layers, self._placed, strict=True):
            if layer.attention.processor is not processor:
                raise RuntimeError(
                    f"after attach(), {layer.name} was given {type(layer.attention.processor).__name__} (attention slicing, xFormers "
                    "or another adapter does that), and the image prompt would be dropped: attach last"
                )

    def restore(self) -> None:
        """Put back what stood there before; what somebody replaced since stays."""
        for layer, processor in zip(self.layers, self._placed, strict=True):
            if layer.attention.processor is processor:
                layer.attention.set_processor(processor.replaced)


def layer_inputs(layers: Sequence[Layer], key_values: Mapping[int, KeyValues]) -> dict[str, dict[str, LayerInput]]:
    """The cross-attention argument that makes each layer hear these keys and values: what training passes itself."""
    return {ARGUMENT: {layer.name: LayerInput(None, [Branch(*key_values[layer.number])]) for layer in layers}}


def _like_diffusers(attn: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The arithmetic of diffusers' plain processor, to the bit."""
    if attn.upcast_attention or attn.upcast_softmax:
        return classic(q.float(), k.float(), v.float(), bias).to(q.dtype)
    return classic(q, k, v, bias)


# -------------------------------------------------------------------------------------------------------- attachment


class Link:
    """Image prompts attached to a pipeline or to a bare UNet. Lives until `detach()`; also a context manager.

    `prompts` may be replaced at any time. The UNet's `state_dict` never changes, and `detach` restores its processors.
    """

    def __init__(self, target: Any, prompts: Sequence[Prompt], groups: Groups | None = None):
        self._pipe = target if hasattr(target, "unet") else None
        unet = target.unet if self._pipe is not None else target
        self._unet: UNet2DConditionModel = getattr(unet, "_orig_mod", unet)  # under torch.compile
        if not isinstance(self._unet, UNet2DConditionModel):
            raise TypeError(f"expected a diffusers pipeline with a UNet2DConditionModel, or such a UNet; received {type(target).__name__}")
        if self._pipe is None and groups is None:
            raise UserError(
                "a bare UNet does not know which rows of its batch are guided: "
                "pass groups=(0, 1) for [null, conditional], or groups=(1,) without guidance"
            )
        self._groups = groups
        self._layers = cross_attention_layers(self._unet)
        self._lock = threading.Lock()
        self._text: _TextCache = _TextCache()
        self._laid_out: dict[Any, Any] = {}
        self._low_rank: list[Any] = []  # handles of hooks
        self.prompts = prompts  # type: ignore[assignment]
        self._processors: Processors | None = Processors(self._unet, compiled=self._unet is not unet)
        self._handle = unet.register_forward_pre_hook(self._feed, with_kwargs=True)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self._prompts

    @prompts.setter
    def prompts(self, prompts: Sequence[Prompt]) -> None:
        prompts = tuple(prompts)
        for prompt in prompts:
            check_fit(prompt.adapter, self._unet)
            _check_scale(prompt.scale, self._layers)
        computed = [(*prompt.key_values(), prompt.bias()) for prompt in prompts]
        with self._lock:
            self._prompts, self._key_values = prompts, computed
            self._laid_out.clear()
            self._text.clear()
            self._add_low_rank()

    def detach(self) -> None:
        """Restore the UNet exactly. Detaching twice does nothing."""
        if self._processors is None:
            return
        self._handle.remove()
        self._remove_low_rank()
        self._processors.restore()
        self._processors = None
        self._laid_out.clear()
        self._text.clear()

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _add_low_rank(self) -> None:
        """FaceID's additions to every attention layer, as hooks: the UNet gains no parameters. Silent where λ is 0 everywhere."""
        self._remove_low_rank()
        added = [p.adapter.low_rank for p in self._prompts if any(scale_of(p.scale, layer.name) for layer in self._layers)]
        if not any(added):
            return
        attentions = [self._unet.get_submodule(name.removesuffix(".processor")) for name in self._unet.attn_processors]
        for low_rank in added:
            for n, parts in low_rank.items():
                for part, low in parts.items():
                    target: Any = attentions[n].to_out[0] if part == "out" else getattr(attentions[n], f"to_{part}")
                    self._low_rank.append(target.register_forward_hook(_Addition(low)))

    def _remove_low_rank(self) -> None:
        for handle in self._low_rank:
            handle.remove()
        self._low_rank.clear()

    def _feed(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before every call of the UNet: hand each layer its keys and values."""
        assert self._processors is not None
        self._processors.check()
        sample, timestep, states = (
            _argument(args, kwargs, i, name) for i, name in enumerate(("sample", "timestep", "encoder_hidden_states"))
        )
        groups = self._groups or guidance.guidance_groups(self._pipe)
        with self._lock:
            branches = self._branches(sample, groups)
            text = self._text.get(self._unet, self._layers, states, timestep)
        gates = self._gates(timestep)
        argument = {}
        for layer in self._layers:
            mine = [
                branch if gate is None else branch._replace(value=branch.value * gate.to(branch.value))
                for branch, gate in zip(branches[layer.number], gates, strict=True)
            ]
            argument[layer.name] = LayerInput(text[layer.number] if text else None, mine)
        extra = {**(kwargs.get("cross_attention_kwargs") or {}), ARGUMENT: argument}
        return args, {**kwargs, "cross_attention_kwargs": extra}

    def _branches(self, sample: Tensor, groups: Groups) -> dict[int, list[Branch]]:
        """For every layer one branch per prompt, laid out as the batch is; kept until something changes."""
        key = (sample.shape, sample.dtype, sample.device, groups)
        if key not in self._laid_out:
            self._laid_out.clear()
            self._laid_out[key] = {layer.number: self._layer_branches(layer, sample, groups) for layer in self._layers}
        return self._laid_out[key]

    def _layer_branches(self, layer: Layer, sample: Tensor, groups: Groups) -> list[Branch]:
        rows, _, height, width = sample.shape
        branches = []
        for prompt, (null, image, bias) in zip(self._prompts, self._key_values, strict=True):
            key, value = (guidance.spread(n, i, groups, rows) for n, i in zip(null[layer.number], image[layer.number], strict=True))
            value = value * scale_of(prompt.scale, layer.name)
            mask = None if prompt.mask is None else mask_weights(prompt.mask, height, width, layer.level).to(sample)
            scores = None if bias is None else guidance.spread(bias, bias, groups, rows)[:, None, None].to(sample)
            branches.append(Branch(key.to(sample), value.to(sample), mask, scores))
        return branches

    def _gates(self, timestep: Tensor | float) -> list[Tensor | None]:
        total = self._timesteps()
        return [None if (p.start, p.end) == (0.0, 1.0) else schedule.window(timestep, total, p.start, p.end) for p in self._prompts]

    def _timesteps(self) -> int:
        scheduler = getattr(self._pipe, "scheduler", None)
        return scheduler.config.num_train_timesteps if scheduler is not None else 1000


class _Addition:
    """A forward hook: what a LowRank makes of the input is added to the output, in the layer's own precision."""

    def __init__(self, low: LowRank):
        self._weights = low.down.weight.detach(), low.up.weight.detach()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        x = args[0]
        if self._weights[0].dtype != x.dtype or self._weights[0].device != x.device:
            down, up = self._weights
            self._weights = down.to(x), up.to(x)
        down, up = self._weights
        return out + (x @ down.T) @ up.T


class _TextCache:
    """The text's keys and values, for as long as the denoiser is called with the very same text states.

    They are the same at every step of a generation; a step back in time means that a new one began.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._states: Tensor | None = None
        self._version = -1
        self._time = -1.0
        self._kept: dict[int, KeyValues] = {}

    def get(
        self, unet: UNet2DConditionModel, layers: Sequence[Layer], states: Tensor, timestep: Tensor | float
    ) -> dict[int, KeyValues] | None:
        """Keys and values by layer n; None where only the layer itself may compute them."""
        if torch.is_grad_enabled() or unet.encoder_hid_proj is not None:
            return None
        if not all(_plain(layer.attention, states) for layer in layers):  # LoRA, offloading or quantisation at work
            return None
        time = float(torch.as_tensor(timestep).flatten()[0])
        version = -1 if states.is_inference() else states._version
        if self._states is not states or self._version != version or time >= self._time:
            self._kept = {layer.number: text_key_values(layer.attention, states) for layer in layers}
            self._states, self._version = states, version
        self._time = time
        return self._kept


def _plain(attn: Attention, states: Tensor) -> bool:
    return (
        type(attn.to_k) is nn.Linear
        and type(attn.to_v) is nn.Linear
        and not attn.norm_cross
        and attn.to_k.weight.device == states.device
        and attn.to_k.weight.dtype == states.dtype
    )


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs[name]


def check_fit(adapter: Adapter, unet: UNet2DConditionModel) -> None:
    """Raise CheckpointError where an adapter was made for another model."""
    expected, cross = adapter_shape(unet)
    low_rank = adapter.low_rank
    outside = bool(low_rank) and max(low_rank) >= len(unet.attn_processors)
    if adapter.cross != cross or adapter.layers != expected or outside:
        raise CheckpointError(
            f"the adapter does not fit this model: it was made for {len(adapter.layers)} cross-attention layers and text states "
            f"of width {adapter.cross}, the model has {len(expected)} and width {cross}; "
            "use an adapter of the same base family (imprompt inspect FILE)"
        )


def _check_scale(scale: Scale, layers: Sequence[Layer]) -> None:
    unknown = unmatched(scale, [layer.name for layer in layers])
    if unknown:
        raise UserError(
            f"scale names blocks that this model does not have: {', '.join(unknown)}; its layers are called like {layers[0].name}"
        )


def attach(target: Any, *prompts: Prompt, groups: Groups | None = None) -> Link:
    """Attach image prompts to a diffusers pipeline with a UNet, or to a bare UNet.

    Use it as a context manager, or keep the result: its `prompts` can be changed, `detach()` restores the UNet exactly.
    A bare UNet needs `groups`, one entry per guidance group of its batch: 0 hears the null, 1 the image.
    """
    return Link(target, prompts, groups)
