"""Is the recipe right and fast on this machine's GPU? `python -m benchmarks.gpu` answers; benchmarks/notes/gpu.md says how."""
