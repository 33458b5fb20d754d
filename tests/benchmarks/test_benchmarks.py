"""Tests of the benchmarks: unfreeze's own cases on a small workload, memory use, and step times from a flow's log."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as bench
from benchmarks import accuracy, checkpoints, choices, compare, figure, finder, memory, orchestration, ours
from benchmarks.work import Work, files, make_work
from tests.integration.project import paint
from unfreeze.settings.overrides import apply_overrides
from unfreeze.settings.schema import load_settings

ROOT = Path(__file__).parent.parent.parent
TINY = ["backbone.name=timm:test_efficientnet", "backbone.weights=none"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    base = tmp_path_factory.mktemp("bench")
    paint(base / "photos", 0)
    settings = base / "params.yaml"
    shutil.copy(ROOT / "params.yaml", settings)
    apply_overrides(settings, [f"data.source={base / 'photos'}", "data.image_size=32", *TINY])
    return make_work(base / "packed", load_settings(settings))


def test_a_settings_file_counts_and_flags_go_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("data:\n  image_size: 224\nbackbone:\n  weights: none\n")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--settings", str(file), "--weights", "pretrained", "--name", "my"])
    shutil.copy(ROOT / "params.yaml", tmp_path)
    apply_overrides(tmp_path / "params.yaml", bench._overrides(bench._arguments()))
    found, usual = load_settings(tmp_path / "params.yaml"), load_settings(ROOT / "params.yaml")
    assert (found.data.image_size, found.backbone.weights) == (224, "pretrained")
    assert (found.data.source, found.backbone.name) == (usual.data.source, usual.backbone.name)


def test_results_of_other_settings_have_a_name_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--settings", str(tmp_path / "my.yaml")])
    with pytest.raises(SystemExit):
        bench._arguments()
    assert "--settings needs a --name" in capsys.readouterr().err


@pytest.mark.parametrize("case", compare.CASES)
def test_our_side_does_every_case(work: Work, case: str) -> None:
    assert getattr(ours, case)(work) > 0


def test_our_recipe_is_judged_on_valid_and_test(work: Work) -> None:
    result = ours.recipe(work, seed=1)
    assert set(result) >= {"seconds", "valid_accuracy", "valid_tta_accuracy", "test_accuracy", "test_tta_accuracy"}
    assert all(0 <= value <= 1 for name, value in result.items() if "accuracy" in name)


@pytest.mark.long
def test_accuracies_are_noted_run_by_run_and_go_on_where_they_stopped(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "accuracy.json"
    (tmp_path / "few.yaml").write_text("train_full:\n  cycles: 1\n  cycle_len: 1\n")
    words = ["--set", f"photos={work.source} {' '.join(TINY)}", "--image-size", "32", "--seeds", "1", "--out", str(out)]
    words += ["--settings", str(tmp_path / "few.yaml"), "--methods", "recipe", "plain", "logistic regression"]
    monkeypatch.setattr(sys, "argv", ["accuracy", *words])
    accuracy.main()
    rows = json.loads(out.read_text())
    assert [row["method"] for row in rows] == ["recipe", "plain", "logistic regression"]
    assert [row.get("batch_size") for row in rows] == [32, 32, None]
    for row in rows:
        assert all(0 <= row[f"{split}_tta_accuracy"] <= 1 for split in ("valid", "test"))
        assert np.isfinite(row["test_tta_log_loss"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("| photos | ")
    accuracy.main()
    assert json.loads(out.read_text()) == rows


@pytest.mark.long
def test_a_run_that_fails_is_named_and_the_others_are_noted(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "accuracy.json"
    words = ["--set", f"nothing={tmp_path / 'none'}", "--set", f"photos={work.source} {' '.join(TINY)}", "--jobs", "2"]
    words += ["--methods", "logistic regression", "--image-size", "32", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["accuracy", *words])
    with pytest.raises(SystemExit, match="1 runs failed"):
        accuracy.main()
    assert [row["set"] for row in json.loads(out.read_text())] == ["photos"]
    assert "nothing, logistic regression, seed 0 failed: UserError" in capsys.readouterr().out


def test_choices_are_judged_with_every_seed_on_validation_images(work: Work, tmp_path: Path) -> None:
    change = "train.label_smoothing=0.9 batch_size=8"
    rows = choices.compare(work.source, tmp_path, ["train_head.epochs=10", change], 2, "train_head", 1, [])
    _, _, usual, same, worse = (row.strip("| ").split(" | ") for row in rows)
    assert usual[0] == "params.yaml" and worse[0] == change
    assert usual[1:] == same[1:] and usual[3] == "0, 0"
    assert float(worse[1].split(", ")[1]) > float(usual[1].split(", ")[1])


def test_choices_of_views_are_judged_on_one_training(work: Work, tmp_path: Path) -> None:
    head, rule, usual = choices.compare(work.source, tmp_path, [], 1, "train_head", 1, [1, 4])
    assert "plain" in head and "| 1 views | 4 views |" in head
    _, plain, one, four, lower = usual.strip("| ").split(" | ")
    assert lower == "0, 0, 0" and len({plain, one, four}) == 3 and rule.count("---") == 5


def test_the_finder_is_run_with_every_seed(work: Work, tmp_path: Path) -> None:
    changes = [f"data.source={work.source}", "data.image_size=32", *TINY]
    picks = finder.find(tmp_path, changes, 2, "unfreeze_lr_find")
    assert set(picks["step"]) == {"lr_find", "unfreeze_lr_find"}
    assert (picks.groupby(["step", "rule"]).size() == 2).all()
    midpoints = picks.query("step == 'lr_find' and rule == 'midpoint'")["rate"]
    row = next(line for line in finder.table(picks) if line.startswith("| lr_find, midpoint"))
    cells = row.strip("| ").split(" | ")
    assert cells[1] == f"{midpoints.min():.1e}" and cells[3] == f"{midpoints.max():.1e}"


def test_both_sides_see_the_same_images_in_the_same_split(work: Work) -> None:
    table = files(work)
    assert len(table) == 48 and set(table["split"]) == {"train", "valid", "test"}
    assert all(Path(file).is_file() for file in table["file"])


def test_rates_are_images_per_second(work: Work) -> None:
    for rate in (ours.precompute_rate, ours.frozen_rate, ours.full_rate, ours.read_rate):
        assert rate(work) > 1


def test_a_checkpoint_is_a_small_share_of_the_interval(work: Work) -> None:
    found = checkpoints.measure(work, lambda text: None, repeats=2)
    assert found["megabytes"] > 0.1 and 0 < found["share"] < 0.5


def test_memory_does_not_grow_with_the_images() -> None:
    """Both data sets have more batches than are prefetched. A smaller one would hold fewer batches in memory."""
    found = memory.measure(lambda text: None, counts=(1_000, 5_000))
    assert found["peak_mb"]["5000"] - found["peak_mb"]["1000"] < 150 < 4_000 * memory.SIZE**2 * 3 / 1e6


def test_turns_of_steps_from_the_flows_log() -> None:
    log = (
        "23:59:58.500 | INFO    | Flow run 'a' - Beginning flow run 'a' for flow 'recipe'\n"
        "23:59:59.100 | INFO    | Task run 'ingest' - Finished in the middle of a sentence\n"
        "00:00:02.000 | INFO    | Task run 'ingest' - Finished in state Completed('ingest: done')\n"
        "00:00:03.250 | INFO    | Task run 'explore' - Finished in state Completed('explore: done')\n"
    )
    turns = orchestration._turns(log)
    assert turns == {"ingest": (86_398.5, pytest.approx(3.5)), "explore": (2.0, pytest.approx(1.25))}


def test_a_figure_of_what_was_found(tmp_path: Path) -> None:
    shares = {name: {"share": 0.9} for name in figure.SHARES}
    cases = {name: {"ratio": 3.0} for name in compare.CASES}

    def about(source: str) -> dict[str, Any]:
        settings = {"backbone": {"name": "timm:lite"}, "data": {"source": source, "image_size": 160}}
        return {"a part": {"settings": settings}}

    drawn = []
    for name, source, found in (
        ("elpv-lite-160", "sample:elpv", {"speed": cases, "shares": shares}),
        ("photos-lite-160", "photos", {"speed": cases, "shares": shares}),
        ("pets-lite-160", "pets", {"accuracy": {"ratios": {compare.ALL: 8.0, compare.OURS: 9.0}}}),
        ("with-other-settings", "pets", {"accuracy": {"ratios": {compare.ALL: 20.0}}}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"about": about(source), **found}))
        figure.draw(tmp_path, tmp_path / "figure.png")
        drawn.append((tmp_path / "figure.png").read_bytes())
    assert all(png.startswith(b"\x89PNG") for png in drawn) and len(set(drawn)) == 3
    assert drawn[-1] == drawn[-2]
    (tmp_path / "memory.json").write_text(json.dumps({"growth_mb": 3}))  # not part of the figure
    (tmp_path / "accuracy.json").write_text(json.dumps([{"set": "pets", "method": "recipe"}]))
    figure.draw(tmp_path, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes() == drawn[-1]
