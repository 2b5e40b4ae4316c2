"""Files of torch.save read without torch: the numbers torch reads, one sentence for damage, and nothing ever runs."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perfmodel.errors import InputError
from perfmodel.routing.torch_files import Unreadable, is_torch_file, read_torch

torch = pytest.importorskip("torch")

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "uint16",
          "uint32", "uint64")  # fmt: skip


def saved(path: Path, value: object, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def same(found: Any, tensor: Any) -> None:
    expected = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    np.testing.assert_array_equal(found, expected.detach().numpy())
    assert found.shape == tuple(tensor.shape) and found.dtype == expected.detach().numpy().dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_dtype_are_what_torch_saved(tmp_path: Path, dtype: str) -> None:
    tensor = torch.tensor([[0, 1, 2], [3, 100, 5]]).to(getattr(torch, dtype))
    same(read_torch(saved(tmp_path / "one.pt", tensor)), tensor)


def test_views_strides_offsets_and_shared_storages(tmp_path: Path) -> None:
    base = torch.arange(60, dtype=torch.int32).reshape(3, 4, 5)
    tensors = {
        "transposed": base.transpose(0, 2),
        "part": base[1:, ::2, 3],
        "scalar": base[2, 1, 4],
        "empty": base[:0],
        "nothing": torch.zeros(0, 3),
        "expanded": torch.tensor([7.0, 8.0])[:, None].expand(2, 3),
        "brain": torch.linspace(-3, 3, 12).bfloat16().reshape(3, 4).t(),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }
    found = read_torch(saved(tmp_path / "many.pt", tensors))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        same(found[name], tensor)


def test_plain_values_stay_and_classes_become_inert(tmp_path: Path) -> None:
    value = {
        "a": [1, 2.5, None, True, "x", (1, [2])],
        "ordered": OrderedDict(one=1),
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "path": Path("x"),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
        "dtype": torch.int32,
    }
    found = read_torch(saved(tmp_path / "plain.pt", value))
    assert {key: found[key] for key in ("a", "ordered", "size")} == {
        "a": value["a"],
        "ordered": {"one": 1},
        "size": (2, 3),
    }
    assert all(isinstance(found[key], Unreadable) for key in ("device", "path", "fp8"))


def test_numpy_arrays_of_numbers_are_read_and_others_are_null(tmp_path: Path) -> None:
    arrays = {
        "plain": np.arange(6, dtype=np.int64).reshape(2, 3),
        "turned": np.asfortranarray(np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)),
        "big": np.arange(3, dtype=">u2"),
        "flags": np.array([True, False]),
    }
    found = read_torch(saved(tmp_path / "arrays.pt", {**arrays, "words": np.array(["a"]), "any": np.array([{}])}))
    assert found.pop("words") is None and found.pop("any") is None
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    np.testing.assert_array_equal(read_torch(saved(tmp_path / "one.pt", arrays["plain"])), arrays["plain"])


class Caller:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def archive_of(path: Path, program: bytes, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": program, "version": b"3\n", **more}.items():
            archive.writestr(f"made_up/{name}", content)
    return path


@pytest.mark.parametrize("call", [os.system, os.mkdir, eval, exec, __import__], ids=lambda f: f.__name__)
def test_nothing_in_a_file_is_ever_run(tmp_path: Path, call: Any) -> None:
    proof = tmp_path / "ran"
    argument = {
        os.system: f"touch {proof}",
        os.mkdir: str(proof),
        __import__: "this",
    }.get(call, f"open({str(proof)!r}, 'w')")
    value = {"logical_count": [1, 2], "bad": Caller(call, argument), "all": [Caller(call, argument)]}
    path = archive_of(tmp_path / "evil.pt", pickle.dumps(value, 2))
    found = read_torch(path)
    assert not proof.exists()
    assert isinstance(found["bad"], Unreadable) and found["logical_count"] == [1, 2]


def test_objects_with_state_items_and_slots_are_read_past(tmp_path: Path) -> None:
    from argparse import Namespace
    from collections import Counter, defaultdict, deque

    value = [Namespace(a=1), deque([1, 2]), defaultdict(list, a=[1]), Counter("aab"), 7]
    found = read_torch(archive_of(tmp_path / "objects.pt", pickle.dumps(value, 2)))
    assert found[-1] == 7 and all(isinstance(one, Unreadable) for one in found[:-1])


def tensor_program(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, n_elements: int = 4) -> bytes:
    """A pickle of one tensor as torch writes it, with any numbers in it."""

    class Named(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.pid if isinstance(obj, Storage) else None

    class Storage:
        pid = ("storage", torch.FloatStorage, "0", "cpu", n_elements)

    file = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    Named(file, 2).dump(Caller(rebuild, Storage(), offset, size, stride, False, OrderedDict()))
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "stride", "offset", "n_elements", "words"),
    [
        ((5,), (1,), 0, 4, "reaches outside its storage of 4 elements"),
        ((2, 2), (4, 1), 0, 4, "reaches outside"),
        ((4,), (1,), 1, 4, "reaches outside"),
        ((10**12,), (0,), 0, 4, "reaches outside"),
        ((-1,), (1,), 0, 4, "has a tensor of size"),
        ((2,), (-1,), 3, 4, "has a tensor of size"),
        ((2, 2), (1,), 0, 4, "has a tensor of size"),
        ((1,) * 70, (1,) * 70, 0, 4, "has a tensor of size"),
        ((4,), (1,), 0, 10**15, "storage 0 has 4 elements, the file says 1000000000000000"),
        ((4.0,), (1,), 0, 4, "has a tensor of size"),
    ],
)
def test_absurd_sizes_are_refused_before_room_is_made(
    tmp_path: Path, size: Any, stride: Any, offset: int, n_elements: int, words: str
) -> None:
    data = struct.pack("<4f", 1, 2, 3, 4)
    good = archive_of(tmp_path / "good.pt", tensor_program((2, 2), (1, 2)), **{"data/0": data})
    assert read_torch(good).tolist() == [[1, 3], [2, 4]]
    bad = archive_of(tmp_path / "bad.pt", tensor_program(size, stride, offset, n_elements), **{"data/0": data})
    with pytest.raises(InputError, match=rf"^bad\.pt.*{words}"):
        read_torch(bad)


def test_big_endian_files_are_read(tmp_path: Path) -> None:
    more = {"data/0": struct.pack(">4f", 1, 2, 3, 4), "byteorder": b"big"}
    found = read_torch(archive_of(tmp_path / "big.pt", tensor_program((4,), (1,)), **more))
    assert found.tolist() == [1, 2, 3, 4] and found.dtype == np.float32


def test_older_and_other_formats_are_refused_in_a_sentence(tmp_path: Path) -> None:
    old = saved(tmp_path / "old.pt", {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert is_torch_file(old)
    with pytest.raises(InputError, match=r"^old\.pt is in the format of torch before 1\.6; load and save it"):
        read_torch(old)
    script = archive_of(tmp_path / "script.pt", pickle.dumps({}, 2), **{"constants.pkl": b""})
    with pytest.raises(InputError, match=r"script\.pt is a TorchScript archive"):
        read_torch(script)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**6))
    with pytest.raises(InputError, match=r"bomb\.pt is compressed inside"):
        read_torch(tmp_path / "bomb.pt")
    by_number = archive_of(tmp_path / "number.pt", b"\x80\x02\x82\x01.")
    with pytest.raises(InputError, match=r"number\.pt names a class by a number"):
        read_torch(by_number)
    far = archive_of(tmp_path / "far.pt", b"\x80\x02K\x01r\xff\xff\xff\x7f.")
    with pytest.raises(InputError, match=r"far\.pt is a damaged file .* numbers an object 2147483647"):
        read_torch(far)
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    (tmp_path / "text.pt").write_text("hello")
    assert not is_torch_file(tmp_path / "a.npz") and not is_torch_file(tmp_path / "text.pt")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    value = {"rank": 0, "logical_count": torch.arange(24, dtype=torch.int32).reshape(2, 3, 4), "u": None}
    return saved(tmp_path_factory.mktemp("torch") / "real.pt", value).read_bytes()


@settings(max_examples=300, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_damaged_files_give_one_sentence_or_the_same_kind_of_thing(
    real: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed = bytearray(real)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.pt"
    path.write_bytes(changed[: data.draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))])
    try:
        read_torch(path)
    except InputError as error:
        assert str(error).startswith("changed.pt") and "\n" not in str(error)


@settings(max_examples=300, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_damaged_pickles_give_one_sentence_or_the_same_kind_of_thing(
    real: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    with zipfile.ZipFile(io.BytesIO(real)) as archive:  # past the checksum, which catches most damage
        program = bytearray(archive.read("real/data.pkl"))
        storage = archive.read("real/data/0")
    for _ in range(data.draw(st.integers(1, 3))):
        program[data.draw(st.integers(0, len(program) - 1))] = data.draw(st.integers(0, 255))
    path = archive_of(tmp_path_factory.getbasetemp() / "program.pt", bytes(program), **{"data/0": storage})
    try:
        read_torch(path)
    except InputError as error:
        assert str(error).startswith("program.pt") and "\n" not in str(error)
