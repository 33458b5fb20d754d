"""What all tests share: few threads, no telemetry."""

import os

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
