"""`make bench`: run all comparisons in one session, print tables, write JSON, draw the figure of docs/performance.md.

python -m benchmarks                                      # the sample at 160 px
python -m benchmarks --source ../photos --image-size 224 --backbone torchvision:resnet34 --weights none
python -m benchmarks --parts orchestration memory
"""

import argparse
import dataclasses
import datetime
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, compare, memory, orchestration
from benchmarks.figure import draw, result_name
from benchmarks.work import ROOT, changed_settings, make_work
from unfreeze.settings.overrides import read_overrides

SETTINGS = {
    "--source": "data.source",
    "--image-size": "data.image_size",
    "--backbone": "backbone.name",
    "--weights": "backbone.weights",
}
PARTS = ("speed", "shares", "accuracy", "checkpoints", "orchestration", "memory")


def main() -> None:
    """Measure the chosen parts and store their results; earlier results of the other parts are kept."""
    chosen = _arguments()
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    today = datetime.date.today().isoformat()
    if {"speed", "shares", "accuracy", "checkpoints"} & set(chosen.parts):
        with tempfile.TemporaryDirectory() as folder:
            work = make_work(
                Path(folder) / "packed", changed_settings(Path(folder) / "params.yaml", _overrides(chosen))
            )
            if {"speed", "accuracy"} & set(chosen.parts):
                workers = compare.helpful_workers(work, _say) if chosen.workers is None else chosen.workers
                work = dataclasses.replace(work, workers=workers)
            file = results / f"{chosen.name or result_name(dataclasses.asdict(work.settings))}.json"
            result = _read(file)
            measured: dict[str, Callable[[], Any]] = {
                "speed": lambda: compare.speed(work, chosen.repeats, _say),
                "shares": lambda: compare.shares(work, chosen.repeats, _say),
                "accuracy": lambda: compare.accuracy(work, chosen.seeds, _say),
                "checkpoints": lambda: checkpoints.measure(work, _say),
            }
            about = compare.about(work)
            for part, measure in measured.items():
                if part in chosen.parts:
                    result[part] = measure()
                    result["about"] = result.get("about", {}) | {part: {"date": today, **about}}
                    _write(file, result)  # saved now: a part takes minutes, and a later one may be interrupted
    for name, module in (("orchestration", orchestration), ("memory", memory)):
        if name in chosen.parts:
            found = module.measure(_say, chosen.repeats) if module is orchestration else memory.measure(_say)
            _write(results / f"{name}.json", {"date": today, **found})
    draw(results, ROOT / "docs" / "performance.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--settings", type=Path, help="YAML file with changes to params.yaml")
    for flag, key in SETTINGS.items():
        parser.add_argument(flag, dest=key, metavar="VALUE", help=f"{key} (default: from the settings)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of each measurement (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the accuracy comparison (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, help="number of fastai's loader processes (default: the fastest number, measured)"
    )
    parser.add_argument(
        "--name", help="name of the results file; required with --settings, to keep the results of the default settings"
    )
    chosen = parser.parse_args()
    if chosen.settings and not chosen.name:
        parser.error("--settings needs a --name for the results file")
    return chosen


def _overrides(chosen: argparse.Namespace) -> list[str]:
    """Overrides of `params.yaml`: first those of the settings file, then those of the flags, which take precedence."""
    given = [f"{key}={value}" for key in SETTINGS.values() if (value := vars(chosen)[key]) is not None]
    return (read_overrides(chosen.settings) if chosen.settings else []) + given


def _say(text: str) -> None:
    print(text, flush=True)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
