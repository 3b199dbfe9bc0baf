"""Fashion-MNIST as tensors, reading and writing files, and the scripts' command line."""

import argparse
import contextlib
import errno
import gzip
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

# The names of the labels 0, 1, 2, … Another data set in the same format needs its own names here.
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
FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
DEFAULT_ROOT = Path("data/fashion-mnist")
DEBIAN_PACKAGE = Path("/usr/share/datasets/fashion-mnist")
# SHA-256 of the pixels and labels of Fashion-MNIST, in the order of FILES. Do not change it for
# another data set: runs saved before checksums were added count as trained on Fashion-MNIST.
FASHION_MNIST_SHA256 = "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f"


class UserError(Exception):
    """A failure that the user can resolve. Its text is printed as one line, without a traceback."""


# --- Fashion-MNIST ------------------------------------------------------------------------


class Dataset(NamedTuple):
    """The content of the four files. N is 60,000 and M is 10,000 for Fashion-MNIST."""

    folder: Path  # where the files are
    train_images: torch.Tensor  # uint8 [N, 28, 28], gray values from 0 (black) to 255
    train_labels: torch.Tensor  # uint8 [N], 0 to 9, an index into CLASSES
    test_images: torch.Tensor  # uint8 [M, 28, 28]
    test_labels: torch.Tensor  # uint8 [M], 0 to 9
    sha256: str  # of all pixels and labels


def load_splits(root, hold_out=0):
    """Return the training and the test split of Fashion-MNIST (Xiao et al., 2017).

    See `find_files` for where the files are looked for, and `make_splits` for what is returned.
    """
    return make_splits(read_dataset(root), hold_out)


def read_dataset(root):
    """Read the four files of Fashion-MNIST, or of another data set in the same format.

    If they are found nowhere, they are downloaded into `root`/FashionMNIST/raw (see `find_files`).
    Raises UserError if a file is missing or damaged, or if the download fails.
    """
    paths = find_files(root)
    arrays = [read_idx(path) for path in paths]
    train_images, train_labels, test_images, test_labels = arrays
    check_images_and_labels(paths[0], train_images, train_labels)
    check_images_and_labels(paths[2], test_images, test_labels)
    if train_images.max() <= 1:
        print(
            f"Warning: the brightest pixel in {paths[0]} has the gray value {train_images.max()}, "
            "but white is 255. "
            "Were the gray values already divided by 255?",
            file=sys.stderr,
        )
    content = b"".join(array.numpy().tobytes() for array in arrays)
    return Dataset(
        folder=paths[0].parent,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        sha256=sha256(content),
    )


def make_splits(dataset, hold_out=0):
    """Return (train_images, train_labels), (test_images, test_labels) of a Dataset.

    Images are [N, 1, 28, 28] float32 in [0, 1], the gray value divided by 255. Labels are [N]
    int64. With `hold_out`, the last `hold_out` training images take the place of the test set.
    Prints how many images there are. Raises UserError if a split has fewer than ten.
    """
    train_images = dataset.train_images.unsqueeze(1).float().div_(255)
    train_labels = dataset.train_labels.long()
    if hold_out:
        test_images = train_images[-hold_out:]
        test_labels = train_labels[-hold_out:]
        train_images = train_images[:-hold_out]
        train_labels = train_labels[:-hold_out]
    else:
        test_images = dataset.test_images.unsqueeze(1).float().div_(255)
        test_labels = dataset.test_labels.long()
    counts = f"{len(train_images):,} training and {len(test_images):,} test images"
    if len(train_images) < 10 or len(test_images) < 10:
        with_hold_out = f" with --hold-out {hold_out}" if hold_out else ""
        raise UserError(
            f"{dataset.folder} has {counts}{with_hold_out}. At least 10 of each are needed."
        )
    unknown = "" if dataset.sha256 == FASHION_MNIST_SHA256 else " (not Fashion-MNIST)"
    print(f"{counts} from {dataset.folder}{unknown}", flush=True)
    return (train_images, train_labels), (test_images, test_labels)


def find_files(root):
    """Return the paths of the four files. They are downloaded if there are none.

    They come from the first of these folders that has any of them: `root`/FashionMNIST/raw, as
    torchvision creates it; `root` itself; Debian's package dataset-fashion-mnist. Files of
    different folders are never mixed: UserError if that folder has only some of the four.
    """
    raw = Path(root, "FashionMNIST", "raw")
    for folder in (raw, Path(root), DEBIAN_PACKAGE):
        paths = []
        missing = []
        for name in FILES:
            path = find_file(folder, name)
            if path:
                paths.append(path)
            else:
                missing.append(name)
        if paths and missing:
            raise UserError(
                f"{folder} has some files of the data set, but lacks {', '.join(missing)}. "
                "Add what is missing."
            )
        if paths:
            if folder == DEBIAN_PACKAGE and Path(root) not in (DEFAULT_ROOT, DEBIAN_PACKAGE):
                print(
                    f"Warning: --data {root} has none of the four files, "
                    f"so Debian's package in {folder} is used.",
                    file=sys.stderr,
                )
            return paths
    download(raw)
    return [raw / name for name in FILES]


