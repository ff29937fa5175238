"""Training an adapter: objective, loop, checkpoints, validation and log."""

import logging
from collections.abc import Callable, Iterator

from accelerate import Accelerator

from imprompt.config import METHODS, TrainConfig
from imprompt.config.training import ValidationConfig
from imprompt.training.checkpointing import CheckpointManager
from imprompt.training.loop import Trainer, TrainStep, make_accelerator, run_training_loop, start_trackers
from imprompt.training.precompute import EncodingProgress, fill_feature_cache
from imprompt.training.precompute import encode_dataset as encode_dataset
from imprompt.training.run_log import log_steps as log_steps
from imprompt.training.run_options import write_run_options
from imprompt.training.sanity_check import SanityReport, run_sanity_check
from imprompt.training.setup import TrainingContext, setup_training
from imprompt.utils.files import FolderLock, ensure_writable_folder
from imprompt.utils.memory import explain_oom

_logger = logging.getLogger(__name__)
OUT_OF_MEMORY_ADVICE = (
    "reduce --train-batch-size and raise --gradient-accumulation-steps, or add --gradient-checkpointing, or train from a --feature-cache"
)


def train_adapter(config: TrainConfig) -> Iterator[TrainStep]:
    """Train an adapter and yield every optimizer step; the adapter is in `config.output_dir` when the generator ends.

    A run in that folder is continued from its last checkpoint, unless `resume_from_checkpoint` is "never"; that, and options that
    changed, are logged. Raises UserError for what the user can correct, also where that run was trained on something else.
    """
    steps, _ = start_training(config)
    yield from steps


def start_training(
    config: TrainConfig,
    on_progress: Callable[[EncodingProgress], None] = lambda progress: None,
    on_notice: Callable[[str], None] = _logger.warning,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Iterator[TrainStep], SanityReport | None]:
    """Do everything that comes before the first step: the steps, and the report of the sanity check of a new run.

    `on_progress` is called while the feature cache is filled, `on_notice` with what is to be known about a run that is resumed.
    Where `should_stop()` is true, the state is saved and the steps end. Raises UserError for what the user can correct.
    """
    config = config.with_defaults()
    with explain_oom(OUT_OF_MEMORY_ADVICE):
        accelerator = make_accelerator(config.pipeline.device, config.runtime, config.optimization, config.output_dir)
        lock = FolderLock(ensure_writable_folder(config.output_dir), "training") if accelerator.is_main_process else None
        try:
            context, report = _set_up(config, accelerator, on_progress)
            trainer = Trainer(accelerator, context, config.optimization, config.loss)
            checkpoints = CheckpointManager(context.run_folder.path, config.checkpointing, trainer, context.metadata)
            _resume(context, trainer, checkpoints, on_notice)
        except BaseException:
            if lock:
                lock.release()
            raise
    return _run(trainer, checkpoints, config.validation, should_stop, lock), report


def _set_up(
    config: TrainConfig, accelerator: Accelerator, on_progress: Callable[[EncodingProgress], None]
) -> tuple[TrainingContext, SanityReport | None]:
    """Fill the feature cache, load the data and all models, and try a new run."""
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    if config.feature_cache:
        for progress in fill_feature_cache(config.encode_config(), config.adapter, rank, num_processes):
            on_progress(progress)
    accelerator.wait_for_everyone()
    context = setup_training(config, accelerator.device, rank, num_processes)
    report = _run_sanity_check(config, context)
    start_trackers(accelerator, config.output_dir, config.to_options())
    return context, report


def _resume(context: TrainingContext, trainer: Trainer, checkpoints: CheckpointManager, on_notice: Callable[[str], None]) -> None:
    """Continue from the state in the run's folder, if there is one, and say so."""
    folder = context.run_folder
    checkpoints.resume_or_clear(folder.state)
    if folder.is_main_process:
        write_run_options(folder.path, folder.options)
        for notice in folder.notices:
            on_notice(notice)
        step, max_steps = trainer.state.step, trainer.max_steps
        if folder.state:
            on_notice(f"already complete: {step} of {max_steps} steps" if trainer.is_finished else f"resuming from step {step}")


def _run(
    trainer: Trainer,
    checkpoints: CheckpointManager,
    config: ValidationConfig,
    should_stop: Callable[[], bool],
    lock: FolderLock | None,
) -> Iterator[TrainStep]:
    try:
        with explain_oom(OUT_OF_MEMORY_ADVICE):
            yield from run_training_loop(trainer.context, trainer, checkpoints, config, should_stop)
    finally:
        trainer.context.method.remove_from_unet()
        if lock:
            lock.release()


def _run_sanity_check(config: TrainConfig, context: TrainingContext) -> SanityReport | None:
    """The report on a new run; None where it is resumed or not asked for."""
    if context.run_folder.state or not config.runtime.sanity_check:
        return None
    try:
        return run_sanity_check(context, config.optimization.learning_rate, trains_unet=METHODS[config.method].trains_unet)
    finally:
        context.method.remove_from_unet()
