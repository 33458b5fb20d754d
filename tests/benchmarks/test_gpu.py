"""The GPU benchmark at toy size: its parts, its command line, and a part that takes too long."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.material import TOY, row
from benchmarks.gpu.speed import shares

HERE = [name for name in gpu.PARTS if name not in ("fork", "tests")]
"""Parts that neither need a single-threaded process nor run the tests."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize("name", HERE)
def test_a_part_finds_what_it_is_about_and_holds_its_bars(name: str, data: Path) -> None:
    part = getattr(importlib.import_module(f"benchmarks.gpu.{gpu.PARTS[name].module}"), name)
    rows = list(part(TOY, data))
    assert rows
    assert not [found for found in rows if found.get("held") is False]
    assert not [found for found in rows if str(found["value"]).startswith("failed")]


@pytest.mark.long
def test_the_command_writes_a_file_and_a_table(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--toy", "--parts", "card", "fork", "--out", str(out)],
        cwd=gpu.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    parts = json.loads(out.read_text())["parts"]
    assert {name: part["error"] for name, part in parts.items()} == {"card": None, "fork": None}
    assert "0 bars missed, 0 parts failed" in done.stdout
    assert "a forked process uses it: True  HELD (true)" in done.stdout


def test_the_parts_of_earlier_calls_stay_in_the_file(tmp_path: Path) -> None:
    gpu._write(tmp_path / "gpu.json", {"card": {"rows": [1]}, "fork": {"rows": [2]}})
    gpu._write(tmp_path / "gpu.json", {"fork": {"rows": [3]}})
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["rows"] for name, part in parts.items()} == {"card": [1], "fork": [3]}
    assert all(part["date"] for part in parts.values())


def test_a_part_that_takes_too_long_is_ended_and_keeps_what_it_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    early = {"rows": [row("found early", 1)], "seconds": 0.1, "error": None}
    (tmp_path / "card.json").write_text(json.dumps(early))
    found = gpu._run_part("card", tmp_path, toy=True, limit=0.1)
    assert found["rows"] == early["rows"] and "ended" in found["error"]


def test_a_share_is_of_the_best_way_of_the_same_batch() -> None:
    speed = TOY.speeds[0]
    name = f"{speed.network} batch {speed.batch}"
    tops = [row(f"training {name} {way}, free", rate) for way, rate in (("eager", 50.0), ("graph", 100.0))]
    tops += [
        row(f"training {speed.network} batch 999 graph, free", 900.0),
        row(f"training {name} compiled, free", "failed"),
    ]
    [share] = shares([row(f"whole network {name}", 70.0)], tops, TOY)
    assert (share["value"], share["held"]) == (0.7, False)
