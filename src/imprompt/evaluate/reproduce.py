"""The first paper's comparison (arXiv:2308.06721, table 1), regenerated: every row trained and measured on the embedded model.

OUT/cache-FEATURES/      what the frozen parts say to the training pictures
OUT/train/ROW/           a run of `imprompt train`
OUT/evaluation…/         pictures and what was seen in them
OUT/finished/ROW.json    a finished row: all that the report needs of it; with these alone a report can be gone on with
OUT/report/              the table, the claims, the pictures
"""

import json
import platform
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import torch

from imprompt.config import COPIES, GENERAL, METHODS, READS, Encode, Evaluate, Reproduce, Train
from imprompt.data.cache import complete
from imprompt.errors import UserError
from imprompt.evaluate.metrics import Interval
from imprompt.evaluate.report import score_row, strip
from imprompt.evaluate.score import Score, Seen
from imprompt.evaluate.shelf import Shelf, agree
from imprompt.evaluate.suite import ENDED, Row, Studio, Task, curve_of, facts, protocol
from imprompt.files import atomic_path, writable_folder
from imprompt.mini.style import make_style
from imprompt.pipelines import claim_device, pick_dtype
from imprompt.training import encode, recorded, train

STYLE = "ink"
CUSTOM = "on a custom model"


@dataclass(frozen=True)
class Budget:
    """What every trained row gets, and what all are measured on."""

    steps: int  # of the optimiser
    batch: int
    pictures: int  # different ones, of mini's training set
    prompts: int
    samples: int
    drawing: int  # DDIM steps
    curve: int  # prompts of the curve of λ
    style: float  # share of the custom model's usual training


BUDGETS = {
    "full": Budget(1_500, 48, 36_000, 1_000, 4, 25, 200, 1.0),
    "smoke": Budget(2, 4, 64, 4, 2, 2, 2, 0.004),
}


class Progress(NamedTuple):
    """What is being done for a row. `row` is empty where several are at work."""

    row: str
    stage: str
    done: int
    total: int


class Finished(NamedTuple):
    """A row with all that the report needs."""

    score: Score
    minutes: dict[str, float]  # training, drawing
    each: dict[str, list[float]]  # of every prompt: its mean CLIP-I, CLIP-T and diversity
    protocol: dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------- rows


def jobs(choice: Reproduce) -> list[str]:
    """Every row's name: what is not trained, the methods, the curve of λ, and the adapter on a custom model."""
    methods = [name for name in GENERAL if not choice.method or name in choice.method]
    return ["copy", "real", "text", *sorted(methods, key=lambda name: name not in COPIES), *curve_names(choice), *custom_names(choice)]


def curve_names(choice: Reproduce) -> list[str]:
    if choice.method and "ip-adapter" not in choice.method:
        return []
    return [row.name for row in curve_of("ip-adapter", 1)] + ["ip-adapter λ base"]


def custom_names(choice: Reproduce) -> list[str]:
    if choice.method and "ip-adapter" not in choice.method:
        return []
    return [f"text {CUSTOM}", f"ip-adapter {CUSTOM}"]


