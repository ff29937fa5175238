"""A CLIP tokenizer in which every word of the world is one token; any other text falls apart into bytes."""

import json
import random
import tempfile
from pathlib import Path

from torch import Tensor
from transformers import CLIPTokenizer

from imprompt.mini.world import vocabulary

LENGTH = 24  # tokens, start and end included


def make_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer. BPE merges compete, so their order is searched (seeded) until each word is whole."""
    words = list(vocabulary())
    shuffle = random.Random(0)
    words.sort(key=len, reverse=True)
    for _ in range(1000):
        tokenizer = _tokenizer(words)
        broken = [w for w in words if len(tokenizer.tokenize(w)) != 1]
        if not broken:
            return tokenizer
        rest = [w for w in words if w not in broken]
        for word in broken:  # a broken word wins by moving up
            rest.insert(shuffle.randrange(len(rest)) // 2, word)
        words = rest
    raise AssertionError(f"no order of merges keeps {broken} whole")


def tokenise(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(texts, LENGTH) token ids."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """As transformers keeps one, and as it did before version 5."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    _write(folder, model["vocab"], model["merges"])


def _tokenizer(words: list[str]) -> CLIPTokenizer:
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
        _write(Path(folder), vocab, merges)
        return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def _write(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()
