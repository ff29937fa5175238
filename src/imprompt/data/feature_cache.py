"""The feature cache: the outputs of the frozen encoders for every record, in shards of safetensors on disk.

    cache.json                        the manifest: data, encoders and settings; the number of chunks; the version of the format
    encoder_fingerprint.safetensors   outputs of the encoders for a fixed small input: training needs encoders with the same outputs
    00012.json                        written when chunk 12 is complete: its files, their subjects, its unreadable records
    00012-0.safetensors               records of chunk 12 that have one shape: latent_mean, latent_std, image_features, time_ids, mask;
                                      prompt_embeds and pooled_prompt_embeds of the distinct captions, and for each record its
                                      prompt_index; keys and captions as UTF-8 in strings, between string_offsets

A chunk is written completely or not at all: several processes can encode at the same time, and an interrupted encoding can be
continued. Records are read one by one and never memory-mapped, so that memory stays constant.
"""

import json
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from imprompt.data.records import MapRecords
from imprompt.data.subjects import SubjectDataset
from imprompt.data.transforms import sample_reference_order
from imprompt.errors import UserError, summarize_error
from imprompt.utils.files import atomic_path, check_or_write_manifest, read_json_object, write_file

VERSION = 2
MANIFEST, FINGERPRINT = "cache.json", "encoder_fingerprint.safetensors"
_ENCODING = ("utf-8", "surrogatepass")  # file names need not be valid UTF-8
_MAX_CHUNKS = 1_000_000
# What a file that is cut, or not ours, raises while a row of it is read.
_READ_ERRORS = (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError)


class CachedSample(NamedTuple):
    """The encoded features of one record."""

    latent_mean: Tensor  # (channels, height, width): the VAE's posterior, scaled
    latent_std: Tensor
    prompt_embeds: Tensor  # (tokens, cross_attention_dim)
    pooled_prompt_embeds: Tensor | None  # (projection_dim,): SDXL
    image_features: Tensor  # (references, patches, image_embed_dim)
    time_ids: Tensor  # (6,): SDXL: original height and width, crop top and left, target height and width
    mask: Tensor | None  # (1, height, width), 0 … 1
    caption: str
    key: str
    seed: int = 0
    subject: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Samples of one batch have the same shape, that of the latents."""
        return tuple(self.latent_mean.shape)


class SampleRef(NamedTuple):
    """A sample that is not read yet."""

    key: str
    sample_index: int
    reference_indices: tuple[int, ...] = ()  # samples of the same subject, from which references are chosen


class FeatureCache:
    """A complete cache with random access to its samples."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._files: list[Path] = []
        counts = []
        for chunk in range(self.manifest["chunks"]):
            for name, count in _read_chunk_index(self.folder, chunk)["files"].items():
                self._files.append(self.folder / name)
                counts.append(count)
        self._ends = list(accumulate(counts))
        if not self._ends:
            raise UserError(f"the cache in {folder} holds no records")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> SampleRef:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return SampleRef(f"{self.folder.name}:{i}", i)

    def load_sample(self, i: int, seed: int = 0) -> CachedSample:
        """Read one sample. Raises UserError where its file is missing or damaged."""
        path, row = self._locate(i)
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())

                def read(name: str, at: int = row) -> Any:
                    return file.get_slice(name)[at] if name in names else None

                prompt, (start, middle, end) = int(read("prompt_index")), read("string_offsets").tolist()
                if not 0 <= start <= middle <= end <= file.get_slice("strings").get_shape()[0]:
                    raise ValueError("its strings are cut")
                strings = bytes(file.get_slice("strings")[start:end].tolist())
                key, caption = (part.decode(*_ENCODING) for part in (strings[: middle - start], strings[middle - start :]))
                return _check_sample(CachedSample(
                    read("latent_mean"), read("latent_std"), read("prompt_embeds", prompt), read("pooled_prompt_embeds", prompt),
                    read("image_features"), read("time_ids"), read("mask"), caption, key, seed,
                ))  # fmt: skip
        except _READ_ERRORS as error:
            raise UserError(f"{path.name} of the cache cannot be read ({summarize_error(error)})") from error

    def load_image_features(self, i: int) -> Tensor:
        """The image features of one sample, (references, patches, image_embed_dim)."""
        path, row = self._locate(i)
        try:
            with safe_open(path, framework="pt") as file:
                features: Tensor = file.get_slice("image_features")[row]
                if features.ndim != 3 or not features.isfinite().all():
                    raise ValueError("its features are damaged")
                return features
        except _READ_ERRORS as error:
            raise UserError(f"{path.name} of the cache cannot be read ({summarize_error(error)})") from error

    def load_with_references(self, ref: SampleRef, seed: int, num_references: int, min_distinct: int) -> CachedSample:
        """A sample with references chosen from its subject as in `transforms.load_example`; everything random follows from `seed`."""
        rng = random.Random(seed)
        count, order = sample_reference_order(len(ref.reference_indices), num_references, min_distinct, rng)
        features = [self.load_image_features(ref.reference_indices[i]) for i in order[:count]]
        features += [rng.choice(features) for _ in range(num_references - count)]
        return self.load_sample(ref.sample_index, seed)._replace(image_features=torch.cat(features))

    def get_subject(self, i: int) -> str | None:
        """The subject of a sample; its features are not read."""
        return self._subjects[i]

    @cached_property
    def _subjects(self) -> list[str | None]:
        subjects: list[str | None] = []
        for chunk in range(self.manifest["chunks"]):
            index = _read_chunk_index(self.folder, chunk)
            for name, count in index["files"].items():
                subjects += index["subjects"].get(name) or [None] * count
        return subjects

    def _locate(self, i: int) -> tuple[Path, int]:
        """The file of a sample, and its row in that file."""
        file = bisect_right(self._ends, i)
        return self._files[file], i - (self._ends[file - 1] if file else 0)

    def load_fingerprint(self) -> dict[str, Tensor]:
        """Outputs of the cache's encoders for the fixed input."""
        try:
            return load_file(self.folder / FINGERPRINT)
        except _READ_ERRORS as error:
            raise UserError(
                f"{self.folder / FINGERPRINT} cannot be read ({summarize_error(error)}); encode anew into another folder"
            ) from error


