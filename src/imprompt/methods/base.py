"""What a method is: it rewrites a call of the denoiser. Trainer and evaluator know only this."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn


class Method(Protocol):
    """One system in training and in use.

    `module` holds all that is trained; its `state_dict` is the file, in the layout that others read.
    `grid` says which features of the image encoder it reads.
    """

    name: str
    grid: bool
    module: nn.Module

    def denoise(self, x: Tensor, time: Tensor, text: Tensor, image: Tensor, **extra: Any) -> Tensor:
        """The prediction in training. text: (batch, tokens, cross); image: (batch, references, patches, features)."""
        ...

    def release(self) -> None:
        """Leave the UNet as it was found."""
        ...

    def attached(self, pipe: Any, image: Tensor, null: Tensor, scale: float = 1.0) -> AbstractContextManager[Any]:
        """In use: within the context the pipeline draws after these features."""
        ...
