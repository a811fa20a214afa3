"""Drawing codes from a prior: whole network per code, rows above only, raster with caches, ours.

    python benchmarks/sampling.py --json runs/bench/sampling-cpu.json
    python benchmarks/sampling.py --device cuda --json runs/bench/sampling-cuda.json
    python benchmarks/sampling.py ... --only "celeba64 level 1"     cases with this in their name

`usual` runs the whole network for every code, `rows-above` the rows down to the code's, as
sample.py of rosinality/vq-vae-2-pytorch does, `raster-cached` computes each position once, one
after the other, and `ours` all positions of a front at once. The priors are those of
configs/celeba64 and configs/celeba256 with random weights, on the grids of the VQ-VAEs beside
them; `width of celeba64` is celeba64's finest on a 64x64 grid. All contenders have the same
weights, coarser codes, attributes and noise, in fp32 without TF32; `-bf16` has the weights in bf16.

Times are milliseconds of a call of `sample_codes` for a batch, the condition already computed. On
CUDA that of the two with caches includes the recording of its graph. `extrapolated` ones are timed
on some steps spread over the call, each standing for those around it: `usual` and `rows-above`
always, the others on a CPU where they would take longer than LIMIT_MS. `ratio` is the median over
the turns of a time divided by that of `ours` in the same precision. `peak_mib` is what a call takes
beyond weights and condition; on a CPU, by how much the process grew.

Before that all are checked at the batch size of the case, against one pass of the whole network in
fp32 over the codes that a contender drew. Codes that agree with it at every position are those of
the usual loop, which therefore need not run to its end. Refused in fp32, unless
- the logits of every contender, told the earlier codes alone, are within 1e-4: at all positions
  with caches, at CHECKED_STEPS of them without;
- each code drawn, here and by a call of `raster-cached` and `ours`, has the highest logit plus
  noise, or one less than 2e-4 below it.
Of bf16 the largest difference of the logits and the share of other codes (`mismatch`) are shown.
On a CPU a grid larger than 16x16 is checked at 4x5, by a network of the same sizes and slope.
"""

import argparse
import copy
import ctypes
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
import torch
from measure import ROOT, Absent, peer, print_table, refuse, write_json

from pipeline.models.priors import make_prior
from pipeline.models.priors.fronts import fronts
from pipeline.models.priors.noise import gumbel_noise, image_keys
from pipeline.models.priors.prior import Prior, PriorConfig
from pipeline.models.priors.sampling import Method, Network, make_network, sample_codes
from pipeline.models.vqvae import VQVAEConfig

METHODS: dict[str, Method] = {
    "usual": "naive",
    "rows-above": "rows-above",
    "raster-cached": "raster",
    "ours": "wavefront",
}
BATCHES = {  # of each prior; on CUDA 64, too
    "celeba64 level 0": (1, 16),
    "celeba64 level 1": (1, 16),
    "width of celeba64": (1,),
    "celeba256 level 0": (1,),
    "celeba256 level 1": (1,),
}
LOGITS, GAP = 1e-4, 2e-4  # what may differ in fp32
SMALL = (4, 5)  # every tap of a 5x5 kernel has a place inside
CHECKED_STEPS = 5
PARTS = {"naive": 0, "rows-above": 4, "raster": 8, "wavefront": 16}  # of a call, in timed_steps
LIMIT_MS = 5e3
TURNS_SEC = 20  # no turn of a case begins later than that


@dataclass(frozen=True)
class Sampler:
    """A contender: a prior without gradients, a condition and keys of the noise for a batch, and a
    way to draw."""

    method: Method
    model: Prior
    condition: torch.Tensor
    keys: torch.Tensor

    @property
    def has_caches(self) -> bool:
        return self.method in ("raster", "wavefront")

    def network(self) -> tuple[Network, list[torch.Tensor]]:
        """A fresh one, and the fronts of positions that it is asked for, one per step."""
        network = make_network(self.model, self.condition, self.method)
        order = fronts(self.model.config.grid, network.slope)
        return network, [positions.to(self.keys.device) for positions in order]

    def sample(self) -> torch.Tensor:
        """(B, H, W) int64."""
        return sample_codes(self.model, self.condition, self.keys, method=self.method).codes

    def whole_ms(self) -> float:
        return milliseconds(self.sample, self.keys.is_cuda)

    def sliced_ms(self) -> float:
        """The same, extrapolated from some of the steps. It makes no difference to their times
        that the caches lack what the steps in between would have left there."""
        network, order = self.network()
        total = 0.0
        for number, stands_for in timed_steps(len(order), PARTS[self.method]):
            step = functools.partial(draw, network, order[number], self.keys)
            total += stands_for * milliseconds(step, self.keys.is_cuda)
        return total

    def timer(self) -> tuple[Callable[[], float], bool]:
        """Milliseconds of a call, and whether they are extrapolated."""
        if self.has_caches and (self.keys.is_cuda or self.sliced_ms() < LIMIT_MS):
            return self.whole_ms, False
        return self.sliced_ms, True


