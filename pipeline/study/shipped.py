"""Study files that come with the package: the paper's tables, and smaller ones for a laptop."""

from importlib.resources import files
from pathlib import Path

from molkd.pipeline.errors import ConfigError
from molkd.pipeline.files import write_atomic
from molkd.pipeline.study.names import nearest

_FOLDER = files("molkd.pipeline.study") / "examples"


def example_names() -> list[str]:
    """Return the names of all examples."""
    names = (item.name for item in _FOLDER.iterdir() if item.name.endswith(".yaml"))
    return sorted(name.removesuffix(".yaml") for name in names)


def example_text(name: str) -> str:
    """Return the text of an example.

    Raises
    ------
    ConfigError
        If there is none of this name.
    """
    if name not in example_names():
        raise ConfigError(f"--example {name}: no such study; {nearest(name, example_names())}")
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def copy_example(name: str, path: Path) -> None:
    """Write an example to a new file.

    Raises
    ------
    ConfigError
        If there is none of this name, or the file exists.
    DataError
        If it cannot be written.
    """
    text = example_text(name)
    if path.exists():
        raise ConfigError(f"{path}: is there already; name a new file")
    write_atomic(path, text)


def describe_examples() -> dict[str, str]:
    """Return what each example is for: the first line of its file."""
    return {name: example_text(name).partition("\n")[0].lstrip("# ") for name in example_names()}