class CachedSubjects(SubjectDataset):
    """The samples of a cache by subject, each with references to the other samples of its subject."""

    def __init__(self, cache: FeatureCache, min_images: int = 2, subjects: Collection[str] | None = None):
        super().__init__(cast(MapRecords, cache), min_images, subjects)

    def __getitem__(self, i: int) -> SampleRef:  # type: ignore[override]
        index, references = self.leave_one_out(i)
        return SampleRef(f"{self.get_subject(i)}:{index}", index, tuple(references))


def _check_sample(sample: CachedSample) -> CachedSample:
    """The sample. Raises ValueError where its tensors do not belong together, or are not finite."""
    floats = (sample.latent_mean, sample.latent_std, sample.prompt_embeds, sample.image_features)
    optional = tuple(tensor for tensor in (sample.pooled_prompt_embeds, sample.mask) if tensor is not None)
    dims = (3, 3, 2, 3, *([1] if sample.pooled_prompt_embeds is not None else []), *([3] if sample.mask is not None else []))
    if [tensor.ndim for tensor in (*floats, *optional)] != list(dims) or sample.latent_mean.shape != sample.latent_std.shape:
        raise ValueError("its tensors have other shapes")
    if sample.time_ids.shape != (6,) or (sample.mask is not None and sample.mask.shape[1:] != sample.latent_mean.shape[1:]):
        raise ValueError("its tensors have other shapes")
    if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in (*floats, *optional)):
        raise ValueError("its features are not finite")
    return sample


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache. Raises UserError where there is none, or one of another version."""
    try:
        manifest = read_json_object(folder / MANIFEST, "encode it anew into another folder")
    except FileNotFoundError as error:
        raise UserError(f"no feature cache in {folder}; make one with: imprompt encode DATA {folder}") from error
    version, chunks = manifest.get("version", "unknown"), manifest.get("chunks")
    if version != VERSION:
        raise UserError(f"the cache in {folder} has format version {version}; expected {VERSION}: encode it anew into another folder")
    texts = (manifest.get(name, "") for name in ("data", "features", "model", "image_encoder"))
    if type(chunks) is not int or not 0 <= chunks <= _MAX_CHUNKS or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{folder / MANIFEST} is damaged (chunks: received {chunks!r}); encode it anew into another folder")
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a cache with all its chunks."""
    return (folder / MANIFEST).is_file() and not list_missing_chunks(folder, read_manifest(folder)["chunks"])


