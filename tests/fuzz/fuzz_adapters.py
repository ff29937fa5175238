"""Mutated adapters, saved prompts, LoRA and our methods' files are read or refused in one sentence: python tests/fuzz/fuzz_adapters.py

Every round changes one small file, in its tensors, its metadata, its header or its bytes, and reads it as a command would. Anything
but a result or a UserError is a finding, as are values that are not finite, a round that takes too long, and too much memory.
"""

import argparse
import io
import json
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutations import join_header, mutate_bytes, split_header

from conftest import POOLED, VISION, random_adapter, random_face_adapter, sd15_pipeline
from imprompt.core.adapter import Adapter
from imprompt.core.aggregation import AGGREGATORS
from imprompt.core.image_projection import Resampler
from imprompt.errors import UserError
from imprompt.generation.lora import use_lora
from imprompt.methods.dreambooth import LoRAUNet
from imprompt.methods.loading import load_method
from imprompt.models import checkpoints
from imprompt.models.face_encoders import load_id_embeds
from imprompt.models.image_prompt import ImagePromptEncoder, load
from imprompt.models.tensor_files import read_tensors

MAX_SECONDS = 10.0  # of one round
MAX_BYTES = 2 * 2**30  # of memory, at any time
Tensors = dict[str, Tensor]
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 10**12, 10**400, 1e308, float("nan"), "", "x", "ip-adapter", "attention", "joint", "[/x]", [], {}, [[]],
    {"a": 1}, "\x1b[2J\n", "\udcff", "training", "a b", "<subject>",
)  # fmt: skip
NAMES = (
    "", ".", "x", "image_proj.", "ip_adapter.", "aggregator.", "image_proj.proj.weight", "image_proj.proj.3.weight", "image_proj.latents",
    "image_proj.proj_in.weight", "image_proj.norm.weight", "image_proj.perceiver_resampler.proj_in.weight", "ip_adapter.1.to_k_ip.weight",
    "ip_adapter.1.to_q_lora.down.weight", "ip_adapter.-1.to_k_ip.weight", "ip_adapter.01.to_k_ip.weight", "ip_adapter.٣.to_k_ip.weight",
    f"ip_adapter.{'9' * 5000}.to_k_ip.weight", "image_proj.layers.7.0.to_q.weight", "state_dict", "model.ema", "module.module",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.weight", "unet.attn1.processor.to_q_lora.up.weight",
)  # fmt: skip


class Target(NamedTuple):
    """Files of one kind: the tensors and the metadata of intact ones, and their reader."""

    files: Callable[[], list[tuple[Tensors, dict[str, Any]]]]
    read: Callable[[Path], object]


@cache
def pipe() -> Any:
    return sd15_pipeline()


@cache
def prompt_encoder() -> ImagePromptEncoder:
    return load("mini")


# Targets


def adapter_files() -> list[tuple[Tensors, dict[str, Any]]]:
    """An adapter of every type, with several aggregators, and a training state of FaceID."""
    unet = pipe().unet
    adapters = [random_adapter(unet, name) for name in ("base", "plus", "full-face")]
    adapters += [random_face_adapter(unet, plus=plus, tokens=tokens) for plus, tokens in ((False, 4), (False, 16), (True, 4))]
    adapters.append(Adapter(Resampler(512, 32, 4, 64, 1, 1), {1: 4, 3: 4}, 32))
    files: list[tuple[Tensors, dict[str, Any]]] = [(adapter.state_dict(), {}) for adapter in adapters]
    for name in ("attention", "attention-tokens", "self-attention"):
        adapter = random_adapter(unet, "base")
        adapter.aggregator = AGGREGATORS[name](POOLED, adapter.cross_attention_dim)
        files.append((adapter.state_dict(), {"aggregator": name, "base": "mini", "version": 2, "normalized": True}))
    paths = list(unet.attn_processors)
    state = {}
    for key, value in random_face_adapter(unet).state_dict().items():
        group, n, *name = key.split(".")
        state[f"unet.{paths[int(n)]}.{'.'.join(name)}" if group == "ip_adapter" else f"image_proj_model.{n}.{'.'.join(name)}"] = value
    return [*files, (state, {})]


def read_adapter(path: Path) -> None:
    """Load it, compute image tokens, and convert it to both formats."""
    adapter, spec = checkpoints.load_adapter(path)
    patches = 3 if spec.uses_patch_features else 1
    with torch.no_grad():
        adapter(torch.randn(1, 2, patches, spec.image_embed_dim), None)
    for suffix in (".safetensors", ".bin"):
        checkpoints.convert_adapter(path, path.with_name(f"converted{suffix}"))
        checkpoints.read_adapter(path.with_name(f"converted{suffix}"))
    _ = spec.base_model, spec.image_encoder


