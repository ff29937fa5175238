"""What a method is: it rewrites a call of the denoiser. Trainer and evaluator know only this.

`Method` is the protocol. Most methods are `Rewriter`s: a `Rewriting` module says what it makes of the image features
and how it then calls the denoiser, and the same two functions serve training and drawing.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from imprompt.core import guidance
from imprompt.errors import UserError
from imprompt.models.image_encoders import Encoder

Given = dict[str, Tensor]  # what a call needs of the pictures; each tensor has a row for each prompt


class Method(Protocol):
    """One system in training and in use.

    `module` holds all that is trained; its `state_dict` is the file, in the layout that others read.
    `encoder` turns pictures into what the method reads, and `grid` says which of its features. `about` is what the file is
    to say beside its tensors.
    """

    name: str
    encoder: Encoder
    grid: bool
    module: nn.Module
    about: dict[str, str]

    def null(self) -> Tensor:
        """The features of no picture, (1, patches, features)."""
        ...

    def denoise(self, x: Tensor, time: Tensor, text: Tensor, image: Tensor, **extra: Any) -> Tensor:
        """The prediction in training. text: (batch, tokens, cross); image: (batch, references, patches, features)."""
        ...

    def release(self) -> None:
        """Leave the UNet as it was found."""
        ...

    def attached(self, pipe: Any, image: Tensor, null: Tensor, scale: float = 1.0) -> AbstractContextManager[Any]:
        """In use: within the context the pipeline draws after these features."""
        ...


class Rewriting(nn.Module):
    """What a method trains, and how it rewrites the denoiser's call."""

    shared: tuple[str, ...] = ()  # what of `given` unconditional rows get too

    def given(self, image: Tensor) -> Given:
        """From image features, (batch, references, patches, features), to what the call needs."""
        raise NotImplementedError

    def call(self, unet: Callable[..., Any], x: Tensor, time: Tensor, text: Tensor, given: Given, **extra: Any) -> Tensor:
        """The prediction. `unet` is the base's own; time: (batch,)."""
        raise NotImplementedError

    def weighed(self, nothing: Given, heard: Given, scale: float) -> Given:
        """λ where a method has none of its own: the way from no picture to the picture."""
        if scale == 1:
            return heard
        return {name: nothing[name] + scale * (value - nothing[name]) for name, value in heard.items()}

    def forward(self, unet: Callable[..., Any], x: Tensor, time: Tensor, text: Tensor, image: Tensor, **extra: Any) -> Tensor:
        return self.call(unet, x, time, text, self.given(image), **extra)


class Rewriter:
    """A method made of a `Rewriting` module, a UNet and the encoder that it reads."""

    def __init__(self, name: str, unet: Any, encoder: Encoder, module: Rewriting, grid: bool = False, nothing: Tensor | None = None):
        self.name, self.unet, self.encoder, self.grid = name, unet, encoder, grid
        self.module: nn.Module = module
        self.rewriting = module
        self._nothing = nothing
        self.about: dict[str, str] = {}

    def null(self) -> Tensor:
        return self.encoder.null(self.grid) if self._nothing is None else self._nothing

    def denoise(self, x: Tensor, time: Tensor, text: Tensor, image: Tensor, **extra: Any) -> Tensor:
        return cast(Tensor, self.module(self.unet.forward, x, time, text, image, **extra))

    def release(self) -> None:
        """Nothing was placed in the UNet."""

    @contextmanager
    def attached(self, pipe: Any, image: Tensor, null: Tensor, scale: float = 1.0) -> Iterator[None]:
        unet, module = pipe.unet, self.rewriting
        own = unet.forward
        with torch.no_grad():
            nothing = module.given(null.expand(1, image.shape[1], -1, -1))
            heard = module.weighed(nothing, module.given(image), scale)

        def rewritten(
            sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, return_dict: bool = True, **extra: Any
        ) -> tuple[Tensor]:
            groups = guidance.guidance_groups(pipe)
            rows = {
                name: guidance.spread((heard if name in module.shared else nothing)[name], value, groups, len(sample))
                for name, value in heard.items()
            }
            time = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
            more = {name: value for name, value in extra.items() if value is not None}
            return (module.call(own, sample, time, encoder_hidden_states, rows, **more),)

        with speaking_for(unet, rewritten):
            yield


@contextmanager
def speaking_for(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context calls of the module go to `forward`."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:  # offloading has one of its own there
            module.forward = before


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def pooled(image: Tensor) -> Tensor:
    """The first reference's pooled embedding: (batch, references, 1, features) → (batch, features)."""
    return image[:, 0, 0]


def absent(image: Tensor) -> Tensor:
    """Which rows stand for no picture, their features being zeros: (batch,) of bool."""
    return (image == 0).flatten(1).all(1)


def grown(unet: Any, **changes: Any) -> UNet2DConditionModel:
    """A copy of a UNet in float32, to be trained, with further inputs. Outlets of new parts are small: it starts much as the base.

    Raises UserError for a UNet that has such inputs already.
    """
    if unet.config.addition_embed_type or unet.config.class_embed_type:
        raise UserError("this method gives a UNet new inputs: expected SD 1.5, SD 2.1 or mini as the base; choose an adapter for this one")
    known = {name: value for name, value in unet.config.items() if not name.startswith("_")}  # one lists what not to take over
    made = UNet2DConditionModel.from_config({**known, **changes})
    missing, _ = made.load_state_dict(unet.state_dict(), strict=False)
    with torch.no_grad():
        for name in missing:
            weight = made.get_parameter(name)
            if name.startswith("encoder_hid_proj.text_proj."):  # the text goes through as it is
                weight.copy_(torch.eye(len(weight)) if weight.ndim == 2 else torch.zeros(len(weight)))
            elif re.search(OUTLETS, name):
                weight.mul_(0.1)
    if unet.is_gradient_checkpointing:
        made.enable_gradient_checkpointing()
    return made.float().train()


# New parts whose output is added to, or laid beside, what was there.
OUTLETS = r"^class_embedding(\.linear_2)?\.(weight|bias)$|^add_embedding\.(text_norm|image_proj)\.|^encoder_hid_proj\.image_embeds\."


class FineTuned(Rewriting):
    """A method that trains the whole UNet."""

    def __init__(self, unet: Any, **changes: Any):
        super().__init__()
        self.unet = grown(unet, **changes)

    def own(self, x: Tensor, time: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """A call of the copy, in its own precision."""
        dtype = dtype_of(self.unet)
        extra = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in extra.items()}
        return cast(Tensor, self.unet(x.to(dtype), time, text.to(dtype), **extra).sample).to(x.dtype)
