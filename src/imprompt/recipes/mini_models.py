"""How mini is made, from nothing: one function per part, in the order in which they need each other.

Every part is a Hugging Face class of its real kind and is saved in the folder form that
`StableDiffusionPipeline.from_pretrained` expects. The attribute judge, the second image-text encoder and the identity
encoder are never seen by anything that is trained afterwards: they only evaluate.
"""

import itertools
import json
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
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
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    ResNetConfig,
    ResNetForImageClassification,
)

from imprompt.mini import world
from imprompt.mini.tokenizer import LENGTH, make_tokenizer, save_tokenizer, tokenise
from imprompt.models.hub import EMBEDDED
from imprompt.models.image_encoders import ImageEncoder
from imprompt.recipes import identity
from imprompt.recipes.trainer import Plan, fit, generator
from imprompt.utils.files import atomic_path

Report = Callable[[int, int, float], None]

# Attributes with a classification head, and their values.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": world.KINDS,
    "colour": world.COLOURS,
    "background": world.BACKGROUNDS,
    "pattern": world.PATTERNS,
    "second_colour": tuple(world.PALETTE),
    "accessory": world.ACCESSORIES,
}
ATTRIBUTE_WEIGHTS = {"pattern": 3.0, "kind": 2.0}
PHOTOS_PER_SUBJECT = 4
_JUDGE_SEEDS = 5_000_000  # no training picture and no prompt has a seed from here on; identity.SEEDS begin later


