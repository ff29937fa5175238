"""Attention processors for diffusion transformers, which add the branches of image prompts to the attention of each block.

Each computes what diffusers' own processor computes, in the same order, and adds the branches where the adapter's family does. `branches`
is set before every call of the transformer (`dit.injection`): attributes, not arguments, because not every transformer passes arguments on,
and torch.compile then compiles equal blocks once. Processors hold no parameters.
"""

from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0, apply_rotary_emb_qwen
from torch import Tensor

from imprompt.core.adapter import AdapterFamily
from imprompt.core.attention import AttentionFn, ImageBranch, attention_bmm, attention_sdpa, image_attention


class SiteBranch(NamedTuple):
    """The branch of one image prompt at one site, and how its adapter's family computes and merges it."""

    branch: ImageBranch
    family: AdapterFamily


class HeadTensors(NamedTuple):
    """The image tokens' tensors at a site, each (rows, heads, positions, channels)."""

    query: Tensor  # normalized by the transformer, before rotary embedding
    raw_query: Tensor
    raw_key: Tensor
    value: Tensor


class DiTAttnProcessor:
    """What the processors of all architectures share. Without branches the replaced processor computes."""

    replaces: ClassVar[tuple[type, ...]]

    def __init__(self, replaced: Any):
        self.replaced = replaced
        self.branches: list[SiteBranch] = []

    def add_branches(self, out: Tensor, heads: HeadTensors) -> tuple[Tensor, Tensor | None]:
        """The attention output with the branches added that belong before the output projection; and the sum of those after the block.

        out: (rows, positions, hidden).
        """
        after = None
        for branch, family in self.branches:
            attention: AttentionFn = attention_bmm if out.device.type == "cpu" and out.dtype is torch.bfloat16 else attention_sdpa
            image_out = image_attention(branch, heads.query, heads.raw_query, heads.raw_key, heads.value, attention).to(out.dtype)
            if family.merge == "before_output":
                out = out + image_out
            else:
                after = image_out if after is None else after + image_out
        return out, after


class SD3AttnProcessor(DiTAttnProcessor):
    """Joint attention of Stable Diffusion 3: [image ; text], RMS normalization if any, no rotary embedding."""

    replaces = (JointAttnProcessor2_0,)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """As `JointAttnProcessor2_0`: the image's output, and the text's where there is text."""
        if not self.branches:
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        positions = hidden_states.shape[1]
        raw_query, raw_key, value = (_split_heads(project(hidden_states), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v))
        query, key = _normalize(attn.norm_q, raw_query), _normalize(attn.norm_k, raw_key)
        heads = HeadTensors(query, raw_query, raw_key, value)
        if encoder_hidden_states is not None:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_query, text_key, text_value = (_split_heads(project(encoder_hidden_states), attn.heads) for project in projections)
            query = torch.cat([query, _normalize(attn.norm_added_q, text_query)], dim=2)
            key = torch.cat([key, _normalize(attn.norm_added_k, text_key)], dim=2)
            value = torch.cat([value, text_value], dim=2)
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
        out = out.transpose(1, 2).flatten(2).to(query.dtype)
        image_out, _ = self.add_branches(out[:, :positions], heads)
        image_out = attn.to_out[1](attn.to_out[0](image_out))
        if encoder_hidden_states is None:
            return image_out
        return image_out, out[:, positions:] if attn.context_pre_only else attn.to_add_out(out[:, positions:])


class FluxSiteProcessor(DiTAttnProcessor):
    """Attention of Flux and Chroma: [text ; image] with rotary embedding, in double blocks (joint) and in single blocks."""

    replaces = (FluxAttnProcessor,)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:  # fmt: skip
        """As `FluxAttnProcessor`; a block adds a third result of a joint site to the image stream after its feed-forward network."""
        if not self.branches:
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        raw_query, raw_key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in _project(attn, hidden_states, "to_qkv", _IMAGE))
        query, key = attn.norm_q(raw_query), attn.norm_k(raw_key)
        heads = HeadTensors(*(x.transpose(1, 2) for x in (query, raw_query, raw_key, value)))
        if encoder_hidden_states is not None:
            text = (x.unflatten(-1, (-1, attn.head_dim)) for x in _project(attn, encoder_hidden_states, "to_added_qkv", _TEXT))
            text_query, text_key, text_value = text
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        out = _dispatch_attention(self.replaced, query, key, value, attention_mask).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return self.add_branches(out, heads)[0]
        tokens = encoder_hidden_states.shape[1]
        image_out, after = self.add_branches(out[:, tokens:], heads)
        image_out = attn.to_out[1](attn.to_out[0](image_out.contiguous()))
        text_out = attn.to_add_out(out[:, :tokens].contiguous())
        return (image_out, text_out) if after is None else (image_out, text_out, after)


