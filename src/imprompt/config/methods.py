"""The registry of methods: one row for each system that can be trained, compared or personalized with. Standard library only."""

from dataclasses import dataclass
from typing import Literal

FeatureType = Literal["pooled", "patches", "pixels", "latents", "none"]
AdapterType = Literal["base", "plus", "full-face"]

# How the image tokens of several references are aggregated: without training, and with trained weights.
TRAINING_FREE_AGGREGATIONS = ("concat", "average", "max", "average-tokens", "max-tokens", "joint")
AGGREGATIONS = (*TRAINING_FREE_AGGREGATIONS, "self-attention", "attention", "attention-tokens")


@dataclass(frozen=True)
class MethodInfo:
    """What is known about a method before anything is imported."""

    name: str
    features: FeatureType  # what it reads of a reference image: the encoder's pooled embedding or patches, pixels, latents, or nothing
    factory: str  # module:function below imprompt.methods, called with (pipe, encoder); returns the untrained method
    trains_unet: bool = False  # fine-tunes a copy of UNet weights
    multi_reference: bool = False  # can be conditioned on several reference images
    per_subject: bool = False  # fine-tuned on the images of one subject, and conditioned on no image afterwards
    adapter_type: AdapterType | None = None  # of the IP-Adapter family


_ALL = (
    MethodInfo("ip-adapter", "pooled", "ip_adapter:build_base", multi_reference=True, adapter_type="base"),
    MethodInfo("ip-adapter-plus", "patches", "ip_adapter:build_plus", multi_reference=True, adapter_type="plus"),
    MethodInfo("ip-adapter-full-face", "patches", "ip_adapter:build_full_face", multi_reference=True, adapter_type="full-face"),
    MethodInfo("simple", "pooled", "token_adapters:build_simple", multi_reference=True),
    MethodInfo("simple-plus", "patches", "token_adapters:build_simple_plus", multi_reference=True),
    MethodInfo("uni-controlnet", "pooled", "token_adapters:build_uni_controlnet", multi_reference=True),
    MethodInfo("t2i-style", "patches", "token_adapters:build_t2i_style", multi_reference=True),
    MethodInfo("shuffle", "pixels", "shuffle:build_shuffle", trains_unet=True),
    MethodInfo("seecoder", "pixels", "seecoder:build_seecoder"),
    MethodInfo("image-variations", "pooled", "image_variations:build_image_variations", trains_unet=True),
    MethodInfo("sd-unclip", "pooled", "unclip:build_sd_unclip", trains_unet=True),
    MethodInfo("blip-diffusion", "patches", "blip:build_blip_diffusion", trains_unet=True, multi_reference=True),
    MethodInfo("open-unclip", "pooled", "unclip:build_open_unclip", trains_unet=True),
    MethodInfo("kandinsky", "pooled", "kandinsky:build_kandinsky", trains_unet=True),
    MethodInfo("versatile", "patches", "versatile:build_versatile", trains_unet=True),
    MethodInfo("reference-only", "latents", "reference_only:build_reference_only"),
    MethodInfo("dreambooth", "none", "dreambooth:build_dreambooth", per_subject=True),
    MethodInfo("dreambooth-lora", "none", "dreambooth:build_dreambooth_lora", per_subject=True),
    MethodInfo("inversion", "none", "inversion:build_textual_inversion", per_subject=True),
)
METHODS: dict[str, MethodInfo] = {info.name: info for info in _ALL}

UNET_METHODS = tuple(info.name for info in _ALL if info.trains_unet)
MULTI_REFERENCE_METHODS = tuple(info.name for info in _ALL if info.multi_reference)
PER_SUBJECT_METHODS = tuple(info.name for info in _ALL if info.per_subject)
REFERENCE_METHODS = tuple(info.name for info in _ALL if not info.per_subject and info.name != "reference-only")
IP_ADAPTER_PAPER_METHODS = tuple(info.name for info in _ALL if not info.per_subject and info.name != "ip-adapter-full-face")
METHOD_OF_ADAPTER_TYPE: dict[str, str] = {info.adapter_type: info.name for info in _ALL if info.adapter_type}

PERSONALIZATION_METHODS = (*TRAINING_FREE_AGGREGATIONS, "attention", "self-attention", *PER_SUBJECT_METHODS)
PERSONALIZATION_PAPER_ROWS = (
    "base", "plus", "concat", "average", "max", "average-tokens", "max-tokens", "average-plus", "max-plus", "self-attention",
    "attention-tokens", "reference-sweep", *PER_SUBJECT_METHODS
)  # fmt: skip
