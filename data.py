"""Fashion-MNIST as tensors, and what the three scripts share: a run's files and a command line."""

import argparse
import contextlib
import csv
import gzip
import io
import json
import math
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from urllib.parse import urlparse

import torch
from torchvision.datasets import FashionMNIST

CLASSES = FashionMNIST.classes
DEBIAN_PACKAGE = Path("/usr/share/datasets/fashion-mnist")

# The files of a run, a folder that train.py fills and classify.py and plots.py read.
CONFIG = "config.json"
WEIGHTS = "convvae_fashionmnist.pth"
LOSSES = "losses.csv"
STATE = "state.pth"
CLASSIFICATION = "classification.json"
METRICS = "metrics.json"
LOSS_CURVES = "loss_curves.png"
RECONSTRUCTIONS = "reconstructions.png"
SAMPLES = "samples.png"
CONFUSION_MATRIX = "confusion_matrix.png"
LATENT_SPACE = "latent_space.png"
FIGURES = (LOSS_CURVES, RECONSTRUCTIONS, SAMPLES, CONFUSION_MATRIX, LATENT_SPACE)
RUN_FILES = (STATE, CONFIG, WEIGHTS, LOSSES, CLASSIFICATION, METRICS, *FIGURES)

# The settings in which two runs differ, and the columns of the loss log.
SETTINGS = ("model", "latent_dim", "batch_size", "lr", "seed")
LOSS_COLUMNS = (
    "epoch",
    *(
        f"{split}_{term}"
        for split in ("train", "test")
        for term in ("loss", "bce", "kld")
    ),
    *("lr", "seconds"),
)


class UserError(Exception):
    """A failure that the user can mend; its text is the one line that they are shown."""


# ------------------------------------------------------------------------------------------
# Fashion-MNIST


def load_split(root, train):
    """Return the images and labels of one split of Fashion-MNIST (Xiao et al., 2017).

    Images are [N, 1, 28, 28] float32 in [0, 1] (the grey value over 255), labels [N] int64 in
    0 to 9; N is 60,000 for training, 10,000 for test. What `root` lacks is unpacked from .gz
    files placed in it, from Debian's package `dataset-fashion-mnist`, or downloaded.
    Raises UserError if the data cannot be had or is damaged.
    """
    raw = Path(root) / "FashionMNIST" / "raw"
    complete_raw_files(raw)
    try:
        split = FashionMNIST(root, train=train)
        images, labels = split.data, split.targets
        if images.shape != (len(labels), 28, 28) or not len(labels):
            raise ValueError("as many 28×28 images as labels, and some, are expected")
        if images.dtype != torch.uint8 or labels.min() < 0 or labels.max() > 9:
            raise ValueError("bytes, and labels from 0 to 9, are expected")
    # What torchvision raises on a damaged file depends on where the damage is.
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        prefix = "train" if train else "t10k"
        raise UserError(
            f"{raw}/{prefix}-* are damaged or not Fashion-MNIST: delete and run again"
        ) from error
    return images.unsqueeze(1).float().div_(255), labels


def complete_raw_files(raw):
    """Give the folder `raw` those of the four files that it lacks, each whole or not at all."""
    names = [Path(name).stem for name, _ in FashionMNIST.resources]
    missing = [name for name in names if not (raw / name).exists()]
    if not missing:
        return
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw) as staging:
        for folder in (raw, DEBIAN_PACKAGE):
            if all((folder / f"{name}.gz").exists() for name in missing):
                files = [unpack(folder / f"{name}.gz", staging) for name in missing]
                break
        else:
            download(staging, raw)
            files = [Path(staging, "FashionMNIST", "raw", name) for name in missing]
        for file in files:
            os.replace(file, raw / file.name)


def unpack(archive, folder):
    """Unpack `archive`, a .gz file, into `folder`; return the new file's path."""
    target = Path(folder, archive.stem)
    try:
        with gzip.open(archive) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error}): replace it") from error
    return target


def download(root, raw):
    """Let torchvision download and check the data set; `raw` is named if it cannot."""
    try:
        FashionMNIST(root, download=True)
    except RuntimeError as error:
        hosts = ", ".join(urlparse(mirror).netloc for mirror in FashionMNIST.mirrors)
        raise UserError(
            f"no Fashion-MNIST: {raw} lacks it, the Debian package is not installed, and"
            f" {hosts} could not be reached. Either: apt-get install dataset-fashion-mnist."
            f" Or: put its four files (train-* and t10k-*, .gz or unpacked) into {raw}"
        ) from error


