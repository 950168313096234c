"""The command `abduce`, as a person calls it."""

import subprocess
import sys
from importlib.metadata import version

import pytest

from abduce.cli import main


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"abduce {version('abduce')}\n"


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["dance"])
    assert exit.value.code == 2
    assert "dance" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_explained(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "plots")]) == 1
    assert "abduce demo --out DIR" in capsys.readouterr().err


def test_the_demo_writes_where_it_is_told(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("abduce.demo.run", asked.append)
    assert main(["demo", "--out", str(tmp_path / "a" / "b")]) == 0
    assert asked == [tmp_path / "a" / "b"]
    assert asked[0].is_dir()


def test_the_package_runs_as_a_module():
    out = subprocess.run(
        [sys.executable, "-m", "abduce", "--help"], capture_output=True, text=True, check=True
    )
    assert out.stdout.startswith("usage: abduce")
