"""The making of shards in parallel processes: one task per shard, each of which can be redone.

A finished shard leaves a note in `<out>/.partial/`, with the digest of its task; a later run takes
the shard over if the digest is the same and the files still have the hashes of the note.
"""

import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline import stage
from pipeline.data.inspection import Limits, encode, inspect_image
from pipeline.data.shards import ShardInfo, verify_shard, write_shard
from pipeline.data.sources import Item, Source, read_item


@dataclass(frozen=True, kw_only=True)
class Task:
    """One shard to be written, with all that decides its bytes."""

    path: Path
    split: str
    items: tuple[Item, ...]
    source: Source  # names only, no items
    limits: Limits

    @property
    def digest(self) -> str:
        """Changes with the shard's content, not with the place where the images lie."""
        items = [asdict(replace(item, file="")) for item in self.items]
        content = [self.path.name, items, asdict(self.source), asdict(self.limits)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def done_file(self) -> Path:
        return self.path.parent / ".partial" / f"{self.path.stem}.done.json"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished shard."""

    split: str
    info: ShardInfo
    quarantined: tuple[dict[str, str], ...]
    num_items: int
    found: bool
    """True where an earlier run had written it."""


def usable_samples(
    task: Task, quarantined: list[dict[str, str]]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard; what cannot be used goes to `quarantined` with the reason."""
    for item in task.items:
        reason, data = item.problem, b""
        if not reason and item.size > task.limits.max_bytes:
            reason = f"{item.size} encoded bytes, more than {task.limits.max_bytes}"
        if not reason:
            try:
                data = read_item(item)
                reason = inspect_image(data, task.limits)
            except Exception as error:  # a damaged archive raises almost anything
                reason = f"cannot be read: {' '.join(str(error).split())}"
        if reason:
            quarantined.append({"path": item.path, "split": item.split, "reason": reason})
            continue
        extension, data = encode(data)
        yield item.key, {extension: data, "json": task.source.describe(item)}


def finished_result(task: Task) -> Result | None:
    """The result an earlier run left, if it is of the same plan and still whole."""
    try:
        done = json.loads(task.done_file.read_text())
        info = ShardInfo(**done["info"])
        if done["digest"] == task.digest and verify_shard(task.path, info):
            return _result(task, info, done["quarantined"], found=True)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None


def make_shard(task: Task) -> Result:
    """Writes one shard, or takes over what an earlier run wrote; runs in a worker process."""
    if (result := finished_result(task)) is not None:
        return result
    quarantined: list[dict[str, str]] = []
    info = write_shard(task.path, usable_samples(task, quarantined))
    done = {"digest": task.digest, "info": asdict(info), "quarantined": quarantined}
    stage.write_json(task.done_file, done)
    return _result(task, info, quarantined, found=False)


def _result(
    task: Task, info: ShardInfo, quarantined: list[dict[str, str]], *, found: bool
) -> Result:
    return Result(
        split=task.split,
        info=info,
        quarantined=tuple(quarantined),
        num_items=len(task.items),
        found=found,
    )


def make_shards(tasks: list[Task], workers: int) -> Iterator[Result]:
    """Results as they come, from `workers` processes (1: from this one)."""
    if workers == 1 or len(tasks) == 1:
        yield from map(make_shard, tasks)
        return
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(tasks))
    with ProcessPoolExecutor(workers, context, initializer=stage.end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(make_shard, task) for task in tasks]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
