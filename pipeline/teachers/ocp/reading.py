"""Files of `torch.save` read without executing anything in them."""

import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import torch

from molkd.pipeline.data.records import PARSER_ERRORS
from molkd.pipeline.data.restricted_unpickler import NUMPY_SCALARS
from molkd.pipeline.errors import TeacherError

_DAMAGE_ERRORS: tuple[type[Exception], ...] = (*PARSER_ERRORS, struct.error)
_NAMED = re.compile(r"GLOBAL (\S+)")


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
    except pickle.UnpicklingError as error:
        named = _NAMED.search(str(error))
        if named is None:
            raise TeacherError(_damaged(path, error)) from None
        raise TeacherError(
            f"{path}: refused, its pickle asks for {named[1]}, and a checkpoint needs tensors, plain "
            "containers and numpy scalars only. Nothing was run. Take the file from a source you trust, "
            "or save its state_dict, config and normalizers anew without such objects"
        ) from None
    except _DAMAGE_ERRORS as error:
        raise TeacherError(_damaged(path, error)) from None


def _damaged(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{path}: truncated, damaged or no file of torch.save ({reason}); copy it again"
