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
import subprocess
import sys
import tempfile
import time
import zipfile
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


# --- Fashion-MNIST ------------------------------------------------------------------------


def load_splits(root, hold_out=0):
    """Return (images, labels) of the training and of the test split of Fashion-MNIST (Xiao et al.,
    2017), or of others in its format. Images are [N, 1, 28, 28] float32 in [0, 1], the grey value
    over 255, labels [N] int64 in 0 to 9; N is 60,000 and 10,000. With `hold_out` the last so many
    training images are the test set. UserError if they are damaged, not to be had, or too few."""
    paths = find_files(root)
    arrays = [read(path, parse_idx) for path in paths]
    splits = []
    for path, images, labels in zip(paths[::2], arrays[::2], arrays[1::2]):
        if labels.dim() != 1 or images.shape != (len(labels), 28, 28) or labels.max() > 9:
            shapes = f"{list(images.shape)} and {list(labels.shape)}, up to {labels.max()}"
            raise UserError(f"{path} and its labels are {shapes}, not [N, 28, 28] and [N], up to 9")
        splits.append((images.unsqueeze(1).float().div_(255), labels.long()))
    if hold_out:
        images, labels = splits[0]
        parts = slice(-hold_out), slice(-hold_out, None)
        splits = [(images[part], labels[part]) for part in parts]
    known = sha256(b"".join(array.numpy() for array in arrays)) == SHA256
    counts = [len(labels) for _, labels in splits]
    found = f"{counts[0]:,} training and {counts[1]:,} test images from {paths[0].parent}"
    if min(counts) < 10:
        raise UserError(f"--hold-out {hold_out} gives {found}, but ten of each are needed")
    print(found if known else f"{found} (Remark: they are not Fashion-MNIST's.)", flush=True)
    return splits


def find_files(root):
    """Return the paths of the data set's four files, which are downloaded if there are none. They
    are those of the first place that has any: torchvision's folder in `root`, `root` itself,
    Debian's package. UserError if that place lacks some, for two places are never mixed."""
    raw = Path(root, "FashionMNIST", "raw")
    for place in (raw, Path(root), DEBIAN_PACKAGE):
        paths = []
        for name in FILES:
            dotted = name.replace("-idx", ".idx")  # as Kaggle and 7-Zip name it
            forms = (place / form for form in (name, dotted, f"{name}.gz", f"{dotted}.gz"))
            paths.append(next(filter(Path.is_file, forms), None))
        if all(paths):
            return paths
        if any(paths):
            missing = ", ".join(name for name, path in zip(FILES, paths) if not path)
            raise UserError(f"{place} has some files of the data set, but not {missing}")
    download(raw)
    return [raw / name for name in FILES]


def download(raw):
    """Let torchvision download and check the data set into the folder `raw`, whole or not at all.
    UserError, with other ways to have it, if that fails."""
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
        if not all((raw / name).exists() for name in FILES):  # by another script, which was faster
            problem = f"no Fashion-MNIST in {raw}, and the download failed ({reason(error)})"
            advice = "apt-get install dataset-fashion-mnist, or put the four files there"
            raise UserError(f"{problem}: {advice}") from error


def parse_idx(content):
    """Return what a file of the MNIST family (IDX), gzipped or not, holds, as a uint8 tensor."""
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:3] != b"\0\0\x08":
        raise ValueError("it does not begin as such a file does")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[k : k + 4], "big") for k in range(4, start, 4)]
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


# --- A run: its settings ------------------------------------------------------------------


def between(kind, low, high):
    """Return an argparse type: a `kind` (int or float) from `low` to `high`."""

    def number(text):  # argparse: "invalid number value: 'ten'"
        if low <= kind(text) <= high:  # which NaN is not
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")

    return number


