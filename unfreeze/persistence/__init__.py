"""Files that survive a kill or a power cut: atomic writes, files that grow and are resumed, requests to stop.

It may import `errors`, `device` and `progress` alone; everything else may import it.
"""