def prompt_files() -> list[tuple[Tensors, dict[str, Any]]]:
    """Saved prompts of two references: one with everything in it, one that is aggregated."""
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "white")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.safetensors"
        prompt_encoder()(images, mask=torch.ones(4, 4), reference_weights=[2, 1], frame_weights=[1, 0.5], scale={"mid_block": 0.5}).save(
            path
        )
        with_everything = read_tensors(path)
        prompt_encoder()(images, aggregation="average").save(path)
        return [with_everything, read_tensors(path)]


def read_prompt(path: Path) -> None:
    """Load it and compute its keys and values."""
    prompt = prompt_encoder().load_prompt(path)
    prompt.attention_bias()
    for part in prompt.key_values():
        if not all(tensor.isfinite().all() for pair in part.values() for tensor in pair):
            raise AssertionError("keys and values that are not finite")


def method_files() -> list[tuple[Tensors, dict[str, Any]]]:
    inversion = {"<subject>": torch.randn(2, 32)}
    lora = LoRAUNet(pipe().unet, 2).state_dict()
    return [(inversion, {"method": "inversion", "token": "<subject>", "noun": "cat"}), (lora, {"method": "dreambooth-lora", "rank": "2"})]


def read_method(path: Path) -> None:
    load_method(str(path), pipe(), "small")


def lora_files() -> list[tuple[Tensors, dict[str, Any]]]:
    return [({key: torch.randn_like(value) for key, value in LoRAUNet(pipe().unet, 2).state_dict().items()}, {})]


def read_lora(path: Path) -> None:
    with use_lora(pipe(), [str(path)]):
        pass


def face_files() -> list[tuple[Tensors, dict[str, Any]]]:
    return [({"who": torch.randn(3, 12)}, {}), ({"who": torch.cat([torch.zeros(1, 12), torch.randn(1, 12)])[:, None, None]}, {})]


def read_faces(path: Path) -> None:
    embeds = load_id_embeds(path, 12)
    if not (embeds.isfinite().all() and embeds.any(1).all()):
        raise AssertionError("identity embeddings of no face")


TARGETS = {
    "adapters": Target(adapter_files, read_adapter),
    "prompts": Target(prompt_files, read_prompt),
    "methods": Target(method_files, read_method),
    "lora": Target(lora_files, read_lora),
    "faces": Target(face_files, read_faces),
}


# Mutations


def mutate_tensors(tensors: Tensors, rng: random.Random) -> Tensors:
    """The tensors with one or a few of them altered, renamed, removed or repeated."""
    tensors = dict(tensors)
    for _ in range(rng.choice((1, 1, 2, 4))):
        key = rng.choice(list(tensors) or ["x"])
        value = tensors.get(key, torch.ones(2, 2))
        kind = rng.randrange(8)
        if kind == 0:
            tensors.pop(key, None)
        elif kind == 1:
            tensors[rng.choice((*NAMES, key + ".x", "module." + key, "ema." + key))] = value
        elif kind == 2:
            tensors[rng.choice(NAMES)] = torch.ones([rng.choice((0, 1, 2, 4, 32, VISION)) for _ in range(rng.randrange(4))])
        else:
            tensors[key] = alter_tensor(value, rng)
    return tensors


def alter_tensor(x: Tensor, rng: random.Random) -> Tensor:
    """Another shape, type or value."""
    if not x.numel() or not x.ndim:
        return torch.ones(2, 3)
    x = x.float() if x.element_size() == 1 else x  # torch computes little in float8
    alterations: list[Callable[[], Tensor]] = [
        lambda: x.flatten(), lambda: x[None], lambda: x[:0], lambda: x[:-1], lambda: x.sum(), lambda: x.mT if x.ndim > 1 else x,
        lambda: torch.cat([x, x]), lambda: x.to(rng.choice((torch.int8, torch.float16, torch.float8_e4m3fn, torch.bool, torch.float64))),
        lambda: x * rng.choice((float("nan"), float("inf"), 0.0, -1.0, 1e30)), lambda: torch.ones([1] * 40),
    ]  # fmt: skip
    return rng.choice(alterations)().contiguous()


