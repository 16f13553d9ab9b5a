"""`kd train-student`: stage two."""

import sys
from pathlib import Path
from typing import Any

import click

from molkd.pipeline.commands.evaluation import group_option
from molkd.pipeline.commands.output import NEW_PATH, PATH, STORE, as_json, given, show


@click.command("train-student")
@click.argument("store", type=STORE)
@click.option("--student", required=True, help="Preset: painn-small, schnet, gemnet-oc-small, ...")
@click.option(
    "--kd",
    "kd_terms",
    multiple=True,
    metavar="LOSS[:TAPS][=LAMBDA][,KEY=VALUE]",
    help="auto (the default), none, or any of n2n, e2n, v2v, e2e, vanilla1, vanilla2, grad; TAPS are U4, "
    "U2+U4 or 'H3->U4'; LAMBDA is auto, balance or a number; KEY is head, loss, delta or fade.",
)
@click.option("--out", required=True, type=NEW_PATH, help="Run folder.")
@click.option(
    "--kd-head",
    type=click.Choice(["identity", "linear", "mlp"]),
    default="linear",
    show_default=True,
    help="Of losses on features that do not choose their own.",
)
@click.option(
    "--kd-loss",
    type=click.Choice(["mse", "mae", "huber", "cka", "gsp", "lsp"]),
    default="mse",
    show_default=True,
    help="How they compare features.",
)
@click.option("--teacher", help="Which one, if the store has several.")
@click.option("--pseudo-labels", is_flag=True, default=None, help="Missing labels come from the teacher.")
@click.option("--mix", multiple=True, type=STORE, help="A further store to train on; may be repeated.")
@click.option("--mix-share", multiple=True, type=float, help="Share of each batch from it; default 0.25.")
@click.option("--mix-weight", multiple=True, type=float, help="k of Eqs. 9-11: its loss weight ratio; 1.")
@click.option("--val", type=STORE, help="Validation data or store; default: a part of STORE by id.")
@click.option("--val-fraction", type=float, help="Share of STORE held out by id; default 0.1.")
@click.option("--test", multiple=True, type=STORE, help="Evaluated once at the end; never trained on.")
@group_option
@click.option("--energy-key", help="Name of the energy in validation and test files (eV).")
@click.option("--forces-key", help="Name of the forces in validation and test files (eV/A).")
@click.option("--epochs", type=int, help="Passes over the training systems.")
@click.option("--steps", type=int, help="Steps at most.")
@click.option("--batch-size", type=int, help="Systems a step.")
@click.option("--lr", type=float, help="Initial learning rate.")
@click.option("--seed", type=int)
@click.option("--device", help="auto, cpu, cuda, cuda:1.")
@click.option("--amp", type=click.Choice(["off", "bf16"]), help="Mixed precision; default off.")
@click.option("--tensorboard", is_flag=True, default=None, help="Also write TensorBoard events.")
@click.option("--label", help="Name in reports.")
@click.option("--config", "config_file", type=PATH, help="YAML file of settings.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting: training.lr=1e-4"
)
@as_json
def train_student(
    as_json: bool, config_file: Path | None, assignments: tuple[str, ...], **flags: Any
) -> None:
    """Train a student on STORE; --kd says what it learns from the cached teacher.

    --kd auto takes a recipe (docs/conventions.md), as far as store and student have what it needs,
    and the teacher's labels where there are none. LAMBDA is the paper's weight, or auto: then the term
    starts as large as the loss on the labels; balance makes its gradient as large as theirs. TAPS say
    which layers n2n, e2n and v2v compare: U4 is one of the student, U2+U4 are two of them together, and in
    H3->U4 the teacher's H3 is learnt (quote the > for the shell). Each loss may choose its head (identity,
    linear, mlp) and how features are compared (mse, mae, huber with its delta; cka, gsp, lsp). e2e trains on
    the teacher's edges. With --kd none this is ordinary training, also the way to train a teacher. The same
    command continues.

    --mix takes a share of every batch from another store of the same teacher, and weighs its losses k times
    as much as those of STORE; --mix-share and --mix-weight go for all --mix, or are given as often as it.

    \b
    Example:
      kd train-student coll.kdcache --student painn-small --out runs/auto
      kd train-student coll.kdcache --student painn-small --kd n2n=auto --kd v2v=1.0 --out runs/n2n
      kd train-student coll.kdcache --student painn-small --kd 'n2n:H3->U2+U4' --out runs/layers
      kd train-student coll.kdcache --student painn-small --kd n2n=10,head=mlp,loss=huber --out runs/huber
      kd train-student coll.kdcache --student painn-big --kd none --out runs/teacher
      kd train-student coll.kdcache --student painn-small --kd n2n --mix rattled.kdcache --out runs/mix
    """
    from molkd.pipeline.distill.settings import resolve
    from molkd.pipeline.distill.train import train_student as run

    summary = run(resolve(config_file, assignments, given(flags)))
    show(summary, as_json)
    if not summary.finished:
        sys.exit(130)  # interrupted: what waits for this run must not go on
