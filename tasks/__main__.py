"""Run a step: ``python -m tasks <step>``, in the warm process of the flow where there is one."""

import sys

from tasks import STAGES, warm
from tasks.environment import set_environment

set_environment()  # before a step imports torch
if len(sys.argv) != 2 or sys.argv[1] not in STAGES:
    sys.exit(f"usage: python -m tasks {'|'.join(STAGES)}")
code = warm.hand_over(sys.argv[1])
if code is None:
    warm.run(sys.argv[1])
else:
    sys.exit(code)
