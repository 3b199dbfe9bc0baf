"""What lies on disk, and what the scripts share.

Four sections: the data set, a picture of one's own, the files of a run, and the command line with
its errors.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import math
import os
import secrets
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.datasets import FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.transforms.functional import pil_to_tensor


class UserError(Exception):
    """A failure that the user can resolve. Its text is printed as one line, without a traceback."""


# --- The data set -------------------------------------------------------------------------

# The names of the labels 0, 1, 2, … Another data set needs its own names here: no two may be equal,
# and matplotlib's font must have their letters. The figures have ten colors, so they can tell ten
# classes apart.
CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
DEFAULT_ROOT = Path("data/fashion-mnist")
DEBIAN_PACKAGE = Path("/usr/share/datasets/fashion-mnist")
# SHA-256 of all pixels and labels of Fashion-MNIST, as load_splits computes it.
FASHION_MNIST_SHA256 = "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f"


def load_splits(root, hold_out=0):
    """Return the two splits of Fashion-MNIST (Xiao et al., 2017), and the checksum of both.

    The result is ((train_images, train_labels), (test_images, test_labels)), sha256. Images are
    [N, 1, 28, 28] float32 in [0, 1], the gray value divided by 255. Labels are [N] int64, indices
    into CLASSES. The checksum is the SHA-256 of all pixels and labels.

    The four files are read from `root`/FashionMNIST/raw. If `root` has no files, Fashion-MNIST is
    fetched. With `hold_out`, the last `hold_out` training images take the place of the test set.
    Prints how many images there are. Raises UserError if the data cannot be read or fetched, or if
    there are not enough training images for `hold_out`.
    """
    root = Path(root)
    raw = root / "FashionMNIST" / "raw"
    if not has_files(root):
        fetch(root)
    checksum = hashlib.sha256()
    splits = []
    try:
        for prefix in ("train", "t10k"):
            pixels = read_image_file(raw / f"{prefix}-images-idx3-ubyte")
            labels = read_label_file(raw / f"{prefix}-labels-idx1-ubyte")
            check_split(pixels, labels)
            checksum.update(pixels.numpy().tobytes())
            checksum.update(labels.byte().numpy().tobytes())
            splits.append((pixels.unsqueeze(1).float().div_(255), labels))
    except Exception as error:  # damaged files can cause almost any error
        raise UserError(
            f"The four files of Fashion-MNIST cannot be read from {raw} ({reason(error)}). They "
            "must be unpacked (no .gz). Nothing is downloaded into a folder that has files."
        ) from error
    sha256 = checksum.hexdigest()

    if hold_out:
        images, labels = splits[0]
        if hold_out >= len(images):
            raise UserError(
                f"--hold-out {hold_out} leaves no images to train on: {raw} has {len(images):,}."
            )
        splits = [
            (images[:-hold_out], labels[:-hold_out]),
            (images[-hold_out:], labels[-hold_out:]),
        ]
    counts = [f"{len(labels):,}" for _, labels in splits]
    remark = "" if sha256 == FASHION_MNIST_SHA256 else " (not Fashion-MNIST)"
    print(f"{counts[0]} training and {counts[1]} test images from {raw}{remark}", flush=True)
    return splits, sha256


def has_files(root):
    """Return whether a folder has a file or a symbolic link, at any depth."""
    for folder, subfolders, files in os.walk(root):
        # A fetch that was killed leaves a folder behind, which does not count. os.walk visits only
        # the subfolders that remain in this list.
        subfolders[:] = [name for name in subfolders if not name.startswith(".fetch-")]
        if files or any(Path(folder, name).is_symlink() for name in subfolders):
            return True
    return False


def fetch(root):
    """Fill a folder without files with Fashion-MNIST, completely or not at all.

    The files come from Debian's package dataset-fashion-mnist if it is installed, otherwise from
    torchvision's download. Raises UserError if this fails, or if the folder does not exist and is
    not the default one.
    """
    if root != DEFAULT_ROOT and not root.is_dir():
        raise UserError(f"There is no folder {root}. To fetch Fashion-MNIST into it, create it.")
    raw = root / "FashionMNIST" / "raw"
    print(f"Fetching Fashion-MNIST into {raw} …", file=sys.stderr, flush=True)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as temporary:
            fetched = Path(temporary, "FashionMNIST", "raw")
            fetched.mkdir(parents=True)
            for archive in DEBIAN_PACKAGE.glob("*.gz"):
                (fetched / archive.stem).write_bytes(gzip.decompress(archive.read_bytes()))
            # If all four are there, torchvision downloads nothing.
            FashionMNIST(temporary, download=True)
            raw.parent.mkdir(exist_ok=True)
            try:
                fetched.rename(raw)
            except OSError:
                # If raw has files by now, another script was faster, and we read its files.
                if not has_files(raw):
                    raise
    except Exception as error:  # a disk, a proxy or an archive can fail in almost any way
        raise UserError(
            f"Fashion-MNIST cannot be fetched into {raw} ({reason(error)}). Put the four unpacked "
            "files there, or run: apt-get install dataset-fashion-mnist"
        ) from error


def check_split(images, labels):
    """Raise ValueError unless images are [N, 28, 28], and labels [N] are indices into CLASSES."""
    if images.shape != (len(labels), 28, 28):
        raise ValueError(f"images {list(images.shape)} for {len(labels)} labels, not [N, 28, 28]")
    if labels.max() >= len(CLASSES):
        raise ValueError(f"a label is {labels.max()}, but there are {len(CLASSES)} classes")


# --- A picture of one's own ---------------------------------------------------------------


def read_picture(path):
    """Return a photo of a piece of clothing as an image like those of Fashion-MNIST.

    The picture shows one object on a plain background, and the object does not touch the border.
    All of the object is darker than the background, or all of it is brighter. The light may fall
    off evenly from one side to the other. What cannot be told from the object is taken for a part
    of it: a frame, text, a shadow, a vignette. Parts that are as bright as the background are lost.
    The result is [1, 1, 28, 28] float32 in [0, 1]: the object is bright on black, and its longer
    side has 28 pixels.

    Fashion-MNIST was made from photos on white (Xiao et al., 2017, section 2). They were trimmed to
    what differed by 5 % from the corner pixels in RGB, reduced to 28 pixels by leaving out rows and
    columns, sharpened, padded, negated, and converted to gray. We convert to gray first, compare
    with a background that may change between the corners, average when we reduce, and do not
    sharpen.

    Raises ValueError if the file cannot be read as a picture, or if the object hardly differs from
    its background.
    """
    gray = read_gray(path)

    # The background changes evenly between the four corners. Specks and noise hardly move a median.
    height = max(1, gray.shape[0] // 20)
    width = max(1, gray.shape[1] // 20)
    corners = torch.tensor(
        [
            [gray[:height, :width].median(), gray[:height, -width:].median()],
            [gray[-height:, :width].median(), gray[-height:, -width:].median()],
        ]
    )
    background = F.interpolate(
        corners[None, None], gray.shape, mode="bilinear", align_corners=True
    )[0, 0]

    # The object is darker than the background, as in a shop's photo, or brighter. In a small
    # picture noise averages out, so the larger deviation there is that of the object.
    darkness = background - gray
    small = reduce(darkness, 112)
    if -small.min() > small.max():
        darkness = -darkness
        background = 255 - background
    # The background becomes 0, and a black object on white 1. Nothing is divided by a black
    # background, which is 0.
    image = darkness / background.clamp(min=1)

    # Trim twice: first roughly, in a picture with four pixels for each of the result's 28, where
    # noise averages out, and then more precisely.
    for side in (112, 224):
        small = reduce(image, side)
        step = max(image.shape) / max(small.shape)
        top, bottom, left, right = find_object(small)
        image = image[
            math.floor(top * step) : math.ceil(bottom * step),
            math.floor(left * step) : math.ceil(right * step),
        ]

    # Scale the longer side to 28 pixels, and pad the shorter one to a square.
    image = resize(image, 28)
    if image.max() < 0.1:
        raise ValueError(f"{path}: the object hardly differs from its background")
    height, width = image.shape
    top = (28 - height) // 2
    left = (28 - width) // 2
    image = F.pad(image, (left, 28 - width - left, top, 28 - height - top))
    return image.clamp(0, 1)[None, None]


def read_gray(path):
    """Return the gray values of a picture, [H, W] float32 from 0 to 255.

    Raises ValueError if it cannot be read.
    """
    # For some other formats, Pillow starts another program, such as Ghostscript.
    formats = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]
    try:
        with Image.open(path, formats=formats) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):  # gray values of 16 bits: 65535 = 257 * 255
                return pil_to_tensor(picture)[0].float() / 257
            picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        flat = Image.alpha_composite(white, picture)  # transparent pixels become white
        return pil_to_tensor(flat.convert("L"))[0].float()
    except Exception as error:  # a damaged file can cause almost any error
        raise ValueError(
            f"{path} cannot be read as a picture ({reason(error)}). Save it as PNG or JPEG, with "
            "at most 178 million pixels."
        ) from error


def find_object(image):
    """Return top, bottom, left and right of the object in an image [H, W].

    The object is image[top:bottom, left:right]. Without an object, this is the whole image.
    """
    # As for Fashion-MNIST, the object differs from the background by more than 5 %. Where it fills
    # less than 1 % of a row or column, it is a speck.
    is_object = image > 0.05
    rows = (is_object.float().mean(dim=1) > 0.01).nonzero()
    columns = (is_object.float().mean(dim=0) > 0.01).nonzero()
    if len(rows) == 0 or len(columns) == 0:
        return 0, image.shape[0], 0, image.shape[1]
    return rows.min().item(), rows.max().item() + 1, columns.min().item(), columns.max().item() + 1


def reduce(image, side):
    """Return an image [H, W] with at most `side` pixels on its longer side."""
    return resize(image, min(side, max(image.shape)))


def resize(image, side):
    """Return an image [H, W] with `side` pixels on its longer side. Pixels are averaged."""
    factor = side / max(image.shape)
    height, width = (max(1, round(factor * length)) for length in image.shape)
    return F.interpolate(image[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]


# --- The files of a run -------------------------------------------------------------------

# train.py writes the first four, and reads the first one to resume.
STATE = "state.pth"
CONFIG = "config.json"
LOG = "losses.csv"
WEIGHTS = "convvae_fashionmnist.pth"
CLASSIFICATION = "classification.json"  # written by classify.py
BASELINES = "baselines.json"  # written by classify.py --baselines


@dataclass
class Run:
    """A run, as train.py has saved it in a folder."""

    path: Path
    config: dict  # the options of train.py, the checksum of the data, version of torch, device
    log: list  # a dict for each finished epoch, with the columns of losses.csv

    def __str__(self):
        network = f"network {self.config['model']}, {self.config['latent_dim']} latent dimensions"
        return f"{self.path}: {network}, epoch {len(self.log)} of {self.config['epochs']}"


def read_run(path):
    """Return the Run in a folder. Raises UserError if there is none, or if a file is damaged."""
    path = Path(os.path.expanduser(path))
    if not (path / CONFIG).exists():
        raise UserError(f"There is no run in {path}. To train one: python train.py --run {path}")
    return Run(path, read(path / CONFIG, parse_config), read(path / LOG, parse_log))


def load_run_data(run, root):
    """Return the training and the test split of a Run, as in `load_splits`, from `root`.

    Raises UserError if the data in `root` are not those on which the run was trained.
    """
    splits, sha256 = load_splits(root, run.config["hold_out"])
    if sha256 != run.config["data_sha256"]:
        raise UserError(
            f"{run.path} was not trained on the data in {root}. Give the folder of its data with "
            "--data."
        )
    return splits


def current_classification(run):
    """Return the content of classification.json if it was measured after the last epoch of `run`.

    Otherwise return None and print a warning. Raises UserError if the file is damaged.
    """
    path = run.path / CLASSIFICATION
    if not path.exists():
        problem = "is missing"
    else:
        classification = read(path, parse_classification)
        if classification["epoch"] == len(run.log):
            return classification
        problem = f"is from epoch {classification['epoch']}, but the run has {len(run.log)} epochs"
    print(
        f"Warning: {path} {problem}. To write it: python classify.py --run {run.path}",
        file=sys.stderr,
    )
    return None


def read(path, parse):
    """Return `parse(content)` for the bytes of a file.

    If this fails, raise UserError with the name of the file. A UserError of `parse` stays as it is.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return parse(content)
    except UserError:
        raise
    except Exception as error:  # damaged bytes can cause almost any error
        raise UserError(f"{path} cannot be used ({reason(error)}).") from error


