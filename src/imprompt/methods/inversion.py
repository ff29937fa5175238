"""Textual Inversion (arXiv:2208.01618): new words for the text encoders, learned from photographs of one subject; all else is frozen."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprompt.data.dreambooth import named
from imprompt.errors import UserError
from imprompt.methods.base import speaking_for
from imprompt.models.image_encoders import Encoder, NothingEncoder

TOKEN = "<subject>"
VECTORS = 4
_PARTS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))  # names in a pipeline: which tokenizer serves which encoder


class Words(nn.Module):
    """The vectors of the new words, (vectors, width) for each text encoder.

    Their names are those in files that `pipe.load_textual_inversion` reads: the placeholder where there is one encoder
    (SD 1.5, SD 2.1), `clip_l` and `clip_g` where there are two (SDXL; diffusers takes these one by one).
    """

    def __init__(self, token: str, widths: list[int], vectors: int):
        super().__init__()
        self.names = [token] if len(widths) == 1 else ["clip_l", "clip_g"]
        for name, width in zip(self.names, widths, strict=True):
            self.register_parameter(name, nn.Parameter(torch.zeros(vectors, width)))

    def rows(self) -> list[nn.Parameter]:
        return [self.get_parameter(name) for name in self.names]

    def forward(self, unet: Callable[..., Any], x: Tensor, time: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """The words have had their say in the text already."""
        return cast(Tensor, unet(x, time, text, return_dict=False, **extra)[0])


class Inversion:
    """The subject's name is a placeholder, which stands for the new words.

    Texts are encoded within `spoken`, in training with gradient: the trainer looks for `speaks`. Where a text encoder's
    `eos_token_id` is 2, as in older configurations, transformers takes the pooled text at the last new word; so does diffusers
    with the same file.
    """

    name = "inversion"
    grid = False
    speaks = True

    def __init__(self, pipe: Any, token: str = TOKEN, vectors: int = VECTORS):
        self.unet, self.token = pipe.unet, token
        self.encoder: Encoder = NothingEncoder()
        self.about = {"token": token, "vectors": str(vectors)}
        self.parts = [part for part in _PARTS if getattr(pipe, part[1], None) is not None]
        spoken = [f"{token}_{i}" if i else token for i in range(vectors)]  # as diffusers names them
        self.tokenizers = [_with_words(getattr(pipe, name), spoken) for name, _ in self.parts]
        widths = [getattr(pipe, name).get_input_embeddings().embedding_dim for _, name in self.parts]
        self.words = Words(token, widths, vectors)
        self.module: nn.Module = self.words  # the trainer may wrap it

    @classmethod
    def create(cls, pipe: Any, word: str = "thing", token: str = TOKEN, vectors: int = VECTORS) -> "Inversion":
        """Untrained: every vector is what the text encoder makes of a word, such as the subject's class."""
        found = cls(pipe, token, vectors)
        found.start(pipe, word)
        return found

    @torch.no_grad()
    def start(self, pipe: Any, word: str) -> None:
        """Begin with this word: the mean over its tokens."""
        for (tokenizer, encoder), rows in zip(self.parts, self.words.rows(), strict=True):
            ids = getattr(pipe, tokenizer)(word, add_special_tokens=False).input_ids
            if not ids:
                raise UserError(f"expected a word that says roughly what the subject is, such as dog; received {word!r}")
            table = getattr(pipe, encoder).get_input_embeddings().weight
            rows.copy_(table[ids].float().mean(0).expand_as(rows))

    def said(self, text: str) -> str:
        """A text about the noun as one about the subject: "a cat on a beach" → "a <subject> on a beach"."""
        return named(text, self.about.get("noun", ""), self.token, alone=True)

    def null(self) -> Tensor:
        return self.encoder.null(self.grid)

    def denoise(self, x: Tensor, time: Tensor, text: Tensor, image: Tensor, **extra: Any) -> Tensor:
        return cast(Tensor, self.module(self.unet.forward, x, time, text, **extra))

    def release(self) -> None:
        """Nothing was placed in the UNet."""

    def attached(self, pipe: Any, image: Tensor, null: Tensor, scale: float = 1.0) -> AbstractContextManager[None]:
        """A word is said or not: there is no scale."""
        return self.spoken(pipe)

    @contextmanager
    def spoken(self, pipe: Any) -> Iterator[None]:
        """Within the context the pipeline knows the placeholder; afterwards it is as it was."""
        with ExitStack() as stack:
            for (name, encoder), tokenizer, rows in zip(self.parts, self.tokenizers, self.words.rows(), strict=True):
                stack.callback(setattr, pipe, name, getattr(pipe, name))
                setattr(pipe, name, tokenizer)
                stack.enter_context(_looked_up(getattr(pipe, encoder).get_input_embeddings(), len(tokenizer) - len(rows), rows))
            yield


def _with_words(tokenizer: Any, words: list[str]) -> Any:
    """A copy of the tokenizer that knows these words. Raises UserError for a placeholder that it cannot learn."""
    longer = copy.deepcopy(tokenizer)
    token = words[0]
    known = "." in token or len(token.split()) != 1 or len(tokenizer.tokenize(token)) == 1
    if known or longer.add_tokens(words) != len(words) or token not in longer.tokenize(f"a {token} here"):
        raise UserError(f"token: expected a new word without dots and spaces, such as {TOKEN}; received {token!r}")
    return longer


def _looked_up(table: nn.Embedding, first: int, rows: Tensor) -> AbstractContextManager[None]:
    """Within the context token ids from `first` on are looked up in `rows`, with gradient."""
    own = table.forward

    def forward(input: Tensor) -> Tensor:
        new = input >= first
        learned = F.embedding((input - first).clamp(min=0), rows).to(table.weight.dtype)
        return torch.where(new[..., None], learned, own(input.masked_fill(new, 0)))

    return speaking_for(table, forward)
