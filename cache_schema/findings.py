"""What a check of a store finds: problems, and notes on what is harmless."""

from dataclasses import dataclass, field

# Left by writers that were stopped, or by hand; nothing that is read depends on them.
HARMLESS = ("temporary", "uncommitted", "unfinished", "orphan", "base")


@dataclass(frozen=True)
class Problem:
    """One finding."""

    # plan, systems, metadata, record, manifest, missing, size, checksum, identity, edges, overlay, or one of
    # HARMLESS
    kind: str
    path: str  # within the store
    message: str
    remedy: str
    array: str = ""  # "atoms/positions"
    shard: int | None = None
    chunk: int | None = None  # inner chunk; None if it is the index or unknown

    def __str__(self) -> str:
        text = self.message  # of an error, which names file and remedy itself
        if self.path not in text.partition(": ")[0]:
            text = f"{self.path}: {text}"
        return text if self.remedy in text else f"{text}; {self.remedy}"


@dataclass
class Report:
    """What was found."""

    quick: bool
    problems: list[Problem] = field(default_factory=list)  # what is committed is missing or not as written
    notes: list[Problem] = field(default_factory=list)  # harmless: unfinished, left over, foreign
    n_files: int = 0
    n_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether all that is committed is as it was written; a quick check looks at sizes only."""
        return not self.problems