class Pool:
    """Pictures drawn once and kept as one array on disk: photograph i shows subject i // 4.

    "train" leaves out the held-out combinations. "judge" and "identity" are for what only evaluates: all combinations, subjects
    of their own.
    """

    def __init__(self, folder: Path, count: int, name: str = "train"):
        self.path = folder / f"{name}-{count}.npy"
        self.count = count
        draws, first_scene = {
            "train": (world.subjects(), 0),
            "judge": (map(world.subject, itertools.count(_JUDGE_SEEDS)), _JUDGE_SEEDS),
            "identity": (identity.look_alikes(), identity.SEEDS),
        }[name]
        self._subjects = list(itertools.islice(draws, -(-count // PHOTOS_PER_SUBJECT)))
        self._scenes = [world.scene(first_scene + i) for i in range(count)]

    def subject(self, i: int) -> world.Subject:
        return self._subjects[i // PHOTOS_PER_SUBJECT]

    def scene(self, i: int) -> world.Scene:
        return self._scenes[i]

    def picture(self, i: int) -> Image.Image:
        """Draw photograph i."""
        return world.draw(self.subject(i), self.scene(i))

    def draw(self, report: Report) -> None:
        """Draw all pictures; a finished file is left alone."""
        drawn_once(self.path, self.count, self.picture, 3, report)

    @cached_property
    def pixels(self) -> Tensor:
        """(count, size, size, 3), uint8, read from disk as needed."""
        return torch.from_numpy(np.load(self.path, mmap_mode="r+"))

    def images(self, rows: Tensor) -> Tensor:
        """(rows, 3, size, size) in −1 … 1."""
        return self.pixels[rows].permute(0, 3, 1, 2).float() / 127.5 - 1

    @cached_property
    def labels(self) -> Tensor:
        """(count, attributes): the index of each attribute's value; −100 where it does not show."""
        return torch.tensor([self._labels(i) for i in range(self.count)])

    def _labels(self, i: int) -> list[int]:
        s, where = self.subject(i), self.scene(i)
        values = [
            s.kind, s.colour, where.background, s.pattern, "" if s.pattern == "plain" else s.second_colour, s.accessory,
        ]  # fmt: skip
        return [names.index(v) if v else -100 for names, v in zip(ATTRIBUTES.values(), values, strict=True)]


# ------------------------------------------------------------------------------------------- image and text encoders


def clip(width: int, layers: int, patch: int, projection: int, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP with its own small towers, untrained."""
    tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": width // 32}
    text = tower | {
        "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "projection_dim": projection,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = tower | {"image_size": world.SIZE, "patch_size": patch, "projection_dim": projection}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
    return CLIPModel._from_config(config, attn_implementation="eager")


def drawn_once(path: Path, count: int, picture: Callable[[int], Image.Image], channels: int, report: Report) -> None:
    """Pictures as one array on disk, (count, size, size, channels); a finished file is left alone."""
    if path.exists():
        return
    with atomic_path(path) as partial:
        shape = (count, world.SIZE, world.SIZE, channels)
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        for i in range(count):
            array[i] = np.asarray(picture(i)).reshape(shape[1:])
            if i % 1000 == 0:
                report(i, count, 0.0)
        array.flush()


class Contrast(nn.Module):
    """CLIP's contrastive objective, with identical captions as soft positives, and attribute heads on the image side.

    The heads are thrown away afterwards. They make the towers learn in minutes what captions alone teach in hours.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, pool: Pool, name: str, batch: int):
        super().__init__()
        self.model, self.tokenizer, self.pool, self.name, self.batch = model, tokenizer, pool, name, batch
        self.heads = nn.Linear(model.config.projection_dim, sum(map(len, ATTRIBUTES.values())))

    def loss(self, step: int) -> Tensor:
        device = self.heads.weight.device
        rows = torch.randint(self.pool.count, (self.batch,), generator=generator(self.name, step))
        rng = random.Random(f"{self.name} {step}")
        texts = [sample_caption(self.pool, int(i), rng, photographic=0.1) for i in rows]
        tokens = tokenise(self.tokenizer, texts).to(device)
        out = self.model(input_ids=tokens, pixel_values=self.pool.images(rows).to(device))
        same = torch.tensor([[a == b for b in texts] for a in texts], device=device).float()
        target = same / same.sum(1, keepdim=True)
        logits = out.logits_per_image.float()
        contrast = -(target * logits.log_softmax(1) + target.T * logits.log_softmax(0)).sum(1).mean() / 2
        return contrast + attribute_loss(self.heads(10 * out.image_embeds).float(), self.pool.labels[rows].to(device))


def attribute_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the attributes, the slow ones weighted up. logits: (rows, all values); labels: (rows, attributes)."""
    parts = logits.split([len(values) for values in ATTRIBUTES.values()], dim=1)
    weights = [ATTRIBUTE_WEIGHTS.get(name, 1.0) for name in ATTRIBUTES]
    losses = [w * F.cross_entropy(part, labels[:, i], ignore_index=-100) for i, (w, part) in enumerate(zip(weights, parts, strict=True))]
    return torch.stack(losses).sum()


def sample_caption(pool: Pool, i: int, rng: random.Random, photographic: float) -> str:
    s, where = pool.subject(i), pool.scene(i)
    if rng.random() < photographic:
        return world.photo_caption(s, where, rng)
    return world.caption(s, where, rng)


# --------------------------------------------------------------------------------------------------------------- VAE


def autoencoder() -> AutoencoderKL:
    """f = 4, four latent channels."""
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


class Reconstruction(nn.Module):
    """What the VAE minimises: errors of brightness and of two colour differences, at three sizes."""

    def __init__(self, model: AutoencoderKL, pool: Pool, batch: int):
        super().__init__()
        self.model, self.pool, self.batch = model, pool, batch

    def loss(self, step: int) -> Tensor:
        device = next(self.model.parameters()).device
        rows = torch.randint(self.pool.count, (self.batch,), generator=generator("vae", step))
        x = self.pool.images(rows).to(device)
        posterior = self.model.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator("vae noise", step)).to(device)
        y = self.model.decode(posterior.mean + posterior.std * noise).sample
        a, b = _opponent(x), _opponent(y.float())
        pooled = sum(k * F.l1_loss(F.avg_pool2d(b, n), F.avg_pool2d(a, n)) for n, k in ((2, 1), (4, 2)))
        return F.l1_loss(b, a) + 2 * F.mse_loss(b, a) + pooled + 1e-4 * posterior.kl().float().mean() / 1024


def _opponent(x: Tensor) -> Tensor:
    """RGB → [mean, R − G, G − B]: eyes and judges see colour differences, a plain L1 does not care for them."""
    r, g, b = x.unbind(1)
    return torch.stack([(r + g + b) / 3, r - g, g - b], 1)


@torch.no_grad()
def normalise_latents(model: AutoencoderKL, pool: Pool, count: int = 4096) -> None:
    """Fold the latents' mean and standard deviation into the 1×1 convolutions around them: scaling_factor stays 1."""
    rows = torch.arange(0, min(count, pool.count))
    means = torch.cat([model.encode(pool.images(r)).latent_dist.mean for r in rows.split(256)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    quant, post = model.quant_conv, model.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
    quant.weight[:4] /= std[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / std
    quant.weight[4:] *= 1  # log-variances: same scale change, as an offset
    quant.bias[4:] -= 2 * std.log()


# -------------------------------------------------------------------------------------------------------------- judge


def judge() -> ResNetForImageClassification:
    """A ResNet with one logit per value of every attribute, named `attribute:value`."""
    names = [f"{attribute}:{value}" for attribute, values in ATTRIBUTES.items() for value in values]
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 192], depths=[2, 2, 2, 2], layer_type="basic",
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    return ResNetForImageClassification(config)


class Judging(nn.Module):
    def __init__(self, model: ResNetForImageClassification, pool: Pool, batch: int):
        super().__init__()
        self.model, self.pool, self.batch = model, pool, batch

    def loss(self, step: int) -> Tensor:
        device = next(self.model.parameters()).device
        rows = torch.randint(self.pool.count, (self.batch,), generator=generator("judge", step))
        x = self.pool.images(rows).to(device)
        x = x + 0.1 * torch.rand(1, generator=generator("noise", step)).item() * torch.randn_like(x)
        return attribute_loss(self.model(pixel_values=x).logits.float(), self.pool.labels[rows].to(device))


# --------------------------------------------------------------------------------------------------------------- UNet


class Latents:
    """The pool as the VAE sees it: the posterior's mean, (count, 4, 16, 16), encoded once."""

    def __init__(self, folder: Path, pool: Pool):
        self.path, self.pool = folder / f"latents-{pool.count}.npy", pool

    @torch.no_grad()
    def encode(self, vae: AutoencoderKL, report: Report, batch: int = 250) -> None:
        """Encode the whole pool; a finished file is left alone."""
        if self.path.exists():
            return
        side = world.SIZE // 4
        with atomic_path(self.path) as partial:
            array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=(self.pool.count, 4, side, side))
            for rows in torch.arange(self.pool.count).split(batch):
                array[rows[0] : rows[-1] + 1] = vae.encode(self.pool.images(rows)).latent_dist.mean.half().numpy()
                report(int(rows[-1]) + 1, self.pool.count, 0.0)
            array.flush()

    @cached_property
    def values(self) -> Tensor:
        return torch.from_numpy(np.load(self.path, mmap_mode="r+"))


def scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR and trailing steps: the first step sees pure noise, as in training."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, steps_offset=1,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip


def unet(cross: int = 128) -> UNet2DConditionModel:
    """A UNet of Stable Diffusion's shape, cross-attention at 8×8 and 4×4."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(96, 128, 192),
        layers_per_block=1,
        cross_attention_dim=cross,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


class Noised(NamedTuple):
    """A batch of training: which pictures, their latents with noise, the timesteps, and the v that is to be predicted."""

    rows: Tensor
    x: Tensor
    t: Tensor
    target: Tensor


def noised(latents: Latents, schedule: DDIMScheduler, batch: int, g: torch.Generator, device: torch.device) -> Noised:
    """Draw pictures, noise and timesteps.

    Four timesteps in five are logit-normal (arXiv:2403.03206, section 3.1): shape and pattern are decided in the middle of the
    schedule, and both ends are learned within minutes.
    """
    rows = torch.randint(latents.pool.count, (batch,), generator=g)
    x = latents.values[rows].float().to(device)
    noise = torch.randn(x.shape, generator=g).to(device)
    even = (torch.arange(batch) + torch.rand(batch, generator=g)) / batch
    middle = torch.sigmoid(torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4)) - 0.3)
    t = (1000 * torch.where(torch.rand(batch, generator=g) < 0.2, even, middle)).long().clamp(max=999).to(device)
    return Noised(rows, schedule.add_noise(x, noise, t), t, schedule.get_velocity(x, noise, t))


class Denoising(nn.Module):
    """L = E‖v − v_θ(x_t, c, t)‖², the text dropped in one picture of ten."""

    def __init__(self, model: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer, latents: Latents, batch: int):
        super().__init__()
        self.model = model
        model.set_attn_processor(AttnProcessor())
        self.latents, self.pool, self.tokenizer, self.batch = latents, latents.pool, tokenizer, batch
        self._frozen = [text.eval().requires_grad_(False)]  # in a list: not part of what is trained and saved
        self.schedule = scheduler()

    def loss(self, step: int) -> Tensor:
        device = self.model.device
        rows, x, t, target = noised(self.latents, self.schedule, self.batch, generator("unet", step), device)
        rng = random.Random(f"unet {step}")
        texts = ["" if rng.random() < 0.1 else sample_caption(self.pool, int(i), rng, photographic=0.15) for i in rows]
        with torch.no_grad():
            states = self._frozen[0](tokenise(self.tokenizer, texts).to(device)).last_hidden_state
        return F.mse_loss(self.model(x, t, states).sample.float(), target)


# --------------------------------------------------------------------------------------------------------- all of it

STRUCTURE = {
    "edges": "controlnet_edges",
    "silhouette": "t2i_silhouette",
    "judge-silhouette": "judge_silhouette",
}  # part → folder: structure.py
ADAPTERS = tuple(Path(file).stem for file in EMBEDDED.values())  # each is a part, and a file in configs/

PLANS = {
    "clip": Plan("clip", 9_500, 96, 7e-4),
    "judge-clip": Plan("judge-clip", 6_000, 128, 1e-3),
    "judge": Plan("judge", 6_000, 64, 1.5e-3),
    "identity": Plan("identity", 1_500, 128, 2e-3),
    "vae": Plan("vae", 15_000, 8, 1.5e-3, warmup=300),
    "unet": Plan("unet", 5_000, 48, 2e-3, warmup=200, ema=0.999, muon=3e-3),
}
POOL, JUDGE_POOL, IDENTITY_POOL = 160_000, 80_000, 48_000  # pictures


class Build:
    """A build of mini in a work folder: every part is made once, resumed where it was left, kept in `parts/`."""

    def __init__(self, folder: Path, report: Callable[[str, int, int, float], None], budget: float = 1.0):
        self.folder, self.report, self.budget = folder, report, budget
        self.parts = folder / "parts"
        self.tokenizer = make_tokenizer()
        share = min(1.0, budget)
        self.pool = Pool(folder, max(256, round(POOL * share)))
        self.judge_pool = Pool(folder, max(256, round(JUDGE_POOL * share)), "judge")
        self.identity_pool = Pool(folder, max(256, round(IDENTITY_POOL * share)), "identity")
        self.latents = Latents(folder, self.pool)

    def make(self, only: Sequence[str] = tuple(PLANS)) -> None:
        """Make those parts that are missing, in order, each after the pool that it learns from."""
        makers: dict[str, tuple[Pool, Callable[[], None]]] = {
            "clip": (self.pool, lambda: self._clip("clip", clip(128, 4, 8, 128, self.tokenizer), self.pool)),
            "judge-clip": (self.judge_pool, lambda: self._clip("judge-clip", clip(96, 3, 16, 96, self.tokenizer), self.judge_pool)),
            "judge": (self.judge_pool, self._judge),
            "identity": (self.identity_pool, self._identity),
            "vae": (self.pool, self._vae),
            "unet": (self.pool, self._unet),
        }
        for name, (pool, maker) in makers.items():
            if name in only and not (self.parts / name).exists():
                pool.draw(lambda done, total, _: self.report("drawing", done, total, 0.0))
                torch.manual_seed(zlib.crc32(name.encode()))
                maker()

    def _fit(self, name: str, module: nn.Module) -> None:
        plan = PLANS[name].scaled(self.budget)
        fit(plan, module, module.loss, self.folder, lambda done, total, loss: self.report(name, done, total, loss))  # type: ignore[arg-type]

    def _keep(self, name: str, save: Callable[[Path], object]) -> None:
        """Put a finished part in its place, whole or not at all."""
        partial = self.parts / f".{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save(partial)
        partial.replace(self.parts / name)

    def _clip(self, name: str, model: CLIPModel, pool: Pool) -> None:
        module = Contrast(model, self.tokenizer, pool, name, PLANS[name].batch)
        self._fit(name, module)
        self._keep(name, module.model.save_pretrained)

    def _judge(self) -> None:
        module = Judging(judge(), self.judge_pool, PLANS["judge"].batch)
        self._fit("judge", module)
        self._keep("judge", module.model.save_pretrained)

    def _identity(self) -> None:
        module = identity.Telling(identity.encoder(), self.identity_pool, PHOTOS_PER_SUBJECT, PLANS["identity"].batch)
        self._fit("identity", module)
        self._keep("identity", module.model.save_pretrained)

    def _vae(self) -> None:
        module = Reconstruction(autoencoder(), self.pool, PLANS["vae"].batch)
        self._fit("vae", module)
        normalise_latents(module.model, self.pool)
        self._keep("vae", module.model.save_pretrained)

    def text(self) -> CLIPTextModel:
        return CLIPTextModel.from_pretrained(self.parts / "clip", attn_implementation="eager")

    def encoder(self) -> ImageEncoder:
        model = CLIPVisionModelWithProjection.from_pretrained(self.parts / "clip", attn_implementation="eager")
        return ImageEncoder(model, image_processor())

    def _encode(self) -> None:
        vae = AutoencoderKL.from_pretrained(self.parts / "vae")
        self.latents.encode(vae, lambda done, total, _: self.report("latents", done, total, 0.0))

    def _unet(self) -> None:
        self._encode()
        module = Denoising(unet(), self.text(), self.tokenizer, self.latents, PLANS["unet"].batch)
        self._fit("unet", module)
        self._keep("unet", module.model.save_pretrained)

    def add_companions(self, model: Path) -> None:
        """Put the STRUCTURE parts that there are into a model's folder, in place of older ones."""
        for name, place in STRUCTURE.items():
            if (self.parts / name).exists():
                shutil.rmtree(model / place, ignore_errors=True)
                shutil.copytree(self.parts / name, model / place)

    def assemble(self, target: Path) -> None:
        """Write the model: a Stable Diffusion folder in half precision, with what evaluates and the adapters there are."""
        half = {"torch_dtype": torch.float16}
        base = UNet2DConditionModel.from_pretrained(self.parts / "unet", **half)
        base.set_default_attn_processor()
        pipe = StableDiffusionPipeline(
            unet=base,
            vae=AutoencoderKL.from_pretrained(self.parts / "vae", **half),
            text_encoder=self.text().half(),
            tokenizer=self.tokenizer,
            scheduler=scheduler(),
            image_encoder=self.encoder().model.half(),
            feature_extractor=image_processor(),
            safety_checker=None,
            requires_safety_checker=False,
        )
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            fresh = Path(temporary) / target.name
            pipe.save_pretrained(fresh)
            save_tokenizer(self.tokenizer, fresh / "tokenizer")
            index = fresh / "model_index.json"  # without torchvision transformers says Pil, a name that others do not know
            index.write_text(index.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))
            image_processor().save_pretrained(fresh / "image_encoder")
            for name in ADAPTERS:
                if (self.parts / name).exists():
                    shutil.copy(self.parts / name / "adapter.safetensors", fresh / f"{name}.safetensors")
            self.add_companions(fresh)
            for name in ("judge", "identity"):
                if (self.parts / name).exists():
                    ResNetForImageClassification.from_pretrained(self.parts / name).half().save_pretrained(fresh / name)
            if (self.parts / "judge-clip").exists():
                CLIPModel.from_pretrained(self.parts / "judge-clip").half().save_pretrained(fresh / "judge_clip")
                save_tokenizer(self.tokenizer, fresh / "judge_clip")
                image_processor().save_pretrained(fresh / "judge_clip")
            for name in ("text_encoder", "image_encoder", "judge", "identity", "judge_clip"):
                _load_in_float32(fresh / name / "config.json")
            shutil.rmtree(target, ignore_errors=True)
            fresh.replace(target)


def _load_in_float32(config: Path) -> None:
    """Stored in half precision, loaded in single: transformers would otherwise follow the file, diffusers would not."""
    if config.exists():
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def image_processor() -> CLIPImageProcessor:
    """Pixels in −1 … 1, as every part of mini is trained."""
    side = {"height": world.SIZE, "width": world.SIZE}
    return CLIPImageProcessor(size={"shortest_edge": world.SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