def summarize_cache(folder: Path) -> dict[str, Any]:
    """Records, chunks and bytes of a cache, its unreadable records with the reasons, and how many captions came from each source."""
    chunks: int = read_manifest(folder)["chunks"]
    records, size = 0, 0
    unreadable: dict[str, str] = {}
    captions: Counter[str] = Counter()
    for chunk in sorted(set(range(chunks)) - set(list_missing_chunks(folder, chunks))):
        index = _read_chunk_index(folder, chunk)
        records += sum(index["files"].values())
        size += sum((folder / name).stat().st_size for name in index["files"])
        unreadable |= index["unreadable"]
        captions += Counter(index["captions"])
    return {
        "output_dir": str(folder), "records": records, "chunks": chunks, "bytes": size, "unreadable": unreadable, "captions": captions,
    }  # fmt: skip


def list_missing_chunks(folder: Path, chunks: int) -> list[int]:
    """The chunks that are not encoded yet."""
    existing = {path.name for path in folder.glob("*.json")}
    return [i for i in range(chunks) if f"{i:05}.json" not in existing]


def list_chunks_to_encode(folder: Path, chunks: int) -> list[int]:
    """The missing chunks, and those whose shard could not be read to its end."""
    missing = set(list_missing_chunks(folder, chunks))
    return [i for i in range(chunks) if i in missing or _read_chunk_index(folder, i)["truncated"]]


def _read_chunk_index(folder: Path, chunk: int) -> dict[str, Any]:
    path, remedy = folder / f"{chunk:05}.json", "delete it and continue with imprompt encode"
    try:
        index = read_json_object(path, remedy)
    except FileNotFoundError as error:
        left = len(list_missing_chunks(folder, read_manifest(folder)["chunks"]))
        raise UserError(f"the cache in {folder} is not finished, {left} chunks are missing; continue with imprompt encode") from error
    try:
        _check_chunk_index(index, folder, chunk)
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({summarize_error(error)}); {remedy}") from error
    return index


def _check_chunk_index(index: dict[str, Any], folder: Path, chunk: int) -> None:
    """Raise ValueError, TypeError or AttributeError where an index is not one that `ChunkWriter` wrote, or names missing files."""
    index.setdefault("subjects", {})
    index.setdefault("truncated", "")
    for name, count in index.get("files", 0).items():
        if not re.fullmatch(rf"{chunk:05}-\d+\.safetensors", name) or type(count) is not int or not 0 < count <= _MAX_CHUNKS:
            raise ValueError(f"an entry {name!r}: {count!r}")
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        subjects = index["subjects"].get(name) or [None] * count
        if len(subjects) != count or not all(subject is None or isinstance(subject, str) for subject in subjects):
            raise ValueError("its subjects are damaged")
    if not all(isinstance(reason, str) for reason in (*index.get("unreadable", 0).values(), index["truncated"])):
        raise ValueError("its reasons are damaged")
    if not all(type(count) is int for count in index.setdefault("captions", {}).values()):
        raise ValueError("its captions are damaged")


def init_cache(folder: Path, manifest: Mapping[str, object], fingerprint: Mapping[str, Tensor]) -> None:
    """Write the manifest and the fingerprint of a new cache. Raises UserError where the folder holds a cache with another manifest."""
    manifest = dict(manifest) | {"version": VERSION}
    if (folder / MANIFEST).is_file():
        read_manifest(folder)
    else:
        with atomic_path(folder / FINGERPRINT) as partial:
            save_file({name: tensor.contiguous().cpu() for name, tensor in fingerprint.items()}, partial)
    check_or_write_manifest(folder / MANIFEST, manifest, f"the cache in {folder}", "use the same settings or another folder")


