"""A flipped bit shows: in a name that holds a hash, in a safetensors file that holds its own checksum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saeffect.checksums import add_sealed, is_sealed, read_tensors, save_tensors
from saeffect.errors import BadFile

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.zeros(0, 4),
}


def flipped(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", TENSORS, {"step": "3"})
    tensors, metadata = read_tensors(tmp_path / "x.safetensors", fix="")
    assert metadata == {"step": "3"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_flipped_bits_in_tensor_file_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {"step": "3"})
    written = path.read_bytes()
    caught = 0
    for bit in range(0, 8 * len(written), 3):
        flipped(path, bit)
        try:
            tensors, metadata = read_tensors(path, fix="make it again.")
        except BadFile as error:
            assert error.fix == "make it again."
            caught += 1
        else:  # in what pads the header, or in the name of the checksum
            assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
            assert metadata["step"] == "3"
        path.write_bytes(written)
    assert caught > 8 * len(written) / 3 * 0.5


def test_a_tensor_file_of_another_program_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert read_tensors(tmp_path / "x.safetensors", fix="")[0]["a"].tolist() == [1, 1]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:3] + b"X" + data[4:]])
def test_a_sealed_file_shows_damage(tmp_path: Path, damage: object) -> None:
    path = add_sealed(tmp_path, "part", ".parquet", b"whole as it was")
    assert is_sealed(path)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert not is_sealed(path)


def test_a_link_is_not_sealed(tmp_path: Path) -> None:
    path = add_sealed(tmp_path / "elsewhere", "part", ".txt", b"whole")
    (tmp_path / path.name).symlink_to(path)
    assert not is_sealed(tmp_path / path.name)
    assert not is_sealed(tmp_path / "part-none.txt")


def test_same_tensors_and_metadata_give_same_bytes(tmp_path: Path) -> None:
    noted = {f"key {k}": 'a "word" é\n\x01' * k for k in range(12)}
    for name in ("one", "two"):
        save_tensors(tmp_path / name, TENSORS, noted)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    tensors, metadata = read_tensors(tmp_path / "one", fix="")
    assert metadata == noted
    assert tensors.keys() == TENSORS.keys()
