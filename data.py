"""Fashion-MNIST as tensors, and what the three scripts share: a run's files and a command line."""

import argparse
import contextlib
import csv
import errno
import gzip
import hashlib
import io
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.datasets import FashionMNIST

CLASSES = FashionMNIST.classes
FILES = [Path(name).stem for name, _ in FashionMNIST.resources]  # two of train, two of t10k
DEBIAN_PACKAGE = Path("/usr/share/datasets/fashion-mnist")
# Of the four files' pixels and labels, one after the other.
SHA256 = "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f"


class UserError(Exception):
    """A failure that the user can mend; its text is the one line that they are shown."""


# ------------------------------------------------------------------------------------------
# Fashion-MNIST


def load_splits(root, hold_out=0):
    """Return (images, labels) of the training split, and of the test split, of Fashion-MNIST.

    Images are [N, 1, 28, 28] float32 in [0, 1] (the grey value over 255), labels [N] int64 in
    0 to 9; N is 60,000 and 10,000 (Xiao et al., 2017). With `hold_out` the last so many training
    images take the place of the test set. Other images in the same format will do, with a remark.
    Raises UserError if the data cannot be had or is damaged, or if holding out leaves a part
    fewer than ten images.
    """
    paths = find_files(root)
    arrays = [read_idx(path) for path in paths]
    splits = []
    for path, images, labels in zip(paths[::2], arrays[::2], arrays[1::2]):
        if images.dim() != 3 or images.shape != (*labels.shape, 28, 28) or labels.max() > 9:
            shapes = f"{list(images.shape)} and {list(labels.shape)} up to {labels.max()}"
            wanted = "as many images of 28×28 as labels up to 9"
            raise UserError(f"{path} and its labels are not {wanted}, but {shapes}")
        splits.append((images.unsqueeze(1).float().div_(255), labels.long()))
    if sha256(b"".join(array.numpy() for array in arrays)) != SHA256:
        print(f"Remark: what is in {paths[0].parent} is not Fashion-MNIST.", file=sys.stderr)
    if hold_out:
        images, labels = splits[0]
        if not 10 <= hold_out <= len(images) - 10:
            raise UserError(f"--hold-out {hold_out}: of {len(images)} images, each part needs 10")
        parts = slice(-hold_out), slice(-hold_out, None)
        splits = [(images[part], labels[part]) for part in parts]
    return splits


def find_files(root):
    """Return the paths of the data set's four files, which are downloaded if there are none.

    They are those of the first place that has any: torchvision's folder in `root`, `root` itself,
    Debian's package. UserError if that place lacks some, for two places are never mixed.
    """
    raw = Path(root, "FashionMNIST", "raw")
    for place in (raw, Path(root), DEBIAN_PACKAGE):
        paths = []
        for name in FILES:
            # As torchvision names it, or as Kaggle and 7-Zip do; plain or compressed.
            names = name, name.replace("-idx", ".idx")
            forms = [place / f"{form}{suffix}" for suffix in ("", ".gz") for form in names]
            paths += [path for path in forms if path.is_file()][:1] or [None]
        if all(paths):
            return paths
        if any(paths):
            missing = ", ".join(name for name, path in zip(FILES, paths) if not path)
            raise UserError(f"{place} has some files of the data set, but not {missing}")
    download(raw)
    return [raw / name for name in FILES]


def download(raw):
    """Let torchvision download and check the data set into the folder `raw`, whole or not at all.

    UserError, with other ways to have it, if that fails.
    """
    target = Path(os.path.realpath(raw))  # a link is the place to which it points
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{raw} has none of the data set's files, but others: move them away")
    print(f"Downloading Fashion-MNIST to {raw} …", file=sys.stderr, flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as staging:
            FashionMNIST(staging, download=True)
            with contextlib.suppress(FileNotFoundError):
                target.rmdir()  # an empty one would be in the way on Windows
            os.rename(Path(staging, "FashionMNIST", "raw"), target)
    except Exception as error:  # a proxy or a disk can fail in almost any way
        if all((raw / name).exists() for name in FILES):  # another script was faster
            return
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"no Fashion-MNIST in {raw}, and the download failed ({reason}): apt-get install"
            " dataset-fashion-mnist, or put the four files (train-*, t10k-*, .gz or not) there"
        ) from error


