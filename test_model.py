"""Tests of the whole repository. They need neither the network nor the data set."""

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
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from unittest.mock import Mock

import matplotlib.image
import numpy as np
import pytest
import sklearn
import torch
import torch.nn.functional as F
from matplotlib.colors import to_hex, to_rgba
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.manifold import TSNE, trustworthiness
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode

import classify
import data
import model as networks
import plots
import train
from model import CLASSIFICATION, CONFIG, LOG, MODELS, STATE, WEIGHTS, ConvVAE, load_run
from results import deviations, summary
from results.speed import ReportVAE, report_loss

ROOT = Path(__file__).parent
SCRIPTS = {"train.py": train, "classify.py": classify, "plots.py": plots}
EXPORTED = [CONFIG, WEIGHTS, LOG]

# Background jobs of a shell may ignore Ctrl-C, and so would the processes started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
# On a busy machine, several threads wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


# --- A small data set in the format of Fashion-MNIST ----------------------------------------


def idx_bytes(array):
    """Return a tensor as the content of a file of the MNIST family (IDX format)."""
    header = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    return header + array.to(torch.uint8).numpy().tobytes()


def make_images(images_per_class_step, seed):
    """Return noisy images [N, 28, 28] uint8 and their labels [N].

    The place of a bright square tells the class. Class k has images_per_class_step * (k + 3)
    images, so that all classes differ in size. A third of class 4 look like class 7, and a third of
    class 9 like class 2, so that a classifier makes mistakes.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(10).repeat_interleave(images_per_class_step * torch.arange(3, 13))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(0, 60, (len(labels), 28, 28), generator=generator)
    looks_like_another = torch.rand(len(labels), generator=generator) < 1 / 3
    for image, label, disguised in zip(images, labels.tolist(), looks_like_another):
        place = label
        if disguised and label == 4:
            place = 7
        if disguised and label == 9:
            place = 2
        row, column = divmod(place, 4)
        image[2 + 8 * row : 9 + 8 * row, 2 + 6 * column : 8 + 6 * column] += 180
    return images.to(torch.uint8), labels


TRAIN_SPLIT = make_images(8, seed=1)  # 600 images
TEST_SPLIT = make_images(3, seed=2)  # 225 images
TRAIN_IMAGES = TRAIN_SPLIT[0].unsqueeze(1) / 255
TRAIN_LABELS = TRAIN_SPLIT[1]
TEST_IMAGES = TEST_SPLIT[0].unsqueeze(1) / 255
TEST_LABELS = TEST_SPLIT[1]


def dataset_files(train_split=TRAIN_SPLIT, test_split=TEST_SPLIT):
    """Return the four files of a data set as {name: content}."""
    return {
        "train-images-idx3-ubyte": idx_bytes(train_split[0]),
        "train-labels-idx1-ubyte": idx_bytes(train_split[1]),
        "t10k-images-idx3-ubyte": idx_bytes(test_split[0]),
        "t10k-labels-idx1-ubyte": idx_bytes(test_split[1]),
    }


def write_dataset(root, files):
    """Write the files of a data set where torchvision puts them, and return `root`."""
    raw = Path(root, "FashionMNIST", "raw")
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return Path(root)


TEMPORARY_FOLDER = tempfile.TemporaryDirectory()
SMALL_DATA = write_dataset(TEMPORARY_FOLDER.name, dataset_files())
SMALL_DATA_LINE = f"600 training and 225 test images from {SMALL_DATA / 'FashionMNIST' / 'raw'}"
# In these tests, the small data set takes the place of Fashion-MNIST.
FASHION_MNIST_SHA256 = data.FASHION_MNIST_SHA256
data.FASHION_MNIST_SHA256 = data.read_dataset(SMALL_DATA).sha256


# --- Running the scripts --------------------------------------------------------------------


def command_options(run, **options):
    """Return the command line options for a run on the small data set.

    Options are named as in Python: latent_dim for --latent-dim. If there is a number of epochs, the
    options of a short training are added.
    """
    all_options = {"run": run, "data": SMALL_DATA}
    if "epochs" in options:
        all_options.update(batch_size=32, latent_dim=8, device="cpu")
    all_options.update(options)
    words = []
    for name, value in all_options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def call(script, *words):
    """Run a script in this process. Return its exit code and, if it failed, its error line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, words)])
        try:
            data.run_script(SCRIPTS[script].main, when_interrupted="Try again.")
        except SystemExit as end:
            if isinstance(end.code, str):
                return 1, end.code + "\n"
            return end.code, ""
    return 0, ""


def succeed(script, run, *words, **options):
    """Run a script in this process. It must succeed."""
    assert call(script, *command_options(run, **options), *words) == (0, "")


def fail(script, run, *words, **options):
    """Run a script in this process. It must fail with one line on standard error: return that line.

    train.py trains for three epochs if nothing else is said.
    """
    if script == "train.py":
        options = {"epochs": 3, **options}
    code, message = call(script, *command_options(run, **options), *words)
    assert code != 0
    assert message.count("\n") == 1, message
    return message


def start(script, run, **options):
    """Start a script in a process of its own, with its output in pipes."""
    return subprocess.Popen(
        [sys.executable, ROOT / script, *command_options(run, **options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of two epochs with its classification. Tests must not change it."""
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


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def figures(monkeypatch):
    """The figures that plots.py would save, as {file name: figure}. Nothing is written."""
    saved = {}

    def save(run, name, figure):
        saved[name] = figure

    monkeypatch.setattr(plots, "save", save)
    # After such a short training, no latent dimension is active.
    monkeypatch.setattr(plots, "active_dimensions", lambda mu: 1)
    return saved


# --- Reading and changing files -------------------------------------------------------------


def contents(folder):
    """Return all files of a folder as {name: content}, to see whether anything was changed."""
    if not folder.exists():
        return {}
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_json(path):
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path, **changes):
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**read_json(path), **changes}), encoding="utf-8")


def edit_tensors(path, change):
    """Change the content of a file of torch.save, by a function that changes it in place."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def publish(run, change=lambda weights: None):
    """Remove state.pth, as for a published run, and change the weights in place."""
    (run / STATE).unlink(missing_ok=True)
    edit_tensors(run / WEIGHTS, change)


def first_half(content):
    """Return the first half of a file's content."""
    return content[: len(content) // 2]


def replacing(old, new):
    """Return a function that replaces bytes in a file's content."""
    return lambda content: content.replace(old, new)


def damage_file(path, damage):
    """Change a file by a function of its content, or replace its content by other bytes."""
    path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)


def torch_saved(value):
    """Return what torch.save writes into a file."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def log_without_seconds(run):
    """Return the rows of losses.csv as text, without the column that differs each time."""
    with open(run / LOG, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    return rows


def assert_same_training(run, other):
    """Check that two runs have the same losses and weights, bit for bit."""
    assert log_without_seconds(run) == log_without_seconds(other)
    weights = torch.load(run / WEIGHTS, weights_only=True)
    other_weights = torch.load(other / WEIGHTS, weights_only=True)
    torch.testing.assert_close(weights, other_weights, rtol=0, atol=0)


def images_in(figure):
    """Return the images that a figure shows, [N, 28, 28]."""
    return torch.stack([torch.tensor(axis.images[0].get_array()) for axis in figure.axes])


# --- Networks and loss ----------------------------------------------------------------------


def seeded_outputs(model, images):
    """Return the reconstruction, mu and logvar of images. The noise in z is always the same."""
    torch.manual_seed(1)
    return model(images)


def test_weights_of_the_report_can_be_loaded():
    report_model = ReportVAE(16)
    model = ConvVAE(16)
    model.load_state_dict(report_model.state_dict())
    images = torch.rand(5, 1, 28, 28)
    expected = seeded_outputs(report_model, images)
    torch.testing.assert_close(seeded_outputs(model, images), expected, rtol=1e-5, atol=1e-6)


def test_report_can_load_our_weights():
    model = ConvVAE(16).to(memory_format=torch.channels_last)
    report_model = ReportVAE(16)
    report_model.load_state_dict(model.state_dict())
    images = torch.rand(5, 1, 28, 28)
    expected = seeded_outputs(model, images)
    torch.testing.assert_close(seeded_outputs(report_model, images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, count", [("conv", 440_833), ("fc", 667_248), ("deep", 1_144_193)])
def test_number_of_parameters(name, count):
    model = MODELS[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_fully_connected_network_matches_its_definition():
    model = MODELS["fc"](7)
    assert model.fc_enc.weight.shape == (400, 784)
    assert model.fc_mu.weight.shape == (7, 400)
    assert model.fc_log.weight.shape == (7, 400)
    assert model.fc_dec.weight.shape == (400, 7)
    assert model.fc_out.weight.shape == (784, 400)

    images = torch.rand(3, 1, 28, 28)
    outputs = seeded_outputs(model, images)
    torch.manual_seed(1)
    h = model.fc_enc(images.reshape(3, 784)).relu()
    mu = model.fc_mu(h)
    logvar = model.fc_log(h)
    z = mu + (logvar / 2).exp() * torch.randn(3, 7)
    reconstruction = model.fc_out(model.fc_dec(z).relu()).sigmoid().reshape(3, 1, 28, 28)
    torch.testing.assert_close(outputs, (reconstruction, mu, logvar))


def test_loss_matches_its_definition():
    x = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    recon_x = torch.tensor([[0.5, 0.5], [0.5, 0.75]])
    mu = torch.tensor([[0.0, 2.0]])
    logvar = torch.tensor([[0.0, math.log(4)]])
    # The first three pixels add log 2 each, and the last one -(¼ log ¾ + ¾ log ¼).
    bce = 3 * 0.6931472 + 0.25 * 0.2876821 + 0.75 * 1.3862944
    # The first latent dimension adds 0, and the second one ½ (sigma² + mu² - 1 - log sigma²).
    kld = 0.5 * (4 + 4 - 1 - 1.3862944)

    loss = networks.loss_function(recon_x, x, mu, logvar)
    assert loss.item() == pytest.approx(bce + kld, rel=1e-6)
    terms = networks.loss_function(recon_x, x, mu, logvar, beta=3, with_terms=True)
    assert torch.stack(terms).tolist() == pytest.approx([bce + 3 * kld, bce, kld], rel=1e-6)


def test_loss_of_nan_is_nan():
    x = torch.tensor([[0.0, 1.0]])
    recon_x = torch.tensor([[0.5, torch.nan]])
    mu = torch.zeros(1, 2)
    assert networks.loss_function(recon_x, x, mu, logvar=torch.zeros(1, 2)).isnan()


class RecordOperations(TorchDispatchMode):
    """Records the name of each tensor operation, and the flag mkldnn.enabled at that time."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.flags = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        self.flags.append(torch.backends.mkldnn.enabled)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_channels", [1, 3])
def test_transposed_convolution_equals_that_of_pytorch(out_channels, bias):
    layer = networks.TransposedConv2d(
        6,
        out_channels,
        kernel_size=4,
        stride=3,
        padding=2,
        output_padding=1,
        groups=out_channels,
        bias=bias,
        dilation=2,
    ).double()
    x = torch.rand(2, 6, 5, 7, dtype=torch.double, requires_grad=True)
    inputs = [x, *layer.parameters()]
    y = layer(x)
    expected = nn.ConvTranspose2d.forward(layer, x)
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y.square().sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), inputs))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("out_channels", [1, 3])
def test_transposed_convolution_never_changes_a_process_wide_flag(
    out_channels, enabled, monkeypatch
):
    """The flag must not change for a moment either, because other threads would see it."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    layer = networks.TransposedConv2d(4, out_channels, kernel_size=4)
    with RecordOperations() as operations:
        layer(torch.rand(2, 4, 5, 5))
    assert set(operations.flags) == {enabled}
    assert torch.backends.mkldnn.enabled is enabled


def test_networks_work_after_disable_global_flags(monkeypatch):
    # PyTorch cannot undo disable_global_flags(), so we set the variable that it sets.
    variables = torch.backends.disable_global_flags.__globals__
    monkeypatch.setitem(variables, "__allow_nonbracketed_mutation_flag", False)
    with pytest.raises(RuntimeError):
        torch.backends.mkldnn.enabled = False
    ConvVAE(4)(torch.rand(2, 1, 28, 28))


@pytest.mark.parametrize("exporting", [True, False])
def test_only_onnx_export_avoids_the_kernel_for_a_single_channel(exporting, monkeypatch):
    """PyTorch's own kernel is faster on a CPU, but ONNX does not know it."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", Mock(return_value=exporting))
    layer = networks.TransposedConv2d(4, 1, kernel_size=4)
    with RecordOperations() as operations:
        layer(torch.rand(2, 4, 5, 5))
    assert ("slow_conv_transpose2d" in operations.names) is not exporting


# Recent versions of PyTorch advise against TorchScript.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_networks_can_be_compiled_by_torchscript(name):
    model = MODELS[name](4).eval()
    images = torch.rand(2, 1, 28, 28)
    outputs = seeded_outputs(torch.jit.script(model), images)
    torch.testing.assert_close(outputs, seeded_outputs(model, images))


GOOD_IMAGES = torch.rand(4, 1, 28, 28)
WRONG_IMAGES = {
    "bytes": (GOOD_IMAGES * 255).byte(),
    "black bytes": torch.zeros(4, 1, 28, 28, dtype=torch.uint8),
    "from 0 to 255": GOOD_IMAGES * 255,
    "from -1 to 1": GOOD_IMAGES * 2 - 1,
    "NaN": GOOD_IMAGES.index_fill(0, torch.tensor([2]), torch.nan),
    "without a channel": GOOD_IMAGES[:, 0],
    "29 by 29 pixels": torch.rand(4, 1, 29, 29),
    "three channels": torch.rand(4, 3, 28, 28),
    "no images": GOOD_IMAGES[:0],
}


@pytest.mark.parametrize("images", WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_latent_means_of_wrong_images_are_refused(images):
    with pytest.raises(ValueError, match=r"\[N, 1, 28, 28\] of floating-point numbers in \[0, 1\]"):
        networks.latent_means(ConvVAE(8), images)


@pytest.mark.parametrize("gray", [0.0, 1.0])
def test_latent_means_of_black_and_white_images_are_computed(gray):
    model = ConvVAE(8)
    images = torch.full((3, 1, 28, 28), gray)
    mu, _ = model.encode(images)
    torch.testing.assert_close(networks.latent_means(model, images), mu)
    torch.testing.assert_close(networks.latent_means(model, images.double()), mu)


# --- The data set ---------------------------------------------------------------------------


@pytest.fixture
def debian_package(tmp_path, monkeypatch):
    """The folder of Debian's package, which does not exist yet."""
    package = tmp_path / "package"
    monkeypatch.setattr(data, "DEBIAN_PACKAGE", package)
    return package


@pytest.fixture
def other_data(tmp_path):
    """A data set in which one label differs from the small data set."""
    test_images, test_labels = TEST_SPLIT
    test_labels = test_labels.clone()
    test_labels[-1] = (test_labels[-1] + 1) % 10
    return write_dataset(tmp_path / "other", dataset_files(TRAIN_SPLIT, (test_images, test_labels)))


def first_test_images(count):
    """Return the four files of the small data set, with only the first test images."""
    images, labels = TEST_SPLIT
    return dataset_files(TRAIN_SPLIT, (images[:count], labels[:count]))


def write_files(folder, files, infix="-idx", suffix=""):
    """Write the files of a data set into a folder, gzipped if the suffix is .gz."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if suffix == ".gz":
            content = gzip.compress(content)
        (folder / f"{name.replace('-idx', infix)}{suffix}").write_bytes(content)


def test_splits_have_the_pixels_and_labels_of_the_files(capsys):
    (train_images, train_labels), (test_images, test_labels) = data.load_splits(SMALL_DATA)
    assert train_images.dtype == test_images.dtype == torch.float32
    assert train_labels.dtype == test_labels.dtype == torch.int64
    assert torch.equal(train_images, TRAIN_IMAGES)
    assert torch.equal(train_labels, TRAIN_LABELS)
    assert torch.equal(test_images, TEST_IMAGES)
    assert torch.equal(test_labels, TEST_LABELS)
    assert capsys.readouterr() == (f"{SMALL_DATA_LINE}\n", "")


def test_data_are_read_from_the_first_folder_that_has_them(tmp_path, debian_package, capsys):
    """No file of any folder is changed."""
    root = tmp_path / "root"
    raw = root / "FashionMNIST" / "raw"
    for folder, count in [(debian_package, 40), (root, 50), (raw, 60)]:
        write_files(folder, first_test_images(count))
        before = contents(folder)
        _, (images, _) = data.load_splits(root)
        line = f"600 training and {count} test images from {folder} (not Fashion-MNIST)\n"
        assert capsys.readouterr().out == line
        assert torch.equal(images, TEST_IMAGES[:count])
        assert contents(folder) == before


def test_each_form_of_the_files_is_read(tmp_path, debian_package, capsys):
    """If a folder has the files in several forms, the usual form is read, not a gzipped one."""
    forms = [(".idx", ".gz"), ("-idx", ".gz"), (".idx", ""), ("-idx", "")]
    for count, (infix, suffix) in enumerate(forms, start=40):
        write_files(tmp_path, first_test_images(count), infix, suffix)
        _, (images, labels) = data.load_splits(tmp_path)
        assert torch.equal(images, TEST_IMAGES[:count])
        assert torch.equal(labels, TEST_LABELS[:count])
        assert capsys.readouterr().err == ""


def test_files_of_different_folders_are_never_mixed(tmp_path, debian_package):
    root = tmp_path / "root"
    for folder in (debian_package, root, root / "FashionMNIST" / "raw"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "t10k-labels.idx1-ubyte.gz").write_bytes(b"never read")
        message = fail("train.py", tmp_path / "run", data=root)
        missing = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte"
        assert f"{folder} has some files of the data set, but lacks {missing}. Add" in message
        # The folders that follow are searched first, and must not be completed from this one.
        write_files(folder, dataset_files())


def test_warning_if_debians_package_is_read_instead_of_data(tmp_path, debian_package, capsys):
    write_files(debian_package, dataset_files())
    data.load_splits(tmp_path / "mistyped")
    assert capsys.readouterr().err == (
        f"Warning: --data {tmp_path / 'mistyped'} has none of the four files, "
        f"so Debian's package in {debian_package} is used.\n"
    )


def test_no_warning_if_debians_package_is_the_default(
    tmp_path, debian_package, monkeypatch, capsys
):
    write_files(debian_package, dataset_files())
    monkeypatch.chdir(tmp_path)
    data.load_splits(data.DEFAULT_ROOT)
    line = f"600 training and 225 test images from {debian_package}\n"
    assert capsys.readouterr() == (line, "")


def test_no_warning_if_debians_package_is_named_by_data(debian_package, capsys):
    write_files(debian_package, dataset_files())
    data.load_splits(debian_package)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not data.DEBIAN_PACKAGE.exists(), reason="needs Debian's package")
def test_fashion_mnist_is_recognized(monkeypatch, capsys):
    monkeypatch.setattr(data, "FASHION_MNIST_SHA256", FASHION_MNIST_SHA256)
    (images, _), _ = data.load_splits(data.DEBIAN_PACKAGE)
    line = f"60,000 training and 10,000 test images from {data.DEBIAN_PACKAGE}\n"
    assert capsys.readouterr().out == line
    assert images.mean().item() == pytest.approx(0.2860, abs=5e-5)


@pytest.mark.parametrize("brightest, warns", [(1, True), (2, False)])
def test_warning_if_pixels_were_already_divided(brightest, warns, tmp_path, capsys):
    images, labels = TRAIN_SPLIT
    files = dataset_files((images.clamp(max=brightest), labels))
    root = write_dataset(tmp_path / "data", files)
    data.load_splits(root)
    warning = (
        f"Warning: the brightest pixel in {root / 'FashionMNIST/raw/train-images-idx3-ubyte'} "
        "has the gray value 1, but white is 255. Were the gray values already divided by 255?\n"
    )
    assert capsys.readouterr().err == (warning if warns else "")


def fake_download(root, download):
    """Do what torchvision's FashionMNIST does: write the files into a folder below `root`."""
    write_dataset(root, dataset_files())


@pytest.mark.parametrize(
    "error", [ConnectionResetError("a\nb"), RuntimeError("chunk"), ValueError(), OSError(28)]
)
def test_failed_download_leaves_nothing(error, tmp_path, debian_package, monkeypatch, capsys):
    def break_off(root, download):
        Path(root, "FashionMNIST", "raw").mkdir(parents=True)
        Path(root, "FashionMNIST", "raw", data.FILES[0]).write_bytes(b"half of the images")
        raise error

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", break_off)
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    message = fail("train.py", tmp_path / "run", data=tmp_path / "data")
    assert f"{raw} does not contain Fashion-MNIST, and the download failed (" in message
    assert "apt-get install dataset-fashion-mnist" in message
    assert capsys.readouterr().err == f"Downloading Fashion-MNIST to {raw} …\n"
    assert list(raw.parent.iterdir()) == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["new", "link", "empty"])
