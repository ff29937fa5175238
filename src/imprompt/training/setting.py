"""What a run works with: the base and its frozen parts, the method, the data. Everything that can be wrong is found here."""

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from imprompt import checkpoints, hub
from imprompt.checkpoints import Spec
from imprompt.config import Train
from imprompt.core.adapter import Adapter
from imprompt.core.diffusion import Schedule
from imprompt.data.frame import Example, Framing, example, stack
from imprompt.data.loader import Loader, Skipped
from imprompt.data.readers import Mini, Shards, open_data
from imprompt.data.records import Counted, Record, Records, Without
from imprompt.encoders import ImageEncoder
from imprompt.errors import UserError
from imprompt.files import writable_folder
from imprompt.hosts.unet import check_fit
from imprompt.methods import METHODS, Method
from imprompt.methods.ip_adapter import IPAdapter
from imprompt.pipelines import check_size, load_base, own_size, pick_precision, schedule_of
from imprompt.prompter import Prompter
from imprompt.training.frozen import Encoded, Frozen, Nulls

HELD_OUT_SEED = 7_919  # chooses what is examined


@dataclass
class Setting:
    """The parts of a run."""

    pipe: Any
    encoder: ImageEncoder
    method: Method
    frozen: Frozen
    schedule: Schedule
    loader: Loader[Any]
    skipped: Skipped
    nulls: Nulls
    examined: list[Example]  # never trained on, where the data can be counted
    device: torch.device
    precision: torch.dtype

    @property
    def unet(self) -> Any:
        return self.pipe.unet

    def batches(self) -> Iterator[Encoded]:
        """Encoded batches without end, on the device."""
        for items in self.loader:
            yield self.frozen.encode(stack(items)).to(self.device)


def build(choice: Train, device: torch.device, rank: int = 0, ranks: int = 1) -> Setting:
    """Load and open everything. Raises UserError with the next move for whatever does not fit."""
    out = writable_folder(choice.out)
    records = open_data(choice.data)
    precision = pick_precision(choice.precision, device.type)
    pipe = load_base(choice.base, str(device), precision)
    size = choice.size or own_size(pipe)
    check_size(pipe, size, size)
    given = checkpoints.load_adapter(choice.adapter) if choice.adapter else None
    encoder = find_encoder(choice, given[1] if given else None)
    encoder.model.to(device, precision)
    if choice.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    torch.manual_seed(choice.seed)
    method = tuned(choice, pipe.unet, *given, encoder) if given else METHODS[choice.method](pipe.unet, encoder)
    method.module.to(device).requires_grad_(True)
    frozen = Frozen(pipe, encoder, method.grid)
    skipped = Skipped(choice.max_unreadable, out / f"unreadable-{rank}.tsv")
    if isinstance(records, Shards):
        records.lost = skipped.lost
    multiple = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    framing = Framing(
        size, choice.crop, choice.flip, choice.buckets, multiple, choice.own_crop, choice.augment, choice.references, choice.least
    )
    make = partial(_example, framing=framing, encoder=encoder)
    held, rest = held_out(records, choice.validation)
    loader = Loader(rest, make, choice.batch, choice.seed, rank, ranks, choice.workers, skipped, lambda e: e.shape, Example)  # type: ignore[arg-type]
    schedule = schedule_of(pipe.scheduler).to(device)
    return Setting(pipe, encoder, method, frozen, schedule, loader, skipped, frozen.nulls(), _readable(held, make), device, precision)


def _example(record: Record, seed: int, framing: Framing, encoder: ImageEncoder) -> Example:
    return example(record, seed, framing, encoder.prepare)


def _readable(records: list[Record], make: Any) -> list[Example]:
    found = []
    for seed, record in enumerate(records):
        with suppress(UserError, OSError):
            found.append(make(record, seed))
    return found


def find_encoder(choice: Train, spec: Spec | None) -> ImageEncoder:
    """The image encoder: the one named, the base's own, or the one the adapter was trained with."""
    if choice.encoder:
        return ImageEncoder.load(choice.encoder)
    if choice.base == "mini":
        return ImageEncoder.load(hub.MINI / "image_encoder")
    if spec is not None:
        return ImageEncoder.load(*hub.default_encoder(spec))
    return ImageEncoder.load(*hub.RELEASED_ENCODER)


def tuned(choice: Train, unet: Any, adapter: Adapter, spec: Spec, encoder: ImageEncoder) -> IPAdapter:
    """A method that goes on from an adapter's file. Raises UserError where it does not fit base or encoder."""
    if not choice.method.startswith("ip-adapter"):
        raise UserError(f"method: expected ip-adapter or ip-adapter-plus to go on from a file, received {choice.method!r}")
    Prompter(adapter, spec, encoder)
    check_fit(adapter, unet)
    return IPAdapter(unet, adapter)


def held_out(records: Records, count: int) -> tuple[list[Record], Records]:
    """What is examined and never trained on, and the rest.

    Of shards the first records are examined, and trained on too; so is a very small set.
    """
    if isinstance(records, Mini):
        other = Mini(max(count, 1) * Mini.PHOTOS, held_out=True)
        return [other[i * Mini.PHOTOS] for i in range(count)], records
    if isinstance(records, Counted):
        chosen = random.Random(HELD_OUT_SEED).sample(range(len(records)), min(count, len(records)))
        return [records[i] for i in chosen], records if len(records) < 8 * count else Without(records, chosen)
    return list(islice((r for shard in records.shards for r in records.read(shard)), count)), records
