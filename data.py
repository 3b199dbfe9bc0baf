"""Fashion-MNIST as tensors, and what the three scripts share: a run's files and a command line."""

import argparse
import contextlib
import csv
import gzip
import hashlib
import io
import json
import math
import os
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import extract_archive

CLASSES = FashionMNIST.classes
DEBIAN_PACKAGE = Path("/usr/share/datasets/fashion-mnist")


class UserError(Exception):
    """A failure that the user can mend; its text is the one line that they are shown."""


# ------------------------------------------------------------------------------------------
# Fashion-MNIST


def load_split(root, train, hold_out=0):
    """Return the images and labels of one split of Fashion-MNIST (Xiao et al., 2017).

    Images are [N, 1, 28, 28] float32 in [0, 1] (the grey value over 255), labels [N] int64 in
    0 to 9; N is 60,000 for training, 10,000 for test. With `hold_out` the last so many training
    images take the place of the test set. What `root` lacks is unpacked from .gz files placed in
    it, from Debian's package `dataset-fashion-mnist`, or downloaded.
    Raises UserError if the data cannot be had or is damaged, or if holding out leaves a part
    fewer than ten images.
    """
    raw = Path(root) / "FashionMNIST" / "raw"
    complete_raw_files(raw)
    name = "train" if train or hold_out else "t10k"
    try:
        split = FashionMNIST(root, train=name == "train")
        images, labels = split.data, split.targets
        if images.shape != (len(labels), 28, 28) or labels.min() < 0 or labels.max() > 9:
            raise ValueError("not as many 28×28 images as labels from 0 to 9")
    # What torchvision raises on a damaged file depends on where the damage is.
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        problem = "are damaged or not Fashion-MNIST: delete them"
        raise UserError(f"{raw}/{name}-* {problem}") from error
    if hold_out:
        if not 10 <= hold_out <= len(images) - 10:
            raise UserError(f"--hold-out {hold_out}: of {len(images)} images, each part needs 10")
        part = slice(-hold_out) if train else slice(-hold_out, None)
        images, labels = images[part], labels[part]
    return images.unsqueeze(1).float().div_(255), labels


def complete_raw_files(raw):
    """Give the folder `raw` those of the four files that it lacks, each whole or not at all."""
    names = [Path(name).stem for name, _ in FashionMNIST.resources]
    missing = [name for name in names if not (raw / name).exists()]
    if not missing:
        return
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw) as staging:
        staged = Path(staging, "FashionMNIST", "raw")  # where torchvision's download goes
        for folder in (raw, DEBIAN_PACKAGE):
            archives = [folder / f"{name}.gz" for name in missing]
            if all(archive.exists() for archive in archives):
                unpack(archives, staged)
                break
        else:
            download(staging, raw)
        for name in missing:
            os.replace(staged / name, raw / name)


def unpack(archives, folder):
    """Unpack .gz files into a new folder; UserError if one is damaged."""
    folder.mkdir(parents=True)
    for archive in archives:
        try:
            extract_archive(archive, folder)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{archive} is damaged ({error}): replace it") from error


def download(root, raw):
    """Let torchvision download and check the data set; UserError, naming `raw`, if it cannot."""
    try:
        FashionMNIST(root, download=True)
    except RuntimeError as error:
        raise UserError(
            f"no Fashion-MNIST in {raw}, nor at {', '.join(FashionMNIST.mirrors)}: apt-get install"
            " dataset-fashion-mnist, or put the four files (train-*, t10k-*, .gz or not) there"
        ) from error


# ------------------------------------------------------------------------------------------
# A run: its settings and its files


