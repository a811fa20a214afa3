"""The hostile corpus: files that would run code, leave their folder, or fill the memory.

    PYTHONPATH=. python tests/hostile.py FOLDER      writes every item there, to try by hand

Whatever runs touches the file `canary` in FOLDER. Nothing here is dangerous as long as that is all
that it does: the bombs take kilobytes, and unfold to some gigabytes at most.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from pipeline.data.shards import Index, ShardInfo, file_sha256, write_index, write_shard

CANARY = "canary"


class Evil:
    """Its pickle touches the canary."""

    def __init__(self, root: Path):
        self.command = f"touch '{root / CANARY}'"

    def __reduce__(self):
        return os.system, (self.command,)


def png(width: int, height: int, grey: bool = False, rows: int | None = None) -> bytes:
    """A black image in kilobytes, of which the first `rows` are there; None: all.

    Args:
        grey: one bit per pixel, so that 20,000 x 20,000 are written at once; else RGB.
    """

    def chunk(name: bytes, data: bytes) -> bytes:
        content = name + data
        return struct.pack(">I", len(data)) + content + struct.pack(">I", zlib.crc32(content))

    packed = zlib.compressobj(1)
    line = 1 + (-(-width // 8) if grey else 3 * width)
    lines = range(height if rows is None else rows)
    data = b"".join(packed.compress(bytes(line)) for _ in lines) + packed.flush()
    header = struct.pack(">2I5B", width, height, *((1, 0) if grey else (8, 2)), 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def member(name: str, data: bytes = b"", **fields) -> bytes:
    """A tar member; `fields` of its header besides."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)


def old_sparse(size: int) -> bytes:
    """GNU's old sparse header: one block in the file, `size` bytes when read."""
    header = bytearray(member("a.jpg", size=512, type=tarfile.GNUTYPE_SPARSE)[:512])
    header[257:265] = b"ustar  \0"
    header[386:410] = b"00000000000\0" + b"00000001000\0"  # data at 0, 512 bytes
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(512)


