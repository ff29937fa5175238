"""Mutated files of run folders, caches, evaluations and studies are read or refused in one sentence: python tests/fuzz/fuzz_states.py

Every round changes one file of a folder that imprompt wrote (bytes flipped, cut, repeated, replaced; values of JSON exchanged) and
reads the folder as a command would. Anything but a result or a UserError is a finding, as is a round that takes too long.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mutations import join_header, mutate_bytes, split_header

from imprompt.config import ReproduceConfig, TrainConfig
from imprompt.data import feature_cache
from imprompt.data.feature_cache import CachedSample, CachedSubjects, FeatureCache
from imprompt.errors import UserError
from imprompt.evaluation.report import scores_to_csv
from imprompt.evaluation.scoring import RowFeatures
from imprompt.evaluation.store import RowStore, check_or_write_protocol
from imprompt.studies.base import RowId, load_result
from imprompt.studies.runner import create_study
from imprompt.training.run_log import RunLog
from imprompt.training.run_options import check_run_options, describe_run, write_run_options
from imprompt.training.state_files import find_resumable_state, read_state_file, seal_state, write_state_file
from imprompt.utils.files import check_or_write_manifest

RESULTS = Path(__file__).parents[2] / "docs" / "results"
MAX_SECONDS = 10.0  # of one round
LOG = [{"step": step, "loss": 0.5, "val/loss": 0.1} for step in range(1, 5)]
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**12, 10**400, 1e308, float("nan"), "", "x", "../../x", [], {}, [[]], {"a": 1}, "\x1b[2J", "\udcff",
)  # fmt: skip


class Target(NamedTuple):
    """A folder that imprompt writes, and the readers of its files."""

    write: Callable[[Path], None]
    read: Callable[[Path], object]


# Targets


def write_cache(folder: Path) -> None:
    """A cache with two chunks, subjects and an unreadable record."""
    for chunk in range(2):
        writer = feature_cache.ChunkWriter(folder, chunk, 3)
        for i in range(5):
            ones = torch.ones(4, 2, 2)
            embeds = torch.full((2, 4), float(i))
            mask = torch.ones(1, 2, 2) if i == 3 else None
            writer.add(CachedSample(ones, ones, embeds, embeds[0], ones[:1], torch.arange(6), mask, f"ä {i}", f"k{i}", 0, f"s{i % 2}"))
        writer.unreadable["x.png"] = "no image"
        writer.close()
    feature_cache.init_cache(folder, {"chunks": 2, "data": "mini", "features": "pooled", "num_references": 1}, {"VAE": torch.ones(3)})


def read_cache(folder: Path) -> None:
    feature_cache.summarize_cache(folder)
    feature_cache.list_chunks_to_encode(folder, feature_cache.read_manifest(folder)["chunks"])
    cache = FeatureCache(folder)
    cache.load_fingerprint()
    subjects = CachedSubjects(cache, 2)
    for i in range(min(len(cache), 20)):
        cache.load_sample(i)
    for i in range(min(len(subjects), 20)):
        cache.load_with_references(subjects[i], 0, 2, 1)


def write_run(folder: Path) -> None:
    """A run with two states, options, subjects and a log."""
    for step in (2, 4):
        state = folder / "state" / f"step-{step}"
        state.mkdir(parents=True)
        write_state_file(state / "run.safetensors", {"counters": {"step": step}, "module": {"w": torch.ones(3)}, "optimizers": [{0: {}}]})
        write_state_file(state / "rank-0.safetensors", {"loader": {"sampler": {"epoch": 0}}, "random": {"python": (3, (1, 2), None)}})
        seal_state(state, step)
    write_run_options(folder, describe_run(TrainConfig.from_options().with_defaults(), 1, "160000"))
    check_or_write_manifest(folder / "subjects.json", {"train": ["a"], "test": ["b"]}, "the run")
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))


def read_run(folder: Path) -> None:
    log = RunLog(folder, "title", {})
    if log.read_lines() != LOG:  # the plots take time
        log.write_page()
    check_or_write_manifest(folder / "subjects.json", {"train": ["a"], "test": ["b"]}, "the run")
    state, _ = find_resumable_state(folder)
    check_run_options(folder, describe_run(TrainConfig.from_options().with_defaults(), 1, "160000"), is_resumed=state is not None)
    if state:
        read_state_file(state / "run.safetensors")
        read_state_file(state / "rank-0.safetensors")


def write_evaluation(folder: Path) -> None:
    """An evaluation with one row of two chunks."""
    check_or_write_protocol(folder, {"model": "mini"})
    store = RowStore(folder, "row")
    for chunk in range(2):
        store.write_chunk(chunk, {"score.CLIP-I": torch.ones(4), "seed": torch.arange(4)}, {"7": "no image"})
    check_or_write_manifest(store.folder / "row.json", {"source": "text"}, "row")


def read_evaluation(folder: Path) -> None:
    check_or_write_protocol(folder, {"model": "mini"})
    check_or_write_manifest(RowStore(folder, "row").folder / "row.json", {"source": "text"}, "row")
    features = RowFeatures(RowStore(folder, "row"), 2)
    features.column("score.CLIP-I")
    _ = features.skipped


def write_study(folder: Path) -> None:
    """The committed rows of a study, of which three are enough, and its manifest."""
    (folder / "finished").mkdir(parents=True)
    for path in sorted((RESULTS / "ip-adapter" / "finished").glob("*.json"))[:3]:
        shutil.copy(path, folder / "finished")
    check_or_write_manifest(folder / "reproduce.json", {"paper": "ip-adapter"}, "the work")


def read_study(folder: Path) -> None:
    check_or_write_manifest(folder / "reproduce.json", {"paper": "ip-adapter"}, "the work")
    results = [load_result(folder, row_id) for row_id in STUDY_ROWS]
    scores_to_csv([result.score for result in results if result])


STUDY_ROWS: list[RowId] = create_study(ReproduceConfig.from_options(paper="ip-adapter")).row_ids()
TARGETS = {
    "cache": Target(write_cache, read_cache),
    "run": Target(write_run, read_run),
    "evaluation": Target(write_evaluation, read_evaluation),
    "study": Target(write_study, read_study),
}


# Mutations


def mutate(content: bytes, suffix: str, rng: random.Random) -> bytes:
    """One random change of a file, or a few."""
    if suffix == ".json" and rng.random() < 0.6:
        return json.dumps(mutate_json(json.loads(content), rng)).encode()
    if suffix == ".safetensors" and rng.random() < 0.3:
        return mutate_header(content, rng)
    return mutate_bytes(content, rng)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """The value with one random part exchanged, removed or renamed."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        key: Any = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if rng.random() < 0.15:
            del value[key]
        elif isinstance(value, dict) and rng.random() < 0.15:
            value[rng.choice(("x", "../x", ""))] = value.pop(key)
        else:
            value[key] = mutate_json(value[key], rng)
        return value
    return rng.choice(VALUES)


