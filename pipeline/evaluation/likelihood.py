"""log p(x) of models with latents, by Monte Carlo: importance-weighted bounds, bits per dimension.

With the log weight log w = log p(x, z) - log q(z|x) of a sample z ~ q(z|x), and w the mean over k,

    L_k = E log (w_1 + ... + w_k)/k,    ELBO = L_1 <= L_k <= L_{k+1} <= log p(x)

(Burda et al. 2016, equation 8 and theorem 1). Which z are drawn is the caller's: a function gives
the log weights of the next k samples. The encoder and, with the prior in its place, prior Monte
Carlo:

    def with_encoder(k):                      # (k, B)
        z = posterior.rsample(k)
        return log_p_x_given_z(z) + log_prior(z) - posterior.log_prob(z)

    def with_prior(k):                        # p(z) / p(z) cancels
        return log_p_x_given_z(prior.sample(k))

    importance_log_likelihood(with_encoder, 5000, chunk_size(5000, B, bytes_per_sample, 2048))
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class ImportanceEstimate(NamedTuple):
    """Of B images from the same k weights each: (B,) float64, nats but for the sample size."""

    log_likelihood: Tensor
    """log of the mean weight. Its expectation is L_k, below log p(x)."""
    elbo: Tensor
    """Mean log weight: the ELBO with sampled KL."""
    effective_sample_size: Tensor
    """(sum w)^2 / sum w^2 in [1, k]. Where it is well above 1, the estimate has a standard error of
    about sqrt(1/ess - 1/k) and lies half its square below log p(x); near 1 one weight decides, and
    log p(x) may be far above. NaN where all weights are 0."""

    @property
    def inference_gap(self) -> Tensor:
        """L_k - ELBO (B,), at least 0: from below, KL(q(z|x) || p(z|x))."""
        return self.log_likelihood - self.elbo


@torch.no_grad()
def importance_log_likelihood(
    log_weights: Callable[[int], Tensor], num_samples: int, chunk: int
) -> ImportanceEstimate:
    """Estimates log p(x) of B images from `num_samples` weights each, `chunk` at a time.

    Args:
        log_weights: k -> the log weights (k, B) of k new samples of each image, in nats.
        num_samples: k of L_k, at least 1.
        chunk: most samples asked for at once, at least 1; see `chunk_size`.
    """
    if num_samples < 1 or chunk < 1:
        raise ValueError(f"num_samples and chunk must be at least 1, got {num_samples} and {chunk}")
    sums, square_sums, log_sums = [], [], []  # per chunk (B,)
    for start in range(0, num_samples, chunk):
        count = min(chunk, num_samples - start)
        weights = log_weights(count).double()
        if weights.dim() != 2 or len(weights) != count:
            raise ValueError(
                f"log_weights({count}) must be ({count}, B), got {tuple(weights.shape)}"
            )
        sums.append(weights.logsumexp(0))
        square_sums.append((2 * weights).logsumexp(0))
        log_sums.append(weights.sum(0))
    log_sum = torch.stack(sums).logsumexp(0)
    return ImportanceEstimate(
        log_likelihood=log_sum - math.log(num_samples),
        elbo=torch.stack(log_sums).sum(0) / num_samples,
        effective_sample_size=(2 * log_sum - torch.stack(square_sums).logsumexp(0)).exp(),
    )


def chunk_size(num_samples: int, batch: int, bytes_per_sample: int, memory_limit_mib: float) -> int:
    """The most samples of each of `batch` images that fit the memory limit, at most `num_samples`.

    Args:
        bytes_per_sample: what one sample of one image takes while its weight is computed, the
            decoder's activations included.
    """
    fitting = int(memory_limit_mib * 2**20 // (batch * bytes_per_sample))
    if fitting < 1:
        raise ValueError(
            f"one sample of each of {batch} images takes {batch * bytes_per_sample / 2**20:.4g} "
            f"MiB, the memory limit is {memory_limit_mib:g} MiB: raise it or use smaller batches"
        )
    return min(num_samples, fitting)


Kind = Literal["8bit", "binary", "dequantized", "density"]


def bits_per_dim(nats: float, num_dims: int, kind: Kind) -> float:
    """Bits per dimension of a negative log-likelihood.

    Args:
        nats: per image, summed over its d = num_dims values (C·H·W):
            `8bit`, `binary`: -log P(x) of discrete values; nats / (d ln 2).
            `dequantized`: -log p(y) of y = (x + u)/256, x in 0 ... 255, u uniform in [0, 1)^d
            (Theis et al. 2016), or with u ~ q(u|x) its density added by the caller, -log p(y) +
            log q(u|x) (Ho et al. 2019); (nats + d ln 256) / (d ln 2), an upper bound in the mean.
            `density`: of pixels that were not dequantized. It has no bits/dim: ValueError.
    """
    if num_dims < 1:
        raise ValueError(f"num_dims must be at least 1, got {num_dims}")
    if kind in ("8bit", "binary"):
        return nats / (num_dims * math.log(2))
    if kind == "dequantized":
        return (nats + num_dims * math.log(256)) / (num_dims * math.log(2))
    raise ValueError(
        f"bits/dim asked of an undequantized density (kind {kind!r}): report nats, dequantize the "
        "data or use a likelihood of discrete values (kinds: dequantized, 8bit, binary)"
    )
