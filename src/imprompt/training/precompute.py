"""From data to a feature cache: every record goes through the frozen parts once."""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprompt.config import READS, Encode, Train
from imprompt.data.feature_cache import Cache, Chunk, Row, about, begin, complete, to_encode
from imprompt.data.loader import UNREADABLE, Skipped, ahead, name_of
from imprompt.data.readers import Shards, is_mini, open_data
from imprompt.data.records import Record, Records, Sharded
from imprompt.data.sampler import itself, mixed_seed
from imprompt.data.transforms import Example, Framing, example, stack
from imprompt.errors import UserError, brief
from imprompt.methods import reader
from imprompt.methods.ip_adapter import KINDS
from imprompt.methods.loading import to_train
from imprompt.models.base_pipelines import check_size, claim_device, load_base, own_size, pick_precision
from imprompt.models.checkpoints import Spec
from imprompt.models.image_prompt import find_encoder
from imprompt.training.frozen_encoders import Encoded, Frozen
from imprompt.utils.files import writable_folder

CHUNK = 256  # records of a list; of shards each is a chunk
LIKENESS = 0.02  # relative difference of two probes of the same encoders, in whatever precision


class Progress(NamedTuple):
    """How far an encoding is."""

    chunks: int  # done
    total: int  # chunks that were to be done, by this process
    records: int  # encoded
    lost: int


class _Tag(NamedTuple):
    """Which chunk a piece of work belongs to; no record marks the chunk's end."""

    chunk: int
    read: Callable[[], Record] | None


def encode(choice: Encode, rank: int = 0, ranks: int = 1, spec: Spec | None = None) -> Iterator[Progress]:
    """Encode the chunks of process `rank` that are missing, for the adapter of this spec if one is to be tuned.

    Raises UserError for what the user can mend.

    Whatever is random about a record (crop, flip, augmentation) is drawn once, and stays.
    """
    choice = choice.settled()
    folder = writable_folder(choice.out)
    records = open_data(choice.data)
    device = claim_device(choice.device)
    precision = pick_precision(choice.precision, torch.device(device).type)
    pipe = load_base(choice.base, device, precision)
    encoder = find_encoder(choice.base, choice.encoder, spec)
    encoder.model.to(device, precision)  # type: ignore[arg-type]
    framing = framing_of(choice, pipe)
    seen = reader(choice.method, pipe, encoder)
    frozen = Frozen(pipe, seen, READS[choice.method] == "grid")
    chunks = len(records.shards) if isinstance(records, Sharded) else -(-len(records) // CHUNK)
    begin(folder, facts(choice, framing, chunks, content(records)), frozen.signature())
    mine = [i for i in to_encode(folder, chunks) if i % ranks == rank]
    skipped = Skipped(choice.max_unreadable, folder / f"unreadable-{rank}.tsv")
    lost: dict[int, dict[str, str]] = defaultdict(dict)

    def make(read: Callable[[], Record], seed: int) -> Example:
        return example(read(), seed, framing, seen.prepare)

    def work() -> Iterator[tuple[_Tag, Callable[[], Example | None]]]:
        for chunk in mine:
            if isinstance(records, Shards):
                records.lost = partial(_note, skipped, lost[chunk])
            for read, seed in _records_of(records, chunk, choice.seed):
                yield _Tag(chunk, read), partial(make, read, seed)
            yield _Tag(chunk, None), lambda: None

    writers: dict[int, Chunk] = {}
    waiting: dict[Any, list[Example]] = {}
    closed = count = 0
    for tag, future in ahead(work(), choice.workers, 2 * choice.batch + choice.workers):
        writer = writers.setdefault(tag.chunk, Chunk(folder, tag.chunk, CHUNK))
        if tag.read is None:
            for items in waiting.values():
                count += _write(writer, frozen, items)
            waiting.clear()
            writer.lost = lost.pop(tag.chunk, {})
            writer.broken = writer.lost.get(records.shards[tag.chunk], "") if isinstance(records, Sharded) else ""
            writers.pop(tag.chunk).close()
            closed += 1
        else:
            try:
                item = future.result()
                assert item is not None
            except UNREADABLE as error:
                _note(skipped, lost[tag.chunk], name_of(tag.read, error), brief(error))
                continue
            skipped.seen()
            items = waiting.setdefault((item.shape, item.mask is not None), [])
            items.append(item)
            if len(items) < choice.batch:
                continue
            count += _write(writer, frozen, waiting.pop((item.shape, item.mask is not None)))
        yield Progress(closed, len(mine), count, skipped.count)


def cached(choice: Train, rank: int, ranks: int) -> Iterator[Progress]:
    """Fill the cache that a training is to use. Where it is finished, nothing, but it has to be what the training asks for."""
    if choice.cache is None:
        return
    if complete(Path(choice.cache)):
        agree(choice, about(Path(choice.cache)))
        return
    wanted, given = Encode.of(choice), to_train(choice.adapter) if choice.adapter else None
    if given is not None:
        wanted = replace(wanted, method=KINDS[given[1].kind])
    yield from encode(wanted, rank, ranks, given[1] if given else None)


def agree(choice: Train, made: dict[str, Any]) -> None:
    """Raise UserError where a training names what its cache was not made of or with."""
    asking = {f.name: f.default for f in fields(Train) if f.name in made}
    for name, default in asking.items():
        if name in FREE or (name == "references" and (choice.subjects or choice.references == 1)):  # left open, or put together here
            continue
        asked = getattr(choice, name)
        asked, there = (str(Path(str(v)).absolute()) if name == "data" and not is_mini(str(v)) else v for v in (asked, made[name]))
        if getattr(choice, name) != default and asked != there:
            raise UserError(
                f"{name}: the cache in {choice.cache} was made with {made[name]!r}, not {getattr(choice, name)!r}; "
                f"leave --{name.replace('_', '-')} out, or encode into another folder"
            )


FREE = ("base", "encoder", "seed")  # what a training may have otherwise; the encoders are compared by what they say


def facts(choice: Encode, framing: Framing, chunks: int, content: str) -> dict[str, Any]:
    """What a cache remembers of its making, and what a second run must have in common with the first."""
    return {
        "data": choice.data if is_mini(choice.data) else str(Path(choice.data).absolute()), "content": content,
        "base": choice.base, "encoder": choice.encoder or choice.base, "features": READS[choice.method],
        "chunks": chunks, "seed": choice.seed, "size": framing.size, "crop": framing.crop, "flip": framing.flip, "buckets": framing.buckets,
        "own_crop": framing.own_crop, "augment": framing.augment, "references": framing.references, "least": framing.least,
        "caption": framing.caption,
    }  # fmt: skip


def content(records: Records) -> str:
    """Changes when records come or go: numbers of records would then mean others."""
    names = records.shards if isinstance(records, Sharded) else getattr(records, "names", None)
    size = len(records.shards) if isinstance(records, Sharded) else len(records)
    return f"{size}" + (f" {zlib.crc32(chr(10).join(names).encode('utf-8', 'surrogatepass')):08x}" if names else "")


def check(cache: Cache, choice: Train, frozen: Frozen) -> None:
    """Raise UserError where a cache was made for another kind of features, or by other encoders than these."""
    folder, made, found = cache.folder, cache.about, cache.probe()
    wanted = READS[choice.method] if READS[choice.method] in ("pixels", "latents") else "grid" if frozen.grid else "pooled"
    if made["features"] != wanted:
        raise UserError(f"{choice.method} reads {wanted} features, and the cache in {folder} holds {made['features']} ones; encode anew")
    if choice.subjects and made.get("references", 1) != 1:
        raise UserError(
            f"the cache in {folder} holds {made['references']} references for each picture, subjects are put together from one; encode anew"
        )
    for name, here in frozen.signature().items():
        if name not in found or found[name].shape != here.shape or _difference(found[name], here) > LIKENESS:
            raise UserError(f"the cache in {folder} was made with another {name} than that of {choice.base} here; encode anew")


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-6))


