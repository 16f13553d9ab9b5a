"""What every command uses: types of arguments, and how a result is printed."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


class StoreType(click.ParamType):  # type: ignore[type-arg]  # older versions of click have none
    """A store that is read: a folder, or the URL of one on a server."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:  # noqa: ARG002
        """Return the text of a URL, or a path; a path would lose one of the slashes."""
        from molkd.cache_schema.remote import is_url

        return value if isinstance(value, str) and is_url(value) else Path(value)


class NewStoreType(click.ParamType):  # type: ignore[type-arg]
    """A store that is written: a folder."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # noqa: ARG002
        """Return a path; refuse a URL, of which a path would make folders."""
        from molkd.cache_schema.remote import writable_root

        return writable_root(value)


class NewPathType(click.ParamType):  # type: ignore[type-arg]
    """A file or folder that is written and is no store."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # noqa: ARG002
        """Return a path; refuse a URL, of which a path would make folders."""
        from molkd.cache_schema.remote import is_url
        from molkd.pipeline.errors import ConfigError

        if is_url(value):
            raise ConfigError(
                f"{value}: only stores are written to servers (kd cache copy); give a local path, "
                "then upload what is there"
            )
        return Path(value)


class WordsType(click.ParamType):  # type: ignore[type-arg]
    """Text that says something."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return it; refuse what is empty, as of a variable that is not set, and would ask for everything."""
        if not value.replace(",", " ").strip():
            self.fail("is empty; say what is meant, or leave the option out", param, ctx)
        return str(value)


STORE, NEW_STORE, NEW_PATH = StoreType(), NewStoreType(), NewPathType()
WORDS = WordsType()
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Only what the user said: the rest comes from the settings' own defaults."""
    return {key: value for key, value in flags.items() if value is not None and value != ()}


def show(result: Any, as_json: bool, describe: Callable[[Any], str] | None = None) -> None:
    """Print a summary: JSON, or a description, or its own text, or one line a field."""
    plain = result
    if hasattr(result, "to_dict"):
        plain = result.to_dict()
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        plain = dataclasses.asdict(result)
    if as_json:
        click.echo(json.dumps(plain, indent=2, default=str))
    elif describe is not None:
        click.echo(describe(result))
    elif hasattr(result, "text"):
        click.echo(result.text())
    else:
        _print_mapping(plain, "")


def _print_mapping(content: Mapping[str, Any], indent: str) -> None:
    width = max((len(str(key)) for key in content), default=0)
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            click.echo(f"{indent}{key}")
            _print_mapping(value, indent + "  ")
        elif isinstance(value, list | tuple) and value:
            click.echo(f"{indent}{key}")
            for item in value:
                click.echo(f"{indent}  {item}")
        elif value not in ({}, [], (), "", None):
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            click.echo(f"{indent}{key!s:<{width}}  {f'{shown:.6g}' if isinstance(shown, float) else shown}")
