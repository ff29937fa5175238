"""Textual Inversion (Gal et al., 2022, arXiv:2208.01618): token embeddings of a placeholder, trained on images of one subject."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from imprompt.errors import UserError
from imprompt.methods.base import UNetForward, patched_forward
from imprompt.methods.prompt_templates import insert_subject_token
from imprompt.models.image_encoders import FeatureEncoder, NullEncoder
from imprompt.utils.protocols import UNetPipeline

PLACEHOLDER_TOKEN = "<subject>"
NUM_VECTORS = 4
_COMPONENTS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))  # attributes of a pipeline; SDXL has both pairs


class PlaceholderEmbeddings(nn.Module):
    """The embeddings of the placeholder's tokens, (vectors, width) for each text encoder.

    Their names are those in files that `pipe.load_textual_inversion` reads: the placeholder for one text encoder (SD 1.5, SD 2.1),
    `clip_l` and `clip_g` for two (SDXL; diffusers loads these one by one).
    """

    def __init__(self, token: str, widths: list[int], num_vectors: int):
        super().__init__()
        self.names = [token] if len(widths) == 1 else ["clip_l", "clip_g"]
        for name, width in zip(self.names, widths, strict=True):
            if hasattr(self, name):
                raise UserError(f"token: expected a new word, such as {PLACEHOLDER_TOKEN}; received {token!r}")
            self.register_parameter(name, nn.Parameter(torch.zeros(num_vectors, width)))

    @property
    def vectors(self) -> list[nn.Parameter]:
        """The embeddings for each text encoder."""
        return [self.get_parameter(name) for name in self.names]

    def forward(self, unet: UNetForward, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, **unet_kwargs: object) -> Tensor:
        """The UNet's prediction. The embeddings have entered through the prompt embeddings."""
        return cast(Tensor, unet(latents, timesteps, prompt_embeds, return_dict=False, **unet_kwargs)[0])


class TextualInversion:
    """A placeholder in the prompt stands for the subject, and only the embeddings of its tokens are trained.

    Prompts are encoded within `with_placeholder_tokens`, in training with gradient (`trains_text_embeds`). Where a text encoder's
    `eos_token_id` is 2, as in older configurations, transformers takes the pooled embedding at the last placeholder token; diffusers
    with the same file does so too.
    """

    name = "inversion"
    uses_patch_features = False
    trains_text_embeds = True

    def __init__(self, pipe: UNetPipeline, token: str = PLACEHOLDER_TOKEN, num_vectors: int = NUM_VECTORS):
        self.unet, self.token = pipe.unet, token
        self.encoder: FeatureEncoder = NullEncoder()
        self.metadata = {"token": token, "vectors": str(num_vectors)}
        self._components = [names for names in _COMPONENTS if getattr(pipe, names[1], None) is not None]
        tokens = [f"{token}_{i}" if i else token for i in range(num_vectors)]  # named as in diffusers
        self._tokenizers = [_extend_tokenizer(getattr(pipe, tokenizer), tokens) for tokenizer, _ in self._components]
        widths = [getattr(pipe, encoder).get_input_embeddings().embedding_dim for _, encoder in self._components]
        self.placeholder_embeddings = PlaceholderEmbeddings(token, widths, num_vectors)
        self.module: nn.Module = self.placeholder_embeddings  # the trainer may wrap it

    @classmethod
    def create(
        cls, pipe: UNetPipeline, init_word: str = "thing", token: str = PLACEHOLDER_TOKEN, num_vectors: int = NUM_VECTORS
    ) -> "TextualInversion":
        """Untrained: every embedding is initialized from a word, such as the subject's class noun."""
        method = cls(pipe, token, num_vectors)
        method.init_from_word(pipe, init_word)
        return method

    @torch.no_grad()
    def init_from_word(self, pipe: UNetPipeline, word: str) -> None:
        """Set every embedding to the mean over the word's tokens. Raises UserError for a word without tokens."""
        for (tokenizer, encoder), vectors in zip(self._components, self.placeholder_embeddings.vectors, strict=True):
            ids = getattr(pipe, tokenizer)(word, add_special_tokens=False).input_ids
            if not ids:
                raise UserError(f"expected a word that roughly names the subject, such as dog; received {word!r}")
            table = getattr(pipe, encoder).get_input_embeddings().weight
            vectors.copy_(table[ids].float().mean(0).expand_as(vectors))

    def format_prompt(self, prompt: str) -> str:
        """A prompt about the class noun as one about the subject: "a cat on a beach" → "a <subject> on a beach"."""
        return insert_subject_token(prompt, self.metadata.get("noun", ""), self.token, replace_noun=True)

    def uncond_features(self) -> Tensor:
        """The one zero of the null encoder, (1, 1, 1)."""
        return self.encoder.uncond_features(patches=False)

    def predict(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, image_features: Tensor, **unet_kwargs: object) -> Tensor:
        """The prediction in training, see `Method`."""
        return cast(Tensor, self.module(self.unet.forward, latents, timesteps, prompt_embeds, **unet_kwargs))

    def remove_from_unet(self) -> None:
        """Does nothing: the UNet is not changed."""

    def apply_to(
        self, pipe: UNetPipeline, image_features: Tensor, uncond_features: Tensor, scale: float = 1.0
    ) -> AbstractContextManager[None]:
        """Within the context the pipeline encodes the placeholder. The method has no scale."""
        return self.with_placeholder_tokens(pipe)

    @contextmanager
    def with_placeholder_tokens(self, pipe: UNetPipeline) -> Iterator[None]:
        """Within the context the pipeline's tokenizers and text encoders know the placeholder; afterwards they are restored."""
        with ExitStack() as stack:
            for (name, encoder), tokenizer, vectors in zip(
                self._components, self._tokenizers, self.placeholder_embeddings.vectors, strict=True
            ):
                stack.callback(setattr, pipe, name, getattr(pipe, name))
                setattr(pipe, name, tokenizer)
                table = getattr(pipe, encoder).get_input_embeddings()
                stack.enter_context(_patched_embedding(table, len(tokenizer) - len(vectors), vectors))
            yield


def _extend_tokenizer(tokenizer: CLIPTokenizer, tokens: list[str]) -> CLIPTokenizer:
    """A copy of the tokenizer with additional tokens. Raises UserError for a placeholder that cannot be added."""
    extended = copy.deepcopy(tokenizer)
    token = tokens[0]
    is_known = "." in token or len(token.split()) != 1 or len(tokenizer.tokenize(token)) == 1
    if is_known or extended.add_tokens(tokens) != len(tokens) or token not in extended.tokenize(f"a {token} here"):
        raise UserError(f"token: expected a new word without dots and spaces, such as {PLACEHOLDER_TOKEN}; received {token!r}")
    return extended


def _patched_embedding(table: nn.Embedding, first_id: int, vectors: Tensor) -> AbstractContextManager[None]:
    """Within the context token ids from `first_id` on are looked up in `vectors`, with gradient."""
    original_forward = table.forward

    def forward(input: Tensor) -> Tensor:
        is_placeholder = input >= first_id
        placeholder = F.embedding((input - first_id).clamp(min=0), vectors).to(table.weight.dtype)
        return torch.where(is_placeholder[..., None], placeholder, original_forward(input.masked_fill(is_placeholder, 0)))

    return patched_forward(table, forward)


def build_textual_inversion(pipe: UNetPipeline, encoder: FeatureEncoder) -> TextualInversion:
    """Textual Inversion with the default placeholder, untrained."""
    return TextualInversion.create(pipe)
