"""Tests of the whole project. They need neither the network nor the data set."""

import argparse
import csv
import gzip
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import classify
import data
import plots
import train
from model import (
    MODELS,
    ConvVAE,
    FullyConnectedVAE,
    TransposedConv2d,
    latent_means,
    load_model,
    loss_function,
)
from results.speed import ReportVAE, report_loss

HERE = Path(__file__).parent
SCRIPTS = {"train.py": train, "classify.py": classify, "plots.py": plots}
VIEWS = (data.CONFIG, data.WEIGHTS, data.LOG)
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs may ignore it
torch.set_num_threads(1)  # threads wait for each other on a busy machine
os.environ["OMP_NUM_THREADS"] = "1"


# ------------------------------------------------------------------------------------------
# A tiny data set in the real format, and scripts as functions


def idx(array):  # the format of the MNIST family
    header = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    return header + array.to(torch.uint8).numpy().tobytes()


def tiny_images(share, seed):
    """Return noisy grey images, uint8, in which a bright square's place tells the class.

    There are `share` × (k + 3) of class k. A third of 4 look like 7 and of 9 like 2.
    """
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


def raw_files(train_split=TRAIN, test_split=TEST):
    """Return {file name: content} of a data set."""
    splits = {"train": train_split, "t10k": test_split}
    images = {f"{name}-images-idx3-ubyte": idx(split[0]) for name, split in splits.items()}
    return images | {f"{name}-labels-idx1-ubyte": idx(split[1]) for name, split in splits.items()}


def write_data(root, files):
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return root


FOLDER = tempfile.TemporaryDirectory()
TINY = write_data(Path(FOLDER.name), raw_files())


def words(run, **options):
    """Return the options of a script; those of a short training if it has `epochs`."""
    options = {"run": run, "data": TINY, "device": "cpu", **options}
    if "epochs" in options:
        options = {"batch-size": 32, "latent-dim": 8, **options}
    return [str(word) for name in options for word in (f"--{name}", options[name])]


def call(script, *options):
    """Run a script in this process; return its exit code and, if it failed, its last word."""
    argv, sys.argv = sys.argv, [script, *map(str, options)]
    try:
        data.run_script(SCRIPTS[script].main, "told")
    except SystemExit as end:
        return (1, end.code + "\n") if isinstance(end.code, str) else (end.code, "")
    finally:
        sys.argv = argv
    return 0, ""


def succeed(script, run, *flags, **options):
    assert call(script, *words(run, **options), *flags) == (0, "")


def fail(script, run, *flags, **options):
    """Run a script that must fail; return the one line that it says."""
    code, message = call(script, *words(run, **options), *flags)
    assert code and message.count("\n") == 1, message
    return message


