"""`unfreeze reproduce`: reproduce the model of an earlier run in a worktree, and compare weights and metrics.

The run's commit is checked out beside this project, and its `params.yaml` and `dvc.lock` are put there. The outputs of
`evaluate`, `retrain` and `register` are fetched from the cache or the remote. If that fails, `dvc repro` runs the steps
up to `retrain` whose results neither has.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import yaml

from flows import dvc
from pipeline.artifacts import artifact
from pipeline.process.secrets import mask
from pipeline.tracking.recorded import Recorded, find_recorded
from unfreeze.data.samples import link_sample
from unfreeze.errors import UserError

FETCHED = ("evaluate", "retrain", "register")
"""Steps whose outputs are needed: model, predictions, reports, metrics."""
WEIGHTS = "artifacts/retrain/model.safetensors"


def reproduce(named: str, into: Path | None) -> int:
    """Reproduce the model of an earlier run; returns the exit code: 0 if its weights are equal, else 1.

    Args:
        named: id of an MLflow run, or ``models:/<name>/<version>``.
        into: folder of the worktree; by default beside this one, named after the run.

    Raises:
        UserError: the run, its commit or its files are missing, or a step failed; says which.
    """
    recorded = find_recorded(named)
    here = Path.cwd()
    into = into or here.with_name(f"{here.name}-{recorded.run[:8]}")
    _worktree(recorded.commit, into)
    for name, text in recorded.files.items():
        (into / name).write_text(text, encoding="utf-8")
    dvc.share_cache(into)
    print(f"MLflow run {recorded.run}, commit {recorded.commit[:12]}: in {into}", flush=True)
    if recorded.changed:
        print("The code of the run had changes that were not committed.")
    computed = [] if _fetched(into) else _compute(into)
    print(f"Computed: {', '.join(computed)}." if computed else "Nothing was computed: all results were fetched.")
    return 0 if _compare(recorded, into) else 1


def _worktree(commit: str, into: Path) -> None:
    """Check a commit out into a worktree; an existing worktree is reused."""
    if (into / ".git").exists():
        if _git("-C", str(into), "rev-parse", "HEAD") != commit:
            raise UserError(f"{into} already exists, with another commit: choose another folder with --into.")
        return
    if into.exists():
        raise UserError(f"{into} already exists: choose another folder with --into.")
    if not _git("cat-file", "-t", commit):
        _git("fetch", "--all", "--quiet")
    if _git("cat-file", "-t", commit) != "commit":
        raise UserError(f"The run's commit {commit} is not in this clone, nor in its remotes: it was never pushed.")
    done = subprocess.run(
        ["git", "worktree", "add", "--quiet", "--detach", into, commit], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"git could not check out {commit[:12]} into {into}: {done.stderr.strip()}")


def _git(*words: str) -> str:
    """Output of git; empty if it fails."""
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _dvc(into: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(dvc.dvc(*words), cwd=into, capture_output=True, text=True, env=dvc.environment())


def _fetched(into: Path) -> bool:
    """Fetch the outputs of the last steps; returns whether the cache and the remote had all of them."""
    return any(_dvc(into, command, *FETCHED).returncode == 0 for command in ("checkout", "pull"))


def _compute(into: Path) -> list[str]:
    """Compute the results that cannot be fetched; returns the steps that were run."""
    settings = yaml.safe_load((into / "params.yaml").read_text(encoding="utf-8"))
    link_sample(settings["data"]["source"], into)
    pull = ["--pull"] if dvc.find_remote()[0] else []
    ran = []
    with subprocess.Popen(
        dvc.dvc("repro", *pull, FETCHED[-2]), cwd=into, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=dvc.environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Running stage"):
                ran.append(line.split("'")[1])
            if not dvc.is_noise(line):
                print(mask(line.rstrip()), flush=True)
    if process.returncode:
        raise UserError(f"Results could neither be fetched nor computed: see above. The worktree is {into}.")
    return ran


def _compare(recorded: Recorded, into: Path) -> bool:
    """Print which weights and metrics are equal; returns whether the weights are."""
    digest = hashlib.sha256((into / WEIGHTS).read_bytes()).hexdigest()
    stages = yaml.safe_load(recorded.files["dvc.lock"])["stages"]
    noted = next(out["md5"] for out in stages["retrain"]["outs"] if out["path"] == WEIGHTS)
    equal = hashlib.md5((into / WEIGHTS).read_bytes(), usedforsecurity=False).hexdigest() == noted
    if recorded.sha256 is not None:
        equal = equal and digest == recorded.sha256
    against = "dvc.lock" + (f" and {recorded.version}" if recorded.sha256 else "")
    print(f"Weights: {'equal to' if equal else 'NOT equal to'} those of {against} (sha256 {digest[:16]}).")
    found = {
        f"{stage}/{name}": value
        for stage in ("evaluate", "retrain")
        for name, value in json.loads((into / artifact(stage, "metrics.json")).read_text()).items()
    }
    known = [name for name in found if name in recorded.metrics]
    other = [name for name in known if found[name] != recorded.metrics[name]]
    said = f"{len(known) - len(other)} of {len(known)} equal MLflow's"
    print(f"Metrics of evaluate and retrain: {said}" + (f"; not {', '.join(sorted(other)[:5])}." if other else "."))
    if not equal:
        print(
            "On other hardware, with another number of threads or another torch, weights differ in their last bits.",
            file=sys.stderr,
        )
    return equal
