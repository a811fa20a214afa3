"""What run.sbatch asks about a start of a stage. Standard library only.

python slurm/attempt.py begin OUT        fails where several starts in a row got no further
python slurm/attempt.py end OUT CODE     prints the exit code of the stage: launchers make all 1
"""

import json
import os
import sys
from pathlib import Path

MAX_IDLE_STARTS = 3
ATTEMPTS = "attempts.json"


def progress(out: Path) -> str:
    """Changes as the stage gets on: its newest checkpoint, else how many files it has written."""
    if checkpoints := sorted(path.name for path in (out / "checkpoints").glob("images-*")):
        return checkpoints[-1]
    files = (path for path in out.rglob("*") if path.is_file())
    own = (ATTEMPTS, "status.json", "metrics.jsonl")
    return str(sum(path.name not in own and "tfevents" not in path.name for path in files))


def begin(out: Path) -> int:
    """Counts the start; the exit code is 1 where it should not be."""
    path, found = out / ATTEMPTS, progress(out)
    restarted = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0 and path.is_file()
    last = json.loads(path.read_text()) if restarted else {"progress": None, "idle": 0}
    idle = last["idle"] + 1 if last["progress"] == found else 0
    path.write_text(json.dumps({"progress": found, "idle": idle}) + "\n")
    if idle < MAX_IDLE_STARTS:
        return 0
    print(f"error: {out} got no further in {idle} starts; see the log for why", file=sys.stderr)
    return 1


def end(out: Path, launcher_code: int) -> int:
    """Prints the code. A stage removes its old status.json when it begins."""
    path = out / "status.json"
    print(json.loads(path.read_text())["exit_code"] if path.is_file() else launcher_code or 1)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "begin":
        sys.exit(begin(Path(sys.argv[2])))
    sys.exit(end(Path(sys.argv[2]), int(sys.argv[3])))