def tars(root: Path) -> dict[str, bytes]:
    """Contents of tars by what is wrong with them."""
    evil, end = pickle.dumps(Evil(root)), bytes(1024)
    image = member("a.jpg", b"\xff\xd8")
    sparse = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**30)}
    found = {
        "pickle": member("a.pickle", evil) + member("a.pyd", evil) + member("a.pth", evil),
        "traversal": member(f"../../../../..{root / CANARY}.jpg"),
        "absolute": member(f"{root / CANARY}.jpg"),
        "sparse": old_sparse(2**30),
        "pax-sparse": member("a.jpg", size=512, pax_headers=sparse) + bytes(512),
        "long": member("a.jpg", size=2**36) + bytes(512),
        "symlink": member("a.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "hardlink": member("a.jpg", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        "device": member("a.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        "duplicates": image + image,
        "many-samples": b"".join(member(f"{n}.jpg") for n in range(2000)),
        "many-members": b"".join(member(f"a.{n}") for n in range(2000)),
        "large-sample": b"".join(member(f"a.{n}", size=2**26) for n in range(2)),
    }
    found = {name: content + end for name, content in found.items()}
    found["gzip"] = gzip.compress(member("a.jpg", bytes(2**24)) + end, 1)
    return found


def info_of(path: Path, count: int = 1) -> ShardInfo:
    """What an index that goes with the file says."""
    table = path.with_name(f"{path.stem}.index.npy")
    return ShardInfo(
        name=path.name, num_samples=count, bytes=path.stat().st_size, sha256=file_sha256(path),
        table_sha256=file_sha256(table if table.is_file() else path),
    )  # fmt: skip


def image_shards(root: Path, image: bytes = b"", table: np.ndarray | None = None) -> Path:
    """A directory of shards with one image, or with that table in place of the right one."""
    shard = write_shard(root / "train-0.tar", [("a", {"png": image, "json": b"{}"})])
    if table is not None:
        np.save(root / "train-0.index.npy", table, allow_pickle=True)
        shard = info_of(root / "train-0.tar", len(table))
    write_index(root, Index(source="folder", splits={"train": (shard,), "valid": ()}))
    return root


def tables(root: Path) -> dict[str, np.ndarray]:
    """Tables of members by what is wrong with them."""
    right = [("key", "S64"), ("extension", "S8"), ("offset", "<u8"), ("length", "<u8"),
             ("crc32", "<u4")]  # fmt: skip
    beyond = [("a", "json", 0, 2**62, 0), ("a", "png", 0, 10, 0)]
    wrong = [(name, "O" if name == "offset" else kind) for name, kind in right]
    words = [(name, "S4" if name == "offset" else kind) for name, kind in right]
    return {
        "pickle": np.array([Evil(root)], object),
        "objects": np.array([("a", "png", Evil(root), 1, 0)], wrong),
        "words": np.array([("a", "png", "0", 1, 0)], words),
        "traversal": np.array([("../../canary", "json", 0, 1, 0)], right),
        "bytes": np.array([(b"\xff", "json", 0, 1, 0)], right),
        "beyond": np.array(beyond, right)[:1],
    }


def index_texts(root: Path) -> dict[str, str]:
    """index.json by what is wrong with it."""
    names = {
        "pipe": f"pipe:touch {root / CANARY}", "variable": "${HOME}.tar", "double": "a::b.tar",
        "scheme": "file:///etc/passwd", "up": "../train-0.tar", "absolute": "/tmp/train-0.tar",
        "braces": "{0..999999999}.tar", "end-of-line": "a\n.tar",
    }  # fmt: skip
    whole = json.loads((root / "index.json").read_text())
    (shard,) = whole["splits"]["train"]["shards"]
    texts: dict = {name: {**shard, "name": value} for name, value in names.items()}
    texts["counts"] = {**shard, "num_samples": 10**15}
    texts["bytes"] = {**shard, "bytes": 10**18}
    texts = {
        name: json.dumps(
            {**whole, "splits": {"train": {"num_samples": value["num_samples"], "shards": [value]}}}
        )
        for name, value in texts.items()
    }
    texts["long-number"] = json.dumps(whole).replace('"format": 1', '"format": 1' + "0" * 10_000)
    texts["deep"] = "[" * 200_000
    return texts


def code_shards(root: Path, codes: bytes) -> Path:
    """A directory of code shards with one sample of one level of 2 x 2 codes."""
    samples = [("a", {"level0.npy": codes, "json": b"{}"})]
    splits = {name: (write_shard(root / f"{name}-0.tar", samples),) for name in ("train", "valid")}
    origin = {"grids": [[2, 2]], "codebook_sizes": [8]}
    write_index(root, Index(source="folder", splits=splits, codes=origin))
    return root


def arrays(root: Path) -> dict[str, bytes]:
    """.npy files by what is wrong with them."""
    pickled, huge = io.BytesIO(), io.BytesIO()
    np.save(pickled, np.array([[Evil(root)]], object), allow_pickle=True)
    layout = {"descr": "<u2", "fortran_order": False, "shape": (2**20, 2**13)}
    np.lib.format.write_array_header_1_0(huge, layout)
    code = b"\x93NUMPY\x01\x00v\x00" + f"__import__('os').system('touch {root / CANARY}')".encode()
    return {
        "pickle": pickled.getvalue(), "huge": huge.getvalue(), "code": code.ljust(128),
        "zip": b"PK\x03\x04" + bytes(40),
    }  # fmt: skip


def safetensors(root: Path) -> dict[str, bytes]:
    """Files of tensors by what is wrong with them."""

    def file(header: dict, data: bytes = bytes(64)) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    def tensor(start: int, end: int, shape: list) -> dict:
        return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}

    return {
        "overlap": file({"a": tensor(0, 64, [16]), "b": tensor(32, 64, [8])}),
        "beyond": file({"a": tensor(0, 2**40, [2**38])}),
        "shape": file({"a": tensor(0, 64, [2**62, 2**62])}),
        "long-header": struct.pack("<Q", 2**40) + bytes(100),
        "other": file({"a": tensor(0, 64, [16])}),
        "pickle": pickle.dumps(Evil(root)),
    }


def cache_bomb(path: Path, mebibytes: int) -> None:
    """Kilobytes of .npz that say they are an array of so many MiB."""
    start = io.BytesIO()
    layout = {"descr": "|u1", "fortran_order": False, "shape": (mebibytes * 2**20,)}
    np.lib.format.write_array_header_1_0(start, layout)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("keys.npy", "w") as file,
    ):
        file.write(start.getvalue())
        for _ in range(mebibytes):
            file.write(bytes(2**20))


