"""When two figures may stand side by side: the keys of a protocol, and what they decide.

Each key of a report's protocol is in one of the two lists below, so that a new one cannot be
forgotten: `check` refuses a protocol with any other.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MUST_AGREE = {  # key -> what it decides
    "data_index_sha256": "the images of every split",
    "source": "the recipe's kind",
    "split": "the real images compared with",
    "image_size": "the pixels scored",
    "recipe": "crop and resize of the real images",
    "file_format": "what compression did to the pixels",
    "num_images": "the bias of a distance",
    "seed": "which images, subsets and resamples are drawn",
    "features": "what is measured at all: each extractor's SHA-256",
    "kid_subsets": "KID and its spread",
    "kid_subset_size": "KID's spread",
    "neighbourhood": "precision and recall",
    "bootstrap_resamples": "the intervals",
    "blur_sigma": "the ceiling",
    "pixels": "how MSE and PSNR are taken",
    "sets": "how the sets of images are made",
    "train_images": "how many training images copies are searched among",
    "classifier": "the classification accuracy score: how its classifiers are trained",
    "selector": "the figures over the acceptance rate: its SHA-256",
}
OPTIONAL = ("train_images", "classifier", "selector")  # None or 0: not measured, so no difference
MAY_DIFFER = {  # key -> why it decides nothing
    "data": "a path, the images themselves are in the hash of the index",
    "checkpoint": "what is compared",
    "samples": "what is compared",
    "config": "the command; what it decides is in the other keys",
    "commit": "the code's history; what a figure is made by is in the other keys",
    "versions": "of the libraries",
    "hardware": "rounding at most",
    "threads": "rounding, by which a classifier learns otherwise; `verify` takes as many",
    "date": "nothing",
}
PROTOCOL_KEYS = MUST_AGREE.keys() | MAY_DIFFER.keys()


class Difference(NamedTuple):
    """A key, dotted where it is nested, and its two values; None where one has none."""

    key: str
    first: Any
    second: Any


class FigureCheck(NamedTuple):
    """A figure measured twice; None where one report lacks it."""

    tag: str
    old: float | None
    new: float | None
    same: bool


def check(protocol: Mapping[str, Any]) -> None:
    """ValueError naming the keys that are missing or in neither list."""
    check_keys("protocol", protocol, PROTOCOL_KEYS)


def check_keys(what: str, found: Mapping[str, Any], expected: Any) -> None:
    """ValueError naming `what` and the keys that are missing or unknown."""
    if different := sorted(set(found) ^ set(expected)):
        raise ValueError(f"{what}: keys missing or unknown: {', '.join(different)}")


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """Where two protocols differ in what changes a figure, in the order of MUST_AGREE.

    Features that only one of them has are no difference, as long as they share some; nor is what
    only one of them has measured. ValueError for a protocol with unknown or missing keys.
    """
    for protocol in (first, second):
        check(protocol)
    hashes = [_hashes(protocol) for protocol in (first, second)]
    if shared := sorted(hashes[0].keys() & hashes[1].keys()):
        hashes = [{name: each[name] for name in shared} for each in hashes]
    found = []
    for key in MUST_AGREE:
        values = hashes if key == "features" else [first[key], second[key]]
        if key in OPTIONAL and not all(values):
            continue
        a, b = (dict(flat({key: value})) for value in values)
        for name in dict.fromkeys([*a, *b]):
            if a.get(name) != b.get(name):
                found.append(Difference(name, a.get(name), b.get(name)))
    return found


def _hashes(protocol: Mapping[str, Any]) -> dict[str, str]:
    return {name: about["sha256"] for name, about in protocol["features"].items()}


def flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dicts as dotted keys, in order; an empty dict is a value."""
    rows = []
    for key, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            rows += flat(entry, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", entry))
    return rows


def compare_figures(
    old: Mapping[str, Any], new: Mapping[str, Any], relative_tolerance: float
) -> list[FigureCheck]:
    """The figures of a report beside those of another that was made the same way.

    A figure is the same if value, interval and spread agree within the tolerance (relative), and
    features' hash and counts exactly; one of TRAINED if it lies in the old interval. Rows in the
    order of `old`, then what only `new` has.
    """
    before, after = ({f["tag"]: f for f in report["figures"]} for report in (old, new))
    rows = []
    for tag in dict.fromkeys([*before, *after]):
        a, b = before.get(tag), after.get(tag)
        rows.append(
            FigureCheck(tag, a and a["value"], b and b["value"], _same(a, b, relative_tolerance))
        )
    return rows


TRAINED = "cas_"  # figures of a classifier trained anew, in which rounding grows
EXACTLY = ("images", "metric", "features", "features_sha256", "num_images", "num_reference")


def _same(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None, tolerance: float) -> bool:
    if a is None or b is None or any(a[key] != b[key] for key in EXACTLY):
        return False
    if a["metric"].startswith(TRAINED) and a["interval"] and b["interval"]:
        return a["interval"][0] <= b["value"] <= a["interval"][1]
    first, second = _numbers(a), _numbers(b)
    return len(first) == len(second) and all(
        math.isclose(x, y, rel_tol=tolerance) for x, y in zip(first, second, strict=True)
    )


def _numbers(figure: Mapping[str, Any]) -> Sequence[float]:
    interval = figure["interval"] or ()
    spread = () if figure["spread"] is None else (figure["spread"],)
    return (figure["value"], *interval, *spread)
