"""Guarantees for several workers, tested with real, password-protected servers on PostgreSQL and S3.

    python -m tests.integration.team                # all cases in order; prints a table with seconds
    python -m tests.integration.team --cases bceh   # only these cases

Here a machine is a folder with its own HOME. All machines share one kernel and the loopback network.
"""

import argparse
import base64
import hashlib
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from deploy.servers import DATABASES, postgresql_programs
from pipeline.artifacts import STAGES
from tests.integration.real_team import RealTeam, real_team
from tests.integration.servers import at_work, errors_in, until
from unfreeze.settings.overrides import apply_overrides
from unfreeze.settings.schema import flatten

WEIGHTS = "artifacts/train_full/model.safetensors"
LONG = {"batch_size": 2, "train_full.cycle_len": 40, "checkpoint.batches": 5}
"""Settings that make the whole network's training long enough to be killed in the middle."""
SHORT = {"b": "train_head", "e": "explore"}
"""Last step of each short case."""
CASES: dict[str, Callable[..., None]] = {}


def case(function: Callable[..., None]) -> Callable[..., None]:
    """Register a case under the first character of its docstring, by which ``--cases`` selects it."""
    CASES[(function.__doc__ or "")[0]] = function
    return function


@case
def a_schedule(team: RealTeam) -> None:
    """a  a schedule of every minute starts runs by itself, and the server logs no error"""
    file = team.checkout.folder / "prefect.yaml"
    nightly = file.read_text()
    file.write_text(re.sub(r'cron: "[^"]*"', 'cron: "* * * * *"', nightly))
    team.deploy()
    file.write_text(nightly)
    deployment = team.request("deployments/name/recipe/nightly")["id"]

    def fired(*states: str) -> list[Any]:
        wanted = {"flow_runs": {"state": {"type": {"any_": states}}}, "sort": "START_TIME_ASC"}
        return [run for run in team.request("flow_runs/filter", wanted) if run["auto_scheduled"]]

    until(lambda: fired("SCHEDULED"), 120)
    with team.worker("first"):
        ended = until(lambda: (runs := fired("COMPLETED", "FAILED", "CRASHED"))[1:] and runs, 600)
    team.request(f"deployments/{deployment}/pause_deployment", {})
    team.deploy()  # restore the nightly schedule
    team.request(f"deployments/{deployment}/resume_deployment", {})
    assert {run["state_type"] for run in ended} == {"COMPLETED"}, team.said(ended[-1]["id"])
    assert "Nothing to run" in team.said(ended[-1]["id"])
    assert errors_in(team.servers.logs / "prefect.log") == []


@case
def b_side_by_side(team: RealTeam, last: str = "register") -> None:
    """b  two runs with different settings at once on two workers; a third run still has the committed settings"""
    with team.worker("first"), team.worker("second"):
        one = team.start(settings={"train_head.epochs": 2}, until=last)
        two = team.start(settings={"train_head.epochs": 3, "head.dropout": 0.1}, until=last)
        until(lambda: all(team.state(run)["state_type"] == "RUNNING" for run in (one, two)), 300)
        three = team.start(until=last)
        ended = [team.finish(run) for run in (one, two, three)]
    assert max(run["start_time"] for run in ended[:2]) < min(run["end_time"] for run in ended[:2])
    names = [run["name"].partition("32 px")[2] for run in ended]
    assert names == [" · train_head.epochs=2", " · head.dropout=0.1, train_head.epochs=3", ""], names
    logged = [team.parent(run).data.params for run in (one, two)]
    seen = [(params["train_head.epochs"], params["head.dropout"]) for params in logged]
    assert seen == [("2", "0.5"), ("3", "0.1")], seen
    trained = [re.findall(r"epoch \d+/(\d+), cycle 1: train", team.said(run))[0] for run in (one, two)]
    assert trained == ["2", "3"], trained
    assert all("submitting flow run" in team.log(name).read_text() for name in ("first", "second"))
    assert team.checkout.git("status", "--porcelain") == ""


@case
def e_pushed_code(team: RealTeam, last: str = "register") -> None:
    """e  the next run uses a changed line that was pushed"""
    file, now = team.checkout.folder / "tasks/explore.py", float(int(time.time()))  # not computed by any earlier run
    file.write_text(re.sub("    return .*", f'    return {{**metrics, "committed_since": {now}}}', file.read_text()))
    commit = team.push("change")
    with team.worker("first"):
        run = team.start(until=last)
        team.finish(run)
    parent = team.parent(run)
    assert parent.data.metrics["explore/committed_since"] == now
    assert parent.data.tags["mlflow.source.git.commit"] == commit and parent.data.tags["unfreeze.changed"] == "no"


