"""`imprompt train` and `imprompt encode`."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from imprompt.cli.console import ProgressDisplay, format_duration, print_json, print_location, progress_bar, silence_third_party_logs
from imprompt.cli.launch import launch, watch_launcher
from imprompt.config import EncodeConfig, TrainConfig
from imprompt.errors import UserError
from imprompt.utils.signals import Interrupted, StopRequest, explain_interrupt
from imprompt.utils.text import escape

MAX_LISTED_RECORDS = 10  # skipped records that are listed


def run_train(config: TrainConfig, *, json: bool) -> None:
    """Train, show rate and metrics, and print where the adapter is."""
    config = config.with_defaults()
    if (config.runtime.num_processes > 1 or config.runtime.deepspeed) and "LOCAL_RANK" not in os.environ:
        raise SystemExit(launch(config.runtime.num_processes))
    watch_launcher()
    is_main = os.environ.get("RANK", "0") == "0"
    silence_third_party_logs()
    stop = StopRequest()
    with progress_bar(f"loading {config.pipeline.model}", show=is_main) as progress:
        last = _train(config, progress, stop, is_main=is_main)
    _shutdown_distributed()
    if last and last.index < last.max_train_steps:
        text = f"the state of step {last.index} is saved in {config.output_dir}, and the same command continues from there"
        raise Interrupted(stop.signum or signal.SIGTERM, text)
    if not is_main:
        return
    adapter, page = (Path(config.output_dir) / name for name in ("adapter.safetensors", "index.html"))
    if json:
        metrics = last.validation.metrics if last and last.validation else {}
        step = last.index if last else config.optimization.max_train_steps
        print_json(adapter=str(adapter), page=str(page), step=step, **metrics)
        return
    print(escape(adapter))
    print_location(page if page.exists() else adapter, config.output_dir)


def _train(config: TrainConfig, progress: ProgressDisplay, stop: StopRequest, *, is_main: bool) -> Any:
    """The last step; None where the run was complete before. A signal ends the run after a step, and its state is saved."""
    from imprompt.training import EncodingProgress, log_steps, start_training

    def on_encoding(at: EncodingProgress) -> None:
        progress.rename("encoding")
        progress.advance(at.chunks, at.total, f"{at.records} records")

    steps, report = start_training(config, on_encoding, progress.log, lambda: bool(stop))
    if is_main and report:
        for warning in report.warnings:
            progress.log(f"warning: {warning}")
        total = config.optimization.max_train_steps
        seconds = report.seconds_per_step * total * config.optimization.gradient_accumulation_steps
        progress.log(
            f"{report.num_parameters / 1e6:.1f} M trainable parameters; one batch: "
            f"loss {report.loss_before:.4f} → {report.loss_after:.4f}; "
            f"about {format_duration(seconds)} for {total} steps, {report.peak_bytes / 2**30:.1f} GiB peak memory"
        )
    progress.rename("training")
    last = None
    with stop.requests():
        try:
            for last in log_steps(config, steps) if is_main else steps:
                progress.advance(last.index, last.max_train_steps, f"loss {last.loss:.4f} · {last.images_per_second:.1f} images/s")
                if last.validation:
                    progress.log(f"step {last.index}: " + ", ".join(f"{k} {v:.4f}" for k, v in last.validation.metrics.items()))
        except RuntimeError as error:
            if not stop:
                raise
            # Another process, which was not in its loop yet, ended at the signal.
            raise Interrupted(stop.signum, "the same command continues from the last state that was saved") from error
    return last


def run_encode(config: EncodeConfig, *, json: bool) -> None:
    """Fill a feature cache, and print what is in it."""
    config = config.with_defaults()
    rank, num_ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if config.num_processes > 1 and "LOCAL_RANK" not in os.environ:
        if code := launch(config.num_processes):
            raise SystemExit(code)
    else:
        watch_launcher()
        with explain_interrupt("the chunks that are complete are kept, and the same command continues"):
            _encode(config, rank, num_ranks)
        if num_ranks > 1:
            return
    from imprompt.data.feature_cache import summarize_cache
    from imprompt.data.survey import describe_captions

    cache = summarize_cache(Path(config.output_dir))
    if not cache["records"]:
        key, reason = next(iter(cache["unreadable"].items()), ("", "it is empty"))
        raise UserError(f"no record of {config.dataset.data} could be encoded ({': '.join(filter(None, (key, reason)))})")
    if json:
        print_json(**cache)
        return
    print(f"{config.output_dir}: {cache['records']:,} records in {cache['chunks']:,} chunks, {cache['bytes'] / 2**20:,.0f} MiB")
    if cache["captions"]:
        print(escape(describe_captions(cache["captions"])))
    for key, reason in list(cache["unreadable"].items())[:MAX_LISTED_RECORDS]:
        print(f"skipped: {escape(key)}: {escape(reason)}")
    if len(cache["unreadable"]) > MAX_LISTED_RECORDS:
        print(f"… and {len(cache['unreadable']) - MAX_LISTED_RECORDS} more: {config.output_dir}/unreadable-*.tsv")


def _encode(config: EncodeConfig, rank: int, num_ranks: int) -> None:
    silence_third_party_logs()
    with progress_bar("encoding", show=rank == 0) as progress:
        from imprompt.training import encode_dataset
        from imprompt.utils.memory import explain_oom

        start = time.monotonic()
        with explain_oom("take a smaller --batch-size"):
            for at in encode_dataset(config, rank, num_ranks):
                progress.advance(at.chunks, at.total, f"{at.records} records · {at.records / (time.monotonic() - start):.1f}/s")


def _shutdown_distributed() -> None:
    """Leave the process group in order: a process that only ends may take another one down with it."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
