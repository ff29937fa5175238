"""The setup of a run: its data, the base model with its frozen encoders, and the method. What does not fit together is found here."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from imprompt.config import METHOD_OF_ADAPTER_TYPE, METHODS, PipelineConfig, TrainConfig
from imprompt.config.training import CheckpointConfig, DataConfig, FinetuningConfig, RuntimeConfig, SubjectConfig, is_mini_data
from imprompt.core.adapter import Adapter
from imprompt.core.noise_schedule import NoiseSchedule
from imprompt.data.dreambooth import DreamBoothDataset
from imprompt.data.feature_cache import CachedSample, CachedSubjects, FeatureCache, SampleRef, summarize_cache
from imprompt.data.loader import READ_ERRORS, ErrorBudget, Loader
from imprompt.data.readers import MiniWorld, WebDatasetShards, open_data
from imprompt.data.records import MapRecords, Record, Records, ShardRecords, Subset
from imprompt.data.subjects import SubjectDataset, split_subjects
from imprompt.data.survey import describe_captions, describe_data
from imprompt.data.transforms import Example, TransformConfig, collate, load_example
from imprompt.errors import UserError, redact_secrets
from imprompt.methods import Method, build_method
from imprompt.methods.inversion import TextualInversion
from imprompt.methods.ip_adapter import IPAdapter
from imprompt.methods.loading import load_for_finetuning
from imprompt.methods.prompt_templates import format_class_prompt, format_instance_prompt
from imprompt.models.base_pipelines import load_pipeline, noise_schedule_from, resolve_mixed_precision
from imprompt.models.checkpoints import AdapterSpec
from imprompt.models.image_encoders import ImageEncoder
from imprompt.models.image_prompt import ImagePromptEncoder, resolve_image_encoder
from imprompt.training.class_images import generate_class_images
from imprompt.training.frozen_encoders import FrozenEncoders, TrainingBatch, UncondInputs
from imprompt.training.precompute import check_cache_encoders, dataset_fingerprint, make_transform_config
from imprompt.training.run_options import check_run_options, describe_run
from imprompt.training.state_files import find_resumable_state
from imprompt.unet.injection import check_compatible
from imprompt.utils.files import check_or_write_manifest, ensure_writable_folder
from imprompt.utils.protocols import UNetPipeline

VALIDATION_SEED = 7_919  # selects the validation images
MAX_SUBJECT_IMAGES = 1_000
Pretrained = tuple[Adapter, AdapterSpec]


class ValidationSet(NamedTuple):
    """What a run is validated on; not trained on, except where there are too few records, or a stream of them."""

    batches: list[TrainingBatch]  # on the device
    images: list[Image.Image]
    prompts: list[str]
    is_test_split: bool  # of test subjects, on which nothing may be selected


@dataclass
class TrainingContext:
    """The parts of a run."""

    pipe: UNetPipeline
    model: str  # name of the base model
    image_encoder: ImageEncoder | None  # None for per-subject methods
    method: Method
    frozen_encoders: FrozenEncoders
    noise_schedule: NoiseSchedule
    loader: Loader[Any]
    make_batch: Callable[[list[Any]], TrainingBatch]  # encodes items of the loader; the batch is on the device
    uncond: UncondInputs
    validation_set: ValidationSet
    metadata: dict[str, str]  # of the adapter files
    run_folder: "RunFolder"

    @property
    def unet(self) -> UNet2DConditionModel:
        """The UNet of the base model."""
        return self.pipe.unet

    @property
    def device(self) -> torch.device:
        """The device that is trained on."""
        return self.pipe.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the frozen parts, and of the computation."""
        return self.pipe.unet.dtype

    def batches(self) -> Iterator[TrainingBatch]:
        """Encoded batches without end, on the device. The loader is not read before the first one is asked for."""
        return map(self.make_batch, self.loader)