# ------------------------------------------------------------------------------------------
# The files of a run


def write_files(contents):
    """Write `contents`, {path: bytes}, so that each file is replaced whole or not at all.

    Every file is on the disk under a temporary name before the first is renamed: a full disk
    leaves all of them as they were. Raises UserError if one cannot be written.
    """
    temporary = {path: path.with_name(path.name + ".tmp") for path in contents}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    except OSError as error:
        for left_over in temporary.values():
            with contextlib.suppress(OSError):
                left_over.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def to_bytes(value):
    """Return what torch.save would write."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def read_tensors(path, remedy):
    """Return the dict that torch.save wrote to `path`, on the CPU; code in it is never run.

    Raises UserError, which names `remedy`, unless the file is there and whole.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict):
            raise TypeError("not a dict")
        return tensors
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {remedy}") from error
    except Exception as error:  # damaged bytes can raise almost anything
        raise UserError(
            f"{path} is damaged or not made by train.py: {remedy}"
        ) from error


def read_json(path, keys):
    """Return the dict in a JSON file; UserError unless it can be read and has all `keys`."""
    try:
        value = json.loads(path.read_bytes())
        for key in keys:
            value[key]
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not parse ({type(error).__name__}: {error})"
        ) from error
    return value


def json_bytes(value):
    """Return `value` as a JSON file's content."""
    return (json.dumps(value, indent=1) + "\n").encode()


def read_losses(path):
    """Return the rows of a loss log, one dict an epoch from 1 on; none if there is no log.

    Losses are in nats per image. Raises UserError if the file does not parse.
    """
    if not path.exists():
        return []
    rows = []
    try:
        for row in csv.DictReader(io.StringIO(path.read_text())):
            rows.append({column: float(row[column]) for column in LOSS_COLUMNS})
            rows[-1]["epoch"] = len(rows)
            if row["epoch"] != str(len(rows)) or not math.isfinite(
                sum(rows[-1].values())
            ):
                raise ValueError("epochs out of order, or not finite")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}, epoch {len(rows)}, does not parse ({error})"
        ) from error
    return rows


def losses_bytes(rows):
    """Return the content of a loss log; `read_losses` gives `rows` back, digit for digit."""
    text = io.StringIO()
    writer = csv.DictWriter(text, LOSS_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read_run(run):
    """Return the settings (a dict) and the loss log of a run, and remark if it is unfinished.

    Raises UserError if there is no run, or no finished epoch in it.
    """
    if not (run / CONFIG).exists():
        raise UserError(f"no run in {run}: make one with python train.py --run {run}")
    config = read_json(run / CONFIG, (*SETTINGS, "epochs"))
    log = read_losses(run / LOSSES)
    if not log:
        raise UserError(f"{run} has no finished epoch yet: python train.py --run {run}")
    if len(log) < config["epochs"]:
        print(
            f"Remark: {run} is unfinished, at epoch {len(log)} of {config['epochs']}."
        )
    return {**{name: config[name] for name in SETTINGS}, "epochs": len(log)}, log


# ------------------------------------------------------------------------------------------
# The command line


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def command_line(description):
    """Return a parser with the options that the three scripts share."""
    parser = OneLineParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, default="runs/convvae", help="folder of the run"
    )
    parser.add_argument(
        "--data", type=Path, default="data/fashion-mnist", help="folder of the data set"
    )
    parser.add_argument(
        "--device",
        type=available_device,
        default="auto",
        metavar="{auto,cpu,cuda,mps}",
        help="auto: a GPU if there is one",
    )
    return parser


def available_device(name):
    """Return the torch.device called `name`; "auto" takes CUDA or mps where there is one."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(name for name in available if available[name])
    if not available.get(name):
        here = ", ".join(name for name in available if available[name])
        raise argparse.ArgumentTypeError(
            f"{name!r} is not there: choose auto or {here}"
        )
    return torch.device(name)


def number(kind, zero=False):
    """Return an argparse type: a `kind` above 0 (or, with `zero`, at 0) and below 2^31."""

    def parse(text):
        value = kind(text)
        if not (0 < value < 2**31 or (zero and value == 0)):  # NaN fails
            raise argparse.ArgumentTypeError(
                f"{text} is not a positive number below 2^31"
            )
        return value

    parse.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return parse


def run_script(main):
    """Call `main`; an expected failure ends in one line on standard error, not a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted: the same command without --fresh goes on.", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
