"""Attention processors for UNets of diffusers (SD 1.5, 2.1, SDXL and others of their structure).

A processor without parameters in every cross-attention layer adds the branches of the image prompts to the text branch. It receives
finished keys and values as a cross-attention argument: at generation from `unet.injection`, in training from the training loop.
"""

import inspect
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias, cast

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

from imprompt.core.adapter import Adapter
from imprompt.core.attention import (
    AttentionFn,
    ImageBranch,
    KeyValues,
    attention_bmm,
    attention_sdpa,
    decoupled_attention,
    multi_head_attention,
)
from imprompt.errors import UserError
from imprompt.utils.compat import is_compiled_in_place

CROSS_ATTENTION_KWARG = "ip_hidden_states"  # diffusers' self-attention ignores an argument of this name without a warning


UNet: TypeAlias = UNet2DConditionModel | UNetMotionModel

_install_lock = threading.Lock()


class CrossAttentionInputs(NamedTuple):
    """The inputs of one cross-attention layer: keys and values of the text, if they are cached, and the branches of the image prompts."""

    text: KeyValues | None
    branches: list[ImageBranch]


@dataclass(frozen=True, eq=False)
class CrossAttentionLayer:
    """One cross-attention layer of a UNet."""

    index: int  # n in public adapter files
    name: str  # for example up_blocks.1.attentions.0.transformer_blocks.0.attn2
    attention: Attention
    downsampling_level: int  # 0 at the resolution of the latents; each further level halves it


def find_attention_layers(unet: UNet) -> list[str]:
    """The names of all attention layers in the order of public adapter files (down, up, mid), which number them from 0.

    Motion modules of video UNets have no numbers: an adapter fits the UNet with and without them.
    """
    return [key.removesuffix(".processor") for key in unet.attn_processors if ".motion_modules." not in key]


def find_cross_attention_layers(unet: UNet) -> list[CrossAttentionLayer]:
    """The cross-attention layers in the order of public adapter files."""
    levels = len(unet.config.block_out_channels)
    return [
        CrossAttentionLayer(n, name, cast(Attention, unet.get_submodule(name)), _downsampling_level(name, levels))
        for n, name in enumerate(find_attention_layers(unet))
        if name.endswith("attn2")
    ]


def _downsampling_level(layer: str, levels: int) -> int:
    block, number = layer.split(".")[:2]
    return {"down_blocks": int(number), "up_blocks": levels - 1 - int(number)}[block] if number.isdigit() else levels - 1


def infer_adapter_shape(unet: UNet) -> tuple[dict[int, int], int]:
    """The shape of an adapter for this UNet: the width of keys and values for each layer n, and the width of the text embeddings."""
    hidden_dims = {layer.index: layer.attention.to_k.out_features for layer in find_cross_attention_layers(unet)}
    return hidden_dims, unet.config.cross_attention_dim


def init_from_unet(adapter: Adapter, unet: UNet) -> None:
    """Initialize W'k and W'v of every layer with the UNet's own W_k and W_v (IP-Adapter, Ye et al., 2023, section 3.2.2)."""
    with torch.no_grad():
        for layer in find_cross_attention_layers(unet):
            projection = adapter.key_value_projection(layer.index)
            projection.to_k_ip.weight.copy_(layer.attention.to_k.weight)
            projection.to_v_ip.weight.copy_(layer.attention.to_v.weight)


class DecoupledAttnProcessor:
    """The attention processor of decoupled cross-attention. Holds no parameters and no state."""

    def __init__(self, layer: CrossAttentionLayer, replaced: AttnProcessor | AttnProcessor2_0):
        self.name = layer.name
        self.replaced = replaced
        is_plain = type(replaced) is AttnProcessor
        self.text_attention: AttentionFn = partial(_attention_like_diffusers, layer.attention) if is_plain else attention_sdpa

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_hidden_states: Mapping[str, CrossAttentionInputs] | None = None,
    ) -> Tensor:
        """The output of the layer, (rows, positions, hidden). Without `ip_hidden_states` that of the replaced processor."""
        if ip_hidden_states is None:
            return cast(Tensor, self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, temb))
        cached_text, branches = ip_hidden_states[self.name]
        _check_rows(hidden_states, branches, self.name)
        text = cached_text or compute_text_key_values(attn, cast(Tensor, encoder_hidden_states))
        if attention_mask is not None:
            rows, tokens = text.key.shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, rows).unflatten(0, (rows, attn.heads))
        query = attn.to_q(hidden_states)
        branch_attention = attention_bmm if query.device.type == "cpu" and query.dtype is torch.bfloat16 else attention_sdpa
        out = decoupled_attention(query, text, branches, attn.heads, self.text_attention, branch_attention, attention_mask)
        return cast(Tensor, attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor)


