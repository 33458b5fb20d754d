"""Accuracy on several sets of images: the default recipe, fastai, a plain training script, and logistic regression.

python -m benchmarks.accuracy --set trash=../photos/trash --set "digits=../photos/digits augment.flip=none"
python -m benchmarks.accuracy --set trash=../photos/trash --jobs 14    # on a GPU: parallel runs

Network, images, split, batch size and image size are the same for all methods. fastai and the plain script train the
whole network for the recipe's maximum number of epochs. Each run has its own process, and its result is saved
immediately. A second call executes only the missing runs; the table has the results of all calls. With ``--jobs`` above
1, the measured seconds are not meaningful.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import ours, peer, plain
from benchmarks.compare import machine, process
from benchmarks.work import ROOT, Work, batch_size, changed_settings, make_work
from unfreeze.evaluation.baseline import baseline_probabilities, fit_baseline
from unfreeze.evaluation.metrics import measure
from unfreeze.settings.overrides import read_overrides

Row = dict[str, Any]
"""Result of a run: ``set``, ``size``, ``method``, ``seed``, scores, and the machine that ran it."""
NAMES = {
    "recipe": "unfreeze",
    "fastai": "fastai",
    "plain": "plain script",
    "logistic regression": "logistic regression",
}


def main() -> None:
    """Run the missing runs, save their results, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", action="append", required=True, dest="sets", metavar="'NAME=SOURCE [KEY=VALUE ...]'")
    parser.add_argument("--settings", type=Path, help="YAML file with changes to params.yaml")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy.json")
    chosen = parser.parse_args()
    rows: list[Row] = json.loads(chosen.out.read_text()) if chosen.out.exists() else []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(chosen.jobs) as pool:
        wanted = [
            (text, {"set": text.partition("=")[0], "size": chosen.image_size, "method": method, "seed": seed})
            for seed in range(chosen.seeds)  # outermost, so that one seed of every method is complete first
            for text in chosen.sets
            for method in chosen.methods
            if method != "logistic regression" or not seed
        ]
        missing = [(text, key) for text, key in wanted if not any(key.items() <= row.items() for row in rows)]
        works = {
            text: pool.submit(_work, Path(folder) / text.partition("=")[0], _changes(text, chosen))
            for text in dict.fromkeys(text for text, _ in missing)
        }

        def run_apart(text: str, key: Row) -> Row:
            with process() as side:
                found = side.submit(run, key["method"], works[text].result(), key["seed"]).result()
            return {**key, **found, "jobs": chosen.jobs, "machine": machine()}

        runs = {pool.submit(run_apart, *one): one[1] for one in missing}
        failed = 0
        try:
            for done in as_completed(runs):
                name = "{set}, {method}, seed {seed}".format(**runs[done])
                if error := done.exception():  # the other runs continue
                    failed += 1
                    print(f"{name} failed: {error!r}", flush=True)
                    continue
                rows.append(done.result())
                chosen.out.write_text(json.dumps(rows, indent=1) + "\n")
                print(f"{name}: {_shown(done.result())}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, cancel the runs that have not started
    print("\n".join(table([row for row in rows if row["size"] == chosen.image_size])))
    if failed:
        sys.exit(f"{failed} runs failed.")


def _changes(text: str, chosen: argparse.Namespace) -> list[str]:
    """Changes to `params.yaml` for a set: first those of the settings file, then those given with the set."""
    source, *changes = text.partition("=")[2].split()
    of_file = read_overrides(chosen.settings) if chosen.settings else []
    return [*of_file, *changes, f"data.source={source}", f"data.image_size={chosen.image_size}"]


def run(method: str, work: Work, seed: int) -> dict[str, float]:
    """Train and evaluate with one method.

    Returns:
        Scores on valid and test; for all methods except logistic regression also the batch size, and the seconds from
        images to evaluated model.
    """
    if method == "logistic regression":
        return regression(work)
    side: Any = {"recipe": ours, "fastai": peer, "plain": plain}[method]
    return {**side.recipe(work, seed), "batch_size": batch_size(work)}


def regression(work: Work) -> dict[str, float]:
    """Scores of scikit-learn's logistic regression on the frozen network's activations; with TTA they are the same."""
    scores: dict[str, float] = {}
    _, loader, activations = ours.prepare(work, 0)
    packed = loader.packed
    train = packed.rows("train")
    fitted = fit_baseline(activations[train], packed.labels[train])
    for split in ("valid", "test"):
        rows = packed.rows(split)
        found = measure(packed.labels[rows], baseline_probabilities(fitted, activations[rows], len(packed.classes)))
        scores |= {f"{split}_{prefix}{name}": value for name, value in found.items() for prefix in ("", "tta_")}
    return scores


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: test accuracy and log loss with TTA, means over the seeds of each method."""
    lines = [
        "| test accuracy, log loss (seeds) | " + " | ".join(NAMES.values()) + " |",
        "|---" * (len(NAMES) + 1) + "|",
    ]
    for name in dict.fromkeys(row["set"] for row in rows):
        cells = []
        for method in NAMES:
            found = [row for row in rows if row["set"] == name and row["method"] == method]
            cells.append(
                f"{mean(r['test_tta_accuracy'] for r in found):.4f}, {mean(r['test_tta_log_loss'] for r in found):.3f} "
                f"({len(found)})"
                if found
                else ""
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _work(folder: Path, changes: list[str]) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    work = make_work(folder / "packed", changed_settings(folder / "params.yaml", changes))
    return dataclasses.replace(work, views=work.settings.evaluate.tta_views)


def _shown(found: dict[str, float]) -> str:
    names = ("valid_tta_accuracy", "valid_tta_log_loss", "test_tta_accuracy", "test_tta_log_loss", "seconds")
    return ", ".join(f"{name} {found[name]:.4g}" for name in names if name in found)


if __name__ == "__main__":
    main()