def contents(folder):
    """Return {file name: content}, so that a change anywhere shows."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finished"
    succeed("train.py", run, epochs=2)
    succeed("classify.py", run, "--baselines")
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**read_json(path), **changes}), encoding="utf-8")


def log_of(run):
    """Return the loss log as the text it is, but for the one column that may differ."""
    text = (run / data.LOG).read_text(encoding="utf-8")
    return [{**row, "seconds": None} for row in csv.DictReader(io.StringIO(text))]


def assert_same_training(run, other):
    assert log_of(run) == log_of(other)
    weights, others = (torch.load(r / data.WEIGHTS, weights_only=True) for r in (run, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


# ------------------------------------------------------------------------------------------
# The model, its loss and the data


def test_weights_go_both_ways_with_the_report():
    ours, theirs, back = ConvVAE(16), ReportVAE(16), ReportVAE(16)
    ours.load_state_dict(theirs.state_dict())
    back.load_state_dict(ours.to(memory_format=torch.channels_last).state_dict())
    x, outputs = torch.rand(5, 1, 28, 28), []
    for model in (ours, theirs, back):
        torch.manual_seed(1)
        outputs.append(model(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-5, atol=1e-6)
    assert sum(parameter.numel() for parameter in ConvVAE().parameters()) == 440_833


def test_the_fully_connected_network_by_hand():
    model, x = FullyConnectedVAE(7), torch.rand(3, 1, 28, 28)
    sizes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    assert sizes == [(400, 784), (7, 400), (7, 400), (400, 7), (784, 400)]
    torch.manual_seed(1)
    recon, mu, logvar = model(x)
    torch.manual_seed(1)
    h = model.fc_enc(x.reshape(3, 784)).relu()
    torch.testing.assert_close((mu, logvar), (model.fc_mu(h), model.fc_log(h)))
    z = mu + (logvar / 2).exp() * torch.randn(3, 7)
    picture = model.fc_out(model.fc_dec(z).relu()).sigmoid().reshape(3, 1, 28, 28)
    torch.testing.assert_close(recon, picture)


def test_loss_by_hand():
    x = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    recon_x = torch.tensor([[0.5, 0.5], [0.5, 0.75]])
    mu, logvar = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.0]])
    # log 2 for three of the pixels; −(¼ log ¾ + ¾ log ¼) for the last; ½ μ² for the KLD.
    loss = 3 * 0.6931472 + 0.25 * 0.2876821 + 0.75 * 1.3862944 + 2
    assert loss_function(recon_x, x, mu, logvar).item() == pytest.approx(loss, rel=1e-6)
    recon_x[0, 0] = torch.nan
    assert loss_function(recon_x, x, mu, logvar).isnan()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_transposed_convolution_keeps_the_process_wide_flag(before, channels, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", before)
    layer, x = TransposedConv2d(4, channels, 4, 2, 1), torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), nn.ConvTranspose2d.forward(layer, x))
    assert torch.backends.mkldnn.enabled is before


def check_data(root):
    for is_train, (pictures, classes) in ((True, TRAIN), (False, TEST)):
        images, labels = data.load_split(root, train=is_train)
        assert images.shape == (len(pictures), 1, 28, 28) and images.dtype == torch.float32
        assert torch.equal(images[:, 0], pictures / 255)
        assert labels.dtype == torch.int64 and torch.equal(labels, classes)


@pytest.mark.parametrize("where", ["the Debian package", "the data folder"])
def test_data_from_raw_and_from_compressed_files(where, tmp_path, monkeypatch):
    check_data(TINY)
    root, raw = tmp_path / "data", tmp_path / "data" / "FashionMNIST" / "raw"
    folder = raw if where == "the data folder" else tmp_path / "package"
    folder.mkdir(parents=True)
    for name, content in raw_files().items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(data, "DEBIAN_PACKAGE", tmp_path / "package")
    check_data(root)
    # Only what is missing is unpacked; half a file is worse than none.
    labels = raw / "t10k-labels-idx1-ubyte"
    labels.unlink()
    (folder / "train-images-idx3-ubyte.gz").unlink()
    check_data(root)
    labels.unlink()
    damaged = folder / f"{labels.name}.gz"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(data.UserError, match=re.escape(str(damaged))):
        data.load_split(root, train=True)
    assert not labels.exists() and {path.suffix for path in raw.iterdir()} <= {"", ".gz"}


def test_no_data_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN_PACKAGE", tmp_path / "absent")
    monkeypatch.setattr(data.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    message = fail("train.py", tmp_path / "run", data=tmp_path / "data", epochs=1)
    assert "127.0.0.1" in message and str(tmp_path / "data") in message
    assert set(contents(tmp_path / "run")) == {"train.lock"}


SPOILED_DATA = [  # what becomes of the images, of the labels; bytes leaves them as they are
    (lambda content: content[:5000], bytes),
    *[(lambda _, new=new: new, bytes) for new in (b"", bytes(range(256)) * 40)],
    (lambda _: idx(torch.zeros(10, 5, 5)), bytes),
    (lambda _: idx(torch.zeros(0, 28, 28)), lambda _: idx(torch.zeros(0))),
    *[(bytes, lambda _, new=new: idx(new)) for new in (torch.zeros(3), torch.full((600,), 77))],
    (bytes, lambda _: b""),
]


@pytest.mark.parametrize("split", ["train", "t10k"])
@pytest.mark.parametrize("images, labels", SPOILED_DATA)
def test_spoiled_data(split, images, labels, tmp_path):
    files = raw_files(TRAIN, TRAIN)
    for kind, spoil in (("images-idx3", images), ("labels-idx1", labels)):
        files[f"{split}-{kind}-ubyte"] = spoil(files[f"{split}-{kind}-ubyte"])
    root = write_data(tmp_path / "data", files)
    assert f"{split}-*" in fail("train.py", tmp_path / "run", data=root, epochs=1)
    assert set(contents(tmp_path / "run")) == {"train.lock"}


# ------------------------------------------------------------------------------------------
# Training, and going on: state.pth is the truth


def test_the_defaults_are_the_report_s(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = vars(train.parse_arguments())
    expected = {"epochs": 100, "batch_size": 128, "lr": 5e-4, "latent_dim": 32, "model": "conv"}
    expected |= {"beta": 1.0, "lr_scheduler": "constant", "hold_out": 0, "feature_weight": 0.0}
    assert {name: args[name] for name in expected} == expected
    assert args["run"] == Path("runs/convvae") and args["data"] == Path("data/fashion-mnist")
    assert args["device"] in ("cuda", "mps", "cpu")
    monkeypatch.chdir(tmp_path)
    assert all(call(script, "--help") == (0, "") for script in SCRIPTS)
    assert all(str(args["run"]) in call(script)[1] for script in ("classify.py", "plots.py"))


@pytest.mark.parametrize("beta, scheduler", [(1.0, "constant"), (0.25, "cosine")])
def test_training_is_the_report_s(beta, scheduler, tmp_path):
    """Two epochs against a plain loop over the report's layers, with the same random draws."""
    run, seed, lr = tmp_path / "run", 3, 2e-3
    proposed = {"beta": beta, "lr-scheduler": scheduler} if beta != 1 else {}
    succeed("train.py", run, epochs=2, seed=seed, lr=lr, **{"batch-size": 64}, **proposed)
    torch.manual_seed(seed)
    model = ReportVAE(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    images, test_images = TRAIN[0][:, None] / 255, TEST[0][:, None] / 255
    rows = data.read_run(run).log
    for epoch, row in enumerate(rows, start=1):
        torch.manual_seed(seed * 1_000_003 + epoch)
        rate = lr * (1 + math.cos(math.pi * (epoch - 1) / 2)) / 2 if proposed else lr
        optimizer.param_groups[0]["lr"] = rate
        losses = {"train": 0.0, "test": 0.0}
        for batch in torch.randperm(600).split(64):
            optimizer.zero_grad()
            recon, mu, logvar = model(images[batch])
            loss = report_loss(recon, images[batch], mu, logvar)
            bce = F.binary_cross_entropy(recon, images[batch], reduction="sum")
            (bce + beta * (loss - bce)).backward()
            optimizer.step()
            losses["train"] += loss.item() / 600
        with torch.no_grad():
            recon, mu, logvar = model(test_images)
            losses["test"] = report_loss(recon, test_images, mu, logvar).item() / 225
            bce = F.binary_cross_entropy(recon, test_images, reduction="sum").item() / 225
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
    images = torch.rand(20 * 32 + 7, 1, 28, 28, device="cuda")
    losses = []
    for capture in (False, True):
        torch.manual_seed(0)
        model, lr = ConvVAE().cuda(), torch.tensor(1e-3, device="cuda")
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True, capturable=True)
        plain = partial(train.update, model, optimizer, 1.0, None)
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
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    succeed("train.py", run, epochs=2, model="fc")
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "FullyConnectedVAE on cpu, epochs 1 to 2"
    rows = data.read_run(run).log
    for row, line, left in zip(rows, lines, ("0:03:00", "0:00:00"), strict=True):
        losses = f"Train loss {row['train_loss']:.2f}, Test loss {row['test_loss']:.2f}"
        assert line == f"Epoch {row['epoch']}: {losses}, 180.00 s, {left} left"
    assert last == "Mean of the run: 3 training images/s, test passes included"
    assert not torch.backends.cudnn.allow_tf32
    config = {name: option["default"] for name, option in data.SETTINGS.items()}
    config |= {"model": "fc", "latent_dim": 8, "batch_size": 32, "epochs": 2}
    config |= {"torch": str(torch.__version__), "device": "cpu"}
    assert read_json(run / data.CONFIG) == config
    assert set(contents(run)) == {data.STATE, *VIEWS, "train.lock"}


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(train, "CLEAR", "\r")
    monkeypatch.setattr(train.time, "perf_counter", partial(next, iter(range(99))))
    batches = torch.arange(500).split(200)
    train.mean_losses("train", lambda x: x.sum(0), torch.ones(500, 2), batches)
    steps = [f"\rtrain: {done} of 500" for done in (200, 400, 500)]
    assert capsys.readouterr().out == "".join(steps) + "\r"


