"""Drawing codes from a prior: front by front with caches, or the slow way that needs no trust.

    condition = prior.condition(batch_size, coarser, labels, attributes)
    keys = image_keys(seed, torch.arange(batch_size), level)
    codes = sample_codes(prior, condition, keys).codes

Codes are drawn by the Gumbel-max trick with noise keyed by (seed, image, level, position), so all
methods, batch sizes and devices draw the same codes, but where rounding decides between two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch.nn import functional as F

from pipeline.models.blocks import full_precision, true_fp32
from pipeline.models.priors.fronts import FrontCaches, fronts
from pipeline.models.priors.noise import gumbel_noise
from pipeline.models.priors.prior import Prior

Method = Literal["wavefront", "raster", "rows-above", "naive"]
MIN_TEMPERATURE, MAX_GUIDANCE = 1e-6, 10_000  # beyond them logits are no longer finite in float32


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How a code is drawn from its logits."""

    temperature: float = 1.0
    """Softmax temperature; below 1 the samples are more probable and less varied."""
    top_k: int = 0
    """Only the k most probable codes; 0 = all."""
    top_p: float = 1.0
    """Only the most probable codes that together have this probability; 1 = all."""
    guidance: float = 1.0
    """Classifier-free guidance: logits u + guidance·(c - u) of those with the class or attributes,
    c, and without, u; 1 = c."""

    def __post_init__(self) -> None:
        if not MIN_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be finite and at least {MIN_TEMPERATURE:g}, got "
                f"{self.temperature}; top_k 1 takes the most probable codes"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.guidance <= MAX_GUIDANCE:
            raise ValueError(f"guidance must be in 0..{MAX_GUIDANCE:,}, got {self.guidance}")


