"""Run a step: ``python -m tasks <step>``, in the flow's forkserver if there is one."""

import sys

try:
    from pipeline.artifacts import STAGES
    from pipeline.process import forkserver
    from pipeline.process.environment import set_environment
except ModuleNotFoundError as missing:  # DVC runs the first `python` in PATH, which may be another one
    print(
        f"unfreeze is not installed for {sys.executable}, the first python in PATH (it lacks {missing.name}). Activate "
        "its environment first: . .venv/bin/activate",
        file=sys.stderr,
    )
    sys.exit(2)

set_environment()  # before a step imports torch
if len(sys.argv) != 2 or sys.argv[1] not in STAGES:
    sys.exit(f"usage: python -m tasks {'|'.join(STAGES)}")
code = forkserver.hand_over(sys.argv[1])
if code is None:
    forkserver.run(sys.argv[1])
else:
    sys.exit(code)