@case
def f_reproduce(team: RealTeam) -> None:
    """f  `unfreeze reproduce` on a third machine fetches all of an earlier run, in at most 30 seconds of CPU time"""
    newest = [run for run in team.logged() if "mlflow.parentRunId" not in run.data.tags][0]
    third = team.machine("third")
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = third.run("flows.cli", "reproduce", newest.info.run_id)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"   reproduce took {time.monotonic() - start:.1f} seconds, {seconds:.1f} of a processor\n{printed}")
    assert "Nothing was computed" in printed and "Weights: equal" in printed and "NOT" not in printed
    assert seconds < 30, seconds


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all processes that it has started, as a power cut does."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.send_signal(signal.SIGSTOP)
    for one in family:
        one.kill()


def undisturbed(team: RealTeam, settings: dict[str, Any]) -> Path:
    """Weights of an uninterrupted training, on a machine without remote and servers."""
    machine = team.machine("undisturbed")
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "DVC_GLOBAL_CONFIG_DIR"):
        machine.environment.pop(name, None)
    apply_overrides(machine.folder / "params.yaml", [f"{key}={value}" for key, value in settings.items()])
    machine.run("dvc", "repro", "train_full")
    return machine.folder / WEIGHTS


@case
def c_lost_worker(team: RealTeam) -> None:
    """c  worker, flow and step are killed during training: within 3 minutes, the other worker continues in mid-epoch"""
    shared = team.servers.folder / "s3/dvc/team.checkpoints/train_full"
    before = set(shared.glob("*/training.safetensors"))
    with ExitStack() as stack:
        lost = stack.enter_context(team.worker("first"))
        run = team.start(settings=LONG)
        at_work(lost.pid)
        stack.enter_context(team.worker("second"))
        until(lambda: set(shared.glob("*/training.safetensors")) - before, 900, lambda: team.said(run))
        time.sleep(3)
        kill(lost)
        killed = datetime.now(UTC)
        weights = undisturbed(team, LONG)  # meanwhile, the server waits minutes for a heartbeat
        until(lambda: team.state(run)["run_count"] == 2, 240, lambda: team.said(run))
        states = team.request(f"flow_run_states/?flow_run_id={run}")
        again = max(one["timestamp"] for one in states if one["name"] == "Running")
        seconds = (datetime.fromisoformat(again) - killed).total_seconds()
        team.finish(run)
    log = team.log("second").read_text()
    assert "continuing from another machine's checkpoint at s3://dvc/team.checkpoints" in log, log
    epoch, batch = map(int, re.findall(r"goes on in epoch (\d+), batch (\d+), from a checkpoint", log)[0])
    print(f"   taken over after {seconds:.0f} seconds, goes on in epoch {epoch}, batch {batch}")
    assert seconds < 180 and batch > 1, (seconds, epoch, batch)
    parent = team.parent(run)
    lock = yaml.safe_load(
        Path(team.mlflow.download_artifacts(parent.info.run_id, "dvc.lock", str(team.base))).read_text()
    )
    (noted,) = [out["md5"] for out in lock["stages"]["train_full"]["outs"] if out["path"] == WEIGHTS]
    assert hashlib.md5(weights.read_bytes()).hexdigest() == noted

    def family() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"pass": [team.parent(run).info.status]}
        for one in team.logged(**{"mlflow.parentRunId": parent.info.run_id}):
            found.setdefault(one.data.tags["unfreeze.stage"], []).append(one.info.status)
        return {stage: sorted(states) for stage, states in found.items()}

    # Steps that an earlier case has computed have no MLflow run here.
    right = {stage: ["FINISHED"] for stage in family()} | {"train_full": ["FINISHED", "KILLED"]}
    assert family() == right and {*STAGES[STAGES.index("train_full") :], "pass"} <= right.keys(), family()
    with team.worker("first"):  # it is back, and sends its unsent records
        team.finish(team.start(settings=LONG))
    assert family() == right, family()


@case
def d_restarts(team: RealTeam) -> None:
    """d  runs still start after a worker is killed with a run that it has taken, and after Prefect's server restarts"""
    with team.worker("first") as lost:
        taken = team.start()
        team.wait(taken, "PENDING", seconds=120)
        kill(lost)
    assert team.state(taken)["state_type"] == "PENDING", team.state(taken)
    with team.worker("second"):
        team.finish(team.start())
    with team.worker("first") as worker:
        interrupted = team.start(settings={"seed": 5})
        at_work(worker.pid)
        (prefect,) = [part for part in team.servers.parts if part.name == "Prefect"]
        prefect.process.kill()
        prefect.process.wait()
        time.sleep(5)
        team.stack.enter_context(team.servers.prefect_server())
        team.finish(interrupted)
        team.finish(team.start())


