"""The unpickler against pickles that want to run something, and against torch itself."""

import builtins
import io
import os
import pickle
import posix
from collections import OrderedDict

import numpy as np
import pytest
import torch

from molkd.pipeline.data.restricted_unpickler import load_count, load_record
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.errors import DataError


class Calls:
    """Pickles as the call function(*args)."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def evil_pickles(marker):
    """Return name -> (pickle that tries to create `marker`, words that the message must hold)."""
    touch = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    evil = Calls(builtins.eval, touch)
    inner = pickle.dumps(evil)
    load = torch.storage._load_from_bytes
    rebuild = torch._utils._rebuild_tensor_v2
    zip_blob = io.BytesIO()
    torch.save(torch.ones(2), zip_blob)
    object_dtype = Calls(np.dtype, "O8", False, True)
    data = b"ctorch_geometric.data.data\nData\n"
    return {
        "os.system": (pickle.dumps(Calls(os.system, f"touch {marker}")), "posix.system"),
        "eval": (inner, "builtins.eval"),
        "eval protocol 0": (pickle.dumps(evil, protocol=0), "__builtin__.eval|builtins.eval"),
        "inside a record": (pickle.dumps({"pos": [1, {"x": evil}]}), "builtins.eval"),
        "getattr chain": (pickle.dumps(Calls(builtins.getattr, {}, "pop")), "builtins.getattr"),
        "exec by opcode INST": (b"(S'1'\nios\nsystem\n.", "os.system"),
        "torch.load": (pickle.dumps(Calls(torch.load, "x")), "torch.serialization.load"),
        "torch storage that is a pickle": (pickle.dumps(Calls(load, inner)), "builtins.eval"),
        "torch storage as zip": (pickle.dumps(Calls(load, zip_blob.getvalue())), "pickle"),
        "later pickle of a torch storage": (
            pickle.dumps(Calls(load, pickle.dumps(0x1950A86A20F9469CFC6C) + inner)),
            "builtins.eval",
        ),
        "tensor of something else": (pickle.dumps(Calls(rebuild, [1.0], 0, (1,), (1,))), "without storage"),
        "numpy object scalar": (
            pickle.dumps(Calls(np._core.multiarray.scalar, object_dtype, inner)),
            "'O8' is not a plain number",
        ),
        "attribute of an allowed class": (data + b"(N}VmessageS\nVx\nstb.", "__setstate__|pickle"),
        "state of an allowed class": (data + b"}Vx\nI1\nsb.", "pickle"),
        "state of the tensor class": (
            b"ctorch._utils\n_rebuild_tensor_v2\n(N}Vx\nI1\nstb.",
            "changes _Tensor.x",
        ),
        "dict of its own": (b"ccollections\nOrderedDict\n(N}Vx\nI1\nstb.", "pickle"),
        "dotted name": (
            b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
            "OrderedDict.__init__",
        ),
    }


NAMES = sorted(evil_pickles("x"))


@pytest.mark.parametrize("name", NAMES)
def test_malicious_pickle_is_refused_and_runs_nothing(tmp_path, write_lmdb, name):
    marker = tmp_path / "marker"
    data, words = evil_pickles(marker)[name]
    path = write_lmdb(tmp_path / "evil.lmdb", {b"0": data})
    with pytest.raises(DataError, match=rf"(?s)evil\.lmdb, key 0: .*({words})"):
        open_source(path)
    assert not marker.exists()


def test_the_pickles_are_malicious(tmp_path):
    """The plain unpickler does run them: the test above would notice."""
    marker = tmp_path / "marker"
    pickle.loads(evil_pickles(marker)["eval"][0])
    assert marker.exists()
    assert os.system is posix.system


def test_malicious_length(tmp_path, write_lmdb):
    marker = tmp_path / "marker"
    path = write_lmdb(tmp_path / "evil.lmdb", {b"length": evil_pickles(marker)["eval"][0]})
    with pytest.raises(DataError, match=r"evil\.lmdb, key length: .*builtins\.eval"):
        open_source(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_equal_torch(dtype, protocol):
    whole = (torch.arange(24).reshape(4, 6) % 2).to(getattr(torch, dtype))
    tensors = {
        "whole": whole,
        "transposed": whole.t(),
        "part": whole[1:3, 2:],
        "empty": whole[:0],
        "one": whole[0, 0],
    }
    record = load_record(pickle.dumps(OrderedDict(tensors), protocol=protocol), "here")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(record[name], tensor.numpy())
        assert record[name].dtype == tensor.numpy().dtype


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_values(protocol):
    values = {
        "a": np.arange(6, dtype=">f4").reshape(2, 3),
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "s": np.float64(1.5),
        "b": np.bool_(True),
    }
    if protocol == 5:  # contiguous arrays are pickled through a buffer function there
        del values["a"], values["f"]
    record = load_record(pickle.dumps(values, protocol=protocol), "here")
    for name, value in values.items():
        np.testing.assert_array_equal(record[name], value)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (-1, (2,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (-1,), (1,)),
        (0, (2,), (-1,)),
        (0, (10**12,), (0,)),
        (0, (2,), (1, 1)),
        (2**62, (1,), (1,)),
    ],
)
def test_tensor_outside_its_storage(offset, size, stride):
    storage = torch.arange(4.0).__reduce_ex__(2)[1][0]
    call = Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
    with pytest.raises(DataError, match="reaches outside"):
        load_record(pickle.dumps({"x": call}), "here")


def test_cut_off_at_every_byte():
    data = pickle.dumps({"pos": torch.arange(6.0), "y": np.float64(1.0), "name": "x"})
    for n_bytes in range(len(data)):
        with pytest.raises(DataError, match="here: "):
            load_record(data[:n_bytes], "here")


def test_length_must_be_a_count():
    assert load_count(pickle.dumps(7), "here") == 7
    assert load_count(pickle.dumps(np.int64(7)), "here") == 7
    for value in (-1, "7", None, 2.5):
        with pytest.raises(DataError, match="expected a number of systems"):
            load_count(pickle.dumps(value), "here")


def test_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, molkd.pipeline.data.sources; assert not {'torch', 'torch_geometric'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
