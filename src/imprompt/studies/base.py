"""A paper's comparison, regenerated: every row trained, drawn and scored on the embedded model, and kept once it is finished.

OUT/cache-FEATURES/      what the frozen parts say to the training pictures
OUT/train/ROW/           a run of `imprompt train`
OUT/evaluation…/         pictures and what was seen in them
OUT/finished/ROW.json    a finished row: all that the report needs of it; with these alone a report can be gone on with
OUT/report/              the table, the claims, the pictures
"""

import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import torch
from PIL import Image

from imprompt.config import READS, Encode, Evaluate, Reproduce, Train
from imprompt.errors import UserError
from imprompt.evaluation.metrics import Interval, diversity
from imprompt.evaluation.report import score_row, strip
from imprompt.evaluation.runner import Row, Studio, Task, facts, protocol
from imprompt.evaluation.scoring import Score, Seen
from imprompt.evaluation.store import Shelf, agree
from imprompt.evaluation.workers import pool
from imprompt.models.base_pipelines import claim_device, pick_dtype
from imprompt.training import encode, recorded, train
from imprompt.utils.files import atomic_path, writable_folder, write_file


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
    each: dict[str, list[float]]  # of every prompt: its mean CLIP-I, CLIP-T, diversity, identity
    protocol: dict[str, Any]


Job = tuple[str, tuple[str, ...]]  # a verb of a study, and what it is told
SAMPLER = "dpm++"  # on mini five to eight of its steps are as good as 25 of DDIM's (docs/log.md)


class Study:
    """One paper's rows, and a process' tools to finish them. What a paper has of its own stands in its class."""

    def __init__(self, choice: Reproduce, tell: Callable[[Progress], None] = lambda at: None):
        self.choice, self.out, self.tell = choice, Path(choice.out), tell
        self._studios: dict[str, Studio] = {}

    # Of a paper's own

    @property
    def budget(self) -> Any:
        """What every row gets: a dataclass."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """Every row's name."""
        raise NotImplementedError

    def stages(self, missing: Sequence[str]) -> list[list[Job]]:
        """The work for these rows: what stands in a list can be done at the same time, one list after the other."""
        raise NotImplementedError

    def row(self, name: str) -> tuple[Row, str]:
        """What a row is, and the base that it is drawn on."""
        raise NotImplementedError

    def training(self, name: str) -> Train | None:
        """What is trained for a row, if anything."""
        raise NotImplementedError

    def evaluation(self, base: str, folder: Path) -> Evaluate:
        """How the rows on a base are measured."""
        raise NotImplementedError

    # Verbs, and what may not change while they work

    def facts(self) -> dict[str, Any]:
        """By which a folder knows whether it is the same study."""
        return {"paper": self.choice.paper, "budget": self.choice.budget, "sampler": SAMPLER, **asdict(self.budget)}

    def fill(self, data: str, method: str) -> str:
        """Encode training pictures for the methods that read the same of them as this one."""
        features = READS[method]
        choice = Encode(data=data, out=str(self.cache(features)), method=method, batch=128, device=self.choice.device)
        for at in encode(choice):
            self.tell(Progress(features, "encoding", at.chunks, at.total))
        return features

    def prepare(self, name: str) -> str:
        """Train what a row needs, once, where several rows draw with it."""
        if training := self.training(name):
            self._train(training)
        return name

    def finish(self, name: str) -> str:
        """Train what the row needs, draw, score, and keep it."""
        path = finished_path(self.out, name)
        if path.is_file():
            return name
        training = self.training(name)
        minutes = {"training": self._train(training) if training else 0.0}
        row, base = self.row(name)
        studio = self.studio(base)
        if row.source != "copy":
            self.draw(studio, Row("copy", "copy", "none", 1, studio.choice.limit))
        minutes["drawing"] = self.draw(studio, row)
        score = score_row(studio, row, studio.out)
        seen = Seen(studio.out, row.name, studio.chunks(row))
        learning = seen.column("learning")
        if learning is not None and learning.any():
            minutes["learning"] = float(learning.sum()) / 60
        finished = Finished(score, minutes, self.each(seen, row, studio), protocol(studio.choice, studio))
        if not row.curve:
            with atomic_path(path.with_suffix(".png")) as partial:
                self.strip(studio, row).save(partial)
        write_file(path, json.dumps(finished._asdict() | {"score": asdict(score)}))
        return name

    def clock(self) -> str:
        """Time what can only be timed while nothing else is at work."""
        raise NotImplementedError

    # Shared

    def cache(self, features: str) -> Path:
        return self.out / f"cache-{features}"

    def weights(self, trained: str) -> Path:
        return self.out / "train" / trained / "adapter.safetensors"

    def studio(self, base: str) -> Studio:
        if base not in self._studios:
            folder = writable_folder(self.out / ("evaluation" if base == "mini" else f"evaluation-{Path(base).parent.name}"))
            self._studios[base] = Studio(self.evaluation(base, folder))
        return self._studios[base]

    def strip(self, studio: Studio, row: Row) -> Image.Image:
        """Pictures that stand for a row."""
        return strip(studio.out, row.name)

    def each(self, seen: Seen, row: Row, studio: Studio) -> dict[str, list[float]]:
        """Figures prompt by prompt, by which rows are compared."""
        found = {}
        for name in ("CLIP-I", "CLIP-T"):
            values = seen.column(f"score.{name}")
            assert values is not None
            found[name] = rounded(values.unflatten(0, (-1, row.samples)).mean(1))
        clip = seen.column("clip")
        if row.samples > 1 and clip is not None:
            found["diversity"] = rounded(diversity(clip.unflatten(0, (-1, row.samples))))
        return found

    def dtype(self) -> str:
        """What every base computes in."""
        return str(pick_dtype("auto", torch.device(claim_device(self.choice.device)).type, True)).removeprefix("torch.")

    def _train(self, choice: Train) -> float:
        choice = choice.settled()
        name = Path(choice.out).name
        kept, asked = Path(choice.out) / "trained.json", json.loads(json.dumps(asdict(choice)))
        if kept.is_file():
            done = json.loads(kept.read_text("utf-8"))
            if done["settings"] != asked:
                raise UserError(f"{choice.out} was trained with other settings; delete it, or choose another --out")
            return float(done["minutes"])
        last = None
        for last in recorded(choice, train(choice)):
            self.tell(Progress(name, "training", last.index, last.steps))
        rate = last.images_per_second if last else 0.0  # of the steps alone, since the run was begun or continued
        minutes = choice.steps * choice.batch / rate / 60 if rate else 0.0
        write_file(kept, json.dumps({"minutes": minutes, "settings": asked}))
        return minutes

    def draw(self, studio: Studio, row: Row) -> float:
        """Draw a row and look at it, chunk by chunk, what is there already left out. The minutes it took in all."""
        agree(studio.out / "protocol.json", protocol(studio.choice, studio), f"the evaluation in {studio.out}")
        agree(Shelf(studio.out, row.name).folder / "row.json", facts(row), f"row {row.name} in {studio.out}")
        chunks = studio.chunks(row)
        for number in range(chunks):
            if not Shelf(studio.out, row.name).has(number):
                studio.work(Task(row, number))
            self.tell(Progress(row.name, "drawing", number + 1, chunks))
        return Seen(studio.out, row.name, chunks).seconds / 60


