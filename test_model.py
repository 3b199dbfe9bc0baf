"""Tests of the whole project. They need neither the network nor the data set."""

import argparse
import copy
import csv
import errno
import gzip
import hashlib
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
from functools import partial
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_hex, to_rgba
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import classify
import data
import model as networks
import plots
import train
from model import MODELS, ConvVAE, latent_means, load_model
from results import summary
from results.speed import ReportVAE, report_loss

HERE = Path(__file__).parent
SCRIPTS = {"train.py": train, "classify.py": classify, "plots.py": plots}
VIEWS = (data.CONFIG, data.WEIGHTS, data.LOG)
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs may ignore it
torch.set_num_threads(1)  # threads wait for each other on a busy machine
os.environ["OMP_NUM_THREADS"] = "1"

# --- A tiny data set in the real format, and scripts as functions ---------------------------


def idx(array):  # the format of the MNIST family
    header = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    return header + array.to(torch.uint8).numpy().tobytes()


def tiny_images(share, seed):
    """Return noisy grey images, uint8, in which a bright square's place tells the class. There are
    `share` × (k + 3) of class k. A third of 4 look like 7 and of 9 like 2."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(10).repeat_interleave(share * torch.arange(3, 13))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(0, 60, (len(labels), 28, 28), generator=generator)
    for image, label, deceit in zip(images, labels, torch.rand(len(labels), generator=generator)):
        place = {4: 7, 9: 2}.get(label.item(), label.item()) if deceit < 1 / 3 else label.item()
        row, column = divmod(place, 4)
        image[2 + 8 * row :, 2 + 6 * column :][:7, :6] += 180
    return images.to(torch.uint8), labels


TRAIN, TEST = tiny_images(8, seed=1), tiny_images(3, seed=2)  # 600 and 225 of them
TRAIN_X, TEST_X = TRAIN[0][:, None] / 255, TEST[0][:, None] / 255


def raw_files(train_split=TRAIN, test_split=TEST):
    """Return {file name: content} of a data set."""
    splits = {"train": train_split, "t10k": test_split}
    images = {f"{name}-images-idx3-ubyte": idx(split[0]) for name, split in splits.items()}
    return images | {f"{name}-labels-idx1-ubyte": idx(split[1]) for name, split in splits.items()}


def write_data(root, files):
    raw = Path(root) / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return root


FOLDER = tempfile.TemporaryDirectory()
TINY = write_data(Path(FOLDER.name), raw_files())
SOURCE = f"600 training and 225 test images from {TINY / 'FashionMNIST' / 'raw'}"
UNKNOWN = " (Remark: they are not Fashion-MNIST's.)"
REAL_SHA256 = data.SHA256
data.SHA256 = hashlib.sha256(b"".join(x.byte().numpy() for x in (*TRAIN, *TEST))).hexdigest()


def options_of(run, **options):
    """Return the options of a script; those of a short training if it has `epochs`."""
    options = {"run": run, "data": TINY, **options}
    if "epochs" in options:
        options = {"batch_size": 32, "latent_dim": 8, "device": "cpu", **options}
    return [str(x) for name in options for x in (f"--{name.replace('_', '-')}", options[name])]


def call(script, *options):
    """Run a script in this process; return its exit code and, if it failed, its last word."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, options)])
        try:
            data.run_script(SCRIPTS[script].main, "told")
        except SystemExit as end:
            return (1, end.code + "\n") if isinstance(end.code, str) else (end.code, "")
    return 0, ""


def succeed(script, run, *flags, **options):
    assert call(script, *options_of(run, **options), *flags) == (0, "")


def fail(script, run, *flags, **options):
    """Run a script that must fail, train.py for a third epoch; return the one line that it says."""
    options = {"epochs": 3, **options} if script == "train.py" else options
    code, message = call(script, *options_of(run, **options), *flags)
    assert code and message.count("\n") == 1, message
    return message


def start(script, run, **options):
    """Start a script in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, HERE / script, *options_of(run, **options)], **pipes)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finished"
    succeed("train.py", run, epochs=2)
    succeed("classify.py", run, "--baselines")
    return run


@pytest.fixture(scope="session")
def three_epochs(tmp_path_factory):
    run = tmp_path_factory.mktemp("three") / "run"
    succeed("train.py", run, epochs=3)
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def figures(monkeypatch):
    """What plots.py saves, {name: figure}, in place of files."""
    figures = {}
    monkeypatch.setattr(plots, "save", lambda run, name, figure: figures.update({name: figure}))
    monkeypatch.setattr(plots, "active_dimensions", lambda mu: 1)  # so short a training has none
    return figures


def shown(figure):
    """Return the images that a figure shows, one after the other."""
    return torch.stack([torch.tensor(axis.images[0].get_array()) for axis in figure.axes])


def contents(folder):
    """Return {file name: content}, so that a change anywhere shows."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**read_json(path), **changes}), encoding="utf-8")


