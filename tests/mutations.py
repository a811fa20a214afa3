"""Takes one safeguard of the training away, to see whether the tests notice.

MUTATION=all-reduce python -m pytest -p mutations tests/test_ranks.py      has to fail
"""

import contextlib
import os


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


MUTATIONS = {
    "all-reduce": no_all_reduce,
    "finite check": no_finite_check,
    "EMA reset on revival": no_reset_on_revival,
    "fp32 island": no_fp32_island,
}

if name := os.environ.get("MUTATION"):
    MUTATIONS[name]()
