"""What a report says and in which order: its document, from the numbers and pictures."""

from collections.abc import Iterable, Mapping, Sequence

from molkd.pipeline.evaluation.best import RULE, best_marks, best_tiles
from molkd.pipeline.evaluation.document import (
    Block,
    Bullets,
    Code,
    Details,
    Document,
    Gallery,
    Paragraph,
    Section,
    Table,
    Tiles,
    table_of,
)
from molkd.pipeline.evaluation.gap import FORMULA
from molkd.pipeline.evaluation.groups import Group
from molkd.pipeline.evaluation.origin import Origin
from molkd.pipeline.evaluation.results import Row, columns
from molkd.pipeline.evaluation.tables import Column

_INTRODUCTION = (
    "Errors are mean absolute errors against the reference labels; forces are those of free atoms. The force "
    "cosine is the mean over atoms, EFwT the share of systems with an energy error below 0.02 eV and every "
    "force component within 0.03 eV/Å. Values are mean ± sample standard deviation over seeds. Throughput "
    "counts the model only, without neighbour lists, on the machine and at the batch size of its evaluation."
)


def build_document(
    tables: Mapping[str, Sequence[Row]],
    galleries: Mapping[str | None, Sequence[tuple[str, Gallery]]],
    remarks: Sequence[str],
    groups: Sequence[Group],
    origin: Origin,
    baselines: Mapping[str, str | None],
    breakdowns: Mapping[str, Sequence[Block]],
) -> Document:
    """Return the page.

    Parameters
    ----------
    tables : rows by data set
    galleries : by data set with their headings, None for those of training
    baselines : name of the group without KD for each name of a group with KD
    breakdowns : what stands below the pictures, by data set
    """
    students = {group.name: group.student for group in groups}
    tiles = Tiles(tuple(best_tiles(tables, baselines)))
    lead: tuple[Block, ...] = (Paragraph(_overview(groups, tables, remarks)), tiles)
    sections = [
        Section(
            f"Results on {name}",
            (*_dataset(name, rows, students, galleries.get(name, ())), *_where(breakdowns.get(name, ()))),
        )
        for name, rows in tables.items()
    ]
    if remarks:
        sections.append(Section("Remarks", (Bullets(tuple(remarks)),)))
    sections += _training(galleries.get(None, ()))
    sections += [
        Section("Runs", (_run_table(groups),)),
        Section("How to repeat this", tuple(_origin(origin))),
        Section("Cite", (Bullets(origin.citations),)),
    ]
    return Document("Distillation report", lead, tuple(sections))


def _overview(groups: Sequence[Group], tables: Mapping[str, Sequence[Row]], remarks: Sequence[str]) -> str:
    n_runs = sum(len(group.runs) for group in groups)
    text = f"{_count(n_runs, 'run')} in {_count(len(groups), 'group')} on {_count(len(tables), 'data set')}."
    if remarks:
        text += f" What limits these numbers is said under Remarks ({len(remarks)})."
    return text


def _dataset(
    name: str, rows: Sequence[Row], students: Mapping[str, str], galleries: Sequence[tuple[str, Gallery]]
) -> Iterable[Block]:
    marks = best_marks(rows, students)
    yield table_of(f"Errors and speed on {name}", [row.cells() for row in rows], columns(rows), marks=marks)
    notes = [_INTRODUCTION]
    notes += [RULE] if any(marks) else []
    notes += [f"{FORMULA[0].upper()}{FORMULA[1:]}."] if any(row.gaps for row in rows) else []
    yield Details("How to read this table", tuple(Paragraph(note) for note in notes))
    for title, gallery in galleries:
        yield Section(title, (gallery,))


def _where(blocks: Sequence[Block]) -> Iterable[Block]:
    if blocks:
        yield Section("Where the errors are", tuple(blocks))


def _training(galleries: Sequence[tuple[str, Gallery]]) -> list[Section]:
    """Put galleries of one heading under it once."""
    titles = dict.fromkeys(title for title, _ in galleries)
    return [Section(title, tuple(g for its, g in galleries if its == title)) for title in titles]


def _run_table(groups: Sequence[Group]) -> Table:
    rows = [
        {
            "name": group.name,
            "seed": run.seed,
            "label": run.label or None,
            "best": run.summary.get("best_step"),
            "seconds": run.seconds,
            "folder": str(run.path),
        }
        for group in groups
        for run in group.runs
    ]
    every = [
        Column("name", "model"),
        Column("seed", "seed"),
        Column("label", "label"),
        Column("best", "best step"),
        Column("seconds", "training (s)"),
        Column("folder", "folder"),
    ]
    shown = [c for c in every if any(row[c.key] is not None for row in rows)]
    return table_of("Runs of this report", rows, shown, code=frozenset({"folder"}))


def _origin(origin: Origin) -> Iterable[Block]:
    if origin.report_command:
        yield Paragraph("This report:")
        yield Code(origin.report_command)
    yield Paragraph(
        "The runs, each in the folder from which it was started. What is not said is as in the student's "
        "preset; every setting stands in config.yaml of the run."
    )
    for name, commands in origin.commands.items():
        runs = _count(len(commands), "run")
        yield Details(f"{name}: {runs}", (Code("\n\n".join(commands)),))
    yield Section("Versions", (_facts("Versions that made runs and report", origin.environments),))
    if origin.conditions:
        table = _facts("What systems per second were measured with", origin.conditions)
        yield Section("Conditions of throughput", (table,))
    if origin.fingerprints:
        keys = frozenset({"sha256"})
        table = _facts("Fingerprints of data and weights", origin.fingerprints, code=keys)
        yield Section("Fingerprints", (table,))


def _facts(caption: str, rows: Sequence[dict[str, str]], code: frozenset[str] = frozenset()) -> Table:
    keys = dict.fromkeys(key for row in rows for key in row)
    return table_of(caption, rows, [Column(key, key) for key in keys], code=code)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
