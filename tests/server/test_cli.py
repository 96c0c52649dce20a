"""What goes wrong on the command line is one line on standard error and a non-zero exit code."""

import sys

import pytest

from quire.server import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """The exit code of `quire` with these arguments, or the line it ends with."""
    monkeypatch.setattr(sys, "argv", ["quire", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["serve", "--port", "abc"], "--port"),
        (["serve", "--dtype", "int8"], "--dtype"),
        (["serve", "--no-such-option"], "--no-such-option"),
        (["serve", "a", "b"], "argument"),
        (["complete"], "prompt"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_a_command_line_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and named in err.lower()


def test_settings_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "serve", "--max-num-seqs", "0") == "error: max_num_seqs must be at least 1, got 0"


def test_help_and_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert not run(monkeypatch, "--version") and capsys.readouterr().out.startswith("quire ")
    assert run(monkeypatch) == 2
    out, err = capsys.readouterr()
    assert "serve" in out and not err
