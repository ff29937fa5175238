"""What a run works with: the base and its frozen parts, the method, the data. Everything that can be wrong is found here."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image

from imprompt.config import PERSONAL, Train
from imprompt.core.adapter import Adapter
from imprompt.core.noise_schedule import Schedule
from imprompt.data.dreambooth import Personal, class_text, subject_text
from imprompt.data.feature_cache import Cache, Row, Siblings, Stored
from imprompt.data.loader import UNREADABLE, Loader, Skipped
from imprompt.data.readers import Mini, Shards, is_mini, open_data
from imprompt.data.records import Counted, Record, Records, Without
from imprompt.data.subjects import Identities, split
from imprompt.data.transforms import Example, Framing, example, stack
from imprompt.errors import UserError
from imprompt.methods import Method, create
from imprompt.methods.inversion import Inversion
from imprompt.methods.ip_adapter import KINDS, IPAdapter
from imprompt.methods.loading import to_train
from imprompt.models.base_pipelines import guidance_of, load_base, pick_precision, schedule_of
from imprompt.models.checkpoints import Spec
from imprompt.models.image_encoders import ImageEncoder
from imprompt.models.image_prompt import Prompter, find_encoder
from imprompt.training.class_images import class_pictures
from imprompt.training.frozen_encoders import Encoded, Frozen, Nulls
from imprompt.training.precompute import check, framing_of
from imprompt.unet.injection import check_fit
from imprompt.utils.files import writable_folder, write_file

HELD_OUT_SEED = 7_919  # chooses what is examined
MOST_PHOTOS = 1_000  # of one subject
PRIOR_STEPS = 30  # of denoising


class Examined(NamedTuple):
    """What is examined again and again, and never trained on where the data can be counted."""

    batches: list[Encoded]  # on the device
    targets: list[Image.Image]
    texts: list[str]


@dataclass
class Setting:
    """The parts of a run."""

    pipe: Any
    encoder: ImageEncoder | None  # none for a method of one subject
    method: Method
    frozen: Frozen
    schedule: Schedule
    loader: Loader[Any]
    encode: Callable[[list[Any]], Encoded]  # what the loader gives → a batch on the device
    skipped: Skipped
    nulls: Nulls
    examined: Examined
    data: str
    device: torch.device
    precision: torch.dtype

    @property
    def unet(self) -> Any:
        return self.pipe.unet

    def batches(self) -> Iterator[Encoded]:
        """Encoded batches without end, on the device."""
        return map(self.encode, self.loader)


@dataclass(frozen=True)
class Source:
    """Records, what a loader makes of each, and how such items become a batch and pictures."""

    records: Records
    make: Callable[[Any, int], Any]
    revive: Callable[..., Any]
    encode: Callable[[list[Any]], Encoded]
    pictures: Callable[[list[Any], Encoded], list[Image.Image]]

    @classmethod
    def fresh(cls, records: Records, framing: Framing, frozen: Frozen) -> "Source":
        """Pictures and texts, encoded at every step."""
        return cls(
            records,
            lambda record, seed: example(record, seed, framing, frozen.encoder.prepare),
            Example,
            lambda items: frozen.encode(stack(items)).to(frozen.device),
            lambda items, _: [Image.fromarray(e.pixels.permute(1, 2, 0).numpy()) for e in items],
        )

    @classmethod
    def cached(cls, cache: Cache, frozen: Frozen, precision: torch.dtype, choice: Train) -> "Source":
        """Rows of a feature cache; their pictures are what the VAE makes of the latents."""

        def make(stored: Stored, seed: int) -> Row:
            return cache.after(stored, seed, choice.references, choice.fewest) if stored.others else cache.row(stored.at, seed)

        return cls(
            cast(Records, Siblings(cache, choice.subjects) if choice.subjects else cache),
            make,
            Row,
            lambda rows: Encoded.of(rows, precision).to(frozen.device),
            lambda _, encoded: frozen.pictures(encoded.mean),
        )

    def examined(self, records: Sequence[Record], batch: int) -> Examined:
        """Those of the records that can be read, in batches of one shape."""
        shapes: dict[Any, list[Any]] = {}
        for seed, record in enumerate(records):
            with suppress(*UNREADABLE):
                item = self.make(record, seed)
                shapes.setdefault(item.shape, []).append(item)
        groups = [group[i : i + batch] for group in shapes.values() for i in range(0, len(group), batch)]
        batches = [self.encode(group) for group in groups]
        targets = [picture for group, encoded in zip(groups, batches, strict=True) for picture in self.pictures(group, encoded)]
        return Examined(batches, targets, [item.text for group in groups for item in group])


def build(choice: Train, device: torch.device, rank: int = 0, ranks: int = 1) -> Setting:
    """Load and open everything. Raises UserError with the next move for whatever does not fit."""
    out = writable_folder(choice.out)
    cache = Cache(choice.cache) if choice.cache else None
    data = cache.about["data"] if cache else choice.data
    opened = open_data(data) if cache is None or is_mini(data) else None  # before anything large is loaded
    if choice.subjects and is_mini(data) and choice.held_out:
        raise UserError("held_out: mini has test subjects of its own, and all that are trained on are others; leave it out")
    if opened is not None and choice.subjects:
        opened = by_subject(opened, choice.subjects)
    precision = pick_precision(choice.precision, device.type)
    pipe = load_base(choice.base, str(device), precision)
    given = to_train(choice.adapter) if choice.adapter else None
    personal = choice.method in PERSONAL
    encoder = None if personal else find_encoder(choice.base, choice.encoder, given[1] if given else None)
    if encoder is not None:
        encoder.model.to(device, precision)  # type: ignore[arg-type]
    if choice.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    else:
        pipe.unet.disable_gradient_checkpointing()
    torch.manual_seed(choice.seed)
    if given and encoder:
        method: Method = tuned(choice, pipe.unet, *given, encoder)
    else:
        method = Inversion(pipe, choice.token) if choice.method == "inversion" else create(choice.method, pipe, encoder)
    if choice.combine != "auto":
        cast(IPAdapter, method).bring_together(choice.combine)
    words = method if isinstance(method, Inversion) else None
    if personal:
        opened = of_one_subject(choice, opened, pipe)
        method.about |= {"noun": choice.noun, "token": choice.token}
    if words:
        words.start(pipe, choice.noun)
    method.module.to(device).requires_grad_(True)
    frozen = Frozen(pipe, method.encoder, method.grid, words)
    framing = framing_of(choice, pipe)
    fresh = Source.fresh(opened, framing, frozen) if opened is not None else None
    if cache is not None:
        check(cache, choice, frozen)
    source = Source.cached(cache, frozen, precision, choice) if cache else cast(Source, fresh)
    shown = fresh or source  # of a cache of mini too: the world has held-out subjects of its own
    held, rest = held_out(shown.records, choice)
    if choice.subjects and rank == 0:
        split_of = split_facts(cast(Identities, source.records), rest if shown is source else source.records, choice)
        same_run(out / "subjects.json", split_of, choice, "the data, --subjects, --held-out and --seed")
    if personal and rank == 0:
        learned = {"noun": choice.noun, "token": choice.token, "photographs": cast(Personal, opened).contents()}
        same_run(out / "subject.json", learned, choice, "the photographs, --noun and --token")
    examined = shown.examined(held, choice.batch)
    skipped = Skipped(choice.max_unreadable, out / f"unreadable-{rank}.tsv")
    records = rest if shown is source else source.records
    if isinstance(opened, Identities) and opened.lost:
        skipped.total += len(opened.records) - len(opened.lost)  # they told whose they are
        for where, why in opened.lost.items():
            skipped.lost(where, why)
    if isinstance(records, Shards):
        records.lost = skipped.lost
    loader: Loader[Any] = Loader(
        records, source.make, choice.batch, choice.seed, rank, ranks, choice.workers, skipped, lambda item: item.shape, source.revive
    )
    schedule, nulls = schedule_of(pipe.scheduler).to(device), frozen.nulls(method.null())
    if cache is not None:
        frozen.park()
    return Setting(pipe, encoder, method, frozen, schedule, loader, source.encode, skipped, nulls, examined, data, device, precision)


def tuned(choice: Train, unet: Any, adapter: Adapter, spec: Spec, encoder: ImageEncoder) -> IPAdapter:
    """A method that goes on from an adapter's file. Raises UserError where it does not fit base or encoder."""
    if not choice.method.startswith("ip-adapter"):
        raise UserError(f"method: expected one of the ip-adapter family to go on from a file, received {choice.method!r}")
    if choice.method not in ("ip-adapter", KINDS[spec.kind]):  # the first is what stands there where nothing was said
        raise UserError(f"method: {choice.adapter} is a {spec.kind} adapter; expected {KINDS[spec.kind]}, received {choice.method}")
    Prompter(adapter, spec, encoder)
    check_fit(adapter, unet)
    return IPAdapter(unet, encoder, adapter)