def test_download_is_complete(kind, tmp_path, debian_package, monkeypatch, capsys):
    """The folder may be a link to a folder that does not exist, or may exist but be empty."""

    def rename_as_on_windows(source, target):
        if Path(target).exists():
            raise FileExistsError(errno.EEXIST, "exists", str(target))
        os.replace(source, target)

    monkeypatch.setattr(data.os, "rename", rename_as_on_windows)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fake_download)
    root = tmp_path / "data"
    raw = root / "FashionMNIST" / "raw"
    if kind == "link":
        root.symlink_to(tmp_path / "target")
    if kind == "empty":
        raw.mkdir(parents=True)
    data.load_splits(root)
    line = f"600 training and 225 test images from {raw}\n"
    assert capsys.readouterr() == (line, f"Downloading Fashion-MNIST to {raw} …\n")
    assert list(raw.parent.iterdir()) == [raw]


def test_download_by_another_script_is_kept(tmp_path, debian_package, monkeypatch, capsys):
    root = tmp_path / "data"

    def download_too_late(temporary, download):
        write_dataset(root, dataset_files())
        write_dataset(temporary, first_test_images(40))

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", download_too_late)
    data.load_splits(root)
    raw = root / "FashionMNIST" / "raw"
    assert capsys.readouterr().out == f"600 training and 225 test images from {raw}\n"
    assert list(raw.parent.iterdir()) == [raw]


def test_nothing_is_downloaded_into_a_folder_with_other_files(
    tmp_path, debian_package, monkeypatch, capsys
):
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fake_download)
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    (raw / "other").mkdir(parents=True)
    message = fail("train.py", tmp_path / "run", data=tmp_path / "data")
    assert f"{raw} has other files, but none of the four files of Fashion-MNIST. Move" in message
    assert capsys.readouterr().err == ""
    assert list(raw.iterdir()) == [raw / "other"]
    assert not (tmp_path / "run").exists()


def test_torchvision_is_needed_only_for_the_download(tmp_path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "sys.modules['torchvision'] = None  # so that it cannot be imported\n"
        "import data, model, train\n"
        "data.DEBIAN_PACKAGE = Path('no such folder')\n"
        "data.run_script(train.main, when_interrupted='')\n"
    )
    options = command_options(tmp_path / "run", data=tmp_path / "data", epochs=1)
    result = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 1
    progress, error = result.stderr.splitlines()
    assert progress.startswith("Downloading Fashion-MNIST")
    assert "error:" in error
    assert "the download failed (" in error
    assert "torchvision" in error
    assert "apt-get install" in error


@pytest.mark.parametrize("name", data.FILES)
def test_checksum_depends_on_each_file(name, tmp_path):
    files = dataset_files()
    content = files[name]
    files[name] = content[:-1] + bytes([(content[-1] + 1) % 10])
    root = write_dataset(tmp_path / "data", files)
    assert data.read_dataset(root).sha256 != data.FASHION_MNIST_SHA256


def test_run_remembers_its_data(tmp_path, other_data):
    run = tmp_path / "run"
    succeed("train.py", run, epochs=1, data=other_data)
    assert read_json(run / CONFIG)["data_sha256"] == data.read_dataset(other_data).sha256
    # SMALL_DATA takes the place of Fashion-MNIST, as if --data had been forgotten.
    message = fail("classify.py", run)
    assert f"{run} was not trained on the data in {SMALL_DATA}" in message
    assert f"{run} was trained on different data." in fail("train.py", run, epochs=2)
    networks.load_run_data(load_run(run), other_data)


@pytest.mark.parametrize("epochs", [2, 3])
def test_resuming_with_other_data_is_refused(epochs, run, other_data):
    """This holds for a finished run, too, although nothing would be trained."""
    before = contents(run)
    message = fail("train.py", run, epochs=epochs, data=other_data)
    assert f"{run} was trained on different data. Choose another folder with --run." in message
    assert contents(run) == before


@pytest.mark.parametrize("script", ["classify.py", "plots.py"])
def test_evaluating_a_run_on_other_data_is_refused(script, run, other_data):
    before = contents(run)
    folder = other_data / "FashionMNIST" / "raw"
    message = fail(script, run, data=other_data)
    assert f"{run} was not trained on the data in {folder}. Give the folder" in message
    assert "--data" in message
    assert contents(run) == before


def test_checkpoint_without_a_checksum_counts_as_trained_on_fashion_mnist(run, other_data):
    def remove_checksum(state):
        del state["config"]["data_sha256"]

    edit_tensors(run / STATE, remove_checksum)
    networks.load_run_data(load_run(run), SMALL_DATA)
    assert "was not trained on the data in" in fail("classify.py", run, data=other_data)
    assert "was trained on different data" in fail("train.py", run, data=other_data)
    succeed("train.py", run, epochs=2)


