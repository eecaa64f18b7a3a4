"""The file format alone; calibrations in it are in test_serialize.py, models in test_saving.py."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from functional_sq.safetensors import fault, read, write


def test_only_values_are_written_not_how_a_tensor_holds_them(tmp_path: Path) -> None:
    z = torch.tensor([[1 + 2j, 3 - 4j]])
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "conjugate": z.conj(),
        "negative": z.conj().imag,  # a view that negates when it is read
        "transposed": base.T,
        "cut": base[:, 1:],
        "expanded": torch.ones(1).expand(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    assert tensors["conjugate"].is_conj()
    assert tensors["negative"].is_neg()
    write(tmp_path / "x", tensors, {})
    for loaded in (read(tmp_path / "x")[0], safetensors.torch.load_file(tmp_path / "x")):
        assert loaded.keys() == tensors.keys()
        for name, t in tensors.items():
            assert torch.equal(loaded[name], t.detach()), name


def test_what_is_read_is_aligned_as_torch_aligns_and_independent_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(5)}, {})
    tensors, _ = read(tmp_path / "x")
    os.truncate(tmp_path / "x", 0)
    assert {name: t.data_ptr() % 64 for name, t in tensors.items()} == {"a": 0, "b": 0}
    tensors["b"] += 1
    assert tensors["b"].tolist() == [2.0] * 5


class Wrapper(torch.Tensor):
    pass


UNFIT = {
    "text": ("x", "is a str; give a tensor"),
    "subclass": (torch.ones(1).as_subclass(Wrapper), "is a Wrapper; give the tensors that it is made of"),
    "sparse": (torch.eye(2).to_sparse(), "has the layout torch.sparse_coo; give value.to_dense()"),
    "dtype": (torch.ones(1, dtype=torch.complex128), "is torch.complex128; safetensors holds torch.float64, "),
    "meta": (torch.ones(1, device="meta"), "is on the meta device and has no values; load them first"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_has_no_bytes_in_the_format_is_refused(tmp_path: Path, kind: str) -> None:
    value, message = UNFIT[kind]
    assert fault(value).startswith(message)
    with pytest.raises(TypeError, match=re.escape(f"tensor 'a' {message}")):
        write(tmp_path / "x", {"a": value}, {})
    assert os.listdir(tmp_path) == []