def model(root: Path, tensors: bytes, **about) -> Path:
    """A trained model's final/ whose manifest is right."""
    final = root / "final"
    final.mkdir(parents=True)
    (final / "model.safetensors").write_bytes(tensors)
    (final / "config.json").write_text(json.dumps({"kind": "vqvae", "model": {}, **about}))
    files = {
        file.name: {
            "bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()
        }
        for file in sorted(final.iterdir())
    }  # fmt: skip
    (final / "manifest.json").write_text(json.dumps({"files": files}))
    return root


def small_models() -> dict[str, tuple[str, dict, set[str]]]:
    """A model of each kind and architecture: kind, config, and sizes of the config that it does
    without."""
    vqvae = {"channels": 8, "residual_channels": 4, "codebook_size": (16,), "code_dim": 4}
    vae = {"channels": 8, "latent_dim": 4, "image_size": 32}
    mlp = {
        "network": "mlp", "posterior": "iaf", "likelihood": "logistic_mixture", "num_classes": 3,
        "num_attributes": 2, "context_layers": 1, "context_channels": 8,
    }  # fmt: skip
    prior = {
        "channels": 8, "layers": 2, "heads": 1, "kernel_size": 3, "grid": (4, 4), "num_classes": 2,
        "codebook_size": 8, "coarser_codebook_sizes": (8,), "num_attributes": 2,
        "condition_layers": 1,
    }  # fmt: skip
    snail = {"attention_layers": 1, "attention_channels": 4, "output_layers": 1}
    attention = {"attention_channels", "heads"}
    found: dict[str, tuple[str, dict, set[str]]] = {
        quantizer: ("vqvae", {**vqvae, "quantizer": (quantizer,)}, set())
        for quantizer in ("ema", "learned", "cosine", "fsq", "simvq")
    }
    return found | {
        "classifier": ("classifier", {"num_outputs": 3, "kind": "classes", "names": "abc"}, set()),
        "conv": ("vae", vae, {"flow_steps", "context_channels", "context_kernel"}),
        "mlp": ("vae", {**vae, **mlp}, set()),
        "pixelcnn": ("prior", prior, attention | {"residual_channels"}),
        "pixelsnail": ("prior", {**prior, **snail, "architecture": "pixelsnail"}, set()),
        "transformer": ("prior", {**prior, "architecture": "transformer"}, attention),
    }


def configs(root: Path) -> dict[str, str]:
    """YAML by what is wrong with it."""
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    call = f"!!python/object/apply:os.system ['touch {root / CANARY}']"
    return {
        "object": f"seed: {call}", "name": "seed: !!python/name:os.system",
        "bomb": "\n".join(["a0: &a0 [x, x]", *levels, "seed: *a9"]),
        "bomb-in-a-key": "\n".join(["a0: &a0 [x, x]", *levels, "model: {channels: *a9}"]),
        "cycle": "seed: &a [*a]", "deep": "seed: " + "[" * 20_000 + "]" * 20_000,
        "class": "model: {class_path: os.system, init_args: {command: 'touch canary'}}",
    }  # fmt: skip


def celeba_zip(root: Path) -> Path:
    """CelebA's layout, whose zip has members outside of it and a bomb."""
    root.mkdir(parents=True)
    with zipfile.ZipFile(root / "img_align_celeba.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (f"../../{CANARY}.jpg", f"{root.parent / CANARY}.jpg"):
            archive.writestr(name, b"\xff\xd8not an image")
        with archive.open("img_align_celeba/000001.jpg", "w") as file:
            for _ in range(200):
                file.write(bytes(2**20))
    (root / "list_attr_celeba.txt").write_text("1\nMale\n000001.jpg 1\n")
    (root / "list_eval_partition.txt").write_text("000001.jpg 0\n")
    return root


def write_corpus(root: Path) -> None:
    """Every item as a file or directory below `root`."""
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    items: dict[str, bytes] = {f"{name}.tar": content for name, content in tars(root).items()}
    items |= {f"{name}.safetensors": content for name, content in safetensors(root).items()}
    items |= {f"{name}.npy": content for name, content in arrays(root).items()}
    items |= {f"{name}.yaml": text.encode() for name, text in configs(root).items()}
    items |= {"evil.pt": pickle.dumps(Evil(root)), "bomb.jpg": png(20_000, 20_000, grey=True)}
    for name, content in items.items():
        (root / name).write_bytes(content)
    for name, table in tables(root).items():
        image_shards(root / f"table-{name}", table=table)
    celeba_zip(root / "celeba")
    print(f"{root}: {len(items)} files, and directories besides")


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]))