@dataclass(frozen=True)
class DataSource:
    """Records, and how they become items of the loader, batches and images."""

    records: Records
    make_item: Callable[[Any, int], Any]  # from a record and a seed
    rebuild_item: Callable[..., Any]  # from the values of an item that was saved with the state of a run
    make_batch: Callable[[list[Any]], TrainingBatch]
    decode_images: Callable[[list[Any], TrainingBatch], list[Image.Image]]

    @classmethod
    def from_images(cls, records: Records, transform: TransformConfig, encoders: FrozenEncoders) -> "DataSource":
        """Images and captions, encoded in every step."""
        return cls(
            records,
            lambda record, seed: load_example(record, seed, transform, encoders.image_encoder.preprocess),
            Example,
            lambda items: encoders.encode_batch(collate(items)).to(encoders.device),
            lambda items, _: [Image.fromarray(item.pixel_values.permute(1, 2, 0).numpy()) for item in items],
        )

    @classmethod
    def from_cache(cls, cache: FeatureCache, encoders: FrozenEncoders, num_references: int, subjects: SubjectConfig) -> "DataSource":
        """Samples of a feature cache, whose images are decoded from their latents; by subject, references are chosen here."""

        def load_sample(ref: SampleRef, seed: int) -> CachedSample:
            if not ref.reference_indices:
                return cache.load_sample(ref.sample_index, seed)
            return cache.load_with_references(ref, seed, num_references, subjects.min_distinct_references)

        min_images, dtype = subjects.min_images_per_subject, encoders.pipe.unet.dtype
        return cls(
            cast(Records, CachedSubjects(cache, min_images) if min_images else cache),
            load_sample,
            CachedSample,
            lambda samples: TrainingBatch.from_cached_samples(samples, dtype).to(encoders.device),
            lambda _, batch: encoders.decode_latents(batch.latent_mean),
        )

    def make_validation_set(self, records: Sequence[Record], batch_size: int, *, is_test_split: bool) -> ValidationSet:
        """The records that can be read, in batches of one shape."""
        by_shape: dict[Any, list[Any]] = {}
        for seed, record in enumerate(records):
            with suppress(*READ_ERRORS):
                item = self.make_item(record, seed)
                by_shape.setdefault(item.shape, []).append(item)
        groups = [items[i : i + batch_size] for items in by_shape.values() for i in range(0, len(items), batch_size)]
        batches = [self.make_batch(items) for items in groups]
        images = [image for items, batch in zip(groups, batches, strict=True) for image in self.decode_images(items, batch)]
        return ValidationSet(batches, images, [item.caption for items in groups for item in items], is_test_split)


class OpenedData(NamedTuple):
    """The data of a run, before anything large is loaded."""

    name: str
    cache: FeatureCache | None
    images: Records | None  # None where there is only a feature cache


class RunFolder(NamedTuple):
    """The folder of a run."""

    path: Path
    state: Path | None  # from which the run is resumed
    is_main_process: bool
    notices: Sequence[str] = ()  # what is to be known about a run that is resumed
    options: Mapping[str, Any] = {}  # what identifies the run

    def check_manifest(self, name: str, manifest: Mapping[str, object], options: str) -> None:
        """Record what is trained on. Raises UserError, naming the options, where the run that is resumed had another manifest."""
        if not self.is_main_process:
            return
        path = self.path / name
        if not self.state:
            path.unlink(missing_ok=True)
        remedy = f"use {options} that it was started with, another --output-dir, or --resume-from-checkpoint never"
        check_or_write_manifest(path, manifest, f"the run in {self.path}", remedy)


def setup_training(config: TrainConfig, device: torch.device, rank: int = 0, num_processes: int = 1) -> TrainingContext:
    """Open the data and load all models of a run. Raises UserError, with what to do next, where something does not fit together."""
    folder = open_run_folder(config.output_dir, config.checkpointing, rank)
    data = open_training_data(config.dataset.data, config.feature_cache, config.subjects)
    folder = check_same_run(folder, config, data, num_processes)
    if not is_mini_data(data.name) and folder.is_main_process:
        folder = folder._replace(notices=[*folder.notices, describe_training_data(data)])
    pipe, image_encoder, method = load_models(config, device)
    if config.per_subject:
        images = build_dreambooth_dataset(data.images, method, pipe, config.pipeline.model, config.finetuning, folder)
        data = data._replace(images=images)
    encoders = make_frozen_encoders(pipe, method)
    source, train_records, validation_set = make_data_split(config, data, encoders, folder)
    loader = make_loader(config, data, source, train_records, folder, rank, num_processes)
    noise_schedule, uncond = noise_schedule_from(pipe.scheduler).to(device), encoders.encode_uncond(method.uncond_features())
    if data.cache:
        encoders.offload()
    model = config.pipeline.model
    data_name = Path(redact_secrets(data.name)).name
    metadata = {"base": model, "method": config.method, "encoder": config.image_encoder or model, "data": data_name}
    return TrainingContext(
        pipe, model, image_encoder, method, encoders, noise_schedule, loader, source.make_batch, uncond, validation_set,
        metadata | method.metadata, folder,
    )  # fmt: skip