def test_config_without_a_checksum_counts_as_trained_on_fashion_mnist(run, other_data):
    publish(run)
    config = read_json(run / CONFIG)
    del config["data_sha256"]
    (run / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    networks.load_run_data(load_run(run), SMALL_DATA)
    assert "was not trained on the data in" in fail("classify.py", run, data=other_data)


# --- Damaged files and bad options ----------------------------------------------------------


def add_a_byte(content):
    """Return the content of a file with a byte added at its end."""
    return content + b"0"


def truncated_gzip(content):
    """Return the content of a file gzipped, without the last 30 bytes."""
    return gzip.compress(content)[:-30]


def flip_a_bit(content):
    """Return the content of a file with one bit changed, in a tensor: torch.load ignores that."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGED_IMAGES = {
    "first half": first_half,
    "one byte too many": add_a_byte,
    "doubles": replacing(b"\0\0\x08\3", b"\0\0\x0d\3"),
    "truncated gzip": truncated_gzip,
    "other bytes": bytes(range(256)) * 40,
    "empty": b"",
    "255 dimensions": b"\0\0\x08\xff" + bytes(99),
    "5 by 5 pixels": idx_bytes(torch.zeros(10, 5, 5)),
    "no images": idx_bytes(torch.zeros(0, 28, 28)),
}
DAMAGED_LABELS = {
    "three labels": idx_bytes(torch.zeros(3)),
    "label 10": idx_bytes(torch.full((600,), 10)),
    "empty": b"",
    "no dimensions": b"\0\0\x08\0\x07",
}


def check_damaged_data(root, name, damage, run):
    """Damage a file of a data set, and check that train.py reports it and writes nothing."""
    # Both splits have the same images, so that the number of labels is right in both.
    write_dataset(root, dataset_files(TRAIN_SPLIT, TRAIN_SPLIT))
    damage_file(root / "FashionMNIST" / "raw" / name, damage)
    message = fail("train.py", run, data=root)
    split = name.partition("-")[0]
    assert f"{split}-" in message
    assert "is damaged (" in message or "Expected [N, 28, 28] and [N]" in message
    assert len(message) < 400
    assert not run.exists()


@pytest.mark.parametrize("split", ["train", "t10k"])
@pytest.mark.parametrize("damage", DAMAGED_IMAGES.values(), ids=DAMAGED_IMAGES)
def test_damaged_images_are_reported(damage, split, tmp_path):
    check_damaged_data(tmp_path / "data", f"{split}-images-idx3-ubyte", damage, tmp_path / "run")


@pytest.mark.parametrize("split", ["train", "t10k"])
@pytest.mark.parametrize("damage", DAMAGED_LABELS.values(), ids=DAMAGED_LABELS)
def test_damaged_labels_are_reported(damage, split, tmp_path):
    check_damaged_data(tmp_path / "data", f"{split}-labels-idx1-ubyte", damage, tmp_path / "run")


PICKLE_WITH_CODE = b"c__builtin__\nopen\n(Vexploded\nVw\ntR."  # it calls open("exploded", "w")
DAMAGED_TENSORS = {
    "one bit": flip_a_bit,
    "first half": first_half,
    "empty": b"",
    "other bytes": bytes(range(255, 0, -1)) * 20,
    "pickle with code": PICKLE_WITH_CODE,
    "a tensor": torch_saved(torch.zeros(3)),
    "another tensor": torch_saved({"weight": torch.zeros(3)}),
    "text": torch_saved({"weight": "x"}),
    "no tensors": torch_saved({}),
    "a name that is a number": torch_saved({1: torch.zeros(3)}),
}
DAMAGED_LOGS = {
    "first half": first_half,
    "empty": b"",
    "other bytes": b"\xff\x00",
    "other columns": b"a,b\n1,2\n",
    "NaN": replacing(b"0.0005", b"nan"),
    "epochs out of order": replacing(b"\n2,", b"\n3,"),
}
DAMAGED_CONFIGS = {
    "first half": first_half,
    "a list": b"[]",
    "no options": b"{}",
    "other bytes": b"\xff",
    "another network": replacing(b'"conv"', b'"fc"'),
    "another number of latent dimensions": replacing(b": 8,", b": 9,"),
    "no epochs": replacing(b'"epochs": 2,', b""),
}
IMPOSSIBLE_OPTIONS = [
    ("model", "gan"),
    ("latent_dim", 0),
    ("latent_dim", 8.5),
    ("latent_dim", "8"),
    ("latent_dim", 9999),
    ("batch_size", 0),
    ("batch_size", True),
    ("lr", 0),
    ("lr", math.nan),
    ("lr", math.inf),
    ("lr", "fast"),
    ("seed", -1),
    ("beta", -1),
    ("lr_scheduler", "step"),
    ("hold_out", -1),
    ("feature_weight", -1),
    ("epochs", 0),
    ("epochs", 1.5),
    ("epochs", "two"),
]


def check_damaged_run(script, run, name):
    """Check that a script reports the damaged file `name` of a run, and changes no file."""
    before = contents(run)
    message = fail(script, run)
    assert name in message
    assert contents(run) == before
    return message


@pytest.mark.parametrize("damage", DAMAGED_TENSORS.values(), ids=DAMAGED_TENSORS)
def test_damaged_checkpoint_is_reported(damage, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage_file(run / STATE, damage)
    assert f"{run / STATE} is damaged (" in check_damaged_run("train.py", run, STATE)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("weights", [{}, 3, {1: torch.zeros(3)}])
def test_damaged_weights_in_the_checkpoint_are_reported(weights, run):
    def replace_weights(state):
        state["model"] = weights

    edit_tensors(run / STATE, replace_weights)
    check_damaged_run("train.py", run, STATE)


@pytest.mark.parametrize("damage", DAMAGED_TENSORS.values(), ids=DAMAGED_TENSORS)
def test_damaged_weights_are_reported(damage, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish(run)
    damage_file(run / WEIGHTS, damage)
    check_damaged_run("classify.py", run, WEIGHTS)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("damage", [flip_a_bit, first_half, b""])
def test_incomplete_weights_are_called_damaged(damage, run):
    publish(run)
    damage_file(run / WEIGHTS, damage)
    assert f"{run / WEIGHTS} is damaged (" in fail("classify.py", run)


OTHER_OBJECTS = {
    "a module": ConvVAE(8),
    "NumPy arrays": {"enc1.weight": np.zeros((32, 1, 4, 4))},
    "a tensor": torch.zeros(3),
    "text": {"enc1.weight": "x"},
}


@pytest.mark.parametrize("saved", OTHER_OBJECTS.values(), ids=OTHER_OBJECTS)
def test_weights_that_are_not_a_state_dict_are_not_called_damaged(saved, run):
    publish(run)
    (run / WEIGHTS).write_bytes(torch_saved(saved))
    message = fail("classify.py", run)
    assert f"{run / WEIGHTS} is not a plain state_dict (" in message
    assert "torch.save(model.state_dict(), path)" in message
    assert "damaged" not in message


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_of_a_wrapped_network_do_not_fit(prefix, run):
    """DataParallel and torch.compile put a prefix in front of the names."""

    def add_prefix(weights):
        for name in list(weights):
            weights[f"{prefix}{name}"] = weights.pop(name)

    publish(run, add_prefix)
    message = check_damaged_run("classify.py", run, WEIGHTS)
    assert f"do not fit its options ({STATE} or {CONFIG}): {prefix}enc1.weight is not in" in message


def test_missing_tensor_is_named(run):
    def remove(weights):
        del weights["fc_mu.bias"]

    publish(run, remove)
    assert "fc_mu.bias is missing" in check_damaged_run("plots.py", run, WEIGHTS)


def test_tensor_of_another_shape_is_named(run):
    def shorten(weights):
        weights["fc_mu.bias"] = weights["fc_mu.bias"][:7]

    publish(run, shorten)
    message = check_damaged_run("plots.py", run, WEIGHTS)
    assert "fc_mu.bias has shape [7], not [8]" in message


@pytest.mark.parametrize("damage", DAMAGED_LOGS.values(), ids=DAMAGED_LOGS)
def test_damaged_log_is_reported(damage, run):
    publish(run)
    damage_file(run / LOG, damage)
    assert f"{run / LOG} is damaged (" in check_damaged_run("classify.py", run, LOG)


@pytest.mark.parametrize("damage", DAMAGED_CONFIGS.values(), ids=DAMAGED_CONFIGS)
def test_damaged_config_is_reported(damage, run):
    publish(run)
    damage_file(run / CONFIG, damage)
    check_damaged_run("classify.py", run, CONFIG)


@pytest.mark.parametrize("name, value", IMPOSSIBLE_OPTIONS)
def test_impossible_option_in_a_config_is_damage(name, value, run):
    publish(run)
    edit_json(run / CONFIG, **{name: value})
    message = check_damaged_run("classify.py", run, CONFIG)
    assert f"{run / CONFIG} is damaged (--{name.replace('_', '-')} must be " in message


def test_impossible_option_in_a_checkpoint_is_damage(run):
    def change_batch_size(state):
        state["config"]["batch_size"] = 0

    edit_tensors(run / STATE, change_batch_size)
    message = check_damaged_run("train.py", run, STATE)
    assert f"{run / STATE} is damaged (--batch-size must be " in message


@pytest.mark.parametrize("name", EXPORTED)
def test_plots_report_damaged_files(name, run):
    publish(run)
    damage_file(run / name, first_half)
    check_damaged_run("plots.py", run, name)


BAD_VALUES = [
    ("epochs", "0"),
    ("epochs", "1.5"),
    ("batch_size", "0"),
    ("batch_size", "1.5"),
    ("latent_dim", "0"),
    ("latent_dim", "1.5"),
    ("latent_dim", "9999"),
    ("lr", "0"),
    ("lr", "-1"),
    ("lr", "nan"),
    ("lr", "inf"),
    ("lr", "fast"),
    ("seed", "-1"),
    ("beta", "-1"),
    ("hold_out", "-1"),
    ("feature_weight", "-1"),
    ("device", "tpu"),
    ("model", "gan"),
    ("lr_scheduler", "step"),
]


@pytest.mark.parametrize("name, value", BAD_VALUES)
def test_bad_option_is_refused(name, value, tmp_path, capsys):
    run = tmp_path / "run"
    options = {"epochs": 1, name: value}
    code, _ = call("train.py", *command_options(run, **options))
    assert code == 2
    output = capsys.readouterr()
    usage, error = output.err.splitlines()
    assert usage == "usage: train.py [options]"
    assert error.startswith("train.py: error: ")
    assert f"--{name.replace('_', '-')}" in error
    assert value in error
    assert output.out == ""
    assert not run.exists()


@pytest.mark.parametrize("name", ["run", "data"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_empty_folder_name_is_refused(script, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = {"run": "run", name: ""}
    if script == "train.py":
        options["epochs"] = 1
    code, _ = call(script, *command_options(**options))
    assert code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"{script}: error: argument --{name}: the name of a folder must not be empty"
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_only_defaults_that_say_something(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")  # so that no help text is broken into lines
    assert call(script, "--help") == (0, "")
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {script} [options]\n")
    assert "\nrun and data:\n" in text
    assert "(default: runs/convvae)" in text
    assert "(default: data/fashion-mnist)" in text
    for value in ("", "None", "False", "[]"):
        assert f"(default: {value})" not in text


def test_help_of_training_shows_all_options_in_groups(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    call("train.py", "--help")
    text = capsys.readouterr().out
    assert "\nnetwork and training:\n" in text
    assert "\nthe report's proposals:\n" in text
    assert "CUDA_VISIBLE_DEVICES" in text
    entries = {}
    for entry in text.split("\n  --")[1:]:
        entries[entry.split()[0]] = entry
    for name, default in networks.OPTIONS.items():
        entry = entries[name.replace("_", "-")]
        if default != "":
            assert f"(default: {default})" in entry


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A temporary home folder, for which ~ stands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_tilde_in_options_is_the_home_folder(home, monkeypatch):
    words = ["--run=~/a", "--data=~/b", "--feature-run=~/c", "--feature-weight=1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    args = train.parse_arguments()
    assert args.run == home / "a"
    assert args.data == home / "b"
    assert args.feature_run == str(home / "c")


@pytest.mark.parametrize("script", ["classify.py", "plots.py"])
def test_tilde_in_the_folder_of_a_run_is_the_home_folder(script, home):
    _, message = call(script, "--run=~/absent")
    assert f"There is no run in {home / 'absent'} " in message


def test_load_run_takes_a_string_with_a_tilde(home, run):
    assert run == home / "run"
    assert load_run("~/run").path == run


def test_commands_are_quoted_for_posix_shells(monkeypatch):
    monkeypatch.setattr(data.sys, "platform", "linux")
    command = networks.train_command({"beta": 2.0}, Path("my runs/$1"))
    assert command == "python train.py --run 'my runs/$1' --beta 2.0"
    assert data.shell_command(["echo", "it's"]) == "echo 'it'\"'\"'s'"


def test_command_that_trains_on_other_data_asks_for_their_folder():
    config = {**networks.OPTIONS, "data_sha256": data.FASHION_MNIST_SHA256}
    assert networks.train_command(config, "new") == "python train.py --run new"
    config["data_sha256"] = "of something else"
    assert networks.train_command(config, "new") == "python train.py --run new --data FOLDER"


def test_commands_are_quoted_for_windows(monkeypatch):
    monkeypatch.setattr(data.sys, "platform", "win32")
    command = networks.train_command({"beta": 2.0}, "my runs\\1")
    assert command == 'python train.py --run "my runs\\1" --beta 2.0'


def test_command_that_measures_a_run_is_quoted(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "my run $1"))
    (run / CLASSIFICATION).unlink()
    networks.current_classification(load_run(run))
    message = capsys.readouterr().err
    command = message[message.index("python classify.py") :]
    assert shlex.split(command) == ["python", "classify.py", "--run", str(run)]


@pytest.mark.parametrize("script", ["classify.py", "plots.py"])
def test_missing_run_is_reported_with_the_command_that_trains_it(script, tmp_path):
    message = fail(script, tmp_path / "absent")
    assert f"There is no run in {tmp_path / 'absent'} " in message
    assert f"python train.py --run {tmp_path / 'absent'}\n" in message


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_without_weights_is_reported_with_the_command_that_trains_it(script, run, monkeypatch):
    """The command can be pasted into a shell, and trains a network with the same options."""
    (run / STATE).unlink()
    (run / WEIGHTS).unlink()
    edit_json(run / CONFIG, feature_run="a b", feature_weight=0.5)
    message = fail(script, run)
    assert str(run) in message
    command = shlex.split(message[message.index("python train.py") :])
    monkeypatch.setattr(sys, "argv", command[1:])
    args = vars(train.parse_arguments())
    config = networks.read_run(run).config
    for name in networks.OPTIONS:
        assert args[name] == config[name]
    assert args["run"] == Path("runs/new")


@pytest.mark.parametrize("script", SCRIPTS)
def test_folder_with_files_of_a_run_is_not_proposed_for_a_new_one(script, run):
    (run / STATE).unlink()
    (run / CONFIG).unlink()
    assert "--run runs/new" in fail(script, run)


def temporary_file(run, name):
    """Return the path under which this process writes a file before it is renamed."""
    return run / f"{name}.{os.getpid()}.tmp"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_reported(run):
    before = contents(run)
    temporary = temporary_file(run, STATE)
    temporary.symlink_to("/dev/full")
    assert f"{run / STATE} cannot be written: No space left" in fail("train.py", run)
    assert not temporary.is_symlink()
    assert contents(run) == before


@pytest.mark.parametrize(
    "script, name",
    [("train.py", STATE), ("classify.py", CLASSIFICATION), ("plots.py", "loss_curves.png")],
)
def test_file_that_cannot_be_written_is_reported(script, name, run):
    # Not even root can write a file where there is a folder.
    temporary_file(run, name).mkdir()
    assert f"{run / name} cannot be written: Is a directory" in fail(script, run)


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_that_is_a_file_is_reported(script, tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in fail(script, tmp_path / "file")


def test_read_only_folder_is_reported_before_training(tmp_path, monkeypatch, capsys):
    refused = PermissionError(errno.EACCES, "denied", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=refused))
    assert "denied" in fail("train.py", tmp_path / "run")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_scripts_work_with_a_notebooks_streams_and_without_streams(stream, run, monkeypatch):
    def print_mu():
        print("μ", file=sys.stderr, flush=True)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        succeed("train.py", run, epochs=3)
        data.run_script(print_mu, when_interrupted="Try again.")
    if stream:
        assert stream.getvalue().endswith("left\nμ\n")


# --- Training -------------------------------------------------------------------------------


def log_of(run):
    """Return the loss log of a run."""
    return load_run(run).log


def saved_epochs(run):
    """Return the number of finished epochs in a folder that may have no run yet."""
    return len(log_of(run)) if (run / STATE).exists() else 0


def test_default_options_are_those_of_the_report(monkeypatch):
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


@pytest.mark.parametrize("script", ["classify.py", "plots.py"])
def test_all_scripts_have_the_same_default_folder(script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert f"no run in {train.parse_arguments().run} " in call(script)[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_have_a_help_text(script, capsys):
    assert call(script, "--help") == (0, "")
    assert capsys.readouterr().out.startswith(f"usage: {script} [options]\n")


@pytest.mark.parametrize("beta, lr_scheduler", [(1.0, "constant"), (0.25, "cosine")])
def test_training_matches_a_plain_training_loop(beta, lr_scheduler, tmp_path):
    """The loop uses the report's layers and loss, and draws the same random numbers."""
    run = tmp_path / "run"
    seed = 3
    lr = 2e-3
    succeed(
        "train.py",
        run,
        epochs=2,
        batch_size=64,
        seed=seed,
        lr=lr,
        beta=beta,
        lr_scheduler=lr_scheduler,
    )
    trained = load_run(run)
    assert [row["epoch"] for row in trained.log] == [1, 2]

    torch.manual_seed(seed)
    model = ReportVAE(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for epoch, row in enumerate(trained.log, start=1):
        torch.manual_seed(seed * 1_000_003 + epoch)
        expected_lr = lr
        if lr_scheduler == "cosine":
            expected_lr = lr * (1 + math.cos(math.pi * (epoch - 1) / 2)) / 2
        optimizer.param_groups[0]["lr"] = expected_lr
        train_loss = 0.0
        train_bce = 0.0
        for batch in torch.randperm(600).split(64):
            images = TRAIN_IMAGES[batch]
            optimizer.zero_grad()
            reconstruction, mu, logvar = model(images)
            loss = report_loss(reconstruction, images, mu, logvar)
            bce = F.binary_cross_entropy(reconstruction, images, reduction="sum")
            kld = loss - bce
            (bce + beta * kld).backward()
            optimizer.step()
            train_loss += loss.item() / 600
            train_bce += bce.item() / 600
        with torch.no_grad():
            reconstruction, mu, logvar = model(TEST_IMAGES)
            test_loss = report_loss(reconstruction, TEST_IMAGES, mu, logvar).item() / 225
            test_bce = F.binary_cross_entropy(reconstruction, TEST_IMAGES, reduction="sum") / 225

        assert row["lr"] == pytest.approx(expected_lr, rel=1e-12)
        assert row["train_loss"] == pytest.approx(train_loss, rel=1e-4)
        assert row["train_bce"] == pytest.approx(train_bce, rel=1e-4)
        assert row["test_loss"] == pytest.approx(test_loss, rel=1e-4)
        assert row["test_bce"] == pytest.approx(test_bce.item(), rel=1e-4)
        # The columns are sums whatever beta is.
        assert row["train_loss"] == row["train_bce"] + row["train_kld"]
        assert row["test_loss"] == row["test_bce"] + row["test_kld"]

    weights = torch.load(run / WEIGHTS, weights_only=True)
    for name, expected in model.state_dict().items():
        assert (weights[name] - expected).norm() < 0.01 * expected.norm()
        assert weights[name].is_contiguous()


def test_all_losses_come_from_the_loss_function(monkeypatch):
    """Whoever edits it changes the training, the logged losses and the check of a device."""
    model = ConvVAE(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    images = TRAIN_IMAGES[:32]

    def double(losses):
        """Return twice the loss, or twice the loss and its terms."""
        if isinstance(losses, tuple):
            return tuple(2 * value for value in losses)
        return 2 * losses

    def double_loss(*args, **kwargs):
        return double(networks.loss_function(*args, **kwargs))

    def compute_losses():
        """Return everything that depends on the loss, as a list of tensors."""
        torch.manual_seed(1)
        terms = train.train_step(model, optimizer, images, 1.0, None, 0.0)
        test_losses = train.test_epoch(model, images)
        return [
            terms,
            *(parameter.grad.clone() for parameter in model.parameters()),
            torch.tensor(list(test_losses.values())),
            *train.loss_and_gradients(model, images, "cpu"),
        ]

    assert train.loss_function is networks.loss_function
    expected = [2 * value for value in compute_losses()]
    monkeypatch.setattr(train, "loss_function", double_loss)
    torch.testing.assert_close(compute_losses(), expected, rtol=0, atol=0)


def test_learning_rate_is_set_as_a_number():
    optimizer = train.make_optimizer(nn.Linear(1, 1), 0.5, "cpu")
    assert optimizer.param_groups[0]["lr"] == 0.5
    train.set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert not isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


def test_learning_rate_is_set_within_a_tensor():
    """A captured step keeps reading the tensor with which the optimizer was made."""
    lr = torch.tensor(0.5)
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=lr, fused=True)
    train.set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25


def test_network_is_in_evaluation_mode_for_the_test_set_only(monkeypatch, tmp_path):
    calls = []
    forward = networks.VAE.forward

    def note_call(model, images):
        calls.append((len(images), model.training, torch.is_grad_enabled()))
        return forward(model, images)

    monkeypatch.setattr(networks.VAE, "forward", note_call)
    succeed("train.py", tmp_path / "run", epochs=2, batch_size=600)
    assert calls == [(600, True, True), (225, False, False)] * 2


def test_training_prints_data_device_and_losses(tmp_path, capsys):
    run = tmp_path / "run"
    succeed("train.py", run, epochs=2, model="fc")
    printed = capsys.readouterr()
    data_line, first_line, *epoch_lines = printed.out.splitlines()
    assert printed.err == ""
    assert data_line == SMALL_DATA_LINE
    assert first_line == "Fully connected VAE on cpu, epochs 1 to 2"
    for row, line in zip(log_of(run), epoch_lines, strict=True):
        losses = f"Train loss {row['train_loss']:.2f}, Test loss {row['test_loss']:.2f}"
        assert line.startswith(f"Epoch {row['epoch']}: {losses}, {row['seconds']:.2f} s, ")


def test_training_writes_all_options_into_the_config(tmp_path):
    run = tmp_path / "run"
    succeed("train.py", run, epochs=1, model="fc", lr=0.001)
    assert set(contents(run)) == {STATE, *EXPORTED}
    config = read_json(run / CONFIG)
    assert config == {
        **networks.OPTIONS,
        "model": "fc",
        "latent_dim": 8,
        "batch_size": 32,
        "lr": 0.001,
        "epochs": 1,
        "feature_sha256": None,
        "data_sha256": data.FASHION_MNIST_SHA256,
        "torch": str(torch.__version__),
        "device": "cpu",
    }
    assert load_run(run).config == config


def test_training_keeps_convolutions_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    succeed("train.py", tmp_path / "run", epochs=1, batch_size=600)
    assert not torch.backends.cudnn.allow_tf32


@pytest.fixture
def clock(monkeypatch):
    """A clock that train.py reads, whose time `now` passes only when a test says so."""
    clock = SimpleNamespace(now=1000.0)

    def perf_counter():
        return clock.now

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=perf_counter))
    return clock


def test_time_left_includes_saving(clock, tmp_path, monkeypatch, capsys):
    train_epoch = train.train_epoch
    save = train.RunWriter.save

    def slow_train_epoch(*args):
        clock.now += 10
        return train_epoch(*args)

    def slow_save(*args):
        clock.now += 100
        save(*args)

    monkeypatch.setattr(train, "train_epoch", slow_train_epoch)
    monkeypatch.setattr(train.RunWriter, "save", slow_save)
    run = tmp_path / "run"
    succeed("train.py", run, epochs=3, batch_size=600)
    endings = re.findall(r", ([\d.]+ s, [\d:]+ left)\n", capsys.readouterr().out)
    assert endings == ["10.00 s, 0:03:40 left", "10.00 s, 0:01:50 left", "10.00 s, 0:00:00 left"]
    assert [row["seconds"] for row in log_of(run)] == [10, 10, 10]


def train_epoch_of_6000_images():
    """Let train_epoch go through 60 batches of images, without any training."""

    def step(images):
        return images.sum(dim=0)

    return train.train_epoch(step, torch.ones(6000, 2), batch_size=100)


def test_progress_is_shown_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", Mock(return_value=True), raising=False)
    assert train_epoch_of_6000_images() == {"train_loss": 2, "train_bce": 1, "train_kld": 1}
    line, cleared = capsys.readouterr().out.split("\r\r")
    assert line == f"\r{'5,000 of 6,000 images':40}"
    assert cleared == f"{' ' * 40}\r"


def test_progress_is_not_shown_elsewhere(monkeypatch, capsys):
    train_epoch_of_6000_images()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "stdout", None)  # as with pythonw on Windows
    train_epoch_of_6000_images()


def test_training_works_where_gradients_are_switched_off(run, three_epochs):
    """As they may be in a notebook, which must stay as it was."""
    with torch.set_grad_enabled(False):
        succeed("train.py", run, epochs=3)
        assert not torch.is_grad_enabled()
    assert_same_training(run, three_epochs)


