"""Small files that are written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from unfreeze.durable import write_whole


def write_json(path: Path, value: Any) -> None:
    """Write JSON, for people to read as well, whole or not at all."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