def edit_tensors(path, change):
    """Change what torch.save put into a file, in place."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def spoil(path, damage):
    """Change a file by a function of its content, or put other content into it."""
    path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)


def half(content):
    return content[: len(content) // 2]


def swap(old, new):
    return lambda content: content.replace(old, new)


def publish(run, change=lambda weights: None):
    """Make of a run one without state.pth, whose weights were changed."""
    (run / data.STATE).unlink(missing_ok=True)
    edit_tensors(run / data.WEIGHTS, change)


def log_of(run):
    """Return the loss log as the text it is, but for the one column that may differ."""
    text = (run / data.LOG).read_text(encoding="utf-8")
    return [{**row, "seconds": None} for row in csv.DictReader(io.StringIO(text))]


def assert_same_training(run, other):
    assert log_of(run) == log_of(other)
    weights, others = (torch.load(r / data.WEIGHTS, weights_only=True) for r in (run, other))
    torch.testing.assert_close(weights, others, rtol=0, atol=0)


# --- The networks, their loss and the data -------------------------------------------------


def test_weights_go_both_ways_with_the_report():
    ours, theirs, back = ConvVAE(16), ReportVAE(16), ReportVAE(16)
    ours.load_state_dict(theirs.state_dict())
    back.load_state_dict(ours.to(memory_format=torch.channels_last).state_dict())
    x, outputs = torch.rand(5, 1, 28, 28), []
    for model in (ours, theirs, back):
        torch.manual_seed(1)
        outputs.append(model(x))
    torch.testing.assert_close(outputs[1:], [outputs[0]] * 2, rtol=1e-5, atol=1e-6)
    assert sum(parameter.numel() for parameter in ConvVAE().parameters()) == 440_833


def test_the_fully_connected_network_by_hand():
    model, x = MODELS["fc"](7), torch.rand(3, 1, 28, 28)
    sizes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    assert sizes == [(400, 784), (7, 400), (7, 400), (400, 7), (784, 400)]
    torch.manual_seed(1)
    recon, mu, logvar = model(x)
    torch.manual_seed(1)
    h = model.fc_enc(x.reshape(3, 784)).relu()
    z = mu + (logvar / 2).exp() * torch.randn(3, 7)
    picture = model.fc_out(model.fc_dec(z).relu()).sigmoid().reshape(3, 1, 28, 28)
    torch.testing.assert_close((recon, mu, logvar), (picture, model.fc_mu(h), model.fc_log(h)))


def test_loss_by_hand():
    x = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    recon_x = torch.tensor([[0.5, 0.5], [0.5, 0.75]])
    mu, logvar = torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2)
    # log 2 for three of the pixels; −(¼ log ¾ + ¾ log ¼) for the last; ½ μ² for the KLD.
    loss = 3 * 0.6931472 + 0.25 * 0.2876821 + 0.75 * 1.3862944 + 2
    assert networks.loss_function(recon_x, x, mu, logvar).item() == pytest.approx(loss, rel=1e-6)
    recon_x[0, 0] = torch.nan
    assert networks.loss_function(recon_x, x, mu, logvar).isnan()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_transposed_convolution_keeps_the_process_wide_flag(before, channels, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", before)
    layer, x = networks.TransposedConv2d(4, channels, 4, 2, 1), torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), nn.ConvTranspose2d.forward(layer, x))
    assert torch.backends.mkldnn.enabled is before


def test_data_is_read_where_it_lies(tmp_path, monkeypatch, capsys):
    """Each place, and in it each form of the files, goes before those that came until then. The
    first place that has any file must have all: it is never filled from another."""
    root = tmp_path / "root"
    monkeypatch.setattr(data, "DEBIAN_PACKAGE", tmp_path / "package")
    forms = {(".idx", ".gz"): 40, ("-idx", ".gz"): 50, (".idx", ""): 60, ("-idx", ""): 225}
    for place in (tmp_path / "package", root, root / "FashionMNIST" / "raw"):
        place.mkdir(parents=True)
        (place / "t10k-labels.idx1-ubyte.gz").write_bytes(b"damaged")
        message = fail("train.py", tmp_path / "run", data=root)
        assert f"{place} has some files of the data set, but not train-images-idx3-ubyte" in message
        for (infix, suffix), number in forms.items():
            test_split = [part[:number] for part in TEST]
            for name, content in raw_files(TRAIN, test_split).items():
                path = place / f"{name.replace('-idx', infix)}{suffix}"
                path.write_bytes(gzip.compress(content) if suffix else content)
            before = contents(place)
            for (x, y), split in zip(data.load_splits(root), (TRAIN, test_split), strict=True):
                assert x.dtype == torch.float32 and torch.equal(x, split[0][:, None] / 255)
                assert y.dtype == torch.int64 and torch.equal(y, split[1])
            assert contents(place) == before
            told = f"600 training and {number} test images from {place}"
            told += "\n" if number == 225 else f"{UNKNOWN}\n"
            assert capsys.readouterr() == (told, "")


@pytest.mark.skipif(not data.DEBIAN_PACKAGE.exists(), reason="needs Debian's package")
def test_the_real_data_is_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "SHA256", REAL_SHA256)
    (images, _), _ = data.load_splits(tmp_path)
    told = f"60,000 training and 10,000 test images from {data.DEBIAN_PACKAGE}\n"
    assert capsys.readouterr() == (told, "")
    assert images.mean().item() == pytest.approx(0.2860, abs=5e-5)


def test_a_download_is_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    """Also through a link, into an empty folder, and where another script has been faster."""
    monkeypatch.setattr(data, "DEBIAN_PACKAGE", tmp_path / "absent")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "empty" / "FashionMNIST" / "raw").mkdir(parents=True)
    failures = [ConnectionResetError("a\nb"), RuntimeError("chunk"), ValueError(), OSError(28)]

    def fetch(staging, download):
        if failures:
            (Path(staging) / "FashionMNIST" / "raw").mkdir(parents=True)
            raise failures.pop()
        faster = tmp_path / "faster" in Path(staging).parents
        if faster:
            write_data(tmp_path / "faster", raw_files())
        write_data(staging, raw_files(TRAIN, TRAIN if faster else TEST))

    monkeypatch.setattr(data, "FashionMNIST", fetch)
    fail_there = partial(fail, "train.py", tmp_path / "run", data=tmp_path / "data")
    while failures:
        message = fail_there()
        assert "apt-get install" in message and str(tmp_path / "data") in message
        assert "Downloading" in capsys.readouterr().err
        assert not any((tmp_path / "data" / "FashionMNIST").iterdir())
    for name in ("link", "empty", "faster"):
        data.load_splits(tmp_path / name)
        raw = tmp_path / name / "FashionMNIST" / "raw"  # whose digest is known
        assert capsys.readouterr().out == f"600 training and 225 test images from {raw}\n"
        assert [*raw.parent.iterdir()] == [raw]
    (tmp_path / "data" / "FashionMNIST" / "raw" / "other").mkdir(parents=True)
    assert "move them away" in fail_there() and "Downloading" not in capsys.readouterr().err
    assert contents(tmp_path / "run") == {}


SPOILED_IMAGES = [half, lambda content: content + b"0", swap(b"\0\0\x08\3", b"\0\0\x0d\3")]
SPOILED_IMAGES += [lambda content: gzip.compress(content)[:-30], bytes(range(256)) * 40, b""]
SPOILED_IMAGES += [b"\0\0\x08\xff" + bytes(99)]
SPOILED_IMAGES += [idx(torch.zeros(10, 5, 5)), idx(torch.zeros(0, 28, 28))]
SPOILED_LABELS = [idx(torch.zeros(3)), idx(torch.full((600,), 77)), b"", b"\0\0\x08\0\x07"]
SPOILED_DATA = [("images-idx3", damage) for damage in SPOILED_IMAGES]
SPOILED_DATA += [("labels-idx1", damage) for damage in SPOILED_LABELS]


@pytest.mark.parametrize("split", ["train", "t10k"])
@pytest.mark.parametrize("kind, damage", SPOILED_DATA)
def test_spoiled_data(split, kind, damage, tmp_path):
    root = write_data(tmp_path / "data", raw_files(TRAIN, TRAIN))
    spoil(root / "FashionMNIST" / "raw" / f"{split}-{kind}-ubyte", damage)
    message = fail("train.py", tmp_path / "run", data=root)
    assert f"{split}-" in message and "delete" not in message and len(message) < 400
    assert contents(tmp_path / "run") == {}


# --- Training, and going on: state.pth is the truth -----------------------------------------


def test_the_defaults_are_the_report_s(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = vars(train.parse_arguments())
    expected = {"epochs": 100, "batch_size": 128, "lr": 5e-4, "latent_dim": 32, "model": "conv"}
    expected |= {"beta": 1.0, "lr_scheduler": "constant", "hold_out": 0, "feature_weight": 0.0}
    expected |= {"run": Path("runs/convvae"), "data": Path("data/fashion-mnist"), "device": "auto"}
    assert {name: args[name] for name in expected} == expected
    monkeypatch.chdir(tmp_path)
    assert all(call(script, "--help") == (0, "") for script in SCRIPTS)
    assert all(str(args["run"]) in call(script)[1] for script in ("classify.py", "plots.py"))


@pytest.mark.parametrize("beta, scheduler", [(1.0, "constant"), (0.25, "cosine")])
def test_training_is_the_report_s(beta, scheduler, tmp_path):
    """Two epochs against a plain loop over the report's layers, with the same random draws."""
    run, seed, lr = tmp_path / "run", 3, 2e-3
    settings = {"seed": seed, "lr": lr, "beta": beta, "lr_scheduler": scheduler}
    succeed("train.py", run, epochs=2, batch_size=64, **settings)
    torch.manual_seed(seed)
    model = ReportVAE(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    rows = data.read_run(run).log
    for epoch, row in enumerate(rows, start=1):
        torch.manual_seed(seed * 1_000_003 + epoch)
        cosine = (1 + math.cos(math.pi * (epoch - 1) / 2)) / 2
        rate = optimizer.param_groups[0]["lr"] = lr * cosine if scheduler == "cosine" else lr
        losses = {"train": 0.0}
        for batch in torch.randperm(600).split(64):
            optimizer.zero_grad()
            x = TRAIN_X[batch]
            recon, mu, logvar = model(x)
            loss = report_loss(recon, x, mu, logvar)
            bce = F.binary_cross_entropy(recon, x, reduction="sum")
            (bce + beta * (loss - bce)).backward()
            optimizer.step()
            losses["train"] += loss.item() / 600
        with torch.no_grad():
            recon, mu, logvar = model(TEST_X)
            losses["test"] = report_loss(recon, TEST_X, mu, logvar).item() / 225
            bce = F.binary_cross_entropy(recon, TEST_X, reduction="sum").item() / 225
        assert row["epoch"] == epoch and row["lr"] == pytest.approx(rate, rel=1e-12)
        assert row["test_bce"] == pytest.approx(bce, rel=1e-4)
        for split, loss in losses.items():
            assert row[f"{split}_loss"] == pytest.approx(loss, rel=1e-4)
            assert row[f"{split}_loss"] == row[f"{split}_bce"] + row[f"{split}_kld"]
    weights = torch.load(run / data.WEIGHTS, map_location="cpu")
    assert all(tensor.is_contiguous() for tensor in weights.values()) and len(rows) == 2
    for name, tensor in model.state_dict().items():
        assert (weights[name] - tensor).norm() < 0.01 * tensor.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_step_is_the_step_itself():
    train.tune()
    images, losses = torch.rand(20 * 32 + 7, 1, 28, 28, device="cuda"), []
    for capture in (False, True):
        torch.manual_seed(0)
        model, lr = ConvVAE().cuda(), torch.tensor(1e-3, device="cuda")
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True, capturable=True)
        plain = partial(train.update, model, optimizer, 1.0, None, 0.0)
        step = train.CapturedStep(plain, 32) if capture else plain
        terms = [step(x) for _ in range(3) for x in images.split(32)]
        losses.append(torch.stack(terms).cpu())
        before = model.fc_mu.weight.clone()
        # As a schedule changes it; a step that was captured must heed it too.
        optimizer.param_groups[0]["lr"].fill_(0)
        step(images[:32])
        assert torch.equal(model.fc_mu.weight, before)
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)