OUT_OF_MEMORY = {
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    "Python": MemoryError(),
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "oneDNN": RuntimeError("could not create a primitive"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "Windows": RuntimeError(
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."
    ),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
@pytest.mark.parametrize("function", ["train_step", "test_epoch"])
def test_out_of_memory_names_the_batch_size(function, error, run, monkeypatch):
    before = contents(run)
    monkeypatch.setattr(train, function, Mock(side_effect=error))
    message = fail("train.py", run)
    assert "Not enough memory for batches of 32 images" in message
    assert "--batch-size" in message
    assert contents(run) == before


@pytest.mark.parametrize("function", ["train_step", "test_epoch"])
def test_other_errors_of_training_are_not_hidden(function, run, monkeypatch):
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(train, function, Mock(side_effect=error))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        succeed("train.py", run, epochs=3)


def test_loss_that_is_not_finite_stops_training(run):
    """The finished epochs are kept. Weights that overflow stand in for a training that diverges."""

    def overflow(state):
        state["model"]["fc_log.bias"].fill_(1000.0)

    edit_tensors(run / STATE, overflow)
    message = fail("train.py", run)
    assert "not finite in epoch 3" in message
    assert "smaller --lr and another folder with --run" in message
    assert [row["epoch"] for row in log_of(run)] == [1, 2]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_of_both_splits_must_be_finite(split, loss):
    row = {"epoch": 7, "train_loss": 250.0, "test_loss": 251.0}
    train.stop_unless_finite(row)
    row[f"{split}_loss"] = loss
    with pytest.raises(data.UserError, match="The loss is not finite in epoch 7"):
        train.stop_unless_finite(row)


def test_folder_can_be_used_again_if_the_first_loss_is_not_finite(tmp_path):
    run = tmp_path / "run"
    assert "not finite in epoch 1" in fail("train.py", run, epochs=1, lr=1000)
    succeed("train.py", run, epochs=1, lr=0.001)


# --- Resuming and saving --------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2])
def test_finished_run_is_left_unchanged(epochs, run, capsys):
    before = contents(run)
    succeed("train.py", run, epochs=epochs)
    printed = capsys.readouterr().out
    assert printed == f"{run} is finished: 2 epochs.\nTo train it further, give more --epochs.\n"
    assert contents(run) == before


def test_finished_run_can_be_trained_further(run, three_epochs, capsys):
    succeed("train.py", run, epochs=3)
    assert "ConvVAE on cpu, epochs 3 to 3\n" in capsys.readouterr().out
    assert_same_training(run, three_epochs)
    assert read_json(run / CONFIG)["epochs"] == 3


OTHER_OPTIONS = {
    "model": ("fc", "conv"),
    "latent_dim": (16, 8),
    "batch_size": (64, 32),
    "lr": (0.1, 0.0005),
    "seed": (1, 0),
    "beta": (2.0, 1.0),
    "lr_scheduler": ("plateau", "constant"),
    "hold_out": (100, 0),
}


@pytest.mark.parametrize("option", OTHER_OPTIONS)
def test_resuming_with_other_options_is_refused(option, run):
    value, before = OTHER_OPTIONS[option]
    files = contents(run)
    message = fail("train.py", run, **{option: value})
    assert f"{run} was trained with --{option.replace('_', '-')} {before}, not {value}." in message
    assert "another folder with --run" in message
    assert contents(run) == files


def test_resuming_on_other_data_is_refused(run, tmp_path):
    other_data = write_dataset(tmp_path / "data", dataset_files(train_split=TEST_SPLIT))
    files = contents(run)
    assert f"{run} was trained on different data." in fail("train.py", run, data=other_data)
    assert contents(run) == files


def test_run_without_a_checksum_was_trained_on_fashion_mnist(run, three_epochs, tmp_path):
    """Runs saved before the checksum was added have none."""

    def forget_checksum(state):
        del state["config"]["data_sha256"]

    edit_tensors(run / STATE, forget_checksum)
    other_data = write_dataset(tmp_path / "data", dataset_files(train_split=TEST_SPLIT))
    assert "on different data" in fail("train.py", run, data=other_data)
    succeed("train.py", run, epochs=3)
    assert_same_training(run, three_epochs)
    assert load_run(run).config["data_sha256"] == data.FASHION_MNIST_SHA256


@pytest.fixture
def new_option(run, monkeypatch):
    """Add an option to train.py, and return a function that gives it another value."""
    parse_arguments = train.parse_arguments

    def give(value):
        def parse_with_value():
            args = parse_arguments()
            args.label_noise = value
            return args

        monkeypatch.setattr(train, "parse_arguments", parse_with_value)

    monkeypatch.setitem(networks.OPTIONS, "label_noise", 1.0)
    return give


def test_run_saved_before_an_option_was_added_has_its_default(run, new_option, finished):
    description = str(load_run(finished))
    assert load_run(run).config["label_noise"] == 1.0
    succeed("train.py", run, epochs=3)
    assert load_run(run).config["label_noise"] == 1.0
    assert description == str(load_run(finished))


def test_option_newer_than_the_run_is_refused(run, new_option):
    new_option(2.0)
    assert "was trained with --label-noise 1.0, not 2.0." in fail("train.py", run)


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


class ImpatientPlateau(ReduceLROnPlateau):
    """A plateau schedule that divides the learning rate by 10 after each epoch but the first."""

    def __init__(self, optimizer):
        super().__init__(optimizer, patience=0, threshold=0.9)


# An epoch renames four files: the checkpoint and the three exported files.
INTERRUPTED = [
    (0, {}),
    (1, {}),
    (2, {}),
    (3, {}),
    (4, {}),
    (5, {}),
    (7, {}),
    (8, {}),
    (5, {"lr_scheduler": "cosine"}),
    (5, {"lr_scheduler": "plateau"}),
    (5, {"model": "deep"}),
    (5, {"hold_out": 100}),
    (5, {"feature_weight": 0.1}),
]


@pytest.mark.parametrize("renames, proposal", INTERRUPTED)
def test_interrupted_run_is_resumed_as_if_uninterrupted(
    renames, proposal, finished, three_epochs, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "ReduceLROnPlateau", ImpatientPlateau)
    run = tmp_path / "run"
    options = {"epochs": 3, **proposal}
    if "feature_weight" in proposal:
        options["feature_run"] = finished
    uninterrupted = three_epochs
    if proposal:
        uninterrupted = tmp_path / "uninterrupted"
        succeed("train.py", uninterrupted, **options)
        assert log_without_seconds(uninterrupted) != log_without_seconds(three_epochs)

    with monkeypatch.context() as patch:
        interrupt_after(renames, patch)
        assert call("train.py", *command_options(run, **options)) == (130, "")
    # A run can be read even if some of its exported files are missing or older.
    assert saved_epochs(run) == (renames + 3) // 4
    succeed("train.py", run, **options)
    assert_same_training(run, uninterrupted)
    assert contents(run).keys() == contents(uninterrupted).keys()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("sent", ["SIGKILL", "SIGINT"])
def test_run_that_was_killed_within_an_epoch_can_be_resumed(sent, tmp_path):
    run = tmp_path / "run"
    options = {"batch_size": 8, "latent_dim": 4, "epochs": 2}
    with start("train.py", run, **options) as process:
        while "Epoch 1:" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.Signals[sent])
        errors = process.communicate()[1]
    if sent == "SIGINT":
        assert process.returncode == 130
        assert errors == (
            "Interrupted. Run the same command again to resume after the last finished epoch.\n"
        )
    else:
        assert process.returncode == -signal.SIGKILL
        assert errors == ""
    assert saved_epochs(run) == 1
    succeed("train.py", run, **options)
    assert saved_epochs(run) == 2


def test_only_one_of_two_trainings_in_the_same_folder_goes_on(tmp_path):
    run = tmp_path / "run"
    options = {"batch_size": 8, "epochs": 2}
    processes = [start("train.py", run, seed=seed, **options) for seed in (1, 2)]
    errors = [process.communicate()[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 1]
    winner = codes.index(0)
    loser = codes.index(1)
    assert errors[winner] == ""
    assert errors[loser].count("\n") == 1
    assert str(run) in errors[loser]
    # The other one trains as if it were alone.
    succeed("train.py", tmp_path / "alone", seed=winner + 1, **options)
    assert_same_training(run, tmp_path / "alone")
    assert set(contents(run)) == {STATE, *EXPORTED}


@pytest.mark.parametrize("resumed", [True, False])
def test_checkpoint_of_another_process_is_not_overwritten(resumed, run, three_epochs, tmp_path):
    folder = run if resumed else tmp_path / "new"
    folder.mkdir(exist_ok=True)
    writer = train.RunWriter(folder)
    shutil.copy(three_epochs / STATE, folder)
    before = contents(folder)
    optimizer = torch.optim.Adam([torch.zeros(1)])
    with pytest.raises(data.UserError, match="Another train.py has written"):
        writer.save({}, nn.Linear(1, 1), optimizer, [])
    assert contents(folder) == before


@pytest.mark.parametrize("damage", [None, b"", b"damaged", b"{}"])
@pytest.mark.parametrize("name", EXPORTED)
def test_damaged_exported_files_are_restored_from_the_checkpoint(name, damage, run):
    before = contents(run)
    if damage is None:
        (run / name).unlink()
    else:
        damage_file(run / name, damage)
    succeed("train.py", run, epochs=2)
    assert contents(run) == before


@pytest.fixture
def latent_space(monkeypatch):
    """Stands in for the function that draws the latent space, because t-SNE is slow."""
    draw_latent_space = Mock()
    monkeypatch.setattr(plots, "draw_latent_space", draw_latent_space)
    return draw_latent_space


def test_scripts_read_the_checkpoint_instead_of_exported_files(run, figures, latent_space):
    before = contents(run)
    for name in EXPORTED:
        damage_file(run / name, b"damaged")
    succeed("classify.py", run)
    succeed("plots.py", run)
    assert contents(run)[CLASSIFICATION] == before[CLASSIFICATION]


@pytest.fixture
def busy_files(monkeypatch):
    """Say how often files refuse to be replaced, as {name: times}, and note how long we waited.

    Windows refuses to replace a file that another program has open.
    """
    busy_files = SimpleNamespace(times={}, waited=[])
    replace = os.replace

    def refuse_or_replace(source, target):
        name = Path(target).name
        if busy_files.times.get(name, 0) > 0:
            busy_files.times[name] -= 1
            raise PermissionError(errno.EACCES, "held by another program", target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_or_replace)
    monkeypatch.setattr(data.time, "sleep", busy_files.waited.append)
    return busy_files


def test_exported_file_that_cannot_be_replaced_causes_one_warning(
    busy_files, three_epochs, tmp_path, capsys
):
    run = tmp_path / "run"
    busy_files.times[LOG] = 1_000_000
    succeed("train.py", run, epochs=3)
    assert capsys.readouterr().err == (
        f"Warning: {run / LOG} cannot be written: held by another program. "
        f"{STATE} has its content, too.\n"
    )
    assert 0 < sum(busy_files.waited) / 3 < 2  # seconds per epoch
    assert set(contents(run)) == {STATE, CONFIG, WEIGHTS}
    busy_files.times.clear()
    succeed("train.py", run, epochs=3)
    assert_same_training(run, three_epochs)


def test_replacing_the_checkpoint_is_tried_again(busy_files, run, three_epochs):
    busy_files.times[STATE] = 2
    succeed("train.py", run, epochs=3)
    assert len(busy_files.waited) == 2
    assert_same_training(run, three_epochs)


def test_checkpoint_that_cannot_be_replaced_stops_training(busy_files, run):
    busy_files.times[STATE] = 1_000_000
    before = contents(run)
    message = fail("train.py", run)
    assert f"{run / STATE} cannot be written: held by another program" in message
    assert contents(run) == before


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_file_systems_without_fsync_can_be_used(number, run, three_epochs, monkeypatch):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(number, "refused")))
    succeed("train.py", run, epochs=3)
    assert_same_training(run, three_epochs)
    assert set(contents(run)) == {STATE, *EXPORTED, CLASSIFICATION}


def test_failing_disk_stops_training(run, monkeypatch):
    before = contents(run)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EIO, "refused")))
    assert f"{STATE} cannot be written: refused" in fail("train.py", run)
    assert contents(run) == before


UNREADABLE = {
    "stale": OSError(errno.ESTALE, "stale file handle"),
    "many": OSError(errno.EMFILE, "too many open files"),
}


@pytest.mark.parametrize("error", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoint_that_cannot_be_read_is_not_called_damaged(script, error, run, monkeypatch):
    read_bytes = Path.read_bytes

    def refuse_checkpoint(path):
        if path.name == STATE:
            raise error
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse_checkpoint)
        message = fail(script, run)
    assert error.strerror in message
    assert str(run / STATE) in message
    assert "damaged" not in message
    succeed("train.py", run, epochs=2)


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoint_too_large_for_memory_is_not_called_damaged(script, error, run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", Mock(side_effect=error))
        message = fail(script, run)
    assert f"Not enough memory to read {run / STATE}." in message
    assert "damaged" not in message
    succeed("train.py", run, epochs=2)


@pytest.mark.parametrize("names", [[CONFIG], [WEIGHTS], [LOG], [CLASSIFICATION], EXPORTED])
def test_run_without_a_checkpoint_is_not_overwritten(names, run):
    for name in contents(run):
        if name not in names:
            (run / name).unlink()
    before = contents(run)
    message = fail("train.py", run, seed=5)
    assert f"{run} has no {STATE}, so training cannot be resumed." in message
    assert "python train.py --run runs/new --latent-dim 8 --batch-size 32" in message
    # The command has the options of that run. If they are unknown, it has those of this one.
    assert ("--seed 5" in message) == (CONFIG not in names)
    assert contents(run) == before


def test_optimizer_state_is_copied_into_the_memory_layout_of_the_weights(run, three_epochs):
    """Fused Adam ignores strides, and on another device the layout may have been another."""
    state = torch.load(run / STATE, weights_only=True)
    assert not state["optimizer"][2]["exp_avg"].is_contiguous()  # it is channels_last
    for entry in state["optimizer"].values():
        for name, tensor in entry.items():
            entry[name] = tensor.contiguous()
    torch.save(state, run / STATE)
    succeed("train.py", run, epochs=3)
    assert_same_training(run, three_epochs)


def lose_optimizer_state(state):
    """Replace the optimizer state by None."""
    state["optimizer"] = None


def lose_entry(state):
    """Remove the entry of one parameter."""
    del state["optimizer"][3]


def empty_entry(state):
    """Remove all tensors of one parameter."""
    state["optimizer"][3] = {}


def flatten_average(state):
    """Give the average gradient of a parameter a single element."""
    state["optimizer"][3]["exp_avg"] = torch.zeros(1)


def transpose_average(state):
    """Give the average gradient of a parameter the shape of its transpose."""
    state["optimizer"][6]["exp_avg"] = state["optimizer"][6]["exp_avg"].mT


def multiply_steps(state):
    """Give a parameter several numbers of steps."""
    state["optimizer"][3]["step"] = torch.zeros(5)


def reverse_parameters(state):
    """Give each parameter the state of another one."""
    entries = state["optimizer"]
    state["optimizer"] = {17 - number: entry for number, entry in entries.items()}


@pytest.mark.parametrize(
    "damage",
    [
        lose_optimizer_state,
        lose_entry,
        empty_entry,
        flatten_average,
        transpose_average,
        multiply_steps,
        reverse_parameters,
    ],
)
def test_optimizer_state_that_does_not_fit_is_refused(damage, run):
    edit_tensors(run / STATE, damage)
    before = contents(run)
    message = fail("train.py", run)
    assert f"{run / STATE} has no optimizer state that fits the network." in message
    assert contents(run) == before


# --- The report's proposals -----------------------------------------------------------------


def learning_rate(lr_scheduler, log, epochs=99, beta=1.0):
    """Return the learning rate that follows a loss log. The first one is 1."""
    args = SimpleNamespace(lr_scheduler=lr_scheduler, lr=1.0, epochs=epochs, beta=beta)
    return train.learning_rate(args, log)


def test_constant_and_cosine_learning_rates():
    log = [{"train_bce": 9.0, "train_kld": 0.1 * epoch} for epoch in range(4)]
    expected = [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    found = [learning_rate("cosine", log[:epoch], epochs=4) for epoch in range(4)]
    assert found == pytest.approx(expected)
    assert learning_rate("constant", log, epochs=4) == 1.0


def test_plateau_schedule_waits_for_ten_epochs_without_progress():
    """The first epoch is the best. That the test loss improves does not count."""
    log = [{"train_bce": 9.0, "train_kld": 0.1 * n, "test_loss": -n} for n in range(12)]
    assert learning_rate("plateau", log[:11]) == 1.0
    assert learning_rate("plateau", log) == pytest.approx(0.1)


def test_plateau_schedule_watches_the_loss_with_the_weight_beta():
    """BCE + KLD rises, but BCE + 0.1 * KLD falls."""
    log = [{"train_bce": 9.0 - 0.05 * n, "train_kld": 0.1 * n} for n in range(30)]
    assert learning_rate("plateau", log[:12]) == pytest.approx(0.1)
    assert learning_rate("plateau", log, beta=0.1) == 1.0


def test_run_with_cosine_schedule_cannot_be_trained_further(tmp_path, capsys):
    """All of its learning rates depend on the number of epochs."""
    run = tmp_path / "run"
    succeed("train.py", run, epochs=2, lr_scheduler="cosine", batch_size=600)
    before = contents(run)
    capsys.readouterr()
    succeed("train.py", run, epochs=2, lr_scheduler="cosine", batch_size=600)
    assert capsys.readouterr().out == f"{run} is finished: 2 epochs.\n"
    for epochs in (1, 3):
        message = fail("train.py", run, epochs=epochs, lr_scheduler="cosine", batch_size=600)
        assert f"was trained with --epochs 2, not {epochs}." in message
    assert contents(run) == before


def test_run_with_plateau_schedule_can_be_trained_further(tmp_path):
    run = tmp_path / "run"
    succeed("train.py", run, epochs=1, lr_scheduler="plateau", batch_size=600)
    succeed("train.py", run, epochs=2, lr_scheduler="plateau", batch_size=600)
    assert saved_epochs(run) == 2


def test_feature_matching_is_part_of_the_loss_that_is_minimized(finished):
    model = ConvVAE(8)
    images = TRAIN_IMAGES[:32]
    encoder = ReportVAE(8)
    encoder.load_state_dict(torch.load(finished / WEIGHTS, weights_only=True))
    torch.manual_seed(1)
    reconstruction, mu, logvar = model(images)
    bce = F.binary_cross_entropy(reconstruction, images, reduction="sum")
    kld = networks.kl_divergence(mu, logvar)
    loss = bce + 0.5 * kld
    found = reconstruction
    wanted = images
    for layer in (encoder.enc1, encoder.enc2, encoder.enc3):
        found = layer(found).relu()
        wanted = layer(wanted).relu()
        loss = loss + 0.3 * (found - wanted).square().sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))

    same_encoder = load_run(finished).model
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    terms = train.train_step(model, optimizer, images, 0.5, same_encoder, 0.3)
    gradients = tuple(parameter.grad for parameter in model.parameters())
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-3)
    # The log has BCE and KLD only.
    torch.testing.assert_close(terms, torch.stack((bce, kld)).detach(), rtol=1e-4, atol=1e-4)


