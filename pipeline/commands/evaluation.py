"""`kd evaluate` and `kd report`: how good models are, alone and beside each other."""

from typing import Any

import click

from molkd.pipeline.commands.output import NEW_PATH, PATH, STORE, as_json, show
from molkd.pipeline.commands.plan import scale_file

group_option = click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="NAME=SET,SET,...",
    help="Test sets whose mean is told too; OC20's four splits need no naming.",
)


@click.command()
@click.argument("model")
@click.argument("data", nargs=-1, required=True, type=STORE)
@scale_file
@group_option
@click.option(
    "--by",
    multiple=True,
    metavar="KIND",
    help="Errors by element, tag, size, formula, source, or info:KEY (a word beside each structure).",
)
@click.option("--worst", type=click.IntRange(min=0), default=0, metavar="N", help="List the N worst systems.")
@click.option("--worst-out", type=NEW_PATH, help="Write them as extxyz, labels and predictions.")
@click.option("--throughput", is_flag=True, help="Measure the speed over many rounds.")
@click.option("--beside", multiple=True, metavar="MODEL", help="With --throughput: compare speeds.")
@click.option("--predictions", type=NEW_PATH, help="Write structures, labels and predictions as extxyz.")
@click.option("--energy-key", help="Name of the energy in the files (eV).")
@click.option("--forces-key", help="Name of the forces in the files (eV/A).")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--device", default="auto", show_default=True)
@as_json
def evaluate(as_json: bool, **flags: Any) -> None:
    """Measure MODEL (a run, a model file or any teacher) on the labels of DATA...

    Several DATA give a row each and the mean in which each counts the same, or the means of --group. The
    throughput of an evaluation is that of the model alone, on this machine at this moment. With --throughput
    it is measured over many rounds, alone and end to end (neighbour lists, transfer, model, results back),
    and the models of --beside take turns with MODEL on the same systems, so that their speeds compare.

    \b
    Example:
      kd evaluate runs/n2n test.extxyz --predictions predicted.extxyz
      kd evaluate runs/n2n val_id val_ood_ads val_ood_cat val_ood_both --by element --worst 10
      kd evaluate runs/n2n test.extxyz --throughput --beside runs/teacher --batch-size 64
    """
    from molkd.pipeline.measuring import evaluate_model

    show(evaluate_model(**flags), as_json)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("--out", required=True, type=NEW_PATH, help="Folder for report.html and the rest.")
@click.option("--teacher", help="Evaluated too; needed for the share of the gap closed.")
@scale_file
@click.option("--test", multiple=True, type=STORE, help="More data that runs and teacher are measured on.")
@group_option
@click.option("--throughput", is_flag=True, help="Measure the speeds of all models anew, in turns.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--energy-key", help="Name of the energy in the files of --test (eV).")
@click.option("--forces-key", help="Name of the forces in the files of --test (eV/A).")
@click.option("--device", default="auto", show_default=True)
@as_json
def report(as_json: bool, **flags: Any) -> None:
    """Compare RUNS on one page: errors and their spread, gap closed, speed, curves, scans, parity, commands.

    FOLDER/report.html is one file that needs nothing else: send it as it is. The same stands in report.md,
    results.csv and results.json. Each run also gets its card.md.

    \b
    Example:
      kd report runs/* --out report --teacher teacher.safetensors --test test.extxyz
      kd report runs/* --out report --group hot=test_600K,test_1200K
    """
    from molkd.pipeline.evaluating import report_runs

    show(report_runs(**flags), as_json)
