"""The quantizer's part of a training step: look-up, gather, losses, backward, codebook update.

    python benchmarks/quantizer_step.py --json runs/bench/quantizer_step-cpu.json
    python benchmarks/quantizer_step.py --device cuda --json runs/bench/quantizer_step-cuda.json

All contenders start from the same codebook, with counts of one, no revival of unused codes and the
same decay, so that their codes, gradients and new codebooks can be compared with one closed form,
the averages of sums and counts divided; `codebook_error` and `gradient_error` are the largest
differences. The peers smooth the counts before they divide, and their codebook_error shows that.
Ours also picks the vectors for codes that are to start anew, as a training step does. Nothing is
captured in a CUDA graph: neither is a training step. Shapes: B batch, D code dimension, H, W grid,
K codes.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measure import Bench, peer
from torch.nn import functional as F

from kernels import reference
from pipeline.models.quantizers import EMAQuantizer
from pipeline.training.codebooks import Codebooks

CASES = {"cpu": [(32, 64, 32, 32)], "cuda": [(128, 64, 64, 64)]}  # B, D, H, W
SIZE = 512
DECAY = 0.99
COMMITMENT = 0.25
EPSILON = 1e-5  # of the Laplace smoothing of the counts, for the peers
DECAY_IMAGES = 128  # the global batch for which the decay is given, whatever the images here
TOLERANCE = 1e-5


class Ours:
    def __init__(self, latents, gradient, codebook):
        self.latents, self.gradient = latents, gradient
        quantizer = EMAQuantizer(*codebook.shape, decay=DECAY, revival=0.0).to(codebook.device)
        quantizer.codebook.copy_(codebook)
        quantizer.sums.copy_(codebook)
        self.quantizer, self.codebooks = quantizer, Codebooks([quantizer], DECAY_IMAGES)

    def __call__(self):
        result = self.quantizer(self.latents)
        self.codebooks.observe([result], first_image=0, images_seen=0)
        self.codebooks.start_reduction()
        backward(result.quantized, COMMITMENT * result.commitment, self.latents, self.gradient)
        self.codebooks.commit()
        return result.codes, self.quantizer.codebook


class VectorQuantizePytorch:
    def __init__(self, latents, gradient, codebook):
        self.latents, self.gradient = latents, gradient
        module = peer("vector_quantize_pytorch")
        size, dim = codebook.shape
        self.quantizer = module.VectorQuantize(
            dim, size, decay=DECAY, commitment_weight=COMMITMENT, rotation_trick=False,
            threshold_ema_dead_code=0, accept_image_fmap=True,
        ).to(codebook.device)  # fmt: skip
        self.quantizer.codebook = codebook
        self.quantizer._codebook.embed_avg.copy_(codebook[None])

    def __call__(self):
        quantized, codes, loss = self.quantizer(self.latents)
        backward(quantized, loss, self.latents, self.gradient)
        return codes, self.quantizer.codebook


class OneHot:
    """As the ports of VQ-VAE-2 write it: distances to all codes, and a one-hot matrix."""

    def __init__(self, latents, gradient, codebook):
        self.latents, self.gradient = latents, gradient
        self.embed = codebook.T.clone()  # (D, K)
        self.sums = self.embed.clone()
        self.counts = torch.ones_like(codebook[:, 0])

    def __call__(self):
        vectors = self.latents.movedim(1, -1)
        flat = vectors.detach().reshape(-1, vectors.shape[-1])
        distances = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ self.embed
        distances = distances + self.embed.pow(2).sum(0, keepdim=True)
        _, codes = (-distances).max(1)
        chosen = F.one_hot(codes, SIZE).type(flat.dtype)
        codes = codes.view(vectors.shape[:-1])
        quantized = F.embedding(codes, self.embed.T)
        loss = (quantized - vectors).pow(2).mean()
        quantized = vectors + (quantized - vectors).detach()
        backward(quantized.movedim(-1, 1), COMMITMENT * loss, self.latents, self.gradient)

        self.counts.mul_(DECAY).add_(chosen.sum(0), alpha=1 - DECAY)
        self.sums.mul_(DECAY).add_(flat.T @ chosen, alpha=1 - DECAY)
        total = self.counts.sum()
        smoothed = (self.counts + EPSILON) / (total + SIZE * EPSILON) * total
        self.embed.copy_(self.sums / smoothed)
        return codes, self.embed.T


CONTENDERS = {
    "ours": Ours,
    "vector-quantize-pytorch": VectorQuantizePytorch,
    "one-hot": OneHot,
}


def backward(quantized, loss, latents, gradient) -> None:
    """From the loss, and from the gradient that a decoder would send."""
    latents.grad = None
    torch.autograd.backward([quantized, loss], [gradient, None])


def random_inputs(shape, layout, device: str, seed: int):
    """Latents (B, D, H, W), a decoder's gradient, a codebook (K, D)."""
    generator = torch.Generator(device).manual_seed(seed)
    latents, gradient = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
    codebook = torch.randn(SIZE, shape[1], device=device, generator=generator)
    latents = latents.contiguous(memory_format=layout).requires_grad_()
    return latents, gradient.contiguous(memory_format=layout), codebook


def checker(latents, gradient, codebook):
    """(name, contender) -> the columns that are not times; makes the contender's first step."""
    vectors = latents.detach().movedim(1, -1).flatten(0, 2).double()
    codes = reference.nearest_code(vectors, codebook)
    counts = torch.bincount(codes, minlength=SIZE)[:, None]
    sums = torch.zeros_like(codebook, dtype=torch.float64).index_add_(0, codes, vectors)
    averages = DECAY + counts.double() * (1 - DECAY)
    new_codebook = (codebook * DECAY + sums * (1 - DECAY)) / averages
    pull = 2 * COMMITMENT / vectors.numel() * (vectors - codebook[codes])
    new_gradient = gradient.movedim(1, -1).flatten(0, 2) + pull

    def check(name: str, contender) -> dict:
        found_codes, found_codebook = contender()
        found_gradient = contender.latents.grad.movedim(1, -1).flatten(0, 2)
        mismatch = float((found_codes.flatten() != codes).double().mean())
        errors = {
            "codebook_error": float((found_codebook - new_codebook).abs().max()),
            "gradient_error": float((found_gradient - new_gradient).abs().max()),
        }
        if name == "ours" and (mismatch > 0 or max(errors.values()) > TOLERANCE):
            raise SystemExit(f"ours is wrong: mismatch {mismatch:.1e}, {errors}")
        return {"mismatch": mismatch} | errors

    return check


def main() -> None:
    bench = Bench(__doc__)
    layouts = {"": torch.contiguous_format, " channels_last": torch.channels_last}
    for shape in CASES[bench.device]:
        check = checker(*random_inputs(shape, torch.contiguous_format, bench.device, seed=0))
        for remark, layout in layouts.items():
            inputs = functools.partial(random_inputs, shape, layout, bench.device)
            case = f"{shape} K={SIZE}{remark}"
            bench.compare(case, CONTENDERS, inputs, check, graphs=False)
    bench.write()


if __name__ == "__main__":
    main()