def test_what_training_says_and_writes(tmp_path, capsys, monkeypatch):
    run, clock = tmp_path / "run", iter(range(0, 10**6, 60))
    monkeypatch.setattr(train.time, "perf_counter", partial(next, clock))
    succeed("train.py", run, epochs=2, model="fc")
    source, first, *lines = capsys.readouterr().out.splitlines()
    assert source == SOURCE and first == "FullyConnectedVAE on cpu, epochs 1 to 2"
    rows = data.read_run(run).log
    for row, line, left in zip(rows, lines, ("0:03:00", "0:00:00"), strict=True):
        losses = f"Train loss {row['train_loss']:.2f}, Test loss {row['test_loss']:.2f}"
        assert line == f"Epoch {row['epoch']}: {losses}, 180.00 s, {left} left"
    assert not torch.backends.cudnn.allow_tf32
    config = {name: option["default"] for name, option in data.SETTINGS.items()}
    config |= {"model": "fc", "latent_dim": 8, "batch_size": 32, "epochs": 2}
    config |= {"feature_sha256": None, "torch": str(torch.__version__), "device": "cpu"}
    assert read_json(run / data.CONFIG) == config
    assert set(contents(run)) == {data.STATE, *VIEWS}
    # On a terminal, also how far an epoch is.
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    batches, clear = torch.arange(500).split(200), f"\r{'':40}\r"
    train.run_epoch("train", lambda x: x.sum(0), torch.ones(500, 2), batches)
    steps = [f"{clear}train: {done} of 500" for done in (200, 400, 500)]
    assert capsys.readouterr().out == "".join(steps) + clear


def test_going_on_heeds_the_settings(run, three_epochs, monkeypatch, capsys):
    """Also one, `weight`, that is newer than the run. Only the epochs may become more."""
    before, tables = contents(run), summary.tables(HERE / "results")
    for fewer in (1, 2):
        succeed("train.py", run, epochs=fewer)
        assert "finished: 2 epochs" in capsys.readouterr().out and contents(run) == before
    option = {"type": data.between(float, 0, 9), "default": 1.0, "help": "new"}
    monkeypatch.setitem(data.SETTINGS, "weight", option)
    assert summary.tables(HERE / "results") == tables
    others = {"latent_dim": (16, 8), "batch_size": (64, 32), "lr": (0.1, 5e-4), "seed": (1, 0)}
    others |= {"model": ("fc", "conv"), "weight": (2.0, 1.0)}
    for name, (value, there) in others.items():
        message = fail("train.py", run, **{name: value})
        assert f"has {name} {there}, not {value}:" in message and contents(run) == before
    succeed("train.py", run, epochs=3)
    assert "epochs 3 to 3" in capsys.readouterr().out
    assert_same_training(run, three_epochs)
    assert read_json(run / data.CONFIG)["epochs"] == 3
    assert data.read_run(run).settings["weight"] == 1.0


# The renames of an epoch are those of the state, the settings, the weights and the log.
KILLED = [(renames, {}) for renames in (0, 1, 2, 3, 4, 5, 7, 8)]
KILLED += [(5, {"lr_scheduler": "cosine"}), (5, {"lr_scheduler": "plateau"})]
KILLED += [(5, {"model": "deep"}), (5, {"hold_out": 100}), (5, {"feature_weight": 0.1})]


@pytest.mark.parametrize("renames, proposed", KILLED)
def test_killed_between_two_files(
    renames, proposed, finished, three_epochs, tmp_path, monkeypatch, capsys
):
    run, whole, options = tmp_path / "run", three_epochs, {"epochs": 3, **proposed}
    options |= {"feature_run": finished} if "feature_weight" in proposed else {}
    impatient = partial(ReduceLROnPlateau, patience=0, threshold=0.9)
    monkeypatch.setattr(train, "ReduceLROnPlateau", impatient)
    if proposed:
        whole = tmp_path / "whole"
        succeed("train.py", whole, **options)
        assert log_of(whole) != log_of(three_epochs)
    with monkeypatch.context() as patch:
        effects = [DEFAULT] * renames + [KeyboardInterrupt]
        patch.setattr(os, "replace", Mock(wraps=os.replace, side_effect=effects))
        assert call("train.py", *options_of(run, **options)) == (130, "")
    if renames:  # a run can be read whatever its views are like
        assert len(data.read_run(run).log) == (renames + 3) // 4
    succeed("train.py", run, **options)
    assert_same_training(run, whole)
    assert contents(run).keys() == contents(whole).keys()
    if proposed:
        capsys.readouterr()
        succeed("train.py", run, **options)
        cosine = "cosine" in proposed.values()  # all its rates were for three epochs
        assert ("more --epochs" in capsys.readouterr().out) is not cosine
        before, options["epochs"] = contents(run), 4
        if cosine:
            assert "has epochs 3, not 4" in fail("train.py", run, **options)
            assert contents(run) == before
        else:
            succeed("train.py", run, **options)


@pytest.mark.parametrize("sent", ["SIGKILL", "SIGINT"])
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_interrupted_within_an_epoch(sent, tmp_path):
    run, slow = tmp_path / "run", {"batch_size": 8, "latent_dim": 4, "epochs": 3}
    with start("train.py", run, **slow) as process:
        while "Epoch 1:" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(getattr(signal, sent))
        errors = process.communicate()[1]
    told = "Interrupted: the same command goes on after the last finished epoch.\n"
    expected = (130, told) if sent == "SIGINT" else (-signal.SIGKILL, "")
    assert (process.returncode, errors) == expected
    assert len(data.read_run(run).log) < 3
    succeed("train.py", run, **slow)
    assert len(data.read_run(run).log) == 3


def test_two_at_once(tmp_path):
    """Two processes on one new run: one goes on as if alone, the other stops in one line."""
    run, slow = tmp_path / "run", {"batch_size": 8, "epochs": 4}
    processes = [start("train.py", run, seed=seed, **slow) for seed in (1, 2)]
    errors = [process.communicate()[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 1]
    winner, loser = codes.index(0), codes.index(1)
    assert errors[winner] == "" and errors[loser].count("\n") == 1 and str(run) in errors[loser]
    succeed("train.py", tmp_path / "alone", seed=winner + 1, **slow)
    assert_same_training(run, tmp_path / "alone")
    assert set(contents(run)) == {data.STATE, *VIEWS}


def test_the_writer_looks_before_it_writes(run, three_epochs):
    settings = data.read_run(run).settings
    for folder in (run, run / "new"):
        writer = train.Writer(folder, settings)
        shutil.copy(three_epochs / data.STATE, folder)
        before, optimizer = contents(folder), torch.optim.Adam([torch.zeros(1)])
        with pytest.raises(data.UserError, match="another train.py"):
            writer.save({}, nn.Linear(1, 1), optimizer, [])
        assert contents(folder) == before


@pytest.mark.parametrize("damage", [None, b"", b"damaged", b"{}"])
@pytest.mark.parametrize("view", VIEWS)
def test_readers_read_the_state_and_views_come_back(view, damage, run):
    before = contents(run)
    (run / view).unlink() if damage is None else (run / view).write_bytes(damage)
    succeed("classify.py", run)
    succeed("train.py", run, epochs=2)
    assert contents(run) == before


def test_a_view_that_is_held_is_a_remark(three_epochs, tmp_path, monkeypatch, capsys):
    run, replace, slept = tmp_path / "run", os.replace, []
    held = {data.LOG: 10**6, data.STATE: 2}  # times that each refuses to be replaced

    def refuse(source, target):
        name = Path(target).name
        if held.get(name, 0) > 0:
            held[name] -= 1
            raise PermissionError(errno.EACCES, "held", target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(data.time, "sleep", slept.append)
    succeed("train.py", run, epochs=3)
    remark = f"Remark: {run / data.LOG} cannot be written: held; {data.STATE} has it.\n"
    assert capsys.readouterr().err == remark
    assert 0 < sum(slept[2:]) / 3 < 2 and set(contents(run)) == {data.STATE, *VIEWS} - {data.LOG}
    held.clear()
    succeed("train.py", run, epochs=3)
    assert_same_training(run, three_epochs)
    held[data.STATE] = 10**6
    assert "held" in fail("train.py", run, epochs=4)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_file_systems_without_fsync(number, run, monkeypatch):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(number, "refused")))
    if number == errno.EIO:
        assert f"{data.STATE} cannot be written: refused" in fail("train.py", run)
    else:
        succeed("train.py", run, epochs=3)
    assert set(contents(run)) == {data.STATE, *VIEWS, data.CLASSIFICATION}