def open_run_folder(path: str, config: CheckpointConfig, rank: int) -> RunFolder:
    """The folder of a new or resumed run. Raises UserError where nothing can be written to it, or its run cannot be resumed."""
    folder = ensure_writable_folder(path)
    state, notices = find_resumable_state(folder) if config.resume_from_checkpoint == "latest" else (None, [])
    return RunFolder(folder, state, rank == 0, notices)


def check_same_run(folder: RunFolder, config: TrainConfig, data: OpenedData, num_processes: int) -> RunFolder:
    """The folder with what identifies the run. Raises UserError where the run in it is trained on something else."""
    dataset = data.cache.manifest.get("dataset_fingerprint", "") if data.cache else dataset_fingerprint(cast(Records, data.images))
    options = describe_run(config, num_processes, str(dataset))
    if config.checkpointing.resume_from_checkpoint == "never":
        return folder._replace(options=options)
    notices = check_run_options(folder.path, options, is_resumed=folder.state is not None)
    return folder._replace(options=options, notices=[*folder.notices, *notices])


def open_training_data(data: str, feature_cache: str | None, subjects: SubjectConfig) -> OpenedData:
    """Open the feature cache or the images; both for a cache of mini, because the validation images of mini are not in it.

    By subject, raises UserError for a stream, in which the images of a subject are far apart.
    """
    cache = FeatureCache(feature_cache) if feature_cache else None
    name, min_images = str(cache.manifest.get("data", "")) if cache else data, subjects.min_images_per_subject
    images = open_data(name) if cache is None or is_mini_data(name) else None
    if min_images and is_mini_data(name) and subjects.test_fraction:
        raise UserError("test_fraction: mini has a fixed test split; remove --test-fraction")
    if min_images and images is not None:
        if isinstance(images, ShardRecords):
            raise UserError(
                "min_images_per_subject: needs data with random access, received shards; encode them with --feature-cache FOLDER"
            )
        images = SubjectDataset(images, min_images)
    return OpenedData(name, cache, images)


def describe_training_data(data: OpenedData) -> str:
    """One line about captions and about what is not used of the data."""
    if data.cache:
        return f"feature cache: {describe_captions(summarize_cache(data.cache.folder)['captions'])}"
    images = data.images.records if isinstance(data.images, SubjectDataset) else cast(Records, data.images)
    return f"data: {describe_data(images)}"


def load_models(config: TrainConfig, device: torch.device) -> tuple[UNetPipeline, ImageEncoder | None, Method]:
    """The base pipeline, the image encoder (None for per-subject methods) and the method that is trained."""
    pipe = load_base_model(config.pipeline, config.runtime, device)
    pretrained = load_pretrained_adapter(config.adapter, config.method) if config.adapter else None
    image_encoder = None if config.per_subject else load_image_encoder(config.pipeline.model, config.image_encoder, pretrained, pipe)
    torch.manual_seed(config.runtime.seed)
    aggregation = config.subjects.aggregation
    return pipe, image_encoder, build_trainable_method(config.method, pipe, image_encoder, pretrained, config.finetuning, aggregation)


def load_base_model(config: PipelineConfig, runtime: RuntimeConfig, device: torch.device) -> UNetPipeline:
    """The pipeline in the precision of the training; its UNet recomputes activations where that is asked for."""
    dtype = resolve_mixed_precision(runtime.mixed_precision, device.type)
    pipe: UNetPipeline = load_pipeline(config.model, str(device), dtype, config.model_config)
    if runtime.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    else:
        pipe.unet.disable_gradient_checkpointing()
    return pipe


def load_pretrained_adapter(source: str, method: str) -> Pretrained:
    """An adapter to fine-tune. Raises UserError where it is not one of this method."""
    if METHODS[method].adapter_type is None:
        raise UserError(f"method: expected one of the ip-adapter family to fine-tune an adapter, received {method!r}")
    adapter, spec = load_for_finetuning(source)
    expected = METHOD_OF_ADAPTER_TYPE[spec.adapter_type]
    if method not in ("ip-adapter", expected):  # the first is the default of the option
        raise UserError(f"method: {source} is a {spec.adapter_type} adapter; expected {expected}, received {method}")
    return adapter, spec


