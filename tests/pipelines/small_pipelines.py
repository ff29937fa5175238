"""Every pipeline of diffusers that owns a UNet, as a small random model, with the arguments of a call.

Components are chosen by the names of a pipeline's parameters, so that a pipeline of a later version is found and mostly built as well.
"""

import copy
import importlib
import inspect
import pkgutil
import warnings
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    MotionAdapter,
    PriorTransformer,
    SparseControlNetModel,
    T2IAdapter,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNetMotionModel,
    pipelines,
)

try:
    from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor
except ModuleNotFoundError:  # before diffusers 0.37
    from diffusers.pipelines.blip_diffusion.blip_image_processing import BlipImageProcessor
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from conftest import CROSS, _text_config, _tokenizer, _vae, image_processor

SIDE = 32  # of images; the VAE halves them once
FRAMES = 3
TOKENS = 5
CHANNELS = (16, 32)


class Call(NamedTuple):
    """A call of a pipeline; `before` are the methods that have to be called first, with their arguments."""

    pipe: Any
    arguments: dict[str, Any]
    method: str = "__call__"
    before: tuple[tuple[str, dict[str, Any]], ...] = ()
    positives: tuple[Tensor, ...] = ()  # embeddings of the prompt, where they come from no text encoder
    has_reference: bool = True  # False where diffusers' own IP-Adapter fails or departs from the paper

    @property
    def has_ip_adapter(self) -> bool:
        """Whether diffusers' own IP-Adapter can be used in this call."""
        return self.has_reference and self.method == "__call__" and has_ip_adapter(type(self.pipe))


@cache
def find_pipelines() -> dict[str, type[DiffusionPipeline]]:
    """Every pipeline class of the installed diffusers with a parameter that is a UNet, by name."""
    for module in pkgutil.walk_packages(pipelines.__path__, pipelines.__name__ + "."):
        try:
            with warnings.catch_warnings(action="ignore"):
                importlib.import_module(module.name)
        except Exception:  # needs a package that is not installed
            continue
    found = {cls.__name__: cls for cls in _subclasses(DiffusionPipeline) if cls.__module__.startswith("diffusers.") and _unet_types(cls)}
    return dict(sorted(found.items()))


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_subclasses(subclass) for subclass in cls.__subclasses__()))


def _unet_types(cls: type) -> str:
    """The annotations of the parameters that are UNets, as text."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return " ".join(str(p.annotation) for p in parameters if "unet" in f"{p.name} {p.annotation}".lower() and "num_" not in p.name)


def has_supported_unet(cls: type) -> bool:
    """Whether its parameter `unet` may be a UNet2DConditionModel or UNetMotionModel of diffusers."""
    parameter = inspect.signature(cls.__init__).parameters.get("unet")
    names = str(parameter.annotation).replace("AudioLDM2UNet2DConditionModel", "") if parameter else ""
    return "UNet2DConditionModel" in names or "UNetMotionModel" in names


def has_ip_adapter(cls: type) -> bool:
    """Whether diffusers' own IP-Adapter takes embeddings in this pipeline."""
    return hasattr(cls, "load_ip_adapter") and "ip_adapter_image_embeds" in inspect.signature(cls.__call__).parameters


def random_image(seed: int = 1, side: int = SIDE) -> Image.Image:
    noise = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def _mask() -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    return mask


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def _unet(cls_name: str, xl: bool, in_channels: int) -> UNet2DConditionModel:
    torch.manual_seed(0)
    channels = (*CHANNELS, CHANNELS[-1]) if "LEditsPP" in cls_name else CHANNELS  # keeps attention maps at a quarter of the resolution
    more: dict[str, Any] = {}
    if xl:
        more |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "cross_attention_dim": 2 * CROSS}
        more |= {"projection_class_embeddings_input_dim": (5 if "Refiner" in cls_name else 6) * 8 + CROSS}
    if "GLIGEN" in cls_name:
        more |= {"attention_type": "gated-text-image" if "TextImage" in cls_name else "gated"}
    if cls_name == "StableDiffusionUpscalePipeline":
        more |= {"class_embed_type": None, "num_class_embeds": 1000}
    if "LatentConsistency" in cls_name:
        more |= {"time_cond_proj_dim": 32}
    if "StableUnCLIP" in cls_name:
        more |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * CROSS}
    if cls_name == "StableDiffusionLatentUpscalePipeline":
        return _k_unet()
    return UNet2DConditionModel(
        sample_size=SIDE // 2, in_channels=in_channels, block_out_channels=channels, layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels), up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        attention_head_dim=4, **{"cross_attention_dim": CROSS} | more,
    ).eval()  # fmt: skip


