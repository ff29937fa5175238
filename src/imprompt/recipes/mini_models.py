"""The recipe of mini: one function per part, in the order in which they need each other.

Every part is a Hugging Face class of its real kind and is saved in the folder form that
`StableDiffusionPipeline.from_pretrained` expects. The attribute classifier, the second CLIP and the identity encoder
only evaluate: nothing is trained with them afterwards.
"""

import itertools
import json
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    ResNetConfig,
    ResNetForImageClassification,
)

from imprompt.core.noise_schedule import logit_normal_quantile
from imprompt.mini import world
from imprompt.mini.held_out import make_held_out_samples
from imprompt.mini.tokenizer import MAX_LENGTH, build_tokenizer, save_tokenizer, tokenize_prompts
from imprompt.models.feature_distribution import FeatureDistribution, distribution_features
from imprompt.models.hub import BUNDLED_ADAPTERS
from imprompt.models.image_encoders import ImageEncoder
from imprompt.recipes import identity
from imprompt.recipes.trainer import TrainPlan, make_step_generator, train_module
from imprompt.utils.files import atomic_path

TrainingProgressCallback = Callable[[int, int, float], None]

# Attributes with a classification head, and their values.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "category": world.CATEGORIES,
    "color": world.COLORS,
    "background": world.BACKGROUNDS,
    "pattern": world.PATTERNS,
    "second_color": tuple(world.PALETTE),
    "accessory": world.ACCESSORIES,
}
ATTRIBUTE_WEIGHTS = {"pattern": 3.0, "category": 2.0}
IMAGES_PER_SUBJECT = 4
_FIRST_CLASSIFIER_SEED = 5_000_000  # no training image and no prompt has a seed from here on; identity.FIRST_IDENTITY_SEED is later


