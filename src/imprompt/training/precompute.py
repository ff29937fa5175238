"""Encoding of data into a feature cache: every record passes through the frozen encoders once."""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprompt.config import METHOD_OF_ADAPTER_TYPE, METHODS, EncodeConfig
from imprompt.config.training import DataConfig, is_mini_data
from imprompt.data.feature_cache import (
    CachedSample,
    ChunkWriter,
    FeatureCache,
    init_cache,
    is_complete,
    list_chunks_to_encode,
    read_manifest,
)
from imprompt.data.loader import READ_ERRORS, ErrorBudget, get_record_key, prefetch
from imprompt.data.readers import WebDatasetShards, open_data
from imprompt.data.records import Record, Records, ShardRecords
from imprompt.data.sampler import derive_seed, to_reader
from imprompt.data.shards import is_remote
from imprompt.data.transforms import Example, TransformConfig, collate, load_example
from imprompt.errors import UserError, redact_secrets, summarize_error
from imprompt.methods import feature_encoder
from imprompt.methods.loading import load_for_finetuning
from imprompt.models.base_pipelines import check_size, load_pipeline, native_resolution, resolve_mixed_precision, set_device
from imprompt.models.checkpoints import AdapterSpec
from imprompt.models.image_prompt import resolve_image_encoder
from imprompt.training.frozen_encoders import FrozenEncoders, TrainingBatch
from imprompt.utils.files import ensure_writable_folder
from imprompt.utils.protocols import UNetPipeline

RECORDS_PER_CHUNK = 256  # of data with random access; of shards, each is a chunk
FINGERPRINT_TOLERANCE = 0.02  # relative difference between outputs of the same encoders in different precisions
OPTIONS_THAT_MAY_DIFFER = ("model", "image_encoder", "seed")  # from those of the cache: the encoders are compared by their outputs


class EncodingProgress(NamedTuple):
    """How far an encoding is."""

    chunks: int  # that this process has encoded
    total: int  # that this process has to encode
    records: int  # that this process has encoded
    unreadable: int


class _Task(NamedTuple):
    """The loading of a record of a chunk; without a record, the end of the chunk."""

    chunk: int
    read: Callable[[], Record] | None


