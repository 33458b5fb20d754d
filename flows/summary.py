"""The table printed at the end of a pass: steps, rates, accuracies, and links."""

import json
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from flows.prefect_links import way_to_experiments
from flows.stage import Outcome
from pipeline.artifacts import artifact

RESULTS = {
    "ingest": "{images:.0f} images, {broken:.0f} set aside",
    "explore": "{exact_duplicates:.0f} exact, {near_duplicates:.0f} near duplicates; {leaks:.0f} between splits",
    "precompute": "{features:.0f} activations an image",
    "lr_find": "rate {rate:.2e}",
    "train_head": "valid accuracy {valid_accuracy:.4f}",
    "train_augmented": "valid accuracy {valid_accuracy:.4f}",
    "unfreeze_lr_find": "rate {rate:.2e}",
    "train_full": "valid accuracy {valid_accuracy:.4f} in cycle {best_cycle:.0f}",
    "evaluate": "valid accuracy with TTA {valid_tta_accuracy:.4f}",
    "retrain": "{epochs:.0f} epochs on train + valid",
    "register": "version {version:.0f}",
}
"""Format string for the column "result", filled with the step's metrics."""


def print_summary(outcomes: Mapping[str, Outcome]) -> None:
    """Print the steps of a pass, the accuracies, and where the reports are.

    Args:
        outcomes: outcomes of the steps of the pass; may be empty.
    """
    console = Console()
    console.print()
    if outcomes:
        print_steps(outcomes)
    console.print(_accuracies())
    chosen = json.loads(artifact("evaluate", "chosen.json").read_text())
    console.print(chosen["reason"], highlight=False, soft_wrap=True)
    console.print("Logistic regression: scikit-learn's, on the frozen backbone's activations, as a baseline.\n")
    for what, where in (
        ("Exploration", artifact("explore", "report.html")),
        ("Evaluation", artifact("evaluate", "report.html")),
        ("Predict", "unfreeze predict photo.jpg"),
        ("Compare runs in MLflow", way_to_experiments()),
    ):
        console.print(f"{what + ':':24}{where}", highlight=False, soft_wrap=True)


def print_steps(outcomes: Mapping[str, Outcome]) -> None:
    """Print the steps of a pass."""
    table = Table("step", "", "time", "result", title="The recipe", title_justify="left")
    for step, outcome in outcomes.items():
        time = f"{outcome.seconds:.0f} s" if outcome.ran else ""
        table.add_row(step, "ran" if outcome.ran else "cached", time, RESULTS[step].format(**_metrics(step)))
    Console().print(table)


def _metrics(step: str) -> dict[str, float]:
    return dict(json.loads(artifact(step, "metrics.json").read_text()))


def _accuracies() -> Table:
    table = Table(title="Accuracy", title_justify="left")
    table.add_column("")
    for name in ("plain", "with TTA", "logistic regression"):
        table.add_column(name, justify="right")
    evaluated, retrained = _metrics("evaluate"), _metrics("retrain")
    for title, metrics, split in (
        ("valid", evaluated, "valid"),
        ("test", evaluated, "test"),
        ("test, retrained on train + valid", retrained, "test"),
    ):
        if f"{split}_accuracy" in metrics:
            names = (f"{split}_accuracy", f"{split}_tta_accuracy", f"{split}_baseline_accuracy")
            table.add_row(title, *(f"{metrics[name]:.4f}" for name in names))
    if not any(key.startswith("test_") for key in retrained):
        table.add_row("test", "no test split", "", "")
    return table
