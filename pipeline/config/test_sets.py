"""Named groups of test sets as a user asks for them, and how they are written on the command line."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from molkd.pipeline.errors import ConfigError


@dataclass(frozen=True)
class SplitGroup:
    """A name for several test sets, whose mean is told."""

    name: str
    splits: tuple[str, ...]

    def problem(self, names: Collection[str]) -> str | None:
        """Say what is wrong where the test sets are called `names`; None if nothing is."""
        unknown = [split for split in self.splits if split not in names]
        if unknown:
            have = f"there {'is' if len(names) == 1 else 'are'} {', '.join(names) or 'none'}"
            return f"group {self.name}: no test set is called {' or '.join(unknown)}; {have}"
        if not self.splits or len(set(self.splits)) < len(self.splits):
            return f"group {self.name}: name each of its test sets once"
        if self.name in names:
            return f"group {self.name}: a test set has this name; choose another for the group"
        return None


def parse_groups(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Read texts such as oc20=val_id,val_ood_ads,val_ood_cat,val_ood_both.

    Raises
    ------
    ConfigError
        If one is not of this form, or a name is given twice.
    """
    groups: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, separator, members = text.partition("=")
        splits = tuple(part.strip() for part in members.split(",") if part.strip())
        if not (separator and name.strip() and splits):
            raise ConfigError(f"--group {text}: write it as NAME=SET,SET,... for example hot=600K,1200K")
        if name.strip() in groups:
            raise ConfigError(f"--group {text}: the name is given twice")
        groups[name.strip()] = splits
    return groups
