"""Tiny random pipelines of the outside classes, saved as the hub keeps them."""

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

from imprompt.mini.tokenizer import make_tokenizer

WIDTH = 32  # of every embedding
TOKENIZER = make_tokenizer()
PIXELS = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    """Two levels, with cross-attention in the deeper one."""
    settings = {
        "sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": WIDTH,
        "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**(settings | changes))


def super_resolution() -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=32, in_channels=6, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2,
    )  # fmt: skip


def vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=32,
    )  # fmt: skip


def movq() -> diffusers.VQModel:
    return diffusers.VQModel(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, num_vq_embeddings=12, vq_embed_dim=4, norm_type="spatial",
    )  # fmt: skip


def eyes() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
        projection_dim=WIDTH,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config)


def words(kind: type = CLIPTextModel) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(TOKENIZER), hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TOKENIZER.model_max_length, projection_dim=WIDTH, bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id,
    )  # fmt: skip
    return kind(config)


def ddim() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)


def stable_diffusion(folder: Path) -> None:
    diffusers.StableDiffusionPipeline(
        unet=unet(), vae=vae(), text_encoder=words(), tokenizer=TOKENIZER, scheduler=ddim(), safety_checker=None, feature_extractor=PIXELS,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def image_variation(folder: Path) -> None:
    diffusers.StableDiffusionImageVariationPipeline(
        unet=unet(), vae=vae(), image_encoder=eyes(), scheduler=ddim(), safety_checker=None, feature_extractor=PIXELS,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def stable_unclip(folder: Path) -> None:
    diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=PIXELS, image_encoder=eyes(), image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"), tokenizer=TOKENIZER, text_encoder=words(),
        unet=unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH), scheduler=ddim(), vae=vae(),
    ).save_pretrained(folder)  # fmt: skip


def karlo(folder: Path) -> None:
    diffusers.UnCLIPImageVariationPipeline(
        decoder=unet(
            in_channels=3, out_channels=6, class_embed_type="identity", mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        ),
        text_encoder=words(CLIPTextModelWithProjection), tokenizer=TOKENIZER,
        text_proj=UnCLIPTextProjModel(clip_embeddings_dim=WIDTH, time_embed_dim=32, cross_attention_dim=WIDTH),
        feature_extractor=PIXELS, image_encoder=eyes(), super_res_first=super_resolution(), super_res_last=super_resolution(),
        decoder_scheduler=diffusers.UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        super_res_scheduler=diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    ).save_pretrained(folder)  # fmt: skip
    declare(folder, text_proj="unclip")


def kandinsky_prior(folder: Path, kind: type = diffusers.KandinskyPriorPipeline) -> None:
    kind(
        prior=diffusers.PriorTransformer(2, 8, 1, embedding_dim=WIDTH, num_embeddings=TOKENIZER.model_max_length, additional_embeddings=4),
        image_encoder=eyes(), text_encoder=words(CLIPTextModelWithProjection), tokenizer=TOKENIZER, image_processor=PIXELS,
        scheduler=diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0),
    ).save_pretrained(folder)  # fmt: skip


def kandinsky_prior_22(folder: Path) -> None:
    kandinsky_prior(folder, diffusers.KandinskyV22PriorPipeline)


def kandinsky(folder: Path) -> None:
    text = MCLIPConfig(
        transformerDimSize=WIDTH, imageDimSize=WIDTH, vocab_size=len(TOKENIZER), hidden_size=WIDTH, intermediate_size=37,
        num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=80, pad_token_id=1,
    )  # fmt: skip
    added = {"encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"}
    diffusers.KandinskyPipeline(
        text_encoder=MultilingualCLIP(text), tokenizer=TOKENIZER, unet=unet(out_channels=8, **added), scheduler=ddim(), movq=movq()
    ).save_pretrained(folder)


def kandinsky_22(folder: Path) -> None:
    added = {"encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    diffusers.KandinskyV22Pipeline(unet=unet(out_channels=8, **added), scheduler=scheduler, movq=movq()).save_pretrained(folder)


def versatile(folder: Path) -> None:
    diffusers.VersatileDiffusionImageVariationPipeline(
        image_feature_extractor=PIXELS, image_encoder=eyes(), image_unet=unet(), vae=vae(), scheduler=ddim()
    ).save_pretrained(folder)


def versatile_whole(folder: Path) -> None:
    """As published: the index of all three pipelines."""
    versatile(folder)
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | {
        "_class_name": "VersatileDiffusionPipeline",
        "text_unet": ["versatile_diffusion", "UNetFlatConditionModel"],
    }
    path.write_text(json.dumps(index))


def blip(folder: Path) -> None:
    vocabulary = folder / "bert"
    vocabulary.mkdir(parents=True)
    (vocabulary / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]))
    sizes = {"hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    qformer = Blip2Config(
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        qformer_config=sizes | {"vocab_size": 40, "encoder_hidden_size": WIDTH, "max_position_embeddings": 16},
        num_query_tokens=4, tokenizer=str(vocabulary),
    )  # fmt: skip
    diffusers.BlipDiffusionPipeline(
        tokenizer=TOKENIZER, text_encoder=loud(words(ContextCLIPTextModel)), vae=vae(), unet=unet(),
        scheduler=diffusers.PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True), qformer=loud(Blip2QFormerModel(qformer)),
        image_processor=BlipImageProcessor(size={"height": 32, "width": 32}),
    ).save_pretrained(folder)  # fmt: skip
    declare(folder, text_encoder="blip_diffusion", qformer="blip_diffusion", image_processor="blip_diffusion")


def control(folder: Path, pooled: bool = True) -> None:
    net = diffusers.ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(4, 8))
    net.register_to_config(global_pool_conditions=pooled)
    loud(net).save_pretrained(folder)


def loud(model: Any) -> Any:
    """With weights that are neither zero nor small, so that what goes in comes out."""
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return model


def declare(folder: Path, **rooms: str) -> None:
    """Write where diffusers had these parts when the published indices were written; it moved them without a forwarding address."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    for part, room in rooms.items():
        index[part][0] = room
    path.write_text(json.dumps(index))