class Workshop:
    """One process' tools for rows."""

    def __init__(self, choice: Reproduce, tell: Any):
        self.choice, self.out, self.budget, self.tell = choice, Path(choice.out), BUDGETS[choice.budget], tell
        self._studios: dict[str, Studio] = {}

    def finish(self, name: str) -> str:
        """Train what the row needs, draw, score, and keep it."""
        path = finished_path(self.out, name)
        if path.is_file():
            return name
        row, base = self.row(name)
        minutes = {"training": self._train(row.source) if row.source.endswith(".safetensors") else 0.0}
        studio = self.studio(base)
        if row.source != "copy":
            self._draw(studio, Row("copy", "copy", "none", 1, row.prompts if not row.curve else self.budget.prompts))
        minutes["drawing"] = self._draw(studio, row)
        score = score_row(studio, row, studio.out)
        finished = Finished(score, minutes, self._each(studio, row), protocol(studio.choice, studio))
        if not row.curve:
            with atomic_path(path.with_suffix(".png")) as partial:
                strip(studio.out, row.name).save(partial)
        with atomic_path(path) as partial:
            partial.write_text(json.dumps(finished._asdict() | {"score": asdict(score)}), "utf-8")
        return name

    def row(self, name: str) -> tuple[Row, str]:
        """What a row is, and the base that it is drawn on."""
        b = self.budget
        if name in ("copy", "real"):
            return Row(name, name, "none", 1, b.prompts), "mini"
        if name.startswith("text"):
            return Row("text", "text", "caption", b.samples, b.prompts), self._custom() if CUSTOM in name else "mini"
        if " λ " in name:
            prompts = min(b.curve, b.prompts)
            if name.endswith("base"):
                return Row(name, "text", "other", 1, prompts, 1.0, "base"), "mini"
            return next(r for r in curve_of(f"ip-adapter={self.weights('ip-adapter')}", prompts) if r.name == name), "mini"
        method = name.removesuffix(f" {CUSTOM}")
        source = method if method not in METHODS else f"{method}={self.weights(method)}"
        return Row(method, source, "none", b.samples, b.prompts), self._custom() if CUSTOM in name else "mini"

    def weights(self, method: str) -> Path:
        return self.out / "train" / method / "adapter.safetensors"

    def cache(self, features: str) -> Path:
        return self.out / f"cache-{features}"

    def fill(self, features: str) -> str:
        """Encode the training pictures for the methods that read these features."""
        method = next(name for name in METHODS if READS[name] == features)
        data = f"mini:{self.budget.pictures}"
        choice = Encode(data=data, out=str(self.cache(features)), method=method, batch=128, device=self.choice.device)
        for at in encode(choice):
            self.tell(Progress(features, "encoding", at.chunks, at.total))
        return features

    def style(self) -> str:
        """Make the custom model."""
        make_style(
            STYLE,
            writable_folder(self.out / STYLE),
            lambda p, done, total, _: self.tell(Progress(STYLE, p, done, total)),
            self.budget.style,
        )
        return STYLE

    def _custom(self) -> str:
        return str(self.out / STYLE / "model")

    def studio(self, base: str) -> Studio:
        if base not in self._studios:
            folder = writable_folder(self.out / ("evaluation" if base == "mini" else f"evaluation-{STYLE}"))
            self._studios[base] = Studio(evaluation(self.choice, base, folder))
        return self._studios[base]

    def _train(self, source: str) -> float:
        method = source.partition("=")[0]
        choice = training(self.choice, method, self.out).settled()
        kept, asked = Path(choice.out) / "trained.json", json.loads(json.dumps(asdict(choice)))
        if kept.is_file():
            done = json.loads(kept.read_text("utf-8"))
            if done["settings"] != asked:
                raise UserError(f"{choice.out} was trained with other settings; delete it, or choose another --out")
            return float(done["minutes"])
        last = None
        for last in recorded(choice, train(choice)):
            self.tell(Progress(method, "training", last.index, last.steps))
        rate = last.images_per_second if last else 0.0  # of the steps alone, since the run was begun or continued
        minutes = choice.steps * choice.batch / rate / 60 if rate else 0.0
        with atomic_path(kept) as partial:
            partial.write_text(json.dumps({"minutes": minutes, "settings": asked}), "utf-8")
        return minutes

    def _draw(self, studio: Studio, row: Row) -> float:
        agree(studio.out / "protocol.json", protocol(studio.choice, studio), f"the evaluation in {studio.out}")
        agree(Shelf(studio.out, row.name).folder / "row.json", facts(row), f"row {row.name} in {studio.out}")
        chunks = studio.chunks(row)
        for number in range(chunks):
            if not Shelf(studio.out, row.name).has(number):
                studio.work(Task(row, number))
            self.tell(Progress(row.name, "drawing", number + 1, chunks))
        return Seen(studio.out, row.name, chunks).seconds / 60

    def _each(self, studio: Studio, row: Row) -> dict[str, list[float]]:
        from imprompt.evaluate.metrics import diversity

        seen = Seen(studio.out, row.name, studio.chunks(row))
        found = {}
        for name in ("CLIP-I", "CLIP-T"):
            values = seen.column(f"score.{name}")
            assert values is not None
            found[name] = [round(v, 6) for v in values.unflatten(0, (-1, row.samples)).mean(1).tolist()]
        clip = seen.column("clip")
        if row.samples > 1 and clip is not None:
            found["diversity"] = [round(v, 6) for v in diversity(clip.unflatten(0, (-1, row.samples))).tolist()]
        if row.curve and (row.curve == "base" or row.scale == 0) and clip is not None:
            found["seen"] = [round(v, 5) for v in clip.flatten().tolist()]
        return found


