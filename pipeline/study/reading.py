"""Read a study file. Paths in it are relative to the file; `bundled:NAME` is a file of the package's demo."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from molkd.cache_schema.remote import is_url
from molkd.pipeline.config import make_config, merged, parse_assignments, read_yaml
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.study.names import BUNDLED
from molkd.pipeline.study.schema import StudyConfig, TeacherSpec


def read_study(
    path: Path, assignments: Sequence[str] = (), out: Path | None = None, *, here: Path | None = None
) -> StudyConfig:
    """Read a study file; paths come back absolute.

    Parameters
    ----------
    assignments : ``key=value`` that win over the file, for example ``steps=100``
    out : wins over both; relative to the current folder
    here : what paths in the file are relative to; None: its folder

    Raises
    ------
    ConfigError
        With every problem and, for an unknown key, the nearest valid one.
    """
    content = merged(read_yaml(path), parse_assignments(assignments))
    try:
        study = make_config(StudyConfig, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    base = (here or path.parent).absolute()
    update: dict[str, Any] = {
        "out": out.absolute() if out else _absolute(study.out, base),
        "store": _absolute(study.store, base),
        "val": _absolute(study.val, base) if study.val else None,
        "test": {name: _absolute(place, base) for name, place in study.test.items()},
        "set": _with_stores(study.set, base),
        "pairs": tuple(p.model_copy(update={"set": _with_stores(p.set, base)}) for p in study.pairs),
        "strategies": {
            name: s.model_copy(update={"set": _with_stores(s.set, base)})
            for name, s in study.strategies.items()
        },
        "settings": {
            axis: {name: _with_stores(given, base) for name, given in alternatives.items()}
            for axis, alternatives in study.settings.items()
        },
        "teachers": {name: _with_places(spec, base) for name, spec in study.teachers.items()},
        "report": study.report.model_copy(
            update={"test": tuple(_absolute(place, base) for place in study.report.test)}
        ),
    }
    if study.data:
        places = {key: tuple(_absolute(p, base) for p in getattr(study.data, key)) for key in _PLACES}
        update["data"] = study.data.model_copy(update=places)
    return study.model_copy(update=update)


_PLACES = ("files", "drop_labels")


def _absolute(place: Path | str, base: Path) -> Any:
    """Return a place that means the same from every folder."""
    text = str(place)
    if text.startswith(BUNDLED):
        return Path(str(files("molkd.pipeline.demo"))) / text.removeprefix(BUNDLED)
    return text if is_url(text) else base / Path(text).expanduser()


def _with_places(spec: TeacherSpec, base: Path) -> TeacherSpec:
    """Return a teacher whose model, if it is a file rather than a name, is found from every folder."""
    update: dict[str, Any] = {}
    if spec.model is not None and ("/" in spec.model or "." in spec.model or (base / spec.model).exists()):
        update["model"] = str(_absolute(spec.model, base))
    if spec.scale_file is not None:
        update["scale_file"] = _absolute(spec.scale_file, base)
    return spec.model_copy(update=update)


def _with_stores(assignments: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Return settings in which further stores to train on (`mix`) are found from every folder."""
    mix = assignments.get("mix")
    if not isinstance(mix, list | tuple):
        return dict(assignments)
    stores = [
        {**one, "store": _absolute(one["store"], base)}
        if isinstance(one, Mapping) and "store" in one
        else one
        for one in mix
    ]
    return {**assignments, "mix": stores}