def mutate_metadata(value: Any, rng: random.Random) -> Any:
    """The metadata with one random part exchanged, removed or added."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        key: Any = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        changed: Any = dict(value) if isinstance(value, dict) else list(value)
        if rng.random() < 0.15:
            del changed[key]
        else:
            changed[key] = mutate_metadata(value[key], rng)
        return changed
    if isinstance(value, dict) and rng.random() < 0.5:
        return {rng.choice(("method", "aggregator", "version", "normalized", "base", "encoder", "prompt", "token")): rng.choice(VALUES)}
    return rng.choice(VALUES)


def mutate_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a header that fits its length, and one change in it."""
    header, rest = split_header(content)
    assert isinstance(header, dict)
    entry = header[rng.choice([key for key in header if key != "__metadata__"] or ["__metadata__"])]
    if isinstance(entry, dict) and "shape" in entry:
        entry[rng.choice(("shape", "data_offsets"))] = rng.choice(([0, 2**63], [0, 2**64], [-1], [2**62, 4], [], [0, 0], [1, 10**30], "x"))
    return join_header(header, rest)


def nest(tensors: Tensors, metadata: object, rng: random.Random) -> object:
    """The content of a pickle: flat, grouped, or in a container."""
    nested: dict[str, Any] = {}
    for key, value in tensors.items():
        group, dot, rest = key.partition(".")
        if dot and isinstance(nested.setdefault(group, {}), dict):
            nested[group][rest] = value
    content: Any = rng.choice((dict(tensors), nested)) | {"imprompt": metadata}
    return rng.choice((content, content, content, {"state_dict": content}, {"ema": content, "model": content}, [content], (content, 3)))


def write_mutated(path: Path, tensors: Tensors, metadata: dict[str, Any], rng: random.Random) -> Path:
    """A file with one random change of its tensors, metadata, header or bytes, under a name of either format."""
    change = rng.choice(("tensors", "tensors", "metadata", "header", "bytes", "nothing"))
    tensors = mutate_tensors(tensors, rng) if change == "tensors" else tensors
    about: Any = mutate_metadata(metadata, rng) if change == "metadata" else metadata
    path = path.with_name(
        rng.choice(("adapter", "ip-adapter-faceid-plusv2", "faceid_unnorm")) + rng.choice((".safetensors", ".bin", ".pt"))
    )
    if rng.random() < 0.6:
        tensors = {key: value.clone() for key, value in tensors.items()}
        content = safetensors.torch.save(tensors, {"format": "pt", "imprompt": json.dumps(about)})
        content = mutate_header(content, rng) if change == "header" else content
    else:
        buffer = io.BytesIO()
        torch.save(nest(tensors, about, rng), buffer, _use_new_zipfile_serialization=rng.random() < 0.5)
        content = buffer.getvalue()
    path.write_bytes(mutate_bytes(content, rng, ends=(64, 4096)) if change == "bytes" else content)
    return path


# Rounds


def fuzz(
    minutes: float, seed: int = 0, targets: tuple[str, ...] = tuple(TARGETS), max_rounds: int | None = None
) -> tuple[Counter[str], dict[str, str]]:
    """Rounds by target and outcome; and the findings: the traceback of each by its place."""
    rng, outcomes, findings = random.Random(seed), Counter[str](), dict[str, str]()
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = {name: TARGETS[name].files() for name in targets}
        while time.monotonic() < end and (max_rounds is None or outcomes.total() < max_rounds):
            name = rng.choice(targets)
            path = write_mutated(Path(folder) / "x", *rng.choice(files[name]), rng)
            outcomes[f"{name}: {run_round(TARGETS[name].read, path, findings)}"] += 1
            path.unlink()
    if (used := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) > MAX_BYTES:
        findings["memory"] = f"{used / 2**30:.1f} GiB of memory were used"
    return outcomes, findings


def run_round(read: Callable[[Path], object], path: Path, findings: dict[str, str]) -> str:
    """The outcome of reading a file."""
    begin, outcome = time.monotonic(), "read"
    try:
        read(path)
    except UserError as error:
        outcome = "refused"
        if len(str(error)) > 1000:
            findings["a long sentence"] = str(error)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        findings[f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}"] = traceback.format_exc()
        outcome = "error"
    if time.monotonic() - begin > MAX_SECONDS:
        findings[f"{outcome} after {time.monotonic() - begin:.0f} s"] = str(path)
    return outcome


def main() -> int:
    """Fuzz for so many minutes; 1 where there are findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, action="append")
    options = parser.parse_args()
    outcomes, findings = fuzz(options.minutes, options.seed, tuple(options.target or TARGETS))
    for name, count in sorted(outcomes.items()):
        print(f"{name}: {count}")
    for place, text in findings.items():
        print(f"== {place}\n{text}")
    print(f"{sum(outcomes.values())} rounds, {len(findings)} findings")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