LARGE = 2**31 - 1
COUNT, WEIGHT = between(int, 0, LARGE), between(float, 0, 1e6)
NETWORKS = {"conv": "ConvVAE", "fc": "Fully connected VAE", "deep": "Deep ConvVAE"}
# As options of train.py. A run made before a setting existed has its default.
SETTINGS = {
    "model": {"choices": [*NETWORKS], "default": "conv", "help": "fc: fully connected"},
    "latent_dim": {"type": between(int, 1, 4096), "default": 32, "help": "numbers in a code"},
    "batch_size": {"type": between(int, 1, LARGE), "default": 128, "help": "images per update"},
    "lr": {"type": between(float, 1e-12, 1e3), "default": 5e-4, "help": "learning rate of Adam"},
    "seed": {"type": COUNT, "default": 0, "help": "of all random draws"},
    "beta": {"type": WEIGHT, "default": 1.0, "help": "weight of the KLD"},
    "lr_scheduler": {
        "choices": ("constant", "plateau", "cosine"),
        "default": "constant",
        "help": "plateau: a tenth after ten epochs without progress; cosine: to 0 at --epochs",
    },
    "hold_out": {"type": COUNT, "default": 0, "help": "last train images, to be the test set"},
    "feature_weight": {"type": WEIGHT, "default": 0.0, "help": "of features in the loss"},
    "feature_run": {"type": str, "default": "", "help": "run whose encoder gives those features"},
    "epochs": {"type": between(int, 1, LARGE), "default": 100, "help": "in all"},
}
LABELS = {"beta": "β {}", "lr_scheduler": "{}", "epochs": "{} epochs", "hold_out": "{} held out"}


class Run(NamedTuple):
    """A run as `read_run` finds it."""

    path: Path
    settings: dict  # a value for each of SETTINGS, and where it was made
    log: list  # a dict of LOG_COLUMNS for each finished epoch, losses in nats per image
    weights: dict | None  # a state_dict, or None where a published run comes without
    moments: dict | None  # Adam's, or None where a published run comes without

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


def train_command(settings, path):
    """Return the command that makes a run with these settings in the folder `path`."""
    words = ["python", "train.py", "--run", str(path)]
    for name, option in SETTINGS.items():
        if settings.get(name, option["default"]) != option["default"]:
            words += [f"--{name.replace('_', '-')}", str(settings[name])]
    return subprocess.list2cmdline(words)  # double quotes around spaces, as every shell wants


# --- A run: its files ---------------------------------------------------------------------

STATE = "state.pth"  # the run itself; the next three are views of it
CONFIG = "config.json"
WEIGHTS = "convvae_fashionmnist.pth"
LOG = "losses.csv"
CLASSIFICATION = "classification.json"
RUN_FILES = (STATE, CONFIG, WEIGHTS, LOG, CLASSIFICATION)

LOSSES = [f"{split}_{loss}" for split in ("train", "test") for loss in ("loss", "bce", "kld")]
LOG_COLUMNS = ["epoch", *LOSSES, "lr", "seconds"]


def read_run(path):
    """Return the run in `path`, from state.pth, or else its views; UserError if none or damaged."""
    state = read(path / STATE, parse_state)
    if state:
        return Run(path, *state)
    config, log = read(path / CONFIG, parse_config), read(path / LOG, parse_log)
    if not config or not log:
        held = any((path / name).exists() for name in RUN_FILES)
        command = train_command({}, "runs/anew" if held else path)
        raise UserError(f"no run in {path} ({CONFIG} or {LOG} is missing): {command} makes one")
    return Run(path, config, log, read(path / WEIGHTS, parse_weights), None)


def read_classification(run):
    """Return what classify.py found for the weights of `run`, or None, with a remark. Epochs are
    compared, and the weights' digests where there are weights and a digest."""
    path = run.path / CLASSIFICATION
    result, problem = read(path, parse_classification), "is missing or damaged"
    if result:
        digests = {result.get("sha256"), run.weights and digest(run.weights)} - {None}
        if result["epoch"] == len(run.log) and len(digests) < 2:
            return result
        problem = "is of other weights than the run has now"
    command = subprocess.list2cmdline(["python", "classify.py", "--run", str(run.path)])
    print(f"Remark: {path} {problem}: {command}", file=sys.stderr)
    return None