def mutate_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a header that fits, and one change in it."""
    header, rest = split_header(content)
    return join_header(mutate_json(header, rng), rest)


def fuzz(minutes: float, seed: int = 0, targets: tuple[str, ...] = tuple(TARGETS)) -> tuple[Counter[str], dict[str, str]]:
    """Rounds by target and outcome; and the findings: the traceback of each by its place."""
    rng, outcomes, findings = random.Random(seed), Counter[str](), dict[str, str]()
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in targets}
        for name, folder in folders.items():
            TARGETS[name].write(folder)
            TARGETS[name].read(folder)  # as it was written, it can be read
        files = {name: sorted(path for path in folder.rglob("*") if path.is_file()) for name, folder in folders.items()}
        while time.monotonic() < end:
            name = rng.choice(targets)
            path = rng.choice(files[name])
            original = path.read_bytes()
            path.write_bytes(mutate(original, path.suffix, rng))
            outcome = run_round(TARGETS[name].read, folders[name], findings, path.name)
            outcomes[f"{name}: {outcome}"] += 1
            path.write_bytes(original)
    return outcomes, findings


def run_round(read: Callable[[Path], object], folder: Path, findings: dict[str, str], changed: str) -> str:
    """The outcome of reading a folder in which one file was changed."""
    begin = time.process_time()  # other processes may keep this one waiting
    try:
        read(folder)
        outcome = "read"
    except UserError as error:
        outcome = "refused"
        if "\n" in str(error):
            findings["a sentence of several lines"] = str(error)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        findings[f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}"] = traceback.format_exc()
        outcome = "error"
    if time.process_time() - begin > MAX_SECONDS:
        content = next(folder.rglob(changed)).read_bytes()[:500]
        findings[f"{changed} is slow"] = f"{changed}: {outcome} after {time.process_time() - begin:.0f} s: {content!r}"
    return outcome


def main() -> int:
    """Fuzz for so many minutes; 1 where there are findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes, findings = fuzz(options.minutes, options.seed)
    for name, count in sorted(outcomes.items()):
        print(f"{name}: {count}")
    for text in findings.values():
        print(text)
    print(f"{sum(outcomes.values())} rounds, {len(findings)} findings")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