def find_file(folder, name):
    """Return the path of a file of the data set in `folder`, gzipped or not, or None.

    Kaggle and 7-Zip write a dot into the name: train-images.idx3-ubyte.
    """
    with_dot = name.replace("-idx", ".idx")
    for candidate in (name, with_dot, f"{name}.gz", f"{with_dot}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    return None


def download(raw):
    """Let torchvision download Fashion-MNIST into the folder `raw`, completely or not at all.

    Raises UserError, with other ways to get the data set, if this fails.
    """
    target = Path(os.path.realpath(raw))  # if raw is a link, the folder to which it points
    if target.is_dir() and any(target.iterdir()):
        raise UserError(
            f"{raw} has other files, but none of the four files of Fashion-MNIST. "
            "Move them elsewhere, or choose another folder with --data."
        )
    print(f"Downloading Fashion-MNIST to {raw} …", file=sys.stderr, flush=True)
    try:
        # Imported here because nothing else needs torchvision.
        from torchvision.datasets import FashionMNIST

        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            FashionMNIST(temporary, download=True)
            with contextlib.suppress(FileNotFoundError):
                target.rmdir()  # Windows does not rename a folder to the name of an empty one
            os.rename(Path(temporary, "FashionMNIST", "raw"), target)
    except Exception as error:  # a proxy, a disk or an installation can fail in almost any way
        # Another script may have finished the same download first.
        if not all((raw / name).exists() for name in FILES):
            raise UserError(
                f"{raw} does not contain Fashion-MNIST, and the download failed ({reason(error)}). "
                "Put the four files there, or run: apt-get install dataset-fashion-mnist"
            ) from error


def read_idx(path):
    """Return the uint8 tensor in a file of the MNIST family (IDX format), gzipped or not.

    Raises UserError if the file is damaged.
    """
    content = read_bytes(path)
    with report_damage(path, "Download it again."):
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        # Two zero bytes, a byte for the type (8 is uint8), and one for the number of dimensions.
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin like an IDX file of bytes")
        start = 4 + 4 * content[3]
        shape = []
        for position in range(4, start, 4):
            shape.append(int.from_bytes(content[position : position + 4], "big"))
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start)
        return values.view(shape)


def check_images_and_labels(path, images, labels):
    """Raise UserError unless images are [N, 28, 28], and labels [N] are indices into CLASSES."""
    last_class = len(CLASSES) - 1
    if labels.dim() != 1 or images.shape != (len(labels), 28, 28) or labels.max() > last_class:
        raise UserError(
            f"{path} has shape {list(images.shape)}, and its labels have shape "
            f"{list(labels.shape)} and values up to {labels.max()}. "
            f"Expected [N, 28, 28] and [N], with values up to {last_class}."
        )


# --- Reading and writing files ------------------------------------------------------------


def read_bytes(path):
    """Return the content of a file, or None if there is no such file.

    Raises OSError with the name of the file if it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        error.filename = str(path)  # network file systems do not always name it
        raise


@contextlib.contextmanager
def report_damage(path, advice):
    """Raise UserError, naming the file, if the block that parses its content fails."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged bytes can cause almost any error
        if is_out_of_memory(error):
            raise UserError(f"Not enough memory to read {path}.") from error
        raise UserError(f"{path} is damaged ({reason(error)}). {advice}") from error


def is_out_of_memory(error):
    """Return whether memory ran out, on the CPU or on a GPU."""
    if isinstance(error, MemoryError):
        return True
    # PyTorch raises RuntimeError with one of these texts.
    texts = [
        "allocate memory",  # on Linux
        "out of memory",  # on a GPU
        "not enough memory",  # on Windows
        "alloc_failed",  # from cuBLAS and cuDNN
        "could not create a primitive",  # from oneDNN
    ]
    return any(text in str(error).lower() for text in texts)


def json_bytes(value):
    """Return a value as the content of a JSON file."""
    return f"{json.dumps(value, indent=1)}\n".encode()


def sha256(content):
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_bytes(path, content):
    """Write a file completely or not at all. It gets a temporary name first and is then renamed.

    Raises UserError if the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                # Some network file systems do not support fsync.
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                    raise
        replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def replace(source, target):
    """Rename a file to the name of another one, which it replaces.

    On Windows this fails while a virus scanner reads the other file, so we try for a while.
    """
    for _ in range(8):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(0.2)
    os.replace(source, target)  # the last attempt, which may raise an error


# --- The command line ---------------------------------------------------------------------


def command_line(description):
    """Return an argument parser, and its group of options "run and data".

    The group has the options that all three scripts share.
    """
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
        help="folder with the four files of Fashion-MNIST. If it has none, Debian's package is "
        "used, or the files are downloaded into it. (default: %(default)s)",
    )
    return parser, group


def folder(text):
    """Return the folder that a command line names. Shells do not expand the ~ in --run=~/x."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder must not be empty")
    return Path(os.path.expanduser(text))


def shell_command(words):
    """Return a command line that can be pasted into a shell, with quotes where they are needed."""
    if sys.platform == "win32":
        return subprocess.list2cmdline(words)
    return shlex.join(words)


def run_script(main, when_interrupted):
    """Call `main`. An expected failure ends in one line on standard error, not in a traceback.

    `when_interrupted` is printed after Ctrl-C. It says what was kept.
    """
    for stream in (sys.stdout, sys.stderr):
        # A notebook's streams have no such method, and pythonw on Windows has no streams at all.
        if hasattr(stream, "reconfigure"):
            # The encoding that Windows uses for pipes has no μ.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        print(f"Interrupted. {when_interrupted}", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def reason(error):
    """Return the first sentence of an error's message, or the error's type if it has none."""
    first_line = str(error).strip().partition("\n")[0]
    first_sentence = first_line.partition(". ")[0]
    return first_sentence or type(error).__name__
