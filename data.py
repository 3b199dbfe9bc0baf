"""Fashion-MNIST as tensors, and what the scripts share: options, writing a file, errors."""

import argparse
import gzip
import hashlib
import json
import os
import sys
import tempfile
import textwrap
from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.datasets import FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.transforms.functional import pil_to_tensor

# The names of the labels 0, 1, 2, … Another data set needs its own names here, in letters that
# matplotlib's font has. The figures have ten colors, so they can tell ten classes apart.
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


class UserError(Exception):
    """A failure that the user can resolve. Its text is printed as one line, without a traceback."""


# --- Fashion-MNIST ------------------------------------------------------------------------


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
        for name in ("train", "t10k"):
            pixels = read_image_file(raw / f"{name}-images-idx3-ubyte")
            labels = read_label_file(raw / f"{name}-labels-idx1-ubyte")
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
    name = "" if sha256 == FASHION_MNIST_SHA256 else " (not Fashion-MNIST)"
    print(f"{counts[0]} training and {counts[1]} test images from {raw}{name}", flush=True)
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
            # This downloads only what is not there yet, and fails if a file is still missing.
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


def read_picture(path):
    """Return a picture of a piece of clothing as an image like those of Fashion-MNIST.

    The picture shows one object on a plain, evenly lit background, which may be light or dark. The
    result is [1, 1, 28, 28] float32 in [0, 1]: the object is bright on black, and its longer side
    has 28 pixels. This is how Fashion-MNIST was made (Xiao et al., 2017, section 2), except that we
    do not sharpen. Raises OSError if the file is not a picture, and ValueError if it shows no
    object.
    """
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith("I"):  # gray values of 16 bits
        gray = pil_to_tensor(picture)[0].float() / 257
    else:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        flat = Image.alpha_composite(white, picture)  # transparent pixels become white
        gray = pil_to_tensor(flat.convert("L"))[0].float()

    # The top left corner shows the background. Make it white, as in a shop's photo.
    if gray[0, 0] < 128:
        gray = 255 - gray
    gray = (gray * (255 / gray[0, 0])).clamp(max=255)

    # Trim to the pixels that differ from the background by more than 5 %.
    is_object = gray < 0.95 * 255
    if not is_object.any():
        raise ValueError(f"{path} shows no object: all of it looks like its top left corner")
    rows = is_object.any(dim=1).nonzero()
    columns = is_object.any(dim=0).nonzero()
    gray = gray[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]

    # Scale the longer side to 28 pixels, pad the shorter one to a square, and negate.
    scale = 28 / max(gray.shape)
    height, width = (max(1, round(scale * side)) for side in gray.shape)
    image = F.interpolate(gray[None, None], (height, width), mode="bilinear", antialias=True)
    top = (28 - height) // 2
    left = (28 - width) // 2
    image = F.pad(image, (left, 28 - width - left, top, 28 - height - top), value=255)
    return (1 - image / 255).clamp(0, 1)


# --- Writing files ------------------------------------------------------------------------


def write_bytes(path, content):
    """Write a file completely or not at all. Raises UserError if it cannot be written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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


# --- The command line ---------------------------------------------------------------------


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
