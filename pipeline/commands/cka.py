"""`kd cka`: how alike the features of models are, layer by layer."""

from typing import Any

import click

from molkd.pipeline.commands.output import NEW_PATH, STORE, WORDS, as_json, show
from molkd.pipeline.commands.plan import scale_file


@click.command()
@click.argument("a", required=False)
@click.argument("b", required=False)
@click.option("--data", type=STORE, help="Structures, or a store; default: those of --store.")
@click.option("--out", required=True, type=NEW_PATH, help="Folder for cka.json, cka.csv and cka.png.")
@click.option("--store", type=STORE, help="Compare with a teacher's signals in this store.")
@click.option("--teacher", help="Which one, if the store has several.")
@scale_file
@click.option("--taps", type=WORDS, help="Features, as U2,U4,node; default: all scalar layers and node.")
@click.option("--taps-b", type=WORDS, help="Those of the second side, if they differ.")
@click.option(
    "--systems",
    "n_systems",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="So many at most, drawn at random.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of what is drawn.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--device", default="auto", show_default=True)
@as_json
def cka(as_json: bool, taps: str | None, taps_b: str | None, **flags: Any) -> None:
    """Compare the features of A with its own, with those of B, or with a teacher's in --store.

    A and B are run folders, model files or any teacher. The value is the unbiased linear CKA over random
    batches of atoms: 1 for features that are equal up to rotation and scale, 0 for unrelated ones. A run
    folder A also keeps the result for reports.

    \b
    Example:
      kd cka runs/n2n --data test.extxyz --out cka-within
      kd cka runs/plain runs/n2n --data test.extxyz --out cka-before-after
      kd cka runs/n2n --store coll.kdcache --taps U4 --taps-b node --out cka-teacher
    """
    from molkd.pipeline.comparing import compare

    show(compare(**flags, taps=_names(taps), taps_b=_names(taps_b)), as_json)


def _names(text: str | None) -> list[str]:
    return [name for name in (text or "").replace(",", " ").split() if name]
