"""Files and JSON: the same bits after save and load, and a clear refusal of everything else."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_sq as fsq
from functional_sq.files import replacing
from functional_sq.safetensors import write as safetensors_write
from functional_sq.serialize import load, save, spec_from_json, spec_to_json

INT8 = fsq.QuantSpec(torch.int8, fsq.PerTensor())


@dataclass(frozen=True)
class Raw(fsq.Observer):
    """Holds any tensors, under any names."""

    limits: tuple[float, ...] = ()
    inner: fsq.Observer | None = None

    def init(self, stat_shape, dtype, device):
        return {}

    def observe(self, state, x, keep):
        return state

    def merge(self, a, b):
        return a

    def range(self, spec, state):
        raise NotImplementedError

    names = frozenset()

    def check_state(self, state, *, exact=True):
        return ()


@dataclass(frozen=True)
class Halves(fsq.Granularity):
    """Two scales along the first axis."""

    def stat_shape(self, shape):
        return (2, *[1] * (len(shape) - 1))


RAW = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=Raw())


def bits(t: torch.Tensor) -> tuple[object, ...]:
    """Everything about a tensor that a file must keep; NaN and -0.0 are compared by their bits."""
    return t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_bits_tells_what_equality_does_not() -> None:
    assert bits(torch.tensor([0.0])) != bits(torch.tensor([-0.0]))
    assert bits(torch.tensor([float("nan")])) == bits(torch.tensor([float("nan")]))
    assert bits(torch.zeros(2, 0)) != bits(torch.zeros(0, 2))


def observed() -> dict[str, tuple[fsq.QuantSpec, fsq.State]]:
    """A calibration of several layers, one without data."""
    x = torch.randn(8, 32)
    calibration = {}
    for name, spec, dtype in (
        ("encoder.layer.0.attention.query", INT8, torch.float32),
        ("encoder.layer.0.out", fsq.QuantSpec(torch.uint4, fsq.PerGroup(8), eps=1e-5), torch.bfloat16),
        ("", fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerBlock((4, 16))), torch.float16),
        ("größe", fsq.QuantSpec(torch.uint8, fsq.PerRow(), observer=fsq.Fixed(0, 1.5)), torch.float64),
    ):
        state = fsq.init(spec, x.shape, dtype=dtype)
        calibration[name] = (spec, fsq.observe(spec, state, x))
    return calibration | {"nothing.seen": (INT8, fsq.init(INT8, (1,)))}


EVERY_DTYPE = {
    "f64": torch.tensor([-0.0, float("nan"), float("-inf"), 5e-324], dtype=torch.float64),
    "f32": torch.tensor([-0.0, float("nan"), float("inf"), 1e-45]),
    "payload": torch.tensor([0x7FC12345, -1], dtype=torch.int32).view(torch.float32),
    "f16": torch.tensor([-0.0, float("nan"), 6e-8], dtype=torch.float16),
    "bf16": torch.tensor([-0.0, float("nan"), 1e-40], dtype=torch.bfloat16),
    "e4m3": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn),
    "e5m2": torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2),
    "e4m3fnuz": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fnuz),
    "e5m2fnuz": torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2fnuz),
    "e8m0": torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "c64": torch.tensor([complex(-0.0, float("nan")), complex(float("inf"), 1e-45)], dtype=torch.complex64),
    "u64": torch.tensor([0, 2**64 - 1], dtype=torch.uint64),
    "u32": torch.tensor([0, 2**32 - 1], dtype=torch.uint32),
    "u16": torch.tensor([0, 2**16 - 1], dtype=torch.uint16),
    "i64": torch.tensor([-(2**63), 2**63 - 1]),
    "i32": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
    "i16": torch.tensor([-(2**15), 2**15 - 1], dtype=torch.int16),
    "i8": torch.tensor([-128, 127], dtype=torch.int8),
    "u8": torch.tensor([0, 255], dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "empty": torch.empty(3, 0, 2, dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "strided": torch.arange(6.0).reshape(2, 3).T,
    "cut": torch.arange(10)[3:7],
}


def test_load_returns_what_was_saved(tmp_path: Path) -> None:
    calibration = observed()
    save(tmp_path / "c.safetensors", calibration)
    loaded = load(tmp_path / "c.safetensors")
    assert list(loaded) == sorted(calibration)
    for name, (spec, state) in calibration.items():
        assert loaded[name][0] == spec
        assert {k: bits(v) for k, v in loaded[name][1].items()} == {k: bits(v) for k, v in state.items()}
        assert list(loaded[name][1]) == list(state)


def test_a_loaded_state_goes_on_observing(tmp_path: Path) -> None:
    a, b = torch.randn(2, 8, 32)
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(-1))
    half = fsq.observe(spec, fsq.init(spec, a.shape), a)
    save(tmp_path / "c", {"x": (spec, half)})
    ((spec_loaded, loaded),) = load(tmp_path / "c").values()
    resumed, whole = fsq.observe(spec_loaded, loaded, b), fsq.observe(spec, half, b)
    assert {k: bits(v) for k, v in resumed.items()} == {k: bits(v) for k, v in whole.items()}


def test_every_dtype_keeps_its_bits(tmp_path: Path) -> None:
    before = {k: bits(v) for k, v in EVERY_DTYPE.items()}
    save(tmp_path / "c", {"a.b": (RAW, EVERY_DTYPE), "a": (RAW, {}), "c": (RAW, {"f32": torch.ones(1)})})
    loaded = load(str(tmp_path / "c"), classes=(Raw,))
    assert loaded.keys() == {"a.b", "a", "c"}
    assert loaded["a"][1] == {}
    assert {k: bits(v) for k, v in loaded["a.b"][1].items()} == before
    assert {k: bits(v) for k, v in EVERY_DTYPE.items()} == before  # the tensors given are as they were
    for state in loaded.values():
        for value in state[1].values():
            assert value.is_contiguous()
    addresses = [v.data_ptr() for _, s in loaded.values() for v in s.values() if v.numel()]
    assert len(set(addresses)) == len(addresses)


def test_safetensors_reads_our_file(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save(path, {"a.b": (RAW, EVERY_DTYPE), **observed()})
    theirs = safetensors.torch.load_file(path)
    ours = load(path, classes=(Raw,))
    assert {k: bits(v) for k, v in theirs.items()} == {
        f"{name}.{key}": bits(v) for name, (_, state) in ours.items() for key, v in state.items()
    }
    with safetensors.safe_open(path, "pt") as f:
        metadata = f.metadata()
    assert metadata["format"] == "functional_sq"
    assert metadata["version"] == "1"
    specs = json.loads(metadata["specs"])
    assert specs["encoder.layer.0.out"]["granularity"] == {"class": "PerGroup", "group_size": 8}
    assert specs["encoder.layer.0.out"]["eps"] == 1e-5


def test_we_read_what_safetensors_wrote(tmp_path: Path) -> None:
    # The same header and metadata, laid out by the other writer.
    save(tmp_path / "ours", {"a.b": (RAW, EVERY_DTYPE)})
    with safetensors.safe_open(tmp_path / "ours", "pt") as f:
        metadata = f.metadata()
    tensors = {f"a.b.{k}": v.contiguous() for k, v in EVERY_DTYPE.items()}
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata=metadata)
    ((_, state),) = load(tmp_path / "theirs", classes=(Raw,)).values()
    assert {k: bits(v) for k, v in state.items()} == {k: bits(v) for k, v in EVERY_DTYPE.items()}


def test_a_state_is_a_dict_that_safetensors_saves(tmp_path: Path) -> None:
    for i, (_, state) in enumerate(observed().values()):
        safetensors.torch.save_file(state, tmp_path / f"{i}")
        loaded = safetensors.torch.load_file(tmp_path / f"{i}")
        assert {k: bits(v) for k, v in loaded.items()} == {k: bits(v) for k, v in state.items()}


def test_the_same_calibration_gives_the_same_file(tmp_path: Path) -> None:
    calibration = observed()
    save(tmp_path / "a", calibration)
    save(tmp_path / "b", load(tmp_path / "a"))
    save(tmp_path / "c", load(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_an_empty_calibration(tmp_path: Path) -> None:
    save(tmp_path / "c", {})
    assert load(tmp_path / "c") == {}


def test_bytes_are_little_endian_on_any_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"f64": torch.tensor([1.5, -2.0], dtype=torch.float64), "u8": torch.tensor([1, 2], dtype=torch.uint8)}
    # A machine that says it is of the other order must exchange the bytes of each element.
    monkeypatch.setattr(sys, "byteorder", "big" if sys.byteorder == "little" else "little")
    save(tmp_path / "c", {"x": (RAW, state)})
    data = (tmp_path / "c").read_bytes()[-18:]
    assert data == struct.pack(">2d" if struct.pack("=H", 1) == b"\1\0" else "<2d", 1.5, -2.0) + b"\1\2"
    loaded = load(tmp_path / "c", classes=(Raw,))["x"][1]
    assert {k: bits(v) for k, v in loaded.items()} == {k: bits(v) for k, v in state.items()}


# Writing.


def test_save_replaces_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save(path, {"x": (INT8, fsq.init(INT8, (1,)))})
    save(path, {"y": (INT8, fsq.init(INT8, (1,)))})
    assert list(load(path)) == ["y"]
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "c"
    save(path, {"x": (INT8, fsq.init(INT8, (1,)))})

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="no space left"):
        save(path, {"y": (INT8, fsq.init(INT8, (1,)))})
    assert list(load(path)) == ["x"]
    assert os.listdir(tmp_path) == ["c"]


def test_save_writes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "c"
    target.touch()
    link = tmp_path / "link"
    link.symlink_to(target)
    save(link, {})
    assert link.is_symlink()
    assert load(target) == {}


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save(tmp_path / "c", {})
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
def test_permissions_of_a_file_that_exists_stay(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "c"
    path.touch()
    path.chmod(mode)
    with replacing(path) as file:
        (beside,) = set(os.listdir(tmp_path)) - {"c"}
        assert (tmp_path / beside).stat().st_mode & 0o777 == mode  # also before there is anything to read
        file.write(b"new")
    assert path.stat().st_mode & 0o777 == mode
    assert path.read_bytes() == b"new"


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", Path.is_fifo), ("folder", Path.is_dir)):
        with pytest.raises(FileExistsError, match=f"{name} is no file but a folder, a pipe or a device, which stays;"):
            save(tmp_path / name, {})
        assert kind(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    path = tmp_path / ("c" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    save(path, {})
    assert load(path) == {}
    assert os.listdir(tmp_path) == [path.name]


SAVES = {
    "save(path, [])": ([], TypeError, "calibration is a list; give a dict"),
    "save(path, {1: ...})": ({1: (INT8, {})}, TypeError, "layer name 1 is not a str"),
    "save(path, {x: state})": ({"x": fsq.init(INT8, (1,))}, TypeError, "'x': the value is a dict; give the pair"),
    "save(path, {x: (state, spec)})": ({"x": ({}, INT8)}, TypeError, "'x': the value is a tuple; give the pair"),
    "save(path, {x: (spec, {})})": ({"x": (INT8, {})}, ValueError, "this state is []; make a state with init"),
    "save(path, {x: (raw, {a: 1})})": ({"x": (RAW, {"a": 1})}, TypeError, "'a' is a int; give a tensor"),
    "save(path, {x: (raw, {a.b: t})})": ({"x": (RAW, {"a.b": torch.ones(1)})}, ValueError, "'a.b' contains a dot"),
    "save(path, {x: (raw, {a: complex128})})": (
        {"x": (RAW, {"a": torch.ones(1, dtype=torch.complex128)})},
        TypeError,
        "'a' is torch.complex128; safetensors holds torch.float64, ",
    ),
    "save(path, {x: (raw, {a: sparse})})": (
        {"x": (RAW, {"a": torch.eye(2).to_sparse()})},
        TypeError,
        "'a' has the layout torch.sparse_coo; give value.to_dense()",
    ),
    "save(path, {x: (raw, {a: meta})})": (
        {"x": (RAW, {"a": torch.ones(1, device="meta")})},
        TypeError,
        "'a' is on the meta device and has no values; load them first",
    ),
}


@pytest.mark.parametrize("call", SAVES)
def test_save_refuses(tmp_path: Path, call: str) -> None:
    calibration, error, message = SAVES[call]
    with pytest.raises(error, match=re.escape(message)):
        save(tmp_path / "c", calibration)
    assert os.listdir(tmp_path) == []


# Reading.


def edit(raw: bytes, **entries: object) -> bytes:
    """Replace entries of a file's header; None removes one."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    for name, value in entries.items():
        header.pop(name)
        if value is not None:
            header[name] = value
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def good(tmp_path: Path) -> tuple[bytes, dict[str, object]]:
    """The bytes and the header of a file of one layer `x` with tensors `count` (I64), `min` and `max` (F32)."""
    save(tmp_path / "good", {"x": (INT8, fsq.init(INT8, (1,)))})
    raw = (tmp_path / "good").read_bytes()
    return raw, json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def entry(dtype: object = "F32", shape: object = (1,), data_offsets: object = (8, 12)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


FILES = {
    "nothing": (lambda raw, m: b"", "cut short: 0 bytes"),
    "only a length": (lambda raw, m: raw[:8], "cut short: 8 bytes"),
    "half a header": (lambda raw, m: raw[:100], "cut short: 100 bytes, and the header alone needs"),
    "no data": (lambda raw, m: raw[:-16], "cut short: 0 bytes of data, and the header describes 16"),
    "one byte missing": (lambda raw, m: raw[:-1], "cut short: 15 bytes of data, and the header describes 16"),
    "one byte more": (lambda raw, m: raw + b"\0", "too long: 17 bytes of data"),
    "a pickle": (lambda raw, m: b"PK\3\4 and so on", "not a safetensors file; give a file written by save()"),
    "not JSON": (lambda raw, m: raw[:9] + b"!" + raw[10:], "the header is not JSON"),
    "not UTF-8": (lambda raw, m: raw[:9] + b"\xff" + raw[10:], "the header is not JSON"),
    "deep JSON": (lambda raw, m: (10**6).to_bytes(8, "little") + b'{"a":' + b"[" * 10**6, "the header is not JSON"),
    "foreign": (lambda raw, m: safetensors.torch.save({"a": torch.ones(2)}), "not one that functional_sq wrote"),
    "foreign metadata": (
        lambda raw, m: edit(raw, __metadata__={"format": "pt"}),
        "not one that functional_sq wrote (its format is 'pt'); give",
    ),
    "metadata of numbers": (lambda raw, m: edit(raw, __metadata__={"version": 1}), "__metadata__ is not a map of str"),
    "no version": (lambda raw, m: edit(raw, __metadata__={"format": m["format"]}), "not one that functional_sq wrote"),
    "newer": (
        lambda raw, m: edit(raw, __metadata__=m | {"version": "2"}),
        "written in version 2 of the format, and this is 1; update functional_sq",
    ),
    "no specs": (
        lambda raw, m: edit(raw, __metadata__={"format": m["format"], "version": "1"}),
        "its specs cannot be read; the file is damaged",
    ),
    "a list of specs": (lambda raw, m: edit(raw, __metadata__=m | {"specs": "[]"}), "its specs cannot be read"),
    "spec of nothing": (
        lambda raw, m: edit(raw, __metadata__=m | {"specs": '{"x": 1}'}),
        "layer 'x': not the JSON of a spec: a int",
    ),
    "no such layer": (lambda raw, m: edit(raw, __metadata__=m | {"specs": "{}"}), "belongs to no layer"),
    "hole": (lambda raw, m: edit(raw, **{"x.min": None}), "tensor 'x.max' starts at byte 12 of the data, expected 8"),
    "overlap": (lambda raw, m: edit(raw, **{"x.min": entry(data_offsets=(4, 8))}), "starts at byte 4"),
    "twice": (lambda raw, m: edit(raw, **{"x.min": entry(data_offsets=(12, 16))}), "'x.max' starts at byte 12"),
    "beyond the end": (lambda raw, m: edit(raw, **{"x.max": entry(data_offsets=(12, 20), shape=(2,))}), "cut short"),
    "backwards": (lambda raw, m: edit(raw, **{"x.min": entry(data_offsets=(12, 8))}), "has -4 bytes"),
    "negative": (lambda raw, m: edit(raw, **{"x.min": entry(data_offsets=(-4, 0))}), "at bytes -4 to 0"),
    "negative size": (lambda raw, m: edit(raw, **{"x.min": entry(shape=(-1, -1))}), "has shape [-1, -1]"),
    "huge size": (
        lambda raw, m: edit(raw, **{"x.min": entry(shape=(0, 2**62, 4))}),
        "has shape [0, 4611686018427387904",
    ),
    "fraction": (lambda raw, m: edit(raw, **{"x.min": entry(shape=(1.0,))}), "has shape [1.0]"),
    "true": (lambda raw, m: edit(raw, **{"x.min": entry(shape=(True,))}), "has shape [True]"),
    "wrong shape": (lambda raw, m: edit(raw, **{"x.min": entry(shape=(2,))}), "4 bytes, and its shape [2] needs 8"),
    "unknown dtype": (lambda raw, m: edit(raw, **{"x.min": entry("F4")}), "has dtype 'F4'"),
    "dtype of a list": (lambda raw, m: edit(raw, **{"x.min": entry(["F32"])}), "has dtype ['F32']"),
    "one offset": (lambda raw, m: edit(raw, **{"x.min": entry(data_offsets=(8,))}), "'x.min' is described as"),
    "an entry of text": (lambda raw, m: edit(raw, **{"x.min": "F32"}), "'x.min' is described as 'F32'"),
}


@pytest.mark.parametrize("kind", FILES)
def test_load_refuses(tmp_path: Path, kind: str) -> None:
    make, message = FILES[kind]
    raw, header = good(tmp_path)
    path = tmp_path / "bad"
    path.write_bytes(make(raw, header["__metadata__"]))
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        load(path)
    assert str(e.value).startswith(f"{path}: ")


def test_the_file_that_was_edited_is_good(tmp_path: Path) -> None:
    raw, _ = good(tmp_path)
    path = tmp_path / "edited"
    path.write_bytes(edit(raw, **{"x.min": entry(), "x.max": entry(data_offsets=(12, 16))}))
    assert load(path)["x"] == (INT8, fsq.init(INT8, (1,)))


@given(st.data())
def test_no_damage_escapes_as_another_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tmp_path = tmp_path_factory.getbasetemp()
    raw = bytearray(good(tmp_path)[0])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "bad"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        load(path)  # damage to the data or to a name can still be a valid file
    except ValueError as e:
        assert str(e).startswith(f"{path}: ")  # noqa: PT017 (either outcome is right)


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


def test_a_class_of_the_users_own_is_given_never_imported(tmp_path: Path) -> None:
    spec = fsq.QuantSpec(torch.int8, Halves(), observer=Raw((0.5, 1.0), inner=fsq.Fixed(-1.0, 1.0)))
    path = tmp_path / "c"
    save(path, {"x": (spec, {})})
    with pytest.raises(ValueError, match=r"c: layer 'x': .*class 'Halves' is not known; known: .*classes=\(Halves,\)"):
        load(path)
    with pytest.raises(ValueError, match=r"observer: class 'Raw' is not known"):
        load(path, classes=(Halves,))
    assert load(path, classes=[Raw, Halves]) == {"x": (spec, {})}


# Specs.

GRANULARITIES = [fsq.PerTensor(), fsq.PerAxis(-1), fsq.PerRow(), fsq.PerToken(), fsq.PerGroup(4), fsq.PerBlock((1, 2))]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("dtype", fsq.FORMATS, ids=str)
def test_a_spec_survives_json(dtype: torch.dtype, granularity: fsq.Granularity) -> None:
    for observer in (fsq.MinMax(), fsq.Fixed(-0.1, 1e30)):
        spec = fsq.QuantSpec(dtype, granularity, observer=observer, eps=0.1, scale_dtype=torch.float64)
        text = spec_to_json(spec)
        assert spec_from_json(text) == spec
        assert repr(spec_from_json(text)) == repr(spec)
        assert spec_to_json(spec_from_json(text)) == text


def test_json_has_every_field_sorted() -> None:
    spec = fsq.QuantSpec(
        torch.uint8,
        fsq.PerBlock((1, 32)),
        mapping=fsq.MappingType.ASYMMETRIC,
        quant_min=1,
        observer=fsq.Fixed(0.0, 6.0),
        scale_dtype=torch.bfloat16,
        zero_point_dtype=torch.int64,
    )
    assert spec_to_json(spec) == (
        '{"dtype": "uint8", "eps": 1.1920928955078125e-07, '
        '"granularity": {"block_size": [1, 32], "class": "PerBlock"}, "mapping": "ASYMMETRIC", '
        '"observer": {"class": "Fixed", "hi": 6.0, "lo": 0.0}, "quant_max": null, "quant_min": 1, '
        '"scale_dtype": "bfloat16", "zero_point_dtype": "int64"}'
    )


def test_json_may_leave_out_what_has_a_default() -> None:
    assert spec_from_json('{"dtype": "int8", "granularity": {"class": "PerTensor"}}') == INT8


G = '"granularity": {"class": "PerTensor"}'
TEXTS = {
    "": "not the JSON of a spec",
    "[1]": "not the JSON of a spec: a list",
    "[" * 10**5: "not the JSON of a spec",
    "{}": "QuantSpec: ",
    '{"dtype": "int8"}': "QuantSpec: ",
    '{"dtype": "int9", ' + G + "}": "dtype: 'int9' is not the name of a torch dtype",
    '{"dtype": "load", ' + G + "}": "dtype: 'load' is not the name of a torch dtype",
    '{"dtype": null, ' + G + "}": "dtype: None is not the name of a torch dtype",
    '{"dtype": "float32", ' + G + "}": "QuantSpec: torch.float32 is not a quantized dtype",
    '{"dtype": "int8", "mapping": "symmetric", ' + G + "}": "mapping: 'symmetric' is not one of SYMMETRIC, ",
    '{"dtype": "int8", "mapping": 1, ' + G + "}": "mapping: 1 is not one of SYMMETRIC, ",
    '{"dtype": "int8", "bits": 3, ' + G + "}": "QuantSpec has no field 'bits'; its fields: dtype, granularity, ",
    '{"dtype": "int8", "granularity": "PerTensor"}': "granularity='PerTensor' is not a functional_sq Granularity",
    '{"dtype": "int8", "granularity": {"class": "MinMax"}}': "granularity=MinMax() is not a functional_sq Granularity",
    '{"dtype": "int8", "granularity": {"group_size": 3}}': "granularity: class None is not known; known: ",
    '{"dtype": "int8", "granularity": {"class": []}}': "granularity: class [] is not known; known: ",
    '{"dtype": "int8", "granularity": {"class": "os.system"}}': "granularity: class 'os.system' is not known; known: ",
    '{"dtype": "int8", "granularity": {"class": "Accumulator"}}': "class 'Accumulator' is not known; known: ",
    '{"dtype": "int8", "granularity": {"class": "PerGroup", "g": 3}}': "PerGroup has no field 'g'; its fields: group_",
    '{"dtype": "int8", "granularity": {"class": "PerGroup"}}': "PerGroup: ",
    '{"dtype": "int8", "granularity": {"class": "PerGroup", "group_size": 0}}': "group_size is 0",
    '{"dtype": "int8", "granularity": {"class": "PerGroup", "group_size": 1.5}}': "group_size is 1.5",
    '{"dtype": "int8", "observer": {"class": "Fixed", "lo": 1, "hi": 0}, ' + G + "}": "Fixed: lo=1 is above hi=0",
}


NESTED = {
    "lists": ("[", "]"),
    "observers": ('{"class": "SkipNonfinite", "observer": ', "}"),
}


@pytest.mark.parametrize("kind", NESTED)
def test_json_that_is_nested_deeply_is_refused(tmp_path: Path, kind: str) -> None:
    """Of some depth it is read by json, and is too deep for the functions that make a spec of it."""
    left, right = NESTED[kind]
    for depth in range(100, 1000, 50):
        text = '{"dtype": "int8", "observer": ' + left * depth + "1" + right * depth + ", " + G + "}"
        with pytest.raises(ValueError, match=r"observer|nested so deeply|not the JSON"):
            spec_from_json(text)
        metadata = {"format": "functional_sq", "version": "1", "specs": f'{{"x": {text}}}'}
        safetensors_write(tmp_path / "c", {}, metadata)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "c"))):
            load(tmp_path / "c")


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:80])
def test_spec_from_json_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(TEXTS[text])):
        spec_from_json(text)


