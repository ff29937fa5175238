"""`imprompt.train`: training from plain values."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from imprompt.config import TrainConfig
from imprompt.config.common import keyword_signature

if TYPE_CHECKING:
    from imprompt.training.loop import TrainStep


def train(**options: Any) -> "Iterator[TrainStep]":
    """Train an adapter; yields every optimizer step, with its loss, and at times validation metrics and a checkpoint.

    The keywords are the options of `imprompt train`; an option left at None takes a value that suits the base model and
    the method. The run is in the folder `output_dir`, and the adapter in `output_dir`/adapter.safetensors when the
    generator ends; a run found in that folder is continued. Raises `imprompt.UserError` for anything that cannot be used.
    """
    from imprompt.training import train_adapter

    yield from train_adapter(TrainConfig.from_options(**options))


train.__signature__ = keyword_signature(train, TrainConfig)  # type: ignore[attr-defined]