@case
def g_search(team: RealTeam) -> None:
    """g  a search of 12 trials on two workers, one of them killed, has each trial's result once and finds the best"""
    searched: dict[str, list[Any]] = {
        "train_full.cycles": [1, 2],
        "unfreeze.lr_ratio": [2.0, 5.0],
        "train_full.warmup": [0.0, 0.2, 0.4],
    }
    wanted = {
        "trials": 12, "metric": "evaluate/valid_tta_log_loss", "direction": "minimize", "sampler": "grid", "prune": False,
        "parallel": 2, "deployment": "recipe/nightly",
        "settings": searched,
    }  # fmt: skip
    (team.checkout.folder / "sweep.yaml").write_text(yaml.safe_dump(wanted))
    command = [sys.executable, "-m", "flows.cli", "sweep"]
    log = team.base / "sweep.log"
    with ExitStack() as stack:
        lost = stack.enter_context(team.worker("first"))
        stack.enter_context(team.worker("second"))
        with log.open("w") as file:
            search = subprocess.Popen(
                command, cwd=team.checkout.folder, env=team.checkout.environment, stdout=file, stderr=file
            )
        stack.callback(search.kill)
        at_work(lost.pid)
        kill(lost)
        assert search.wait(3000) == 0, log.read_text()
    printed = log.read_text()
    name = re.findall(r"Search (\S+):", printed)[0]
    trials = team.logged(**{"unfreeze.sweep": name})
    parents = [run for run in trials if "mlflow.parentRunId" not in run.data.tags]
    settings = sorted(tuple(run.data.params[key] for key in searched) for run in parents)
    assert settings == sorted(itertools.product(*(map(str, values) for values in searched.values()))), settings
    assert {run.info.status for run in parents} == {"FINISHED"}
    assert len(re.findall(r"trial \d+: evaluate/valid_tta_log_loss", printed)) == 12 and "failed" not in printed, (
        printed
    )
    # All combinations were tried, so a search with one trial at a time would find the same best trial.
    found = yaml.safe_load((team.checkout.folder / ".unfreeze/sweep" / name / "best.yaml").read_text())
    chosen = tuple(str(value) for value in (flatten(found)[key] for key in searched))
    losses = {tuple(run.data.params[key] for key in searched): run.data.metrics[wanted["metric"]] for run in parents}
    assert losses[chosen] == min(losses.values())


@case
def h_secrets(team: RealTeam) -> None:
    """h  no password or key is in databases, S3, artifacts, workspaces or logs"""
    for name in DATABASES:
        command = [postgresql_programs() / "pg_dump", "--file", team.base / f"{name}.sql", name]
        subprocess.run(command, env=os.environ | team.servers.postgresql, check=True)
    wanted = {name: value.encode() for name, value in team.servers.passwords.items()}
    for user, name in (("team", "PREFECT_PASSWORD"), ("team", "MLFLOW_PASSWORD"), ("admin", "MLFLOW_ADMIN_PASSWORD")):
        wanted[f"{name} in a header"] = base64.b64encode(f"{user}:{team.servers.passwords[name]}".encode())
    theirs = {team.servers.folder / name for name in ("secrets.env", "team.env", "pgpass")}
    assert {file.stat().st_mode & 0o777 for file in theirs if file.exists()} == {0o600}
    found, count = [], 0
    for file in team.base.rglob("*"):
        if file.is_file() and not file.is_symlink() and file not in theirs:
            content, count = file.read_bytes(), count + 1
            found += [f"{name} in {file.relative_to(team.base)}" for name, value in wanted.items() if value in content]
    print(f"   {len(wanted)} secrets searched for in {count} files")
    assert count > 100 and not found, "\n".join(found)


def main() -> int:
    """Run the cases and print a table; returns 1 if a case fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="".join(CASES), help="letters of those to run")
    parser.add_argument("--short", action="store_true", help="have cases b and e end with an early step")
    chosen = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="team-"))
    base.chmod(0o755)  # PostgreSQL does not run as root
    print(f"in {base}, which stays", flush=True)
    table = []
    start = time.monotonic()
    with real_team(base) as team:
        table.append(("PASS", time.monotonic() - start, "   servers and deployment are ready"))
        for letter in chosen.cases:
            start, result = time.monotonic(), "PASS"
            print(f"{letter} ...", flush=True)
            try:
                CASES[letter](team, *([SHORT[letter]] if chosen.short and letter in SHORT else []))
            except Exception:
                traceback.print_exc()
                result = "FAIL"
            table.append((result, time.monotonic() - start, CASES[letter].__doc__ or ""))
            print(f"{table[-1][0]}  {table[-1][1]:5.0f} s  {table[-1][2]}", flush=True)
    print("\n" + "\n".join(f"{result}  {seconds:5.0f} s  {name}" for result, seconds, name in table))
    return 1 if any(result == "FAIL" for result, _, _ in table) else 0


if __name__ == "__main__":
    sys.exit(main())
