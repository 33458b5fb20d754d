"""What a flow says of a step that failed, as DVC tells it."""

import subprocess
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from flows import dvc, stage
from tasks.step import USER_ERROR

COMMANDS = f"""
stages:
  ingest: {{cmd: kill -KILL $$, outs: [a]}}
  explore: {{cmd: echo the reason; exit 1, outs: [b]}}
  precompute: {{cmd: echo what to mend; exit {USER_ERROR}, outs: [c]}}
"""


def test_why_a_step_failed_is_said_and_whether_it_is_worth_a_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNFREEZE_PASS", "this one")
    subprocess.run(dvc.dvc("init", "--no-scm", "--quiet"), check=True)
    Path("dvc.yaml").write_text(COMMANDS)
    for name, said, retry in [
        ("ingest", stage.KILLED, True),
        ("explore", "the reason", True),
        ("precompute", "what to mend", False),
    ]:
        with disable_run_logger(), pytest.raises(stage.StageFailed, match=f"The step {name} failed") as caught:
            stage._run(name, pull=False)
        assert said in str(caught.value).splitlines() and caught.value.retry == retry
