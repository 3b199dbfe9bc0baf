"""What the project promises, in the order of its files. Needs neither the network nor the data set.

The tests write a small data set in the format of Fashion-MNIST and train on it for a few epochs.
"""

import contextlib
import copy
import csv
import errno
import gzip
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

# Results are the same bit for bit only with the same number of threads, which PyTorch reads when it
# is imported. Child processes inherit it, and the width to which argparse wraps the help.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["COLUMNS"] = "80"

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_hex, to_rgba
from PIL import Image, ImageOps
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.manifold import trustworthiness
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FashionMNIST

import classify
import data
import plots
import train
from data import BASELINES, CLASSIFICATION, CONFIG, LOG, STATE, WEIGHTS
from model import (
    MODELS,
    ConvVAE,
    TransposedConv2d,
    active_dimensions,
    latent_means,
    load_network,
    loss_function,
    sample_mixture,
)
from results import figures, forests, speed, summary
from results.speed import ReportVAE, report_loss

ROOT = Path(__file__).parent
SCRIPTS = {"train.py": train, "classify.py": classify, "plots.py": plots}

# Background jobs of a shell may ignore Ctrl-C, and so would the processes started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
plots.LATENT_SPACE_IMAGES = 100  # t-SNE of more images takes seconds
TIMEOUT = 300  # seconds after which a process that hangs is stopped


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- A small data set in the format of Fashion-MNIST ----------------------------------------


def make_images(images_per_class_step, seed):
    """Return noisy images [N, 28, 28] uint8 and their labels [N].

    The place of a bright square tells the class. Class k has images_per_class_step * (k + 3)
    images, so that all classes differ in size. A third of class 4 look like class 7, so that a
    classifier makes mistakes.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(10).repeat_interleave(images_per_class_step * torch.arange(3, 13))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(0, 60, (len(labels), 28, 28), generator=generator)
    is_disguised = torch.rand(len(labels), generator=generator) < 1 / 3
    for image, label, disguised in zip(images, labels.tolist(), is_disguised):
        place = 7 if disguised and label == 4 else label
        row, column = divmod(place, 4)
        image[2 + 8 * row : 9 + 8 * row, 2 + 6 * column : 8 + 6 * column] += 180
    return images.to(torch.uint8), labels


TRAIN_SPLIT = make_images(8, seed=1)  # 600 images
TEST_SPLIT = make_images(7, seed=2)  # 525 images, more than one batch of the test pass
TRAIN_IMAGES = TRAIN_SPLIT[0].unsqueeze(1) / 255
TRAIN_LABELS = TRAIN_SPLIT[1]
TEST_IMAGES = TEST_SPLIT[0].unsqueeze(1) / 255
TEST_LABELS = TEST_SPLIT[1]


def idx_bytes(array):
    """Return a tensor as the content of a file of the MNIST family (IDX format)."""
    header = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    return header + array.to(torch.uint8).numpy().tobytes()


def dataset_files(train_split=TRAIN_SPLIT, test_split=TEST_SPLIT):
    """Return the four files of a data set as {name: content}."""
    return {
        "train-images-idx3-ubyte": idx_bytes(train_split[0]),
        "train-labels-idx1-ubyte": idx_bytes(train_split[1]),
        "t10k-images-idx3-ubyte": idx_bytes(test_split[0]),
        "t10k-labels-idx1-ubyte": idx_bytes(test_split[1]),
    }


def write_dataset(root, files):
    """Write the files of a data set where torchvision reads them, and return `root`."""
    raw = Path(root, "FashionMNIST", "raw")
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return Path(root)


TEMPORARY_FOLDER = tempfile.TemporaryDirectory()
SMALL_DATA = write_dataset(TEMPORARY_FOLDER.name, dataset_files())
SMALL_DATA_LINE = f"600 training and 525 test images from {SMALL_DATA}/FashionMNIST/raw"


@pytest.fixture
def other_data(tmp_path):
    """The folder of another data set: a single label differs."""
    labels = TEST_LABELS.clone()
    labels[0] = (labels[0] + 1) % 10
    return write_dataset(tmp_path / "other_data", dataset_files(test_split=(TEST_SPLIT[0], labels)))


# --- Running the scripts --------------------------------------------------------------------


def options_for(script, run, **options):
    """Return the command line options of a script for a run on the small data set.

    Options are named as in Python: latent_dim for --latent-dim. train.py gets those of a short
    training unless they are given.
    """
    all_options = {"run": run, "data": SMALL_DATA}
    if script == "train.py":
        all_options.update(epochs=3, batch_size=32, latent_dim=8, device="cpu")
    all_options.update(options)
    return [f"--{name.replace('_', '-')}={value}" for name, value in all_options.items()]


def call(script, *words):
    """Run a script in this process. Return its exit code and, if it failed, its error line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, words)])
        try:
            data.run_script(SCRIPTS[script].main, when_interrupted="Try again.")
        except SystemExit as end:
            if isinstance(end.code, str):
                return 1, end.code
            return end.code, ""
    return 0, ""


def succeed(script, run, *words, **options):
    """Run a script in this process. It must succeed."""
    assert call(script, *options_for(script, run, **options), *words) == (0, "")


def fail(script, run, **options):
    """Run a script in this process. It must fail with one line, which is returned."""
    code, message = call(script, *options_for(script, run, **options))
    assert code == 1
    assert message.startswith(f"{script}: error: ")
    assert "\n" not in message
    return message


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of two epochs with its classification and baselines. Tests must not change it."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    succeed("train.py", run, epochs=2)
    succeed("classify.py", run, "--baselines")
    return run


@pytest.fixture(scope="session")
def three_epochs(tmp_path_factory):
    """A run of three epochs, trained without interruption. Tests must not change it."""
    run = tmp_path_factory.mktemp("runs") / "three_epochs"
    succeed("train.py", run, epochs=3)
    return run


@pytest.fixture(scope="session")
def active_run(tmp_path_factory):
    """A run with its classification, trained until some latent dimensions are active."""
    run = tmp_path_factory.mktemp("runs") / "active"
    succeed("train.py", run, epochs=4, lr=2e-3, beta=0.1)
    succeed("classify.py", run)
    return run


@pytest.fixture
def copied_run(finished, tmp_path):
    """A copy of the finished run, which a test may change. It is removed after the test."""
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def finished_network(finished):
    """The network of the finished run."""
    return network_of(finished)


def network_of(run):
    """Return the network of the run in a folder."""
    return load_network(data.read_run(run))


def log_of(run):
    """Return the loss log of the run in a folder."""
    return data.read_run(run).log


# --- Reading and changing files -------------------------------------------------------------


def contents(folder):
    """Return all files in a folder as {path: content}, to see whether anything was changed."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_json(path):
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path, **changes):
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**read_json(path), **changes}), encoding="utf-8")


def load_state(run):
    """Return the content of state.pth."""
    return torch.load(run / STATE, weights_only=True)


def assert_same_training(run, other):
    """Check that two runs have the same losses and weights, bit for bit."""
    rows = []
    for path in (run, other):
        with open(path / LOG, encoding="utf-8") as file:
            rows.append([{**row, "seconds": None} for row in csv.DictReader(file)])
    assert rows[0] == rows[1]
    weights = network_of(run).state_dict()
    torch.testing.assert_close(weights, network_of(other).state_dict(), rtol=0, atol=0)


# --- Networks and loss ----------------------------------------------------------------------


def seeded_outputs(model, images):
    """Return the reconstruction, mu and logvar of images. The noise in z is always the same."""
    torch.manual_seed(1)
    return model(images)


def test_weights_can_be_exchanged_with_the_report():
    images = torch.rand(5, 1, 28, 28)
    ours = ConvVAE(16).to(memory_format=torch.channels_last)
    theirs = ReportVAE(16)
    for source, target in [(ours, theirs), (ReportVAE(16), ours)]:
        target.load_state_dict(source.state_dict())
        expected = seeded_outputs(source, images)
        torch.testing.assert_close(seeded_outputs(target, images), expected, rtol=1e-5, atol=1e-6)
    h1 = theirs.enc1(images).relu()
    h2 = theirs.enc2(h1).relu()
    h3 = theirs.enc3(h2).relu()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.features(images), (h1, h2, h3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, count", [("conv", 440_833), ("fc", 667_248), ("deep", 1_144_193)])
def test_number_of_parameters(name, count):
    model = MODELS[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_fully_connected_network_layer_by_layer():
    model = MODELS["fc"](7)
    images = torch.rand(3, 1, 28, 28)
    outputs = seeded_outputs(model, images)
    torch.manual_seed(1)
    h = model.fc_enc(images.reshape(3, 784)).relu()
    torch.testing.assert_close(model.features(images), (h,))
    mu = model.fc_mu(h)
    logvar = model.fc_log(h)
    z = mu + (logvar / 2).exp() * torch.randn(3, 7)
    reconstruction = model.fc_out(model.fc_dec(z).relu()).sigmoid().reshape(3, 1, 28, 28)
    torch.testing.assert_close(outputs, (reconstruction, mu, logvar))


def test_deep_network_layer_by_layer():
    model = MODELS["deep"](7)
    model(torch.rand(50, 1, 28, 28))  # moves the running means of BatchNorm away from 0 and 1
    model.eval()

    def normalize_and_activate(h, norm):
        h = (h - norm.running_mean.view(-1, 1, 1)) / (norm.running_var.view(-1, 1, 1) + 1e-5).sqrt()
        h = h * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        return torch.where(h > 0, h, 0.2 * h)

    images = torch.rand(3, 1, 28, 28)
    h = images
    hidden = []
    for (convolution, norm, _), stride in zip(model.enc, (2, 2, 2, 1), strict=True):
        h = F.conv2d(h, convolution.weight, convolution.bias, stride=stride, padding=1)
        h = normalize_and_activate(h, norm)
        hidden.append(h)
    torch.testing.assert_close(model.features(images), hidden, rtol=1e-4, atol=1e-4)
    mu = model.fc_mu(h.flatten(1))
    logvar = model.fc_log(h.flatten(1))
    torch.testing.assert_close(model.encode(images), (mu, logvar), rtol=1e-4, atol=1e-4)

    h = model.fc_dec(mu)
    h = torch.where(h > 0, h, 0.2 * h).reshape(3, 256, 3, 3)
    (first, first_norm, _), (second, second_norm, _), (third, third_norm, _), last = model.dec
    h = normalize_and_activate(F.conv2d(h, first.weight, first.bias, padding=1), first_norm)
    h = F.conv_transpose2d(h, second.weight, second.bias, 2, 1, output_padding=1)
    h = normalize_and_activate(h, second_norm)
    h = normalize_and_activate(F.conv_transpose2d(h, third.weight, third.bias, 2, 1), third_norm)
    h = F.conv_transpose2d(h, last.weight, last.bias, 2, 1)
    torch.testing.assert_close(model.decode(mu), h.sigmoid(), rtol=1e-4, atol=1e-4)


def test_loss_matches_its_definition():
    x = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    recon_x = torch.tensor([[0.5, 0.5], [0.5, 0.75]])
    mu = torch.tensor([[0.0, 2.0]])
    logvar = torch.tensor([[0.0, math.log(4)]])
    # The first three pixels add log 2 each, and the last one -(¼ log ¾ + ¾ log ¼).
    bce = 3 * 0.6931472 + 0.25 * 0.2876821 + 0.75 * 1.3862944
    # The first latent dimension adds 0, and the second one ½ (sigma² + mu² - 1 - log sigma²).
    kld = 0.5 * (4 + 4 - 1 - 1.3862944)
    for beta in (1, 3):
        terms = loss_function(recon_x, x, mu, logvar, beta)
        assert torch.stack(terms).tolist() == pytest.approx([bce + beta * kld, bce, kld], rel=1e-6)
    assert loss_function(recon_x, x, mu, logvar)[0].item() == pytest.approx(bce + kld)


def test_loss_of_nan_is_nan():
    x = torch.tensor([[0.0, 1.0]])
    recon_x = torch.tensor([[0.5, torch.nan]])
    loss, bce, _ = loss_function(recon_x, x, torch.zeros(1, 2), torch.zeros(1, 2))
    assert loss.isnan()
    assert bce.isnan()


@pytest.mark.parametrize("out_channels, output_padding", [(1, 0), (3, 1)])
def test_transposed_convolution_equals_that_of_pytorch(out_channels, output_padding):
    layer = TransposedConv2d(
        6, out_channels, kernel_size=4, stride=2, padding=1, output_padding=output_padding
    )
    x = torch.rand(2, 6, 5, 7, requires_grad=True)
    inputs = [x, *layer.parameters()]
    y = layer(x)
    expected = nn.ConvTranspose2d.forward(layer, x)
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y.square().sum(), inputs)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected.square().sum(), inputs), rtol=1e-4, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_network_can_be_compiled_for_several_batch_sizes():
    vae = ConvVAE(8)
    decode = torch.compile(vae.decode, backend="eager")
    for batch_size in (4, 3, 5):
        z = torch.randn(batch_size, 8)
        torch.testing.assert_close(decode(z), vae.decode(z))


# --- The data set ---------------------------------------------------------------------------


def splits_in(root, hold_out=0):
    """Return the splits in a folder, without their checksum."""
    splits, _ = data.load_splits(root, hold_out)
    return splits


def test_splits_have_the_pixels_and_labels_of_the_files(capsys):
    (train_images, train_labels), (test_images, test_labels) = splits_in(SMALL_DATA)
    assert capsys.readouterr().out == f"{SMALL_DATA_LINE} (not Fashion-MNIST)\n"
    for images, expected in [(train_images, TRAIN_IMAGES), (test_images, TEST_IMAGES)]:
        assert images.dtype == torch.float32
        torch.testing.assert_close(images, expected, rtol=0, atol=0)
    assert torch.equal(train_labels, TRAIN_LABELS)
    assert torch.equal(test_labels, TEST_LABELS)
    assert test_labels.dtype == torch.int64


def test_fashion_mnist_itself_is_recognized_by_its_checksum(monkeypatch, capsys):
    """The small data set stands in for it."""
    _, sha256 = data.load_splits(SMALL_DATA)
    monkeypatch.setattr(data, "FASHION_MNIST_SHA256", sha256)
    data.load_splits(SMALL_DATA)
    assert capsys.readouterr().out == f"{SMALL_DATA_LINE} (not Fashion-MNIST)\n{SMALL_DATA_LINE}\n"


def test_validation_split_takes_the_place_of_the_test_set(capsys):
    (train_images, train_labels), (test_images, test_labels) = splits_in(SMALL_DATA, 100)
    assert capsys.readouterr().out.startswith("500 training and 100 test images")
    assert torch.equal(torch.cat((train_images, test_images)), TRAIN_IMAGES)
    assert torch.equal(torch.cat((train_labels, test_labels)), TRAIN_LABELS)
    assert len(train_images) == len(train_labels) == 500


def test_validation_split_must_leave_images_to_train_on(tmp_path):
    assert len(splits_in(SMALL_DATA, 599)[0][0]) == 1
    assert "--hold-out 600" in fail("train.py", tmp_path / "run", hold_out=600)


@pytest.mark.parametrize("name", dataset_files())
def test_checksum_depends_on_each_file(name, tmp_path):
    files = dataset_files()
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    _, sha256 = data.load_splits(SMALL_DATA)
    _, other_sha256 = data.load_splits(write_dataset(tmp_path, files))
    assert other_sha256 != sha256


def download_small_data(dataset):
    """Stand in for torchvision's download."""
    write_dataset(dataset.root, dataset_files())