FAILING = [OSError(errno.ESTALE, "stale"), OSError(errno.EMFILE, "too many"), MemoryError("memory")]
FAILING += [RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", FAILING, ids=repr)
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_fails_for_a_passing_reason_is_no_damage(script, error, run, monkeypatch):
    place = (Path, "read_bytes") if isinstance(error, OSError) else (torch, "load")
    with monkeypatch.context() as patch:
        patch.setattr(*place, Mock(side_effect=error))
        message = fail(script, run)
    assert re.search("stale|too many|memory", message) and str(run / data.STATE) in message
    assert "damaged" not in message and "delete" not in message
    succeed("train.py", run, epochs=2)


@pytest.mark.parametrize("files", [*([name] for name in VIEWS), [data.CLASSIFICATION], VIEWS])
def test_a_run_without_a_state_is_left_alone(files, run):
    for name in contents(run).keys() - {*files}:
        (run / name).unlink()
    before = contents(run)
    message = fail("train.py", run)
    assert f"no {data.STATE}" in message and "--run runs/anew --latent-dim 8" in message
    assert contents(run) == before


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    """The last good epoch stays. An overflow is provoked by weights, as no setting may change."""
    edit_tensors(run / data.STATE, lambda state: state["model"]["fc_log.bias"].fill_(1000.0))
    message = fail("train.py", run)
    assert "not finite in epoch 3" in message and "another --run" in message
    assert [row["epoch"] for row in data.read_run(run).log] == [1, 2]
    new = tmp_path / "new"
    assert "not finite in epoch 1" in fail("train.py", new, epochs=1, lr=1000)
    succeed("train.py", new, epochs=1, lr=0.001)


def test_moments_of_a_run_that_began_elsewhere(run, three_epochs):
    """Fused Adam heeds no strides, so their order in memory must become the weights'."""
    state = torch.load(run / data.STATE, weights_only=True)
    assert not state["optimizer"][2]["exp_avg"].is_contiguous()  # as channels_last is
    for moments in state["optimizer"].values():
        moments.update({name: tensor.contiguous() for name, tensor in moments.items()})
    torch.save(state, run / data.STATE)
    succeed("train.py", run, epochs=3)
    assert_same_training(run, three_epochs)
    moments = state["optimizer"]
    flat = {**moments, 3: {**moments[3], "exp_avg": torch.zeros(1)}}
    turned = {**moments, 6: {**moments[6], "exp_avg": moments[6]["exp_avg"].mT}}
    steps = {**moments, 3: {**moments[3], "step": torch.zeros(5)}}
    reverse = {17 - number: moment for number, moment in moments.items()}
    for damaged in (None, {**moments, 3: {}}, flat, turned, steps, reverse):
        torch.save({**state, "optimizer": damaged}, run / data.STATE)
        assert "moments" in fail("train.py", run, epochs=4)


# --- What the report proposes ---------------------------------------------------------------


def test_learning_rates():
    def rate(scheduler, epochs, rows, beta=1.0):
        options = {"lr_scheduler": scheduler, "lr": 1.0, "epochs": epochs, "beta": beta}
        return train.learning_rate(argparse.Namespace(**options), rows)

    rows = [{"train_bce": 9.0, "train_kld": 0.1 * k, "test_loss": -k} for k in range(30)]
    rates = [rate("cosine", 4, rows[:done]) for done in range(4)]
    assert rates == pytest.approx([(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])
    # The first epoch is the best; ten without progress are borne, also if the test loss falls.
    assert rate("plateau", 99, rows[:11]) == 1.0
    assert rate("plateau", 99, rows[:12]) == pytest.approx(0.1)
    falling = [{**row, "train_bce": row["train_bce"] - 0.05 * k} for k, row in enumerate(rows)]
    assert rate("plateau", 99, falling[:12]) == pytest.approx(0.1)
    assert rate("plateau", 99, falling, beta=0.1) == 1.0  # what is minimised falls
    assert rate("constant", 4, rows) == 1.0


def test_feature_matching_is_part_of_what_is_minimised(finished):
    features, encoder = train.load_encoder(finished)[0], ReportVAE(8)
    model, x = ConvVAE(8), TRAIN_X[:32]
    encoder.load_state_dict(torch.load(finished / data.WEIGHTS, weights_only=True))
    torch.manual_seed(1)
    recon, mu, logvar = model(x)
    loss, h, target = report_loss(recon, x, mu, logvar), recon, x
    for layer in (encoder.enc1, encoder.enc2, encoder.enc3):
        h, target = layer(h).relu(), layer(target).relu()
        loss = loss + 0.3 * (h - target).square().sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train.update(model, optimizer, 1.0, features, 0.3, x)
    found = tuple(p.grad for p in model.parameters())
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-3)


def test_the_run_whose_features_are_matched(finished, run, tmp_path):
    new, others = tmp_path / "new", {"feature_weight": 1, "feature_run": run}
    assert "no run in" in fail("train.py", new, **{**others, "feature_run": new})
    for option, value in others.items():
        assert call("train.py", *options_of(new, epochs=1, **{option: value}))[0] == 2
    assert not new.exists()
    succeed("train.py", new, epochs=1, **others)
    succeed("train.py", new, epochs=2, **{**others, "feature_run": finished})  # the same encoder
    succeed("train.py", run, epochs=3)  # which makes it another one
    assert "has feature_sha256" in fail("train.py", new, **others)


def test_the_deep_network_is_trained_and_then_left_alone(tmp_path, monkeypatch):
    """And computes what it should, here layer by layer."""
    seen, loss_terms = [], train.loss_terms

    def spy(model, x):
        seen.append((model.training, torch.is_grad_enabled()))
        return loss_terms(model, x)

    monkeypatch.setattr(train, "loss_terms", spy)
    succeed("train.py", tmp_path / "run", epochs=1, model="deep", batch_size=600)
    assert seen == [(True, True), (False, False)]
    model, h = load_model(data.read_run(tmp_path / "run")), TEST_X
    running = [name for name in model.state_dict() if "running" in name]
    assert len(running) == 14 and model.enc[0][1].running_mean.abs().sum() > 0
    alone = latent_means(model, TEST_X[:1])
    assert torch.equal(latent_means(model, TEST_X)[:1], alone)
    for layer, norm, _ in model.enc:
        h = F.leaky_relu(norm(layer(h)), 0.2)
    mu = model.encode(TEST_X)[0]
    torch.testing.assert_close(mu, model.fc_mu(h.flatten(1)))
    h = F.leaky_relu(model.fc_dec(mu), 0.2).view(-1, 256, 3, 3)
    for layer, norm, _ in model.dec[:-1]:
        h = F.leaky_relu(norm(layer(h)), 0.2)
    torch.testing.assert_close(model.decode(mu), model.dec[-1](h).sigmoid())
    assert sum(p.numel() for p in MODELS["deep"]().parameters()) == 1_144_193
    assert [h.shape[1] for h in model.features(TEST_X)] == [32, 64, 128, 256]


def test_hold_out(tmp_path, figures):
    """As if the last training images were the test set, and those before them all there are."""
    splits = [[part[:-100] for part in TRAIN], [part[-100:] for part in TRAIN]]
    root, drawn = write_data(tmp_path / "data", raw_files(*splits)), []
    run, other = tmp_path / "run", tmp_path / "other"
    for path, folder, held in ((run, TINY, 100), (other, root, 0)):
        succeed("train.py", path, data=folder, epochs=1, hold_out=held)
        succeed("classify.py", path, "--baselines", data=folder)
        succeed("plots.py", path, data=folder)
        drawn.append([shown(figures[f"{name}.png"]) for name in ("samples", "reconstructions")])
    assert_same_training(run, other)
    assert contents(run)[data.CLASSIFICATION] == contents(other)[data.CLASSIFICATION]
    torch.testing.assert_close(*drawn)
    few = write_data(tmp_path / "few", raw_files(TRAIN, [part[:9] for part in TEST]))
    assert "9 test images" in fail("train.py", tmp_path / "part", data=few)
    for held in (9, 591, 700):
        message = fail("train.py", tmp_path / "part", hold_out=held)
        found = f"{max(600 - held, 0)} training and {min(held, 600)} test images"
        assert f"--hold-out {held} gives {found}" in message


@pytest.mark.parametrize("held, latent_dim", [(10, 1), (590, 2), (590, 11)])
def test_few_images_and_few_dimensions(held, latent_dim, tmp_path, figures):
    """Parts without an image of some class, and codes in which PCA and t-SNE find little."""
    run = tmp_path / "run"
    succeed("train.py", run, epochs=1, hold_out=held, latent_dim=latent_dim)
    succeed("classify.py", run)
    succeed("plots.py", run)
    there = [(TRAIN[1][-held:] == k).sum().item() for k in range(10)]
    assert len(figures) == 5 and (held > 10 or 0 in (there[0], there[9]))
    result = read_json(run / data.CLASSIFICATION)
    assert [sum(row) for row in result["confusion_matrix"]] == there
    assert result["baselines"] is None
    if latent_dim > 10:
        assert "PCA has 10 components, not 11" in fail("classify.py", run, "--baselines")
    legend = figures["latent_space.png"].legends[0]
    named = zip(legend.get_texts(), legend.legend_handles)
    colors = {name: f"C{k}" for k, name in enumerate(data.CLASSES)}
    assert {text.get_text(): handle.get_color() for text, handle in named} == colors
    if latent_dim == 2:  # quantiles of N(0, 1), from 5 % to 95 %, in both directions
        quantiles = torch.tensor([NormalDist().inv_cdf(0.05 + 0.1 * k) for k in range(10)])
        with torch.no_grad():
            z = torch.cartesian_prod(quantiles, quantiles)
            pictures = load_model(data.read_run(run)).decode(z)[:, 0]
        torch.testing.assert_close(shown(figures["samples.png"]), pictures)


# --- Devices --------------------------------------------------------------------------------

STAND_INS = {  # what another device makes of loss and gradients
    "no kernel": RuntimeError("no kernel image\nis available"),
    "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate."),
    "not compiled": AssertionError("not compiled with CUDA"),
    "one gradient": lambda values: [*values[:-1], values[-1] * 1.2],
    "a loss": lambda values: [values[0] * 1.2, *values[1:]],
    "no number": lambda values: [*values[:-1], values[-1] * math.nan],
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stand_in", STAND_INS)
def test_a_device_must_compute_what_the_cpu_does(stand_in, model, monkeypatch, capsys):
    """As cuda does not here, but mps does, up to rounding. No noise is drawn, no weight changed."""
    compute, stand_in = train.loss_and_gradients, STAND_INS[stand_in]

    def other(model, x, device):
        if device == "mps":
            model, x = copy.deepcopy(model).double(), x.double()
        elif device == "cuda" and isinstance(stand_in, Exception):
            raise stand_in
        values = [value.float() for value in compute(model, x, "cpu")]
        return stand_in(values) if device == "cuda" else values

    monkeypatch.setattr(train, "loss_and_gradients", other)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.manual_seed(3)
    model = MODELS[model](8).train()
    before, noise = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for is_there, chosen in ((False, "cpu"), (True, "mps")):
        monkeypatch.setattr(torch.backends.mps, "is_available", Mock(return_value=is_there))
        assert train.choose_device("auto", model, TRAIN_X[:50]) == chosen
        remark = capsys.readouterr().err
        assert remark.startswith("Remark: cuda cannot be used: ") and remark.count("\n") == 1
        assert "Tried" not in remark  # its first sentence is enough
    with pytest.raises(data.UserError, match="--device cuda cannot be used: .*--device cpu"):
        train.choose_device("cuda", model, TRAIN_X[:50])
    assert train.choose_device("cpu", model, TRAIN_X[:50]) == "cpu"
    assert torch.equal(torch.get_rng_state(), noise) and capsys.readouterr().err == ""
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert train.memory_format("mps") == torch.contiguous_format
    assert train.memory_format("cpu") == train.memory_format("cuda") == torch.channels_last


# --- Bad input: one line, an exit code, and nothing overwritten -----------------------------


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def flip(content):  # within a tensor, where torch.load does not notice
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


BOMB = b"c__builtin__\nopen\n(Vexploded\nVw\ntR."  # a pickle that calls open("exploded", "w")


def with_model(model):
    return lambda state: saved({**torch.load(io.BytesIO(state), weights_only=True), "model": model})


TENSORS = [flip, half, b"", bytes(range(255, 0, -1)) * 20, BOMB]
TENSORS += map(saved, (torch.zeros(3), {"weight": torch.zeros(3)}, {"weight": "x"}, {}))
TENSORS += [saved({1: torch.zeros(3)})]
LINES = [half, b"", b"\xff\x00", b"a,b\n1,2\n", swap(b"0.0005", b"nan"), swap(b"\n2,", b"\n3,")]
CONFIGS = [half, b"[]", b"{}", b"\xff", swap(b'"conv"', b'"gan"'), swap(b'"conv"', b'"fc"')]
CONFIGS += [swap(b": 8,", b": %b," % new) for new in (b"8.5", b'"8"', b"9", b"0")]
CONFIGS += [swap(b'"epochs": 2,', b"")]
CONFIGS += [swap(b": 2,", b": %b," % new) for new in (b"0", b'"two"')]
DAMAGES = {data.WEIGHTS: TENSORS, data.LOG: LINES, data.CONFIG: CONFIGS}
SPOILED = [(name, "classify.py", damage) for name in DAMAGES for damage in DAMAGES[name]]
SPOILED += [(data.STATE, "train.py", damage) for damage in TENSORS]
SPOILED += [(data.STATE, "train.py", with_model(model)) for model in ({}, 3, {1: torch.zeros(3)})]
SPOILED += [(name, "plots.py", half) for name in DAMAGES]


@pytest.mark.parametrize("name, script, damage", SPOILED)
def test_spoiled_run(name, script, damage, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name != data.STATE:
        (run / data.STATE).unlink()
    spoil(run / name, damage)
    before = contents(run)
    assert name in fail(script, run)
    assert contents(run) == before and not Path("exploded").exists()


BAD_OPTIONS = {"epochs": "0 1.5", "batch_size": "0 1.5", "latent_dim": "0 1.5 9999"}
BAD_OPTIONS |= {"lr": "0 -1 nan inf fast", "seed": "-1", "beta": "-1", "hold_out": "-1"}
BAD_OPTIONS |= {"feature_weight": "-1", "device": "tpu", "model": "gan", "lr_scheduler": "step"}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_bad_options(option, tmp_path, capsys):
    for value in BAD_OPTIONS[option].split():
        code, _ = call("train.py", *options_of(tmp_path / "run", **{"epochs": 1, option: value}))
        errors = capsys.readouterr().err
        assert code == 2 and errors.count("\n") == 1 and value in errors
        assert f"--{option.replace('_', '-')}" in errors and not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_published_run_without_weights_or_no_run_at_all(script, run, monkeypatch):
    """The command that makes it is told, and can be pasted."""
    if script != "train.py":
        absent = run / "absent"
        message = fail(script, absent)
        assert f"no run in {absent}" in message and f"train.py --run {absent} makes" in message
    for name in (data.STATE, data.WEIGHTS):
        (run / name).unlink()
    edit_json(run / data.CONFIG, feature_run="a b", feature_weight=0.5)
    message = fail(script, run)
    command = shlex.split(message[message.index("python train.py") :])
    monkeypatch.setattr(sys, "argv", command[1:])
    args, settings = vars(train.parse_arguments()), data.read_run(run).settings
    assert all(args[name] == settings[name] for name in data.SETTINGS)
    assert args["run"] == Path("runs/anew") and str(run) in message
    (run / data.CONFIG).unlink()
    assert "--run runs/anew" in fail(script, run)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_cannot_be_written(script, run, tmp_path):
    """Where a folder stands in a file's place not even root can write the file."""
    names = {"train.py": data.STATE, "classify.py": data.CLASSIFICATION, "plots.py": "samples.png"}
    temporary, before = run / f"{names[script]}.{os.getpid()}.tmp", contents(run)
    if script == "train.py" and Path("/dev/full").exists():
        temporary.symlink_to("/dev/full")
        assert "No space left" in fail(script, run)
        assert contents(run) == before
    temporary.mkdir()
    assert f"{names[script]} cannot be written: Is a directory" in fail(script, run)
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in fail(script, tmp_path / "file")


def test_a_folder_that_cannot_be_written_is_noticed_before_training(tmp_path, monkeypatch, capsys):
    refused = PermissionError(errno.EACCES, "denied", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=refused))
    assert "denied" in fail("train.py", tmp_path / "run") and capsys.readouterr().out == ""


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_notebooks_and_missing_streams(stream, run, monkeypatch):
    with monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, stream)
        succeed("train.py", run, epochs=3)
        data.run_script(lambda: print("μ", file=sys.stderr, flush=True), "told")
    assert stream is None or stream.getvalue().endswith("left\nμ\n")


