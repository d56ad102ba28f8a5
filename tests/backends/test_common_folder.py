"""What inductor keeps for all processes of a user is used only where nobody else can write to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch._inductor import codecache, cpu_vec_isa

from xdit_compile.backends.folders.common_folder import VectorInstructions, headers_in, is_private


def test_a_folder_that_others_can_write_to_is_not_private(tmp_path: Path) -> None:
    assert is_private(tmp_path / "new") and (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "new")
    assert not is_private(tmp_path / "link")
    (tmp_path / "new").chmod(0o777)
    assert not is_private(tmp_path / "new")
    (tmp_path / "file").touch()
    assert not is_private(tmp_path / "file")


def test_headers_are_compiled_elsewhere_where_others_could_replace_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    shared = tmp_path / "shared"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(codecache, "_HEADER_DIR", str(shared / "precompiled_headers"))
    with headers_in(tmp_path / "own"):
        assert Path(codecache._HEADER_DIR).is_relative_to(shared)
    shared.chmod(0o777)
    with headers_in(tmp_path / "own"):
        assert Path(codecache._HEADER_DIR).is_relative_to(tmp_path / "own")
        assert Path(codecache._HEADER_LOCK_DIR).is_relative_to(tmp_path / "own")
    assert Path(codecache._HEADER_DIR).is_relative_to(shared)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "named"))
    for other in (tmp_path / "own", None):
        with headers_in(other):
            assert Path(codecache._HEADER_DIR).is_relative_to(tmp_path / "named")


def test_instructions_are_not_looked_for_in_a_folder_that_is_open_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    looked: list[str] = []
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", lambda: looked.append("") or [])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "open"))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    refused = VectorInstructions()
    refused.find_meanwhile()
    assert not refused.all_work() and not looked
    (tmp_path / "open").chmod(0o700)
    VectorInstructions().find_meanwhile()
    assert looked