class AdditiveAttnProcessor(DecoupledAttnProcessor):
    """Adds the image branches to the output of any other processor, behind the output projection, which is linear.

    For processors that do more than attention, such as keeping attention maps. Slower: the query is computed twice.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_hidden_states: Mapping[str, CrossAttentionInputs] | None = None,
    ) -> Tensor:
        """The output of the layer, (rows, positions, hidden)."""
        out = cast(Tensor, self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, temb))
        branches = ip_hidden_states[self.name].branches if ip_hidden_states else []
        _check_rows(hidden_states, branches, self.name)
        query, projection = attn.to_q(hidden_states), attn.to_out[0]
        for key, value, mask, bias, _ in branches:
            image_out = multi_head_attention(query, key, value, attn.heads, bias=bias)
            image_out = projection(image_out if mask is None else mask * image_out)
            out = out + (image_out if projection.bias is None else image_out - projection.bias) / attn.rescale_output_factor
        return out


def _check_rows(hidden_states: Tensor, branches: Sequence[ImageBranch], layer: str) -> None:
    """Raise UserError where the UNet splits its batch on the way to the layers: an image prompt is laid out for the whole batch."""
    if any(len(branch.key) != len(hidden_states) for branch in branches):
        raise UserError(
            f"{layer} received {len(hidden_states)} rows of a batch of {len(branches[0].key)}; image prompts need whole batches: "
            "switch off what splits them (FreeNoise's split inference does)"
        )


def _with_cached_signature(function: types.FunctionType) -> Callable[..., Tensor]:
    """A copy of the function with its signature stored in `__signature__`."""
    copy = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return copy


class EagerDecoupledAttnProcessor(DecoupledAttnProcessor):
    """The same processor for UNets that are not compiled.

    diffusers inspects the processor's signature in every call, which takes longer than the matrix products of a small layer unless the
    signature is stored. Dynamo cannot trace a stored signature, and inspects only once.
    """

    __call__ = _with_cached_signature(cast(types.FunctionType, DecoupledAttnProcessor.__call__))


def _attention_like_diffusers(attn: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """The arithmetic of diffusers' `AttnProcessor`, to the bit."""
    if attn.upcast_attention or attn.upcast_softmax:
        return attention_bmm(query.float(), key.float(), value.float(), bias).to(query.dtype)
    return attention_bmm(query, key, value, bias)


def compute_text_key_values(attn: Attention, prompt_embeds: Tensor) -> KeyValues:
    """The layer's own keys and values of the text embeddings, each (rows, tokens, hidden)."""
    if attn.norm_cross:
        prompt_embeds = attn.norm_encoder_hidden_states(prompt_embeds)
    return KeyValues(attn.to_k(prompt_embeds), attn.to_v(prompt_embeds))


class InstalledAttnProcessors:
    """Decoupled attention processors in all cross-attention layers of a UNet, until `restore()`.

    Training needs only these and `build_cross_attention_kwargs`. Raises RuntimeError where a UNet's processors are not the default ones.
    """

    def __init__(self, unet: UNet, *, compiled: bool = False):
        self.layers = find_cross_attention_layers(unet)
        self._compiled = compiled or is_compiled_in_place(unet)
        with _install_lock:
            for layer in self.layers:
                _check_replaceable(layer)
            self._installed = [self._install(layer) for layer in self.layers]

    def _install(self, layer: CrossAttentionLayer) -> DecoupledAttnProcessor:
        replaced = layer.attention.processor
        plain = DecoupledAttnProcessor if self._compiled else EagerDecoupledAttnProcessor
        processor = (plain if type(replaced) in _DEFAULT_PROCESSORS else AdditiveAttnProcessor)(layer, replaced)
        layer.attention.set_processor(processor)
        return processor

    def check_installed(self) -> None:
        """Add the image branches to processors that were set since, or raise RuntimeError: the image prompt would be ignored silently."""
        for n, (layer, processor) in enumerate(zip(self.layers, self._installed, strict=True)):
            if layer.attention.processor is not processor:
                self._installed[n] = self._reinstall(layer)

    def _reinstall(self, layer: CrossAttentionLayer) -> DecoupledAttnProcessor:
        received = type(layer.attention.processor)
        if not _is_replaceable(received):
            raise RuntimeError(
                f"after attach(), {layer.name} was given {received.__name__} (attention slicing, xFormers, another adapter, or the "
                "pipeline itself does that), and the image prompt would be ignored: attach last; image prompts cannot be used with a "
                "pipeline that does it while it generates"
            )
        return self._install(layer)

    def restore(self) -> None:
        """Put the replaced processors back, except where a third party has installed its own since."""
        for layer, processor in zip(self.layers, self._installed, strict=True):
            if layer.attention.processor is processor:
                layer.attention.set_processor(processor.replaced)


_DEFAULT_PROCESSORS = (AttnProcessor, AttnProcessor2_0)


def _is_replaceable(processor: type) -> bool:
    """Whether image branches can be added: to the default processors, and to those that LEDITS++ sets while it generates."""
    return processor in _DEFAULT_PROCESSORS or processor.__name__ == "LEDITSCrossAttnProcessor"


def _check_replaceable(layer: CrossAttentionLayer) -> None:
    processor = layer.attention.processor
    if isinstance(processor, DecoupledAttnProcessor):
        raise RuntimeError("this UNet already has image prompts attached: detach them, or pass all image prompts to one attach()")
    if not _is_replaceable(type(processor)):
        raise RuntimeError(
            f"{layer.name} uses {type(processor).__name__}, which image prompts cannot be added to; expected the default "
            "attention: call unet.set_default_attn_processor() (switches off slicing, xFormers and other adapters) before attach()"
        )
    names = ("group_norm", "spatial_norm", "norm_q", "norm_k")
    if layer.attention.residual_connection or any(getattr(layer.attention, name, None) is not None for name in names):
        raise RuntimeError(f"{layer.name} normalizes its queries: image prompts cannot be added to it; expected a UNet like SD's or SDXL's")


def build_cross_attention_kwargs(
    layers: Sequence[CrossAttentionLayer], key_values: Mapping[int, KeyValues]
) -> dict[str, dict[str, CrossAttentionInputs]]:
    """The `cross_attention_kwargs` that condition every layer on these keys and values of an image: for training."""
    return {CROSS_ATTENTION_KWARG: {layer.name: CrossAttentionInputs(None, [ImageBranch(*key_values[layer.index])]) for layer in layers}}
