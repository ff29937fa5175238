"""Tiny pipelines with random weights of the external classes, saved in the layout of the hub."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor
from diffusers.pipelines.deprecated.blip_diffusion.modeling_blip2 import Blip2QFormerModel
from diffusers.pipelines.deprecated.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel
from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from transformers import (
    Blip2Config,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from imprompt.mini.tokenizer import build_tokenizer

EMBED_DIM = 32
TOKENIZER = build_tokenizer()
IMAGE_PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def make_unet(**config_changes: Any) -> diffusers.UNet2DConditionModel:
    """Two resolutions, with cross-attention at the lower one."""
    config = {
        "sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": EMBED_DIM,
        "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**(config | config_changes))


def make_super_resolution_unet() -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=32, in_channels=6, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2,
    )  # fmt: skip


def make_vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=32,
    )  # fmt: skip


def make_movq() -> diffusers.VQModel:
    return diffusers.VQModel(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, num_vq_embeddings=12, vq_embed_dim=4, norm_type="spatial",
    )  # fmt: skip


def make_image_encoder() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=EMBED_DIM, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
        projection_dim=EMBED_DIM,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config)


def make_text_encoder(cls: type = CLIPTextModel) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(TOKENIZER), hidden_size=EMBED_DIM, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TOKENIZER.model_max_length, projection_dim=EMBED_DIM, bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id,
    )  # fmt: skip
    return cls(config)


def make_ddim_scheduler() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)


def save_stable_diffusion(folder: Path) -> None:
    diffusers.StableDiffusionPipeline(
        unet=make_unet(), vae=make_vae(), text_encoder=make_text_encoder(), tokenizer=TOKENIZER, scheduler=make_ddim_scheduler(),
        safety_checker=None, feature_extractor=IMAGE_PROCESSOR, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def save_image_variation(folder: Path) -> None:
    diffusers.StableDiffusionImageVariationPipeline(
        unet=make_unet(), vae=make_vae(), image_encoder=make_image_encoder(), scheduler=make_ddim_scheduler(), safety_checker=None,
        feature_extractor=IMAGE_PROCESSOR, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def save_stable_unclip(folder: Path) -> None:
    diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=IMAGE_PROCESSOR, image_encoder=make_image_encoder(),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=EMBED_DIM),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"), tokenizer=TOKENIZER,
        text_encoder=make_text_encoder(), scheduler=make_ddim_scheduler(), vae=make_vae(),
        unet=make_unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * EMBED_DIM),
    ).save_pretrained(folder)  # fmt: skip


def save_karlo(folder: Path) -> None:
    diffusers.UnCLIPImageVariationPipeline(
        decoder=make_unet(
            in_channels=3, out_channels=6, class_embed_type="identity", mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        ),
        text_encoder=make_text_encoder(CLIPTextModelWithProjection), tokenizer=TOKENIZER,
        text_proj=UnCLIPTextProjModel(clip_embeddings_dim=EMBED_DIM, time_embed_dim=32, cross_attention_dim=EMBED_DIM),
        feature_extractor=IMAGE_PROCESSOR, image_encoder=make_image_encoder(), super_res_first=make_super_resolution_unet(),
        super_res_last=make_super_resolution_unet(),
        decoder_scheduler=diffusers.UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        super_res_scheduler=diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    ).save_pretrained(folder)  # fmt: skip
    set_index_modules(folder, text_proj="unclip")


def save_kandinsky_prior(folder: Path, cls: type = diffusers.KandinskyPriorPipeline) -> None:
    cls(
        prior=diffusers.PriorTransformer(
            2, 8, 1, embedding_dim=EMBED_DIM, num_embeddings=TOKENIZER.model_max_length, additional_embeddings=4
        ),
        image_encoder=make_image_encoder(), text_encoder=make_text_encoder(CLIPTextModelWithProjection), tokenizer=TOKENIZER,
        image_processor=IMAGE_PROCESSOR,
        scheduler=diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0),
    ).save_pretrained(folder)  # fmt: skip


def save_kandinsky_prior_22(folder: Path) -> None:
    save_kandinsky_prior(folder, diffusers.KandinskyV22PriorPipeline)


def save_kandinsky(folder: Path) -> None:
    text_config = MCLIPConfig(
        transformerDimSize=EMBED_DIM, imageDimSize=EMBED_DIM, vocab_size=len(TOKENIZER), hidden_size=EMBED_DIM, intermediate_size=37,
        num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=80, pad_token_id=1,
    )  # fmt: skip
    added_conditioning = {"encoder_hid_dim": EMBED_DIM, "encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"}
    diffusers.KandinskyPipeline(
        text_encoder=MultilingualCLIP(text_config),
        tokenizer=TOKENIZER,
        unet=make_unet(out_channels=8, **added_conditioning),
        scheduler=make_ddim_scheduler(),
        movq=make_movq(),
    ).save_pretrained(folder)


def save_kandinsky_22(folder: Path) -> None:
    added_conditioning = {"encoder_hid_dim": EMBED_DIM, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    diffusers.KandinskyV22Pipeline(
        unet=make_unet(out_channels=8, **added_conditioning), scheduler=scheduler, movq=make_movq()
    ).save_pretrained(folder)


def save_versatile(folder: Path) -> None:
    diffusers.VersatileDiffusionImageVariationPipeline(
        image_feature_extractor=IMAGE_PROCESSOR,
        image_encoder=make_image_encoder(),
        image_unet=make_unet(),
        vae=make_vae(),
        scheduler=make_ddim_scheduler(),
    ).save_pretrained(folder)


def save_published_versatile(folder: Path) -> None:
    """With the index of all three pipelines, as it is published."""
    save_versatile(folder)
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | {
        "_class_name": "VersatileDiffusionPipeline",
        "text_unet": ["versatile_diffusion", "UNetFlatConditionModel"],
    }
    path.write_text(json.dumps(index))


def save_blip(folder: Path) -> None:
    vocabulary = folder / "bert"
    vocabulary.mkdir(parents=True)
    (vocabulary / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]))
    sizes = {"hidden_size": EMBED_DIM, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    qformer_config = Blip2Config(
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        qformer_config=sizes | {"vocab_size": 40, "encoder_hidden_size": EMBED_DIM, "max_position_embeddings": 16},
        num_query_tokens=4, tokenizer=str(vocabulary),
    )  # fmt: skip
    diffusers.BlipDiffusionPipeline(
        tokenizer=TOKENIZER, text_encoder=init_large(make_text_encoder(ContextCLIPTextModel)), vae=make_vae(), unet=make_unet(),
        scheduler=diffusers.PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True),
        qformer=init_large(Blip2QFormerModel(qformer_config)), image_processor=BlipImageProcessor(size={"height": 32, "width": 32}),
    ).save_pretrained(folder)  # fmt: skip
    set_index_modules(folder, text_encoder="blip_diffusion", qformer="blip_diffusion", image_processor="blip_diffusion")


def save_controlnet(folder: Path, *, global_pool_conditions: bool = True) -> None:
    controlnet = diffusers.ControlNetModel.from_unet(make_unet(), conditioning_embedding_out_channels=(4, 8))
    controlnet.register_to_config(global_pool_conditions=global_pool_conditions)
    init_large(controlnet).save_pretrained(folder)


def init_large(model: Any) -> Any:
    """Initialize all weights so that none is zero or small: outputs then depend on inputs."""
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return model


def set_index_modules(folder: Path, **modules: str) -> None:
    """Name the modules in which published indices look for these parts; diffusers has moved them since."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    for part, module in modules.items():
        index[part][0] = module
    path.write_text(json.dumps(index))