def draw(network: Network, positions: torch.Tensor, keys: torch.Tensor) -> None:
    """One step of `sample_codes`."""
    logits = network.logits(positions).float()
    noise = gumbel_noise(keys, positions, logits.shape[-1])
    network.tell(positions, (logits + noise).argmax(-1))


def timed_steps(count: int, parts: int) -> list[tuple[int, float]]:
    """Numbers of the steps that are timed, and how many of `count` steps each stands for.

    The first stands for itself, as it makes the caches. Each of `parts` equal parts of the steps
    has one, just before and just after the middle in turn, so that a cost that grows with the row
    comes out right. Of 0 parts the first step stands for all: those of the usual loop are alike.
    """
    if not parts:
        return [(0, float(count))]
    middles = [int((part + 0.5) * count / parts) for part in range(parts)]
    numbers = [max(0, middle - 1 + part % 2) for part, middle in enumerate(middles)]
    return [(0, 1.0), *((number, (count - 1) / parts) for number in numbers)]


def milliseconds(call: Callable[[], object], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def prior_config(name: str) -> PriorConfig:
    """That of a name in BATCHES, on the codes of the VQ-VAE in the same folder."""
    if name == "width of celeba64":
        return replace(prior_config("celeba64 level 1"), grid=(64, 64))
    yaml = peer("yaml")  # the parser of the stages is not there where there is only a GPU
    folder, level = name.split(" level ")
    prior, stage = (
        yaml.safe_load((ROOT / "configs" / folder / f"{file}.yaml").read_text())
        for file in (f"train_prior_level{level}", "train_vqvae")
    )
    vqvae, number = VQVAEConfig(**stage["model"]), int(level)
    sizes = tuple(vqvae.codebook_sizes)
    return PriorConfig(
        **prior["model"],
        grid=vqvae.grids(stage["image_size"], stage["image_size"])[number],
        codebook_size=sizes[number],
        coarser_codebook_sizes=sizes[:number],
        num_attributes=40 if prior.get("condition") == "attributes" else 0,
    )


def make_samplers(config: PriorConfig, batch: int, device: str, bf16: bool) -> dict[str, Sampler]:
    """All contenders by their names, `ours` in fp32 among them."""
    torch.manual_seed(0)
    model = make_prior(config).eval().requires_grad_(False).to(device)
    half = [(size + 1) // 2 for size in config.grid]
    inputs = {
        "coarser": [
            torch.randint(size, (batch, *half)).to(device) for size in config.coarser_codebook_sizes
        ],
        "attributes": (torch.randint(2, (batch, config.num_attributes)) * 2 - 1).to(device),
    }
    keys = image_keys(0, torch.arange(batch, device=device), level=0)
    models = {"": model}
    if bf16:
        models["-bf16"] = copy.deepcopy(model).bfloat16()
    return {
        name + suffix: Sampler(method, model, condition, keys)
        for suffix, model in models.items()
        for condition in [model.condition(batch, **inputs)]
        for name, method in METHODS.items()
    }


def check(samplers: dict[str, Sampler]) -> dict[str, dict[str, float]]:
    """What the rows say of agreement; ends the script where there is too little of it."""
    checked_draw("raster-cached", samplers["raster-cached"])
    codes = checked_draw("ours", samplers["ours"])
    truth = whole_logits(samplers["ours"], codes)
    columns = {}
    for name, sampler in samplers.items():
        difference, below, mismatch = told_codes(sampler, codes, truth)
        columns[name] = {"max_logit_diff": difference, "mismatch": mismatch}
        if name.endswith("-bf16"):
            continue
        if not difference <= LOGITS:
            refuse(f"{name}: logits are wrong by {difference:.2g}")
        if not below < GAP:
            refuse(f"{name}: draws codes that are not the best by {below:.2g}")
    return columns


def checked_draw(name: str, sampler: Sampler) -> torch.Tensor:
    """Codes (B, H, W) that a contender drew on its own, as the usual loop would."""
    codes = sampler.sample()
    positions = torch.arange(codes[0].numel(), device=codes.device)
    logits = whole_logits(sampler, codes)
    below = shortfall(codes.flatten(1), logits, positions, sampler.keys).max().item()
    if not below < GAP:
        refuse(f"{name}: drew codes that are not the best by {below:.2g}")
    return codes


def whole_logits(sampler: Sampler, codes: torch.Tensor) -> torch.Tensor:
    """Logits (B, H·W, K) of the whole network, in one pass over codes (B, H, W)."""
    return sampler.model.logits(codes, sampler.condition).float().flatten(1, 2)


def shortfall(
    codes: torch.Tensor, logits: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """How far logit plus noise of codes (B, P) lies below the highest one; logits (B, P, K)."""
    perturbed = logits + gumbel_noise(keys, positions, logits.shape[-1])
    return perturbed.max(-1).values - perturbed.gather(-1, codes[..., None])[..., 0]


def told_codes(
    sampler: Sampler, codes: torch.Tensor, truth: torch.Tensor
) -> tuple[float, float, float]:
    """A contender told the codes (B, H, W), one front after another, against their true logits:
    the largest difference, the largest shortfall of what it would draw, the share of other codes.
    """
    network, order = sampler.network()
    steps = len(order) if sampler.has_caches else CHECKED_STEPS
    asked = set(torch.linspace(0, len(order) - 1, steps).round().int().tolist())
    differences, shortfalls, others = [], [], []
    for number, positions in enumerate(order):
        now = codes.flatten(1)[:, positions]
        if number in asked:
            logits, expected = network.logits(positions).float(), truth[:, positions]
            drawn = (logits + gumbel_noise(sampler.keys, positions, logits.shape[-1])).argmax(-1)
            differences.append((logits - expected).abs().max())
            shortfalls.append(shortfall(drawn, expected, positions, sampler.keys).max())
            others.append((drawn != now).flatten())
        network.tell(positions, now)
    return (
        torch.stack(differences).max().item(),
        torch.stack(shortfalls).max().item(),
        torch.cat(others).float().mean().item(),
    )


def with_peak(timer: Callable[[], float], device: str) -> tuple[float, float | None]:
    """Milliseconds, and MiB that the call took."""
    found = []
    gc.collect()  # what is not free yet could become so, and be used, during the call
    if device == "cuda":
        peak = measure.peak_mib(lambda: found.append(timer()), device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # free memory that the process holds would be used first
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest use so far
        before = resident_mib("VmRSS")
        found.append(timer())
        peak = resident_mib("VmHWM") - before
    else:
        found, peak = [timer()], None
    return found[0], peak


def resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def compare(case: str, samplers: dict[str, Sampler], columns: dict, rounds: int) -> list[dict]:
    """Times all in turns and prints their table. The first turn counts only where time is up."""
    ours = samplers["ours"]
    batch, device = len(ours.keys), ours.keys.device.type
    rows, timers = {}, {}
    for name, sampler in samplers.items():
        timers[name], extrapolated = sampler.timer()
        rows[name] = {
            "contender": name, "case": case, "device": device, "extrapolated": extrapolated,
            "parameters": sum(weight.numel() for weight in sampler.model.parameters()),
            "steps": len(sampler.network()[1]), **columns[name],
        }  # fmt: skip

    start = time.perf_counter()
    turns: list[dict[str, float]] = [{}]
    for name, timer in timers.items():
        turns[0][name], rows[name]["peak_mib"] = with_peak(timer, device)
    while len(turns) <= rounds and time.perf_counter() - start < TURNS_SEC:
        turns.append({name: timer() for name, timer in timers.items()})
    turns = turns[1:] or turns
    for name, row in rows.items():
        own = [turn[name] for turn in turns]
        base = "ours-bf16" if name.endswith("-bf16") else "ours"
        row["turns"], row["median_ms"], row["min_ms"] = len(own), statistics.median(own), min(own)
        row["images_per_sec"] = 1e3 * batch / row["median_ms"]
        row["ratio"] = statistics.median(turn[name] / turn[base] for turn in turns)
    extrapolated = ", ".join(name for name, row in rows.items() if row["extrapolated"])
    print_table(case, list(rows.values()), [f"extrapolated: {extrapolated}"])
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15, help="most turns of each contender")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--bf16", action="store_true", help="on a CPU, too")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: no CUDA device here")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bf16 = arguments.bf16 or device == "cuda"

    rows = []
    for name, batches in BATCHES.items():
        try:
            config = prior_config(name)
        except Absent as reason:
            print(f"sampling is left out: yaml is {reason}")
            sys.exit(0)
        height, width = config.grid
        large = device == "cpu" and height * width > 16 * 16
        for batch in (*batches, 64) if device == "cuda" else batches:
            case = f"{height}x{width}, {name}, batch {batch}"
            if arguments.only not in case:
                continue
            samplers = make_samplers(config, batch, device, bf16)
            checked = samplers
            if large:
                checked = make_samplers(replace(config, grid=SMALL), batch, device, bf16)
                slopes = [each["ours"].model.slope for each in (samplers, checked)]
                if min(slopes[0], SMALL[1]) != slopes[1]:
                    refuse(f"{case}: slope {slopes[0]}, but {slopes[1]} at {SMALL}")
            rows += compare(case, samplers, check(checked), arguments.rounds)
    write_json(arguments.json, rows, device)


if __name__ == "__main__":
    main()