def offer_small_data(source, tmp_path, monkeypatch):
    """Let the small data set be fetched from "Debian" or by "download" instead of Fashion-MNIST."""
    package = tmp_path / "package"
    monkeypatch.setattr(data, "DEBIAN_PACKAGE", package)
    if source == "download":
        monkeypatch.setattr(FashionMNIST, "download", download_small_data)
    else:
        package.mkdir()
        for name, content in dataset_files().items():
            (package / f"{name}.gz").write_bytes(gzip.compress(content))


@pytest.mark.parametrize(
    "kind, source",
    [
        ("new default", "download"),
        ("new default", "Debian"),
        ("empty", "download"),
        ("empty raw", "download"),
        ("linked", "download"),
        ("with leftovers of a killed fetch", "download"),
    ],
)
def test_folder_without_files_is_filled(kind, source, tmp_path, monkeypatch):
    offer_small_data(source, tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    leftovers = {}
    if kind == "new default":
        root = data.DEFAULT_ROOT
    elif kind == "empty":
        root.mkdir()
    elif kind == "empty raw":
        (root / "FashionMNIST" / "raw").mkdir(parents=True)
    elif kind == "linked":
        (tmp_path / "elsewhere").mkdir()
        root.symlink_to(tmp_path / "elsewhere")
    else:
        write_dataset(root / ".fetch-killed", {"half": b"a file"})
        leftovers = contents(root)
    (train_images, _), _ = splits_in(root)
    assert torch.equal(train_images, TRAIN_IMAGES)
    expected = {root / "FashionMNIST" / "raw" / name: c for name, c in dataset_files().items()}
    assert contents(root) == {**expected, **leftovers}


def test_data_set_that_another_script_fetches_meanwhile_is_used(tmp_path, monkeypatch):
    other_files = dataset_files(train_split=TEST_SPLIT)

    def download_twice(dataset):
        download_small_data(dataset)
        write_dataset(tmp_path, other_files)

    monkeypatch.setattr(data, "DEBIAN_PACKAGE", tmp_path / "missing")
    monkeypatch.setattr(FashionMNIST, "download", download_twice)
    (train_images, _), _ = splits_in(tmp_path)
    assert torch.equal(train_images, TEST_IMAGES)
    assert {path.name: c for path, c in contents(tmp_path).items()} == other_files


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Error downloading. Try again"), OSError(), None],
    ids=["torchvision gives up", "the disk fails", "files are missing"],
)
def test_failed_fetch_leaves_nothing(error, tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()

    def download_half(dataset):
        write_dataset(dataset.root, {"t10k-labels-idx1-ubyte": b"half"})
        if error:
            raise error

    monkeypatch.setattr(data, "DEBIAN_PACKAGE", tmp_path / "missing")
    monkeypatch.setattr(FashionMNIST, "download", download_half)
    message = fail("train.py", tmp_path / "run", data=root)
    assert f"cannot be fetched into {root}/FashionMNIST/raw (" in message
    assert "apt-get install" in message
    assert list(root.iterdir()) == []


FOLDERS_WITH_FILES = {
    "another file": {"notes.txt": b""},
    "a file deeper": {"FashionMNIST/old/notes.txt": b""},
    "gzipped": {f"FashionMNIST/raw/{name}.gz": b"x" for name in dataset_files()},
    "not in FashionMNIST/raw": dataset_files(),
    "three of four": {f"FashionMNIST/raw/{n}": c for n, c in list(dataset_files().items())[:3]},
}


@pytest.mark.parametrize("files", FOLDERS_WITH_FILES.values(), ids=FOLDERS_WITH_FILES)
def test_folder_with_other_files_is_refused_and_stays_as_it_is(files, tmp_path, monkeypatch):
    offer_small_data("download", tmp_path, monkeypatch)
    root = tmp_path / "root"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    before = contents(root)
    message = fail("train.py", tmp_path / "run", data=root)
    assert f"cannot be read from {root}/FashionMNIST/raw (FileNotFoundError: " in message
    assert contents(root) == before
    assert not (tmp_path / "run").exists()


def test_files_of_old_versions_of_torchvision_are_not_taken_for_the_data(tmp_path):
    root = write_dataset(tmp_path, dataset_files())
    (root / "FashionMNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((TEST_SPLIT[0], TEST_LABELS), root / "FashionMNIST" / "processed" / name)
    (train_images, _), _ = splits_in(root)
    assert torch.equal(train_images, TRAIN_IMAGES)


def test_linked_files_are_read_and_a_broken_link_is_not_replaced(tmp_path, monkeypatch, capsys):
    offer_small_data("download", tmp_path, monkeypatch)
    root = tmp_path / "root"
    (root / "FashionMNIST").mkdir(parents=True)
    raw = root / "FashionMNIST" / "raw"
    raw.symlink_to(SMALL_DATA / "FashionMNIST" / "raw")
    (train_images, _), _ = splits_in(root)
    assert torch.equal(train_images, TRAIN_IMAGES)
    raw.unlink()
    raw.symlink_to(tmp_path / "unplugged disk")
    assert "cannot be read" in fail("train.py", tmp_path / "run", data=root)
    assert raw.is_symlink()
    assert "Fetching" not in capsys.readouterr().err


def test_folder_that_does_not_exist_is_refused(tmp_path, monkeypatch):
    offer_small_data("download", tmp_path, monkeypatch)
    missing = tmp_path / "missing"
    assert f"no folder {missing}" in fail("train.py", tmp_path / "run", data=missing)
    assert not missing.exists()


DAMAGED_DATA = {
    "damaged": ("t10k-images-idx3-ubyte", idx_bytes(TEST_SPLIT[0])[:5000]),
    "29 pixels wide": ("t10k-images-idx3-ubyte", idx_bytes(torch.zeros(525, 28, 29))),
    "one label missing": ("t10k-labels-idx1-ubyte", idx_bytes(TEST_LABELS[1:])),
    "label 10": ("train-labels-idx1-ubyte", idx_bytes(torch.full((600,), len(data.CLASSES)))),
}


@pytest.mark.parametrize("name, content", DAMAGED_DATA.values(), ids=DAMAGED_DATA)
def test_damaged_or_unsuitable_data_are_refused(name, content, tmp_path):
    root = write_dataset(tmp_path / "root", {**dataset_files(), name: content})
    message = fail("train.py", tmp_path / "run", data=root)
    assert f"cannot be read from {root}/FashionMNIST/raw (" in message
    assert not (tmp_path / "run").exists()


# --- A picture of one's own -----------------------------------------------------------------


def t_shape(ground=255):
    """Return the gray values [60, 40] of a T on a plain ground, as floats.

    The T is 40 pixels high and 30 wide. Its hem is 8 % darker than the ground.
    """
    gray = np.full((60, 40), float(ground))
    gray[10:18, 5:35] = 0.4 * ground
    gray[18:50, 15:25] = 0.1 * ground
    gray[48:50, 15:25] = 0.92 * ground
    return gray


def image_of(gray, path, **options):
    """Save gray values, or a picture of Pillow, and return what read_picture makes of it."""
    if isinstance(gray, np.ndarray):
        gray = Image.fromarray(gray.clip(0, 255).round().astype(np.uint8))
    gray.save(path, **options)
    return data.read_picture(path)


def enlarged(gray):
    """Return gray values ten times as large."""
    return gray.repeat(10, axis=0).repeat(10, axis=1)


def test_picture_is_trimmed_scaled_centered_and_negated(tmp_path):
    image = image_of(t_shape(), tmp_path / "picture.png")
    assert image.shape == (1, 1, 28, 28)
    assert image.dtype == torch.float32
    # The T is 28 pixels high and 21 wide now, with a margin of 3 and 4.
    is_object = image[0, 0] > 0.01
    assert is_object.any(dim=1).nonzero().flatten().tolist() == list(range(28))
    assert is_object.any(dim=0).nonzero().flatten().tolist() == list(range(3, 24))
    assert image[0, 0, 2, 13].item() == pytest.approx(0.6, abs=1e-6)
    assert image[0, 0, 20, 13].item() == pytest.approx(0.9, abs=0.003)
    assert image[0, 0, 20, 3].item() == pytest.approx(0, abs=1e-6)


def test_each_form_of_a_picture_gives_the_same_image(tmp_path):
    image = image_of(t_shape(), tmp_path / "8bits.png")
    picture = Image.open(tmp_path / "8bits.png")
    is_object = picture.point([255] * 255 + [0])
    black = Image.new("L", picture.size)
    transparent = Image.merge("LA", (Image.composite(picture, black, is_object), is_object))
    deep = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise to show it
    forms = {
        "16bits.png": image_of(deep, tmp_path / "16bits.png"),
        "transparent.png": image_of(transparent, tmp_path / "transparent.png"),
        "rotated.png": image_of(
            picture.transpose(Image.Transpose.ROTATE_90), tmp_path / "rotated.png", exif=exif
        ),
        "negative.png": image_of(ImageOps.invert(picture), tmp_path / "negative.png"),
        "picture.bmp": image_of(picture, tmp_path / "picture.bmp"),
    }
    for name, other in forms.items():
        torch.testing.assert_close(other, image, rtol=0, atol=1e-6, msg=name)


def test_lying_object_is_centered_as_well(tmp_path):
    standing = image_of(t_shape(), tmp_path / "standing.png")
    lying = image_of(t_shape().T, tmp_path / "lying.png")
    torch.testing.assert_close(lying, standing.mT, rtol=0, atol=1e-5)


def test_object_may_be_small_and_thin(tmp_path):
    """A T in the middle of a large picture, and a stick with a fiftieth of its width."""
    large = np.full((600, 800), 255.0)
    large[300:360, 400:440] = t_shape()
    expected = image_of(t_shape(), tmp_path / "picture.png")
    difference = image_of(large, tmp_path / "large.png") - expected
    assert difference.abs().mean() < 0.05
    stick = np.full((1000, 1000), 255.0)
    stick[100:900, 490:510] = 0
    image = image_of(stick, tmp_path / "stick.png")
    is_object = image[0, 0] > 0.01
    assert is_object.any(dim=1).all()
    assert is_object.any(dim=0).nonzero().flatten().tolist() == [13]


def test_colors_are_compared_by_their_brightness(tmp_path):
    """Red, green and blue weigh 0.299, 0.587 and 0.114, as in ITU-R 601."""
    colors = np.full((60, 40, 3), (200, 220, 240), np.uint8)
    colors[10:50, 5:35] = (150, 30, 60)
    image = image_of(Image.fromarray(colors), tmp_path / "colors.png")
    background = 0.299 * 200 + 0.587 * 220 + 0.114 * 240
    brightness = 0.299 * 150 + 0.587 * 30 + 0.114 * 60
    assert image[0, 0, 14, 14].item() == pytest.approx(1 - brightness / background, abs=0.01)


@pytest.mark.parametrize("ground", [230, 126, 60])
def test_gray_background_becomes_black(ground, tmp_path):
    image = image_of(t_shape(), tmp_path / "white.png")
    darker = image_of(t_shape(ground), tmp_path / "darker.png")
    torch.testing.assert_close(darker, image, rtol=0, atol=0.02)
    # A bright object on a ground that is not black.
    brighter = image_of(255 - t_shape(ground), tmp_path / "brighter.png")
    torch.testing.assert_close(brighter, image, rtol=0, atol=0.02)
    assert max(darker[0, 0, 20, 3], brighter[0, 0, 20, 3]) < 1e-6


def test_noise_specks_and_uneven_light_hardly_change_an_image(tmp_path):
    gray = np.pad(enlarged(t_shape(230)), ((200, 200), (300, 300)), constant_values=230)
    expected = image_of(gray, tmp_path / "even.png")
    noise = np.random.default_rng(0).normal(0, 10, gray.shape)
    specks = gray.copy()
    specks[3, 3] = 120
    specks[74:78, 74:78] = 0
    falls_to_the_right = 1 - 0.2 * np.linspace(0, 1, 1000)
    falls_to_the_top = 0.8 + 0.2 * np.linspace(0, 1, 1000)[:, None]
    pictures = {
        "noise.png": gray + noise,
        "right.png": gray * falls_to_the_right,
        "top.png": gray * falls_to_the_top,
    }
    for name, changed in pictures.items():
        difference = image_of(changed, tmp_path / name) - expected
        assert difference.abs().mean() < 0.01, name
        assert image_of(changed, tmp_path / name).min() >= 0
    # A row with a single pixel of the object, seen in small, is no part of it.
    torch.testing.assert_close(image_of(specks, tmp_path / "specks.png"), expected)


def test_specks_do_not_decide_whether_an_object_is_bright_or_dark(tmp_path):
    pale = np.full((400, 400), 200.0)
    pale[100:300, 100:300] = 160
    expected = image_of(pale, tmp_path / "pale.png")
    pale[60, 200] = 255
    torch.testing.assert_close(image_of(pale, tmp_path / "speck.png"), expected)


def test_object_that_hardly_differs_from_its_background_is_refused(tmp_path):
    """A contrast of a tenth is the limit. A few odd pixels are no object."""
    pale = np.full((60, 40), 200.0)
    pale[20:40, 10:30] = 178
    assert image_of(pale, tmp_path / "visible.png").max().item() == pytest.approx(0.11, abs=0.001)
    pale[20:40, 10:30] = 182
    speck = np.full((400, 400), 200.0)
    speck[200, 200] = 0
    noise = 128 + np.random.default_rng(0).normal(0, 20, (400, 400))
    plain = [np.full((60, 40), float(value)) for value in (0, 128, 255)]
    for gray in (pale, speck, noise, *plain):
        with pytest.raises(ValueError, match="the object hardly differs from its background"):
            image_of(gray, tmp_path / "pale.png")


def test_file_that_is_no_picture_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "picture.jpg"
    # Pillow would start Ghostscript for the first one, whatever the name of the file is.
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot identify image file.*Save it as PNG or JPEG"):
            data.read_picture(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="exceeds limit.*at most 178 million pixels"):
        image_of(t_shape(), tmp_path / "large.png")


# --- Options --------------------------------------------------------------------------------

WRONG_VALUES = [
    ("--epochs=0", "must be from 1 to"),
    ("--epochs=ten", "invalid positive_int value"),
    ("--batch-size=0", "must be from 1 to"),
    ("--latent-dim=0", "must be from 1 to"),
    ("--latent-dim=9999999999", "must be from 1 to"),
    ("--seed=-1", "must be from 0 to"),
    ("--seed=9999999999", "must be from 0 to"),
    ("--hold-out=-1", "must be from 0 to"),
    ("--lr=0", "must be a positive number"),
    ("--lr=nan", "must be a positive number"),
    ("--lr=inf", "must be a positive number"),
    ("--beta=-1", "must be a number that is not negative"),
    ("--beta=nan", "must be a number that is not negative"),
    ("--beta=inf", "must be a number that is not negative"),
    ("--feature-weight=-1", "must be a number that is not negative"),
    ("--feature-weight=1", "--feature-weight needs a --feature-run"),
    ("--feature-run=x", "--feature-run needs a positive --feature-weight"),
    ("--model=vgg", "invalid choice"),
    ("--lr-scheduler=step", "invalid choice"),
    ("--device=mps", "invalid choice"),
    ("--run=", "must not be empty"),
    ("--data=", "must not be empty"),
]


@pytest.mark.parametrize("option, problem", WRONG_VALUES)
def test_wrong_value_of_an_option_is_refused(option, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # If the value were accepted, the missing folder would be the next problem.
    assert call("train.py", "--data=missing", option) == (2, "")
    assert problem in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_defaults_are_those_of_the_report(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert vars(train.parse_arguments()) == {
        "run": Path("runs/convvae"),
        "data": Path("data/fashion-mnist"),
        "device": "auto",
        "model": "conv",
        "latent_dim": 32,
        "epochs": 100,
        "batch_size": 128,
        "lr": 5e-4,
        "seed": 0,
        "beta": 1.0,
        "lr_scheduler": "constant",
        "hold_out": 0,
        "feature_weight": 0.0,
        "feature_run": "",
    }


def test_tilde_is_the_home_folder(copied_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["train.py", "--run=~/a", "--data=~/b", "--feature-run=~/c", "--feature-weight=0.5"]
    monkeypatch.setattr(sys, "argv", words)
    args = train.parse_arguments()
    assert args.run == tmp_path / "a"
    assert args.data == tmp_path / "b"
    assert args.feature_run == str(tmp_path / "c")
    assert data.read_run("~/run").path == copied_run


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_options_and_their_defaults(script, capsys):
    assert call(script, "--help") == (0, "")
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {script} [options]\n")
    assert "--run DIR" in text
    assert "(default: runs/convvae)" in text
    assert ("--lr-scheduler {constant,plateau,cosine}" in text) == (script == "train.py")


@pytest.mark.parametrize("script", ["classify.py", "plots.py"])
def test_default_folder_without_a_run_is_reported(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, message = call(script)
    assert code == 1
    assert message == (
        f"{script}: error: There is no run in runs/convvae. To train one: "
        "python train.py --run runs/convvae"
    )


# --- Training -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network_name, beta, lr_scheduler, feature_weight",
    [
        ("conv", 1.0, "constant", 0),
        ("conv", 0.25, "cosine", 0),
        ("conv", 0.5, "constant", 0.3),
        ("deep", 1.0, "constant", 0),
    ],
)
def test_training_equals_a_plain_training_loop(
    network_name, beta, lr_scheduler, feature_weight, finished, finished_network, tmp_path
):
    """The loop draws the same random numbers. For "conv", it has the report's layers and loss."""
    run = tmp_path / "run"
    seed = 3
    lr = 2e-4
    feature_options = {}
    if feature_weight > 0:
        feature_options = {"feature_run": finished, "feature_weight": feature_weight}
    before = contents(finished)
    succeed(
        "train.py",
        run,
        epochs=2,
        batch_size=64,
        model=network_name,
        seed=seed,
        lr=lr,
        beta=beta,
        lr_scheduler=lr_scheduler,
        **feature_options,
    )
    assert contents(finished) == before
    log = log_of(run)
    assert [row["epoch"] for row in log] == [1, 2]

    def features(images):
        for layer in (encoder.enc1, encoder.enc2, encoder.enc3):
            images = layer(images).relu()
            yield images

    encoder = ReportVAE(8)
    encoder.load_state_dict(finished_network.state_dict())
    torch.manual_seed(seed)
    model = ReportVAE(8) if network_name == "conv" else MODELS[network_name](8)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for epoch, row in enumerate(log, start=1):
        torch.manual_seed(seed * 1_000_003 + epoch)
        expected_lr = lr
        if lr_scheduler == "cosine":
            expected_lr = lr * (1 + math.cos(math.pi * (epoch - 1) / 2)) / 2
        optimizer.param_groups[0]["lr"] = expected_lr
        expected = dict.fromkeys(["train_loss", "train_bce", "test_loss", "test_bce"], 0.0)
        model.train()
        for batch in torch.randperm(600).split(64):
            images = TRAIN_IMAGES[batch]
            optimizer.zero_grad()
            reconstruction, mu, logvar = model(images)
            loss = report_loss(reconstruction, images, mu, logvar)
            bce = F.binary_cross_entropy(reconstruction, images, reduction="sum")
            kld = loss - bce
            minimized = bce + beta * kld
            for found, wanted in zip(features(reconstruction), features(images)):
                minimized = minimized + feature_weight * (found - wanted).square().sum()
            minimized.backward()
            optimizer.step()
            expected["train_loss"] += loss.item() / 600
            expected["train_bce"] += bce.item() / 600
        model.eval()
        with torch.no_grad():
            for images in TEST_IMAGES.split(500):
                reconstruction, mu, logvar = model(images)
                loss = report_loss(reconstruction, images, mu, logvar)
                bce = F.binary_cross_entropy(reconstruction, images, reduction="sum")
                expected["test_loss"] += loss.item() / 525
                expected["test_bce"] += bce.item() / 525

        assert row["lr"] == pytest.approx(expected_lr, rel=1e-12)
        # The columns are sums whatever beta is.
        assert row["train_loss"] == row["train_bce"] + row["train_kld"]
        assert row["test_loss"] == row["test_bce"] + row["test_kld"]
        # Adam turns rounding errors into whole steps of those biases that BatchNorm cancels, and
        # whose gradients would be 0. So the losses of the deep network differ more: by up to 4e-4.
        tolerance = 1e-4 if network_name == "conv" else 5e-3
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=tolerance)

    weights = torch.load(run / WEIGHTS, weights_only=True)
    assert all(tensor.is_contiguous() for tensor in weights.values())
    if network_name == "conv":
        for name, expected in model.state_dict().items():
            assert (weights[name] - expected).norm() < 1e-3 * expected.norm()


def test_config_has_all_options_that_decide_the_result(finished, monkeypatch):
    words = ["train.py", "--latent-dim=8", "--batch-size=32", "--epochs=2"]
    monkeypatch.setattr(sys, "argv", words)
    expected = vars(train.parse_arguments())
    for name in ("run", "data", "device"):
        del expected[name]
    _, expected["data_sha256"] = data.load_splits(SMALL_DATA)
    expected["torch"] = torch.__version__
    # The rounding depends on the instructions that PyTorch uses and on the number of threads.
    expected["device"] = f"cpu ({torch.backends.cpu.get_cpu_capability()}, 1 thread)"
    assert read_json(finished / CONFIG) == expected
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert train.describe_device("cpu").endswith(", 2 threads)")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_number_of_images_is_shown_on_a_terminal_only(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    train.train_epoch(lambda images: torch.zeros(2), torch.zeros(210, 1), batch_size=2)
    shown = capsys.readouterr().out
    assert ("\r100 of 210 images" in shown) == is_terminal
    assert bool(shown) == is_terminal


def test_learning_rates_of_plateau_and_cosine():
    def learning_rate(lr_scheduler, log, beta=1.0):
        args = SimpleNamespace(lr_scheduler=lr_scheduler, lr=0.1, beta=beta, epochs=40)
        return train.learning_rate(args, log)

    # The first epoch is the best. Its 10 successors are waited for, and the next one is too many.
    log = [{"train_bce": 200.0, "train_kld": 10.0}] + [{"train_bce": 205.0, "train_kld": 9.0}] * 11
    assert learning_rate("plateau", log[:11]) == 0.1
    assert learning_rate("plateau", log) == pytest.approx(0.01)
    # With a large beta, the loss falls.
    assert learning_rate("plateau", log, beta=6.0) == 0.1
    assert learning_rate("constant", log) == 0.1
    assert learning_rate("cosine", log[:10]) == pytest.approx(0.05 * (1 + math.cos(math.pi / 4)))


def test_learning_rate_can_be_a_tensor():
    """A captured step keeps reading the tensor with which the optimizer was made."""
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=torch.tensor(0.5), fused=True)
    lr = optimizer.param_groups[0]["lr"]
    train.set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25


def test_feature_run_must_exist(tmp_path):
    missing = tmp_path / "missing"
    message = fail("train.py", tmp_path / "run", feature_run=missing, feature_weight=1)
    assert f"There is no run in {missing}." in message
    assert not (tmp_path / "run").exists()


def test_loss_that_is_not_finite_in_the_first_epoch_leaves_no_file(tmp_path):
    run = tmp_path / "run"
    message = fail("train.py", run, lr=1e30)
    assert message.endswith("The loss is not finite in epoch 1. Try a smaller --lr.")
    assert list(run.iterdir()) == []
    succeed("train.py", run, epochs=1)


def test_loss_that_is_not_finite_later_keeps_the_earlier_epochs(copied_run):
    state = load_state(copied_run)
    state["model"]["enc1.bias"].fill_(math.nan)
    torch.save(state, copied_run / STATE)
    before = (copied_run / STATE).read_bytes()
    message = fail("train.py", copied_run)
    assert "not finite in epoch 3. Earlier epochs are kept." in message
    assert (copied_run / STATE).read_bytes() == before
    assert len(log_of(copied_run)) == 2


@pytest.mark.parametrize("losses", [(math.inf, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_losses_of_both_splits_must_be_finite(losses):
    train_loss, test_loss = losses
    with pytest.raises(data.UserError, match="not finite in epoch 7"):
        train.stop_unless_finite({"epoch": 7, "train_loss": train_loss, "test_loss": test_loss})


# --- A run ----------------------------------------------------------------------------------


def test_finished_run_stays_as_it_is(copied_run, capsys):
    before = contents(copied_run)
    succeed("train.py", copied_run, epochs=1)
    line = f"{copied_run} is finished: 2 epochs. To train it further, give more --epochs.\n"
    assert capsys.readouterr().out.endswith(line)
    assert contents(copied_run).keys() == before.keys()
    # Only the names inside of a file of torch.save may change.
    unchanged = (STATE, CONFIG, LOG, CLASSIFICATION)
    assert all((copied_run / name).read_bytes() == before[copied_run / name] for name in unchanged)


def test_finished_run_can_be_trained_further(copied_run, three_epochs, capsys):
    succeed("train.py", copied_run, epochs=3)
    assert ", epochs 3 to 3\n" in capsys.readouterr().out
    assert_same_training(copied_run, three_epochs)
    assert read_json(copied_run / CONFIG)["epochs"] == 3


def interrupt_after(renames, monkeypatch):
    """Let a program be interrupted, as by Ctrl-C, once it has renamed this number of files."""
    replace = os.replace
    renamed = []

    def replace_or_stop(source, target):
        if len(renamed) == renames:
            raise KeyboardInterrupt
        renamed.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_stop)


# An epoch renames four files: state.pth, the weights, the log and the config.
INTERRUPTED = {
    "after the first state.pth": (1, {}),
    "within the files of the second epoch": (6, {}),
    "after the second epoch": (8, {}),
    "deep network with plateau schedule, after the second state.pth": (
        5,
        {"lr_scheduler": "plateau", "model": "deep"},
    ),
}


@pytest.mark.parametrize("renames, options", INTERRUPTED.values(), ids=INTERRUPTED)
def test_interrupted_run_is_resumed_as_if_uninterrupted(
    renames, options, three_epochs, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    uninterrupted = three_epochs
    if options:
        uninterrupted = tmp_path / "uninterrupted"
        succeed("train.py", uninterrupted, **options)
    with monkeypatch.context() as patch:
        interrupt_after(renames, patch)
        assert call("train.py", *options_for("train.py", run, **options)) == (130, "")
    succeed("train.py", run, **options)
    assert_same_training(run, uninterrupted)
    names = {path.name for path in run.iterdir()}
    assert names == {STATE, CONFIG, LOG, WEIGHTS}


def test_plateau_schedule_is_resumed_with_its_waiting(tmp_path):
    run = tmp_path / "run"
    succeed("train.py", run, epochs=1, lr_scheduler="plateau", lr=0.001)
    state = load_state(run)
    (row,) = state["log"]
    state["log"] = [{**row, "train_bce": 1.0}] + [row] * 11  # no progress since the first epoch
    torch.save(state, run / STATE)
    succeed("train.py", run, epochs=13, lr_scheduler="plateau", lr=0.001)
    assert [row["lr"] for row in log_of(run)] == [0.001] * 12 + [pytest.approx(0.0001)]


def test_weights_are_never_older_than_the_log(finished, tmp_path, monkeypatch):
    """Otherwise classification.json would name an epoch that it has not measured."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(6, patch)  # in the second epoch, after state.pth and one more file
        call("train.py", *options_for("train.py", run))
    assert len(log_of(run)) == 1
    weights = network_of(run).state_dict()
    torch.testing.assert_close(weights, network_of(finished).state_dict(), rtol=0, atol=0)


def test_run_that_was_interrupted_within_an_epoch_can_be_resumed(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", *options_for("train.py", run, epochs=1000)]
    deadline = time.monotonic() + TIMEOUT
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not (run / LOG).exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors.startswith("Interrupted. Run the same command again to resume ")
    assert errors.count("\n") == 1
    epochs = len(load_state(run)["log"]) + 1
    succeed("train.py", run, epochs=epochs)
    succeed("train.py", tmp_path / "uninterrupted", epochs=epochs)
    assert_same_training(run, tmp_path / "uninterrupted")


def test_run_of_an_earlier_version_or_another_device_is_resumed(copied_run, three_epochs):
    """Commit a07dceb wrote one more key into the config of state.pth, and another order. Another
    device may have had other strides, which fused Adam ignores."""
    state = load_state(copied_run)
    state["config"] = {"feature_sha256": "ceae5b09", **dict(reversed(state["config"].items()))}
    for values in state["optimizer"].values():
        values["exp_avg"] = values["exp_avg"].contiguous()
        values["exp_avg_sq"] = values["exp_avg_sq"].contiguous()
    torch.save(state, copied_run / STATE)
    succeed("train.py", copied_run)
    assert_same_training(copied_run, three_epochs)


OTHER_OPTIONS = {
    "model": "fc",
    "latent_dim": 9,
    "batch_size": 33,
    "lr": 0.001,
    "seed": 1,
    "beta": 0.5,
    "lr_scheduler": "cosine",
    "hold_out": 100,
}


@pytest.mark.parametrize("name", OTHER_OPTIONS)
def test_resuming_with_another_option_is_refused(name, copied_run):
    before = contents(copied_run)
    message = fail("train.py", copied_run, epochs=2, **{name: OTHER_OPTIONS[name]})
    value = read_json(copied_run / CONFIG)[name]
    option = f"--{name.replace('_', '-')}"
    assert f"{copied_run} was trained with {option} {value}, not {OTHER_OPTIONS[name]}." in message
    assert contents(copied_run) == before


@pytest.mark.parametrize("name, value", [("feature_run", "elsewhere"), ("feature_weight", 0.5)])
def test_resuming_with_other_features_to_match_is_refused(name, value, copied_run, finished):
    options = {"feature_run": str(finished), "feature_weight": 0.25}
    state = load_state(copied_run)
    state["config"].update({**options, name: value})
    torch.save(state, copied_run / STATE)
    message = fail("train.py", copied_run, **options)
    option = f"--{name.replace('_', '-')}"
    assert f"{copied_run} was trained with {option} {value}, not {options[name]}." in message


@pytest.mark.parametrize("only_in", ["state.pth", "the command"])
def test_option_that_only_one_version_knows_is_refused(only_in, copied_run):
    """A version with another option may have begun the run, or may be asked to resume it."""
    state = load_state(copied_run)
    if only_in == "state.pth":
        state["config"]["weight_decay"] = 0.1
        difference = "--weight-decay 0.1, not None"
    else:
        del state["config"]["beta"]
        difference = "--beta None, not 1.0"
    torch.save(state, copied_run / STATE)
    before = contents(copied_run)
    assert f"{copied_run} was trained with {difference}." in fail("train.py", copied_run)
    assert contents(copied_run) == before


def test_run_with_cosine_schedule_cannot_be_trained_further(tmp_path, capsys):
    run = tmp_path / "run"
    succeed("train.py", run, epochs=1, lr_scheduler="cosine")
    succeed("train.py", run, epochs=1, lr_scheduler="cosine")
    assert capsys.readouterr().out.endswith("is finished: 1 epochs.\n")
    message = fail("train.py", run, epochs=2, lr_scheduler="cosine")
    assert "was trained with --epochs 1, not 2." in message


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_data_are_refused(script, copied_run, other_data):
    before = contents(copied_run)
    assert f"{copied_run} was" in fail(script, copied_run, data=other_data)
    assert contents(copied_run) == before


@pytest.mark.parametrize("name", [CONFIG, LOG, WEIGHTS, CLASSIFICATION, BASELINES])
def test_published_run_is_refused_by_train_and_stays_as_it_is(name, copied_run):
    for path in copied_run.iterdir():
        if path.name != name:
            path.unlink()
    before = contents(copied_run)
    assert "training cannot be resumed" in fail("train.py", copied_run)
    assert contents(copied_run) == before


def test_second_of_two_writers_stops_and_writes_nothing(tmp_path):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters())

    def save(previous):
        return train.save(tmp_path, previous, {}, model, optimizer, [{"epoch": 1}])

    def refuse_to_save(previous):
        before = contents(tmp_path)
        with pytest.raises(data.UserError, match="state.pth was removed, or written by another"):
            save(previous)
        assert contents(tmp_path) == before

    refuse_to_save(b"what this process last wrote")
    content = save(None)
    assert content == (tmp_path / STATE).read_bytes()
    assert save(content) == (tmp_path / STATE).read_bytes()
    refuse_to_save(None)
    refuse_to_save(b"what this process last wrote")


@pytest.mark.parametrize("change", ["another option", "trained anew", "trained further"])
def test_classification_is_written_only_if_the_run_is_still_the_same(
    change, copied_run, monkeypatch
):
    """The run changes while the Random Forest is fitted."""
    classification = (copied_run / CLASSIFICATION).read_bytes()
    log = log_of(copied_run)
    fit = RandomForestClassifier.fit

    def change_run_and_fit(*arguments):
        if change == "another option":
            edit_json(copied_run / CONFIG, seed=5)
        elif change == "trained anew":
            (copied_run / LOG).write_bytes(data.log_bytes([{**row, "seconds": 0.0} for row in log]))
        else:
            edit_json(copied_run / CONFIG, epochs=3, device="cuda")
            (copied_run / LOG).write_bytes(data.log_bytes([*log, {**log[-1], "epoch": 3}]))
        return fit(*arguments)

    monkeypatch.setattr(RandomForestClassifier, "fit", change_run_and_fit)
    (copied_run / CLASSIFICATION).write_bytes(b"{}")
    if change == "trained further":
        succeed("classify.py", copied_run)
        assert (copied_run / CLASSIFICATION).read_bytes() == classification
    else:
        assert f"{copied_run} has another run than before" in fail("classify.py", copied_run)
        assert (copied_run / CLASSIFICATION).read_bytes() == b"{}"


def test_failed_baselines_keep_the_classification(tmp_path):
    """600 images do not have 700 principal components."""
    run = tmp_path / "run"
    succeed("train.py", run, epochs=1, latent_dim=700)
    with pytest.raises(ValueError, match="n_components=700"):
        succeed("classify.py", run, "--baselines")
    assert read_json(run / CLASSIFICATION)["epoch"] == 1
    assert not (run / BASELINES).exists()


def test_full_disk_keeps_the_files_of_before(copied_run, monkeypatch):
    def fail_to_write(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail_to_write)
    before = contents(copied_run)
    message = fail("classify.py", copied_run)
    assert f"{copied_run / CLASSIFICATION} cannot be written: No space left on device" in message
    assert contents(copied_run) == before


def test_temporary_names_differ_even_if_process_numbers_do_not(tmp_path, monkeypatch):
    """Containers that share a disk can have equal process numbers."""
    names = []
    monkeypatch.setattr(os, "replace", lambda source, target: names.append(Path(source).name))
    for _ in range(2):
        data.write_bytes(tmp_path / "file", b"")
    assert len(set(names)) == 2
    assert all(name.startswith("file.") and name.endswith(".tmp") for name in names)


def test_file_that_cannot_be_written_is_named(copied_run):
    (copied_run / "samples.png").mkdir()
    assert f"{copied_run / 'samples.png'} cannot be written: Is a directory" in fail(
        "plots.py", copied_run
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_folder_that_cannot_be_written_is_noticed_before_training(capsys):
    """/proc refuses new files even for root."""
    assert "/proc/self" in fail("train.py", "/proc/self")
    assert "epochs 1 to 3" not in capsys.readouterr().out


@pytest.mark.parametrize("name", [STATE, CONFIG, LOG, WEIGHTS, CLASSIFICATION])
def test_damaged_file_is_named_and_nothing_is_changed(name, copied_run):
    (copied_run / name).write_bytes(b"damaged")
    before = contents(copied_run)
    script = "train.py" if name == STATE else "plots.py"
    assert f"{copied_run / name} cannot be used (" in fail(script, copied_run)
    assert contents(copied_run) == before


def test_what_is_missing_in_a_file_is_named(copied_run):
    def message_without(name, text):
        before = (copied_run / name).read_bytes()
        (copied_run / name).write_text(text)
        message = fail("plots.py", copied_run)
        (copied_run / name).write_bytes(before)
        assert f"{copied_run / name} cannot be used (ValueError: " in message
        return message

    assert "it has no rows" in message_without(LOG, "epoch,test_loss\n")
    columns = ["epoch", "train_loss", "train_bce", "train_kld", "test_loss", "test_bce", "test_kld"]
    for name in columns:
        others = [column for column in columns if column != name]
        text = ",".join(others) + "\n" + ",".join("1" for _ in others)
        assert f"the column {name} is missing" in message_without(LOG, text)
    for file, names in [
        (CONFIG, ["model", "latent_dim", "seed", "epochs", "hold_out", "data_sha256"]),
        (CLASSIFICATION, ["epoch", "accuracy", "recall", "confusion_matrix"]),
    ]:
        for name in names:
            content = read_json(copied_run / file)
            del content[name]
            assert f"{name} is missing" in message_without(file, json.dumps(content))


def test_weights_of_another_network_cannot_be_used(copied_run):
    edit_json(copied_run / CONFIG, latent_dim=9)
    message = fail("classify.py", copied_run)
    assert f"{copied_run / WEIGHTS} cannot be used (" in message
    assert "size mismatch for fc_mu.weight" in message
    edit_json(copied_run / CONFIG, model="deep")  # dozens of tensors are missing
    message = fail("classify.py", copied_run)
    assert "Missing key(s) in state_dict" in message
    assert len(message) < len(str(copied_run / WEIGHTS)) + 260


def test_run_of_a_network_that_was_removed_is_reported(copied_run):
    edit_json(copied_run / CONFIG, model="mine")
    message = fail("classify.py", copied_run)
    assert (
        f"{copied_run} needs the network mine, but MODELS in model.py does not have it." in message
    )


@pytest.mark.parametrize("name", [WEIGHTS, STATE])
def test_code_in_a_file_is_not_run(name, copied_run, tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"enc1.weight": Payload()}, copied_run / name)
    message = fail("train.py" if name == STATE else "classify.py", copied_run)
    assert "cannot be used (UnpicklingError: Weights only load failed)" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("script", ["classify.py", "plots.py"])
def test_run_without_weights_names_its_config(script, copied_run):
    (copied_run / WEIGHTS).unlink()
    message = fail(script, copied_run)
    assert f"{copied_run} has no {WEIGHTS}." in message
    assert CONFIG in message


def test_missing_log_is_named(copied_run):
    (copied_run / LOG).unlink()
    assert f"{copied_run / LOG} cannot be read: No such file" in fail("classify.py", copied_run)


# --- Devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_gpu_that_fails_is_reported_in_one_line(asked, copied_run, monkeypatch):
    ones = torch.ones

    def fail_to_convolve(images, weight):
        raise RuntimeError("CUDA error: no kernel image is available. Compile with\nadvice.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    monkeypatch.setattr(F, "conv2d", fail_to_convolve)
    before = contents(copied_run)
    message = fail("train.py", copied_run, device=asked)
    problem = "The GPU cannot be used (RuntimeError: CUDA error: no kernel image is available). Use"
    assert problem in message
    assert "CUDA_VISIBLE_DEVICES=" in message
    assert contents(copied_run) == before


def test_auto_is_the_cpu_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.choose_device("auto") == "cpu"
    assert train.choose_device("cpu") == "cpu"


def test_convolutions_are_computed_in_float32(tmp_path):
    torch.backends.cudnn.allow_tf32 = True
    succeed("train.py", tmp_path / "run", epochs=1)
    assert not torch.backends.cudnn.allow_tf32


class FakeGraph:
    """Stands in for a CUDA graph on the CPU. It is replayed by computing `sums_of` again."""

    images = None  # the tensor that the captured step reads
    sums = None  # the tensor that it writes
    replays = 0

    def replay(self):
        """Do what the captured step has done, with the same tensors."""
        self.replays += 1
        self.sums.copy_(sums_of(self.images))


def sums_of(images):
    """Return two sums of a batch, as a training step does."""
    return torch.stack((images.sum(), images.square().sum()))


def test_captured_step_is_recorded_once_and_then_replayed(monkeypatch):
    calls = []
    graphs = []

    def step(images):
        sums = sums_of(images)
        calls.append((images, sums))
        return sums

    @contextlib.contextmanager
    def record(graph):
        yield
        graph.images, graph.sums = calls[-1]
        graph.sums.fill_(math.nan)  # what is recorded is not computed yet
        graphs.append(graph)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    captured = train.CapturedStep(step, batch_size=4)
    batches = []
    results = []
    # The first three batches of four are not captured, the fourth one is. It and the next two are
    # replayed. Batches of three are computed as they are.
    for size in (3, 4, 4, 3, 4, 4, 4, 3, 4):
        batch = torch.rand(size, 2)
        batches.append(batch.clone())
        results.append(captured(batch))

    assert [len(images) for images, _ in calls] == [3, 4, 4, 3, 4, 4, 3]
    assert len(graphs) == 1
    assert graphs[0].replays == 3
    # A replay does not change what was returned before.
    torch.testing.assert_close(results, [sums_of(batch) for batch in batches])


def test_step_that_cannot_be_captured_ends_the_run(monkeypatch):
    def fail_to_capture(graph):
        raise RuntimeError("CUDA error: operation not permitted. Compile with\nadvice.")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", fail_to_capture)
    captured = train.CapturedStep(sums_of, batch_size=4)
    for _ in range(3):
        captured(torch.rand(4, 2))
    with pytest.raises(data.UserError) as caught:
        captured(torch.rand(4, 2))
    message = str(caught.value)
    assert "captured as a CUDA graph (RuntimeError: CUDA error: operation not permitted)" in message
    assert ".item()" in message
    assert "--device cpu" in message


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_step_trains_as_an_uncaptured_one():
    """In float64, rounding differences stay far below the tolerance.

    The step is captured in the first epoch. The learning rate changes before the second, and is 0
    in the last.
    """
    train.use_fast_kernels()
    images = TRAIN_IMAGES.double().cuda()
    results = []
    for is_captured in (False, True):
        torch.manual_seed(0)
        model = ConvVAE(8).double().to("cuda", memory_format=torch.channels_last)
        optimizer = train.make_optimizer(model, 1e-3, "cuda")

        def step(batch, model=model, optimizer=optimizer):
            return train.train_step(model, optimizer, batch, 1.0, None, 0.0)

        if is_captured:
            step = train.CapturedStep(step, batch_size=32)
        losses = []
        for lr in (1e-3, 2e-4, 5e-4):
            train.set_learning_rate(optimizer, lr)
            for batch in images.split(32):
                losses.append(step(batch))
        weights = copy.deepcopy(model.state_dict())
        train.set_learning_rate(optimizer, 0.0)
        step(images[:32])
        torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
        results.append(torch.stack(losses).cpu())
        if is_captured:
            assert step.graph is not None
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=0)


# --- Classification and metrics -------------------------------------------------------------


@pytest.fixture(scope="session")
def means_by_hand(finished_network):
    """The latent means of training and test images, by the report's network in float64."""
    model = ReportVAE(8).double()
    model.load_state_dict(finished_network.state_dict())
    with torch.no_grad():
        _, train_mu, _ = model(TRAIN_IMAGES.double())
        _, test_mu, _ = model(TEST_IMAGES.double())
    return train_mu.float(), test_mu.float()


def forest_by_hand(train_features, train_labels=TRAIN_LABELS, **options):
    """Return a Random Forest with these options, and otherwise those of the report."""
    options = {"n_estimators": 100, "random_state": 42, **options}
    return RandomForestClassifier(**options).fit(train_features, train_labels)


def test_latent_means_are_computed_in_float64(finished_network, means_by_hand):
    assert torch.equal(latent_means(finished_network, TEST_IMAGES), means_by_hand[1])


def test_latent_means_do_not_depend_on_the_mode_of_the_model():
    model = MODELS["deep"](8)
    model(TEST_IMAGES[:50])  # moves the running means of BatchNorm
    mu = latent_means(model, TEST_IMAGES[:20])
    assert model.training
    one_by_one = [latent_means(model, TEST_IMAGES[[number]]) for number in range(20)]
    torch.testing.assert_close(torch.cat(one_by_one), mu)
    with torch.no_grad():
        expected, _ = model.eval().encode(TEST_IMAGES[:20])
    torch.testing.assert_close(mu, expected, rtol=1e-4, atol=1e-4)


WRONG_IMAGES = {
    "no tensor": np.zeros((2, 1, 28, 28), np.float32),
    "no channel": torch.zeros(2, 28, 28),
    "none": torch.zeros(0, 1, 28, 28),
    "integers": torch.zeros(2, 1, 28, 28, dtype=torch.uint8),
    "not divided by 255": torch.full((2, 1, 28, 28), 255.0),
    "negative": torch.full((2, 1, 28, 28), -0.1),
    "NaN": torch.full((2, 1, 28, 28), torch.nan),
}


@pytest.mark.parametrize("images", WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_latent_means_of_wrong_images_are_refused(images, finished_network):
    with pytest.raises(ValueError, match=r"images must be a tensor \[N, 1, 28, 28\]"):
        latent_means(finished_network, images)


def test_epoch_of_the_classification_is_the_last_one_of_the_log(copied_run, capsys):
    """The run was interrupted in its third epoch."""
    edit_json(copied_run / CONFIG, epochs=9)
    succeed("classify.py", copied_run)
    description = f"{copied_run}: network conv, 8 latent dimensions, epoch 2 of 9\n"
    assert capsys.readouterr().out.startswith(description)
    assert read_json(copied_run / CLASSIFICATION)["epoch"] == 2


def test_random_forest_is_that_of_the_report(finished, means_by_hand):
    result = read_json(finished / CLASSIFICATION)
    train_mu, test_mu = means_by_hand
    predicted = forest_by_hand(train_mu).predict(test_mu)
    matrix = np.zeros((10, 10), int)
    np.add.at(matrix, (TEST_LABELS.numpy(), predicted), 1)
    # Otherwise this test would not notice if rows and columns were swapped.
    assert (matrix != matrix.T).any()
    assert 0.5 < result["accuracy"] < 0.99

    assert result["epoch"] == 2
    assert result["confusion_matrix"] == matrix.tolist()
    assert result["accuracy"] == matrix.trace() / 525
    recall = [matrix[k, k] / (7 * (k + 3)) for k in range(10)]
    assert result["recall"] == dict(zip(data.CLASSES, recall))


def test_forest_has_the_trees_of_the_report(means_by_hand):
    train_mu, test_mu = means_by_hand
    forest = forest_by_hand(train_mu)
    shares = classify.fit_forest(train_mu, TRAIN_LABELS).predict_proba(test_mu)
    assert np.array_equal(shares, forest.predict_proba(test_mu))


def test_run_with_a_validation_split_is_evaluated_on_it(tmp_path):
    run = tmp_path / "run"
    succeed("train.py", run, epochs=1, hold_out=100)
    succeed("classify.py", run)
    matrix = np.array(read_json(run / CLASSIFICATION)["confusion_matrix"])
    assert matrix.sum(axis=1).tolist() == TRAIN_LABELS[-100:].bincount(minlength=10).tolist()


def test_class_without_test_images_has_no_recall(capsys):
    matrix = np.diag([5] * 9 + [0])
    matrix[0, 1] = 15
    recall = classify.share_correct_by_class(matrix)
    assert list(recall.values()) == [0.25] + [1.0] * 8 + [None]
    classify.print_classification(matrix, 0.9, recall)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [*data.CLASSES[0].split(), "5", "15", *["0"] * 8, "25.0%", "correct"]
    assert lines[10].split() == [*data.CLASSES[9].split(), *["0"] * 10]
    assert json.loads(data.json_bytes(recall))[data.CLASSES[9]] is None


def test_baselines_are_measured_without_the_network(finished):
    baselines = read_json(finished / BASELINES)
    train_pixels = TRAIN_IMAGES.reshape(-1, 784).double().numpy()
    test_pixels = TEST_IMAGES.reshape(-1, 784).double().numpy()
    pca = PCA(8, random_state=42).fit(train_pixels)
    on_pixels = forest_by_hand(train_pixels)
    on_components = forest_by_hand(pca.transform(train_pixels))
    pca_accuracy = on_components.score(pca.transform(test_pixels), TEST_LABELS)
    quality = classify.sample_quality(
        TRAIN_IMAGES[:525], TEST_IMAGES, PCA(50, random_state=42).fit(train_pixels)
    )
    assert baselines == {
        "pixels": pytest.approx(on_pixels.score(test_pixels, TEST_LABELS), abs=1e-12),
        "pca": pytest.approx(pca_accuracy, abs=1e-12),
        "training_images": pytest.approx(quality, rel=1e-6),
    }


def test_metrics_of_a_run_are_those_of_its_network(active_run):
    """Reconstructions and samples are drawn as by classify.py, with the same random numbers."""
    result = read_json(active_run / CLASSIFICATION)
    network = network_of(active_run)
    assert not network.training
    train_mu = latent_means(network, TRAIN_IMAGES)
    test_mu = latent_means(network, TEST_IMAGES)
    # 600 latent means in 8 dimensions are enough for 12 Gaussians.
    mixture = GaussianMixture(12, tol=0.03, random_state=42).fit(train_mu.double())
    mixture_z, _ = mixture.sample(525)
    pca = PCA(50, random_state=42).fit(TRAIN_IMAGES.flatten(1).double())
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = [network(batch) for batch in TEST_IMAGES.split(128)]
        samples = network.decode(torch.randn(525, 8))
        mixture_samples = network.decode(torch.tensor(mixture_z).float())
    reconstructions, mu, logvar = (torch.cat(parts) for parts in zip(*outputs))
    bce = F.binary_cross_entropy(reconstructions, TEST_IMAGES, reduction="sum").item() / 525
    loss = report_loss(reconstructions, TEST_IMAGES, mu, logvar).item() / 525
    expected = {
        "bce": bce,
        "kld": loss - bce,
        "mse": (reconstructions - TEST_IMAGES).square().mean().item(),
        "active_dimensions": (test_mu.var(dim=0) > 0.01).sum().item(),
    }
    for name, images in [("bce_floor", TEST_IMAGES), ("train_bce_floor", TRAIN_IMAGES)]:
        entropy = torch.special.entr(images).sum() + torch.special.entr(1 - images).sum()
        expected[name] = entropy.item() / len(images)
    expected["excess_bce"] = bce - expected["bce_floor"]
    energies = []
    for images in (reconstructions, TEST_IMAGES):
        below = (images[:, :, 1:] - images[:, :, :-1]).square().sum()
        beside = (images[..., 1:] - images[..., :-1]).square().sum()
        energies.append((below + beside).item())
    expected["sharpness_reconstructions"] = energies[0] / energies[1]
    for name, images in [("samples", samples), ("mixture_samples", mixture_samples)]:
        for metric, value in classify.sample_quality(images, TEST_IMAGES, pca).items():
            expected[f"{metric}_{name}"] = value
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_dimensions_with_a_variance_above_one_hundredth_are_active():
    mu = torch.tensor([[-1.0], [1.0]]) * torch.tensor([0.0, 0.0705, 0.0709, 1.0])
    # Two values ±x have the variance 2 x².
    assert active_dimensions(mu) == 2


def test_active_dimensions_are_counted_in_test_images(finished_network, monkeypatch):
    monkeypatch.setattr(classify, "active_dimensions", len)
    metrics = classify.evaluate(finished_network, TRAIN_IMAGES[:100], TEST_IMAGES[:80])
    assert metrics["active_dimensions"] == 80


def test_sharpness_of_an_edge_is_the_same_in_both_directions():
    image = torch.zeros(1, 1, 28, 28)
    image[..., :14] = 0.5
    energy = 28 * 0.5**2  # 28 pairs of neighbors differ by 0.5
    assert classify.gradient_energy(image) == energy
    assert classify.gradient_energy(torch.cat((image, image.mT, image))) == energy


def quality_of_points(points, reference):
    """Return frechet, precision and recall of points [M, 2] compared with reference [N, 2].

    The points are the first two pixels of images, and stand in for principal components.
    """
    pca = SimpleNamespace(transform=lambda pixels: pixels[:, :2].numpy())
    samples = F.pad(torch.as_tensor(points), (0, 782)).view(-1, 1, 28, 28)
    images = F.pad(torch.as_tensor(reference), (0, 782)).view(-1, 1, 28, 28)
    return classify.sample_quality(samples, images, pca)


def test_sample_quality_of_the_images_themselves_is_perfect():
    points = torch.randn(300, 2)
    perfect = {"frechet": 0, "precision": 1, "recall": 1}
    assert quality_of_points(points, points) == pytest.approx(perfect, abs=1e-9)


def test_frechet_distance_of_two_gaussians_matches_its_definition():
    points = torch.randn(300, 2).double()
    other = torch.randn(200, 2).double() @ torch.tensor([[1.0, 2.0], [0.0, 0.5]]).double() + 1
    covariance = points.T.cov()
    other_covariance = other.T.cov()
    # The trace of a matrix root is the sum of the roots of the eigenvalues.
    root_trace = torch.linalg.eigvals(covariance @ other_covariance).real.sqrt().sum()
    distance = (points.mean(dim=0) - other.mean(dim=0)).square().sum()
    distance += covariance.trace() + other_covariance.trace() - 2 * root_trace
    assert quality_of_points(points, other)["frechet"] == pytest.approx(distance.item(), rel=1e-5)


def test_recall_is_the_share_of_classes_that_samples_cover():
    centers = 50 * torch.arange(10).repeat_interleave(60).unsqueeze(1)
    ten_classes = centers + torch.randn(600, 2)  # more than are compared at a time
    quality = quality_of_points(ten_classes[:120] + 0.01, ten_classes)
    assert quality["precision"] == 1
    assert quality["recall"] == pytest.approx(0.2, abs=0.02)


def test_manifold_reaches_as_far_as_the_third_nearest_neighbor():
    # The third-nearest neighbors of these points are 3, 2, 2 and 3 away.
    line = [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]
    # The first and third of these are just within reach, the others are not.
    points = [[-3.0, 0.0], [-3.1, 0.0], [6.0, 0.0], [6.1, 0.0]]
    assert quality_of_points(points, line)["precision"] == 0.5
    assert quality_of_points(line, points)["recall"] == 0.5


class FirstPixels(nn.Module):
    """A network whose latent means are the first pixels of an image."""

    def __init__(self, latent_dim):
        super().__init__()
        self.latent_dim = latent_dim

    def encode(self, x):
        """Return the first pixels [N, latent_dim], and no log variances."""
        return x.flatten(1)[:, : self.latent_dim], None


@pytest.mark.parametrize("n, latent_dim, gaussians", [(599, 8, 12), (12_000, 2, 50), (40, 8, 1)])
def test_mixture_has_at_most_a_gaussian_for_six_means_per_dimension(n, latent_dim, gaussians):
    images = torch.rand(n, 1, 28, 28)
    mu = images.flatten(1)[:10_000, :latent_dim].double()
    mixture = GaussianMixture(gaussians, tol=0.03, random_state=42)
    expected, _ = mixture.fit(mu).sample(5)
    z = sample_mixture(FirstPixels(latent_dim), images, 5)
    torch.testing.assert_close(z, torch.tensor(expected).float())


@pytest.mark.filterwarnings("error")
def test_mixture_of_equal_latent_means_has_one_gaussian():
    z = sample_mixture(FirstPixels(8), torch.full((700, 1, 28, 28), 0.7), 5)
    # scikit-learn adds 1e-6 to variances, so the standard deviation is 0.001.
    assert (z - 0.7).abs().max() < 0.01


# --- Figures of a run -----------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The figures that plots.py would write, as {file name: figure}. Grids are left empty."""
    saved = {}
    monkeypatch.setattr(plots, "draw_grid", lambda *rows, **names: None)
    monkeypatch.setattr(plots, "save", lambda run, name, figure: saved.update({name: figure}))
    return saved


@pytest.fixture(scope="session")
def active_figures(active_run):
    """The figures that plots.py draws for the active run, as {file name: figure}."""
    saved = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", lambda run, name, figure: saved.update({name: figure}))
        succeed("plots.py", active_run)
    return saved


def shown_images(figure):
    """Return the images of a grid as they are shown, [N, 28, 28, 4], in colors from 0 to 1."""
    shown = []
    for axis in figure.axes:
        (image,) = axis.images
        colors = torch.tensor(image.to_rgba(image.get_array()))
        is_upright = axis.get_ylim()[0] > axis.get_ylim()[1]
        shown.append(colors if is_upright else colors.flip(0))
    return torch.stack(shown).float()


def assert_shows(figure, images):
    """Check that a grid shows these images [N, 1, 28, 28], from black to white."""
    expected = images.movedim(1, 3).expand(-1, -1, -1, 3)
    torch.testing.assert_close(shown_images(figure)[..., :3], expected, rtol=0, atol=1 / 200)


def first_image_of_each_class():
    """Return the first test image of each class, [10, 1, 28, 28]."""
    return torch.stack([TEST_IMAGES[TEST_LABELS.eq(label)][0] for label in range(10)])


def test_loss_curves_show_both_terms_for_both_splits(active_run, active_figures):
    log = log_of(active_run)
    axes = active_figures["loss_curves.png"].axes
    for axis, loss in zip(axes, ["loss", "bce", "kld"], strict=True):
        assert axis.get_title().lower().startswith(loss)
        for line, split, color in zip(axis.lines, ["train", "test"], ["C0", "C1"], strict=True):
            assert line.get_label() == split
            assert to_hex(line.get_color()) == to_hex(color)
            # The first of many epochs is left out.
            values = [[row["epoch"], row[f"{split}_{loss}"]] for row in log[1:]]
            assert line.get_xydata().tolist() == values
        assert axis.get_xlabel() == "epoch"
    assert axes[0].get_ylabel() == "nats per image"
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["train", "test"]
    for axis in plots.draw_losses(log[:2]).axes:
        assert axis.lines[0].get_xdata().tolist() == [1, 2]


def test_reconstructions_are_those_of_the_first_image_of_each_class(active_run, active_figures):
    figure = active_figures["reconstructions.png"]
    images = first_image_of_each_class()
    model = network_of(active_run)
    with torch.no_grad():
        torch.manual_seed(0)
        reconstructions, _, _ = model(images)
    assert_shows(figure, torch.cat((images, reconstructions)))
    assert [axis.get_title() for axis in figure.axes[:10]] == data.CLASSES
    row_names = [axis.get_ylabel() for axis in figure.axes[::10]]
    assert row_names == ["original", "reconstruction"]


def test_samples_come_from_the_prior_and_from_a_mixture(active_run, active_figures):
    figure = active_figures["samples.png"]
    model = network_of(active_run)
    mixture_z = sample_mixture(model, TRAIN_IMAGES, 50)
    with torch.no_grad():
        torch.manual_seed(0)
        samples = model.decode(torch.cat((torch.randn(50, 8), mixture_z)))
    assert_shows(figure, samples)
    row_names = [axis.get_ylabel() for axis in figure.axes[::10]]
    assert row_names == ["N(0, I)", "", "", "", "", "mixture", "", "", "", ""]


def test_samples_of_two_latent_dimensions_are_a_grid():
    model = ConvVAE(2)
    with torch.no_grad():
        figure = plots.draw_samples(model, 2, TRAIN_IMAGES)
        # The 5 % and 95 % quantiles of the normal distribution are ±1.645.
        corners = model.decode(torch.tensor([[-1.645, -1.645], [-1.645, 1.645], [1.645, -1.645]]))
    shown = shown_images(figure)[[0, 9, 90], ..., 0]
    torch.testing.assert_close(shown, corners[:, 0], rtol=0, atol=1 / 200)
    assert figure.axes[9].get_title() == "z₂ = 1.6"
    assert figure.axes[90].get_ylabel() == "z₁ = 1.6"


def test_interpolations_follow_straight_lines_between_latent_means(active_run, active_figures):
    figure = active_figures["interpolations.png"]
    model = network_of(active_run)
    images = first_image_of_each_class()
    mu = latent_means(model, images)
    expected = []
    for first in (0, 2, 4, 6, 8):
        expected.append(images[[first]])
        for step in range(10):
            z = mu[first] + step / 9 * (mu[first + 1] - mu[first])
            with torch.no_grad():
                expected.append(model.decode(z.unsqueeze(0)))
        expected.append(images[[first + 1]])
    assert_shows(figure, torch.cat(expected))
    # The last of an odd number of classes has no partner.
    with torch.no_grad():
        figure = plots.draw_interpolations(model, images[:3])
    assert_shows(figure, torch.cat(expected[:12]))


def test_latent_space_is_drawn_by_pca_and_by_tsne(active_run, active_figures):
    figure = active_figures["latent_space.png"]
    points = []
    for axis, name in zip(figure.axes, ["PCA", "t-SNE"], strict=True):
        assert axis.get_title() == f"{name} of μ, 100 test images"
        colors = axis.collections[0].get_facecolors().tolist()
        assert colors == [list(to_rgba(f"C{label}")) for label in TEST_LABELS[:100]]
        points.append(axis.collections[0].get_offsets())
    mu = latent_means(network_of(active_run), TEST_IMAGES[:100])
    # The sign of a principal component is arbitrary.
    assert np.allclose(np.abs(points[0]), np.abs(PCA(2).fit_transform(mu)), atol=1e-3)
    # t-SNE keeps neighborhoods, which a wrong order of the points would destroy.
    assert trustworthiness(mu, points[1]) > 0.9
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == data.CLASSES
    colors = [to_hex(line.get_color()) for line in legend.get_lines()]
    assert colors == [to_hex(f"C{label}") for label in range(10)]


def test_confusion_matrix_is_that_of_classification_json(active_run, active_figures):
    result = read_json(active_run / CLASSIFICATION)
    axis = active_figures["confusion_matrix.png"].axes[0]
    assert axis.images[0].get_array().tolist() == result["confusion_matrix"]
    for text in axis.texts:
        column, row = text.get_position()
        assert int(text.get_text()) == result["confusion_matrix"][row][column]
    assert [label.get_text() for label in axis.get_yticklabels()] == data.CLASSES
    assert axis.get_ylabel() == "True label"
    assert f"epoch 4: {result['accuracy'] * 100:.2f} %" in axis.get_title()


def test_confusion_matrix_has_the_names_with_which_it_was_measured(active_run, monkeypatch):
    result = read_json(active_run / CLASSIFICATION)
    monkeypatch.setattr(data, "CLASSES", ["another name"])
    axis = plots.draw_confusion_matrix(result).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == list(result["recall"])


def test_figures_are_upright_whatever_the_settings_of_matplotlib(active_run):
    images = first_image_of_each_class()
    result = read_json(active_run / CLASSIFICATION)
    with matplotlib.rc_context({"image.origin": "lower"}):
        grid = plots.draw_grid([images])
        matrix = plots.draw_confusion_matrix(result)
    assert_shows(grid, images)
    bottom, top = matrix.axes[0].get_ylim()
    assert bottom > top  # the first row is at the top


def test_what_cannot_be_drawn_is_left_out(drawn, tmp_path, capsys):
    """One class has no other to interpolate to, and one latent dimension no plane."""
    labels = torch.zeros_like(TEST_LABELS)
    root = write_dataset(tmp_path / "data", dataset_files(test_split=(TEST_SPLIT[0], labels)))
    run = tmp_path / "run"
    succeed("train.py", run, epochs=1, data=root, latent_dim=1)
    weights = torch.load(run / WEIGHTS, weights_only=True)
    weights["fc_mu.weight"] *= 1000  # so that the dimension has not collapsed
    torch.save(weights, run / WEIGHTS)
    succeed("plots.py", run, data=root)
    assert list(drawn) == ["loss_curves.png", "reconstructions.png", "samples.png"]
    assert "collapsed" not in capsys.readouterr().err


def test_stale_or_missing_classification_is_not_drawn(copied_run, drawn, capsys):
    path = copied_run / CLASSIFICATION
    succeed("train.py", copied_run)
    for problem in ("is from epoch 2, but the run has 3 epochs", "is missing"):
        succeed("plots.py", copied_run)
        advice = f"To write it: python classify.py --run {copied_run}"
        assert f"{path} {problem}. {advice}" in capsys.readouterr().err
        path.unlink(missing_ok=True)
    assert "confusion_matrix.png" not in drawn
    assert "samples.png" in drawn


def test_collapsed_latent_dimensions_are_reported(copied_run, drawn, capsys):
    weights = torch.load(copied_run / WEIGHTS, weights_only=True)
    weights["fc_mu.weight"].zero_()
    torch.save(weights, copied_run / WEIGHTS)
    succeed("classify.py", copied_run)
    succeed("plots.py", copied_run)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert all("all latent dimensions have collapsed" in warning for warning in warnings)
    assert "More epochs or a smaller --beta may help." in warnings[0]
    assert read_json(copied_run / CLASSIFICATION)["active_dimensions"] == 0
    assert "latent_space.png" not in drawn


# --- The scripts as a user runs them --------------------------------------------------------

ACCURACY_KEYS = ["accuracy", "recall", "confusion_matrix"]
FIGURES = [
    "loss_curves.png",
    "reconstructions.png",
    "samples.png",
    "interpolations.png",
    "latent_space.png",
    "confusion_matrix.png",
]


def test_three_commands_print_and_write_what_the_readme_shows(tmp_path):
    """classify.py and plots.py share a process, because importing PyTorch takes seconds."""
    run = tmp_path / "run"
    options = options_for("train.py", run, model="fc", lr=0.002, beta=0)
    printed = output_of("train.py", *options)
    description = f"{run}: network fc, 8 latent dimensions, epoch 3 of 3"
    data_line = f"{SMALL_DATA_LINE} (not Fashion-MNIST)"
    cpu = f"cpu ({torch.backends.cpu.get_cpu_capability()}, 1 thread)"
    expected = [data_line, f"FullyConnectedVAE on {cpu}, epochs 1 to 3"]
    for row in log_of(run):
        left = timedelta(seconds=round(row["seconds"] * (3 - row["epoch"])))
        expected.append(
            f"Epoch {row['epoch']:.0f}: Train loss {row['train_loss']:.2f}, "
            f"Test loss {row['test_loss']:.2f}, {row['seconds']:.2f} s, {left} left"
        )
    assert printed == expected

    both = "import runpy, sys\nfor script in ('classify.py', 'plots.py'):\n"
    both += "    runpy.run_path(script, run_name='__main__')"
    printed = output_of("-c", both, *options_for("classify.py", run))
    result = read_json(run / CLASSIFICATION)
    expected = [
        description,
        data_line,
        "Confusion matrix (rows: true class, columns: predicted class, in the same order)",
    ]
    for name, counts in zip(data.CLASSES, result["confusion_matrix"]):
        columns = "".join(f" {count:4d}" for count in counts)
        share = 100 * counts[data.CLASSES.index(name)] / sum(counts)
        expected.append(f"{name:<11}{columns} {share:6.1f}% correct")
    expected.append(f"Classification accuracy: {result['accuracy'] * 100:.2f}%")
    metrics = [name for name in result if name not in ("epoch", *ACCURACY_KEYS)]
    expected += [f"{name}: {result[name]:.4g}" for name in metrics]
    expected += [description, data_line, *[str(run / name) for name in FIGURES]]
    assert printed == expected
    for name in FIGURES:
        picture = matplotlib.image.imread(run / name)
        assert min(picture.shape[:2]) > 250
        assert picture[..., :3].std() > 0.05
    assert not list(run.glob("*.tmp"))


def output_of(*words):
    """Run Python in a process of its own, without a warning of ours. Return its lines."""
    process = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert process.returncode == 0, process.stderr
    assert "Warning:" not in [line.split(" ")[0] for line in process.stderr.splitlines()]
    return process.stdout.splitlines()


# --- Tables ---------------------------------------------------------------------------------


@pytest.fixture
def folder_of_runs(copied_run, tmp_path):
    """A folder with two seeds of "any" and one of "other", and with what must do no harm."""
    folder = tmp_path / "folder"
    log = [{**row, "train_loss": 400.0, "test_loss": 410.5} for row in log_of(copied_run)]
    (copied_run / LOG).write_bytes(data.log_bytes(log))
    for name in (STATE, WEIGHTS):
        (copied_run / name).unlink()
    for name, seed, mse in [("any", 10, 0.01), ("any", 2, 0.03), ("other", 5, 0.05)]:
        copy_of_run = shutil.copytree(copied_run, folder / name / f"seed{seed}")
        edit_json(copy_of_run / CONFIG, seed=seed)
        edit_json(copy_of_run / CLASSIFICATION, mse=mse, accuracy=0.5)
        if seed != 2:
            (copy_of_run / BASELINES).unlink()
    edit_json(folder / "any" / "seed2" / BASELINES, pca=0.25)
    classification = read_json(folder / "any" / "seed2" / CLASSIFICATION)
    for name in ("frechet", "precision", "recall"):
        del classification[f"{name}_samples"], classification[f"{name}_mixture_samples"]
    data.write_bytes(folder / "any" / "seed2" / CLASSIFICATION, data.json_bytes(classification))
    (folder / "notes.txt").write_text("A stray file")
    (folder / "empty").mkdir()
    (folder / "first epoch" / "seed0").mkdir(parents=True)
    return folder


def printed_by_summary(*words):
    """Return what results/summary.py prints, as a list of the parts between empty lines."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", ["summary.py", *map(str, words)])
        summary.main()
    return output.getvalue().strip().split("\n\n")


def cells_of(table):
    """Return the rows of a table in Markdown, without its titles, as {first cell: other cells}."""
    rows = {}
    for line in table.splitlines()[2:]:
        first, *others = [cell.strip() for cell in line.strip("|").split("|")]
        rows[first] = others
    return rows


def test_tables_show_mean_and_standard_deviation_over_the_seeds(folder_of_runs):
    losses, reconstructions, samples = map(cells_of, printed_by_summary(folder_of_runs))
    assert losses["any"][:4] == ["2", "400.0±0.0", "400.00±0.00", "410.50±0.00"]
    assert reconstructions["any"][:2] == ["2", "20.00±14.14"]
    assert reconstructions["other"][:2] == ["1", "50.00"]
    assert reconstructions["PCA, 8 components"] == ["1", "", "", "", "25.00"]
    # The metrics of samples were measured for one of two seeds.
    assert samples["any"][0] == "1"
    assert "±" not in "".join(samples["any"])
    assert len(samples["training images"]) == 7
    assert list(reconstructions) == ["any", "other", "PCA, 8 components", "pixels"]


def test_seeds_are_in_the_order_of_numbers(folder_of_runs):
    """seed10 comes after seed2."""
    results = summary.load_results(folder_of_runs)
    assert [result.metrics["mse"] for result in results["any"]] == [0.03, 0.01]


def test_runs_that_differ_in_an_option_are_refused(folder_of_runs):
    path = folder_of_runs / "any" / "seed2" / CONFIG
    config = read_json(path)
    for name in ("seed", "torch", "device"):
        edit_json(path, **{name: 3})
        assert "| any | 2 |" in printed_by_summary(folder_of_runs)[0]
    options = [name for name in config if name not in ("seed", "torch", "device")]
    assert len(options) > 10
    for name in [*options, "an option of another version"]:
        path.write_text(json.dumps({**config, name: "other"}))
        with pytest.raises(data.UserError, match=f"different values of {name} in their configs"):
            printed_by_summary(folder_of_runs)
    path.write_text(json.dumps({**config, "seed": 10}))
    with pytest.raises(data.UserError, match="the same seed"):
        printed_by_summary(folder_of_runs)


@pytest.mark.parametrize("name, value", [("data_sha256", "x"), ("hold_out", 100)])
def test_runs_on_other_data_are_not_in_the_same_table(name, value, folder_of_runs):
    edit_json(folder_of_runs / "other" / "seed5" / CONFIG, **{name: value})
    with pytest.raises(data.UserError, match=f"trained on different data .{name} in their configs"):
        printed_by_summary(folder_of_runs)


def test_runs_of_different_lengths_are_refused(folder_of_runs):
    run = folder_of_runs / "any" / "seed2"
    (run / LOG).write_bytes(data.log_bytes(log_of(run)[:1]))
    edit_json(run / CLASSIFICATION, epoch=1)
    with pytest.raises(data.UserError, match="different numbers of epochs"):
        printed_by_summary(folder_of_runs)


def test_stale_classification_is_left_out_of_the_tables(folder_of_runs, capsys):
    edit_json(folder_of_runs / "other" / "seed5" / CLASSIFICATION, epoch=1)
    assert "other" not in cells_of(printed_by_summary(folder_of_runs)[0])
    assert "is from epoch 1" in capsys.readouterr().err


def test_folder_without_evaluated_runs_is_reported(tmp_path):
    with pytest.raises(data.UserError, match="no evaluated runs"):
        printed_by_summary(tmp_path)


def test_value_is_bold_if_a_t_test_says_that_it_differs():
    """With four degrees of freedom, the p-value has a closed form."""
    reference = [1.0, 2.0, 3.0]
    for values, t in [([4.0, 5.0, 6.0], 3 / (2 / 3) ** 0.5), ([7.0, 8.0, 9.0], 6 / (2 / 3) ** 0.5)]:
        theta = math.atan(t / 2)
        p_value = 1 - math.sin(theta) * (1 + math.cos(theta) ** 2 / 2)
        assert summary.t_test(values, reference) == pytest.approx(p_value)
        assert summary.differs(values, reference) == (p_value < 0.01)
    assert not summary.differs([1.0, 1.0], [1.0, 1.0])
    assert summary.differs([2.0, 2.0], [1.0, 1.0])
    # One seed is too few to tell.
    assert not summary.differs([100.0], reference)
    results = [summary.Result(None, {"mse": value / 1000}) for value in (7.0, 8.0, 9.0)]
    others = [summary.Result(None, {"mse": value / 1000}) for value in reference]
    assert summary.cell(results, "mse", others) == "**8.00±1.00**"
    assert summary.cell(results, "mse", results) == "8.00±1.00"


# --- The figures that compare runs ----------------------------------------------------------


def published(name, key):
    """Return a value of classification.json from the published runs that have it, by seed."""
    paths = (ROOT / "results" / name).glob("seed*")
    in_order = sorted(paths, key=lambda path: int(path.name.removeprefix("seed")))
    results = [read_json(path / CLASSIFICATION) for path in in_order]
    return [result[key] for result in results if key in result]


@pytest.fixture(scope="module")
def page_figures():
    """The figures of results/figures.py, {name: figure}, with the small data set's images."""
    written = {}
    _, sha256 = data.load_splits(SMALL_DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "FASHION_MNIST_SHA256", sha256)
        patch.setattr(plots, "png_bytes", lambda figure: figure)
        patch.setattr(data, "write_bytes", written.__setitem__)
        patch.setattr(sys, "argv", ["figures.py", f"--data={SMALL_DATA}"])
        figures.main()
    assert {path.parent for path in written} == {ROOT / "results"}
    return {path.name: figure for path, figure in written.items()}


def one_line(label):
    """Return a label that may have several lines in one."""
    return " ".join(label.replace("/\n", "/").split())


def test_hero_shows_reconstructions_of_three_networks_with_their_errors(page_figures):
    images = first_image_of_each_class()
    rows = [images]
    names = ["original"]
    for folder, title in [
        ("fc-latent32", "fully connected,"),
        ("latent32", "ConvVAE,"),
        ("beta0.1", "ConvVAE, β = 0.1,"),
    ]:
        network = network_of(ROOT / "results" / folder / "seed0")
        torch.manual_seed(0)
        with torch.no_grad():
            rows.append(network(images)[0])
        names.append(f"{title} MSE × 1000 = {1000 * published(folder, 'mse')[0]:.1f}")
    figure = page_figures["hero.png"]
    assert_shows(figure, torch.cat(rows))
    assert figure.get_supxlabel().endswith("lower is better")
    assert [one_line(axis.get_ylabel()) for axis in figure.axes[::10]] == names
    assert [one_line(axis.get_title()) for axis in figure.axes[:10]] == data.CLASSES


def test_samples_of_the_pages_are_those_of_two_networks(page_figures):
    rows = []
    names = []
    for folder, beta in [("latent32", "β = 1"), ("beta0.1", "β = 0.1")]:
        network = network_of(ROOT / "results" / folder / "seed0")
        torch.manual_seed(0)
        with torch.no_grad():
            rows.append(network.decode(torch.randn(10, 32)))
            rows.append(network.decode(sample_mixture(network, TRAIN_IMAGES, 10)))
        names.append(f"{beta}, N(0, I), Fréchet {published(folder, 'frechet_samples')[0]:.2f}")
        distance = published(folder, "frechet_mixture_samples")[0]
        names.append(f"{beta}, mixture, Fréchet {distance:.2f}")
    figure = page_figures["samples.png"]
    assert_shows(figure, torch.cat(rows))
    assert figure.get_supxlabel().endswith("lower is better")
    assert [one_line(axis.get_ylabel()) for axis in figure.axes[::10]] == names


def test_matrices_are_in_percent_of_each_true_class(page_figures):
    report = np.array(read_json(ROOT / "results" / "report_matrix.json"))
    ours = np.array(published("latent16", "confusion_matrix")[0])
    axes = page_figures["matrices.png"].axes
    for axis, matrix, title in zip(axes, (report, ours), ("report", "Ours"), strict=True):
        percent = 100 * matrix / matrix.sum(axis=1, keepdims=True)
        assert np.allclose(axis.images[0].get_array(), percent)
        for text in axis.texts:
            column, row = text.get_position()
            assert text.get_visible() == (percent[row, column] >= 1.5)
            assert text.get_text() == f"{percent[row, column]:.0f}"
        share = f"{100 * matrix.trace() / matrix.sum():.1f} % of {matrix.sum():,} correct"
        assert title in axis.get_title()
        assert share in axis.get_title()
        assert "predicted" in axis.get_xlabel()
        assert axis.yaxis_inverted()
    assert "true" in axes[0].get_ylabel()
    assert [label.get_text() for label in axes[0].get_yticklabels()] == data.CLASSES


def test_figure_of_beta_shows_all_seeds_and_their_means(page_figures):
    folders = {0.1: "beta0.1", 0.5: "beta0.5", 1: "latent32", 2: "beta2", 4: "beta4"}
    terms, accuracy, active = page_figures["beta.png"].axes
    means = []
    for line, label, (beta, folder) in zip(terms.lines, terms.texts, folders.items()):
        points = list(zip(published(folder, "excess_bce"), published(folder, "kld")))
        assert np.allclose(line.get_xydata(), points)
        means.append(np.mean(points, axis=0))
        assert label.get_text().startswith(f"β = {beta}")
        assert np.allclose(label.xy, means[-1])
    assert np.allclose(terms.lines[-1].get_xydata(), means)
    assert all(terms.viewLim.contains(x, y) for line in terms.lines for x, y in line.get_xydata())
    assert terms.get_xlabel().startswith("BCE")
    assert terms.get_ylabel().startswith("KLD")
    for axis, key, factor in [(accuracy, "accuracy", 100), (active, "active_dimensions", 1)]:
        means = []
        for line, (beta, folder) in zip(axis.lines, folders.items()):
            points = [[beta, factor * value] for value in published(folder, key)]
            assert np.allclose(line.get_xydata(), points)
            means.append(np.mean(points, axis=0))
        assert np.allclose(axis.lines[-1].get_xydata(), means)
        assert key.split("_")[0] in axis.get_title()
        low, high = axis.get_ylim()
        assert all(low < y < high for line in axis.lines for y in line.get_ydata())
        assert [label.get_text() for label in axis.get_xticklabels()] == list(map(str, folders))


def test_figure_of_accuracies_has_a_dot_for_each_network_and_forest(page_figures):

    def pca_accuracy(name):
        return read_json(ROOT / "results" / name / "seed0" / BASELINES)["pca"]

    (axis,) = page_figures["accuracy.png"].axes
    rows = {
        "fully connected, 32": ("C0", published("fc-latent32", "accuracy")),
        "ConvVAE, 16": ("C0", published("latent16", "accuracy")),
        "ConvVAE, 32": ("C0", published("latent32", "accuracy")),
        "β = 0.1, 32": ("C0", published("beta0.1", "accuracy")),
        "from the search, 32": ("C0", published("best32", "accuracy")),
        "from the search, 64": ("C0", published("best64", "accuracy")),
        "PCA, 16 components": ("C1", [pca_accuracy("latent16")]),
        "PCA, 32 components": ("C1", [pca_accuracy("latent32")]),
        "784 pixels": ("C1", list(read_json(ROOT / "results" / "pixels.json").values())),
    }
    assert [label.get_text() for label in axis.get_yticklabels()] == list(rows)
    assert axis.yaxis_inverted()
    *dots, report = axis.lines
    for y, (line, (color, values)) in enumerate(zip(dots, rows.values(), strict=True)):
        assert np.allclose(line.get_xdata(), 100 * np.array(values))
        assert np.allclose(line.get_ydata(), y, atol=0.4)
        assert to_hex(line.get_color()) == to_hex(color)
    assert report.get_xdata() == [84.01, 84.01]
    assert "16 dimensions: 84.01 %" in axis.get_title(loc="left")
    assert "blue: networks, orange: Random Forests" in axis.get_xlabel()
    assert axis.get_ylim()[0] > len(rows) - 1


# --- The forests of the pages' text, and the speed ------------------------------------------


def test_deviations_are_measured_as_their_rows_say(finished_network, means_by_hand, monkeypatch):
    monkeypatch.setattr(forests, "FEWER_IMAGES", (100, 300))
    monkeypatch.setattr(forests, "FITTED_TEST_IMAGES", 60)
    train_mu, test_mu = means_by_hand
    codes = []
    torch.manual_seed(0)
    for images in (TRAIN_IMAGES, TEST_IMAGES):
        parts = []
        for batch in images.split(128):
            with torch.no_grad():
                mu, logvar = finished_network.encode(batch)
            parts.append(mu + (logvar / 2).exp() * torch.randn_like(mu))
        codes.append(torch.cat(parts))
    shallow = forest_by_hand(train_mu, max_depth=10)
    expected = {
        "as described (latent16/seed0)": forest_by_hand(train_mu).score(test_mu, TEST_LABELS),
        "sampled z instead of mu": forest_by_hand(codes[0]).score(codes[1], TEST_LABELS),
        "10 trees": forest_by_hand(train_mu, n_estimators=10).score(test_mu, TEST_LABELS),
        "depth at most 10": shallow.score(test_mu, TEST_LABELS),
    }
    for count in (100, 300):
        forest = forest_by_hand(train_mu[:count], TRAIN_LABELS[:count])
        name = f"fitted on the first {count} training images"
        expected[name] = forest.score(test_mu, TEST_LABELS)
    forest = forest_by_hand(test_mu[:60], TEST_LABELS[:60])
    name = "fitted on 60 test images, measured on the other 465"
    expected[name] = forest.score(test_mu[60:], TEST_LABELS[60:])
    measured = forests.measure_other_forests(
        finished_network, (TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)
    )
    assert measured == pytest.approx(expected, abs=1e-9)
    # Otherwise rows could be exchanged unnoticed.
    assert len(set(expected.values())) > 4


def train_in_this_process(command, **options):
    """Stand in for subprocess.run of a command that trains. Options for pipes are ignored."""
    assert command[:2] == [sys.executable, str(ROOT / "train.py")]
    assert call("train.py", *command[2:]) == (0, "")


def test_short_trainings_are_one_run_with_16_dimensions_and_seed_20(tmp_path, monkeypatch):
    monkeypatch.setattr(forests, "SHORT_TRAININGS", (1, 3))
    monkeypatch.setattr(subprocess, "run", train_in_this_process)
    measured = forests.measure_short_trainings(
        SMALL_DATA, (TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)
    )
    expected = {}
    for epochs, name in [(1, "trained for 1 epoch"), (3, "trained for 3 epochs")]:
        options = {"epochs": epochs, "latent_dim": 16, "seed": 20, "batch_size": 128}
        succeed("train.py", tmp_path / "run", **options)
        network = network_of(tmp_path / "run")
        train_mu = latent_means(network, TRAIN_IMAGES)
        expected[name] = forest_by_hand(train_mu).score(
            latent_means(network, TEST_IMAGES), TEST_LABELS
        )
    assert measured == pytest.approx(expected, abs=1e-9)


def test_random_states_of_forests_on_pixels_differ():
    """The images are faint, so that the forests make mistakes."""
    train_images = 0.3 * TRAIN_IMAGES[:200] + 0.7 * torch.rand(200, 1, 28, 28)
    test_images = 0.3 * TEST_IMAGES + 0.7 * torch.rand(525, 1, 28, 28)
    labels = TRAIN_LABELS[:200]
    measured = forests.measure_random_states((train_images, labels), (test_images, TEST_LABELS))
    assert list(measured) == list(range(10))
    assert len(set(measured.values())) > 1
    forest = forest_by_hand(train_images.flatten(1), labels, random_state=7)
    assert measured[7] == forest.score(test_images.flatten(1), TEST_LABELS)


def test_mcnemar_test_counts_images_that_only_one_forest_classifies(finished_network, monkeypatch):
    """Of ten such images, two or fewer fall to one side with a probability of 56 / 1024, and the
    two-sided p-value is twice that."""
    on_latent_means = TEST_LABELS.clone()
    on_pixels = TEST_LABELS.clone()
    on_latent_means[:3] += 1
    on_pixels[2:11] += 1  # both forests are wrong for one image
    features = []

    def fit_forest(train_features, labels):
        features.append(train_features.shape)
        predicted = on_latent_means if train_features.shape[1] == 8 else on_pixels
        return SimpleNamespace(predict=lambda test_features: predicted.numpy())

    monkeypatch.setattr(forests, "fit_forest", fit_forest)
    splits = (TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)
    measured = forests.compare_with_pixels(finished_network, *splits)
    assert measured == {"only_latent_means": 8, "only_pixels": 2, "p": pytest.approx(112 / 1024)}
    assert sorted(features) == [(600, 8), (600, 784)]
    on_pixels.copy_(on_latent_means)
    assert forests.compare_with_pixels(finished_network, *splits)["p"] == 1


def test_each_option_of_the_forests_writes_its_file(tmp_path, monkeypatch):
    """The measurements have stand-ins that return which network and data they get."""

    def measure(model, train, test):
        return {f"{Path(model).parent.name}, {len(train[1])}, {len(test[1])}": 0.25}

    _, sha256 = data.load_splits(SMALL_DATA)
    monkeypatch.setattr(data, "FASHION_MNIST_SHA256", sha256)
    monkeypatch.setattr(data, "read_run", lambda path: path.relative_to(tmp_path))
    monkeypatch.setattr(forests, "RESULTS", tmp_path)
    monkeypatch.setattr(forests, "load_network", lambda run: run)
    monkeypatch.setattr(forests, "measure_short_trainings", measure)
    monkeypatch.setattr(forests, "measure_other_forests", measure)
    monkeypatch.setattr(forests, "measure_random_states", lambda *splits: measure("-/-", *splits))
    monkeypatch.setattr(forests, "compare_with_pixels", measure)
    options = ["--deviations", "--pixels", "--mcnemar"]
    monkeypatch.setattr(sys, "argv", ["forests.py", f"--data={SMALL_DATA}", *options])
    forests.main()
    assert {path.name: read_json(path) for path in tmp_path.iterdir()} == {
        "deviations.json": {
            f"{SMALL_DATA.parent.name}, 600, 525": 0.25,
            "latent16, 600, 525": 0.25,
        },
        "pixels.json": {"-, 600, 525": 0.25},
        "mcnemar.json": {"beta0.1, 600, 525": 0.25},
    }


@pytest.mark.parametrize("script, options", [(figures, []), (forests, ["--pixels"])])
def test_published_figures_and_forests_are_those_of_fashion_mnist(script, options, monkeypatch):
    monkeypatch.setattr(data, "write_bytes", None)  # nothing may be written
    monkeypatch.setattr(sys, "argv", ["script", *options, f"--data={SMALL_DATA}"])
    with pytest.raises(data.UserError, match="is not Fashion-MNIST"):
        script.main()


def test_speed_is_the_time_of_the_report_over_ours(monkeypatch, capsys):
    """The first epoch counts in both, as do all pairs."""
    ours = iter([[4.0, 2.0], [5.0, 5.0]])
    monkeypatch.setattr(speed, "time_report_loop", lambda root, epochs: [10.0, 2.0 + epochs])
    monkeypatch.setattr(speed, "time_train_script", lambda root, epochs: next(ours))
    words = ["speed.py", "--pairs=2", "--epochs=8", f"--data={SMALL_DATA}"]
    monkeypatch.setattr(sys, "argv", words)
    speed.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "pair 1: report 10.00 10.00 s, train.py 4.00 2.00 s, ratio 3.33",
        "pair 2: report 10.00 10.00 s, train.py 5.00 5.00 s, ratio 2.00",
    ]
    assert lines[3].endswith("train.py is 2.67 ± 0.94 times as fast as the report's loop")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still. A test lets it go on by adding seconds to its only element."""
    seconds = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    return seconds


def test_epoch_of_the_report_loop_takes_all_its_batches(clock, monkeypatch, capsys):
    """Each batch takes a second. There are five in each split."""
    forward = ReportVAE.forward

    def forward_in_a_second(model, x):
        clock[0] += 1
        return forward(model, x)

    def load_without_workers(dataset, **options):
        assert options["batch_size"] == 128
        assert options["num_workers"] == 4
        return DataLoader(dataset, **{**options, "num_workers": 0})

    monkeypatch.setattr(ReportVAE, "forward", forward_in_a_second)
    monkeypatch.setattr(speed, "DataLoader", load_without_workers)
    speed.report_loop(SMALL_DATA, epochs=2)
    printed = capsys.readouterr().out
    assert printed.splitlines()[1:] == ["10.0", "10.0"]
    # time_report_loop starts this loop in a process, and reads what it prints.

    def run_stand_in(command, **options):
        assert command[2:] == ["--only-report", "--data", str(SMALL_DATA), "--epochs", "2"]
        return SimpleNamespace(stdout=printed)

    monkeypatch.setattr(subprocess, "run", run_stand_in)
    assert speed.time_report_loop(SMALL_DATA, 2) == [10.0, 10.0]


def test_epoch_of_train_script_takes_all_its_batches(clock, monkeypatch):
    """Each batch takes a second. There are five in the training split, and two in the test pass."""

    def loss_in_a_second(*terms):
        clock[0] += 1
        return loss_function(*terms)

    monkeypatch.setattr(train, "loss_function", loss_in_a_second)
    monkeypatch.setattr(subprocess, "run", train_in_this_process)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert speed.time_train_script(SMALL_DATA, 2) == [7.0, 7.0]


def test_speed_of_both_is_measured_on_a_gpu_if_there_is_one(monkeypatch):
    def run_stand_in(command, **options):
        assert command[-2:] == ["--device", "cuda"]
        run = command[command.index("--run") + 1]
        Path(run, LOG).write_text("epoch,seconds\n1,2.5\n")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", run_stand_in)
    assert speed.time_train_script(SMALL_DATA, 1) == [2.5]


# --- The pages ------------------------------------------------------------------------------


def page(name):
    """Return the text of a page, with all numbers written as in the tables: 1.23±0.04."""
    return (ROOT / name).read_text(encoding="utf-8").replace(" ± ", "±")


@pytest.fixture(scope="module")
def printed_for_the_pages():
    """What results/summary.py prints for the pages, as {part: text}."""
    parts = ["losses", "reconstructions", "samples", "front_page"]
    parts += ["deviations", "search", "claims", "numbers"]
    return dict(zip(parts, printed_by_summary(), strict=True))


def test_published_runs_have_one_form():
    configs = sorted((ROOT / "results").rglob(CONFIG))
    assert len(configs) > 90
    first_config = read_json(configs[0])
    for path in configs:
        config = read_json(path)
        assert list(config) == list(first_config)
        assert config["data_sha256"] == data.FASHION_MNIST_SHA256
        run = data.read_run(path.parent)
        assert read_json(path.parent / CLASSIFICATION)["epoch"] == len(run.log) == config["epochs"]
        if (path.parent / WEIGHTS).exists():
            load_network(run)


def test_tables_of_the_pages_are_those_that_summary_prints(printed_for_the_pages):
    for part in ("losses", "reconstructions", "samples", "deviations", "search"):
        assert f"\n\n{printed_for_the_pages[part]}\n\n" in page("results/README.md")
    assert f"\n\n{printed_for_the_pages['front_page']}\n\n" in page("README.md")


def test_claims_have_the_numbers_of_the_runs_in_their_rows(printed_for_the_pages):
    expected = {}
    for line in printed_for_the_pages["claims"].splitlines():
        label, _, numbers = line.rpartition(": ")
        expected[label] = numbers.split("; ")
    table = re.search(r"\n\n(\| claim \|.*?)\n\n", page("README.md"), flags=re.DOTALL).group(1)
    found = {}
    for label, (_, ours, _) in cells_of(table).items():
        numbers = re.findall(r"\d+\.\d+±\d+\.\d+", ours)
        if numbers:
            found[label] = numbers
    assert found == expected


def test_numbers_in_the_text_occur_among_those_of_the_runs(printed_for_the_pages):
    """A "mean ± standard deviation" is one of the runs or of a timing. A percentage with two
    decimals is an accuracy. The minimum BCE and all ranges and p-values are those printed."""
    known = "\n".join(printed_for_the_pages.values())
    timings = (ROOT / "results" / "speed.txt").read_text(encoding="utf-8").replace(" ± ", "±")
    comparison = read_json(ROOT / "results" / "mcnemar.json")
    mean_and_sd = r"\d+\.\d+±\d+\.\d+"
    two_decimals = r"\d+\.\d\d"
    p_values = {f"{comparison['p']:.2f}", *re.findall(r"p = (\d\.\d+)", known)}
    for name in ("README.md", "results/README.md"):
        text = " ".join(page(name).split())
        means = re.findall(mean_and_sd, text)
        assert len(means) > 10
        assert set(means) <= set(re.findall(mean_and_sd, known + timings))
        percentages = re.findall(rf"{two_decimals}(?=(?: (?:and|to) {two_decimals})? %)", text)
        assert set(percentages) <= {"84.01", *re.findall(two_decimals, known)}
        minimum = r"(?<![±.\d])(\d+\.\d+) nats per (training|test) image"
        assert set(re.findall(minimum, text)) <= set(re.findall(minimum, known))
        assert set(re.findall(r"p = (\d\.\d+)", text)) <= p_values
    ranges = re.findall(r"(\d+\.\d to \d+\.\d) in (\d+) runs with (\d+)", text)
    printed = re.findall(r"(\d+) dimensions: .* is (.* to .*) in (\d+) runs", known)
    assert ranges == [(values, count, dimensions) for dimensions, values, count in printed]
    assert re.search(r"\S+ nats higher", known).group() in text
    assert re.search(r"a difference of (\S+)", known).group(1) + " lower" in text
    for folder, (title, _) in summary.FRONT_PAGE.items():
        count = len(published(folder, "frechet_samples"))
        assert re.search(rf"(seeds with samples:|,) {re.escape(title)} {count}(,|\n)", known)
        assert count == (6 if folder == summary.REFERENCE else 3)
    front_page = " ".join(page("README.md").split())
    assert "six seeds of the report's network and three of each variant" in front_page
    count = len(published(summary.REFERENCE, "accuracy"))
    assert f"An accuracy of 86.46±0.27 % is typical (n = {count})" in front_page
    compared, bold = re.search(r"(\d+) comparisons, (\d+) of them bold", known).groups()
    assert f"Of {compared} comparisons, {bold} are bold" in text
    assert f"{comparison['only_latent_means']} are classified correctly only by the first" in text
    assert f"{comparison['only_pixels']} only by the second" in text


def test_runs_that_are_the_same_training_have_the_losses_that_the_page_says():
    for seed in range(4):
        rates = [row["lr"] for row in log_of(ROOT / f"results/plateau/seed{seed}")]
        assert rates == [5e-4] * 100  # as with a constant learning rate
    log = log_of(ROOT / "results/plateau/seed3")
    longer_log = log_of(ROOT / "results/epochs200/seed3")
    for row, other in zip(log, longer_log):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    plateau = log_of(ROOT / "results/plateau/seed1")[0]["train_loss"]
    cosine = log_of(ROOT / "results/cosine/seed1")[0]["train_loss"]
    text = " ".join(page("results/README.md").split())
    assert f"have losses of {plateau:.3f} and {cosine:.3f}" in text


def test_python_blocks_of_the_readme_run(tmp_path):
    """In a folder with a picture, and with a published run that was trained on the small data."""
    blocks = re.findall(r"```python\n(.*?)```", page("README.md"), flags=re.DOTALL)
    assert len(blocks) == 2
    run = shutil.copytree(ROOT / "results/latent32/seed0", tmp_path / "results/latent32/seed0")
    _, sha256 = data.load_splits(SMALL_DATA)
    edit_json(run / CONFIG, data_sha256=sha256)
    write_dataset(tmp_path / "data" / "fashion-mnist", dataset_files())
    image_of(t_shape(), tmp_path / "picture.jpg")
    checks = """
assert mu.shape == (525, 32) and numpy.load("latent_means.npz")["mu"].shape == (525, 32)
assert reconstructions.shape == samples.shape == mixture_samples.shape == (10, 1, 28, 28)
assert plt.imread("seen.png").shape[:2] == (28, 28)
assert probabilities.shape == (10,) and torch.is_grad_enabled()
"""
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks) + checks],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[-10:]] == data.CLASSES