class ImagePool:
    """Images rendered once and stored as one array on disk: image i shows subject i // 4.

    "train" leaves out the held-out combinations. "judge" and "identity" are for the models that only evaluate: all
    combinations, subjects of their own.
    """

    def __init__(self, folder: Path, count: int, name: str = "train"):
        self.path = folder / f"{name}-{count}.npy"
        self.count = count
        draws, first_scene = {
            "train": (world.iterate_subjects(), 0),
            "judge": (map(world.make_subject, itertools.count(_FIRST_CLASSIFIER_SEED)), _FIRST_CLASSIFIER_SEED),
            "identity": (identity.iterate_hard_negatives(), identity.FIRST_IDENTITY_SEED),
        }[name]
        self._subjects = list(itertools.islice(draws, -(-count // IMAGES_PER_SUBJECT)))
        self._scenes = [world.make_scene(first_scene + i) for i in range(count)]

    def subject_of(self, i: int) -> world.Subject:
        return self._subjects[i // IMAGES_PER_SUBJECT]

    def scene_of(self, i: int) -> world.Scene:
        return self._scenes[i]

    def render_image(self, i: int) -> Image.Image:
        """Render image i."""
        return world.render(self.subject_of(i), self.scene_of(i))

    def render_all(self, report: TrainingProgressCallback) -> None:
        """Render all images; a finished file is left alone."""
        render_once(self.path, self.count, self.render_image, 3, report)

    @cached_property
    def pixels(self) -> Tensor:
        """(count, size, size, 3), uint8, read from disk as needed."""
        return torch.from_numpy(np.load(self.path, mmap_mode="r+"))

    def load_images(self, rows: Tensor) -> Tensor:
        """(rows, 3, size, size) in −1 … 1."""
        return self.pixels[rows].permute(0, 3, 1, 2).float() / 127.5 - 1

    @cached_property
    def labels(self) -> Tensor:
        """(count, attributes): the index of each attribute's value; −100 where it is not visible."""
        return torch.tensor([self._labels(i) for i in range(self.count)])

    def _labels(self, i: int) -> list[int]:
        s, where = self.subject_of(i), self.scene_of(i)
        values = [
            s.category, s.color, where.background, s.pattern, "" if s.pattern == "plain" else s.second_color, s.accessory,
        ]  # fmt: skip
        return [names.index(v) if v else -100 for names, v in zip(ATTRIBUTES.values(), values, strict=True)]


# ------------------------------------------------------------------------------------------- image and text encoders


def build_clip(width: int, layers: int, patch: int, projection: int, tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP with small towers."""
    tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": width // 32}
    text = tower | {
        "vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH, "projection_dim": projection,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = tower | {"image_size": world.SIZE, "patch_size": patch, "projection_dim": projection}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
    return AutoModel.from_config(config, attn_implementation="eager")


def render_once(path: Path, count: int, render: Callable[[int], Image.Image], channels: int, report: TrainingProgressCallback) -> None:
    """Images as one array on disk, (count, size, size, channels); a finished file is left alone."""
    if path.exists():
        return
    with atomic_path(path) as partial:
        shape = (count, world.SIZE, world.SIZE, channels)
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        for i in range(count):
            array[i] = np.asarray(render(i)).reshape(shape[1:])
            if i % 1000 == 0:
                report(i, count, 0.0)
        array.flush()


class CLIPTraining(nn.Module):
    """CLIP's contrastive loss, with identical captions as soft positives, and attribute heads on the image side.

    The heads are dropped afterwards. With them the towers learn in minutes what takes hours from captions alone.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, pool: ImagePool, name: str, batch: int):
        super().__init__()
        self.model, self.tokenizer, self.pool, self.name, self.batch = model, tokenizer, pool, name, batch
        self.heads = nn.Linear(model.config.projection_dim, sum(map(len, ATTRIBUTES.values())))

    def compute_loss(self, step: int) -> Tensor:
        device = self.heads.weight.device
        rows = torch.randint(self.pool.count, (self.batch,), generator=make_step_generator(self.name, step))
        rng = random.Random(f"{self.name} {step}")
        texts = [sample_pool_caption(self.pool, int(i), rng, scene_caption_prob=0.1) for i in rows]
        tokens = tokenize_prompts(self.tokenizer, texts).to(device)
        out = self.model(input_ids=tokens, pixel_values=self.pool.load_images(rows).to(device))
        same = torch.tensor([[a == b for b in texts] for a in texts], device=device).float()
        target = same / same.sum(1, keepdim=True)
        logits = out.logits_per_image.float()
        contrast = -(target * logits.log_softmax(1) + target.T * logits.log_softmax(0)).sum(1).mean() / 2
        return contrast + compute_attribute_loss(self.heads(10 * out.image_embeds).float(), self.pool.labels[rows].to(device))


def compute_attribute_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the attributes, with larger weights for those that are learned slowly.

    logits: (images, all values); labels: (images, attributes). Returns a scalar.
    """
    parts = logits.split([len(values) for values in ATTRIBUTES.values()], dim=1)
    weights = [ATTRIBUTE_WEIGHTS.get(name, 1.0) for name in ATTRIBUTES]
    losses = [w * F.cross_entropy(part, labels[:, i], ignore_index=-100) for i, (w, part) in enumerate(zip(weights, parts, strict=True))]
    return torch.stack(losses).sum()


def sample_pool_caption(pool: ImagePool, i: int, rng: random.Random, scene_caption_prob: float) -> str:
    s, where = pool.subject_of(i), pool.scene_of(i)
    if rng.random() < scene_caption_prob:
        return world.sample_scene_caption(s, where, rng)
    return world.sample_caption(s, where, rng)


# --------------------------------------------------------------------------------------------------------------- VAE


def build_vae() -> AutoencoderKL:
    """An untrained VAE with f = 4 and four latent channels."""
    widths = (16, 32, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


class VAETraining(nn.Module):
    """Objective of the VAE: errors of brightness and of two color differences, at three sizes."""

    def __init__(self, model: AutoencoderKL, pool: ImagePool, batch: int):
        super().__init__()
        self.model, self.pool, self.batch = model, pool, batch

    def compute_loss(self, step: int) -> Tensor:
        device = next(self.model.parameters()).device
        rows = torch.randint(self.pool.count, (self.batch,), generator=make_step_generator("vae", step))
        x = self.pool.load_images(rows).to(device)
        posterior = self.model.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=make_step_generator("vae noise", step)).to(device)
        y = self.model.decode(posterior.mean + posterior.std * noise).sample
        a, b = _to_opponent_colors(x), _to_opponent_colors(y.float())
        pooled = sum(k * F.l1_loss(F.avg_pool2d(b, n), F.avg_pool2d(a, n)) for n, k in ((2, 1), (4, 2)))
        return F.l1_loss(b, a) + 2 * F.mse_loss(b, a) + pooled + 1e-4 * posterior.kl().float().mean() / 1024


def _to_opponent_colors(x: Tensor) -> Tensor:
    """RGB → [mean, R − G, G − B]: color differences matter more to perception than to a plain L1."""
    r, g, b = x.unbind(1)
    return torch.stack([(r + g + b) / 3, r - g, g - b], 1)


@torch.no_grad()
def normalize_latents(model: AutoencoderKL, pool: ImagePool, count: int = 4096) -> None:
    """Fold the latents' mean and standard deviation into the 1×1 convolutions around them: scaling_factor stays 1."""
    rows = torch.arange(0, min(count, pool.count))
    means = torch.cat([model.encode(pool.load_images(r)).latent_dist.mean for r in rows.split(256)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    quant, post = model.quant_conv, model.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
    quant.weight[:4] /= std[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / std
    quant.weight[4:] *= 1  # log-variances: same scale change, as an offset
    quant.bias[4:] -= 2 * std.log()


# -------------------------------------------------------------------------------------------------------------- judge


def build_attribute_classifier() -> ResNetForImageClassification:
    """A ResNet with one logit per value of every attribute, named `attribute:value`."""
    names = [f"{attribute}:{value}" for attribute, values in ATTRIBUTES.items() for value in values]
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 192], depths=[2, 2, 2, 2], layer_type="basic",
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    return ResNetForImageClassification(config)


class AttributeTraining(nn.Module):
    def __init__(self, model: ResNetForImageClassification, pool: ImagePool, batch: int):
        super().__init__()
        self.model, self.pool, self.batch = model, pool, batch

    def compute_loss(self, step: int) -> Tensor:
        device = next(self.model.parameters()).device
        rows = torch.randint(self.pool.count, (self.batch,), generator=make_step_generator("judge", step))
        x = self.pool.load_images(rows).to(device)
        x = x + 0.1 * torch.rand(1, generator=make_step_generator("noise", step)).item() * torch.randn_like(x)
        return compute_attribute_loss(self.model(pixel_values=x).logits.float(), self.pool.labels[rows].to(device))


# --------------------------------------------------------------------------------------------------------------- UNet


class LatentPool:
    """The VAE's posterior means of a pool, (count, 4, 16, 16), encoded once."""

    def __init__(self, folder: Path, pool: ImagePool):
        self.path, self.pool = folder / f"latents-{pool.count}.npy", pool

    @torch.no_grad()
    def encode_all(self, vae: AutoencoderKL, report: TrainingProgressCallback, batch: int = 250) -> None:
        """Encode the whole pool; a finished file is left alone."""
        if self.path.exists():
            return
        side = world.SIZE // 4
        with atomic_path(self.path) as partial:
            array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=(self.pool.count, 4, side, side))
            for rows in torch.arange(self.pool.count).split(batch):
                array[rows[0] : rows[-1] + 1] = vae.encode(self.pool.load_images(rows)).latent_dist.mean.half().numpy()
                report(int(rows[-1]) + 1, self.pool.count, 0.0)
            array.flush()

    @cached_property
    def values(self) -> Tensor:
        return torch.from_numpy(np.load(self.path, mmap_mode="r+"))


def build_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR and trailing steps: the first step is pure noise, as in training."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, steps_offset=1,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip


def build_unet(cross_attention_dim: int = 128) -> UNet2DConditionModel:
    """An untrained UNet of Stable Diffusion's shape, with cross-attention at 8×8 and 4×4."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(96, 128, 192),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


class NoisedBatch(NamedTuple):
    """A training batch: indices of the images, noised latents, timesteps, and the v targets."""

    rows: Tensor
    x: Tensor
    t: Tensor
    target: Tensor


def sample_noised_batch(latents: LatentPool, schedule: DDIMScheduler, batch: int, g: torch.Generator, device: torch.device) -> NoisedBatch:
    """Sample images, noise and timesteps.

    Four timesteps in five are logit-normal (arXiv:2403.03206, section 3.1): shape and pattern are decided in the middle of the
    noise schedule, and both ends are learned within minutes.
    """
    rows = torch.randint(latents.pool.count, (batch,), generator=g)
    x = latents.values[rows].float().to(device)
    noise = torch.randn(x.shape, generator=g).to(device)
    even = (torch.arange(batch) + torch.rand(batch, generator=g)) / batch
    middle = logit_normal_quantile(even, eps=1e-4)
    t = (1000 * torch.where(torch.rand(batch, generator=g) < 0.2, even, middle)).long().clamp(max=999).to(device)
    return NoisedBatch(rows, schedule.add_noise(x, noise, t), t, schedule.get_velocity(x, noise, t))


class UNetTraining(nn.Module):
    """L = E‖v − v_θ(x_t, c, t)‖²; the text is dropped with probability 0.1."""

    def __init__(self, model: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer, latents: LatentPool, batch: int):
        super().__init__()
        self.model = model
        model.set_attn_processor(AttnProcessor())
        self.latents, self.pool, self.tokenizer, self.batch = latents, latents.pool, tokenizer, batch
        self._frozen = [text.eval().requires_grad_(False)]  # in a list: neither trained nor saved
        self.schedule = build_scheduler()

    def compute_loss(self, step: int) -> Tensor:
        device = self.model.device
        rows, x, t, target = sample_noised_batch(self.latents, self.schedule, self.batch, make_step_generator("unet", step), device)
        rng = random.Random(f"unet {step}")
        texts = ["" if rng.random() < 0.1 else sample_pool_caption(self.pool, int(i), rng, scene_caption_prob=0.15) for i in rows]
        with torch.no_grad():
            states = self._frozen[0](tokenize_prompts(self.tokenizer, texts).to(device)).last_hidden_state
        return F.mse_loss(self.model(x, t, states).sample.float(), target)


# --------------------------------------------------------------------------------------------------------- all of it

CONTROL_PARTS = {
    "edges": "controlnet_edges",
    "silhouette": "t2i_silhouette",
    "judge-silhouette": "judge_silhouette",
}  # part → folder of the model
ADAPTER_PARTS = tuple(Path(file).stem for file in BUNDLED_ADAPTERS.values())  # each is a part, and a file in configs/

PLANS = {
    "clip": TrainPlan("clip", 9_500, 96, 7e-4),
    "judge-clip": TrainPlan("judge-clip", 6_000, 128, 1e-3),
    "judge": TrainPlan("judge", 6_000, 64, 1.5e-3),
    "identity": TrainPlan("identity", 1_500, 128, 2e-3),
    "vae": TrainPlan("vae", 15_000, 8, 1.5e-3, warmup_steps=300),
    "unet": TrainPlan("unet", 5_000, 48, 2e-3, warmup_steps=200, ema_decay=0.999, muon_lr=3e-3),
}
NUM_TRAIN_IMAGES, NUM_CLASSIFIER_IMAGES, NUM_IDENTITY_IMAGES = 160_000, 80_000, 48_000
NUM_DISTRIBUTION_IMAGES = 20_000  # whose features separate references of this world from any other


def scale_count(count: int, budget: float) -> int:
    """The number of images in a pool at a share of the full budget: at least 64."""
    return max(64, round(count * min(1.0, budget)))


def fit_feature_distribution(encoder: ImageEncoder, count: int) -> FeatureDistribution:
    """The distribution of the encoder's features over the first training images; its threshold from a quarter as many held-out ones."""
    subjects = list(itertools.islice(world.iterate_subjects(), -(-count // IMAGES_PER_SUBJECT)))
    train = (world.render(subjects[i // IMAGES_PER_SUBJECT], world.make_scene(i)) for i in range(count))
    held_out = (sample.image for sample in make_held_out_samples(max(100, count // 4)))
    return FeatureDistribution.fit(*(_features_of(encoder, images) for images in (train, held_out)))


def _features_of(encoder: ImageEncoder, images: Iterable[Image.Image]) -> Tensor:
    remaining, batches = iter(images), list[Tensor]()
    while batch := list(itertools.islice(remaining, 256)):
        batches.append(distribution_features(encoder, encoder.preprocess(batch)))
    return torch.cat(batches)


class MiniBuild:
    """A build of mini in a work folder: every part is trained once, resumed where it was interrupted, stored in `parts/`."""

    def __init__(self, folder: Path, on_progress: Callable[[str, int, int, float], None], budget: float = 1.0):
        self.folder, self.on_progress, self.budget = folder, on_progress, budget
        self.parts = folder / "parts"
        self.tokenizer = build_tokenizer()
        self.pool = ImagePool(folder, scale_count(NUM_TRAIN_IMAGES, budget))
        self.classifier_pool = ImagePool(folder, scale_count(NUM_CLASSIFIER_IMAGES, budget), "judge")
        self.identity_pool = ImagePool(folder, scale_count(NUM_IDENTITY_IMAGES, budget), "identity")
        self.latents = LatentPool(folder, self.pool)

    def train_parts(self, only: Sequence[str] = tuple(PLANS)) -> None:
        """Train the missing parts in order, each after its training images are rendered."""
        trainers: dict[str, tuple[ImagePool, Callable[[], None]]] = {
            "clip": (self.pool, lambda: self._train_clip("clip", build_clip(128, 4, 8, 128, self.tokenizer), self.pool)),
            "judge-clip": (
                self.classifier_pool,
                lambda: self._train_clip("judge-clip", build_clip(96, 3, 16, 96, self.tokenizer), self.classifier_pool),
            ),
            "judge": (self.classifier_pool, self._train_attribute_classifier),
            "identity": (self.identity_pool, self._train_identity_encoder),
            "vae": (self.pool, self._train_vae),
            "unet": (self.pool, self._train_unet),
        }
        for name, (pool, train) in trainers.items():
            if name in only and not (self.parts / name).exists():
                pool.render_all(lambda done, total, _: self.on_progress("rendering", done, total, 0.0))
                torch.manual_seed(zlib.crc32(name.encode()))
                train()

    def _train(self, name: str, module: nn.Module) -> None:
        plan = PLANS[name].scale_steps(self.budget)
        train_module(plan, module, module.compute_loss, self.folder, lambda done, total, loss: self.on_progress(name, done, total, loss))  # type: ignore[arg-type]

    def _save_part(self, name: str, save: Callable[[Path], object]) -> None:
        """Save a finished part, whole or not at all."""
        partial = self.parts / f".{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save(partial)
        partial.replace(self.parts / name)

    def _train_clip(self, name: str, model: CLIPModel, pool: ImagePool) -> None:
        module = CLIPTraining(model, self.tokenizer, pool, name, PLANS[name].batch_size)
        self._train(name, module)
        self._save_part(name, module.model.save_pretrained)

    def _train_attribute_classifier(self) -> None:
        module = AttributeTraining(build_attribute_classifier(), self.classifier_pool, PLANS["judge"].batch_size)
        self._train("judge", module)
        self._save_part("judge", module.model.save_pretrained)

    def _train_identity_encoder(self) -> None:
        module = identity.IdentityTraining(
            identity.build_identity_encoder(), self.identity_pool, IMAGES_PER_SUBJECT, PLANS["identity"].batch_size
        )
        self._train("identity", module)
        self._save_part("identity", module.model.save_pretrained)

    def _train_vae(self) -> None:
        module = VAETraining(build_vae(), self.pool, PLANS["vae"].batch_size)
        self._train("vae", module)
        normalize_latents(module.model, self.pool)
        self._save_part("vae", module.model.save_pretrained)

    def load_text_encoder(self) -> CLIPTextModel:
        return CLIPTextModel.from_pretrained(self.parts / "clip", attn_implementation="eager")

    def load_image_encoder(self) -> ImageEncoder:
        model = CLIPVisionModelWithProjection.from_pretrained(self.parts / "clip", attn_implementation="eager")
        return ImageEncoder(model, build_image_processor())

    def _encode_latents(self) -> None:
        vae = AutoencoderKL.from_pretrained(self.parts / "vae")
        self.latents.encode_all(vae, lambda done, total, _: self.on_progress("latents", done, total, 0.0))

    def _train_unet(self) -> None:
        self._encode_latents()
        module = UNetTraining(build_unet(), self.load_text_encoder(), self.tokenizer, self.latents, PLANS["unet"].batch_size)
        self._train("unet", module)
        self._save_part("unet", module.model.save_pretrained)

    def add_control_models(self, model: Path) -> None:
        """Copy the existing CONTROL_PARTS into a model's folder, replacing older ones."""
        for name, place in CONTROL_PARTS.items():
            if (self.parts / name).exists():
                shutil.rmtree(model / place, ignore_errors=True)
                shutil.copytree(self.parts / name, model / place)

    def assemble_model(self, target: Path) -> None:
        """Write the model: a Stable Diffusion folder in half precision, with the evaluation models and the existing adapters."""
        half = {"torch_dtype": torch.float16}
        base = UNet2DConditionModel.from_pretrained(self.parts / "unet", **half)
        base.set_default_attn_processor()
        pipe = StableDiffusionPipeline(
            unet=base,
            vae=AutoencoderKL.from_pretrained(self.parts / "vae", **half),
            text_encoder=self.load_text_encoder().half(),
            tokenizer=self.tokenizer,
            scheduler=build_scheduler(),
            image_encoder=self.load_image_encoder().model.half(),
            feature_extractor=build_image_processor(),
            safety_checker=None,
            requires_safety_checker=False,
        )
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            fresh = Path(temporary) / target.name
            pipe.save_pretrained(fresh)
            save_tokenizer(self.tokenizer, fresh / "tokenizer")
            index = fresh / "model_index.json"  # without torchvision transformers writes …Pil, a name that other versions do not have
            index.write_text(index.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))
            build_image_processor().save_pretrained(fresh / "image_encoder")
            fit_feature_distribution(ImageEncoder.load(fresh / "image_encoder"), scale_count(NUM_DISTRIBUTION_IMAGES, self.budget)).save(
                fresh / "image_encoder"
            )
            for name in ADAPTER_PARTS:
                if (self.parts / name).exists():
                    shutil.copy(self.parts / name / "adapter.safetensors", fresh / f"{name}.safetensors")
            self.add_control_models(fresh)
            for name in ("judge", "identity"):
                if (self.parts / name).exists():
                    ResNetForImageClassification.from_pretrained(self.parts / name).half().save_pretrained(fresh / name)
            if (self.parts / "judge-clip").exists():
                CLIPModel.from_pretrained(self.parts / "judge-clip").half().save_pretrained(fresh / "judge_clip")
                save_tokenizer(self.tokenizer, fresh / "judge_clip")
                build_image_processor().save_pretrained(fresh / "judge_clip")
            for name in ("text_encoder", "image_encoder", "judge", "identity", "judge_clip"):
                _mark_as_float32(fresh / name / "config.json")
            shutil.rmtree(target, ignore_errors=True)
            fresh.replace(target)


def _mark_as_float32(config: Path) -> None:
    """Stored in half precision, loaded in float32: transformers would otherwise follow the file, diffusers would not."""
    if config.exists():
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def build_image_processor() -> CLIPImageProcessor:
    """Pixels in −1 … 1, as in the training of every part of mini."""
    side = {"height": world.SIZE, "width": world.SIZE}
    return CLIPImageProcessor(size={"shortest_edge": world.SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