def _k_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        act_fn="gelu", attention_head_dim=8, norm_num_groups=None, block_out_channels=(32, 32, 64, 64), time_cond_proj_dim=128 + CROSS,
        conv_in_kernel=1, conv_out_kernel=1, cross_attention_dim=CROSS, in_channels=8, out_channels=5, mid_block_type=None,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3), up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        resnet_time_scale_shift="scale_shift", time_embedding_type="fourier", timestep_post_act="gelu",
    ).eval()  # fmt: skip


def _added_kv_unet() -> UNet2DConditionModel:
    """As of Kandinsky and DeepFloyd IF: attention to text and image at once, without cross-attention layers."""
    return UNet2DConditionModel(
        block_out_channels=CHANNELS, layers_per_block=1, norm_num_groups=8, cross_attention_dim=CROSS, attention_head_dim=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ).eval()  # fmt: skip


@cache
def _text_encoder(projection: bool = False, positions: int = 24) -> Any:
    torch.manual_seed(3)
    config = _text_config()
    config.max_position_embeddings = positions
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


class _ExampleEncoder(torch.nn.Module):
    """Stands for the image encoder of Paint by Example: an embedding of the example, and one of none."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, pixels: Tensor, return_uncond_vector: bool = False) -> tuple[Tensor, Tensor]:
        return _random(1, 1, CROSS, seed=21), _random(1, 1, CROSS, seed=20)


@cache
def _image_encoder(dim: int) -> CLIPVisionModelWithProjection:
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=dim, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, projection_dim=dim
    )
    return CLIPVisionModelWithProjection(config).eval()


def _controlnet(cls: type, unet: UNet2DConditionModel) -> Any:
    torch.manual_seed(9)
    if "Sparse" in cls.__name__:
        return SparseControlNetModel(
            block_out_channels=CHANNELS, layers_per_block=1, down_block_types=("CrossAttnDownBlockMotion",) * 2, cross_attention_dim=CROSS,
            attention_head_dim=4, norm_num_groups=8, motion_num_attention_heads=2,
            conditioning_embedding_out_channels=(4, 8), conditioning_channels=3, concat_conditioning_mask=False,
            use_simplified_condition_embedding=False,
        ).eval()  # fmt: skip
    if "Union" in cls.__name__:
        config = {key: unet.config[key] for key in inspect.signature(ControlNetUnionModel.__init__).parameters if key in unet.config}
        net = ControlNetUnionModel(
            **config | {"conditioning_embedding_out_channels": (4, 8), "num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
        )
    else:
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.05)
    return net.eval()


def _t2i_adapter(xl: bool) -> T2IAdapter:
    torch.manual_seed(9)
    return T2IAdapter(3, [*CHANNELS], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter").eval()


def _motion_adapter() -> MotionAdapter:
    torch.manual_seed(8)
    return MotionAdapter(
        block_out_channels=CHANNELS, motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=8,
        use_motion_mid_block=False,
    ).eval()  # fmt: skip


def _scheduler(name: str) -> Any:
    cls: Any = DDIMScheduler
    if "LatentConsistency" in name:
        cls = LCMScheduler
    elif name == "StableDiffusionLatentUpscalePipeline":
        return EulerDiscreteScheduler(prediction_type="sample")
    elif "Paradigms" in name:
        cls = DDIMParallelScheduler
    elif name == "CycleDiffusionPipeline":
        return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False)
    elif "LEditsPP" in name:
        return DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2)
    return cls(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)


def _in_channels(name: str) -> int:
    if "InstructPix2Pix" in name or "Marigold" in name:
        return 8
    return {"StableDiffusionDepth2ImgPipeline": 5, "PaintByExamplePipeline": 9, "PIAPipeline": 9, "StableDiffusionUpscalePipeline": 7}.get(
        name, 4
    )


def build_pipeline(cls: type[DiffusionPipeline]) -> Any:
    """The pipeline with small random components."""
    name = cls.__name__
    parameters = inspect.signature(cls.__init__).parameters
    xl = "text_encoder_2" in parameters or "Kolors" in name
    unet = copy.deepcopy(_unet(name, xl, _in_channels(name)))
    torch.manual_seed(4)
    components = {
        "unet": lambda: unet, "vae": _vae, "vqvae": _vae, "text_encoder": _text_encoder, "bert": lambda: _text_encoder(positions=77),
        "text_encoder_2": lambda: _text_encoder(True), "tokenizer": _tokenizer, "tokenizer_2": _tokenizer,
        "scheduler": lambda: _scheduler(name), "low_res_scheduler": DDPMScheduler, "inverse_scheduler": lambda: DDIMInverseScheduler(),
        "safety_checker": lambda: None, "feature_extractor": image_processor, "image_encoder": lambda: None, "watermarker": lambda: None,
        "controlnet": lambda: _controlnet(cls, unet), "adapter": lambda: _t2i_adapter(xl), "motion_adapter": _motion_adapter,
        "depth_estimator": lambda: None, "processor": lambda: None, "image_project": lambda: None,
        "caption_generator": lambda: None, "caption_processor": lambda: None,
        "mel": _Mel, "requires_safety_checker": lambda: False, "pag_applied_layers": lambda: ["mid"],
        "add_watermarker": lambda: False, "prior_tokenizer": _tokenizer, "prior_text_encoder": lambda: _text_encoder(True),
        "prior": lambda: _prior(),
        "prior_scheduler": lambda: UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
        "image_normalizer": lambda: _image_normalizer(), "image_noising_scheduler": DDPMScheduler,
    }  # fmt: skip
    if name in ("StableDiffusionImageVariationPipeline", "StableUnCLIPImg2ImgPipeline"):
        components["image_encoder"] = lambda: _image_encoder(CROSS)
    if name == "PaintByExamplePipeline":
        components["image_encoder"] = _ExampleEncoder
    if name.startswith("BlipDiffusion"):
        components |= {"text_encoder": _SubjectEncoder, "qformer": lambda: None, "image_processor": BlipImageProcessor}
    chosen = {p: components[p]() for p in parameters if p in components}
    pipe = cls(**chosen)
    pipe.set_progress_bar_config(disable=True)
    if isinstance(getattr(pipe, "unet", None), (UNet2DConditionModel, UNetMotionModel)):
        pipe.unet.eval()
    if name.startswith("BlipDiffusion"):
        _give_subject(pipe)
    if name == "KolorsImg2ImgPipeline":  # does not pass pooled embeddings on
        text = (prompt_embeds(pipe), prompt_embeds(pipe, False), _random(1, CROSS, seed=30), _random(1, CROSS, seed=31))
        pipe.encode_prompt = lambda *args, **kwargs: text
    return pipe


def _prior() -> PriorTransformer:
    return PriorTransformer(num_attention_heads=2, attention_head_dim=8, embedding_dim=CROSS, num_embeddings=24, num_layers=1)


def _image_normalizer() -> Any:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    return StableUnCLIPImageNormalizer(embedding_dim=CROSS)


def prompt_embeds(pipe: Any, positive: bool = True) -> Tensor:
    """The text embeddings of the prompt or of the negative prompt, (1, tokens, cross)."""
    return _random(1, TOKENS, pipe.unet.config.cross_attention_dim, seed=20 + positive)


def build_arguments(pipe: Any, method: str = "__call__") -> dict[str, Any]:
    """The arguments of a guided call of one step. Text is given as embeddings where the pipeline takes them."""
    name = type(pipe).__name__
    parameters = inspect.signature(getattr(type(pipe), method)).parameters
    embeds = {"prompt_embeds": prompt_embeds(pipe), "negative_prompt_embeds": prompt_embeds(pipe, False)}
    pooled = {"pooled_prompt_embeds": _random(1, CROSS, seed=30), "negative_pooled_prompt_embeds": _random(1, CROSS, seed=31)}
    image = random_image()
    values: dict[str, Any] = {
        "image": image, "mask_image": _mask(), "control_image": random_image(2), "video": [random_image(n) for n in range(FRAMES)],
        "height": SIDE, "width": SIDE, "num_frames": FRAMES, "num_inference_steps": 1, "guidance_scale": 4.0, "strength": 1.0,
        "output_type": "latent", "conditioning_frames": [random_image(n) for n in range(FRAMES)], "pag_scale": 2.0,
        "depth_map": _random(1, SIDE, SIDE, seed=5), **embeds, **pooled,
    }  # fmt: skip
    if "ControlNetUnion" in name:
        values |= {"control_mode": [0], "control_image": [random_image(2)]}
    is_text_needed = "prompt" in parameters and parameters["prompt"].default is inspect.Parameter.empty
    if "prompt_embeds" not in parameters or is_text_needed or name in _TAKES_TEXT:
        values = {key: value for key, value in values.items() if not key.endswith("prompt_embeds")}
        values |= {"prompt": "a red fish", "negative_prompt": "a blue cat"}
    values |= {key: value for key, value in _SPECIAL.get(name, {}).items()}
    return {key: value for key, value in values.items() if key in parameters}


def build_shell(cls: type[DiffusionPipeline]) -> Any:
    """A pipeline that has no more than a UNet of its kind: enough to see it refused."""
    pipe = object.__new__(cls)
    if not has_supported_unet(cls) or "ControlNetXS" in cls.__name__:  # of which UNet and ControlNet are one model
        unet = torch.nn.Identity()
    elif "LDM" in cls.__name__:
        unet = UNet2DConditionModel(block_out_channels=CHANNELS, cross_attention_dim=CHANNELS, layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    else:
        unet = _added_kv_unet()
    pipe.__dict__["unet"] = unet
    return pipe


def build_calls(cls: type[DiffusionPipeline]) -> list[Call]:
    """The calls to check of this pipeline: its `__call__`, and other methods that call the UNet."""
    pipe = build_pipeline(cls)
    arguments = build_arguments(pipe)
    match cls.__name__:
        case "StableDiffusionDiffEditPipeline":
            image, text = random_image(), {"guidance_scale": 4.0, "num_inference_steps": 4}
            mask = {"image": image, "source_prompt": "a blue cat", "target_prompt": "a red fish", "num_maps_per_mask": 2, **text}
            invert = {"image": image, "prompt": "a blue cat", "inpaint_strength": 1.0, **text}
            edit = {"mask_image": torch.ones(1, SIDE // 2, SIDE // 2), "image_latents": _random(1, 4, 4, SIDE // 2, SIDE // 2, seed=7)}
            text |= {"prompt": "a red fish", "negative_prompt": "a blue cat", "inpaint_strength": 1.0, "output_type": "latent"}
            return [Call(pipe, edit | text), Call(pipe, mask, "generate_mask"), Call(pipe, invert, "invert")]
        case "LEditsPPPipelineStableDiffusion" | "LEditsPPPipelineStableDiffusionXL":
            invert = {"image": random_image(), "num_inversion_steps": 3, "skip": 0.1, "source_prompt": "a blue cat"}
            return [Call(pipe, arguments, before=(("invert", invert),)), Call(pipe, invert, "invert")]
        case "PaintByExamplePipeline" | "BlipDiffusionPipeline" | "BlipDiffusionControlNetPipeline":
            return [Call(pipe, arguments, positives=(_random(1, 1, CROSS, seed=21)[0],))]
        case "StableDiffusionImageVariationPipeline":
            pixels = pipe.feature_extractor(images=random_image(), return_tensors="pt").pixel_values
            return [Call(pipe, arguments, positives=(pipe.image_encoder(pixels).image_embeds.detach(),))]
        case "StableDiffusionInstructPix2PixPipeline" | "StableDiffusionLDM3DPipeline":  # these fail with embeddings alone
            return [Call(pipe, arguments, has_reference=False)]
        case "StableDiffusionSAGPipeline":  # with guidance it gives the image to the unconditional rows
            return [Call(pipe, arguments, has_reference=False), Call(pipe, arguments | {"guidance_scale": 1.0})]
    return [Call(pipe, arguments)]


class _Mel:
    """Stands for the spectrograms of AudioDiffusion."""

    x_res = y_res = SIDE // 2

    def get_sample_rate(self) -> int:
        return 1


class _SubjectEncoder(torch.nn.Module):
    """Stands for the text encoder of BLIP-Diffusion, for the unconditional text."""

    dtype, device = torch.float32, torch.device("cpu")
    text_model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=24))

    def forward(self, input_ids: Tensor, ctx_embeddings: Tensor | None = None) -> tuple[Tensor]:
        return (_random(1, 1, CROSS, seed=20),)


def _give_subject(pipe: Any) -> None:
    """What BLIP-Diffusion makes of a subject and its image."""
    pipe.get_query_embeddings = lambda *args: None
    pipe.encode_prompt = lambda *args: _random(1, 1, CROSS, seed=21)
    pipe.image_processor.preprocess = lambda *args, **kwargs: {"pixel_values": _random(1, 3, SIDE, SIDE, seed=2)}


_TAKES_TEXT = ("StableUnCLIPPipeline",)  # of which the prior needs the words
_BLIP = {
    "prompt": ["red"], "reference_image": random_image(3), "source_subject_category": ["cat"], "target_subject_category": ["cat"],
    "output_type": "np",
}  # fmt: skip
_SPECIAL: dict[str, dict[str, Any]] = {
    "StableDiffusionParadigmsPipeline": {"num_inference_steps": 3},
    "StableDiffusionPanoramaPipeline": {"width": 3 * SIDE, "view_batch_size": 2},
    "StableDiffusionGLIGENPipeline": {"gligen_phrases": ["a fish"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]},
    "StableDiffusionLatentUpscalePipeline": {"image": _random(1, 4, SIDE // 2, SIDE // 2, seed=6)},
    "StableDiffusionInstructPix2PixPipeline": {"image_guidance_scale": 1.5},
    "AudioDiffusionPipeline": {"encoding": _random(1, TOKENS, CROSS, seed=1), "steps": 2},
    "StableDiffusionAttendAndExcitePipeline": {"token_indices": [1]},
    "CycleDiffusionPipeline": {"source_prompt": "a blue bird", "strength": 0.8, "num_inference_steps": 4},
    "StableDiffusionGLIGENTextImagePipeline": {
        "gligen_phrases": ["a fish"],
        "gligen_images": [None],
        "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]],
        "input_phrases_mask": [1],
        "input_images_mask": [0],
    },
    "BlipDiffusionPipeline": _BLIP,
    "BlipDiffusionControlNetPipeline": _BLIP | {"condtioning_image": random_image(2)},
    "StableDiffusionPix2PixZeroPipeline": {
        "source_embeds": _random(1, TOKENS, CROSS, seed=1),
        "target_embeds": _random(1, TOKENS, CROSS, seed=2),
    },
    "PaintByExamplePipeline": {"example_image": random_image(3)},
    "StableDiffusionLDM3DPipeline": {"output_type": "np"},
    "MarigoldDepthPipeline": {"processing_resolution": SIDE, "output_type": "np"},
    "MarigoldIntrinsicsPipeline": {"processing_resolution": SIDE, "output_type": "np"},
    "MarigoldNormalsPipeline": {"processing_resolution": SIDE, "output_type": "np"},
    "TextToVideoZeroPipeline": {"t0": 0, "t1": 1, "video_length": 2, "num_inference_steps": 2},
    "TextToVideoZeroSDXLPipeline": {"t0": 0, "t1": 1, "video_length": 2, "num_inference_steps": 2},
    "LEditsPPPipelineStableDiffusion": {
        "editing_prompt": ["a red fish", "a red cat"],
        "use_cross_attn_mask": True,
        "use_intersect_mask": False,
    },
    "LEditsPPPipelineStableDiffusionXL": {
        "editing_prompt": ["a red fish", "a red cat"],
        "use_cross_attn_mask": True,
        "use_intersect_mask": False,
    },
    "SemanticStableDiffusionPipeline": {"editing_prompt": ["a blue hat", "a cat"]},
}
