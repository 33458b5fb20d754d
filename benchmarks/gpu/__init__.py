"""GPU benchmark, `python -m benchmarks.gpu`: correctness, repeatability and speed (see benchmarks/notes/gpu.md)."""
