"""What a model's name means, and what is said of one that means nothing."""

import os
from pathlib import Path

import pytest

from quire.core.errors import ModelLoadError
from quire.core.folders import model_folder


def test_folders_and_hub_names(tmp_path: Path) -> None:
    assert model_folder(str(tmp_path)) == tmp_path
    assert model_folder("owner/name") is None
    for name in ("name", "/no/such", "./no", "~/no/such", "a/b/c"):
        with pytest.raises(ModelLoadError, match="no such model folder"):
            model_folder(name)
    (tmp_path / "weights").touch()
    with pytest.raises(ModelLoadError, match="is a file"):
        model_folder(str(tmp_path / "weights"))


def test_what_may_not_be_read_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ModelLoadError, match="Permission denied"):
        model_folder(str(tmp_path))
