"""Files of `torch.save` read without executing anything in them."""

import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molkd.pipeline.data.records import PARSER_ERRORS
from molkd.pipeline.data.restricted_unpickler import NUMPY_SCALARS
from molkd.pipeline.errors import TeacherError

_DAMAGE_ERRORS: tuple[type[Exception], ...] = (*PARSER_ERRORS, struct.error)
_NAMED = re.compile(r"GLOBAL (\S+)")
# What else torch says there is advice to trust the file.
_REASON = re.compile(r"WeightsUnpickler error:\s*(.*)")


def read_torch_file(path: Path) -> Any:
    """Return what a file holds: tensors, plain containers and numpy scalars; tensors are on the host.

    Raises
    ------
    TeacherError
        If the file is missing, damaged, or names anything else to be imported; nothing has run then.
    """
    # Numpy's names stand for small classes of ours, so that not even numpy is called.
    allowed = torch.serialization.safe_globals([(kind, name) for name, kind in NUMPY_SCALARS.items()])
    try:
        with warnings.catch_warnings(), allowed:
            warnings.simplefilter("ignore")  # that a pickle is of another protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TeacherError(f"{path}: no such file; check the path") from None
    except (PermissionError, IsADirectoryError) as error:
        raise TeacherError(
            f"{path}: cannot be opened ({error.strerror}); check the path and its rights"
        ) from None
    except pickle.UnpicklingError as error:
        named = _NAMED.search(str(error))
        if named is None:
            reason = _REASON.search(str(error))
            raise TeacherError(_damaged(path, reason[1] if reason else "its pickle is broken")) from None
        raise TeacherError(
            f"{path}: refused, its pickle asks for {named[1]}, and a checkpoint needs tensors, plain "
            "containers and numpy scalars only. Nothing was run. Take the file from a source you trust, "
            "or save its state_dict, config and normalizers anew without such objects"
        ) from None
    except _DAMAGE_ERRORS as error:
        raise TeacherError(_damaged(path, f"{type(error).__name__}: {error}")) from None


def as_number(value: Any) -> float | None:
    """Return a number that a file holds as such, as numpy scalar or as tensor of one element; else None."""
    if isinstance(value, Tensor):
        return float(value.detach().item()) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float | np.generic) else None


def _damaged(path: Path, reason: str) -> str:
    short = " ".join(reason.split())[:200]
    return f"{path}: truncated, damaged or no file of torch.save ({short}); copy it again"
