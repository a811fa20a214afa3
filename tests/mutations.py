"""Takes one safeguard away, to see whether the tests notice.

MUTATION=all-reduce python -m pytest -p mutations tests/test_ranks.py      has to fail
"""

import contextlib
import inspect
import os
import textwrap
from collections.abc import Callable
from typing import Any


def rewrite(owner: Any, name: str, old: str, new: str) -> None:
    """Replaces a function of a module or class by one with other words in its source."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} is not once in {name}"
    found: dict[str, Callable] = {}
    exec(source.replace(old, new), function.__globals__, found)
    setattr(owner, name, found[name])


def no_all_reduce():
    """Every rank updates its codebooks from its own images."""
    from types import SimpleNamespace

    import torch

    from pipeline.training import codebooks

    done = SimpleNamespace(wait=lambda: None)
    codebooks.dist = SimpleNamespace(
        all_reduce=lambda flat, async_op: done,
        all_gather=torch.distributed.all_gather,
        get_world_size=torch.distributed.get_world_size,
    )


def no_finite_check():
    """Losses are not looked at before the backward pass."""
    from pipeline.training.control import Control

    Control.agree = lambda self, finite: True


def no_reset_on_revival():
    """A revived code keeps the EMA statistics of the dead one."""
    from pipeline.models.quantizers import EMAQuantizer

    def place(self, which, vectors, counts):
        self.codebook[which] = vectors[which]

    EMAQuantizer.place = place


def no_fp32_island():
    """The quantizer computes in the precision of its surroundings."""
    import torch

    from pipeline.models.quantizers import contract

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def autocast(self, *_, **__):
            return contextlib.nullcontext()

        def promote_types(self, latents, _):
            return latents

    contract.torch = Torch()


def no_fsync():
    """A checkpoint gets its name before its files are on the disk."""
    from pipeline.training import checkpoint

    checkpoint.sync = lambda path: None


def no_fsync_of_shards():
    from pipeline.data import shards

    shards._sync = lambda file: None


def no_rename():
    """The directory that is to be replaced goes before the new one is whole."""
    from pipeline.training import checkpoint

    rewrite(
        checkpoint, "write_directory", "temporary.mkdir()",
        "shutil.rmtree(path, ignore_errors=True); temporary.mkdir()",
    )  # fmt: skip


def no_manifest_check():
    """Every checkpoint is believed."""
    from pipeline.training import checkpoint

    checkpoint.fault_of = lambda path: None


def no_agreed_stop():
    """A rank stops when it was asked to, whatever the others do."""
    from pipeline.training.control import Control

    rewrite(Control, "agree", "self.stops = bool(stops)", "self.stops = self.asked is not None")


def no_lock():
    """Two jobs may train in one directory."""
    from pipeline.training import checkpoint

    checkpoint._take = lambda file: True


def no_heartbeat():
    """Of a rank only the number of its steps is known."""
    from pipeline.training.control import Heartbeats

    rewrite(Heartbeats, "missing", "before[rank].number == now[rank].number", "False")


def no_parent_check():
    """The ranks go on without their launcher."""
    from pipeline import stage

    stage._end_with_launcher = lambda: None


def no_crc():
    """Damaged bytes of a shard are passed on."""
    from pipeline.data.shards import ShardReader

    rewrite(ShardReader, "_read", " or zlib.crc32(data) != crc32", "")


MUTATIONS = {
    "all-reduce": no_all_reduce,
    "finite check": no_finite_check,
    "EMA reset on revival": no_reset_on_revival,
    "fp32 island": no_fp32_island,
    "fsync": no_fsync,
    "fsync of shards": no_fsync_of_shards,
    "rename": no_rename,
    "manifest check": no_manifest_check,
    "agreed stop": no_agreed_stop,
    "one-job lock": no_lock,
    "heartbeat": no_heartbeat,
    "parent-death check": no_parent_check,
    "CRC check": no_crc,
}

if name := os.environ.get("MUTATION"):
    MUTATIONS[name]()