def truncated(logits: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Logits (..., K) with -inf for what top-k and top-p leave out. Of equal logits at the border
    top-k keeps all, so that no code depends on its place in the codebook."""
    if 0 < draw.top_k < logits.shape[-1]:
        least = logits.topk(draw.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if draw.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        # the probability of all that is more likely; the first is always kept
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(
            -1, order, before >= draw.top_p
        )
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


class Network(Protocol):
    """A prior that is asked for the logits of one front after another."""

    slope: int

    def logits(self, positions: torch.Tensor) -> torch.Tensor:
        """Of the positions of the next front (P,): (B, P, K)."""
        ...

    def tell(self, positions: torch.Tensor, codes: torch.Tensor) -> None:
        """What their codes (B, P) are."""
        ...


class FrontNetwork:
    """Only the new positions are computed; all else is in caches. Any slope from the prior's own up
    to the width of the grid, which is raster order."""

    def __init__(self, model: Prior, condition: torch.Tensor, slope: int):
        self.model, self.slope = model, slope
        self.see = FrontCaches(model.config.grid, slope, len(condition), model.embed.weight)
        # a map gets the two spare rows of the caches, too
        spare = 2 if condition.shape[1] > 1 or condition.shape[2] > 1 else 0
        self.condition = F.pad(condition.flatten(1, 2), (0, 0, 0, spare))

    def logits(self, positions: torch.Tensor) -> torch.Tensor:
        self.see.begin(positions)
        condition = self.condition
        if condition.shape[1] > 1:
            condition = condition.index_select(1, positions)
        return self.model.body(None, condition, self.see)

    def tell(self, positions: torch.Tensor, codes: torch.Tensor) -> None:
        self.see.end(self.model.embed(codes))


class WholeNetwork:
    """The whole network for every code, or for the rows down to the position's [rows-above]: what
    is usually done, and the truth that the caches are held to. Raster order."""

    def __init__(self, model: Prior, condition: torch.Tensor, rows_above: bool):
        self.model, self.rows_above = model, rows_above
        self.height, self.slope = model.config.grid  # a slope of W is raster order
        self.condition = condition
        self.codes = torch.zeros(
            len(condition), *model.config.grid, dtype=torch.int64, device=condition.device
        )

    def logits(self, positions: torch.Tensor) -> torch.Tensor:
        rows = self.height
        if self.rows_above:
            rows = int(positions.max()) // self.slope + 1
        logits = self.model.logits(self.codes[:, :rows], self.condition[:, :rows])
        return logits.flatten(1, 2)[:, positions]

    def tell(self, positions: torch.Tensor, codes: torch.Tensor) -> None:
        self.codes.view(len(codes), -1)[:, positions] = codes


def make_network(model: Prior, condition: torch.Tensor, method: Method) -> Network:
    """`model` under a condition from `model.condition()`, evaluated by a method."""
    if method in ("wavefront", "raster"):
        slope = model.slope if method == "wavefront" else model.config.grid[1]
        return FrontNetwork(model, condition, slope)
    return WholeNetwork(model, condition, rows_above=method == "rows-above")


class Sampled(NamedTuple):
    codes: torch.Tensor
    """(B, H, W) int64."""
    given_log_prob: torch.Tensor
    """(B,) nats: log-probability of the given codes, each given all that comes before it, with
    temperature and guidance, but nothing left out by top-k or top-p."""


def fastest_method(model: Prior) -> Method:
    """wavefront; but rows-above for the classic gated PixelCNN, whose layers look at later fronts,
    so that no caches can hold them."""
    classic = model.config.architecture == "pixelcnn" and model.config.order == "raster"
    return "rows-above" if classic else "wavefront"


@torch.no_grad()
@true_fp32()
def sample_codes(
    model: Prior,
    condition: torch.Tensor,
    keys: torch.Tensor,
    draw: Draw | None = None,
    *,
    unconditional: torch.Tensor | None = None,
    given: tuple[torch.Tensor, torch.Tensor] | None = None,
    method: Method = "wavefront",
    progress: Callable[[int], None] | None = None,
) -> Sampled:
    """Draws codes from a prior.

    Args:
        condition: from `model.condition()`, (B, H, W, C) or (B, 1, 1, C).
        keys: of the noise, (B,) int64, from `image_keys`.
        unconditional: the condition without class and attributes, needed if draw.guidance is not 1.
        given: codes (B, H, W) int64 and a mask (B, H, W) bool of those that are to stay. A drawn
            code knows the given ones before it alone; those after it do not inform it.
        progress: called with the number of positions just drawn per image.
    """
    draw = draw or Draw()
    grid, batch = model.config.grid, len(condition)
    guided = draw.guidance != 1
    if guided:
        if unconditional is None:
            raise ValueError("guidance needs the condition without class and attributes")
        condition = torch.cat(torch.broadcast_tensors(condition, unconditional))
    network = make_network(model, condition, method)
    size = grid[0] * grid[1] + 2  # as the caches, two to spare
    codes = torch.zeros(batch, size, dtype=torch.int64, device=keys.device)
    score = torch.zeros(batch, dtype=torch.float64, device=keys.device)
    if given is not None:
        given_codes, mask = (F.pad(each.flatten(1), (0, 2)) for each in given)

    def step(positions: torch.Tensor) -> None:
        logits = full_precision(network.logits(positions))
        if guided:
            with_condition, without = logits.chunk(2)
            logits = without + draw.guidance * (with_condition - without)
        logits = logits / draw.temperature
        noise = gumbel_noise(keys, positions, logits.shape[-1])
        drawn = (truncated(logits, draw) + noise).argmax(-1)
        if given is not None:
            stay, now = mask[:, positions], given_codes[:, positions]
            drawn = torch.where(stay, now, drawn)
            log_prob = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
            score.add_(torch.where(stay, log_prob, 0).sum(1, dtype=torch.float64))
        codes.index_copy_(1, positions, drawn)
        network.tell(positions, drawn.repeat(2, 1) if guided else drawn)

    order = list(fronts(grid, network.slope))
    run = step
    if keys.is_cuda and isinstance(network, FrontNetwork):
        run = as_graph(step, order, network.see.scratch, keys.device)
    for positions in order:
        run(positions.to(keys.device))
        if progress is not None:
            progress(len(positions))
    return Sampled(codes[:, :-2].unflatten(1, grid), score)


def as_graph(
    step: Callable[[torch.Tensor], None],
    order: list[torch.Tensor],
    scratch: int,
    device: torch.device,
) -> Callable[[torch.Tensor], None]:
    """`step` recorded once as a CUDA graph, for fronts padded to one size by the scratch place."""
    static = torch.full((max(map(len, order)),), scratch, device=device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # makes the caches and the workspaces
        for _ in range(2):
            step(static)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # its own is on the current device
        step(static)

    def replay(positions: torch.Tensor) -> None:
        static[len(positions) :] = scratch
        static[: len(positions)] = positions
        graph.replay()

    return replay


@torch.no_grad()
def resample_codes(
    draw_filling: Callable[[int], Sampled], num_fillings: int, keys: torch.Tensor
) -> torch.Tensor:
    """Draws `num_fillings` fillings of what is not given and picks one by the likelihood of the
    given codes after it: sampling importance resampling (Rubin 1988). The more fillings, the nearer
    to the distribution given all codes, those after a position included.

    Args:
        draw_filling: number -> `sample_codes` with noise of its own.
        keys: of the choice, (B,) int64.

    Returns:
        (B, H, W) int64.
    """
    fillings = [draw_filling(number) for number in range(num_fillings)]
    scores = torch.stack([filling.given_log_prob for filling in fillings], 1)  # (B, R)
    noise = gumbel_noise(keys, torch.zeros(1, dtype=torch.int64, device=keys.device), num_fillings)
    chosen = (scores + noise[:, 0]).argmax(1)
    return torch.stack([filling.codes for filling in fillings], 1)[
        torch.arange(len(chosen), device=chosen.device), chosen
    ]


@torch.no_grad()
@true_fp32()
def log_likelihood(model: Prior, codes: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """log p of each code given those before it, in nats: codes (B, H, W) int64 -> (B, H, W)."""
    logits = full_precision(model.logits(codes, condition))
    return logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
