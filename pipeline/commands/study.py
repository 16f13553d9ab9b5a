"""`kd study`: a grid of runs from one cache, and the tables over them."""

import sys
from pathlib import Path

import click

from molkd.pipeline.commands.output import NEW_PATH, PATH, as_json, given, show


@click.command()
@click.argument("study", required=False, type=PATH)
@click.option("--out", type=NEW_PATH, help="Folder of the study; default: as the file says, or its name.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Runs side by side on this machine.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Of each run; default 1 on a CPU.")
@click.option("--scheduler", metavar="ADDRESS", help="A Dask scheduler whose workers make the runs.")
@click.option("--worker", metavar="I/N", help="As job I of an array of N, counted from 0: every N-th run.")
@click.option("--only", metavar="PATTERN", help="Runs whose folder, or a part of it, a shell pattern fits.")
@click.option("--retry", is_flag=True, help="Also runs that diverged before.")
@click.option("--prepare", is_flag=True, help="Make the store and teachers only.")
@click.option("--report", is_flag=True, help="Make the tables only, of what has finished.")
@click.option("--dry-run", is_flag=True, help="Show the grid, what is done, time and disk; write nothing.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="A key of the file: steps=100, seeds=1"
)
@click.option("--list", "lists", is_flag=True, help="Name the studies that come with the package.")
@click.option(
    "--example",
    metavar="NAME",
    help="Copy one of them to STUDY; without STUDY, print it.",
)
@as_json
def study(
    as_json: bool,
    study: Path | None,
    out: Path | None,
    assignments: tuple[str, ...],
    prepare: bool,
    report: bool,
    dry_run: bool,
    lists: bool,
    example: str | None,
    **how: object,
) -> None:
    """Make the runs that STUDY, a YAML file, lists, and the tables over them.

    Pairs of teacher and student x strategies x settings x seeds; each run is an ordinary one of
    kd train-student, in OUT/runs/PAIR/STRATEGY/seedK. What has finished is skipped, what was interrupted
    continues, what fails is named at the end and stops nothing else. The tables are in OUT/report.

    \b
    Example:
      kd study --list
      kd study --example table12-coll study.yaml
      kd study study.yaml --dry-run
      kd study study.yaml --jobs 4
    """
    from molkd.pipeline.study.shipped import copy_example, describe_examples, example_text

    if lists:
        show(describe_examples(), as_json)
        return
    if example is not None:
        if study is None:
            click.echo(example_text(example), nl=False)
        else:
            copy_example(example, study)
        return
    if study is None:
        raise click.UsageError("Missing argument 'STUDY'; kd study --list names some to begin with.")
    if prepare + report + dry_run > 1:
        raise click.UsageError("--prepare, --report and --dry-run exclude each other")
    from molkd.pipeline.config import make_config
    from molkd.pipeline.study import run
    from molkd.pipeline.study.dry_run import dry_run as price
    from molkd.pipeline.study.options import StudyOptions
    from molkd.pipeline.study.reading import read_study

    config, options = read_study(study, assignments, out), make_config(StudyOptions, given(how))
    if dry_run:
        show(price(config, options), as_json)
        return
    act = run.prepare_study if prepare else run.report_study if report else run.run_study
    summary = act(config, options)
    show(summary, as_json)
    if summary.failed and not prepare:
        sys.exit(1)
