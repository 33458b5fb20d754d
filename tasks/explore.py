"""Look at the images before anything is trained: balance, sizes, samples, duplicates and leaks, broken files."""

import json

import pandas as pd

from pipeline.artifacts import artifact
from pipeline.step import Run, step
from unfreeze.data.duplicates import find_duplicates
from unfreeze.data.packed import open_packed
from unfreeze.reports.explore import explore_metrics, explore_report
from unfreeze.settings.schema import Data


@step
def explore(run: Run, data: Data) -> dict[str, float]:
    packed = open_packed(artifact("ingest", ""))
    found = pd.read_csv(artifact("ingest", "images.csv"), keep_default_na=False, dtype=str)
    duplicates = find_duplicates(packed)
    metrics = explore_metrics(packed, found, duplicates)
    notes = json.loads(artifact("ingest", "dataset.json").read_text(encoding="utf-8"))["notes"]
    text = explore_report(packed, found, duplicates, data.source, notes)
    run.path("report.html").write_text(text, encoding="utf-8")
    run.log("%d images in %d classes, %d broken, %d duplicate pairs, %d leaks between splits",
            metrics["images"], metrics["classes"], metrics["broken"], len(duplicates), metrics["leaks"])  # fmt: skip
    run.log("report: %s", run.path("report.html"))
    return metrics
