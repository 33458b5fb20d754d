"""Settings against one another on validation images, for docs/choices.md; the test images take no part.

python -m benchmarks.choices --source sample:elpv --source ../photos --try train.label_smoothing=0.1 \\
    --try "augment.zoom=1.1 augment.lighting=0.2"

Every set of settings runs the recipe from the head to the whole network with every seed, on the same split; ``--head``
stops after the head, which takes seconds.
"""

import argparse
import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from benchmarks.ours import Activations, predict_views, prepare, stages
from benchmarks.work import Work, classifier, make_work
from flows.overrides import apply_overrides
from unfreeze.device import seed_everything
from unfreeze.measuring import Scores, score
from unfreeze.settings import load_settings

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Print a row for params.yaml as it is, and one for each change that is to be tried."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", action="append", required=True, help="images, as data.source; may be repeated")
    parser.add_argument("--try", action="append", default=[], dest="changes", metavar="KEY=VALUE ...")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--head", action="store_true", help="train the head on precomputed activations alone")
    parser.add_argument("--epochs", type=int, default=4, help="of the whole network (default: %(default)s)")
    chosen = parser.parse_args()
    for key in ("train_augmented.", "train_full."):
        if key in " ".join(chosen.changes):
            parser.error(f"{key}* cannot be tried: --epochs says how long the whole network is trained")
    for source in chosen.source:
        with tempfile.TemporaryDirectory() as folder:
            compare(source, Path(folder), chosen.changes, chosen.seeds, "train_head" if chosen.head else "train_full",
                    chosen.epochs, lambda row: print(row, flush=True))  # fmt: skip


def compare(
    source: str, folder: Path, changes: list[str], seeds: int, last: str, epochs: int, say: Callable[[str], None]
) -> None:
    """Rows of a table in Markdown: means over the seeds, and how many seeds had a lower log loss than without a change."""
    say(f"| {Path(source).name}, {last}, {seeds} seeds | plain: accuracy, log loss | with TTA | log loss lower in |")
    say("|---|---|---|---|")
    usual: list[tuple[Scores, Scores]] = []
    for number, change in enumerate(["", *changes]):
        settings = folder / f"{number}.yaml"
        shutil.copy(ROOT / "params.yaml", settings)
        apply_overrides(settings, [f"data.source={source}", *change.split()])
        work = make_work(folder / "packed", load_settings(settings))
        work = dataclasses.replace(work, full_epochs=epochs, views=work.settings.evaluate.tta_views)
        _, _, activations = prepare(work, 0)
        scores = [trial(work, seed, last, activations) for seed in range(seeds)]
        usual = usual or scores
        lower = [sum(s[i].loss < u[i].loss for s, u in zip(scores, usual, strict=True)) for i in (0, 1)]
        plain, averaged = (
            f"{mean(s[i].accuracy for s in scores):.4f}, {mean(s[i].loss for s in scores):.4f}" for i in (0, 1)
        )
        say(f"| {change or 'params.yaml'} | {plain} | {averaged} | {lower[0]}, {lower[1]} |")


def trial(work: Work, seed: int, last: str, activations: Activations) -> tuple[Scores, Scores]:
    """Train up to a stage; scores on the validation images, plain and with TTA."""
    seed_everything(seed)
    work = dataclasses.replace(work, settings=dataclasses.replace(work.settings, seed=seed))
    model, loader = classifier(work, seed)
    for name in stages(work, model, loader, activations):
        if name == last:
            break
    labels = loader.packed.labels[loader.packed.rows("valid")]
    plain, averaged = predict_views(work, model, loader, "valid")
    return score(plain, labels), score(averaged, labels)


if __name__ == "__main__":
    main()
