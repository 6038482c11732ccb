"""Dataset folders laid out as the hub's are."""

import json
from pathlib import Path


def write_subsets(folder: Path, subsets: dict[str, list[dict]]) -> Path:
    """A folder of several subsets (configurations), each a file of rows; its card's head says which is which."""
    folder.mkdir()
    for name, rows in subsets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in subsets]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return folder