def encode_dataset(
    config: EncodeConfig, rank: int = 0, num_processes: int = 1, spec: AdapterSpec | None = None
) -> Iterator[EncodingProgress]:
    """Encode the missing chunks of process `rank`, for the adapter of this spec where one is to be fine-tuned.

    Everything random about a record (crop, flip, augmentation) is sampled once, and the same in every epoch. Raises UserError for
    what the user can correct.
    """
    config = config.with_defaults()
    dataset, model = config.dataset, config.pipeline.model
    folder = ensure_writable_folder(config.output_dir)
    records = open_data(dataset.data)
    device = set_device(config.pipeline.device)
    dtype = resolve_mixed_precision(config.mixed_precision, torch.device(device).type)
    pipe: UNetPipeline = load_pipeline(model, device, dtype, config.pipeline.model_config)
    image_encoder = resolve_image_encoder(model, config.image_encoder, spec)
    image_encoder.model.to(device, dtype)  # type: ignore[arg-type]
    features = METHODS[config.method].features
    encoders = FrozenEncoders(pipe, feature_encoder(config.method, pipe, image_encoder), patches=features == "patches")
    transform = make_transform_config(dataset, pipe, dataset.num_references)
    num_chunks = len(records.shards) if isinstance(records, ShardRecords) else -(-len(records) // RECORDS_PER_CHUNK)
    settings = {"model": model, "image_encoder": config.image_encoder or model, "features": features, "seed": config.seed}
    manifest = make_manifest(dataset.data, records, transform) | settings | {"chunks": num_chunks}
    init_cache(folder, manifest, encoders.fingerprint())
    chunks = [i for i in list_chunks_to_encode(folder, num_chunks) if i % num_processes == rank]
    error_budget = ErrorBudget(dataset.max_unreadable_fraction, folder / f"unreadable-{rank}.tsv")
    encoder = _ChunkEncoder(folder, records, encoders, transform, error_budget, config.batch_size, config.seed)
    yield from encoder.encode(chunks, dataset.dataloader_num_workers)
    if chunks and error_budget.failed == error_budget.total:
        raise UserError(f"none of {error_budget.total} records can be read; see {error_budget.log}, and imprompt data validate")


@dataclass
class _ChunkEncoder:
    """Encodes records in batches of one shape, and writes each chunk as soon as all of its records are encoded."""

    folder: Path
    records: Records
    encoders: FrozenEncoders
    transform: TransformConfig
    error_budget: ErrorBudget
    batch_size: int
    seed: int
    num_encoded: int = 0
    _pending: dict[Any, list[Example]] = field(default_factory=dict)  # by shape, less than a batch each
    _unreadable: dict[int, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))  # by chunk: reasons by key

    def encode(self, chunks: list[int], workers: int) -> Iterator[EncodingProgress]:
        """Encode these chunks; the progress after every batch and every chunk."""
        done = 0
        writer: ChunkWriter | None = None
        for task, future in prefetch(self._tasks(chunks), workers, 2 * self.batch_size + workers):
            writer = writer or ChunkWriter(self.folder, task.chunk, RECORDS_PER_CHUNK)
            if task.read is None:
                self._close(writer)
                writer, done = None, done + 1
            elif not self._add(writer, task.read, future):
                continue
            yield EncodingProgress(done, len(chunks), self.num_encoded, self.error_budget.failed)

    def _tasks(self, chunks: list[int]) -> Iterator[tuple[_Task, Callable[[], Example | None]]]:
        for chunk in chunks:
            if isinstance(self.records, WebDatasetShards):
                self.records.on_unreadable = partial(self._record_failure, chunk)
            for read, seed in _iterate_chunk(self.records, chunk, self.seed):
                yield _Task(chunk, read), partial(self._load, read, seed)
            yield _Task(chunk, None), lambda: None

    def _load(self, read: Callable[[], Record], seed: int) -> Example:
        return load_example(read(), seed, self.transform, self.encoders.image_encoder.preprocess)

    def _add(self, writer: ChunkWriter, read: Callable[[], Record], future: "Future[Example | None]") -> bool:
        """Add a record to the batch of its shape; whether that was encoded because it is full."""
        try:
            item = future.result()
            assert item is not None
        except READ_ERRORS as error:
            self._record_failure(writer.chunk, get_record_key(read, error), summarize_error(error))
            return False
        self.error_budget.record_success()
        key = (item.shape, item.mask is not None)
        items = self._pending.setdefault(key, [])
        items.append(item)
        if len(items) < self.batch_size:
            return False
        self._write(writer, self._pending.pop(key))
        return True

    def _write(self, writer: ChunkWriter, items: list[Example]) -> None:
        for sample in to_cached_samples(self.encoders.encode_batch(collate(items)).to("cpu"), items):
            writer.add(sample)
        writer.captions.update(item.caption_source for item in items)
        self.num_encoded += len(items)

    def _close(self, writer: ChunkWriter) -> None:
        """Encode what is left of the chunk, and mark it as complete."""
        for items in self._pending.values():
            self._write(writer, items)
        self._pending.clear()
        writer.unreadable = self._unreadable.pop(writer.chunk, {})
        if isinstance(self.records, ShardRecords):
            writer.truncated = writer.unreadable.get(redact_secrets(self.records.shards[writer.chunk]), "")
        writer.close()

    def _record_failure(self, chunk: int, key: str, reason: str) -> None:
        self._unreadable[chunk][key] = reason
        self.error_budget.record_failure(key, reason)


def _iterate_chunk(records: Records, chunk: int, seed: int) -> Iterator[tuple[Callable[[], Record], int]]:
    """The records of a chunk, to be read later, and the seed of each."""
    if isinstance(records, ShardRecords):
        for record in records.read_shard(records.shards[chunk]):
            yield to_reader(record), derive_seed(seed, 0, zlib.crc32(record.key.encode()))
    else:
        for i in range(chunk * RECORDS_PER_CHUNK, min(len(records), (chunk + 1) * RECORDS_PER_CHUNK)):
            yield partial(records.__getitem__, i), derive_seed(seed, 0, i)


def to_cached_samples(batch: TrainingBatch, items: Iterable[Example]) -> list[CachedSample]:
    """The samples of an encoded batch."""
    pooled = batch.text.pooled_prompt_embeds
    return [
        CachedSample(
            batch.latent_mean[i], batch.latent_std[i], batch.text.prompt_embeds[i], None if pooled is None else pooled[i],
            batch.image_features[i], batch.time_ids[i], None if batch.mask is None else batch.mask[i], item.caption, item.key, item.seed,
            item.subject,
        )
        for i, item in enumerate(items)
    ]  # fmt: skip