def framing_of(choice: Train | Encode, pipe: Any) -> Framing:
    """How pictures are framed for this base. Raises UserError for a size that it cannot take."""
    size = choice.size or own_size(pipe)
    check_size(pipe, size, size)
    multiple = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    fewest = choice.fewest if isinstance(choice, Train) else choice.references
    return Framing(
        size, choice.crop, choice.flip, choice.buckets, multiple, choice.own_crop, choice.augment, choice.references, fewest, choice.least,
        choice.caption,
    )  # fmt: skip


def rows_of(encoded: Encoded, items: Iterable[Example]) -> list[Row]:
    """An encoded batch, record by record."""
    text = encoded.text
    return [
        Row(
            encoded.mean[i], encoded.std[i], text.states[i], None if text.pooled is None else text.pooled[i], encoded.image[i],
            encoded.sizes[i], None if encoded.weight is None else encoded.weight[i], item.text, item.key, item.seed, item.subject,
        )
        for i, item in enumerate(items)
    ]  # fmt: skip


def _records_of(records: Records, chunk: int, seed: int) -> Iterator[tuple[Callable[[], Record], int]]:
    if isinstance(records, Sharded):
        for record in records.read(records.shards[chunk]):
            yield partial(itself, record), mixed_seed(seed, 0, zlib.crc32(record.key.encode()))
    else:
        for i in range(chunk * CHUNK, min(len(records), (chunk + 1) * CHUNK)):
            yield partial(records.__getitem__, i), mixed_seed(seed, 0, i)


def _write(writer: Chunk, frozen: Frozen, items: list[Example]) -> int:
    encoded = frozen.encode(stack(items)).to("cpu")
    for row in rows_of(encoded, items):
        writer.add(row)
    return len(items)


def _note(skipped: Skipped, lost: dict[str, str], key: str, why: str) -> None:
    lost[key] = why
    skipped.lost(key, why)