def write_bytes(path, content):
    """Write a file completely or not at all. Raises UserError if it cannot be written."""
    # Two containers that share a disk can have equal process numbers, so the name is random.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)  # it is only there if something went wrong


def json_bytes(value):
    """Return a value as the content of a JSON file."""
    return f"{json.dumps(value, indent=1)}\n".encode()


def parse_config(content):
    """Return the content of config.json."""
    config = json.loads(content)
    for name in ("model", "latent_dim", "seed", "epochs", "hold_out", "data_sha256"):
        if name not in config:
            raise ValueError(f"{name} is missing")
    return config


def parse_classification(content):
    """Return the content of classification.json."""
    classification = json.loads(content)
    for name in ("epoch", "accuracy", "recall", "confusion_matrix"):
        if name not in classification:
            raise ValueError(f"{name} is missing")
    return classification


def log_bytes(log):
    """Return a loss log, a list of dicts with equal keys, as the content of a CSV file."""
    lines = [",".join(log[0])]
    for row in log:
        lines.append(",".join(str(value) for value in row.values()))
    return ("\n".join(lines) + "\n").encode()


def parse_log(content):
    """Return the rows of losses.csv as dicts of numbers."""
    log = []
    for row in csv.DictReader(content.decode().splitlines()):
        log.append({name: float(value) for name, value in row.items()})
    if not log:
        raise ValueError("it has no rows")
    losses = ("train_loss", "train_bce", "train_kld", "test_loss", "test_bce", "test_kld")
    for name in ("epoch", *losses):
        if name not in log[0]:
            raise ValueError(f"the column {name} is missing")
    return log


