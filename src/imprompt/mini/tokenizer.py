"""A CLIP tokenizer in which every word of the world's captions is one token; other text is tokenized as bytes."""

import json
import random
import tempfile
from pathlib import Path

from torch import Tensor
from transformers import CLIPTokenizer

from imprompt.mini.world import build_vocabulary

MAX_LENGTH = 24  # tokens, including start and end


def build_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer. BPE merges compete, so their order is searched (seeded) until every word is one token."""
    words = list(build_vocabulary())
    rng = random.Random(0)
    words.sort(key=len, reverse=True)
    for _ in range(1000):
        tokenizer = _build_tokenizer(words)
        split_words = [w for w in words if len(tokenizer.tokenize(w)) != 1]
        if not split_words:
            return tokenizer
        words = [w for w in words if w not in split_words]
        for word in split_words:  # a word that moves up has its merges applied earlier
            words.insert(rng.randrange(len(words)) // 2, word)
    raise AssertionError(f"no order of merges makes {split_words} single tokens")


def tokenize_prompts(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids, (prompts, MAX_LENGTH)."""
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt").input_ids


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save in the format of transformers 5 (tokenizer.json) and of earlier versions (vocab.json, merges.txt)."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    _write_bpe_files(folder, model["vocab"], model["merges"])


def _build_tokenizer(words: list[str]) -> CLIPTokenizer:
    letters = sorted(_byte_alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        left = word[0]
        for i, letter in enumerate(word[1:], start=1):
            right = letter + ("</w>" if i == len(word) - 1 else "")
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    with tempfile.TemporaryDirectory() as folder:
        _write_bpe_files(Path(folder), vocab, merges)
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH)


def _write_bpe_files(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()