@pytest.fixture(scope="session")
def three_epochs(tmp_path_factory):
    run = tmp_path_factory.mktemp("three") / "run"
    succeed("train.py", run, epochs=3)
    return run


def test_more_epochs_train_the_rest(run, three_epochs, capsys):
    before = contents(run)
    for fewer in (1, 2):
        succeed("train.py", run, epochs=fewer)
        assert "finished: 2 epochs" in capsys.readouterr().out and contents(run) == before
    succeed("train.py", run, epochs=3)
    assert "epochs 3 to 3" in capsys.readouterr().out
    assert_same_training(run, three_epochs)
    assert read_json(run / data.CONFIG)["epochs"] == 3


def interrupt_after(renames, monkeypatch):
    """Let a script be interrupted when it has put so many files in place."""
    replace, left = os.replace, iter(range(renames))

    def rename(*paths):
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", rename)


# The renames of an epoch are those of the state, the settings, the weights and the log.
@pytest.mark.parametrize("renames", [0, 1, 2, 3, 4, 5, 7, 8])
def test_killed_between_two_files(renames, three_epochs, tmp_path, monkeypatch):
    run = tmp_path / "run"
    interrupt_after(renames, monkeypatch)
    assert call("train.py", *words(run, epochs=3)) == (130, "")
    monkeypatch.undo()
    if renames % 4:  # the files of two epochs are not shown as one run
        assert str(run) in fail("classify.py", run)
    succeed("train.py", run, epochs=3)
    assert_same_training(run, three_epochs)
    assert contents(run).keys() == contents(three_epochs).keys()


@pytest.mark.parametrize("sent", ["SIGKILL", "SIGINT"])
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_interrupted_within_an_epoch(sent, tmp_path):
    run, slow = tmp_path / "run", {"batch-size": 8, "latent-dim": 4, "epochs": 3}
    line = [sys.executable, HERE / "train.py", *words(run, **slow)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, **pipes) as process:
        while "Epoch 1:" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(getattr(signal, sent))
        _, errors = process.communicate()
    if sent == "SIGINT":
        assert process.returncode == 130
        assert errors.count("\n") == 1 and "the same command goes on" in errors
    else:
        assert process.returncode == -signal.SIGKILL
    assert len(data.read(run / data.STATE)["log"]) < 3
    succeed("train.py", run, **slow)
    assert len(data.read_run(run).log) == 3


def test_a_second_writer_is_refused(tmp_path):
    run = tmp_path / "run"
    with train.only_writer(run):
        before = contents(run)
        for lr in (5e-4, 0.1):
            assert f"train.py is at work in {run}" in fail("train.py", run, epochs=1, lr=lr)
        assert contents(run) == before
    succeed("train.py", run, epochs=1)


@pytest.mark.parametrize("damage", [None, b"", b"damaged", b"{}"])
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_restored(view, damage, run):
    before = contents(run)
    (run / view).unlink() if damage is None else (run / view).write_bytes(damage)
    for script in ("classify.py", "plots.py"):
        message = fail(script, run)
        assert view in message and "restores" in message
    succeed("train.py", run, epochs=2)
    assert contents(run) == before


@pytest.mark.parametrize("files", [*([name] for name in VIEWS), [data.CLASSIFICATION], VIEWS])
def test_a_run_without_a_state_is_left_alone(files, run):
    for name in contents(run).keys() - {*files}:
        (run / name).unlink()
    before = contents(run)
    message = fail("train.py", run, epochs=3)
    assert f"{data.STATE} is missing" in message and "another --run" in message
    assert contents(run) == before


def test_other_settings_are_refused_by_name(run):
    (run / "train.lock").unlink()
    before, others = contents(run), {"latent-dim": (16, 8), "batch-size": (64, 32)}
    others |= {"lr": (0.1, 5e-4), "seed": (1, 0), "model": ("fc", "conv")}
    for option, (value, there) in others.items():
        message = fail("train.py", run, epochs=3, **{option: value})
        assert f"has {option.replace('-', '_')} {there}, not {value}:" in message
        assert contents(run) == before


def test_the_readme_s_table_and_a_setting_that_is_new(run, three_epochs, monkeypatch):
    readme_table = plots.results_table(HERE / "results")
    assert readme_table in (HERE / "README.md").read_text(encoding="utf-8")
    option = {"type": data.between(float, 0, 9), "default": 1.0, "help": "new"}
    monkeypatch.setitem(data.SETTINGS, "weight", option)
    assert plots.results_table(HERE / "results") == readme_table
    assert "weight 1.0, not 2.0" in fail("train.py", run, epochs=3, weight=2)
    succeed("train.py", run, epochs=3)
    assert_same_training(run, three_epochs)
    assert data.read_run(run).settings["weight"] == 1.0


