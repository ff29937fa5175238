"""λ, for all layers or layer by layer.

A scale is a number, or a mapping from the beginning of a layer's name to a number: the longest match counts, and a
layer without a match gets 0. `""` matches every layer.
"""

from collections.abc import Mapping

Scale = float | Mapping[str, float]

# The blocks of SDXL that InstantStyle (arXiv:2404.02733) found to carry style and layout.
STYLE: Mapping[str, float] = {"up_blocks.0.attentions.1": 1.0}
LAYOUT: Mapping[str, float] = {"down_blocks.2.attentions.1": 1.0}


BLOCKS = {"style": next(iter(STYLE)), "layout": next(iter(LAYOUT))}  # by the name that people know


def scale_of(scale: Scale, layer: str) -> float:
    """λ of the layer with this name, such as `up_blocks.1.attentions.0.transformer_blocks.0.attn2`."""
    if isinstance(scale, Mapping):
        fitting = [prefix for prefix in scale if layer == prefix or layer.startswith(prefix + ".") or not prefix]
        return float(scale[max(fitting, key=len)]) if fitting else 0.0
    return float(scale)


def unmatched(scale: Scale, layers: list[str]) -> list[str]:
    """The prefixes of a mapping that no layer begins with: most likely misspelt."""
    if not isinstance(scale, Mapping):
        return []
    return [p for p in scale if p and not any(name == p or name.startswith(p + ".") for name in layers)]