def read_idx(path):
    """Return the bytes in a file of the MNIST family (IDX), plain or gzipped, as a uint8 tensor.

    Raises UserError if it is damaged.
    """
    content = read_bytes(path)
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if content[:3] != b"\0\0\x08" or content[3] > 3:
            raise ValueError("it does not begin as such a file does")
        dimensions = content[3]
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
    except (EOFError, IndexError, OSError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error})") from error
    start, size = 4 + 4 * dimensions, math.prod(shape)
    if len(content) - start != size or size == 0:
        found = f"{len(content) - start:,} bytes for a shape of {list(shape)}"
        raise UserError(f"{path} is damaged ({found})")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].view(shape)


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
NETWORKS = {"conv": "ConvVAE", "fc": "Fully connected VAE", "deep": "Deep ConvVAE"}
SCHEDULERS = ("constant", "plateau", "cosine")
SCHEDULER_HELP = "torch's, on train BCE + beta KLD or to 0 at --epochs"
# As options of train.py. A run made before a setting existed has its default.
SETTINGS = {
    "model": {"choices": [*NETWORKS], "default": "conv", "help": "fc: fully connected"},
    "latent_dim": {"type": between(int, 1, 4096), "default": 32, "help": "numbers in a code"},
    "batch_size": {"type": between(int, 1, LARGE), "default": 128, "help": "images per update"},
    "lr": {"type": between(float, 1e-12, 1e3), "default": 5e-4, "help": "learning rate of Adam"},
    "seed": {"type": COUNT, "default": 0, "help": "of all random draws"},
    "beta": {"type": WEIGHT, "default": 1.0, "help": "weight of the KLD"},
    "lr_scheduler": {"choices": SCHEDULERS, "default": "constant", "help": SCHEDULER_HELP},
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

LABELS = {"beta": "β {}", "lr_scheduler": "{}", "epochs": "{} epochs", "hold_out": "{} held out"}


class Run(NamedTuple):
    """A run as `read_run` finds it."""

    path: Path
    settings: dict  # a value for each of SETTINGS
    log: list  # a dict of LOG_COLUMNS for each finished epoch, losses in nats per image
    weights: dict | None  # a state_dict, or None where a published run comes without
    sha256: str | None  # its digest

    def __str__(self):
        epochs = f"epoch {len(self.log)} of {self.settings['epochs']}"
        return f"{self.path}: {self.describe(skip=['epochs'])}, {epochs}"

    def describe(self, skip=()):
        """Return the network and what else, `skip` apart, differs from the report's settings."""
        parts = [NETWORKS[self.settings["model"]]]
        for name, option in SETTINGS.items():
            value = self.settings[name]
            if name == "epochs" and len(self.log) < value:
                value = f"{len(self.log)} of {value}"
            if name not in ("model", "seed", "feature_run", *skip) and value != option["default"]:
                value = f"{value:g}" if isinstance(value, float) else value
                parts.append(LABELS.get(name, f"{name.replace('_', ' ')} {{}}").format(value))
        return ", ".join(parts)


def read_run(path):
    """Return the run in the folder `path`, from state.pth, or else from its published files.

    Raises UserError if there is none, or if it is damaged.
    """
    state = read(path / STATE, parse_state)
    if state:
        config, log, weights = state["config"], state["log"], state["model"]
    else:
        config, log = read(path / CONFIG, parse_config), read(path / LOG, parse_log)
        weights = read(path / WEIGHTS, parse_weights)
    if not config or not log:
        held = any((path / name).exists() for name in RUN_FILES)
        command = train_command({}, "runs/anew" if held else path)
        raise UserError(f"no run in {path} ({CONFIG} or {LOG} is missing): {command} makes one")
    return Run(path, settings_of(config), log, weights, digest(weights) if weights else None)


def read_classification(run):
    """Return what classify.py found for the weights of `run`, or None, with a remark.

    Epochs are compared, and the weights' digests where there are weights and a digest.
    """
    path = run.path / CLASSIFICATION
    try:
        result = read(path, parse_classification)
        problem = "is of other weights than the run has now" if result else "is missing"
    except UserError:
        result, problem = None, "is damaged"
    if result and result["epoch"] == len(run.log):
        sha256 = result.get("sha256")
        if sha256 is None or run.sha256 is None or sha256 == run.sha256:
            return result
    command = subprocess.list2cmdline(["python", "classify.py", "--run", str(run.path)])
    print(f"Remark: {path} {problem}: {command}", file=sys.stderr)
    return None


def train_command(settings, path):
    """Return the command that makes a run with these settings in the folder `path`."""
    words = ["python", "train.py", "--run", str(path)]
    for name, option in SETTINGS.items():
        if settings.get(name, option["default"]) != option["default"]:
            words += [f"--{name.replace('_', '-')}", str(settings[name])]
    return subprocess.list2cmdline(words)  # double quotes around spaces, as every shell wants


def read_bytes(path):
    """Return the bytes at `path`; what the system says if that fails names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        error.filename = str(path)
        raise


def read(path, parse):
    """Return what `parse` makes of the bytes at `path`, or None if there is no such file.

    Raises UserError if they are damaged. What the system says, as that a network drive is away,
    is no damage, and passes as it is.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        return parse(content)
    except Exception as error:  # damaged bytes can raise almost anything
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UserError(f"{path}: not enough memory to read it") from error
        raise UserError(f"{path} is damaged ({type(error).__name__})") from error


def parse_tensors(content):
    """Return the dict in a file of torch.save, running no code in it."""
    file = io.BytesIO(content)
    if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
        raise ValueError("a checksum is wrong")  # at which torch.load does not look
    file.seek(0)
    return dict(torch.load(file, map_location="cpu", weights_only=True))


def parse_state(content):
    state = parse_tensors(content)
    settings_of(state["config"])
    check_log(state["log"])
    digest(state["model"])
    return state


def parse_weights(content):
    weights = parse_tensors(content)
    digest(weights)
    return weights


def parse_config(content):
    config = json.loads(content)
    settings_of(config)
    return config


def parse_classification(content):
    result = json.loads(content)
    int(result["epoch"]), float(result["accuracy"])
    if [len(row) for row in result["confusion_matrix"]] != [len(CLASSES)] * len(CLASSES):
        raise ValueError("not a row and a column a class")
    return result


def parse_log(content):
    lines = csv.DictReader(io.StringIO(content.decode()))
    rows = [{column: float(line[column]) for column in LOG_COLUMNS} for line in lines]
    for row in rows:
        row["epoch"] = int(row["epoch"])
    check_log(rows)
    return rows


def check_log(rows):
    """Raise ValueError unless there is a row of finite numbers for each epoch from 1 on."""
    if not rows or [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
        raise ValueError("epochs missing or out of order")
    if not all(math.isfinite(row[column]) for row in rows for column in LOG_COLUMNS):
        raise ValueError("a number is not finite")


def settings_of(config):
    """Return the settings in a config; ValueError where one is impossible."""
    settings = {name: config.get(name, option["default"]) for name, option in SETTINGS.items()}
    settings["epochs"] = config["epochs"]  # which every run has had
    for name, option in SETTINGS.items():
        value = settings[name]
        possible = option.get("choices") or [option["type"](str(value))]
        if value not in possible:
            raise ValueError(f"{name} cannot be {value}")
    return settings


def digest(weights):
    """Return the SHA-256 of what is in a state_dict, whatever file it was in."""
    if not weights:
        raise ValueError("no weights")
    sha = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def write(path, content):
    """Write `content` to `path` in the format of its suffix, whole or not at all.

    .pth: what torch.save takes; .json: what json.dumps takes; .csv: a loss log; .png: a figure.
    Return the SHA-256 of the file; raise UserError if it cannot be written.
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
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                synchronize(file)
            replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return sha256(buffer.getbuffer())


def synchronize(file):
    """Have the disk keep a file, if its file system can: some of a network's refuse."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def replace(source, target):
    """Put a file in another's place; on Windows a scanner may hold the other for a moment."""
    for _ in range(8):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.2)
    os.replace(source, target)


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
    return parser


def run_script(main, when_interrupted):
    """Call `main`; an expected failure ends in one line on standard error, not a traceback."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):  # as with pythonw, or after `>&-`
            setattr(sys, name, io.StringIO())
        elif hasattr(stream, "reconfigure"):  # not a notebook's
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # Windows lacks μ, −
    try:
        main()
    except KeyboardInterrupt:
        print(f"Interrupted: {when_interrupted}.", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