# --- What a run is worth --------------------------------------------------------------------


def mixture_by_hand(codes, n):
    """Return n codes of a mixture fitted to 600 codes [600, 8], which carry 12 Gaussians."""
    mixture = GaussianMixture(12, tol=0.03, random_state=42).fit(codes.double())
    return torch.tensor(mixture.sample(n)[0]).float()


def test_classification_by_hand(finished):
    """Everything in classification.json, computed again with the report's layers."""
    result = read_json(finished / data.CLASSIFICATION)
    model = ReportVAE(8).double()
    model.load_state_dict(torch.load(finished / data.WEIGHTS, weights_only=True))
    with torch.no_grad():
        codes = [model(x.double())[1].float() for x in (TRAIN_X, TEST_X)]
    assert torch.equal(latent_means(load_model(data.read_run(finished)), TEST_X), codes[1])

    def forest(fitted_on, measured_on):
        classifier = RandomForestClassifier(n_estimators=100, random_state=42)
        return classifier.fit(fitted_on, TRAIN[1]).predict(measured_on)

    matrix = np.zeros((10, 10), int)
    np.add.at(matrix, (TEST[1].numpy(), forest(*codes)), 1)
    assert 0.5 < result["accuracy"] < 0.99 and (matrix != matrix.T).any()
    assert result["confusion_matrix"] == matrix.tolist()
    assert result["accuracy"] == matrix.trace() / 225
    recall = [matrix[k, k] / (3 * (k + 3)) for k in range(10)]
    assert result["recall"] == dict(zip(data.CLASSES, recall))
    pixels = [x.reshape(-1, 784).double().numpy() for x in (TRAIN_X, TEST_X)]
    pca = PCA(8, random_state=42).fit(pixels[0])
    guesses = {"pixels": forest(*pixels), "pca": forest(*map(pca.transform, pixels))}
    right = {name: (guess == TEST[1].numpy()).mean() for name, guess in guesses.items()}
    likeness = result["baselines"].pop("training_images")
    assert result["baselines"] == pytest.approx(right, abs=1e-12)
    pca = PCA(50, random_state=42).fit(pixels[0])
    assert likeness == pytest.approx(classify.compare(TRAIN_X[:225], TEST_X, pca), rel=1e-6)
    for name, x in (("bce_floor", TEST_X), ("train_bce_floor", TRAIN_X)):
        entropy = torch.special.entr(x).sum() + torch.special.entr(1 - x).sum()
        assert result[name] == pytest.approx(entropy.item() / len(x), rel=1e-4)
    assert result["epoch"] == 2