def of_one_subject(choice: Train, photos: Records | None, pipe: Any) -> Personal:
    """Photographs of one subject, and beside them pictures of its class, which the base draws now where they are missing."""
    if not isinstance(photos, Counted):
        raise UserError(f"{choice.method} learns from a few photographs of one subject: expected a folder or a list of them")
    if len(photos) > MOST_PHOTOS:
        raise UserError(f"{choice.method} learns from a few photographs of one subject, at most {MOST_PHOTOS}; received {len(photos)}")
    prior: list[Path] = []
    if choice.prior > 0 and choice.method != "inversion":
        folder = writable_folder(choice.prior_folder or str(Path(choice.out) / "class"))
        guidance = guidance_of(choice.base)
        prior = list(class_pictures(pipe, choice.noun, choice.prior, folder, PRIOR_STEPS, guidance, base=choice.base))
    alone = choice.method == "inversion"
    text = subject_text(choice.token, "" if alone else choice.noun)
    pictures = [photos[i].target for i in range(len(photos))]
    return Personal(pictures, text, prior, class_text(choice.noun), choice.prior_weight)


def by_subject(records: Records, least: int) -> Identities:
    """Records put together by subject. Raises UserError for a stream, where subjects are not together."""
    if not isinstance(records, Counted):
        raise UserError("subjects: shards are read as a stream, in which a subject's pictures are far apart; encode them: --cache FOLDER")
    return Identities(records, least)


