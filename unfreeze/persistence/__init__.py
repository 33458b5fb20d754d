"""Files that survive a kill or a power loss: atomic writes, resumable files, and the stop-request flag.

It may import only `errors`, `device`, `parallel` and `progress`; everything else may import it.
"""