def test_which_samples_are_measured(run, monkeypatch):
    model, seen, measures = load_model(data.read_run(run)), [], ("frechet", "precision", "recall")

    def spy(samples, images, pca):
        seen.append(samples)
        assert torch.equal(images, TEST_X) and pca.n_components == 50
        return dict.fromkeys(measures, len(seen))

    monkeypatch.setattr(classify, "compare", spy)
    succeed("classify.py", run)
    result = read_json(run / data.CLASSIFICATION)
    for number, samples in enumerate(("samples", "mixture_samples"), start=1):
        assert [result[f"{measure}_{samples}"] for measure in measures] == [number] * 3
    with torch.no_grad():
        torch.manual_seed(0)
        model(TEST_X[:128]), model(TEST_X[128:])
        z = torch.randn(225, 8), mixture_by_hand(latent_means(model, TRAIN_X), 225)
        torch.testing.assert_close(seen, [model.decode(part) for part in z])


def test_how_like_images_samples_are():
    pca = SimpleNamespace(transform=lambda pixels: pixels[:, :2].numpy())  # in its place

    def likeness(*points):
        """Return `classify.compare` of sets of points [N, 2], the first pixels of images."""
        pictures = [F.pad(torch.as_tensor(x), (0, 782)).view(-1, 1, 28, 28) for x in points]
        return [*classify.compare(*pictures, pca).values()]

    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(300, 2, generator=generator) for _ in range(2))
    assert likeness(a, a) == pytest.approx([0, 1, 1], abs=1e-9)
    # Gaussians in closed form: with the same axes, scaled by two: (2 − 1)² tr Σ; and in general.
    first, shift = a.double().T.cov(), torch.tensor([1.0, 2.0])
    distance = (a.double().mean(dim=0) + shift).square().sum() + first.trace()
    assert likeness(2 * a + shift, a)[0] == pytest.approx(distance.item(), rel=1e-5)
    b = b @ torch.tensor([[1.0, 2.0], [0.0, 0.5]])
    second = b.double().T.cov()
    roots = torch.linalg.eigvals(first @ second).real.sqrt().sum()
    distance = (a - b).mean(dim=0).square().sum() + (first + second).trace() - 2 * roots
    assert likeness(a, b)[0] == pytest.approx(distance.item(), rel=1e-5)
    assert likeness(a + 100, a)[1:] == [0, 0]
    assert likeness(a[:1].expand(300, 2), a)[1:] == [1, pytest.approx(1 / 300)]
    ten = 50 * torch.arange(10).repeat_interleave(30)[:, None] + a
    assert likeness(ten[:60] + 0.01, ten)[1:] == [1, pytest.approx(0.2, abs=0.02)]
    # Of 0, 1, 2 and 3 on a line, the third neighbours are 3, 2, 2 and 3 away.
    line, samples = ([[x, 0.0] for x in xs] for xs in ((0.0, 1, 2, 3), (-3.0, -3.1, 6.0, 6.1)))
    assert likeness(samples, line)[1] == likeness(line, samples)[2] == 0.5


CARRIED = [(599, 8, 12, "full"), (12000, 2, 50, "full"), (700, 129, 50, "diag"), (40, 8, 1, "full")]


@pytest.mark.parametrize("n, latent_dim, gaussians, kind", CARRIED)
def test_how_many_gaussians_codes_carry(n, latent_dim, gaussians, kind, monkeypatch):
    """In codes that are the first pixels of images."""
    fits, fit, model = [], GaussianMixture.fit, nn.Module()
    model.encode = lambda x: (x.flatten(1)[:, :latent_dim], None)
    monkeypatch.setattr(GaussianMixture, "fit", lambda *a: fits.append(a) or fit(*a))
    images = torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    z = networks.sample_mixture(model, images, 5)
    mixture, codes = fits[0]
    assert (mixture.n_components, mixture.covariance_type) == (gaussians, kind)
    assert torch.equal(codes, images.flatten(1)[:10_000, :latent_dim].double())
    assert z.shape == (5, latent_dim) and z.dtype == torch.float32
    equal = images[:1].expand(n, 1, 28, 28)
    z = networks.sample_mixture(model, equal, 5)
    assert fits[1][0].n_components == 1 and (z - images[0, 0, 0, 0]).abs().max() < 1.1
    assert networks.active_dimensions(equal.flatten(1)) == 0