def between(kind, low, high):
    """Return an argparse type: a `kind` (int or float) from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # NaN ends here too
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} from {low} to {high}"  # argparse: "invalid … value: '0'"
    return parse


LARGE = 2**31 - 1
COUNT, WEIGHT = between(int, 0, LARGE), between(float, 0, 1e6)
SCHEDULERS = {"choices": ("constant", "plateau", "cosine"), "default": "constant"}
# As options of train.py. A run made before a setting existed has its default.
SETTINGS = {
    "model": {"choices": ("conv", "fc", "deep"), "default": "conv", "help": "fc: fully connected"},
    "latent_dim": {"type": between(int, 1, 4096), "default": 32, "help": "numbers in a code"},
    "batch_size": {"type": between(int, 1, LARGE), "default": 128, "help": "images per update"},
    "lr": {"type": between(float, 1e-12, 1e3), "default": 5e-4, "help": "learning rate of Adam"},
    "seed": {"type": COUNT, "default": 0, "help": "of all random draws"},
    "beta": {"type": WEIGHT, "default": 1.0, "help": "weight of the KLD"},
    "lr_scheduler": {**SCHEDULERS, "help": "torch's, on train BCE + beta KLD or to 0 at --epochs"},
    "hold_out": {"type": COUNT, "default": 0, "help": "last train images, to be the test set"},
    "feature_weight": {"type": WEIGHT, "default": 0.0, "help": "of features in the loss"},
    "feature_run": {"type": str, "default": "", "help": "run whose encoder gives those features"},
    "epochs": {"type": between(int, 1, LARGE), "default": 100, "help": "in all"},
}
LOSSES = [f"{split}_{loss}" for split in ("train", "test") for loss in ("loss", "bce", "kld")]
LOG_COLUMNS = ["epoch", *LOSSES, "lr", "seconds"]

STATE = "state.pth"  # the run itself; the next three are views of it
CONFIG = "config.json"
WEIGHTS = "convvae_fashionmnist.pth"
LOG = "losses.csv"
CLASSIFICATION = "classification.json"
RUN_FILES = (STATE, CONFIG, WEIGHTS, LOG, CLASSIFICATION)

ANOTHER_RUN = "choose another --run, or delete the folder"
RESTORE = f"the train.py command of the run restores it from {STATE}; or train in another --run"
NEEDED = {STATE: ["optimizer", "log"], CLASSIFICATION: ["epoch", "accuracy", "confusion_matrix"]}
REMEDIES = {STATE: ANOTHER_RUN, CLASSIFICATION: "delete it, then python classify.py"}


class Run(NamedTuple):
    """A run as `read_run` finds it."""

    path: Path
    settings: dict  # a value for each of SETTINGS
    log: list  # a dict of LOG_COLUMNS for each finished epoch, losses in nats per image
    weights: dict | None  # a state_dict, or None where a published run comes without
    sha256: str | None  # its digest


def read_run(path):
    """Return the run in the folder `path`, and remark on it if it is unfinished.

    Raises UserError if there is none, or if its files are damaged or disagree.
    """
    if not any((path / name).exists() for name in RUN_FILES):
        raise UserError(f"no run in {path}: python train.py --run {path} makes one")
    config, log = read(path / CONFIG), read(path / LOG)
    weights = read(path / WEIGHTS) if (path / WEIGHTS).exists() else None
    sha256 = digest(weights) if weights else None
    if (path / STATE).exists():
        state = read(path / STATE)
        truth = state["config"], state["log"], digest(state["model"])
        if (config, log, sha256 or truth[2]) != truth:
            remedy = "unless train.py is just writing them, its command for this run restores them"
            raise UserError(f"files in {path} differ from its {STATE}: {remedy}")
        sha256 = truth[2]
    settings = settings_of(config)
    if len(log) < settings["epochs"]:
        print(f"Remark: {path} is at epoch {len(log)} of {settings['epochs']}.", file=sys.stderr)
    return Run(path, settings, log, weights, sha256)


def read_classification(run):
    """Return what classify.py found for the weights of `run`, or None, with a remark.

    Epochs are compared, and the weights' digests where there are weights and a digest.
    """
    path, remark = run.path / CLASSIFICATION, "is missing"
    if path.exists():
        found = read(path)
        sha256 = found.get("sha256", run.sha256)
        if found["epoch"] == len(run.log) and run.sha256 in (None, sha256):
            return found
        remark = "is of other weights than the run has now"
    print(f"Remark: {path} {remark}: python classify.py --run {run.path}", file=sys.stderr)
    return None


def read(path):
    """Return what `write` put there, running no code in it; UserError if missing or damaged."""
    remedy = REMEDIES.get(path.name, RESTORE)
    try:
        if path.suffix == ".pth":
            if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
                raise ValueError("a checksum is wrong, at which torch.load does not look")
            content = dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else parse_log(text)
        if path.name in (STATE, CONFIG):
            settings_of(content["config"] if path.name == STATE else content)
        if path.name in (STATE, WEIGHTS):
            digest(content["model"] if path.name == STATE else content)
        for name in NEEDED.get(path.name, ()):
            content[name]
        return content
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {remedy}") from error
    except PermissionError:  # says itself what is wrong
        raise
    except Exception as error:  # damaged bytes can raise almost anything
        raise UserError(f"{path} is damaged ({type(error).__name__}): {remedy}") from error


def settings_of(config):
    """Return the settings in a config; raises where one is impossible, or there are no epochs."""
    settings = {name: config.get(name, option["default"]) for name, option in SETTINGS.items()}
    settings["epochs"] = config["epochs"]  # which every run has had
    for name, option in SETTINGS.items():
        value = settings[name]
        if value not in (option.get("choices") or [option["type"](str(value))]):
            raise ValueError(f"{name} cannot be {value}")
    return settings


def digest(weights):
    """Return the SHA-256 of what is in a state_dict, whatever file it was in."""
    sha = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def parse_log(text):
    """Return the rows of a loss log, one dict an epoch; an exception if it is damaged or empty."""
    lines = csv.DictReader(io.StringIO(text))
    rows = [{column: float(line[column]) for column in LOG_COLUMNS} for line in lines]
    for epoch, row in enumerate(rows, start=1):
        if row["epoch"] != epoch or not math.isfinite(sum(row.values())):
            raise ValueError("epochs out of order, or not finite")
        row["epoch"] = epoch
    if not rows:
        raise ValueError("no epoch")
    return rows


def write(path, content):
    """Write `content` to `path` in the format of its suffix, whole or not at all.

    .pth: what torch.save takes; .json: what json.dumps takes; .csv: a loss log; .png: a figure.
    Raises UserError if it cannot be written.
    """
    buffer = io.BytesIO()
    if path.suffix == ".pth":
        torch.save(content, buffer)
    elif path.suffix == ".json":
        buffer.write(f"{json.dumps(content, indent=1)}\n".encode())
    elif path.suffix == ".csv":
        for line in (LOG_COLUMNS, *([row[name] for name in LOG_COLUMNS] for row in content)):
            buffer.write(f"{','.join(map(str, line))}\n".encode())
    else:
        content.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


# ------------------------------------------------------------------------------------------
# The command line


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def command_line(description):
    """Return a parser with the options that the three scripts share."""
    with_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = OneLineParser(description=description, formatter_class=with_defaults)
    parser.add_argument("--run", type=Path, default="runs/convvae", help="folder of the run")
    data_help = "folder of Fashion-MNIST, which is fetched if it is not there"
    parser.add_argument("--data", type=Path, default="data/fashion-mnist", help=data_help)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    devices = [*(name for name in there if there[name]), "cpu"]
    auto = {"type": lambda name: devices[0] if name == "auto" else name, "default": "auto"}
    parser.add_argument("--device", choices=devices, help="auto: the first of those", **auto)
    return parser


def run_script(main, when_interrupted):
    """Call `main`; an expected failure ends in one line on standard error, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # Windows lacks μ and −
    try:
        main()
    except KeyboardInterrupt:
        print(f"Interrupted: {when_interrupted}.", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