class ChunkWriter:
    """Writes the samples of a chunk to files of up to `samples_per_file` samples with one shape each."""

    def __init__(self, folder: Path, chunk: int, samples_per_file: int):
        self.folder, self.chunk, self.samples_per_file = folder, chunk, samples_per_file
        self._pending: dict[Hashable, list[CachedSample]] = {}
        self._files: dict[str, int] = {}
        self._subjects: dict[str, list[str | None]] = {}
        self.unreadable: dict[str, str] = {}
        self.captions: Counter[str] = Counter()  # how many samples have a caption from each source, "" for none
        self.truncated = ""  # why the shard could not be read to its end; the next encoding tries again

    def add(self, sample: CachedSample) -> None:
        """Add a sample; a full file is written."""
        key = (sample.shape, sample.mask is not None)
        pending = self._pending.setdefault(key, [])
        pending.append(sample)
        if len(pending) == self.samples_per_file:
            self._write(self._pending.pop(key))

    def close(self) -> None:
        """Write the remaining samples, and then mark the chunk as complete."""
        for samples in self._pending.values():
            self._write(samples)
        self._pending = {}
        index = {
            "files": self._files, "unreadable": self.unreadable, "truncated": self.truncated, "subjects": self._subjects,
            "captions": self.captions,
        }  # fmt: skip
        write_file(self.folder / f"{self.chunk:05}.json", json.dumps(index))

    def _write(self, samples: Sequence[CachedSample]) -> None:
        path = self.folder / f"{self.chunk:05}-{len(self._files)}.safetensors"
        with atomic_path(path) as partial:
            save_file(pack_samples(samples), partial)
        self._files[path.name] = len(samples)
        if any(sample.subject is not None for sample in samples):
            self._subjects[path.name] = [sample.subject for sample in samples]


def pack_samples(samples: Sequence[CachedSample]) -> dict[str, Tensor]:
    """Samples of one shape as the tensors of a file, floats in half precision."""
    prompts: dict[str, int] = {}  # distinct captions
    strings, prompt_index, offsets = bytearray(), [], []
    for sample in samples:
        start, key = len(strings), sample.key.encode(*_ENCODING)
        strings += key + sample.caption.encode(*_ENCODING)
        prompt_index.append(prompts.setdefault(sample.caption, len(prompts)))
        offsets.append((start, start + len(key), len(strings)))
    encoded = [next(sample for sample in samples if sample.caption == caption) for caption in prompts]
    tensors = {
        "latent_mean": _stack_half("latent_mean", [s.latent_mean for s in samples]),
        "latent_std": _stack_half("latent_std", [s.latent_std for s in samples]),
        "image_features": _stack_half("image_features", [s.image_features for s in samples]),
        "time_ids": torch.stack([s.time_ids for s in samples]).to(torch.int32),
        "prompt_embeds": _stack_half("prompt_embeds", [s.prompt_embeds for s in encoded]),
        "prompt_index": torch.tensor(prompt_index, dtype=torch.int64),
        "string_offsets": torch.tensor(offsets, dtype=torch.int64),
        "strings": torch.frombuffer(bytearray(strings or b" "), dtype=torch.uint8).clone(),
    }
    pooled = [s.pooled_prompt_embeds for s in encoded if s.pooled_prompt_embeds is not None]
    masks = [s.mask for s in samples if s.mask is not None]
    tensors |= {"pooled_prompt_embeds": _stack_half("pooled_prompt_embeds", pooled)} if pooled else {}
    return tensors | ({"mask": _stack_half("mask", masks)} if masks else {})


def _stack_half(name: str, tensors: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(tensors)).to(torch.float16)
    if not torch.isfinite(stacked).all():
        raise UserError(f"the features {name} are not finite in half precision; encode with --mixed-precision float32")
    return stacked