def test_feature_run_is_used_as_an_encoder_that_is_not_trained(finished, tmp_path, monkeypatch):
    train_step = train.train_step
    feature_models = []

    def note_feature_model(model, optimizer, images, beta, feature_model, feature_weight):
        feature_models.append(feature_model)
        assert (beta, feature_weight) == (0.5, 2.0)
        assert not any(parameter.requires_grad for parameter in feature_model.parameters())
        return train_step(model, optimizer, images, beta, feature_model, feature_weight)

    monkeypatch.setattr(train, "train_step", note_feature_model)
    succeed(
        "train.py",
        tmp_path / "run",
        epochs=1,
        batch_size=600,
        beta=0.5,
        feature_weight=2,
        feature_run=finished,
    )
    (feature_model,) = feature_models
    weights = torch.load(finished / WEIGHTS, weights_only=True)
    torch.testing.assert_close(feature_model.state_dict(), weights, rtol=0, atol=0)
    assert not feature_model.training


@pytest.mark.parametrize("option, value", [("feature_weight", 1), ("feature_run", "runs/x")])
def test_feature_weight_and_feature_run_need_each_other(option, value, tmp_path, capsys):
    run = tmp_path / "run"
    assert call("train.py", *command_options(run, epochs=1, **{option: value}))[0] == 2
    message = "error: --feature-weight and --feature-run must be given together\n"
    assert capsys.readouterr().err.endswith(message)
    assert not run.exists()


def test_feature_run_must_exist(tmp_path):
    run = tmp_path / "run"
    missing = tmp_path / "missing"
    message = fail("train.py", run, feature_weight=1, feature_run=missing)
    assert f"no run in {missing}" in message
    assert not run.exists()


def test_tilde_in_feature_run_is_the_home_folder(monkeypatch):
    """Shells expand the ~ in "--feature-run ~/x", but not in "--feature-run=~/x"."""
    words = ["train.py", "--feature-run=~/x", "--feature-weight=1"]
    monkeypatch.setattr(sys, "argv", words)
    assert train.parse_arguments().feature_run == os.path.join(os.path.expanduser("~"), "x")


def test_feature_run_is_recognized_by_its_weights(finished, run, tmp_path):
    new = tmp_path / "new"
    options = {"feature_weight": 1, "batch_size": 600}
    succeed("train.py", new, epochs=1, feature_run=run, **options)
    # In another folder, the same weights are the same encoder.
    succeed("train.py", new, epochs=2, feature_run=finished, **options)
    # Training changes the weights, and then the folder has another encoder.
    succeed("train.py", run, epochs=3)
    message = fail("train.py", new, feature_run=run, **options)
    assert f"{new} was trained with a different network as --feature-run." in message
    assert saved_epochs(new) == 2


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """A DeepConvVAE after one epoch. Tests must not change it."""
    run = tmp_path_factory.mktemp("runs") / "deep"
    succeed("train.py", run, epochs=1, model="deep", batch_size=100)
    return load_run(run).model


def test_running_means_of_the_deep_network_are_saved(deep_model):
    running = [name for name in deep_model.state_dict() if "running" in name]
    assert len(running) == 14
    assert deep_model.enc[0][1].running_mean.abs().sum() > 0


@torch.no_grad()
def test_trained_deep_network_computes_its_layers(deep_model):
    """BatchNorm uses its running means, so an image does not depend on others in the batch."""
    h = TEST_IMAGES
    for layer, norm, _ in deep_model.enc:
        h = F.leaky_relu(norm(layer(h)), 0.2)
    mu, logvar = deep_model.encode(TEST_IMAGES)
    torch.testing.assert_close(mu, deep_model.fc_mu(h.flatten(1)))
    torch.testing.assert_close(logvar, deep_model.fc_log(h.flatten(1)))
    h = F.leaky_relu(deep_model.fc_dec(mu), 0.2).view(-1, 256, 3, 3)
    for layer, norm, _ in deep_model.dec[:-1]:
        h = F.leaky_relu(norm(layer(h)), 0.2)
    torch.testing.assert_close(deep_model.decode(mu), deep_model.dec[-1](h).sigmoid())
    alone = networks.latent_means(deep_model, TEST_IMAGES[:1])
    assert torch.equal(networks.latent_means(deep_model, TEST_IMAGES)[:1], alone)


def test_deep_network_has_the_size_that_is_documented(deep_model):
    assert sum(parameter.numel() for parameter in MODELS["deep"]().parameters()) == 1_144_193
    channels = [output.shape[1] for output in deep_model.features(TEST_IMAGES[:1])]
    assert channels == [32, 64, 128, 256]


def test_hold_out_takes_the_place_of_the_test_set(tmp_path, figures, latent_space):
    """All scripts do as if the last training images were the test set."""
    images, labels = TRAIN_SPLIT
    files = dataset_files(
        train_split=(images[:-100], labels[:-100]), test_split=(images[-100:], labels[-100:])
    )
    same_split = write_dataset(tmp_path / "data", files)
    runs = []
    drawn = []
    for name, root, hold_out in [("held_out", SMALL_DATA, 100), ("same", same_split, 0)]:
        run = tmp_path / name
        succeed("train.py", run, data=root, epochs=1, hold_out=hold_out)
        succeed("classify.py", run, "--baselines", data=root)
        succeed("plots.py", run, data=root)
        runs.append(run)
        images_drawn = [images_in(figures[name]) for name in ("samples.png", "reconstructions.png")]
        drawn.append([*images_drawn, *latent_space.call_args.args])
    assert_same_training(*runs)
    assert contents(runs[0])[CLASSIFICATION] == contents(runs[1])[CLASSIFICATION]
    torch.testing.assert_close(*drawn)


@pytest.mark.parametrize("hold_out", [9, 591, 700])
def test_hold_out_must_leave_ten_images_in_each_split(hold_out, tmp_path):
    message = fail("train.py", tmp_path / "run", hold_out=hold_out)
    counts = f"{max(600 - hold_out, 0)} training and {min(hold_out, 600)} test images"
    assert f"has {counts} with --hold-out {hold_out}." in message


def test_data_set_needs_ten_images_in_each_split(tmp_path):
    nine = [part[:9] for part in TEST_SPLIT]
    root = write_dataset(tmp_path / "data", dataset_files(test_split=nine))
    message = fail("train.py", tmp_path / "run", data=root)
    assert "has 600 training and 9 test images. At least 10" in message


def evaluate_few_images(run, hold_out, latent_dim):
    """Run all scripts. Return the content of classification.json."""
    succeed("train.py", run, epochs=1, hold_out=hold_out, latent_dim=latent_dim)
    succeed("classify.py", run)
    succeed("plots.py", run)
    result = read_json(run / CLASSIFICATION)
    assert result["baselines"] is None
    return result


def test_validation_split_may_lack_a_class(tmp_path, figures):
    """The single latent dimension gives t-SNE only one dimension, too."""
    result = evaluate_few_images(tmp_path / "run", hold_out=10, latent_dim=1)
    counts = torch.bincount(TRAIN_LABELS[-10:], minlength=10).tolist()
    assert 0 in counts
    assert [sum(row) for row in result["confusion_matrix"]] == counts
    assert len(figures) == 6
    # The legend has the colors of all classes, even of those that do not occur.
    legend = figures["latent_space.png"].legends[0]
    colors = {}
    for text, handle in zip(legend.get_texts(), legend.legend_handles):
        colors[text.get_text()] = handle.get_color()
    assert colors == {name: f"C{number}" for number, name in enumerate(data.CLASSES)}


def test_ten_training_images_are_enough(tmp_path, figures, latent_space):
    """With them, and two latent dimensions, samples are decoded from a grid of quantiles.

    The quantiles are those of N(0, 1), from 5 % to 95 %, in both dimensions.
    """
    run = tmp_path / "run"
    result = evaluate_few_images(run, hold_out=590, latent_dim=2)
    counts = torch.bincount(TRAIN_LABELS[-590:], minlength=10).tolist()
    assert [sum(row) for row in result["confusion_matrix"]] == counts
    assert len(figures) == 6
    quantiles = torch.tensor([NormalDist().inv_cdf(0.05 + 0.1 * number) for number in range(10)])
    with torch.no_grad():
        expected = load_run(run).model.decode(torch.cartesian_prod(quantiles, quantiles))
    torch.testing.assert_close(images_in(figures["samples.png"]), expected[:, 0])


def test_there_may_be_more_latent_dimensions_than_training_images(tmp_path, figures, latent_space):
    """But not more principal components, with which the baselines compare."""
    run = tmp_path / "run"
    evaluate_few_images(run, hold_out=590, latent_dim=11)
    assert len(figures) == 6
    message = fail("classify.py", run, "--baselines")
    assert "--baselines needs 11 principal components" in message
    assert "have only 10." in message


# --- Devices --------------------------------------------------------------------------------


class DropoutVAE(ConvVAE):
    """The report's network with a random layer, as a user may add one."""

    def __init__(self, latent_dim=32):
        super().__init__(latent_dim)
        self.dropout = nn.Dropout(0.2)

    def features(self, x):
        """Return the outputs of the three convolutions, with dropout after the last one."""
        h1, h2, h3 = super().features(x)
        return h1, h2, self.dropout(h3)


@pytest.fixture
def devices(monkeypatch):
    """Stand-ins for devices that are not here, as {name: function}.

    A function gets the loss and the gradients that the CPU computes, and returns those of the
    device, or raises an error. All devices in the dict are available.
    """
    devices = {}
    compute = train.loss_and_gradients

    def compute_on(model, images, device):
        values = compute(model, images, "cpu")
        return devices[device](values) if device != "cpu" else values

    def cuda_is_available():
        return "cuda" in devices

    def mps_is_available():
        return "mps" in devices

    monkeypatch.setattr(train, "loss_and_gradients", compute_on)
    monkeypatch.setattr(torch.cuda, "is_available", cuda_is_available)
    monkeypatch.setattr(torch.backends.mps, "is_available", mps_is_available)
    # Adam would ask for the GPU, which is not here. Other tests are about that.
    monkeypatch.setattr(train, "check_adam_on_cpu", Mock())
    return devices


def compute_the_same(values):
    """Return what the CPU computes."""
    return values


def compute_with_rounding(values):
    """Return what the CPU computes, up to 2 % of the norm."""
    return [value * 1.02 for value in values]


def run_out_of_memory(values):
    """Raise an error whose first sentence is enough."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate.")


def lack_a_kernel(values):
    """Raise an error with several lines."""
    raise RuntimeError("no kernel image\nis available")


def lack_cuda(values):
    """Raise the error of a PyTorch without CUDA."""
    raise AssertionError("not compiled with CUDA")


def compute_another_gradient(values):
    """Return a gradient of the last layer that differs by 20 %."""
    return [*values[:-1], values[-1] * 1.2]


def compute_another_loss(values):
    """Return a loss that differs by 20 %."""
    return [values[0] * 1.2, *values[1:]]


def compute_nan(values):
    """Return NaN as the gradient of the last layer."""
    return [*values[:-1], values[-1] * math.nan]


BROKEN_DEVICES = {
    run_out_of_memory: "CUDA out of memory",
    lack_a_kernel: "no kernel image",
    lack_cuda: "not compiled with CUDA",
    compute_another_gradient: "loss or gradients on cuda differ from those on the CPU",
    compute_another_loss: "loss or gradients on cuda differ from those on the CPU",
    compute_nan: "loss or gradients on cuda differ from those on the CPU",
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("broken", BROKEN_DEVICES)
def test_broken_device_is_not_used(broken, name, devices, capsys):
    """With --device auto, the next device is taken. A device asked for by name is an error."""
    problem = BROKEN_DEVICES[broken]
    model = MODELS[name](8)
    devices["cuda"] = broken
    assert train.choose_device("auto", model, TRAIN_IMAGES[:50]) == "cpu"
    assert capsys.readouterr().err == f"Warning: {problem}, so cuda is not used.\n"
    devices["mps"] = compute_with_rounding
    assert train.choose_device("auto", model, TRAIN_IMAGES[:50]) == "mps"
    assert capsys.readouterr().err == f"Warning: {problem}, so cuda is not used.\n"
    message = f"^--device cuda cannot be used: {problem}. Use --device cpu instead.$"
    with pytest.raises(data.UserError, match=message):
        train.choose_device("cuda", model, TRAIN_IMAGES[:50])


def test_devices_are_chosen_in_order(devices, capsys):
    model = ConvVAE(8)
    devices["mps"] = compute_the_same
    assert train.choose_device("auto", model, TRAIN_IMAGES[:50]) == "mps"
    devices["cuda"] = compute_with_rounding
    assert train.choose_device("auto", model, TRAIN_IMAGES[:50]) == "cuda"
    for name in ("cpu", "cuda", "mps"):
        assert train.choose_device(name, model, TRAIN_IMAGES[:50]) == name
    assert capsys.readouterr().err == ""


def test_train_py_checks_the_device_that_it_is_asked_for(devices, tmp_path, monkeypatch):
    devices["mps"] = lack_a_kernel
    message = fail("train.py", tmp_path / "run", device="mps")
    assert "--device mps cannot be used: no kernel image. Use --device cpu" in message
    choose_device = Mock(return_value="cpu")
    monkeypatch.setattr(train, "choose_device", choose_device)
    succeed("train.py", tmp_path / "run", epochs=1, device="auto", batch_size=600)
    asked, _, images = choose_device.call_args.args
    assert asked == "auto"
    assert torch.equal(images, TRAIN_IMAGES[:128])


@pytest.mark.parametrize("name", MODELS)
def test_checking_a_device_changes_neither_network_nor_random_state(name, devices):
    """No noise is drawn, and BatchNorm's running means stay as they were."""
    devices["cuda"] = compute_the_same
    model = MODELS[name](8).eval()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    assert train.choose_device("auto", model, TRAIN_IMAGES[:50]) == "cuda"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_device_is_used_unchecked_for_a_network_with_dropout(asked, devices, capsys):
    """Two passes through such a network differ even on the same device."""
    devices["cuda"] = compute_the_same
    assert train.choose_device(asked, DropoutVAE(8), TRAIN_IMAGES[:50]) == "cuda"
    warning = capsys.readouterr().err
    assert warning.startswith("Warning: the network has random layers, so we cannot check ")
    assert "cuda" in warning
    assert warning.endswith("cuda is used without this check.\n")
    assert warning.count("\n") == 1


def test_device_that_fails_is_not_used_for_a_network_with_dropout(devices, capsys):
    devices["cuda"] = lack_a_kernel
    assert train.choose_device("auto", DropoutVAE(8), TRAIN_IMAGES[:50]) == "cpu"
    assert "Warning: no kernel image, so cuda is not used.\n" in capsys.readouterr().err
    with pytest.raises(data.UserError, match="--device cuda cannot be used: no kernel image"):
        train.choose_device("cuda", DropoutVAE(8), TRAIN_IMAGES[:50])


def test_network_with_dropout_can_be_trained_and_loaded(tmp_path, monkeypatch, capsys):
    """Dropout is active in training, and has no effect on the latent means of the trained run."""
    monkeypatch.setitem(MODELS, "conv", DropoutVAE)
    run = tmp_path / "run"
    succeed("train.py", run, epochs=1, batch_size=600)
    assert capsys.readouterr().err == ""
    model = load_run(run).model
    latent_means = networks.latent_means(model, TEST_IMAGES)
    torch.testing.assert_close(networks.latent_means(model, TEST_IMAGES), latent_means)


def test_memory_format_is_contiguous_only_on_mps():
    """On mps, channels_last has given wrong gradients."""
    assert train.memory_format("mps") == torch.contiguous_format
    assert train.memory_format("cpu") == torch.channels_last
    assert train.memory_format("cuda") == torch.channels_last