def finished_path(out: Path, name: str) -> Path:
    return out / "finished" / f"{name.replace(' ', '-').replace('λ', 'lambda')}.json"


def finished(out: Path, name: str) -> Finished | None:
    """A row that is done, or None."""
    path = finished_path(out, name)
    if not path.is_file():
        return None
    read = json.loads(path.read_text("utf-8"))
    figures = {key: Interval(*value) for key, value in read["score"].pop("figures").items()}
    return Finished(Score(**{**read["score"], "name": name}, figures=figures), read["minutes"], read["each"], read.get("protocol", {}))


def training(choice: Reproduce, method: str, out: Path) -> Train:
    """The training of one row: the same budget and data for each, on the settings that `imprompt train` has for mini."""
    b = BUDGETS[choice.budget]
    return Train(
        method=method, data=f"mini:{b.pictures}", cache=str(out / f"cache-{READS[method]}"), steps=b.steps, batch=b.batch,
        out=str(out / "train" / method), validation=min(8, b.prompts), validate_every=b.steps, save_every=max(1, b.steps // 6), keep=1,
        validation_steps=min(20, b.drawing), preflight=choice.budget == "full", device=choice.device, warmup=min(100, b.steps // 2),
    )  # fmt: skip


def evaluation(choice: Reproduce, base: str, folder: Path) -> Evaluate:
    """How every row is measured."""
    b = BUDGETS[choice.budget]
    dtype = str(pick_dtype("auto", torch.device(claim_device(choice.device)).type, True)).removeprefix("torch.")  # on both bases
    return Evaluate(
        base=base, data="mini", limit=b.prompts, samples=b.samples, steps=b.drawing, guidance=3.0, judge="mini", features="mini",
        encoder=None, out=str(folder), device=choice.device, batch=64, dtype=dtype,
    ).settled()  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the run


_workshop: Workshop | None = None


def _begin(choice: Reproduce, queue: Any) -> None:
    """In a process of its own: one thread, so that processes do not wait for each other."""
    global _workshop
    from imprompt.pipelines import hide_progress

    torch.set_num_threads(1)
    hide_progress()
    _workshop = Workshop(choice, queue.put)


def _do(verb: str, words: tuple[str, ...]) -> str:
    assert _workshop is not None
    return str(getattr(_workshop, verb)(*words))


def run(choice: Reproduce) -> Iterator[Progress]:
    """Do everything that is missing. Interrupted, the same call goes on."""
    out = writable_folder(choice.out)
    agree(out / "reproduce.json", {"paper": choice.paper, "budget": choice.budget, **asdict(BUDGETS[choice.budget])}, f"the work in {out}")
    names = [name for name in jobs(choice) if not finished_path(out, name).is_file()]
    needed = dict.fromkeys(READS[name] for name in names if name in METHODS and not (out / "train" / name / "trained.json").is_file())
    first: list[tuple[str, tuple[str, ...]]] = [("fill", (features,)) for features in needed if not complete(out / f"cache-{features}")]
    if any(CUSTOM in name for name in names) and not (out / STYLE / "model" / "model_index.json").is_file():
        first.append(("style", ()))
    plain = [n for n in names if n in ("copy", "real", "text")]
    methods = [n for n in names if n in GENERAL]
    after = [n for n in names if n not in plain and n not in methods]  # need the adapter, or the custom model
    stages = [[*first, *_rows(plain[:1])], _rows([*methods, *plain[1:]]), _rows(after)]
    done, total = 0, sum(len(stage) for stage in stages)
    yield Progress("", "rows", done, total)
    context = get_context("spawn")
    with context.Manager() as manager:
        queue = manager.Queue()
        with ProcessPoolExecutor(choice.processes, context, _begin, (choice, queue)) as pool:
            try:
                for stage in stages:
                    waiting: set[Future[str]] = {pool.submit(_do, verb, words) for verb, words in stage}
                    while waiting:
                        ready, waiting = wait_for(waiting, timeout=0.5)
                        yield from _told(queue)
                        for future in ready:
                            done += 1
                            yield Progress("", future.result(), done, total)
            except BrokenProcessPool as error:
                raise UserError(ENDED) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _rows(names: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    return [("finish", (name,)) for name in names]


def _told(queue: Any) -> Iterator[Progress]:
    while True:
        try:
            yield queue.get_nowait()
        except Empty:
            return


def machine() -> str:
    """What the minutes were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"one thread of {platform.processor() or platform.machine()} for each row"