def rounded(values: torch.Tensor, digits: int = 6) -> list[float]:
    return [round(v, digits) for v in values.tolist()]


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


def strips_of(out: Path, rows: Mapping[str, str]) -> dict[str, Image.Image]:
    """Pictures of finished rows, under the names by which a report tells of them: name → row."""
    return {name: Image.open(finished_path(out, row).with_suffix(".png")).convert("RGB") for name, row in rows.items()}


def study_of(choice: Reproduce, tell: Callable[[Progress], None] = lambda at: None) -> Study:
    """The study of the paper that was chosen."""
    from imprompt.studies.ip_adapter import FirstPaper
    from imprompt.studies.personalization import SecondPaper

    kinds: dict[str, type[Study]] = {"ip-adapter": FirstPaper, "personalisation": SecondPaper}
    return kinds[choice.paper](choice, tell)


def report_of(choice: Reproduce) -> tuple[Path, list[Any]]:
    """Write the paper's report with the rows that are there: its page, and the claims with their verdicts."""
    from imprompt.studies import ip_adapter_claims as claims
    from imprompt.studies import personalization_claims as personal_claims

    return {"ip-adapter": claims.report, "personalisation": personal_claims.report}[choice.paper](choice)


# ------------------------------------------------------------------------------------------------------------- the run


_study: Study | None = None


def _begin(choice: Reproduce, queue: Any) -> None:
    global _study
    _study = study_of(choice, queue.put)


def _do(verb: str, words: tuple[str, ...]) -> str:
    assert _study is not None
    return str(getattr(_study, verb)(*words))


def run(choice: Reproduce) -> Iterator[Progress]:
    """Do everything that is missing. Interrupted, the same call goes on."""
    out = writable_folder(choice.out)
    study = study_of(choice)
    agree(out / "reproduce.json", study.facts(), f"the work in {out}")
    stages = study.stages([name for name in study.names() if not finished_path(out, name).is_file()])
    done, total = 0, sum(len(stage) for stage in stages)
    yield Progress("", "rows", done, total)
    with get_context("spawn").Manager() as manager:
        queue = manager.Queue()
        with pool(choice.processes, _begin, choice, queue) as processes:
            for stage in stages:
                waiting: set[Future[str]] = {processes.submit(_do, verb, words) for verb, words in stage}
                while waiting:
                    ready, waiting = wait_for(waiting, timeout=0.5)
                    yield from _told(queue)
                    for future in ready:
                        done += 1
                        yield Progress("", future.result(), done, total)


def prepared(names: Iterable[str]) -> list[Job]:
    return [("prepare", (name,)) for name in sorted(set(names))]


def rows(names: Sequence[str]) -> list[Job]:
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