def adam_works_on_the_cpu():
    """Return whether PyTorch's Adam can update a parameter on the CPU."""
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.ones(1)
    try:
        torch.optim.Adam([parameter]).step()
    except Exception:  # which one depends on the version of PyTorch
        return False
    return True


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_gpu_that_cannot_be_initialized_is_no_obstacle(device, tmp_path, monkeypatch, capsys):
    """Either the CPU is used or, where PyTorch itself fails, one line says how to hide the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", Mock(return_value=True))
    monkeypatch.setattr(torch.backends.mps, "is_available", Mock(return_value=False))
    run = tmp_path / "run"
    options = {"epochs": 1, "batch_size": 600, "device": device}
    if adam_works_on_the_cpu():
        succeed("train.py", run, **options)
        assert read_json(run / CONFIG)["device"] == "cpu"
    else:
        assert "CUDA_VISIBLE_DEVICES= python train.py" in fail("train.py", run, **options)
        assert contents(run) == {}
    warnings = capsys.readouterr().err
    if device == "auto":
        assert re.fullmatch("Warning: .*, so cuda is not used.\n", warnings)
    else:
        assert warnings == ""


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_gpu_that_breaks_adam_on_the_cpu_must_be_hidden(device, run, monkeypatch):
    """As with PyTorch 2.14, which asks the GPU for its state. Earlier versions do not."""
    error = RuntimeError("Found no NVIDIA driver on your system. Please check\nthat you have one.")
    before = contents(run)
    monkeypatch.setattr(torch.cuda, "is_available", Mock(return_value=False))
    monkeypatch.setattr(torch.backends.mps, "is_available", Mock(return_value=False))
    monkeypatch.setattr(torch.optim.Adam, "step", Mock(side_effect=error))
    message = fail("train.py", run, device=device)
    assert "(Found no NVIDIA driver on your system)" in message
    assert "CUDA_VISIBLE_DEVICES= python train.py" in message
    assert contents(run) == before


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
    """Three batches come first. Batches of another size are neither captured nor replayed."""
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
    for size in (3, 4, 4, 3, 4, 4, 4, 3, 4):
        batch = torch.rand(size, 2)
        batches.append(batch.clone())
        results.append(captured(batch))

    assert [len(images) for images, _ in calls] == [3, 4, 4, 3, 4, 4, 3]
    assert len(graphs) == 1
    assert graphs[0].replays == 3
    # A replay does not change what was returned before.
    torch.testing.assert_close(results, [sums_of(batch) for batch in batches])


def train_step_for(model, optimizer):
    """Return a function that trains a model on a batch, without feature matching."""

    def step(images):
        return train.train_step(
            model, optimizer, images, beta=1.0, feature_model=None, feature_weight=0.0
        )

    return step


@pytest.mark.parametrize("failing", ["CUDAGraph", "graph"])
def test_step_that_cannot_be_captured_is_used_uncaptured(failing, monkeypatch, capsys):
    """Training is the same as without capture, and one warning is printed."""
    error = RuntimeError("CUDA error: operation not permitted. Compile with\nTORCH_USE_CUDA_DSA.")
    failing_capture = Mock(side_effect=error)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, failing, failing_capture)
    rows = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = ConvVAE(8)
        step = train_step_for(model, train.make_optimizer(model, 1e-3, "cpu"))
        if captured:
            step = train.CapturedStep(step, batch_size=16)
        for _ in range(2):
            rows.append(train.train_epoch(step, TRAIN_IMAGES[:100], batch_size=16))
    assert rows[:2] == rows[2:]
    assert failing_capture.call_count == 1
    warning = capsys.readouterr().err
    assert warning.startswith("Warning: the training step cannot be captured as a CUDA graph ")
    assert "(CUDA error: operation not permitted)" in warning
    assert warning.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_step_trains_as_an_uncaptured_one():
    """In float64, rounding differences stay far below the tolerance.

    The step is captured in the first epoch. The learning rate changes before the second, and is 0
    in the last.
    """
    train.use_fast_kernels()
    images = TRAIN_IMAGES.double().cuda()
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = ConvVAE(8).double().to("cuda", memory_format=train.memory_format("cuda"))
        optimizer = train.make_optimizer(model, 1e-3, "cuda")
        step = train_step_for(model, optimizer)
        if captured:
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
        if captured:
            assert step.graph is not None
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=0)


# --- Classification and metrics -------------------------------------------------------------


@pytest.fixture
def figures_without_grids(figures, monkeypatch):
    """As `figures`, but grids of images, which take seconds, are not drawn.

    In place of such a figure stands what it would show, as (rows, row names, titles).
    """

    def content_of_grid(rows, row_names=(), titles=()):
        return rows, row_names, titles

    monkeypatch.setattr(plots, "draw_grid", content_of_grid)
    return figures


@pytest.fixture
def quick_figures(figures_without_grids, monkeypatch):
    """As `figures_without_grids`, but latent_space.png, which takes seconds too, is None."""

    def draw_nothing(mu, labels):
        return None

    monkeypatch.setattr(plots, "draw_latent_space", draw_nothing)
    return figures_without_grids


@pytest.fixture(scope="session")
def latent_means_by_hand(finished):
    """The latent means of the training and of the test images of the finished run.

    They are computed with the report's network, in float64.
    """
    model = ReportVAE(8).double()
    model.load_state_dict(torch.load(finished / WEIGHTS, weights_only=True))
    with torch.no_grad():
        _, train_mu, _ = model(TRAIN_IMAGES.double())
        _, test_mu, _ = model(TEST_IMAGES.double())
    return train_mu.float(), test_mu.float()


def predict_by_hand(train_features, test_features):
    """Return the classes that the report's Random Forest predicts for the test images."""
    forest = RandomForestClassifier(n_estimators=100, random_state=42)
    return forest.fit(train_features, TRAIN_LABELS).predict(test_features)


def accuracy_by_hand(train_features, test_features):
    """Return the accuracy of the report's Random Forest on the test images."""
    return (predict_by_hand(train_features, test_features) == TEST_LABELS.numpy()).mean()


def pixels(images):
    """Return the pixels of images as a NumPy array [N, 784] float64."""
    return images.reshape(-1, 784).double().numpy()


def mixture_by_hand(mu, n):
    """Return n codes drawn from a mixture of Gaussians fitted to mu [600, 8].

    600 latent means in 8 dimensions are enough for 12 Gaussians.
    """
    mixture = GaussianMixture(12, tol=0.03, random_state=42).fit(mu.double())
    z, _ = mixture.sample(n)
    return torch.tensor(z).float()


def use_dataset(run, root, train_split, test_split):
    """Make `run` a published run that was trained on this data set, and return --data for it."""
    write_dataset(root, dataset_files(train_split, test_split))
    publish(run)
    edit_json(run / CONFIG, data_sha256=data.read_dataset(root).sha256)
    return root


@pytest.fixture
def pandas_output():
    """Let scikit-learn return data frames, as a notebook may have asked.

    Without pandas, which these tests do not need, each estimator that obeys ends with an error.
    """
    before = sklearn.get_config()["transform_output"]
    sklearn.set_config(transform_output="pandas")
    yield
    sklearn.set_config(transform_output=before)


def test_latent_means_are_those_of_the_reports_network_in_float64(finished, latent_means_by_hand):
    _, test_mu = latent_means_by_hand
    model = load_run(finished).model
    assert torch.equal(networks.latent_means(model, TEST_IMAGES), test_mu)


def test_random_forest_on_latent_means_is_that_of_the_report(finished, latent_means_by_hand):
    result = read_json(finished / CLASSIFICATION)
    train_mu, test_mu = latent_means_by_hand
    matrix = np.zeros((10, 10), int)
    np.add.at(matrix, (TEST_LABELS.numpy(), predict_by_hand(train_mu, test_mu)), 1)
    # Otherwise this test would not notice if rows and columns were swapped.
    assert (matrix != matrix.T).any()
    assert 0.5 < result["accuracy"] < 0.99

    assert result["epoch"] == 2
    assert result["confusion_matrix"] == matrix.tolist()
    assert result["accuracy"] == matrix.trace() / 225
    images_per_class = [3 * (k + 3) for k in range(10)]
    recall = [matrix[k, k] / images_per_class[k] for k in range(10)]
    assert result["recall"] == dict(zip(data.CLASSES, recall))


def test_baselines_are_measured_without_the_network(finished):
    baselines = read_json(finished / CLASSIFICATION)["baselines"]
    train_pixels = pixels(TRAIN_IMAGES)
    test_pixels = pixels(TEST_IMAGES)
    pca = PCA(8, random_state=42).fit(train_pixels)
    pixels_accuracy = accuracy_by_hand(train_pixels, test_pixels)
    pca_accuracy = accuracy_by_hand(pca.transform(train_pixels), pca.transform(test_pixels))
    quality = classify.sample_quality(
        TRAIN_IMAGES[:225], TEST_IMAGES, PCA(50, random_state=42).fit(train_pixels)
    )
    assert set(baselines) == {"pixels", "pca", "training_images"}
    assert baselines["pixels"] == pytest.approx(pixels_accuracy, abs=1e-12)
    assert baselines["pca"] == pytest.approx(pca_accuracy, abs=1e-12)
    assert baselines["training_images"] == pytest.approx(quality, rel=1e-6)


def test_baselines_of_before_are_kept(run):
    before = contents(run)
    assert read_json(run / CLASSIFICATION)["baselines"]
    succeed("classify.py", run)
    assert contents(run) == before


def test_minimum_bce_is_the_entropy_of_the_pixels(finished):
    result = read_json(finished / CLASSIFICATION)
    for name, images in [("bce_floor", TEST_IMAGES), ("train_bce_floor", TRAIN_IMAGES)]:
        entropy = torch.special.entr(images).sum() + torch.special.entr(1 - images).sum()
        assert result[name] == pytest.approx(entropy.item() / len(images), rel=1e-4)


def test_active_dimensions_are_counted_in_test_images(run):
    model = load_run(run).model
    test_variance = networks.latent_means(model, TEST_IMAGES).var(dim=0)
    train_variance = networks.latent_means(model, TRAIN_IMAGES).var(dim=0)
    # With this scale, each dimension is active either in the test or in the training images.
    scale = (0.01 / (test_variance * train_variance).sqrt()).sqrt()

    def change(weights):
        weights["fc_mu.weight"] *= scale.unsqueeze(1)
        weights["fc_mu.bias"] *= scale

    publish(run, change)
    succeed("classify.py", run)
    active = (test_variance > train_variance).sum().item()
    assert active not in (0, 4, 8)
    assert read_json(run / CLASSIFICATION)["active_dimensions"] == active


def test_loss_log_saved_by_a_spreadsheet_can_be_read(run):
    """Spreadsheets put a byte order mark before the first column."""
    publish(run)
    log = load_run(run).log
    (run / LOG).write_bytes(b"\xef\xbb\xbf" + (run / LOG).read_bytes())
    assert load_run(run).log == log


def test_samples_of_both_kinds_are_compared_with_the_test_images(run, monkeypatch):
    measured = []

    def sample_quality(samples, images, pca):
        assert torch.equal(images, TEST_IMAGES)
        assert pca.n_components == 50
        measured.append(samples)
        number = len(measured)
        return {"frechet": number, "precision": 10 * number, "recall": 100 * number}

    monkeypatch.setattr(classify, "sample_quality", sample_quality)
    succeed("classify.py", run)
    result = read_json(run / CLASSIFICATION)
    expected = {
        "frechet_samples": 1,
        "precision_samples": 10,
        "recall_samples": 100,
        "frechet_mixture_samples": 2,
        "precision_mixture_samples": 20,
        "recall_mixture_samples": 200,
    }
    assert {name: result[name] for name in expected} == expected

    model = load_run(run).model
    with torch.no_grad():
        torch.manual_seed(0)
        # The reconstructions come first, and use random numbers too.
        model(TEST_IMAGES[:128])
        model(TEST_IMAGES[128:])
        samples = model.decode(torch.randn(225, 8))
        mixture_z = mixture_by_hand(networks.latent_means(model, TRAIN_IMAGES), 225)
        mixture_samples = model.decode(mixture_z)
    torch.testing.assert_close(measured, [samples, mixture_samples])


# Sample quality


def quality_of_points(points, reference):
    """Return frechet, precision and recall of points [M, 2] compared with reference [N, 2].

    The points are the first two pixels of images, and stand in for principal components.
    """

    def first_two_pixels(all_pixels):
        return all_pixels[:, :2].numpy()

    pca = SimpleNamespace(transform=first_two_pixels)
    samples = F.pad(torch.as_tensor(points), (0, 782)).view(-1, 1, 28, 28)
    images = F.pad(torch.as_tensor(reference), (0, 782)).view(-1, 1, 28, 28)
    return classify.sample_quality(samples, images, pca)


def normal_points(seed):
    """Return 300 points [300, 2] drawn from N(0, I)."""
    return torch.randn(300, 2, generator=torch.Generator().manual_seed(seed))


def test_sample_quality_of_the_images_themselves_is_perfect():
    points = normal_points(seed=1)
    perfect = {"frechet": 0, "precision": 1, "recall": 1}
    assert quality_of_points(points, points) == pytest.approx(perfect, abs=1e-9)


def test_frechet_distance_of_scaled_and_shifted_points():
    """If points are scaled by 2, the distance of the covariances is (2 - 1)² tr C."""
    points = normal_points(seed=1)
    shift = torch.tensor([1.0, 2.0])
    difference = points.double().mean(dim=0) + shift
    covariance = points.double().T.cov()
    distance = difference.square().sum() + covariance.trace()
    quality = quality_of_points(2 * points + shift, points)
    assert quality["frechet"] == pytest.approx(distance.item(), rel=1e-5)


def test_frechet_distance_of_two_gaussians_matches_its_definition():
    points = normal_points(seed=1).double()
    other = normal_points(seed=2).double() @ torch.tensor([[1.0, 2.0], [0.0, 0.5]]).double()
    difference = points.mean(dim=0) - other.mean(dim=0)
    covariance = points.T.cov()
    other_covariance = other.T.cov()
    # The trace of a matrix root is the sum of the roots of the eigenvalues.
    root_trace = torch.linalg.eigvals(covariance @ other_covariance).real.sqrt().sum()
    distance = difference.square().sum()
    distance += covariance.trace() + other_covariance.trace() - 2 * root_trace
    quality = quality_of_points(points, other)
    assert quality["frechet"] == pytest.approx(distance.item(), rel=1e-5)


def test_samples_far_from_all_images_have_no_precision_and_no_recall():
    points = normal_points(seed=1)
    quality = quality_of_points(points + 100, points)
    assert quality["precision"] == 0
    assert quality["recall"] == 0


def test_copies_of_one_image_have_full_precision_but_hardly_any_recall():
    points = normal_points(seed=1)
    quality = quality_of_points(points[:1].expand(300, 2), points)
    assert quality["precision"] == 1
    assert quality["recall"] == pytest.approx(1 / 300)


def test_recall_is_the_share_of_classes_that_samples_cover():
    centers = 50 * torch.arange(10).repeat_interleave(30).unsqueeze(1)
    ten_classes = centers + normal_points(seed=1)
    two_classes = ten_classes[:60] + 0.01
    quality = quality_of_points(two_classes, ten_classes)
    assert quality["precision"] == 1
    assert quality["recall"] == pytest.approx(0.2, abs=0.02)


def test_manifold_reaches_as_far_as_the_third_nearest_neighbor():
    # The third-nearest neighbors of these points are 3, 2, 2 and 3 away.
    line = [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]
    # The first and third of these are just within reach, the others are not.
    points = [[-3.0, 0.0], [-3.1, 0.0], [6.0, 0.0], [6.1, 0.0]]
    assert quality_of_points(points, line)["precision"] == 0.5
    assert quality_of_points(line, points)["recall"] == 0.5


# The mixture of Gaussians


class FirstPixels(nn.Module):
    """A network whose latent means are the first pixels of an image."""

    def __init__(self, latent_dim):
        super().__init__()
        self.latent_dim = latent_dim

    def encode(self, x):
        """Return the first pixels [N, latent_dim], and no log variances."""
        return x.flatten(1)[:, : self.latent_dim], None


@pytest.fixture
def mixture_fits(monkeypatch):
    """A list of all fitted mixtures, as pairs of the mixture and the points."""
    fits = []
    original_fit = GaussianMixture.fit

    def fit(mixture, points):
        fits.append((mixture, points))
        return original_fit(mixture, points)

    monkeypatch.setattr(GaussianMixture, "fit", fit)
    return fits


@pytest.mark.parametrize(
    "n, latent_dim, gaussians, covariance_type",
    [
        (599, 8, 12, "full"),
        (12_000, 2, 50, "full"),
        (40, 8, 1, "full"),
        (800, 128, 1, "full"),
        (700, 129, 50, "diag"),
    ],
)
def test_mixture_has_at_most_a_gaussian_for_six_means_per_dimension(
    n, latent_dim, gaussians, covariance_type, mixture_fits
):
    images = torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    z = networks.sample_mixture(FirstPixels(latent_dim), images, 5)
    mixture, mu = mixture_fits[0]
    assert mixture.n_components == gaussians
    assert mixture.covariance_type == covariance_type
    assert torch.equal(mu, images.flatten(1)[:10_000, :latent_dim].double())
    assert z.shape == (5, latent_dim)
    assert z.dtype == torch.float32


@pytest.mark.parametrize("latent_dim", [8, 129])
def test_mixture_of_equal_latent_means_has_one_gaussian(latent_dim, mixture_fits):
    images = torch.full((700, 1, 28, 28), 0.7)
    z = networks.sample_mixture(FirstPixels(latent_dim), images, 5)
    mixture, _ = mixture_fits[0]
    assert mixture.n_components == 1
    # scikit-learn adds 1e-6 to variances, so the standard deviation is 0.001.
    assert (z - 0.7).abs().max() < 0.01


def test_equal_latent_means_are_not_active():
    assert networks.active_dimensions(torch.full((40, 8), 0.7)) == 0


# Reconstructions


