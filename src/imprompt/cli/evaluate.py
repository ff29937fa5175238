"""`imprompt evaluate` and `imprompt reproduce`."""

from imprompt.cli.console import print_json, print_location, print_table, progress_bar, silence_third_party_logs
from imprompt.config import EvaluateConfig, ReproduceConfig
from imprompt.utils.signals import explain_interrupt
from imprompt.utils.text import escape

_INTERRUPTED = "what is finished is kept, and the same command continues"
MAX_LISTED_PROMPTS = 5  # skipped prompts that are listed for each row


def run_evaluate(config: EvaluateConfig, *, json: bool) -> None:
    """Generate, compute metrics, and print where the report is."""
    config = config.with_defaults()
    silence_third_party_logs()
    with explain_interrupt(_INTERRUPTED), progress_bar(f"loading {config.pipeline.model}") as progress:
        from imprompt.evaluation import report
        from imprompt.evaluation.runner import Evaluation, run_evaluation
        from imprompt.utils.memory import explain_oom

        with explain_oom("take a smaller --batch-size"):
            for at in run_evaluation(config):
                progress.rename("evaluating")
                progress.advance(at.done, at.total, f"{at.row} · {at.images_per_second:.1f} images/s")
        progress.rename("scoring")
        evaluation, scores = Evaluation(config), []
        for row in evaluation.rows:
            scores.append(report.score_row(evaluation, row))
            progress.advance(len(scores), len(evaluation.rows), row.name)
        page = report.write_evaluation_report(evaluation, scores)
        if evaluation.eval_set.description:
            progress.log(evaluation.eval_set.description)
    if json:
        print_json(page=str(page), rows=[report.score_to_json(score) for score in scores])
        return
    rows = [score for score in scores if not score.sweep_of]
    header, *cells = report.score_cells(rows)
    print_table(cells, header)
    if note := report.explain_withheld(rows).strip():
        print(escape(note))
    for row in evaluation.rows:
        skipped = evaluation.load_features(row).skipped
        for name, reason in list(skipped.items())[:MAX_LISTED_PROMPTS]:
            print(f"skipped in {escape(row.name)}: prompt {escape(name)}: {escape(reason)}")
        if skipped and row.source == "copy":
            print(f"once they are repaired, delete {escape(evaluation.output_dir)} or choose another --output-dir")
    print_location(page, evaluation.output_dir)


def run_reproduce(config: ReproduceConfig, *, json: bool) -> None:
    """Do what is missing, and print the claims with their verdicts."""
    silence_third_party_logs()
    with explain_interrupt(_INTERRUPTED), progress_bar("reproducing") as progress:
        from imprompt.studies.runner import run_study, write_report

        done, total = 0, 1
        for at in run_study(config):
            if not at.row:
                done, total = at.done, at.total
                if at.stage != "rows":
                    progress.log(f"{at.stage} done ({done} of {total})")
            progress.advance(done, total, f"{at.row}: {at.stage} {at.done}/{at.total}" if at.row else "")
        page, claims = write_report(config)
    if json:
        print_json(page=str(page), claims=[claim._asdict() | {"verdict": claim.verdict} for claim in claims])
        return
    print_table(
        [(f"({claim.letter})", claim.verdict, claim.text, claim.evidence) for claim in claims], ("claim", "verdict", "", "evidence")
    )
    print_location(page, config.output_dir)
