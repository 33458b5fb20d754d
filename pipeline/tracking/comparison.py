"""Whether a registered version of a model is better than the one before it."""

from pipeline.tracking.sender import client

JUDGED = {"retrain/test_tta_accuracy": "test", "evaluate/valid_tta_accuracy": "validation"}
"""Metrics for comparing versions, with their splits. The first metric that both versions have is used."""


def compare_with_the_one_before(name: str, version: int) -> str:
    """Say whether a registered version is better than the newest earlier one that has a metric in common with it.

    Errors of MLflow are raised.
    """
    mlflow = client()
    runs = {int(found.version): found.run_id for found in mlflow.search_model_versions(f"name = '{name}'")}
    now = mlflow.get_run(runs[version]).data
    for number in sorted((found for found in runs if found < version), reverse=True):
        before = mlflow.get_run(runs[number]).data
        for metric, images in JUDGED.items():
            if metric in now.metrics and metric in before.metrics:
                better = "is better" if now.metrics[metric] > before.metrics[metric] else "is not better"
                same = now.tags.get("unfreeze.data") == before.tags.get("unfreeze.data")
                return (
                    f"Version {version} of {name} {better} than version {number}: {now.metrics[metric]:.4f} of the {images} "
                    f"images right, {before.metrics[metric]:.4f} before{'' if same else ', on other images'}."
                )
    return f"Version {version} of {name} is registered; there is no earlier version to compare it with."