def test_the_readme_s_figures():
    """Each "mean ± standard deviation" on the page is one of the runs', or of a repeated timing;
    each percentage is an accuracy of theirs, or of the report."""
    spread = r"\d+\.\d+ ± \d+\.\d+"
    read = partial(Path.read_text, encoding="utf-8")
    known = read(HERE / "results" / "speed.txt")
    for folder in ("results", "results/search"):
        known += plots.results_table(HERE / folder) + "\n"
    runs = [data.read_run(path).log for path in (HERE / "results" / "latent32").iterdir()]
    for epochs, loss in ((10, "train_loss"), (10, "test_loss"), (50, "test_loss")):
        drops = [log[99 - epochs][loss] - log[99][loss] for log in runs]
        known += f" {plots.spread(drops, 2)} "
    page = read(HERE / "README.md")
    figures = re.findall(spread, page)
    assert len(figures) > 60 and set(figures) <= set(re.findall(spread, known))
    number = r"\d+\.\d\d"
    shares = re.findall(rf"{number}(?=(?: (?:and|to|±) {number})? %)", page)
    last_cells = " ".join(re.findall(r"\| ([^|]*) \|$", known, flags=re.MULTILINE))
    assert len(shares) > 20 and set(shares) <= {"84.01", *re.findall(number, last_cells)}


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    """The last good epoch stays. An overflow is provoked by weights, as no setting may change."""
    state = torch.load(run / data.STATE, weights_only=True)
    state["model"]["fc_log.bias"].fill_(1000.0)
    torch.save(state, run / data.STATE)
    message = fail("train.py", run, epochs=3)
    assert "not finite in epoch 3" in message and "another --run" in message
    assert [row["epoch"] for row in data.read_run(run).log] == [1, 2]
    new = tmp_path / "new"
    assert "not finite in epoch 1" in fail("train.py", new, epochs=1, lr=1000)
    succeed("train.py", new, epochs=1, lr=0.001)


# ------------------------------------------------------------------------------------------
# What the report proposes


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


PROPOSED = [
    *[{"lr-scheduler": "cosine"}, {"lr-scheduler": "plateau"}, {"model": "deep"}],
    *[{"hold-out": 100}, {"feature-weight": 0.1}],
]


@pytest.mark.parametrize("options", PROPOSED, ids=lambda options: next(iter(options)))
def test_proposals_go_on_after_a_kill(
    options, finished, three_epochs, tmp_path, monkeypatch, capsys
):
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = {"epochs": 3, **options}
    if "feature-weight" in options:
        options["feature-run"] = finished
    impatient = partial(ReduceLROnPlateau, patience=0, threshold=0.9)
    monkeypatch.setattr(train, "ReduceLROnPlateau", impatient)
    succeed("train.py", whole, **options)
    assert log_of(whole) != log_of(three_epochs)
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        assert call("train.py", *words(run, **options)) == (130, "")
    succeed("train.py", run, **options)
    assert_same_training(run, whole)
    if "lr-scheduler" not in options:
        return
    cosine = options["lr-scheduler"] == "cosine"  # all its rates were for three epochs
    capsys.readouterr()
    succeed("train.py", run, **options)
    assert ("more --epochs" in capsys.readouterr().out) != cosine
    before, options["epochs"] = contents(run), 4
    if cosine:
        assert "has epochs 3, not 4" in fail("train.py", run, **options)
        assert contents(run) == before
    else:
        succeed("train.py", run, **options)


def test_feature_matching_is_part_of_what_is_minimised(finished, run, tmp_path):
    features = train.load_features(data.read_run(finished), 0.3, "cpu")
    encoder = ReportVAE(8)
    encoder.load_state_dict(torch.load(finished / data.WEIGHTS, weights_only=True))
    model, gradients = ConvVAE(8), []
    x = TRAIN[0][:32, None] / 255
    for by_hand in (True, False):
        torch.manual_seed(1)
        if not by_hand:
            train.update(model, torch.optim.SGD(model.parameters(), lr=0.0), 1.0, features, x)
        else:
            recon, mu, logvar = model(x)
            distance = 0
            h, target = recon, x
            for layer in (encoder.enc1, encoder.enc2, encoder.enc3):
                h, target = layer(h).relu(), layer(target).relu()
                distance = distance + (h - target).square().sum()
            (report_loss(recon, x, mu, logvar) + 0.3 * distance).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    others, new = {"feature-weight": 1, "feature-run": run}, tmp_path / "new"
    assert "no run in" in fail("train.py", new, epochs=1, **{**others, "feature-run": new})
    for option in others:
        assert call("train.py", *words(new, epochs=1, **{option: others[option]}))[0] == 2
    assert not new.exists()
    succeed("train.py", new, epochs=1, **others)
    succeed("train.py", new, epochs=2, **{**others, "feature-run": finished})  # the same encoder
    succeed("train.py", run, epochs=3)  # which makes it another one
    assert "has feature_sha256" in fail("train.py", new, epochs=3, **others)


def test_batch_normalisation_is_trained_and_then_left_alone(tmp_path, monkeypatch):
    seen, loss_terms = [], train.loss_terms

    def spy(model, x):
        seen.append((model.training, torch.is_grad_enabled()))
        return loss_terms(model, x)

    monkeypatch.setattr(train, "loss_terms", spy)
    run = tmp_path / "run"
    succeed("train.py", run, epochs=1, model="deep", **{"batch-size": 600})
    assert seen == [(True, True), (False, False)]
    model, images = load_model(data.read_run(run), "cpu"), TEST[0][:, None] / 255
    h = images
    for layer, norm, _ in model.enc:
        h = F.leaky_relu(norm(layer(h)), 0.2)
    torch.testing.assert_close(model.encode(images)[0], model.fc_mu(h.flatten(1)))
    h = F.leaky_relu(model.fc_dec(model.encode(images)[0]), 0.2).view(-1, 256, 3, 3)
    for layer, norm, _ in model.dec[:-1]:
        h = F.leaky_relu(norm(layer(h)), 0.2)
    picture = model.dec[-1](h).sigmoid()
    torch.testing.assert_close(model.decode(model.encode(images)[0]), picture)
    alone = latent_means(model, images[:1])
    assert torch.equal(latent_means(model, images)[:1], alone)
    running = {name: tensor for name, tensor in model.state_dict().items() if "running" in name}
    assert len(running) == 14 and model.enc[0][1].running_mean.abs().sum() > 0
    assert sum(p.numel() for p in MODELS["deep"]().parameters()) == 1_144_193
    assert [h.shape[1] for h in model.features(images)] == [32, 64, 128, 256]
    succeed("classify.py", run)
    succeed("plots.py", run)