def test_measures_of_a_perfect_and_of_a_grey_model(monkeypatch):
    torch.manual_seed(1)
    images, model = torch.rand(3000, 1, 28, 28), ConvVAE()
    monkeypatch.setattr(classify, "compare", lambda *_: {})

    def measure(picture):
        model.forward = lambda x: (picture(x), torch.ones(len(x), 32), torch.zeros(len(x), 32))
        return classify.measure(model, images, torch.ones(9, 32), None)

    metrics = measure(lambda x: x)
    assert metrics["excess_bce"] == metrics["mse"] == 0
    assert metrics["sharpness_reconstructions"] == 1
    assert metrics["kld"] == pytest.approx(16.0)  # ½ μ² in each of 32 dimensions
    entropy = -(images * images.log() + (1 - images) * (1 - images).log()).sum() / 3000
    assert metrics["bce_floor"] == pytest.approx(entropy.item(), rel=1e-4)
    metrics = measure(lambda x: torch.full_like(x, 0.5))
    assert metrics["sharpness_reconstructions"] == 0
    assert metrics["mse"] == pytest.approx(1 / 12, rel=0.02)  # the variance of uniform noise
    assert metrics["bce"] == pytest.approx(784 * math.log(2), rel=1e-5)
    assert metrics["excess_bce"] == pytest.approx(metrics["bce"] - entropy.item(), rel=1e-4)
    step = torch.zeros(1, 1, 28, 28)
    step[..., :14] = 0.5
    assert classify.gradient_energy(step) == classify.gradient_energy(step.mT) == 28 * 0.25


def test_baselines_stay_and_active_dimensions(run):
    before, model = contents(run), load_model(data.read_run(run))
    succeed("classify.py", run)
    assert contents(run) == before  # the baselines of before are kept
    # Scaled so that a dimension is active either by test or by training images.
    test, other = (latent_means(model, x).var(dim=0) for x in (TEST_X, TRAIN_X))
    scale = (0.01 / (test * other).sqrt()).sqrt()

    def change(weights):
        weights["fc_mu.weight"] *= scale[:, None]
        weights["fc_mu.bias"] *= scale

    publish(run, change)
    spoil(run / data.LOG, lambda content: b"\xef\xbb\xbf" + content)  # as spreadsheets do
    succeed("classify.py", run)
    active = (test > other).sum().item()
    assert active not in (0, 4, 8)
    assert read_json(run / data.CLASSIFICATION)["active_dimensions"] == active


# --- The figures ----------------------------------------------------------------------------


def test_loss_curves_latent_space_and_confusion_matrix(finished, figures):
    succeed("plots.py", finished)
    run, result = data.read_run(finished), read_json(finished / data.CLASSIFICATION)
    log, colors = run.log, {"train": "C0", "test": "C1"}
    for axis, loss in zip(figures["loss_curves.png"].axes, ("loss", "bce", "kld"), strict=True):
        for line, (split, color) in zip(axis.lines, colors.items(), strict=True):
            assert line.get_label() == split and to_hex(line.get_color()) == to_hex(color)
            values = [[row["epoch"], row[f"{split}_{loss}"]] for row in log]
            assert line.get_xydata().tolist() == values
    figure = plots.draw_losses([{**log[0], "epoch": epoch} for epoch in (1, 2, 3)])
    assert figure.axes[0].lines[0].get_xdata().tolist() == [2, 3]  # the first would flatten them

    for axis, name in zip(figures["latent_space.png"].axes, ("PCA", "t-SNE"), strict=True):
        assert axis.get_title() == f"{name} of μ, 225 test images"
        colors = axis.collections[0].get_facecolors().tolist()
        assert colors == [[*to_rgba(f"C{k}")] for k in TEST[1]]
    pca = figures["latent_space.png"].axes[0].collections[0].get_offsets()
    mu = latent_means(load_model(run), TEST_X)
    assert np.allclose(np.abs(pca), np.abs(PCA(2).fit_transform(mu)), atol=1e-3)

    axis = figures["confusion_matrix.png"].axes[0]
    for text in axis.texts:
        column, row = text.get_position()
        assert int(text.get_text()) == result["confusion_matrix"][row][column]
    assert axis.images[0].get_array().tolist() == result["confusion_matrix"]
    for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [label.get_text() for label in ticks] == data.CLASSES
    assert f"epoch 2: {result['accuracy'] * 100:.2f} %" in axis.get_title()
    names = (axis.get_xlabel(), axis.get_ylabel())
    assert names == ("Predicted label", "True label") and len(axis.texts) == 100


def test_reconstructions_and_samples(run, figures, tmp_path):
    succeed("train.py", tmp_path / "other", epochs=1, model="fc")
    succeed("plots.py", run, "--compare", tmp_path / "other")
    models = [load_model(data.read_run(path)) for path in (run, tmp_path / "other")]
    rows = [TEST_X[[(TEST[1] == k).nonzero()[0].item() for k in range(10)]]]
    with torch.no_grad():
        for model in models:
            torch.manual_seed(0)
            rows.append(model(rows[0])[0])
        torch.manual_seed(0)
        z = torch.randn(50, 8), mixture_by_hand(latent_means(models[0], TRAIN_X), 50)
        samples = models[0].decode(torch.cat(z))[:, 0]
    grid, other = figures["reconstructions.png"], "latent dim 8, batch size 32,"
    torch.testing.assert_close(shown(grid), torch.cat(rows)[:, 0])
    told = ["original", f"ConvVAE, {other} 2 epochs", f"Fully connected VAE, {other} 1 epochs"]
    labels = [axis.get_ylabel() for axis in grid.axes[::10]]
    assert [label.replace("\n", " ") for label in labels] == told
    assert max(len(line) for label in labels for line in label.split("\n")) <= 12
    assert [axis.get_title() for axis in grid.axes[:10]] == data.CLASSES
    torch.testing.assert_close(shown(figures["samples.png"]), samples)
    blocks = [axis.get_ylabel() for axis in figures["samples.png"].axes[::10]]
    assert blocks == ["N(0, I)", *[""] * 4, "mixture", *[""] * 4]
    assert {image.get_clim() for axis in grid.axes for image in axis.images} == {(0, 1)}


def test_a_code_that_has_collapsed(run, figures, capsys, monkeypatch):
    monkeypatch.setattr(plots, "active_dimensions", networks.active_dimensions)
    publish(run, lambda weights: [weights[f"fc_mu.{name}"].zero_() for name in ("weight", "bias")])
    succeed("classify.py", run)
    assert "no dimension of the code is active" in capsys.readouterr().err
    succeed("plots.py", run)
    assert "no dimension is active" in capsys.readouterr().err
    assert "latent_space.png" not in figures and len(figures) == 4


def test_a_classification_of_other_weights_or_damaged_is_not_shown(run, figures, capsys):
    path, command = run / data.CLASSIFICATION, f"python classify.py --run {run}"
    whole, weights = path.read_bytes(), torch.load(run / data.WEIGHTS, weights_only=True)

    def remark():
        figures.clear()
        capsys.readouterr()
        succeed("plots.py", run)
        told = capsys.readouterr().err
        assert ("confusion_matrix.png" in figures) is (told == "")
        assert len(figures) == (4 if told else 5)
        return told

    assert remark() == ""
    (run / data.STATE).unlink()
    torch.save(weights, run / data.WEIGHTS, _use_new_zipfile_serialization=False)
    assert remark() == ""  # another file, the same tensors
    publish(run, lambda weights: weights["fc_mu.bias"][0].add_(1e-6))
    outdated = f"Remark: {path} is of other weights than the run has now: {command}\n"
    assert remark() == outdated
    edit_json(path, sha256=None)
    assert remark() == ""
    edit_json(path, epoch=1)
    assert remark() == outdated
    path.unlink()
    assert remark() == f"Remark: {path} is missing or damaged: {command}\n"
    path.write_bytes(half(whole))
    assert remark() == f"Remark: {path} is missing or damaged: {command}\n"
    succeed("classify.py", run)
    assert remark() == "" and read_json(path)["baselines"] is None


