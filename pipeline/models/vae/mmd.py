"""Maximum mean discrepancy, the regulariser of the Wasserstein autoencoder."""

import torch

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared MMD between two samples (n, D) and (m, D), n, m >= 2: unbiased, so it may be < 0.

    Sum of inverse multiquadratic kernels k(a, b) = C / (C + |a - b|²), C = 2 D times each of
    SCALES, for a prior N(0, I) (Tolstikhin et al. 2018, section 4 and their code).
    """

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        squares = (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(-1)
        sizes = [2 * x.shape[1] * scale for scale in SCALES]
        return torch.stack([size / (size + squares) for size in sizes]).sum(0)

    def within(a: torch.Tensor) -> torch.Tensor:
        count = len(a)  # without the diagonal, where k(a, a) = 1
        return (kernel(a, a).sum() - len(SCALES) * count) / (count * (count - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()