def test_hold_out(tmp_path, figures):
    """As if the last training images were the test set, and those before them all there are."""
    splits = [[part[:-100] for part in TRAIN], [part[-100:] for part in TRAIN]]
    root, drawn = write_data(tmp_path / "data", raw_files(*splits)), []
    run, other = tmp_path / "run", tmp_path / "other"
    for path, folder, held in ((run, TINY, 100), (other, root, 0)):
        succeed("train.py", path, data=folder, epochs=1, **{"hold-out": held})
        succeed("classify.py", path, "--baselines", data=folder)
        succeed("plots.py", path, data=folder)
        drawn.append([shown(figures[f"{name}.png"]) for name in ("samples", "reconstructions")])
    assert_same_training(run, other)
    assert contents(run)[data.CLASSIFICATION] == contents(other)[data.CLASSIFICATION]
    torch.testing.assert_close(*drawn)
    for held in (9, 591):
        message = fail("train.py", tmp_path / "part", epochs=1, **{"hold-out": held})
        assert f"--hold-out {held}: of 600" in message


@pytest.mark.parametrize("held", [10, 590])
def test_parts_that_lack_classes(held, tmp_path, figures):
    run = tmp_path / "run"
    succeed("train.py", run, epochs=1, **{"hold-out": held})
    succeed("classify.py", run)
    succeed("plots.py", run)
    if held > 10:
        return
    there = [(TRAIN[1][-10:] == k).sum().item() for k in range(10)]
    assert 0 in (there[0], there[9])
    found = read_json(run / data.CLASSIFICATION)
    assert [sum(row) for row in found["confusion_matrix"]] == there
    figure = figures["latent_space.png"]
    points, legend = figure.axes[0].collections[0], figure.legends[0]
    colors = dict(zip(data.CLASSES, points.to_rgba(range(10)).tolist()))
    shown = zip(legend.get_texts(), legend.legend_handles)
    assert {text.get_text(): list(handle.get_color()) for text, handle in shown} == colors


