"""Inverse autoregressive flow: a posterior q(z|x) that is no longer a diagonal Gaussian.

Kingma et al. 2016, "Improving Variational Inference with Inverse Autoregressive Flow". A sample
z_0 of the encoder's N(mean, var) passes through T steps (eq. 12-14), each with its own masked
network of z and the encoder's context h:

    m_t, s_t = MADE_t(z_{t-1}, h),   sigma_t = sigmoid(s_t),
    z_t = sigma_t z_{t-1} + (1 - sigma_t) m_t.

m_t and sigma_t of a dimension depend on the dimensions before it alone, so the Jacobian is
triangular with sigma_t on its diagonal, and (eq. 11)

    log q(z_T|x) = log N(z_0; mean, var) - sum over t and dimensions of log sigma_t.

m samples, B batch, D latent dimension, H context features; all in nats.
"""

import torch
from torch import nn
from torch.nn import functional as F

GATE_BIAS = 2.0  # added to s: a fresh step changes z only slightly (section 4 asks for +1 or +2)


class MaskedLinear(nn.Linear):
    """(..., inputs) -> (..., outputs), connected where the output's degree is at least the input's
    (Germain et al. 2015, "MADE", section 4)."""

    mask: torch.Tensor

    def __init__(self, degrees_in: torch.Tensor, degrees_out: torch.Tensor):
        super().__init__(len(degrees_in), len(degrees_out))
        self.register_buffer("mask", degrees_out[:, None] >= degrees_in, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """A network whose outputs for a dimension see the context and the dimensions before it.

    Hidden units of degree k see the first k dimensions (k = 0: the context alone). With fewer
    units than dimensions some degrees have none, and dependencies are lost.

    Args:
        context, hidden: H, and the units of each of the two hidden layers.
        reverse: the order of the dimensions is D-1 ... 0 instead of 0 ... D-1.
    """

    def __init__(self, latent_dim: int, context: int, hidden: int, reverse: bool):
        super().__init__()
        places = torch.arange(latent_dim)
        if reverse:
            places = places.flip(0)
        degrees = torch.arange(hidden) * latent_dim // hidden  # 0 ... D-1, evenly
        self.first = MaskedLinear(places + 1, degrees)
        self.context = nn.Linear(context, hidden, bias=False)
        self.second = MaskedLinear(degrees, degrees)
        self.out = MaskedLinear(degrees, places.repeat(2))
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)  # a fresh network is m = s = 0

    def forward(self, z: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z (m, B, D), context (B, H) -> m, s (m, B, D), at least fp32."""
        dtype = torch.promote_types(z.dtype, torch.float32)
        with torch.autocast(z.device.type, enabled=False):
            h = F.elu(self.first(z.to(dtype)) + self.context(context.to(dtype)))
            m, s = self.out(F.elu(self.second(h))).chunk(2, dim=-1)
        return m, s


class InverseAutoregressiveFlow(nn.Module):
    """T steps in turn in the order of the dimensions and in its reverse.

    A fresh flow is z = sigmoid(2)^T z_0, whatever the context.

    Args:
        context, hidden: H, and the units of each hidden layer of the masked networks.
        steps: T.

    Raises:
        ValueError: `latent_dim` below 2, where no dimension has one before it.
    """

    def __init__(self, latent_dim: int, context: int, hidden: int, steps: int):
        super().__init__()
        if latent_dim < 2:
            raise ValueError(
                "latent_dim must be at least 2 for an inverse autoregressive flow, "
                f"got {latent_dim}"
            )
        self.latent_dim = latent_dim
        self.networks = nn.ModuleList(
            MADE(latent_dim, context, hidden, reverse=t % 2 == 1) for t in range(steps)
        )

    def _step(
        self, t: int, z: torch.Tensor, context: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """m_t and log sigma_t at z = z_{t-1}, both (m, B, D)."""
        m, s = self.networks[t](z, context)
        return m, F.logsigmoid(s + GATE_BIAS)

    def forward(
        self, noise_z0: torch.Tensor, context: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A sample of the base becomes one of q(z|x).

        Args:
            noise_z0: (m, B, D) drawn from N(mean, var).
            context: (B, H) of the encoder.

        Returns:
            z (m, B, D), and log|det dz/dz_0| (m, B), which is subtracted from the base's
            log-density. At least fp32.
        """
        z, log_det = noise_z0, noise_z0.new_zeros(noise_z0.shape[:-1])
        for t in range(len(self.networks)):
            m, log_sigma = self._step(t, z, context)
            z = m + log_sigma.exp() * (z - m)  # eq. 14
            log_det = log_det + log_sigma.sum(-1)
        return z, log_det

    def inverse(self, z: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The z_0 that `forward` takes to z (m, B, D), one dimension after the other: D passes a
        step. Returns z_0 and the log_det of `forward` at z_0, with gradients. z (m, 1, D) is
        inverted under every context."""
        log_det = z.new_zeros(z.shape[:-1])
        dimensions = torch.arange(self.latent_dim, device=z.device)
        for t in reversed(range(len(self.networks))):
            before = torch.zeros_like(z)
            for i in dimensions.flip(0) if t % 2 else dimensions:
                m, log_sigma = self._step(t, before, context)
                solved = m + (z - m) * (-log_sigma).exp()
                before = torch.where(dimensions == i, solved, before)
            # the last pass saw all that m and sigma depend on
            z, log_det = before, log_det + log_sigma.sum(-1)
        return z, log_det