def test_json_holds_only_what_it_returns() -> None:
    class NoDataclass(fsq.Accumulator):
        reductions = {}

        def range(self, spec, state):
            raise NotImplementedError

    @dataclass(frozen=True)
    class Holds(NoDataclass):
        value: object

    for value in (torch.ones(1), torch.int8, fsq.MappingType.SYMMETRIC, frozenset([1]), (1, 1j)):
        with pytest.raises(TypeError, match=r"observer\.value=.* has no JSON; use None"):
            spec_to_json(fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=Holds(value)))
    with pytest.raises(TypeError, match=r"NoDataclass is no dataclass; decorate it @dataclass"):
        spec_to_json(fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=NoDataclass()))
    with pytest.raises(TypeError, match="spec is 'int8'; give a QuantSpec"):
        spec_to_json("int8")
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=Holds((1, (True, None), "x", float("inf"))))
    assert spec_from_json(spec_to_json(spec), classes=(Holds,)) == spec


def test_two_classes_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class MinMax(fsq.MinMax):
        pass

    with pytest.raises(ValueError, match=r"two classes are called MinMax: .*; rename one"):
        spec_to_json(fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=MinMax()))
    with pytest.raises(ValueError, match=r"two classes are called MinMax: .*; rename one"):
        spec_from_json(spec_to_json(INT8), classes=(MinMax,))
    assert spec_from_json(spec_to_json(INT8), classes=(fsq.MinMax,)) == INT8


@pytest.mark.parametrize("classes", [(int,), (fsq.Accumulator,), (fsq.MinMax(),), ("MinMax",)], ids=repr)
def test_classes_are_classes(classes: tuple[object, ...]) -> None:
    with pytest.raises(TypeError, match="give observer and granularity classes"):
        spec_from_json(spec_to_json(INT8), classes=classes)
