"""Run a step: ``python -m tasks <step>``, in the warm process of the flow where there is one."""

import sys

from pipeline.artifacts import STAGES
from pipeline.process import forkserver
from pipeline.process.environment import set_environment

set_environment()  # before a step imports torch
if len(sys.argv) != 2 or sys.argv[1] not in STAGES:
    sys.exit(f"usage: python -m tasks {'|'.join(STAGES)}")
code = forkserver.hand_over(sys.argv[1])
if code is None:
    forkserver.run(sys.argv[1])
else:
    sys.exit(code)