def read(path, parse):
    """Return what `parse` makes of the bytes at `path`, None if there is no such file. UserError if
    they are damaged; what the system says, as that a network drive is away, passes as it is."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        error.filename = str(path)  # which not every one of them names
        raise
    try:
        return parse(content)
    except Exception as error:  # damaged bytes can raise almost anything
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UserError(f"{path}: not enough memory to read it") from error
        raise UserError(f"{path} is damaged ({reason(error)})") from error


def parse_state(content):
    state = parse_weights(content)
    config, log = check_config(state["config"]), check_log(state["log"])
    return config, log, state["model"], state.get("optimizer")


def parse_weights(content):
    """Return the dict in a file of torch.save; code in it is not run."""
    file = io.BytesIO(content)
    if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
        raise ValueError("a checksum is wrong")  # at which torch.load does not look
    file.seek(0)
    return dict(torch.load(file, map_location="cpu", weights_only=True))


def parse_config(content):
    return check_config(json.loads(content))


def parse_log(content):
    return check_log(csv.DictReader(content.decode("utf-8-sig").splitlines()))


def parse_classification(content):
    """Return what classify.py wrote, or None if it is damaged, for it can be found again."""
    with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        result = json.loads(content)
        matrix = torch.tensor(result["confusion_matrix"])
        numbers = torch.tensor([result["epoch"], result["accuracy"]])
        whole = matrix.shape == (len(CLASSES), len(CLASSES)) and matrix.dtype == torch.int64
        if whole and numbers.isfinite().all() and isinstance(result.get("sha256"), str | None):
            return result
    return None


def check_config(config):
    """Return a config with a value for each setting; ValueError where one is impossible."""
    defaults = {name: option["default"] for name, option in SETTINGS.items() if name != "epochs"}
    config = {**defaults, **config}
    for name, option in SETTINGS.items():
        possible = option.get("choices") or [option["type"](str(config[name]))]
        if config[name] not in possible:
            raise ValueError(f"{name} cannot be {config[name]}")
    return config


def check_log(lines):
    """Return the rows of a loss log as numbers; ValueError if one is missing or not finite."""
    rows = [{column: float(line[column]) for column in LOG_COLUMNS} for line in lines]
    for epoch, row in enumerate(rows, start=1):
        if row["epoch"] != epoch or not all(map(math.isfinite, row.values())):
            raise ValueError("epochs out of order, or a number that is not finite")
        row["epoch"] = epoch  # an int
    if not rows:
        raise ValueError("no epoch")
    return rows


def digest(weights):
    """Return the SHA-256 of what is in a state_dict, whatever file it was in."""
    sha = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def write(path, content):
    """Write `content` to `path` whole or not at all: to .pth what torch.save takes, to .json what
    json.dumps takes, to .csv a loss log, to .png a figure. Return the file's SHA-256; UserError if
    it cannot be written."""
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
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:  # the file systems of some networks cannot
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                    raise
        replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return sha256(buffer.getbuffer())


def replace(source, target):
    """Put a file in another's place; on Windows a scanner may hold the other for a moment."""
    for _ in range(8):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.2)
    os.replace(source, target)


# --- The command line ---------------------------------------------------------------------


def command_line(description):
    """Return a parser with the options that the three scripts share."""
    with_defaults = argparse.ArgumentDefaultsHelpFormatter
    one_line = argparse.SUPPRESS  # instead of a complaint below the whole usage
    parser = argparse.ArgumentParser(None, one_line, description, formatter_class=with_defaults)
    parser.add_argument("--run", type=Path, default="runs/convvae", help="folder of the run")
    data_help = "folder of Fashion-MNIST, which is fetched if it is not there"
    parser.add_argument("--data", type=Path, default="data/fashion-mnist", help=data_help)
    return parser


def run_script(main, when_interrupted):
    """Call `main`; an expected failure ends in one line on standard error, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # unlike a notebook's, or None, as with pythonw or `>&-`
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # Windows lacks μ, −
    try:
        main()
    except KeyboardInterrupt:
        print(f"Interrupted: {when_interrupted}.", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def reason(error):
    """Return the first sentence of what an error says, or its type if it says nothing."""
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
