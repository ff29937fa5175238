"""The registry of the studies, and the processes that run their jobs."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import NamedTuple

from imprompt.config import ReproduceConfig
from imprompt.evaluation.workers import process_pool
from imprompt.studies import ip_adapter_claims, personalization_claims
from imprompt.studies.base import Study, StudyProgress, result_path
from imprompt.studies.claims import Claim
from imprompt.studies.ip_adapter import IPAdapterStudy
from imprompt.studies.personalization import PersonalizationStudy
from imprompt.utils.files import check_or_write_manifest, ensure_writable_folder


class StudyInfo(NamedTuple):
    """What the registry knows of a paper's study."""

    study: type[Study]
    write_report: Callable[[ReproduceConfig], tuple[Path, list[Claim]]]


STUDIES = {
    "ip-adapter": StudyInfo(IPAdapterStudy, ip_adapter_claims.write_report),
    "personalization": StudyInfo(PersonalizationStudy, personalization_claims.write_report),
}


def create_study(config: ReproduceConfig, on_progress: Callable[[StudyProgress], None] = lambda progress: None) -> Study:
    """The study of the configured paper."""
    return STUDIES[config.paper].study(config, on_progress)


def write_report(config: ReproduceConfig) -> tuple[Path, list[Claim]]:
    """Write the paper's report with the rows that are finished. Returns the path of its page, and the evaluated claims."""
    return STUDIES[config.paper].write_report(config)


def run_study(config: ReproduceConfig) -> Iterator[StudyProgress]:
    """Run every job of missing rows on the configured processes. After an interruption the same call continues."""
    out = ensure_writable_folder(config.output_dir)
    study = create_study(config)
    check_or_write_manifest(out / "reproduce.json", study.build_manifest(), f"the work in {out}")
    stages = study.plan_stages([row_id for row_id in study.row_ids() if not result_path(out, row_id).is_file()])
    done, total = 0, sum(len(jobs) for jobs in stages)
    yield StudyProgress("", "rows", done, total)
    queue = get_context("spawn").SimpleQueue()  # without a process of its own, which would outlive this one
    with process_pool(config.num_processes, create_study, config, queue.put) as processes:
        for jobs in stages:
            pending: set[Future[str]] = {processes.submit(job) for job in jobs}
            while pending:
                finished, pending = wait(pending, timeout=0.5)
                yield from _drain(queue)
                for future in finished:
                    done += 1
                    yield StudyProgress("", future.result(), done, total)


def _drain(queue: "SimpleQueue[StudyProgress]") -> Iterator[StudyProgress]:
    """What the processes have reported since the last call."""
    while not queue.empty():
        yield queue.get()
