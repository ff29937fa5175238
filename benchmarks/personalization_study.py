"""What the benchmarks on the personalization study share: its work folder, a progress bar, and ID similarity by subject."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.progress import Progress
from torch import Tensor

from imprompt.config import ReproduceConfig
from imprompt.evaluation.metrics import cosine_similarity
from imprompt.evaluation.runner import EvalRow, Evaluation
from imprompt.studies.base import StudyProgress
from imprompt.studies.claims import mean_per_subject


def parse_study_config(benchmark: str, description: str | None, arguments: Sequence[str]) -> ReproduceConfig:
    """The configuration of the study in whose work folder a benchmark continues."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {benchmark}", description=description)
    parser.add_argument("--small", action="store_true", help="the study's smoke budget: shows only that it runs")
    parser.add_argument("--output-dir", help="work folder of the study (default: runs/personalization)")
    args = parser.parse_args(arguments)
    out = args.output_dir or ("runs/personalization-small" if args.small else "runs/personalization")
    budget = "smoke" if args.small else "full"
    return ReproduceConfig.from_options(paper="personalization", budget=budget, output_dir=out, num_processes=1)


@contextmanager
def study_progress_bar(benchmark: str) -> Iterator[Callable[[StudyProgress], None]]:
    """A progress bar, as the callback of a study."""
    with Progress(transient=True) as progress_bar:
        task = progress_bar.add_task(benchmark)
        yield lambda step: progress_bar.update(task, description=f"{step.row}: {step.stage}", completed=step.done, total=step.total)


def id_similarity_by_subject(evaluation: Evaluation, row: EvalRow, centroids: Tensor) -> Tensor:
    """ID similarity of the images of one compared system (a row of the study's table) to their subjects, (subjects,).

    centroids: (subjects, width). The column "group" is the index of an image's subject.
    """
    features = evaluation.load_features(row)
    similarity = cosine_similarity(features["id_embeds"], centroids[features["group"]])
    return mean_per_subject(similarity.tolist(), features["group"].tolist())
