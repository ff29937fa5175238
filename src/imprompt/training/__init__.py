"""Training an adapter: objective, loop, checkpoints, validation and log."""

from collections.abc import Callable, Iterator
from pathlib import Path

from imprompt.config import METHODS, TrainConfig
from imprompt.config.training import ValidationConfig
from imprompt.training.checkpointing import CheckpointManager, list_checkpoints
from imprompt.training.loop import Trainer, TrainStep, make_accelerator, run_training_loop, start_trackers
from imprompt.training.precompute import EncodingProgress, fill_feature_cache
from imprompt.training.precompute import encode_dataset as encode_dataset
from imprompt.training.run_log import log_steps as log_steps
from imprompt.training.sanity_check import SanityReport, run_sanity_check
from imprompt.training.setup import TrainingContext, setup_training
from imprompt.utils.memory import explain_oom

OUT_OF_MEMORY_ADVICE = (
    "reduce --train-batch-size and raise --gradient-accumulation-steps, or add --gradient-checkpointing, or train from a --feature-cache"
)


def train_adapter(config: TrainConfig) -> Iterator[TrainStep]:
    """Train an adapter and yield every optimizer step; the adapter is in `config.output_dir` when the generator ends.

    A run in that folder is continued, unless `resume_from_checkpoint` is "never". Raises UserError for what the user can correct.
    """
    steps, _ = start_training(config)
    yield from steps


def start_training(
    config: TrainConfig, on_progress: Callable[[EncodingProgress], None] | None = None
) -> tuple[Iterator[TrainStep], SanityReport | None]:
    """Do everything that comes before the first step: the steps, and the report of the sanity check of a new run.

    `on_progress` is called while the feature cache is filled. Raises UserError for what the user can correct.
    """
    config = config.with_defaults()
    with explain_oom(OUT_OF_MEMORY_ADVICE):
        accelerator = make_accelerator(config.pipeline.device, config.runtime, config.optimization, config.output_dir)
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        if config.feature_cache:
            for progress in fill_feature_cache(config.encode_config(), config.adapter, rank, num_processes):
                if on_progress:
                    on_progress(progress)
        accelerator.wait_for_everyone()
        context = setup_training(config, accelerator.device, rank, num_processes)
        report = _run_sanity_check(config, context)
        start_trackers(accelerator, config.output_dir, config.to_options())
        trainer = Trainer(accelerator, context, config.optimization, config.loss)
        checkpoints = CheckpointManager(Path(config.output_dir), config.checkpointing, accelerator, context.loader, context.metadata)
    return _run(context, trainer, checkpoints, config.validation), report


def _run(context: TrainingContext, trainer: Trainer, checkpoints: CheckpointManager, config: ValidationConfig) -> Iterator[TrainStep]:
    try:
        with explain_oom(OUT_OF_MEMORY_ADVICE):
            yield from run_training_loop(context, trainer, checkpoints, config)
    finally:
        context.method.remove_from_unet()


def _run_sanity_check(config: TrainConfig, context: TrainingContext) -> SanityReport | None:
    """The report on a new run; None where it is resumed or not asked for."""
    is_new = config.checkpointing.resume_from_checkpoint == "never" or not list_checkpoints(Path(config.output_dir))
    if not (config.runtime.sanity_check and is_new):
        return None
    try:
        return run_sanity_check(context, config.optimization.learning_rate, trains_unet=METHODS[config.method].trains_unet)
    finally:
        context.method.remove_from_unet()