# ------------------------------------------------------------------------------------------
# Bad input: one line, an exit code, and nothing overwritten


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))  # what loading it would do


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def half(content):
    return content[: len(content) // 2]


def swap(old, new):
    return lambda content: content.replace(old, new)


def flip(content):  # within a tensor, where torch.load does not notice
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    return changed


TENSORS = [
    flip,
    half,
    b"",
    bytes(range(255, 0, -1)) * 20,
    pickle.dumps(Bomb(), 2),
    saved(torch.zeros(3)),
]
OTHERS = [saved({"weight": torch.zeros(3)}), saved({"weight": "x"}), saved({})]
SPOILED = [
    *[(data.STATE, "train.py", damage) for damage in TENSORS + OTHERS],
    *[(data.WEIGHTS, "classify.py", damage) for damage in TENSORS + OTHERS],
    *[(data.WEIGHTS, "plots.py", damage) for damage in (half, OTHERS[0])],
    *[(data.LOG, "classify.py", damage) for damage in (half, b"", b"\xff\x00", b"a,b\n1,2\n")],
    *[
        (data.LOG, "plots.py", swap(*swapped))
        for swapped in ((b"0.0005", b"nan"), (b"\n2,", b"\n3,"))
    ],
    *[(data.CONFIG, "classify.py", damage) for damage in (half, b"[]", b"{}", b"\xff")],
    *[
        (data.CONFIG, "plots.py", swap(b": 8,", b": " + new))
        for new in (b"8.5,", b'"8",', b"9,", b"0,")
    ],
    *[(data.CONFIG, "plots.py", swap(b": 2,", b": " + new)) for new in (b"0,", b'"two",')],
    *[(data.CONFIG, "classify.py", swap(b'"conv"', new)) for new in (b'"gan"', b'"fc"')],
    *[(data.CLASSIFICATION, "classify.py", damage) for damage in (half, b"{}", b"[]")],
    (data.CLASSIFICATION, "plots.py", half),
]


@pytest.mark.parametrize("name, script, damage", SPOILED)
def test_spoiled_run(name, script, damage, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name != data.STATE:
        (run / data.STATE).unlink()
    content = (run / name).read_bytes()
    (run / name).write_bytes(damage(content) if callable(damage) else damage)
    before = contents(run)
    epochs = {"epochs": 3} if script == "train.py" else {}
    assert name in fail(script, run, **epochs)
    assert contents(run) == before and not Path("exploded").exists()


@pytest.mark.parametrize("script", ["classify.py", "plots.py"])
def test_files_of_another_run_are_noticed(script, run, tmp_path):
    other = tmp_path / "other"
    succeed("train.py", other, epochs=2, seed=1)
    for name in VIEWS:
        right = (run / name).read_bytes()
        shutil.copy(other / name, run / name)
        assert f"differ from its {data.STATE}" in fail(script, run)
        (run / name).write_bytes(right)
    succeed(script, run)
    edit_json(run / data.CLASSIFICATION, sha256="another")
    (run / data.WEIGHTS).unlink()  # the state has them too
    assert data.read_classification(data.read_run(run)) is None


BAD_OPTIONS = [
    *[(name, bad) for name in ("epochs", "batch-size", "latent-dim") for bad in ("0", "1.5")],
    *[("lr", bad) for bad in ("0", "-1", "nan", "inf", "fast")],
    *[("latent-dim", "100000000"), ("seed", "-1"), ("device", "tpu"), ("model", "gan")],
    *[("beta", "-1"), ("hold-out", "-1"), ("feature-weight", "-1"), ("lr-scheduler", "step")],
]


@pytest.mark.parametrize("option, value", BAD_OPTIONS)
def test_bad_options(option, value, tmp_path, capsys):
    code, _ = call("train.py", *words(tmp_path / "run", **{"epochs": 1, option: value}))
    errors = capsys.readouterr().err
    assert code and errors.count("\n") == 1 and f"--{option}" in errors and value in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["classify.py", "plots.py"])
def test_runs_that_are_not_there(script, run, tmp_path):
    for name in (data.STATE, data.WEIGHTS):
        (run / name).unlink()
    for folder in (tmp_path / "absent", run):
        message = fail(script, folder)
        assert str(folder) in message and "train.py" in message


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_cannot_be_written(script, run, tmp_path):
    """Where a folder stands in a file's place not even root can write the file."""
    names = {"train.py": data.STATE, "classify.py": data.CLASSIFICATION, "plots.py": "samples.png"}
    epochs, before = {"epochs": 3} if script == "train.py" else {}, contents(run)
    if epochs and Path("/dev/full").exists():
        (run / f"{data.STATE}.tmp").symlink_to("/dev/full")
        assert "No space left" in fail(script, run, **epochs)
        assert contents(run) == before
    (run / f"{names[script]}.tmp").mkdir()
    assert names[script] in fail(script, run, **epochs)
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in fail(script, tmp_path / "file")


def test_ctrl_c_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        data.run_script(lambda: signal.raise_signal(signal.SIGINT), "told")
    assert end.value.code == 130 and capsys.readouterr().err == "Interrupted: told.\n"


def test_classification_by_hand(finished, run, monkeypatch):
    """Everything in classification.json, computed again with the report's layers."""
    found = read_json(finished / data.CLASSIFICATION)
    model = ReportVAE(8).double()
    model.load_state_dict(torch.load(finished / data.WEIGHTS, weights_only=True))
    (train_x, train_y), (test_x, test_y) = ((x[:, None] / 255, y) for x, y in (TRAIN, TEST))
    with torch.no_grad():
        codes = [model(x.double())[1].float() for x in (train_x, test_x)]
    assert torch.equal(latent_means(load_model(data.read_run(finished), "cpu"), test_x), codes[1])

    def forest(fitted_on, measured_on):
        classifier = RandomForestClassifier(n_estimators=100, random_state=42)
        return classifier.fit(fitted_on, train_y).predict(measured_on)

    predicted = forest(*codes)
    matrix = np.zeros((10, 10), int)
    for true, guess in zip(test_y, predicted):
        matrix[true, guess] += 1
    assert 0.5 < found["accuracy"] < 0.99 and (matrix != matrix.T).any()
    assert found["confusion_matrix"] == matrix.tolist()
    assert found["accuracy"] == matrix.trace() / 225
    recall = [matrix[k, k] / (3 * (k + 3)) for k in range(10)]
    assert found["recall"] == dict(zip(data.CLASSES, recall))
    pixels = [x.reshape(-1, 784).double().numpy() for x in (train_x, test_x)]
    pca = PCA(8, random_state=42).fit(pixels[0])
    guesses = {"pixels": forest(*pixels), "pca": forest(*map(pca.transform, pixels))}
    right = {name: (guess == test_y.numpy()).mean() for name, guess in guesses.items()}
    assert found["baselines"] == pytest.approx(right, abs=1e-12)
    mixture = GaussianMixture(10, random_state=42).fit(codes[0].double())
    z = torch.tensor(mixture.sample(225)[0]).float()
    seen, merit = [], classify.figures_of_merit
    monkeypatch.setattr(classify, "figures_of_merit", lambda *a: seen.append(a[2]) or merit(*a))
    succeed("classify.py", run)
    torch.testing.assert_close(seen, [z])  # so small a run hardly shows it in its samples
    with torch.no_grad():
        samples = load_model(data.read_run(finished), "cpu").decode(z)
    sharpness = classify.gradient_energy(samples) / classify.gradient_energy(test_x)
    assert found["sharpness_mixture_samples"] == pytest.approx(sharpness, rel=1e-6)
    for name, x in (("bce_floor", test_x), ("train_bce_floor", train_x)):
        entropy = torch.special.entr(x).sum() + torch.special.entr(1 - x).sum()
        assert found[name] == pytest.approx(entropy.item() / len(x), rel=1e-4)
    assert found["epoch"] == 2


class Stripes(ConvVAE):
    """Its reconstruction is what `picture` makes of x; its samples are stripes, z² high."""

    def forward(self, x):
        return self.picture(x), torch.ones(len(x), 32), torch.zeros(len(x), 32)

    def decode(self, z):
        pattern = torch.arange(28) % 2 * torch.ones(1, 28, 28)
        return z[:, :1, None, None].square() * pattern


def test_figures_of_merit_of_a_perfect_and_of_a_grey_model():
    torch.manual_seed(1)
    images, model = torch.rand(3000, 1, 28, 28), Stripes()
    model.picture = lambda x: x
    merit = classify.figures_of_merit(model, images, torch.ones(3000, 32))
    assert merit["excess_bce"] == merit["mse"] == 0
    assert merit["sharpness_reconstructions"] == 1
    assert merit["kld"] == pytest.approx(16.0)  # ½ μ² in each of 32 dimensions
    entropy = -(images * images.log() + (1 - images) * (1 - images).log()).sum() / 3000
    assert merit["bce_floor"] == pytest.approx(entropy.item(), rel=1e-4)
    # The mean square of a step: 3 for z² with z ~ N(0, I), 1/6 for noise, in two directions.
    assert merit["sharpness_samples"] == pytest.approx(3 / (2 / 6), rel=0.15)
    assert merit["sharpness_mixture_samples"] == pytest.approx(1 / (2 / 6), rel=0.01)
    model.picture = lambda x: torch.full_like(x, 0.5)
    merit = classify.figures_of_merit(model, images, torch.ones(3000, 32))
    assert merit["sharpness_reconstructions"] == 0
    assert merit["mse"] == pytest.approx(1 / 12, rel=0.02)  # the variance of uniform noise
    assert merit["bce"] == pytest.approx(784 * math.log(2), rel=1e-5)
    assert merit["excess_bce"] == pytest.approx(merit["bce"] - entropy.item(), rel=1e-4)
    step = torch.zeros(1, 1, 28, 28)
    step[..., :14] = 0.5
    assert classify.gradient_energy(step) == classify.gradient_energy(step.mT) == 28 * 0.25


def test_baselines_and_active_dimensions(run, tmp_path):
    before, model = contents(run), load_model(data.read_run(run), "cpu")
    succeed("classify.py", run)
    assert contents(run) == before  # the baselines of before are kept
    weights = torch.load(run / data.WEIGHTS, weights_only=True)
    variances = torch.tensor([1, 0.2, 0.05, 0.02, 0.008, 0.005, 0.001, 0])
    scale = (variances / latent_means(model, TEST[0][:, None] / 255).var(dim=0)).sqrt()
    weights["fc_mu.weight"] *= scale[:, None]
    weights["fc_mu.bias"] *= scale
    (run / data.STATE).unlink()
    torch.save(weights, run / data.WEIGHTS)
    succeed("classify.py", run)
    assert read_json(run / data.CLASSIFICATION)["active_dimensions"] == 4
    wide = tmp_path / "wide"
    succeed("train.py", wide, epochs=1, **{"latent-dim": 601, "model": "fc"})
    assert "600" in fail("classify.py", wide, "--baselines")
    succeed("classify.py", wide)
    assert read_json(wide / data.CLASSIFICATION)["baselines"] is None


@pytest.fixture
def figures(monkeypatch):
    """What plots.py saves, {name: figure}, in place of files."""
    figures = {}
    monkeypatch.setattr(plots, "save", lambda run, name, figure: figures.update({name: figure}))
    yield figures
    plots.plt.close("all")


def shown(figure):
    """Return the images that a figure shows, one after the other."""
    return torch.stack([torch.tensor(axis.images[0].get_array()) for axis in figure.axes])


def test_figures_show_the_run(run, figures, tmp_path):
    other = tmp_path / "other"
    succeed("train.py", other, epochs=1, model="fc")
    succeed("plots.py", run, "--compare", other)
    log, colors = data.read_run(run).log, {"train": "blue", "test": "orange"}
    for axis, loss in zip(figures["loss_curves.png"].axes, ("loss", "bce", "kld"), strict=True):
        for line, (split, color) in zip(axis.lines, colors.items(), strict=True):
            assert line.get_label() == split and line.get_color() == f"tab:{color}"
            values = [(row["epoch"], row[f"{split}_{loss}"]) for row in log]
            assert line.get_xydata().tolist() == [[*value] for value in values]
    models = [load_model(data.read_run(path), "cpu") for path in (run, other)]
    firsts = [(TEST[1] == k).nonzero()[0].item() for k in range(10)]
    rows = [TEST[0][firsts] / 255]
    with torch.no_grad():
        for model in models:
            torch.manual_seed(0)
            rows.append(model(rows[0][:, None])[0][:, 0])
        torch.manual_seed(0)
        mixture = GaussianMixture(10, random_state=42).fit(
            latent_means(models[0], TRAIN[0][:, None] / 255).double()
        )
        z = torch.cat((torch.randn(50, 8), torch.tensor(mixture.sample(50)[0]).float()))
        samples = models[0].decode(z)[:, 0]
        mu = models[0].encode(TEST[0][:, None] / 255)[0]
    grid = figures["reconstructions.png"]
    torch.testing.assert_close(shown(grid), torch.cat(rows))
    other = "latent dim 8, batch size 32, epochs"
    told = ["original", f"ConvVAE, {other} 2", f"Fully connected VAE, {other} 1"]
    labels = [axis.get_ylabel() for axis in grid.axes[::10]]
    assert [label.replace("\n", " ") for label in labels] == told
    assert max(len(line) for label in labels for line in label.split("\n")) == 12
    assert [axis.get_title() for axis in grid.axes[:10]] == data.CLASSES
    torch.testing.assert_close(shown(figures["samples.png"]), samples)
    blocks = [axis.get_ylabel() for axis in figures["samples.png"].axes[::10]]
    assert blocks == ["N(0, I)"] * 5 + ["mixture"] * 5
    assert {image.get_clim() for axis in grid.axes for image in axis.images} == {(0, 1)}
    for axis, name in zip(figures["latent_space.png"].axes, ("PCA", "t-SNE"), strict=True):
        points = axis.collections[0]
        assert axis.get_title() == f"{name} of μ, 225 test images"
        assert points.get_array().tolist() == TEST[1].tolist()
    pca = figures["latent_space.png"].axes[0].collections[0].get_offsets()
    assert np.allclose(np.abs(pca), np.abs(PCA(2).fit_transform(mu)), atol=1e-3)
    matrix = figures["confusion_matrix.png"].axes[0]
    found = read_json(run / data.CLASSIFICATION)
    counts = np.ravel(found["confusion_matrix"]).tolist()
    assert [int(text.get_text()) for text in matrix.texts] == counts
    assert f"epoch 2: {found['accuracy'] * 100:.2f} %" in matrix.get_title()
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("Predicted label", "True label")


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_few_latent_dimensions_can_be_drawn(latent_dim, tmp_path, figures):
    run = tmp_path / "run"
    succeed("train.py", run, epochs=1, **{"latent-dim": latent_dim})
    succeed("classify.py", run)
    succeed("plots.py", run)
    assert len(figures) == 5
    if latent_dim == 2:  # quantiles of N(0, 1), from 5 % to 95 %, in both directions
        quantiles = [NormalDist().inv_cdf(0.05 + 0.1 * k) for k in range(10)]
        z = torch.tensor([[first, second] for first in quantiles for second in quantiles])
        with torch.no_grad():
            pictures = load_model(data.read_run(run), "cpu").decode(z)[:, 0]
        torch.testing.assert_close(shown(figures["samples.png"]), pictures)


def test_the_classification_of_other_weights_is_not_shown(run, figures, capsys):
    def drawn():
        plots.plt.close("all")
        figures.clear()
        succeed("plots.py", run)
        return "confusion_matrix.png" in figures, capsys.readouterr().err

    assert drawn() == (True, "")
    weights = torch.load(run / data.WEIGHTS, weights_only=True)
    torch.save(weights, run / data.WEIGHTS, _use_new_zipfile_serialization=False)
    assert drawn() == (True, "")  # another file, the same tensors
    (run / data.STATE).unlink()
    weights["fc_mu.bias"][0] += 1e-6
    torch.save(weights, run / data.WEIGHTS)
    remark = f"{run / data.CLASSIFICATION} is of other weights than the run has now"
    assert drawn() == (False, f"Remark: {remark}: python classify.py --run {run}\n")
    text = (run / data.CLASSIFICATION).read_text(encoding="utf-8")
    (run / data.CLASSIFICATION).write_text(text.replace("sha256", "none"), encoding="utf-8")
    assert drawn() == (True, "")
    edit_json(run / data.CLASSIFICATION, epoch=1)
    assert drawn()[0] is False
    (run / data.CLASSIFICATION).unlink()
    assert "is missing" in drawn()[1]


def test_results_table(run, tmp_path, capsys):
    assert "no classified runs" in fail("plots.py", run, "--table", tmp_path)
    (run / data.STATE).unlink()
    for seed, accuracy in enumerate((0.5, 0.6)):
        path = tmp_path / "table" / "setting" / f"seed{seed}"
        shutil.copytree(run, path)
        edit_json(path / data.CONFIG, seed=seed, epochs=100, batch_size=128)
        edit_json(path / data.CLASSIFICATION, accuracy=accuracy, mse=0.01, baselines=None)
    baselines = {"pixels": 0.75, "pca": 0.25}
    for name, epoch, lr in (("other", 2, 0.1), ("outdated", 1, 5e-4)):
        path = tmp_path / "table" / name / "seed0"
        shutil.copytree(run, path)
        edit_json(path / data.CONFIG, epochs=100, lr=lr, hold_out=100)
        edit_json(path / data.CLASSIFICATION, epoch=epoch, baselines=baselines)
    capsys.readouterr()
    succeed("plots.py", run, "--table", tmp_path / "table")
    output = capsys.readouterr()
    assert "outdated" in output.err and f"{path} is at epoch 2 of 100" in output.err
    table = [[cell.strip() for cell in row.split("|")[1:-1]] for row in output.out.splitlines()]
    (first, last), head = data.read_run(run).log, table[0]
    other, two = (dict(zip(head, row)) for row in table[2:4])
    assert (two["Codes"], two["Dimensions"], two["n"]) == ("ConvVAE, epochs 2 of 100", "8", "2")
    told = "ConvVAE, batch size 32, lr 0.1, hold out 100, epochs 2 of 100"
    assert (other["Codes"], other["n"]) == (told, "1")
    assert two["Accuracy, %"] == "55.00 ± 7.07" and two["MSE × 1000"] == "10.00 ± 0.00"
    found = read_json(run / data.CLASSIFICATION)
    values = [first["train_loss"], last["train_loss"], last["test_loss"]]
    values += [last["test_loss"] - last["train_loss"], found["excess_bce"], found["kld"]]
    values += [found["mse"] * 1000, found["sharpness_reconstructions"], found["sharpness_samples"]]
    values += [found["sharpness_mixture_samples"], found["active_dimensions"]]
    values += [found["accuracy"] * 100]
    digits = [len(other[name].partition(".")[2]) for name in head[3:]]
    assert [other[name] for name in head[3:]] == [f"{v:.{d}f}" for v, d in zip(values, digits)]
    assert table[4][:2] == ["PCA, hold out 100", "8"] and table[4][-1] == "25.00"
    assert table[5][:2] == ["raw pixels, hold out 100", "784"] and table[5][-1] == "75.00"
    assert len(table) == 6


def test_the_scripts_as_a_user_runs_them(tmp_path):
    """With an encoding, as on Windows, that has no μ and no −."""
    run, output = tmp_path / "table" / "any" / "seed0", []
    scripts = [("train.py", "--epochs", 3), ("plots.py",), ("classify.py",), ("plots.py",)]
    for script, *options in [*scripts, ("plots.py", "--table", tmp_path / "table")]:
        line = [sys.executable, HERE / script, *words(run), *map(str, options)]
        settings = {"capture_output": True, "encoding": "utf-8", "cwd": tmp_path}
        environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
        done = subprocess.run(line, check=True, env=environment, **settings)
        output.append((done.stdout, done.stderr))
    assert f"classify.py --run {run}" in output[1][1]
    assert {errors for _, errors in (output[0], *output[2:])} == {""}
    figures = ("loss_curves", "reconstructions", "samples", "latent_space", "confusion_matrix")
    assert output[3][0].splitlines() == [str(run / f"{name}.png") for name in figures]
    for name in figures:
        picture = torch.from_numpy(plots.plt.imread(run / f"{name}.png"))
        assert min(picture.shape[:2]) > 250 and picture[..., :3].std() > 0.05
    found = read_json(run / data.CLASSIFICATION)
    assert f"Classification accuracy: {found['accuracy'] * 100:.2f}%\n" in output[2][0]
    for name, counts in zip(data.CLASSES, found["confusion_matrix"]):
        row = f"{name} {' '.join(map(str, counts))} {found['recall'][name] * 100:.1f}% right"
        assert row.split() in [line.split() for line in output[2][0].splitlines()]
    for name in ("bce", "kld", "mse", "sharpness_reconstructions", "active_dimensions"):
        assert f"{name}: {found[name]:.4g}\n" in output[2][0]
    assert "Test − train" in output[4][0]
