"""The card of a trained model, `final/card.md`: what it is, made of what, good for what.

It is made from the files beside it alone, so it cannot disagree with them; nothing in it is typed
by hand but the words below. What those files do not tell is called not recorded.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.images import Recipe
from pipeline.data.index import Index
from pipeline.data.shards import file_sha256
from pipeline.evaluation.protocol import flat
from pipeline.evaluation.report import Table, markdown_table

WHAT = {
    "vqvae": "A VQ-VAE: images to grids of codes at one or more levels, and back.",
    "vae": "A variational autoencoder, or one of its kin: images to a continuous or binary latent, "
    "and back.",
    "prior": "An autoregressive prior over the codes of one level of a VQ-VAE, given the coarser "
    "levels.",
    "classifier": "A classifier of images: the judge, whose features and labels score samples, or "
    "the selector of rejection sampling.",
}
USE = {
    "vqvae": "Compression to codes, reconstruction, and as the decoder of priors over these codes. "
    "It draws no images by itself, and fine detail that its codes do not hold is lost.",
    "vae": "Comparison with other latent-variable models on the same images. Samples are as good "
    "as the evaluation says, not more.",
    "prior": "Sampling and likelihood of codes, of the VQ-VAE named above alone.",
    "classifier": "Scores of generated images. It has learned what its data call by these names, "
    "and says nothing about people; figures by different classifiers are not comparable.",
}
LIMITS = (
    "For research on generative models. Images unlike those it was trained on were never tried, "
    "and whatever is one-sided in the data is so in the model."
)
LICENCE = {
    "celeba": "CelebA: non-commercial research only, after its owners' agreement; that goes for "
    "what a model makes of it too.",
    "mnist": "MNIST, handwritten digits by LeCun, Cortes and Burges, as its owners say.",
    "faces": "Drawn by this repository's own code, from no person's likeness.",
    "folder": "A user's own folder of images: as its owner says.",
}
NOT_RECORDED = "not recorded"


def data_of(index: Index, recipe: Recipe | None = None) -> dict[str, Any]:
    """What a stage records of its data, under the key `data`, for the card.

    Args:
        recipe: how images become pixels; None for codes.
    """
    return {
        "source": index.source,
        "samples": {split: index.num_samples(split) for split in index.splits},
        "left_out": len(index.quarantined),
        "recipe": recipe and dataclasses.asdict(recipe),
    }


def card(directory: Path) -> str:
    """The card in Markdown, of a directory with config.json and model.safetensors."""
    about = json.loads((directory / "config.json").read_text())
    weights = directory / "model.safetensors"
    kind = about["kind"]
    sections = {
        "Data": _rows(_data(about)),
        "Training": _rows(_training(about)),
        "Validation figures": _rows(_figures(about)),
        "Weights": _rows({
            "file": f"{weights.name}, {weights.stat().st_size:,} bytes",
            "SHA-256": file_sha256(weights),
        }),
        "Model": _rows(_settings(about["model"])),
        "Load": [
            "```python", "from pathlib import Path",
            "from pipeline.training.checkpoint import load_model",
            f'model = load_model(Path("final"), "{kind}")  # this directory; eval mode, on the CPU',
            "```",
        ],
        "Use and limits": [USE[kind], "", LIMITS],
    }  # fmt: skip
    lines = [f"# Model card: {kind}", "", WHAT[kind]]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def _data(about: Mapping[str, Any]) -> dict[str, Any]:
    """Where the images come from, what may be done with them, and how they are read."""
    data, codes = about.get("data") or {}, about.get("codes") or {}
    source = data.get("source")
    samples = data.get("samples") or {}
    rows = {
        "source": source,
        "licence": LICENCE.get(source or ""),
        "code samples" if codes else "images": _listed(samples),
        "left out as unreadable": data.get("left_out"),
        "trained on": about.get("training_images"),
        "SHA-256 of the index": about.get("data_index_sha256") or codes.get("data_index_sha256"),
        "recipe": about.get("recipe") or codes.get("recipe"),
        "recipe's settings": _listed(data.get("recipe") or {}),
    }
    if codes:
        rows |= {
            "views of each image": ", ".join(codes["views"]) if "views" in codes else None,
            "SHA-256 of the VQ-VAE": codes.get("checkpoint_sha256"),
            "level": about.get("level"),
        }
    optional = ("trained on", "recipe's settings")
    return {name: value for name, value in rows.items() if value or name not in optional}


def _training(about: Mapping[str, Any]) -> dict[str, Any]:
    versions = about.get("versions") or {}
    config = about.get("config") or {}
    settings = _settings({k: v for k, v in config.items() if k not in ("model", "seed")})
    return {
        "images seen": about.get("images_seen"),
        "seed": config.get("seed"),
        "commit": about.get("commit"),
        "date": about.get("date"),
        "versions": _listed(versions),
        **settings,
    }


def _figures(about: Mapping[str, Any]) -> dict[str, Any]:
    """As the stage recorded them, with all digits."""
    prior = {key: value for key, value in about.items() if key.endswith("_nats_per_code")}
    return {**(about.get("validation") or {}), **prior} or {"figures": None}


def _settings(values: Mapping[str, Any]) -> dict[str, str]:
    """As words, because a setting of None is recorded, too."""
    return {key: _told(value) for key, value in flat(values)}


def _listed(values: Mapping[str, Any]) -> str | None:
    return ", ".join(f"{key} {value}" for key, value in _settings(values).items()) or None


def _told(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _rows(values: Mapping[str, Any]) -> list[str]:
    """A table."""
    rows = [(key, NOT_RECORDED if v is None else _told(v)) for key, v in values.items()]
    return markdown_table(Table("", ["what", "as recorded"], rows))