def tensor_bytes(value):
    """Return a value with tensors as the content of a file of torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def parse_tensors(content):
    """Return what torch.save wrote, with all tensors on the CPU. Code in the file is not run."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


# --- The command line and its errors ------------------------------------------------------


def command_line(description):
    """Return an argument parser, and its group of the options that all three scripts share."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=description)
    group = parser.add_argument_group("run and data")
    group.add_argument(
        "--run",
        type=folder,
        metavar="DIR",
        default=Path("runs/convvae"),
        help="folder of the run (default: %(default)s)",
    )
    group.add_argument(
        "--data",
        type=folder,
        metavar="DIR",
        default=DEFAULT_ROOT,
        help="folder of the data set, with the four unpacked files in FashionMNIST/raw. If it has "
        "no files, Fashion-MNIST is fetched into it. (default: %(default)s)",
    )
    return parser, group


def folder(text):
    """Return the folder of an option. Shells do not expand the ~ in --run=~/x."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder must not be empty")
    return Path(os.path.expanduser(text))


def positive_int(text):
    """Return the positive integer of an option. argparse prints the errors."""
    value = int(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be from 1 to {2**31 - 1}")
    return value


def run_script(main, when_interrupted):
    """Call `main`. An expected failure ends in one line on standard error, not in a traceback.

    `when_interrupted` is printed after Ctrl-C. It says what was kept.
    """
    try:
        main()
    except KeyboardInterrupt:
        print(f"Interrupted. {when_interrupted}", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def reason(error):
    """Return the type of an error and the first sentence of its message, at most 200 characters.

    PyTorch's messages may go on with advice that would let code in a file run.
    """
    text = type(error).__name__
    first_sentence = " ".join(str(error).split()).partition(". ")[0]
    if first_sentence:
        text = f"{text}: {first_sentence}"
    return textwrap.shorten(text, width=200, placeholder=" …")