def fill_feature_cache(config: EncodeConfig, adapter: str | None, rank: int, num_processes: int) -> Iterator[EncodingProgress]:
    """Complete the cache of a training that fine-tunes this adapter, if any. Raises UserError where a complete one does not fit it."""
    folder = Path(config.output_dir)
    if is_complete(folder):
        check_cache_options(config.to_options(), read_manifest(folder), folder)
        return
    spec = load_for_finetuning(adapter)[1] if adapter else None
    if spec is not None:
        config = config.with_options(method=METHOD_OF_ADAPTER_TYPE[spec.adapter_type])
    yield from encode_dataset(config, rank, num_processes, spec)


def check_cache_options(options: Mapping[str, Any], manifest: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError where an option differs from its default and from what the cache was made with."""
    defaults = EncodeConfig().with_defaults().to_options()
    for name, value in options.items():
        if name not in manifest or name in OPTIONS_THAT_MAY_DIFFER:
            continue
        if name == "data" and not is_mini_data(str(value)):
            value = str(Path(str(value)).absolute())
        if options[name] not in (None, defaults[name]) and value != manifest[name]:
            flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            raise UserError(
                f"{name}: the cache in {folder} was made with {manifest[name]!r}, not {options[name]!r}; "
                f"remove {flag}, or encode into another folder"
            )


def check_cache_encoders(cache: FeatureCache, encoders: FrozenEncoders, method: str, model: str, *, by_subject: bool) -> None:
    """Raise UserError where a cache has other features than the method reads, or was made with other encoders than these."""
    folder, manifest = cache.folder, cache.manifest
    expected = METHODS[method].features
    if expected in ("pooled", "patches"):  # an adapter that is fine-tuned decides
        expected = "patches" if encoders.patches else "pooled"
    if manifest.get("features") != expected:
        raise UserError(
            f"{method} reads {expected} features, and the cache in {folder} has {manifest.get('features')} features; encode anew"
        )
    if by_subject and manifest.get("num_references") != 1:
        raise UserError(
            f"the cache in {folder} has {manifest.get('num_references')} references per image; training by subject needs 1; encode anew"
        )
    cached = cache.load_fingerprint()
    for name, output in encoders.fingerprint().items():
        if name not in cached or cached[name].shape != output.shape or _relative_difference(cached[name], output) > FINGERPRINT_TOLERANCE:
            raise UserError(f"the cache in {folder} was made with another {name} than that of {model} here; encode anew")


def _relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-6))


def make_manifest(data: str, records: Records, transform: TransformConfig) -> dict[str, Any]:
    """What a cache was made of, which has to be the same when its encoding is continued."""
    options = {name: value for name, value in asdict(transform).items() if name not in ("size_multiple", "min_distinct_references")}
    source = data if is_mini_data(data) else redact_secrets(data) if is_remote(data) else str(Path(data).absolute())
    return {"data": source, "dataset_fingerprint": dataset_fingerprint(records)} | options


def dataset_fingerprint(records: Records) -> str:
    """A text that changes when records are added or removed, after which their indices would name other records."""
    names = records.shards if isinstance(records, ShardRecords) else getattr(records, "names", None)
    size = len(records.shards) if isinstance(records, ShardRecords) else len(records)
    return f"{size}" + (f" {zlib.crc32(chr(10).join(names).encode('utf-8', 'surrogatepass')):08x}" if names else "")


def make_transform_config(config: DataConfig, pipe: UNetPipeline, min_distinct_references: int) -> TransformConfig:
    """How images are brought to the resolution of this base model. Raises UserError for a resolution that it does not support."""
    resolution = config.resolution or native_resolution(pipe)
    check_size(pipe, resolution, resolution)
    return TransformConfig(
        resolution, center_crop=config.center_crop, random_flip=config.random_flip, aspect_ratio_bucketing=config.aspect_ratio_bucketing,
        size_multiple=pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1),
        independent_reference_crop=config.independent_reference_crop, reference_augmentation=config.reference_augmentation,
        num_references=config.num_references, min_distinct_references=min_distinct_references, min_image_size=config.min_image_size,
        default_caption=config.default_caption,
    )  # fmt: skip