def load_image_encoder(model: str, image_encoder: str | None, pretrained: Pretrained | None, pipe: UNetPipeline) -> ImageEncoder:
    """The image encoder that was named, or the one of the base model or the adapter, on the device of the UNet and in its dtype."""
    encoder = resolve_image_encoder(model, image_encoder, pretrained[1] if pretrained else None)
    encoder.model.to(pipe.unet.device, pipe.unet.dtype)  # type: ignore[arg-type]
    return encoder


def build_trainable_method(
    name: str, pipe: UNetPipeline, image_encoder: ImageEncoder | None, pretrained: Pretrained | None, config: FinetuningConfig,
    aggregation: str,
) -> Method:  # fmt: skip
    """The method with new weights, or with those of an adapter. Raises UserError where it does not fit base model or encoder."""
    if pretrained and image_encoder:
        adapter, spec = pretrained
        ImagePromptEncoder(adapter, spec, image_encoder)  # raises UserError where they do not fit
        check_compatible(adapter, pipe.unet)
        method: Method = IPAdapter(pipe.unet, image_encoder, adapter)
    elif name == "inversion":
        method = TextualInversion.create(pipe, config.class_noun, config.instance_token)
    else:
        method = build_method(name, pipe, image_encoder)
    if aggregation != "auto":
        cast(IPAdapter, method).set_aggregator(aggregation)
    if METHODS[name].per_subject:
        method.metadata |= {"noun": config.class_noun, "token": config.instance_token}
    method.module.to(pipe.unet.device).requires_grad_(True)
    return method


def make_frozen_encoders(pipe: UNetPipeline, method: Method) -> FrozenEncoders:
    """The encoders of the base model, with the feature encoder of the method."""
    inversion = method if isinstance(method, TextualInversion) else None
    return FrozenEncoders(pipe, method.encoder, patches=method.uses_patch_features, inversion=inversion)


def build_dreambooth_dataset(
    images: Records | None, method: Method, pipe: UNetPipeline, model: str, config: FinetuningConfig, folder: RunFolder
) -> DreamBoothDataset:
    """Images of one subject, and images of its class, of which the base model generates those that do not exist yet."""
    if not isinstance(images, MapRecords) or len(images) > MAX_SUBJECT_IMAGES:
        received = f"{len(images)} images" if isinstance(images, MapRecords) else "a stream of shards"
        expected = f"a folder or a list of them, at most {MAX_SUBJECT_IMAGES}"
        raise UserError(f"{method.name} is fine-tuned on a few images of one subject: expected {expected}; received {received}")
    class_images: list[Path] = []
    if config.num_class_images > 0 and method.name != "inversion":
        class_folder = ensure_writable_folder(config.class_data_dir or folder.path / "class")
        class_images = list(generate_class_images(pipe, model, config.class_noun, config.num_class_images, class_folder))
    prompt = format_instance_prompt(config.instance_token, "" if method.name == "inversion" else config.class_noun)
    instance_images = [images[i].target for i in range(len(images))]
    class_prompt = format_class_prompt(config.class_noun)
    dataset = DreamBoothDataset(instance_images, prompt, class_images, class_prompt, config.prior_loss_weight)
    manifest = {"class_noun": config.class_noun, "instance_token": config.instance_token, "images": dataset.image_checksums()}
    folder.check_manifest("subject.json", manifest, "the images, --class-noun and --instance-token")
    return dataset


def make_data_sources(
    data: OpenedData, encoders: FrozenEncoders, config: DataConfig, subjects: SubjectConfig
) -> tuple[DataSource, DataSource]:
    """The source of the training, and that of the validation: the images, where there are any, otherwise the same."""
    transform = make_transform_config(config, encoders.pipe, subjects.min_distinct_references)
    image_source = None if data.images is None else DataSource.from_images(data.images, transform, encoders)
    source = DataSource.from_cache(data.cache, encoders, config.num_references, subjects) if data.cache else cast(DataSource, image_source)
    return source, image_source or source