def test_damaged_classifications_count_as_none(run):
    whole = (run / data.CLASSIFICATION).read_bytes()
    assert data.parse_classification(whole)["epoch"] == 2
    result = json.loads(whole)
    for part in ("epoch", "accuracy", "confusion_matrix"):
        for value in ("0", None, math.nan, [1], 10**400, ["abcdefghij"] * 10, [[0.5] * 10] * 10):
            damaged = json.dumps({**result, part: value}).encode()
            assert data.parse_classification(damaged) is None, damaged
    for damaged in (b"{}", b"[]", b"", b"\xff", b"[" * 99_999, whole.replace(b"[\n  [", b"[[], [")):
        assert data.parse_classification(damaged) is None
    assert data.parse_classification(json.dumps({**result, "sha256": []}).encode()) is None


# --- The pages ------------------------------------------------------------------------------

TABLES = """\
| Codes | Dimensions | n | Train loss, epoch 1 | Train loss | Test loss | Test − train | BCE − floor | KLD |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| ConvVAE, 2 of 100 epochs | 8 | 2 | 400.0 ± 0.0 | 300.00 ± 0.00 | 310.50 ± 0.00 | 10.50 ± 0.00 | 25.00 ± 0.00 | 15.00 ± 0.00 |
| ConvVAE, batch size 32, lr 0.1, 100 held out, 2 of 100 epochs | 8 | 1 | 400.0 | 300.00 | 310.50 | 10.50 | 25.00 | 15.00 |

| Codes | Dimensions | n | MSE × 1000 | Sharpness | Active dimensions | Accuracy, % |
| --- | --- | --- | --- | --- | --- | --- |
| ConvVAE, 2 of 100 epochs | 8 | 2 | 10.00 ± 0.00 | 0.500 ± 0.000 | 7.0 ± 0.0 | 55.00 ± 7.07 |
| ConvVAE, batch size 32, lr 0.1, 100 held out, 2 of 100 epochs | 8 | 1 | 20.00 | 0.500 | 7.0 | 40.00 |
| PCA, 100 held out | 8 | 1 |  |  |  | 25.00 |
| Pixels, 100 held out | 784 | 1 |  |  |  | 75.00 |

| Codes | Dimensions | n | Fréchet | Precision | Recall | Fréchet, mixture | Precision, mixture | Recall, mixture |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| ConvVAE, 2 of 100 epochs | 8 | 2 | 1.50 (n = 1) |  |  |  |  |  |
| Training images, 100 held out | 784 | 1 | 0.06 | 0.85 | 0.86 |  |  |  |
"""


def test_results_tables(run, tmp_path, capsys):
    with pytest.raises(data.UserError, match="no classified runs"):
        summary.tables(tmp_path)
    log = data.read_run(run).log
    for row, first in zip(log, (400.0, 300.0)):
        row.update(train_loss=first, test_loss=310.5)
    (run / data.STATE).unlink()
    data.write(run / data.LOG, log)
    values = {"excess_bce": 25, "kld": 15, "mse": 0.01, "sharpness_reconstructions": 0.5}
    result = {"epoch": 2, "confusion_matrix": [[0] * 10] * 10, "active_dimensions": 7, **values}
    baselines = {"pixels": 0.75, "pca": 0.25}
    baselines["training_images"] = {"frechet": 0.06, "precision": 0.85, "recall": 0.86}
    other = {"mse": 0.02, "accuracy": 0.4, "baselines": baselines}
    for path, settings, found in (
        ("setting/seed0", {"batch_size": 128}, {"accuracy": 0.5, "frechet_samples": 1.5}),
        ("setting/seed1", {"batch_size": 128, "seed": 1}, {"accuracy": 0.6}),
        ("other/seed0", {"lr": 0.1, "hold_out": 100}, other),
        ("outdated/seed0", {}, {"epoch": 1, "accuracy": 0.9}),
    ):
        shutil.copytree(run, tmp_path / "table" / path)
        edit_json(tmp_path / "table" / path / data.CONFIG, epochs=100, **settings)
        data.write(tmp_path / "table" / path / data.CLASSIFICATION, {**result, **found})
    capsys.readouterr()
    printed = summary.tables(tmp_path / "table").replace("\u00a0", " ")
    assert printed.splitlines() == TABLES.splitlines()
    assert "outdated" in capsys.readouterr().err


def test_forests_on_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "HERE", tmp_path)
    summary.measure_pixels(TINY)
    accuracies = read_json(tmp_path / "pixels.json")
    forest = RandomForestClassifier(100, random_state=7).fit(TRAIN_X.flatten(1).double(), TRAIN[1])
    assert accuracies["7"] == forest.score(TEST_X.flatten(1).double(), TEST[1])
    assert [*accuracies] == [*map(str, range(10))]


def test_the_figures_of_the_pages():
    """The tables are printed as they stand there; each "mean ± standard deviation" is one of the
    runs', or of a repeated timing; each percentage is an accuracy of theirs, or of the report."""
    read = partial(Path.read_text, encoding="utf-8")
    front, back = read(HERE / "README.md"), read(HERE / "results" / "README.md")
    tables = [summary.tables(HERE / folder) for folder in ("results", "results/search")]
    assert all(table in back for table in tables)
    known = "".join([*tables, read(HERE / "results" / "speed.txt"), summary.spreads()])
    known = known.replace("\u00a0", " ")
    spread, number = r"\d+\.\d+ ± \d+\.\d+", r"\d+\.\d\d"
    for page in (front, back):
        page = page.replace("\u00a0", " ")
        figures = re.findall(spread, page)
        assert len(figures) > 10 and set(figures) <= set(re.findall(spread, known))
        shares = re.findall(rf"{number}(?=(?: (?:and|to|±) {number})? %)", page)
        assert set(shares) <= {"84.01", *re.findall(number, known)}


def test_the_scripts_as_a_user_runs_them(tmp_path):
    """With an encoding, as on Windows, that has no μ and no −; and a notebook's or own settings,
    which leave the figures as they are."""
    run, output, pictures = tmp_path / "table" / "any" / "seed0", [], []
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.facecolor: red\n")
    own = {"MPLBACKEND": "nowhere", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    training = {"epochs": 3, "model": "fc", "latent_dim": 32, "lr": 0.002, "beta": 0}
    settings = {"capture_output": True, "encoding": "utf-8", "cwd": tmp_path}
    for script, options, more in (
        ("train.py", training, {}),
        ("plots.py", {}, own),
        ("classify.py", {}, {}),
        ("plots.py", {}, {"MPLBACKEND": "module://nowhere"}),
    ):
        environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", **more}
        line = [sys.executable, HERE / script, *options_of(run, **options)]
        done = subprocess.run(line, check=True, env=environment, **settings)
        output.append((done.stdout, done.stderr))
        pictures.append({path.name: path.read_bytes() for path in run.glob("*.png")})
    assert f"classify.py --run {run}" in output[1][1]
    assert {errors for _, errors in (output[0], *output[2:])} == {""}
    told = f"{run}: Fully connected VAE, batch size 32, lr 0.002, β 0, epoch 3 of 3"
    names = ("loss_curves", "reconstructions", "samples", "latent_space", "confusion_matrix")
    drawn = [str(run / f"{name}.png") for name in names]
    assert output[3][0].splitlines() == [told, SOURCE + UNKNOWN, *drawn]
    assert len(pictures[1]) == 4 and pictures[1].items() <= pictures[3].items()
    for name in drawn:
        picture = torch.tensor(matplotlib.image.imread(name))
        assert min(picture.shape[:2]) > 250 and picture[..., :3].std() > 0.05
    result, lines = read_json(run / data.CLASSIFICATION), output[2][0].splitlines()
    assert lines[0] == told and f"Classification accuracy: {result['accuracy'] * 100:.2f}%" in lines
    for name, counts in zip(data.CLASSES, result["confusion_matrix"]):
        row = f"{name} {' '.join(map(str, counts))} {result['recall'][name] * 100:.1f}% right"
        assert row.split() in [line.split() for line in lines]
    for name in ("bce", "kld", "mse", "sharpness_reconstructions", "active_dimensions"):
        assert f"{name}: {result[name]:.4g}" in lines