class QwenImageSiteProcessor(DiTAttnProcessor):
    """Joint attention of Qwen-Image: [text ; image], complex rotary embedding of each stream."""

    replaces = (QwenDoubleStreamAttnProcessor2_0,)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None, attention_mask: Tensor | None = None, image_rotary_emb: Any = None,
    ) -> Any:  # fmt: skip
        """As `QwenDoubleStreamAttnProcessor2_0`: the output of the image and that of the text."""
        if not self.branches or encoder_hidden_states is None or attention_mask is not None:
            return self.replaced(attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb)
        head_dim, tokens = attn.inner_dim // attn.heads, encoder_hidden_states.shape[1]
        raw_query, raw_key, value = (p(hidden_states).unflatten(-1, (-1, head_dim)) for p in (attn.to_q, attn.to_k, attn.to_v))
        text = (p(encoder_hidden_states).unflatten(-1, (-1, head_dim)) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        text_query, text_key, text_value = text
        query, key = _normalize(attn.norm_q, raw_query), _normalize(attn.norm_k, raw_key)
        heads = HeadTensors(*(x.transpose(1, 2) for x in (query, raw_query, raw_key, value)))
        text_query, text_key = _normalize(attn.norm_added_q, text_query), _normalize(attn.norm_added_k, text_key)
        if image_rotary_emb is not None:
            image_freqs, text_freqs = image_rotary_emb
            query, key = (apply_rotary_emb_qwen(x, image_freqs, use_real=False) for x in (query, key))
            text_query, text_key = (apply_rotary_emb_qwen(x, text_freqs, use_real=False) for x in (text_query, text_key))
        joint = [torch.cat(pair, dim=1) for pair in ((text_query, query), (text_key, key), (text_value, value))]
        mask = _joint_mask(encoder_hidden_states_mask, hidden_states.shape[1])
        out = _dispatch_attention(self.replaced, joint[0], joint[1], joint[2], mask).flatten(2, 3).to(query.dtype)
        image_out, _ = self.add_branches(out[:, tokens:], heads)
        image_out = attn.to_out[0](image_out.contiguous())
        image_out = attn.to_out[1](image_out) if len(attn.to_out) > 1 else image_out
        return image_out, attn.to_add_out(out[:, :tokens].contiguous())


class CrossSiteProcessor(DiTAttnProcessor):
    """Cross-attention of PixArt to the text."""

    replaces = (AttnProcessor, AttnProcessor2_0)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """As `AttnProcessor2_0`, (rows, positions, hidden)."""
        if not self.branches:
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rows, tokens = states.shape[:2]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, rows).unflatten(0, (rows, attn.heads))
        query = _split_heads(attn.to_q(hidden_states), attn.heads)
        key, value = (_split_heads(project(states), attn.heads) for project in (attn.to_k, attn.to_v))
        attention = attention_bmm if type(self.replaced) is AttnProcessor else attention_sdpa
        out = attention(query, key, value, attention_mask).transpose(1, 2).flatten(2)
        out, _ = self.add_branches(out, HeadTensors(query, query, key, value))
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


PROCESSORS: tuple[type[DiTAttnProcessor], ...] = (SD3AttnProcessor, FluxSiteProcessor, QwenImageSiteProcessor, CrossSiteProcessor)

_IMAGE, _TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def _project(attn: Any, states: Tensor, fused_name: str, names: tuple[str, str, str]) -> tuple[Tensor, ...]:
    """Queries, keys and values, by one fused projection where diffusers has fused them."""
    if getattr(attn, "fused_projections", False) and hasattr(attn, fused_name):
        return cast(tuple[Tensor, ...], getattr(attn, fused_name)(states).chunk(3, dim=-1))
    return tuple(getattr(attn, name)(states) for name in names)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(rows, positions, hidden) → (rows, heads, positions, channels)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _normalize(norm: Any, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _dispatch_attention(replaced: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by the backend that the replaced processor was set to; tensors are (rows, positions, heads, channels)."""
    return cast(
        Tensor,
        dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=replaced._attention_backend, parallel_config=replaced._parallel_config
        ),
    )


def _joint_mask(text_mask: Tensor | None, image_tokens: int) -> Tensor | None:
    """The mask of keys, (rows, 1, 1, text + image), from that of the text, (rows, text)."""
    if text_mask is None:
        return None
    ones = torch.ones(len(text_mask), image_tokens, dtype=torch.bool, device=text_mask.device)
    return torch.cat([text_mask.bool(), ones], dim=1)[:, None, None, :]
