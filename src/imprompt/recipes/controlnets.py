"""Mini's companions for structure: a ControlNet that reads edges and a T2I-Adapter that reads silhouettes, trained as the real ones are.

The base is frozen; the world draws what they read. arXiv:2302.05543 and arXiv:2302.08453. Beside them a judge that finds the
silhouette in any picture, on subjects of its own.
"""

import random
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionPipeline, T2IAdapter, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from imprompt.mini import world
from imprompt.mini.tokenizer import tokenise
from imprompt.recipes.mini_models import Latents, Pool, Report, drawn_once, noised, sample_caption, scheduler
from imprompt.recipes.trainer import Plan, fit, generator
from imprompt.unet.mkldnn import order

JUDGE = "judge-silhouette"
PLANS = {
    "edges": Plan("edges", 900, 32, 5e-4, warmup=50, ema=0.99, muon=1e-3),
    "silhouette": Plan("silhouette", 900, 32, 1e-3, warmup=50, ema=0.99, muon=2e-3),
    JUDGE: Plan(JUDGE, 700, 32, 3e-3, warmup=50),
}
PICTURES = 24_000


class Drawings:
    """What a companion reads of each picture of a pool, drawn once: (count, size, size, 1), uint8."""

    def __init__(self, folder: Path, pool: Pool, kind: str):
        self.path, self.pool = folder / f"{kind}-of-{pool.path.name}", pool
        self._drawn = {"edges": world.edges, "silhouette": world.silhouette}[kind]

    def draw(self, report: Report) -> None:
        """Draw all; a finished file is left alone."""
        drawn_once(self.path, self.pool.count, lambda i: self._drawn(self.pool.subject(i), self.pool.scene(i)), 1, report)

    @cached_property
    def _values(self) -> Tensor:
        return torch.from_numpy(np.load(self.path, mmap_mode="r+"))

    def rows(self, rows: Tensor, channels: int) -> Tensor:
        """(rows, channels, size, size) in 0 … 1."""
        return self._values[rows].permute(0, 3, 1, 2).float().div(255).expand(-1, channels, -1, -1)


class Steered(nn.Module):
    """L = E‖v − v_θ(x_t, c, structure, t)‖²; only the companion is trained. The text is dropped in three pictures of ten, so
    that it goes with image prompts.
    """

    def __init__(self, model: Any, pipe: StableDiffusionPipeline, latents: Latents, drawings: Drawings, plan: Plan):
        super().__init__()
        self.model = model
        pipe.unet.set_attn_processor(AttnProcessor())
        self._frozen = [pipe.unet.eval().requires_grad_(False), pipe.text_encoder.eval().requires_grad_(False)]  # neither trained nor saved
        self.latents, self.drawings, self.tokenizer, self.plan = latents, drawings, pipe.tokenizer, plan
        self.schedule = scheduler()

    def loss(self, step: int) -> Tensor:
        unet, text = self._frozen
        rows, x, t, target = noised(self.latents, self.schedule, self.plan.batch, generator(self.plan.name, step), self.model.device)
        rng = random.Random(f"{self.plan.name} {step}")
        texts = ["" if rng.random() < 0.3 else sample_caption(self.latents.pool, int(i), rng, photographic=0.15) for i in rows]
        with torch.no_grad():
            states = text(tokenise(self.tokenizer, texts).to(self.model.device)).last_hidden_state
        return F.mse_loss(unet(x, t, states, **self.residuals(x, t, states, rows)).sample.float(), target)

    def residuals(self, x: Tensor, t: Tensor, states: Tensor, rows: Tensor) -> dict[str, Any]:
        """What the UNet is given."""
        if isinstance(self.model, ControlNetModel):
            shown = self.drawings.rows(rows, 3).to(x)
            down, mid = self.model(x, t, encoder_hidden_states=states, controlnet_cond=shown, return_dict=False)
            return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return {"down_intrablock_additional_residuals": list(self.model(self.drawings.rows(rows, 1).to(x)))}


class Finding(nn.Module):
    """Silhouettes found in pictures: cross-entropy for every pixel."""

    def __init__(self, model: UNet2DModel, drawings: Drawings, plan: Plan):
        super().__init__()
        self.model, self.drawings, self.plan = model, drawings, plan

    def loss(self, step: int) -> Tensor:
        pool = self.drawings.pool
        rows = torch.randint(pool.count, (self.plan.batch,), generator=generator(self.plan.name, step))
        shown = pool.images(rows)
        found = self.model(shown.to(self.model.device), 0).sample
        return F.binary_cross_entropy_with_logits(found, self.drawings.rows(rows, 1).to(found))


def silhouette_finder() -> UNet2DModel:
    """Picture → one logit for each pixel."""
    return UNet2DModel(
        sample_size=world.SIZE, in_channels=3, out_channels=1, block_out_channels=(16, 32, 48), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, add_attention=False,
    )  # fmt: skip


def untrained(kind: str, pipe: StableDiffusionPipeline) -> Any:
    """A companion for this base: a ControlNet starts as a copy of the UNet's first half."""
    if kind == "edges":
        return ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 96))  # 64 pixels are 16 of the latents
    *channels, last = pipe.unet.config.block_out_channels
    # As SDXL's: a first block without attention passes on half the side, and the middle is told too.
    return T2IAdapter(1, [*channels, last, last], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter_xl")


def make_structure(kind: str, model: Path, folder: Path, report: Callable[[str, int, int, float], None], budget: float) -> Path:
    """Train a companion for the mini in `model`, or the judge, in `folder` (resumable), and save it as `folder/KIND`, as diffusers
    keeps such models.
    """
    pool = Pool(folder, max(256, round(PICTURES * min(1.0, budget))), "judge" if kind == JUDGE else "train")
    pool.draw(lambda done, total, _: report("drawing", done, total, 0.0))
    drawings = Drawings(folder, pool, "edges" if kind == "edges" else "silhouette")
    drawings.draw(lambda done, total, _: report(kind, done, total, 0.0))
    plan = PLANS[kind].scaled(budget)
    torch.manual_seed(0)
    if kind == JUDGE:
        module: Finding | Steered = Finding(silhouette_finder(), drawings, plan)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, requires_safety_checker=False)
        latents = Latents(folder, pool)
        latents.encode(pipe.vae, lambda done, total, _: report("latents", done, total, 0.0))
        order(pipe.unet)
        module = Steered(untrained(kind, pipe), pipe, latents, drawings, plan)
    fit(plan, module, module.loss, folder, lambda done, total, loss: report(kind, done, total, loss), heard_from=4)
    module.model.to(dtype=torch.float16).save_pretrained(folder / kind)
    return folder / kind
