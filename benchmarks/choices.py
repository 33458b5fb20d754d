"""Compare settings on validation images, for benchmarks/notes/choices.md; test images are not used.

python -m benchmarks.choices --source sample:elpv --source ../photos --try train.label_smoothing=0.1 \\
    --try "augment.zoom=1.1 augment.lighting=0.2"

Each set of settings is trained with every seed on the same split, from the head to the whole network. ``--head`` trains
only the head, which takes seconds.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from benchmarks.ours import Activations, predict_views, prepare, stages
from benchmarks.work import Work, changed_settings, classifier, make_work, with_epochs, with_seed
from unfreeze.device import seed_everything
from unfreeze.evaluation.metrics import Scores, score


def main() -> None:
    """Print a row for the unchanged params.yaml, and a row for each change."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", action="append", required=True, help="images, as in data.source; can be repeated")
    parser.add_argument("--try", action="append", default=[], dest="changes", metavar="KEY=VALUE ...")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--head", action="store_true", help="train only the head, on precomputed activations")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of the whole network (default: %(default)s)")
    parser.add_argument("--views", type=int, nargs="+", default=[], help="TTA views (default: evaluate.tta_views)")
    chosen = parser.parse_args()
    for key in ("train_augmented.", "train_full."):
        if key in " ".join(chosen.changes):
            parser.error(f"{key}* cannot be changed with --try; --epochs sets the epochs of the whole network")
    for source in chosen.source:
        with tempfile.TemporaryDirectory() as folder:
            last = "train_head" if chosen.head else "train_full"
            for row in compare(source, Path(folder), chosen.changes, chosen.seeds, last, chosen.epochs, chosen.views):
                print(row, flush=True)


def compare(
    source: str, folder: Path, changes: list[str], seeds: int, last: str, epochs: int, views: list[int]
) -> Iterator[str]:
    """Rows of a Markdown table: means over the seeds, and the number of seeds for which the log loss is lower."""
    averaged = [f"{count} views" for count in views] or ["with TTA"]
    columns = [
        f"{Path(source).name}, {last}, {seeds} seeds",
        "plain: accuracy, log loss",
        *averaged,
        "log loss lower in",
    ]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    usual: list[list[Scores]] = []
    for number, change in enumerate(["", *changes]):
        settings = changed_settings(folder / f"{number}.yaml", [f"data.source={source}", *change.split()])
        work = make_work(folder / "packed", settings)
        work = with_epochs(work, 2, epochs)
        counts = views or [work.settings.evaluate.tta_views]
        _, _, activations = prepare(work, 0)
        scores = [trial(work, seed, last, activations, counts) for seed in range(seeds)]
        usual = usual or scores
        cells = [
            f"{mean(s.accuracy for s in found):.4f}, {mean(s.loss for s in found):.4f}"
            for found in zip(*scores, strict=True)
        ]
        lower = [str(sum(s[i].loss < u[i].loss for s, u in zip(scores, usual, strict=True))) for i in range(len(cells))]
        yield f"| {change or 'params.yaml'} | {' | '.join(cells)} | {', '.join(lower)} |"


def trial(work: Work, seed: int, last: str, activations: Activations, views: list[int]) -> list[Scores]:
    """Train up to a stage, and score the validation images: without TTA, and with TTA for each number of views."""
    seed_everything(seed)
    work = with_seed(work, seed)
    model, loader = classifier(work, seed)
    for name in stages(work, model, loader, activations):
        if name == last:
            break
    labels = loader.packed.labels[loader.packed.rows("valid")]
    found = [predict_views(dataclasses.replace(work, views=count), model, loader, "valid") for count in views]
    return [score(probabilities, labels) for probabilities in (found[0][0], *(averaged for _, averaged in found))]


if __name__ == "__main__":
    main()
