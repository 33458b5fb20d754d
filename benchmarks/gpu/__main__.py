"""Check the recipe on this machine's GPU: correctness, repeatability, speed. Without a GPU, run at toy size.

python -m benchmarks.gpu                                    # writes benchmarks/results/gpu.json and prints a table
python -m benchmarks.gpu --parts rendering frozen --out /tmp/gpu.json
"""

import argparse
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.material import FULL, ROOT, TOY, Row, Scale


@dataclass(frozen=True)
class Part:
    """A part of the benchmark, which runs in its own process.

    Attributes:
        module: module with the part's function, which has the same name as the part.
        seconds: time limit on a GPU.
        alone: whether the part is timed, so that nothing else may run at the same time.
    """

    module: str
    seconds: float
    alone: bool = False


PARTS = {
    "card": Part("checks", 60),
    "graphs": Part("repeatable", 200),
    "determinism": Part("repeatable", 200),
    "resume": Part("repeatable", 200),
    "frozen": Part("checks", 90),
    "rendering": Part("checks", 60),
    "fork": Part("checks", 60),
    "tests": Part("whole", 120),
    "ours": Part("speed", 100, alone=True),
    "ceilings": Part("speed", 120, alone=True),
    "profile": Part("speed", 60, alone=True),
    "memory": Part("speed", 60, alone=True),
    "recipe": Part("whole", 120, alone=True),
}
TOGETHER = 8
"""Number of untimed parts run in parallel."""
LEAST = 5.0
"""Minimum time left, in seconds, to start a part."""
SLOWLY = 600.0
"""Time limit of a part without a GPU, in seconds."""


def main() -> None:
    """Run the chosen parts, print a table, write the JSON file."""
    chosen = _arguments()
    scale, gpu = (TOY, False) if chosen.toy else _scale()
    if chosen.part:
        _run_here(chosen.part, scale, chosen.data, chosen.out)
        return
    end = time.monotonic() + chosen.seconds
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        found: dict[str, Any] = {}

        def run(name: str) -> None:
            limit = min(PARTS[name].seconds, end - time.monotonic()) if gpu else SLOWLY
            found[name] = _run_part(name, data, chosen.toy, limit)
            print(_table(name, found[name]), flush=True)

        together = [name for name in chosen.parts if not PARTS[name].alone]
        with ThreadPoolExecutor(TOGETHER if gpu else 1) as pool:
            list(pool.map(run, together))
        for name in chosen.parts:
            _write(chosen.out, found)
            if PARTS[name].alone:
                run(name)
    if {"ours", "ceilings"} <= set(found):
        from benchmarks.gpu.speed import shares

        rows = shares(found["ours"]["rows"], found["ceilings"]["rows"], scale)
        found["shares"] = {"rows": rows, "seconds": 0.0, "error": None}
        print(_table("shares", found["shares"]), flush=True)
    _write(chosen.out, found)
    missed = [f"{name}: {r['what']}" for name, part in found.items() for r in part["rows"] if r.get("held") is False]
    failed = [f"{name}: {part['error']}" for name, part in found.items() if part["error"]]
    print(f"\n{len(missed)} bars missed, {len(failed)} parts failed", *missed, *failed, sep="\n  ")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json", help="the JSON file")
    parser.add_argument("--toy", action="store_true", help="run at toy size, also on a GPU")
    parser.add_argument(
        "--seconds", type=float, default=480, help="time limit for all parts, in seconds (default: %(default)s)"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # one part, in its own process
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _scale() -> tuple[Scale, bool]:
    """Scale for this machine, and whether it has a GPU; checked in a child process, so that this one uses no GPU."""
    code = "import torch; print(torch.cuda.is_available())"
    gpu = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return (FULL, True) if gpu == "True" else (TOY, False)


def _run_here(name: str, scale: Scale, data: Path, out: Path) -> None:
    start = time.perf_counter()
    rows: list[Row] = []
    for found in getattr(importlib.import_module(f"benchmarks.gpu.{PARTS[name].module}"), name)(scale, data):
        rows.append(found)  # written after each row: a part that is stopped keeps its rows
        out.write_text(json.dumps({"rows": rows, "seconds": time.perf_counter() - start, "error": None}))


def _run_part(name: str, data: Path, toy: bool, limit: float) -> dict[str, Any]:
    """Run a part for at most ``limit`` seconds; return its rows, its seconds, and its error or None."""
    out, start = data / f"{name}.json", time.monotonic()
    if limit < LEAST:
        return {"rows": [], "seconds": 0.0, "error": "not started: no time left"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--data", str(data), "--out", str(out)]
    threads = {} if PARTS[name].alone else {"OMP_NUM_THREADS": "2"}
    with (data / f"{name}.log").open("w+") as log:
        process = subprocess.Popen(
            command + ["--toy"] * toy, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **threads},
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit)
            error = None if process.returncode == 0 else f"ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            error = f"ended at its time limit of {limit:.0f} s"
        log.seek(0)
        said = log.read()
    found = json.loads(out.read_text()) if out.exists() else {"rows": []}
    tail = f"{error}\n{said[-2000:]}" if error else None
    return found | {"seconds": time.monotonic() - start, "error": tail}


def _table(name: str, part: dict[str, Any]) -> str:
    lines = [f"\n== {name} ({part['seconds']:.1f} s)"]
    lines += [_line(row) for row in part["rows"]]
    return "\n".join(lines + [f"   FAILED: {part['error']}"] * bool(part["error"]))


def _line(row: Row) -> str:
    value = row["value"]
    shown = f"{value:.4g}" if isinstance(value, float) and value < 1000 else str(value)
    bar = "" if "bar" not in row else f"  {'HELD' if row['held'] else 'MISSED'} ({row['bar']})"
    return f"   {row['what']}: {shown}{bar}"


def _write(out: Path, found: dict[str, Any]) -> None:
    """Write the parts with today's date; those of earlier calls stay in the file."""
    today = datetime.date.today().isoformat()
    parts = json.loads(out.read_text())["parts"] if out.exists() else {}
    parts |= {name: {"date": today, **part} for name, part in found.items()}
    out.write_text(json.dumps({"parts": parts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
