"""How much the learning-rate finders' picks differ between seeds, for benchmarks/notes/choices.md.

python -m benchmarks.finder --source sample:elpv --source ../photos --seeds 32     # the head, on activations
python -m benchmarks.finder --source ../photos --whole                             # and the whole network

Each seed has its own new head and its own order of images; the split is the same. For every rule, the table has the
lowest, the median and the highest pick, the ratio of highest and lowest, and the share of the pairs of seeds whose
picks differ by at most a factor of 2. A head takes seconds, a whole network minutes.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.ours import prepare, stages
from benchmarks.work import changed_settings, classifier, make_work, with_seed
from unfreeze.device import seed_everything
from unfreeze.training.lr_curve import pick_rate, suggest

MAX_RATIO = 2.0
"""Bar for the ratio of two seeds' picks."""


def main() -> None:
    """Print a table for each source."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finder", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", action="append", required=True, help="images, as in data.source; can be repeated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--try", default="", dest="changes", metavar="KEY=VALUE ...", help="changes to params.yaml")
    parser.add_argument("--whole", action="store_true", help="find the rate of the whole network, too")
    chosen = parser.parse_args()
    last = "unfreeze_lr_find" if chosen.whole else "lr_find"
    for source in chosen.source:
        with tempfile.TemporaryDirectory() as folder:
            changes = [f"data.source={source}", f"data.image_size={chosen.image_size}", *chosen.changes.split()]
            print(f"{Path(source).name}, {chosen.seeds} seeds", flush=True)
            for line in table(find(Path(folder), changes, chosen.seeds, last)):
                print(line, flush=True)


def find(folder: Path, changes: list[str], seeds: int, last: str) -> pd.DataFrame:
    """Picks of each seed: rows of step, rule, rate and batches of the sweep."""
    work = make_work(folder / "packed", changed_settings(folder / "params.yaml", changes))
    _, loader, activations = prepare(work, 0)
    rows = []
    for seed in range(seeds):
        seed_everything(seed)
        seeded = with_seed(work, seed)
        curves: dict[str, pd.DataFrame] = {}
        model, _ = classifier(seeded, seed)
        for step in stages(seeded, model, loader, activations, curves=curves):
            if step == last:
                break
        for step, curve in curves.items():
            picks = suggest(curve, len(loader.packed.classes))
            rows += [(step, rule, pick_rate(picks, rule), len(curve)) for rule in asdict(picks)]
    return pd.DataFrame(rows, columns=["step", "rule", "rate", "batches"])


def table(picks: pd.DataFrame) -> Iterator[str]:
    """Lines of a Markdown table, one row per step and rule."""
    yield f"| step, rule | lowest | median | highest | ratio | pairs within {MAX_RATIO:g} | batches |"
    yield "|---|---|---|---|---|---|---|"
    for (step, rule), found in picks.groupby(["step", "rule"], sort=False):
        rates, batches = found["rate"], found["batches"]
        low, high = rates.min(), rates.max()
        ratios = [max(a, b) / min(a, b) for a, b in itertools.combinations(rates, 2)]
        within = np.mean(np.array(ratios) <= MAX_RATIO) if ratios else 1.0
        yield (
            f"| {step}, {rule} | {low:.1e} | {rates.median():.1e} | {high:.1e} | {high / low:.1f} | {within:.0%} | "
            f"{batches.min()} to {batches.max()} |"
        )


if __name__ == "__main__":
    main()