def make_data_split(
    config: TrainConfig, data: OpenedData, encoders: FrozenEncoders, folder: RunFolder
) -> tuple[DataSource, Records, ValidationSet]:
    """The source of the training with the records that are trained on, and what is validated on."""
    by_subject, seed = bool(config.subjects.min_images_per_subject), config.runtime.seed
    if data.cache:
        check_cache_encoders(data.cache, encoders, config.method, config.pipeline.model, by_subject=by_subject)
    source, validation_source = make_data_sources(data, encoders, config.dataset, config.subjects)
    num_images, test_fraction = config.validation.num_validation_images, config.subjects.test_fraction
    validation_records, train_records = split_validation(validation_source.records, num_images, test_fraction, seed)
    train_records = train_records if source is validation_source else source.records
    if by_subject:
        check_same_split(folder, source.records, train_records, config.subjects, seed)
    batch_size = config.optimization.train_batch_size
    return source, train_records, validation_source.make_validation_set(validation_records, batch_size, is_test_split=by_subject)


def make_loader(
    config: TrainConfig, data: OpenedData, source: DataSource, train_records: Records, folder: RunFolder, rank: int, num_processes: int
) -> Loader[Any]:
    """The batches of this process; records that cannot be read are listed in the folder of the run."""
    error_budget = ErrorBudget(config.dataset.max_unreadable_fraction, folder.path / f"unreadable-{rank}.tsv")
    report_unreadable(data.images, train_records, error_budget)
    return Loader(
        train_records, source.make_item, batch_size=config.optimization.train_batch_size, seed=config.runtime.seed, rank=rank,
        world_size=num_processes, workers=config.dataset.dataloader_num_workers, error_budget=error_budget,
        batch_key=lambda item: item.shape, rebuild_item=source.rebuild_item,
    )  # fmt: skip


def report_unreadable(images: Records | None, train_records: Records, error_budget: ErrorBudget) -> None:
    """Count the records that were unreadable when they were grouped by subject, and those that will be when shards are read."""
    if isinstance(images, SubjectDataset) and images.unreadable:
        error_budget.total += len(images.records) - len(images.unreadable)
        for key, reason in images.unreadable.items():
            error_budget.record_failure(key, reason)
    if isinstance(train_records, WebDatasetShards):
        train_records.on_unreadable = error_budget.record_failure


def check_same_split(folder: RunFolder, records: Records, train_records: Records, config: SubjectConfig, seed: int) -> None:
    """Record which subjects are trained and tested on. Raises UserError where the run that is resumed had another split."""
    train_subjects = sorted(cast(SubjectDataset, train_records).subjects)
    test_subjects = sorted(set(cast(SubjectDataset, records).subjects) - set(train_subjects))
    manifest = {
        "min_images_per_subject": config.min_images_per_subject, "test_fraction": config.test_fraction, "seed": seed,
        "train": train_subjects, "test": test_subjects,
    }  # fmt: skip
    folder.check_manifest("subjects.json", manifest, "the data, --min-images-per-subject, --test-fraction and --seed")


def split_validation(records: Records, num_images: int, test_fraction: float, seed: int) -> tuple[list[Record], Records]:
    """The validation records, and those to train on.

    By subject, the validation images are of test subjects, one of each; those of mini are of its test split. The first records of
    a stream, and some of a very small dataset, are used for both.
    """
    if isinstance(records, SubjectDataset) and not isinstance(records.records, MiniWorld):
        subjects = list(records.subjects)
        train_subjects, test_subjects = split_subjects(subjects, test_fraction, seed) if test_fraction else (subjects, [])
        candidates = records.subset(test_subjects or train_subjects)
        firsts = [n for n in range(len(candidates)) if n == 0 or candidates.get_subject(n) != candidates.get_subject(n - 1)]
        return [candidates[n] for n in firsts[:num_images]], records.subset(train_subjects)
    world = records.records if isinstance(records, SubjectDataset) else records
    if isinstance(world, MiniWorld):
        per_subject = world.images_per_subject
        test_split: MapRecords = MiniWorld(
            max(num_images, 1) * per_subject, held_out=True, images_per_subject=per_subject, describe_appearance=world.describe_appearance
        )
        if isinstance(records, SubjectDataset):
            test_split = SubjectDataset(test_split, records.min_images)
        return [test_split[i * per_subject] for i in range(num_images)], records
    if isinstance(records, MapRecords):
        selected = random.Random(VALIDATION_SEED).sample(range(len(records)), min(num_images, len(records)))
        return [records[i] for i in selected], records if len(records) < 8 * num_images else Subset(records, selected)
    stream = (record for shard in records.shards for record in records.read_shard(shard))
    return list(islice(stream, num_images)), records
