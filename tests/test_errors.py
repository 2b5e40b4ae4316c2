from pathlib import Path

import pytest

from perfmodel.errors import InputError, MissingExtraError, about


def test_an_error_names_its_file_and_keeps_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"^run: needs a package$") as raised, about("run"):
        raise MissingExtraError("needs a package")
    assert raised.value.exit_code == 3
    path = tmp_path / "absent"
    with pytest.raises(InputError, match=f"^{path}: cannot be read: No such file or directory$"), about(path):
        path.read_bytes()


def test_a_defect_stays_a_defect() -> None:
    with pytest.raises(ZeroDivisionError), about("run"):
        _ = 1 / 0