@pytest.fixture(scope="session")
def uniform_noise():
    """Images [500, 1, 28, 28] whose pixels are uniform noise."""
    return torch.rand(500, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def evaluate_reconstructions(reconstruct, images, monkeypatch):
    """Return the metrics of a network whose reconstructions come from a function.

    All its means are 1 and its variances 1. No samples are measured.
    """
    model = ConvVAE()

    def forward(x):
        return reconstruct(x), torch.ones(len(x), 32), torch.zeros(len(x), 32)

    def no_metrics(samples, images, pca):
        return {}

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(classify, "sample_quality", no_metrics)
    return classify.evaluate(model, images, mixture_z=torch.ones(9, 32), pca=None)


def entropy_per_image(images):
    """Return the entropy of gray pixels in nats per image, for pixels between 0 and 1."""
    entropy = -(images * images.log() + (1 - images) * (1 - images).log()).sum()
    return entropy.item() / len(images)


def test_metrics_of_perfect_reconstructions(uniform_noise, monkeypatch):
    def copy_image(x):
        return x

    metrics = evaluate_reconstructions(copy_image, uniform_noise, monkeypatch)
    entropy = entropy_per_image(uniform_noise)
    assert metrics["bce_floor"] == pytest.approx(entropy, rel=1e-4)
    assert metrics["bce"] == pytest.approx(entropy, rel=1e-4)
    assert metrics["excess_bce"] == 0
    assert metrics["mse"] == 0
    assert metrics["sharpness_reconstructions"] == 1
    assert metrics["kld"] == pytest.approx(16.0)  # mu² / 2 in each of 32 dimensions


def test_metrics_of_gray_reconstructions(uniform_noise, monkeypatch):
    def gray_image(x):
        return torch.full_like(x, 0.5)

    metrics = evaluate_reconstructions(gray_image, uniform_noise, monkeypatch)
    bce = 784 * math.log(2)
    assert metrics["bce"] == pytest.approx(bce, rel=1e-5)
    excess = bce - entropy_per_image(uniform_noise)
    assert metrics["excess_bce"] == pytest.approx(excess, rel=1e-4)
    assert metrics["mse"] == pytest.approx(1 / 12, rel=0.02)  # the variance of uniform noise
    assert metrics["sharpness_reconstructions"] == 0


def test_gradient_energy_of_an_edge_is_the_same_in_both_directions():
    image = torch.zeros(1, 1, 28, 28)
    image[..., :14] = 0.5
    energy = 28 * 0.5**2  # 28 pairs of neighbors differ by 0.5
    assert classify.gradient_energy(image) == energy
    assert classify.gradient_energy(image.mT) == energy
    assert classify.gradient_energy(torch.cat((image, image.mT, image))) == energy


# Unusual data and a notebook's configuration


def gray_images(count, levels):
    """Return `count` images [N, 28, 28] uint8, each of a single gray value, one of `levels`."""
    grays = 40 + torch.arange(count) % levels
    return grays.to(torch.uint8).view(-1, 1, 1).expand(-1, 28, 28).contiguous()


@pytest.mark.parametrize("levels", [1, 200], ids=["all equal", "each with its own gray"])
def test_blank_test_images_cannot_be_evaluated(levels, run, tmp_path):
    test_split = (gray_images(225, levels), TEST_LABELS)
    root = use_dataset(run, tmp_path / "data", TRAIN_SPLIT, test_split)
    before = contents(run)
    assert "The test images are blank" in fail("classify.py", run, data=root)
    assert contents(run) == before


@pytest.mark.parametrize("levels", [1, 200], ids=["all equal", "each with its own gray"])
def test_figures_of_blank_images_are_drawn(levels, run, tmp_path, quick_figures, monkeypatch):
    monkeypatch.setattr(plots, "active_dimensions", networks.active_dimensions)
    train_split = (gray_images(600, levels), TRAIN_LABELS)
    test_split = (gray_images(225, levels), TEST_LABELS)
    root = use_dataset(run, tmp_path / "data", train_split, test_split)
    succeed("plots.py", run, data=root)
    assert "reconstructions.png" in quick_figures
    assert "latent_space.png" not in quick_figures


def test_equal_textured_images_are_evaluated_and_drawn(run, tmp_path, quick_figures, monkeypatch):
    monkeypatch.setattr(plots, "active_dimensions", networks.active_dimensions)
    image = TRAIN_SPLIT[0][:1]
    train_split = (image.expand(600, 28, 28), TRAIN_LABELS)
    test_split = (image.expand(225, 28, 28), TEST_LABELS)
    root = use_dataset(run, tmp_path / "data", train_split, test_split)
    succeed("classify.py", run, "--baselines", data=root)
    result = read_json(run / CLASSIFICATION)
    # The same class is predicted for all images.
    columns = np.array(result["confusion_matrix"]).sum(axis=0)
    assert sorted(columns) == [0] * 9 + [225]
    assert result["active_dimensions"] == 0
    assert math.isfinite(result["frechet_samples"])
    succeed("plots.py", run, data=root)
    assert "reconstructions.png" in quick_figures
    assert "latent_space.png" not in quick_figures
    assert "confusion_matrix.png" in quick_figures


def test_classification_is_the_same_if_scikit_learn_is_to_return_data_frames(run, pandas_output):
    before = contents(run)
    (run / CLASSIFICATION).unlink()
    succeed("classify.py", run, "--baselines")
    assert contents(run) == before
    assert sklearn.get_config()["transform_output"] == "pandas"


# --- Figures of a run -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished_figures(finished):
    """The figures that plots.py draws for the finished run, as {file name: figure}."""
    saved = {}

    def save(run, name, figure):
        saved[name] = figure

    def one_active_dimension(mu):
        return 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", save)
        patch.setattr(plots, "active_dimensions", one_active_dimension)
        succeed("plots.py", finished)
    return saved


def first_image_of_each_class(classes=range(10)):
    """Return the first test image of each class, [C, 1, 28, 28]."""
    return torch.stack([TEST_IMAGES[TEST_LABELS.eq(label)][0] for label in classes])


def without_line_breaks(labels):
    """Return the texts of labels in one line each."""
    return [label.replace("\n", " ") for label in labels]


def points_of(axis):
    """Return the points [N, 2] of a scatter plot."""
    return axis.collections[0].get_offsets()


def test_loss_curves_show_both_terms_for_both_splits(finished, finished_figures):
    log = load_run(finished).log
    axes = finished_figures["loss_curves.png"].axes
    for axis, loss in zip(axes, ["loss", "bce", "kld"], strict=True):
        assert axis.get_title().lower().startswith(loss)
        for line, split, color in zip(axis.lines, ["train", "test"], ["C0", "C1"], strict=True):
            assert line.get_label() == split
            assert to_hex(line.get_color()) == to_hex(color)
            values = [[row["epoch"], row[f"{split}_{loss}"]] for row in log]
            assert line.get_xydata().tolist() == values


def test_loss_curves_leave_out_the_first_of_many_epochs(finished):
    first_row = load_run(finished).log[0]
    log = [{**first_row, "epoch": epoch} for epoch in (1, 2, 3)]
    for axis in plots.draw_losses(log).axes:
        for line in axis.lines:
            assert line.get_xdata().tolist() == [2, 3]


def test_latent_space_is_drawn_by_pca_and_by_tsne(finished, finished_figures):
    axes = finished_figures["latent_space.png"].axes
    for axis, name in zip(axes, ["PCA", "t-SNE"], strict=True):
        assert axis.get_title() == f"{name} of μ, 225 test images"
        colors = axis.collections[0].get_facecolors().tolist()
        assert colors == [list(to_rgba(f"C{label}")) for label in TEST_LABELS]
    mu = networks.latent_means(load_run(finished).model, TEST_IMAGES)
    # The sign of a principal component is arbitrary.
    expected = np.abs(PCA(2).fit_transform(mu))
    assert np.allclose(np.abs(points_of(axes[0])), expected, atol=1e-3)
    # t-SNE keeps neighborhoods, which a wrong order of the points would destroy.
    assert trustworthiness(mu, points_of(axes[1])) > 0.9


def test_confusion_matrix_is_that_of_classification_json(finished, finished_figures):
    result = read_json(finished / CLASSIFICATION)
    axis = finished_figures["confusion_matrix.png"].axes[0]
    assert axis.images[0].get_array().tolist() == result["confusion_matrix"]
    assert len(axis.texts) == 100
    for text in axis.texts:
        column, row = text.get_position()
        assert int(text.get_text()) == result["confusion_matrix"][row][column]
    assert [label.get_text() for label in axis.get_xticklabels()] == data.CLASSES
    assert [label.get_text() for label in axis.get_yticklabels()] == data.CLASSES
    assert axis.get_xlabel() == "Predicted label"
    assert axis.get_ylabel() == "True label"
    assert f"epoch 2: {result['accuracy'] * 100:.2f} %" in axis.get_title()


def test_reconstructions_are_those_of_the_first_image_of_each_class(finished, finished_figures):
    figure = finished_figures["reconstructions.png"]
    images = first_image_of_each_class()
    model = load_run(finished).model
    with torch.no_grad():
        torch.manual_seed(0)
        reconstructions, _, _ = model(images)
    torch.testing.assert_close(images_in(figure), torch.cat((images, reconstructions))[:, 0])
    assert [axis.get_title() for axis in figure.axes[:10]] == data.CLASSES
    row_names = [axis.get_ylabel() for axis in figure.axes[::10]]
    assert row_names == ["original", "reconstruction"]


def test_gray_values_are_not_rescaled(finished_figures):
    for name in ["reconstructions.png", "samples.png", "interpolations.png"]:
        for axis in finished_figures[name].axes:
            assert axis.images[0].get_clim() == (0, 1)


def test_row_names_of_a_grid_are_wrapped():
    name = "ConvVAE, 8 latent dimensions, 2 epochs"
    figure = plots.draw_grid([TEST_IMAGES[:3], TEST_IMAGES[3:6]], ["original", name])
    labels = [axis.get_ylabel() for axis in figure.axes[::3]]
    assert without_line_breaks(labels) == ["original", name]
    assert max(len(line) for line in labels[1].splitlines()) <= 14


def test_samples_come_from_the_prior_and_from_a_mixture(finished, finished_figures):
    figure = finished_figures["samples.png"]
    model = load_run(finished).model
    mixture_z = mixture_by_hand(networks.latent_means(model, TRAIN_IMAGES), 50)
    with torch.no_grad():
        torch.manual_seed(0)
        samples = model.decode(torch.cat((torch.randn(50, 8), mixture_z)))
    torch.testing.assert_close(images_in(figure), samples[:, 0])
    row_names = [axis.get_ylabel() for axis in figure.axes[::10]]
    assert row_names == ["N(0, I)", "", "", "", "", "mixture", "", "", "", ""]


def interpolation_by_hand(model, first, second):
    """Return the row of interpolations.png for two images [1, 28, 28], [12, 28, 28]."""
    first_mu, second_mu = networks.latent_means(model, torch.stack((first, second)))
    row = [first]
    for step in range(10):
        z = first_mu + step / 9 * (second_mu - first_mu)
        with torch.no_grad():
            row.append(model.decode(z.unsqueeze(0))[0])
    row.append(second)
    return torch.cat(row)


def test_interpolations_follow_straight_lines_between_latent_means(finished, finished_figures):
    figure = finished_figures["interpolations.png"]
    model = load_run(finished).model
    images = first_image_of_each_class()
    rows = []
    for first in (0, 2, 4, 6, 8):
        rows.append(interpolation_by_hand(model, images[first], images[first + 1]))
    torch.testing.assert_close(images_in(figure), torch.cat(rows))
    titles = [axis.get_title() for axis in figure.axes[:12]]
    assert titles == ["original", *[""] * 10, "original"]


def only_classes(split, classes):
    """Return the images and labels of some classes of a split."""
    images, labels = split
    chosen = torch.isin(labels, torch.tensor(classes))
    return images[chosen], labels[chosen]


def test_interpolations_of_an_odd_number_of_classes_leave_out_the_last(
    run, tmp_path, quick_figures
):
    classes = [1, 4, 7]
    root = use_dataset(run, tmp_path / "data", TRAIN_SPLIT, only_classes(TEST_SPLIT, classes))
    succeed("plots.py", run, data=root)
    images = first_image_of_each_class(classes)
    rows, _, _ = quick_figures["interpolations.png"]
    expected = interpolation_by_hand(load_run(run).model, images[0], images[1])
    torch.testing.assert_close(torch.cat(rows)[:, 0], expected)


def test_figures_of_some_classes_name_these_classes(run, tmp_path, quick_figures):
    classes = [1, 4, 7]
    root = use_dataset(run, tmp_path / "data", TRAIN_SPLIT, only_classes(TEST_SPLIT, classes))
    succeed("plots.py", run, data=root)
    rows, _, titles = quick_figures["reconstructions.png"]
    assert torch.equal(rows[0], first_image_of_each_class(classes))
    assert titles == ["Trouser", "Coat", "Sneaker"]


def test_interpolations_of_a_single_class_are_not_drawn(run, tmp_path, quick_figures):
    root = use_dataset(run, tmp_path / "data", TRAIN_SPLIT, only_classes(TEST_SPLIT, [4]))
    succeed("plots.py", run, data=root)
    assert "interpolations.png" not in quick_figures
    assert len(quick_figures) == 5


def test_collapsed_latent_dimensions_are_reported(run, quick_figures, capsys, monkeypatch):
    monkeypatch.setattr(plots, "active_dimensions", networks.active_dimensions)

    def collapse(weights):
        weights["fc_mu.weight"].zero_()
        weights["fc_mu.bias"].zero_()

    publish(run, collapse)
    succeed("classify.py", run)
    assert "Warning: all latent dimensions have collapsed" in capsys.readouterr().err
    succeed("plots.py", run)
    warning = "Warning: all latent dimensions have collapsed, so latent_space.png is not drawn.\n"
    assert capsys.readouterr().err == warning
    assert "latent_space.png" not in quick_figures
    assert len(quick_figures) == 5


def test_figures_are_the_same_if_scikit_learn_is_to_return_data_frames(
    finished, finished_figures, figures_without_grids, pandas_output, monkeypatch
):
    def quick_tsne(**options):
        return TSNE(max_iter=250, **options)

    monkeypatch.setattr(plots, "TSNE", quick_tsne)
    succeed("plots.py", finished)
    assert set(figures_without_grids) == set(finished_figures)
    pca_axis, tsne_axis = figures_without_grids["latent_space.png"].axes
    pca_points = points_of(finished_figures["latent_space.png"].axes[0])
    assert np.allclose(points_of(pca_axis), pca_points)
    assert points_of(tsne_axis).shape == (225, 2)
    rows, _, _ = figures_without_grids["samples.png"]
    samples = images_in(finished_figures["samples.png"])
    assert torch.equal(torch.cat(rows)[:, 0], samples)
    assert sklearn.get_config()["transform_output"] == "pandas"


def test_plots_has_no_option_compare_any_more(finished, capsys):
    assert call("plots.py", "--run", finished, "--compare", finished) == (2, "")
    assert "unrecognized arguments: --compare" in capsys.readouterr().err


@pytest.mark.parametrize("backend", [None, "module://nowhere"])
def test_importing_plots_leaves_the_backend_of_a_notebook_alone(backend, tmp_path):
    (tmp_path / "matplotlibrc").write_text("backend: svg\n")
    environment = {**os.environ, "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    environment.pop("MPLBACKEND", None)
    if backend:
        environment["MPLBACKEND"] = backend
    code = (
        "import os, plots, matplotlib\n"
        "print(os.environ.get('MPLBACKEND'), matplotlib.rcParams['backend'])"
    )
    output = subprocess.check_output(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, text=True
    )
    assert output.split() == [str(backend), backend or "svg"]


# Which classification.json belongs to a run


def draw(run, figures, capsys):
    """Draw the figures of a run. Return the warnings, and whether the confusion matrix is drawn."""
    capsys.readouterr()
    figures.clear()
    succeed("plots.py", run)
    is_drawn = "confusion_matrix.png" in figures
    assert len(figures) == (6 if is_drawn else 5)
    return capsys.readouterr().err, is_drawn


def change_weights(weights):
    """Change a single weight of ConvVAE, by as little as a longer training might."""
    weights["fc_mu.bias"][0] += 1e-6


def test_classification_of_the_same_weights_in_another_format_is_drawn(run, quick_figures, capsys):
    (run / STATE).unlink()
    weights = torch.load(run / WEIGHTS, weights_only=True)
    before = (run / WEIGHTS).read_bytes()
    torch.save(weights, run / WEIGHTS, _use_new_zipfile_serialization=False)
    assert (run / WEIGHTS).read_bytes() != before
    assert draw(run, quick_figures, capsys) == ("", True)


def test_classification_of_other_weights_is_not_drawn(run, quick_figures, capsys):
    publish(run, change_weights)
    warning, is_drawn = draw(run, quick_figures, capsys)
    assert warning == (
        f"Warning: {run / CLASSIFICATION} belongs to other weights. "
        f"To evaluate the run: python classify.py --run {run}\n"
    )
    assert not is_drawn


def test_classification_of_another_epoch_is_not_drawn(run, quick_figures, capsys):
    # Without a hash, only the number of epochs can tell.
    edit_json(run / CLASSIFICATION, epoch=1, sha256=None)
    warning, is_drawn = draw(run, quick_figures, capsys)
    assert warning == (
        f"Warning: {run / CLASSIFICATION} belongs to epoch 1, but the run has 2 epochs. "
        f"To evaluate the run: python classify.py --run {run}\n"
    )
    assert not is_drawn


def test_classification_without_a_hash_is_drawn(run, quick_figures, capsys):
    """The first published runs have no hash in their classification.json."""
    publish(run, change_weights)
    edit_json(run / CLASSIFICATION, sha256=None)
    assert draw(run, quick_figures, capsys) == ("", True)


def test_classification_of_a_run_without_weights_is_compared_by_its_epoch(run, capsys):
    publish(run)
    (run / WEIGHTS).unlink()
    result = networks.current_classification(networks.read_run(run))
    assert result == read_json(run / CLASSIFICATION)
    edit_json(run / CLASSIFICATION, epoch=1)
    assert networks.current_classification(networks.read_run(run)) is None
    assert "belongs to epoch 1" in capsys.readouterr().err


@pytest.mark.parametrize("is_missing", [True, False], ids=["missing", "damaged"])
def test_missing_or_damaged_classification_is_not_drawn(
    is_missing, run, tmp_path, quick_figures, capsys
):
    run = run.rename(tmp_path / "a run's folder")  # a name that a shell needs in quotes
    if is_missing:
        (run / CLASSIFICATION).unlink()
    else:
        damage_file(run / CLASSIFICATION, first_half)
    warning, is_drawn = draw(run, quick_figures, capsys)
    assert not is_drawn
    problem, _, command = warning.partition(" To evaluate the run: ")
    assert problem == f"Warning: {run / CLASSIFICATION} is missing or damaged."
    assert shlex.split(command) == ["python", "classify.py", "--run", str(run)]


def test_damaged_classification_is_replaced(run, quick_figures, capsys):
    damage_file(run / CLASSIFICATION, first_half)
    succeed("classify.py", run)
    assert read_json(run / CLASSIFICATION)["baselines"] is None
    assert draw(run, quick_figures, capsys) == ("", True)


@pytest.mark.parametrize("entry", ["epoch", "accuracy", "confusion_matrix"])
@pytest.mark.parametrize(
    "value",
    ["0", None, math.nan, [1], 10**400, ["abcdefghij"] * 10, [[0.5] * 10] * 10],
    ids=["text", "null", "NaN", "list", "huge", "texts", "fractions"],
)
def test_impossible_entries_of_a_classification_count_as_damage(entry, value, run):
    path = run / CLASSIFICATION
    assert networks.read_classification(path)["epoch"] == 2
    edit_json(path, **{entry: value})
    assert networks.read_classification(path) is None


@pytest.mark.parametrize(
    "damage",
    [b"{}", b"[]", b"", b"\xff", b"[" * 99_999, replacing(b"[\n  [", b"[[], [")],
    ids=["no entries", "list", "empty", "not UTF-8", "deep", "ragged matrix"],
)
def test_damaged_classification_counts_as_missing(damage, run):
    damage_file(run / CLASSIFICATION, damage)
    assert networks.read_classification(run / CLASSIFICATION) is None


def test_hash_of_another_type_counts_as_damage(run):
    edit_json(run / CLASSIFICATION, sha256=[])
    assert networks.read_classification(run / CLASSIFICATION) is None


# --- The scripts as a user runs them --------------------------------------------------------


@pytest.fixture(scope="session")
def user_run(tmp_path_factory):
    """A run for which the scripts were called as a user calls them, in processes of their own.

    The encoding is one of Windows that has no μ. There are train.py, plots.py with the user's own
    matplotlib configuration, classify.py, and plots.py as in a notebook. `run` is the folder,
    `outputs` are the lines on standard output, `warnings` is the text on standard error, and
    `pictures` are the PNG files at that time, {name: content}, each a list with an entry per call.
    """
    folder = tmp_path_factory.mktemp("user")
    run = folder / "table" / "any" / "seed0"
    (folder / "matplotlibrc").write_text("text.usetex: True\nfigure.facecolor: red\n")
    own_configuration = {
        "MPLBACKEND": "nowhere",
        "MATPLOTLIBRC": str(folder / "matplotlibrc"),
    }
    training = {"epochs": 3, "model": "fc", "latent_dim": 32, "lr": 0.002, "beta": 0}
    results = SimpleNamespace(run=run, outputs=[], warnings=[], pictures=[])
    for script, options, variables in [
        ("train.py", training, {}),
        ("plots.py", {}, own_configuration),
        ("classify.py", {}, {}),
        ("plots.py", {}, {"MPLBACKEND": "module://nowhere"}),
    ]:
        process = subprocess.run(
            [sys.executable, ROOT / script, *command_options(run, **options)],
            check=True,
            capture_output=True,
            encoding="utf-8",
            cwd=folder,
            env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", **variables},
        )
        results.outputs.append(process.stdout.splitlines())
        results.warnings.append(process.stderr)
        pictures = {path.name: path.read_bytes() for path in run.glob("*.png")}
        results.pictures.append(pictures)
    return results


def description_of(user_run):
    """Return the line by which scripts describe the run."""
    return (
        f"{user_run.run}: Fully connected VAE, batch size 32, learning rate 0.002, β = 0, "
        "epoch 3 of 3"
    )


def test_the_only_warning_is_that_of_the_missing_classification(user_run):
    train_warnings, first_plots_warnings, classify_warnings, plots_warnings = user_run.warnings
    assert train_warnings == ""
    assert first_plots_warnings.startswith("Warning: ")
    assert first_plots_warnings.endswith(f"python classify.py --run {user_run.run}\n")
    assert first_plots_warnings.count("\n") == 1
    assert classify_warnings == ""
    assert plots_warnings == ""


def test_plots_prints_the_run_the_data_and_the_files(user_run):
    names = [
        "loss_curves.png",
        "reconstructions.png",
        "samples.png",
        "interpolations.png",
        "latent_space.png",
        "confusion_matrix.png",
    ]
    assert user_run.outputs[3] == [
        description_of(user_run),
        f"{SMALL_DATA_LINE} (not Fashion-MNIST)",
        *[str(user_run.run / name) for name in names],
    ]
    assert sorted(user_run.pictures[3]) == sorted(names)


def test_figures_depend_neither_on_the_backend_nor_on_the_users_configuration(user_run):
    with_own_configuration = user_run.pictures[1]
    in_a_notebook = dict(user_run.pictures[3])
    assert "latent_space.png" in with_own_configuration
    del in_a_notebook["confusion_matrix.png"]  # classify.py ran in between
    assert with_own_configuration == in_a_notebook


def test_figures_are_not_empty(user_run):
    for content in user_run.pictures[3].values():
        picture = matplotlib.image.imread(io.BytesIO(content))
        assert min(picture.shape[:2]) > 250
        assert picture[..., :3].std() > 0.05


def test_classify_prints_the_confusion_matrix_and_all_metrics(user_run):
    result = read_json(user_run.run / CLASSIFICATION)
    lines = user_run.outputs[2]
    assert lines[0] == description_of(user_run)
    assert f"Classification accuracy: {result['accuracy'] * 100:.2f}%" in lines
    words_of_lines = [line.split() for line in lines]
    for name, counts in zip(data.CLASSES, result["confusion_matrix"]):
        row = f"{name} {' '.join(map(str, counts))} {result['recall'][name] * 100:.1f}% correct"
        assert row.split() in words_of_lines
    for name in ["bce", "kld", "mse", "sharpness_reconstructions", "active_dimensions"]:
        assert f"{name}: {result[name]:.4g}" in lines


# --- Tables and pages -----------------------------------------------------------------------


@pytest.fixture
def results_folder(run, tmp_path):
    """A folder of runs: two seeds of one variant, one run of another, and one outdated."""
    log = networks.read_run(run).log
    log[0].update(train_loss=400.0)
    log[1].update(train_loss=300.0, test_loss=310.5)
    (run / STATE).unlink()
    data.write_bytes(run / LOG, train.log_bytes(log))
    classification = {
        "epoch": 2,
        "confusion_matrix": [[0] * 10] * 10,
        "excess_bce": 25,
        "kld": 15,
        "mse": 0.01,
        "sharpness_reconstructions": 0.5,
        "active_dimensions": 7,
    }
    training_images = {"frechet": 0.06, "precision": 0.85, "recall": 0.86}
    baselines = {"pixels": 0.75, "pca": 0.25, "training_images": training_images}
    folder = tmp_path / "results"

    def add_run(name, options, measured):
        shutil.copytree(run, folder / name)
        edit_json(folder / name / CONFIG, epochs=100, **options)
        content = data.json_bytes({**classification, **measured})
        data.write_bytes(folder / name / CLASSIFICATION, content)

    add_run("variant/seed0", {"batch_size": 128}, {"accuracy": 0.5, "frechet_samples": 1.5})
    add_run("variant/seed1", {"batch_size": 128, "seed": 1}, {"accuracy": 0.6})
    other_options = {"lr": 0.1, "hold_out": 100}
    add_run("other/seed0", other_options, {"mse": 0.02, "accuracy": 0.4, "baselines": baselines})
    add_run("outdated/seed0", {}, {"epoch": 1, "accuracy": 0.9})
    return folder


def table_cells(text):
    """Return the tables in a text in Markdown, each as a list of rows of cells."""
    tables = []
    for block in text.replace("\u00a0", " ").strip().split("\n\n"):
        rows = []
        for line in block.split("\n"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        tables.append(rows)
    return tables


def test_tables_show_mean_and_standard_deviation_over_the_seeds(results_folder, capsys):
    capsys.readouterr()
    losses, reconstructions, samples = table_cells(summary.tables(results_folder))
    assert "outdated" in capsys.readouterr().err
    variant = "ConvVAE, 2 of 100 epochs"
    other = "ConvVAE, batch size 32, learning rate 0.1, validation split of 100, 2 of 100 epochs"
    first_columns = ["Network", "Dimensions", "n"]
    assert losses == [
        [*first_columns, "Train loss, epoch 1", "Train loss", "Test loss", "Test − train"]
        + ["BCE − minimum", "KLD"],
        ["---"] * 9,
        [variant, "8", "2", "400.0 ± 0.0", "300.00 ± 0.00", "310.50 ± 0.00", "10.50 ± 0.00"]
        + ["25.00 ± 0.00", "15.00 ± 0.00"],
        [other, "8", "1", "400.0", "300.00", "310.50", "10.50", "25.00", "15.00"],
    ]
    assert reconstructions == [
        [*first_columns, "MSE × 1000", "Sharpness", "Active dimensions", "Accuracy, %"],
        ["---"] * 7,
        [variant, "8", "2", "10.00 ± 0.00", "0.500 ± 0.000", "7.0 ± 0.0", "55.00 ± 7.07"],
        [other, "8", "1", "20.00", "0.500", "7.0", "40.00"],
        ["PCA, validation split of 100", "8", "1", "", "", "", "25.00"],
        ["Pixels, validation split of 100", "784", "1", "", "", "", "75.00"],
    ]
    assert samples == [
        [*first_columns, "Fréchet", "Precision", "Recall", "Fréchet, mixture"]
        + ["Precision, mixture", "Recall, mixture"],
        ["---"] * 9,
        [variant, "8", "2", "1.50 (n = 1)", "", "", "", "", ""],
        [
            "Training images, validation split of 100",
            "784",
            "1",
            "0.06",
            "0.85",
            "0.86",
            "",
            "",
            "",
        ],
    ]


def test_two_runs_of_a_row_with_the_same_seed_are_refused(results_folder):
    copied = results_folder / "variant" / "seed2"
    shutil.copytree(results_folder / "variant" / "seed1", copied)
    with pytest.raises(data.UserError, match="same seed, 1") as raised:
        summary.tables(results_folder)
    assert str(copied) in str(raised.value)
    edit_json(copied / CONFIG, seed=2)
    assert "| 8 | 3 |" in summary.tables(results_folder)


@pytest.mark.parametrize("name", ["data_sha256", "feature_sha256"])
def test_two_runs_of_a_row_with_different_data_or_features_are_refused(name, results_folder):
    edit_json(results_folder / "variant" / "seed1" / CONFIG, **{name: "of something else"})
    with pytest.raises(data.UserError, match=f"different {name}"):
        summary.tables(results_folder)


def test_a_folder_without_evaluated_runs_is_an_error(tmp_path):
    with pytest.raises(data.UserError, match="no evaluated runs"):
        summary.tables(tmp_path)


def test_a_difference_counts_only_if_the_ranges_do_not_overlap():
    reference = [1.0, 2.0, 3.0]
    assert summary.difference([0.1, 0.9], reference) == "lower"
    assert summary.difference([3.1, 4.0], reference) == "higher"
    assert summary.difference([0.1, 1.0], reference) == "–"
    assert summary.difference([3.0, 9.0], reference) == "–"
    assert summary.difference([0.1, 9.0], reference) == "–"
    assert summary.difference([], reference) == ""
    assert summary.difference([1.0], []) == ""


def test_random_forests_on_pixels_are_measured_for_ten_random_states(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    summary.measure_pixels(SMALL_DATA)
    accuracies = read_json(tmp_path / "pixels.json")
    train_pixels = TRAIN_IMAGES.flatten(1).double()
    forest = RandomForestClassifier(n_estimators=100, random_state=7)
    forest.fit(train_pixels, TRAIN_LABELS)
    assert accuracies["7"] == forest.score(TEST_IMAGES.flatten(1).double(), TEST_LABELS)
    assert list(accuracies) == [str(state) for state in range(10)]


def test_deviations_from_the_report_are_measured_as_described(finished, monkeypatch):
    """Stand-ins for the Random Forests record on how many images each is fitted and measured."""
    monkeypatch.setattr(deviations, "load_run", lambda path: load_run(finished))
    fitted = []

    class StandIn:
        """Takes the place of a Random Forest."""

        def __init__(self, **options):
            self.options = options

        def fit(self, features, labels):
            self.features = features
            return self

        def score(self, features, labels):
            assert len(features) == len(labels)
            fitted.append((len(self.features), len(features), self.options))
            return len(fitted)

    def fit_stand_in(features, labels):
        return StandIn().fit(features, labels)

    def no_features(model, images):
        return torch.zeros(len(images), 1)

    monkeypatch.setattr(deviations, "latent_means", no_features)
    monkeypatch.setattr(deviations, "sampled_codes", no_features)
    monkeypatch.setattr(deviations, "fit_forest", fit_stand_in)
    monkeypatch.setattr(deviations, "RandomForestClassifier", StandIn)
    many_train_images = TRAIN_IMAGES.repeat(60, 1, 1, 1)
    many_test_images = TEST_IMAGES.repeat(40, 1, 1, 1)
    accuracies = deviations.measure_other_forests(
        (many_train_images, TRAIN_LABELS.repeat(60)), (many_test_images, TEST_LABELS.repeat(40))
    )
    assert list(accuracies.values()) == list(range(1, 10))
    counts = [(first, second) for first, second, _ in fitted]
    expected = [(36_000, 9_000)] * 2
    expected += [(number, 9_000) for number in (6_000, 10_000, 20_000, 30_000)]
    expected += [(8_000, 1_000), (36_000, 9_000), (36_000, 9_000)]
    assert counts == expected
    assert fitted[7][2] == {"n_estimators": 10, "random_state": 42, "n_jobs": -1}
    assert fitted[8][2]["max_depth"] == 10 and fitted[8][2]["n_estimators"] == 100


def test_short_trainings_are_measured_after_the_named_epochs(finished, monkeypatch):
    commands = []

    def record(command, check):
        commands.append(command)

    monkeypatch.setattr(deviations.subprocess, "run", record)
    monkeypatch.setattr(deviations, "load_run", lambda path: load_run(finished))
    accuracies = deviations.measure_short_trainings(
        SMALL_DATA, (TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)
    )
    assert [command[-1] for command in commands] == ["1", "2", "3", "5", "10", "20"]
    assert all("--latent-dim 16 --seed 20" in " ".join(command) for command in commands)
    classification = read_json(finished / CLASSIFICATION)
    assert set(accuracies.values()) == {classification["accuracy"]}


def test_sampled_codes_are_drawn_around_the_latent_means(finished):
    model = load_run(finished).model
    torch.manual_seed(0)
    codes = deviations.sampled_codes(model, TEST_IMAGES)
    with torch.no_grad():
        mu, logvar = model.encode(TEST_IMAGES)
    noise = (codes - mu) / (logvar / 2).exp()
    assert noise.mean().abs() < 0.1
    assert noise.std().item() == pytest.approx(1, abs=0.1)


@pytest.fixture(scope="module")
def pages():
    """The front page and the page of results, as text without non-breaking spaces."""
    texts = []
    for path in (ROOT / "README.md", ROOT / "results" / "README.md"):
        texts.append(path.read_text(encoding="utf-8").replace("\u00a0", " "))
    return texts


@pytest.fixture(scope="module")
def printed_by_summary():
    """What results/summary.py prints for the committed runs, and for those of the search."""
    texts = [
        summary.tables(ROOT / "results"),
        summary.tables(ROOT / "results" / "search"),
        summary.differences_table(),
        summary.page_numbers(),
    ]
    return [text.replace("\u00a0", " ") for text in texts]


def test_the_tables_of_the_pages_are_those_of_the_runs(pages, printed_by_summary):
    _, results_page = pages
    tables, search_tables, differences, _ = printed_by_summary
    for table in [*tables.split("\n\n"), *search_tables.split("\n\n"), differences]:
        assert table.strip() in results_page
    for description, accuracy in read_json(ROOT / "results" / "deviations.json").items():
        assert f"| {description} | {100 * accuracy:.2f} |" in results_page


def test_the_numbers_of_the_pages_are_those_of_the_runs(pages, printed_by_summary):
    """A "mean ± standard deviation" is one of the runs or of a timing. A percentage with two
    decimals is an accuracy of the runs or of the report."""
    known = "\n".join(printed_by_summary)
    timings = (ROOT / "results" / "speed.txt").read_text(encoding="utf-8")
    mean_and_sd = r"\d+\.\d+ ± \d+\.\d+"
    known_means = re.findall(mean_and_sd, known) + re.findall(mean_and_sd, timings)
    two_decimals = r"\d+\.\d\d"
    known_numbers = re.findall(two_decimals, known)
    for page in pages:
        found_means = re.findall(mean_and_sd, page)
        assert len(found_means) > 10
        assert set(found_means) <= set(known_means)
        percentages = re.findall(rf"{two_decimals}(?=(?: (?:and|to|±) {two_decimals})? %)", page)
        assert set(percentages) <= {"84.01", *known_numbers}


def test_the_python_blocks_of_the_readme_run(pages, tmp_path):
    """In a folder with the committed results, a small data set and a picture."""
    front_page, _ = pages
    blocks = re.findall(r"```python\n(.*?)```", front_page, flags=re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "results").symlink_to(ROOT / "results")
    write_dataset(tmp_path / "data" / "fashion-mnist", dataset_files())
    picture = np.full((40, 30, 3), 200, np.uint8)
    matplotlib.image.imsave(tmp_path / "picture.png", picture)
    checks = """
assert mu.shape == (225, 32) and reconstructions.shape == samples.shape == (10, 1, 28, 28)
assert numpy.load("latent_means.npz")["mu"].shape == (225, 32)
assert own_mu.shape == (1, 32) and abs(pixels.max() - 200 / 255) < 1e-6
assert torch.is_grad_enabled()
"""
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks) + checks],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