def split_facts(everyone: Identities, rest: Records, choice: Train) -> dict[str, Any]:
    """Which subjects are trained on, and which are left for testing."""
    trained = sorted(cast(Identities, rest).subjects)
    facts = {"least": choice.subjects, "held_out": choice.held_out, "seed": choice.seed}
    return facts | {"train": trained, "test": sorted(set(everyone.subjects) - set(trained))}


def states(folder: Path) -> list[Path]:
    """The states of a run, the newest last."""
    return sorted((folder / "state").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))


def same_run(path: Path, facts: dict[str, Any], choice: Train, of: str) -> None:
    """Write down whom a run is about. Raises UserError where the one that would be continued is about somebody else."""
    going_on = choice.resume == "auto" and states(path.parent)
    text = json.dumps(facts, indent=1)
    if going_on and path.is_file() and path.read_text("utf-8") != text:
        raise UserError(
            f"the run in {choice.out} was begun with other subjects; use {of} that it was begun with, another --out, or --resume never"
        )
    write_file(path, text)


def held_out(records: Records, choice: Train) -> tuple[list[Record], Records]:
    """What is examined and never trained on, and the rest.

    Of shards the first records are examined, and trained on too; so is a very small set. Where subjects are trained on,
    others are examined, each in one picture.
    """
    count = choice.validation
    if isinstance(records, Identities) and not isinstance(records.records, Mini):
        trained, tested = split(list(records.subjects), choice.held_out, choice.seed) if choice.held_out else (list(records.subjects), [])
        other = records.of(tested or trained)
        firsts = [n for n in range(len(other)) if n == 0 or other.subject_of(n) != other.subject_of(n - 1)]
        return [other[n] for n in firsts[:count]], records.of(trained)
    world = records.records if isinstance(records, Identities) else records
    if isinstance(world, Mini):
        fresh: Counted = Mini(max(count, 1) * world.photos, held_out=True, photos=world.photos, look=world.look)
        if isinstance(records, Identities):
            fresh = Identities(fresh, records.least)
        return [fresh[i * world.photos] for i in range(count)], records
    if isinstance(records, Counted):
        chosen = random.Random(HELD_OUT_SEED).sample(range(len(records)), min(count, len(records)))
        return [records[i] for i in chosen], records if len(records) < 8 * count else Without(records, chosen)
    return list(islice((r for shard in records.shards for r in records.read(shard)), count)), records
