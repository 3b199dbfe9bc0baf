"""Tests of the whole project. They need neither the network nor the data set."""

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
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl
from torchvision.datasets import FashionMNIST

import classify
import data
import plots
import train
from model import (
    ConvVAE,
    FullyConnectedVAE,
    TransposedConv2d,
    kl_divergence,
    load_model,
    loss_function,
    reconstruction_bce,
)

HERE = Path(__file__).parent
SCRIPTS = {"train.py": train, "classify.py": classify, "plots.py": plots}
VIEWS = (data.CONFIG, data.WEIGHTS, data.LOG)


# ------------------------------------------------------------------------------------------
# A tiny data set in the real format, and scripts as functions


def idx(array):
    """Return a uint8 tensor in the IDX format of the MNIST family."""
    header = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    return header + array.to(torch.uint8).numpy().tobytes()


def tiny_images(share, seed):
    """Return noisy grey images, uint8, in which a bright square's place tells the class.

    There are `share` × (k + 3) images of class k, in random order; a third of class 4 look like
    class 7 and a third of class 9 like class 2, so that no confusion matrix is symmetric.
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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("tiny"), raw_files())


def words(run, root, **options):
    """Return the options of a script; those of a short training if it has `epochs`."""
    options = {"run": run, "data": root, "device": "cpu", **options}
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


def succeed(script, *options):
    """Run a script that must succeed."""
    assert call(script, *options) == (0, "")


def fail(script, *options):
    """Run a script that must fail; return the one line that it says."""
    code, message = call(script, *options)
    assert code and message.count("\n") == 1, message
    return message


def contents(folder):
    """Return {file name: content}, so that a change anywhere shows."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny):
    run = tmp_path_factory.mktemp("runs") / "finished"
    succeed("train.py", *words(run, tiny, epochs=2))
    succeed("classify.py", *words(run, tiny), "--baselines")
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def published(run):
    """A finished run as it is committed: without its state."""
    (run / data.STATE).unlink()
    return run


def edit_json(path, **changes):
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**value, **changes}), encoding="utf-8")


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
# The model and its loss


class ReportVAE(nn.Module):
    """The report's network, written from its table: what ConvVAE is compared with."""

    def __init__(self, d):
        super().__init__()
        self.enc1, self.enc2 = nn.Conv2d(1, 32, 4, 2, 1), nn.Conv2d(32, 64, 4, 2, 1)
        self.enc3 = nn.Conv2d(64, 128, 4, 2, 1)
        self.fc_mu, self.fc_log = nn.Linear(1152, d), nn.Linear(1152, d)
        self.fc_dec = nn.Linear(d, 1152)
        self.dec1 = nn.ConvTranspose2d(128, 64, 4, 2, 1, 1)
        self.dec2 = nn.ConvTranspose2d(64, 32, 4, 2, 1)
        self.dec3 = nn.ConvTranspose2d(32, 1, 4, 2, 1)

    def forward(self, x, noise):
        h = self.enc3(self.enc2(self.enc1(x).relu()).relu()).relu().reshape(len(x), 1152)
        mu, logvar = self.fc_mu(h), self.fc_log(h)
        h = self.fc_dec(mu + (logvar / 2).exp() * noise).relu().reshape(-1, 128, 3, 3)
        return self.dec3(self.dec2(self.dec1(h).relu()).relu()).sigmoid(), mu, logvar

    def terms(self, x, noise):
        """Return BCE and KLD, summed."""
        recon, mu, logvar = self(x, noise)
        bce = F.binary_cross_entropy(recon, x, reduction="sum")
        return bce, -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


def test_weights_go_both_ways_with_the_report():
    ours, theirs, back = ConvVAE(16), ReportVAE(16), ReportVAE(16)
    ours.load_state_dict(theirs.state_dict())
    back.load_state_dict(ours.to(memory_format=torch.channels_last).state_dict())
    x = torch.rand(5, 1, 28, 28)
    torch.manual_seed(1)
    outputs = ours(x)
    torch.manual_seed(1)
    noise = torch.randn(5, 16)
    for other in (theirs, back):
        torch.testing.assert_close(outputs, other(x, noise), rtol=1e-5, atol=1e-6)
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
    bce = 3 * 0.6931472 + 0.25 * 0.2876821 + 0.75 * 1.3862944
    assert reconstruction_bce(recon_x, x).item() == pytest.approx(bce, rel=1e-6)
    assert loss_function(recon_x, x, mu, logvar).item() == pytest.approx(bce + 2.0, rel=1e-6)
    recon_x[0, 0] = torch.nan
    assert reconstruction_bce(recon_x, x).isnan()


def test_kl_divergence_against_torch_distributions():
    mu, logvar = torch.randn(6, 5), torch.randn(6, 5)
    exact = exact_kl(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(kl_divergence(mu, logvar), exact)


def test_reparameterize_samples_the_right_normal():
    torch.manual_seed(0)
    mu, logvar = torch.tensor([-1.0, 0.0, 3.0]), torch.tensor([-2.0, 0.0, 1.0])
    z = ConvVAE(3).reparameterize(mu.expand(100_000, 3), logvar.expand(100_000, 3))
    torch.testing.assert_close(z.mean(0), mu, rtol=0, atol=0.03)
    torch.testing.assert_close(z.std(0), (logvar / 2).exp(), rtol=0.02, atol=0)
    assert torch.corrcoef(z.T).fill_diagonal_(0).abs().max() < 0.02


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_transposed_convolution_keeps_the_process_wide_flag(before, channels):
    layer, x = TransposedConv2d(4, channels, 4, 2, 1), torch.rand(2, 4, 5, 5)
    try:
        torch.backends.mkldnn.enabled = before
        output = layer(x)
        assert torch.backends.mkldnn.enabled is before
        torch.testing.assert_close(output, nn.ConvTranspose2d.forward(layer, x))
        with pytest.raises(RuntimeError):
            layer(torch.rand(2, 5, 5, 5))
        assert torch.backends.mkldnn.enabled is before
    finally:
        torch.backends.mkldnn.enabled = True


# ------------------------------------------------------------------------------------------
# The data


def check_tiny_data(root):
    for is_train, (pictures, classes) in ((True, TRAIN), (False, TEST)):
        images, labels = data.load_split(root, train=is_train)
        assert images.shape == (len(pictures), 1, 28, 28) and images.dtype == torch.float32
        assert torch.equal(images[:, 0], pictures / 255)
        assert labels.dtype == torch.int64 and torch.equal(labels, classes)


def test_data_from_raw_files(tiny):
    check_tiny_data(tiny)


@pytest.mark.parametrize("where", ["the Debian package", "the data folder"])
def test_data_from_compressed_files(where, tmp_path, monkeypatch):
    root, folder = tmp_path / "data", tmp_path / "package"
    raw = root / "FashionMNIST" / "raw"
    if where == "the data folder":
        folder = raw
    folder.mkdir(parents=True)
    for name, content in raw_files().items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(data, "DEBIAN_PACKAGE", folder)
    check_tiny_data(root)
    # What is there is not unpacked again, only what is missing; half a file is worse than none.
    labels = raw / "t10k-labels-idx1-ubyte"
    labels.unlink()
    damaged = folder / f"{labels.name}.gz"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(data.UserError, match=re.escape(str(damaged))):
        data.load_split(root, train=True)
    assert not labels.exists() and {path.suffix for path in raw.iterdir()} <= {"", ".gz"}


def test_no_data_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN_PACKAGE", tmp_path / "absent")
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    message = fail("train.py", *words(tmp_path / "run", tmp_path / "data", epochs=1))
    for clue in ("127.0.0.1", "dataset-fashion-mnist", str(tmp_path / "data")):
        assert clue in message
    assert set(contents(tmp_path / "run")) == {"train.lock"}


@pytest.mark.parametrize("split", ["train", "t10k"])
@pytest.mark.parametrize(
    "images, labels",
    [
        (lambda good: good[:5000], None),
        (lambda good: b"", None),
        (lambda good: good[:2], None),
        (lambda good: bytes(range(256)) * 40, None),
        (lambda good: idx(torch.zeros(10, 5, 5)), None),
        (lambda good: idx(torch.zeros(0, 28, 28)), idx(torch.zeros(0))),
        (None, idx(torch.zeros(3))),
        (None, idx(torch.full((600,), 77))),
        (None, b""),
    ],
)
def test_spoiled_data(split, images, labels, tmp_path):
    files = raw_files(TRAIN, TRAIN)
    name = f"{split}-images-idx3-ubyte"
    if images:
        files[name] = images(files[name])
    if labels is not None:
        files[f"{split}-labels-idx1-ubyte"] = labels
    root = write_data(tmp_path / "data", files)
    assert f"{split}-*" in fail("train.py", *words(tmp_path / "run", root, epochs=1))
    assert set(contents(tmp_path / "run")) == {"train.lock"}


# ------------------------------------------------------------------------------------------
# Training


def test_the_defaults_are_the_report_s(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = vars(train.parse_arguments())
    expected = {"epochs": 100, "batch_size": 128, "lr": 5e-4, "latent_dim": 32, "model": "conv"}
    assert {name: args[name] for name in expected} == expected
    assert args["run"] == Path("runs/convvae") and args["data"] == Path("data/fashion-mnist")
    for script in ("classify.py", "plots.py"):
        assert data.command_line(script).parse_args([]).run == args["run"]


def test_training_is_the_report_s(tiny, tmp_path):
    """Two epochs against a plain loop over the report's layers, with the same random draws."""
    run, seed, lr = tmp_path / "run", 3, 2e-3
    others = {"seed": seed, "lr": lr, "batch-size": 64, "latent-dim": 8}
    succeed("train.py", *words(run, tiny, epochs=2, **others))
    torch.manual_seed(seed)
    model = ReportVAE(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    images, test_images = TRAIN[0][:, None] / 255, TEST[0][:, None] / 255
    log = []
    for epoch in (1, 2):
        torch.manual_seed(seed * 1_000_003 + epoch)
        sums = np.zeros(4)
        for batch in torch.randperm(600).split(64):
            optimizer.zero_grad()
            bce, kld = model.terms(images[batch], torch.randn(len(batch), 8))
            (bce + kld).backward()
            optimizer.step()
            sums[:2] += bce.item() / 600, kld.item() / 600
        with torch.no_grad():
            sums[2:] = [term.item() / 225 for term in model.terms(test_images, torch.randn(225, 8))]
        log.append(sums)
    rows = [{name: float(value) for name, value in row.items() if value} for row in log_of(run)]
    assert [row["epoch"] for row in rows] == [1, 2] and {row["lr"] for row in rows} == {lr}
    for row, sums in zip(rows, log):
        mine = [row[name] for name in ("train_bce", "train_kld", "test_bce", "test_kld")]
        assert mine == pytest.approx(sums, rel=2e-3)
        for split in ("train", "test"):
            assert row[f"{split}_loss"] == row[f"{split}_bce"] + row[f"{split}_kld"]
    for name, tensor in torch.load(run / data.WEIGHTS, weights_only=True).items():
        assert relative_error(tensor, model.state_dict()[name]) < 2e-3


def test_a_step_is_the_report_s_step():
    """The fast step against the report's layers on contiguous tensors, Adam written out."""
    torch.manual_seed(0)
    plain, x = ReportVAE(32), torch.rand(128, 1, 28, 28)
    fast = ConvVAE().to(memory_format=torch.channels_last)
    fast.load_state_dict(plain.state_dict())
    optimizer = torch.optim.Adam(fast.parameters(), lr=5e-4, fused=True)
    torch.manual_seed(1)
    terms = train.update(fast, optimizer, x)

    torch.manual_seed(1)
    bce, kld = plain.terms(x, torch.randn(128, 32))
    (bce + kld).backward()
    torch.testing.assert_close(terms, torch.stack((bce, kld)).detach(), rtol=1e-4, atol=0)
    references = dict(plain.named_parameters())
    for name, mine in fast.named_parameters():
        reference = references[name]
        assert relative_error(mine.grad, reference.grad) < 1e-4
        # In Adam's first step the corrected moments are the gradient and its square.
        gradient = reference.grad
        updated = reference - 5e-4 * gradient / (gradient.square().sqrt() + 1e-8)
        assert relative_error(mine, updated) < 1e-4
        assert relative_error(mine, reference) > 1e-4  # the update itself is not below that


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_step_is_the_step_itself():
    train.tune()
    images = torch.rand(20 * 32 + 7, 1, 28, 28, device="cuda")
    losses = []
    for capture in (False, True):
        torch.manual_seed(0)
        model = ConvVAE().cuda()
        optimizer = torch.optim.Adam(model.parameters(), fused=True, capturable=True)

        def step(x, model=model, optimizer=optimizer):
            return train.update(model, optimizer, x)

        if capture:
            step = train.CapturedStep(step, 32)
        terms = [step(x) for _ in range(3) for x in images.split(32)]
        losses.append(torch.stack(terms).cpu())
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)


def test_what_training_says_and_writes(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    succeed("train.py", *words(run, tiny, epochs=2, model="fc"))
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "FullyConnectedVAE on cpu, epochs 1 to 2"
    for epoch, (line, row) in enumerate(zip(lines, log_of(run), strict=True), start=1):
        losses = [f"{float(row[f'{split}_loss']):.2f}" for split in ("train", "test")]
        beginning = f"Epoch {epoch}: Train loss {losses[0]}, Test loss {losses[1]}, "
        assert line.startswith(beginning)
        assert re.fullmatch(r"\d+\.\d\d s, \d:\d\d:\d\d left", line.removeprefix(beginning))
    text = (run / data.LOG).read_text(encoding="utf-8")
    seconds = [float(row["seconds"]) for row in csv.DictReader(io.StringIO(text))]
    speed = int(
        re.fullmatch(r"Mean of the run: ([\d,]+) training images/s.*", last)[1].replace(",", "")
    )
    assert speed == pytest.approx(1200 / sum(seconds), abs=1)
    assert not torch.backends.cudnn.allow_tf32
    config = {"model": "fc", "latent_dim": 8, "batch_size": 32, "lr": 5e-4, "seed": 0, "epochs": 2}
    config |= {"torch": str(torch.__version__), "device": "cpu"}
    assert json.loads((run / data.CONFIG).read_bytes()) == config
    assert set(contents(run)) == {data.STATE, *VIEWS, "train.lock"}


def test_training_repeats_itself_and_learns(finished, tiny, tmp_path):
    log = data.read_run(finished).log
    assert log[1]["train_loss"] < 0.95 * log[0]["train_loss"]
    assert log[1]["test_loss"] < log[0]["test_loss"]
    succeed("train.py", *words(tmp_path / "again", tiny, epochs=2))
    assert_same_training(tmp_path / "again", finished)


def test_the_report_s_class_loads_a_run(finished):
    weights = torch.load(finished / data.WEIGHTS, map_location="cpu")
    ReportVAE(8).load_state_dict(weights)
    assert all(tensor.is_contiguous() for tensor in weights.values())


# ------------------------------------------------------------------------------------------
# Going on: state.pth is the truth


def test_a_finished_run_is_left_alone(run, tiny, capsys):
    before = contents(run)
    succeed("train.py", *words(run, tiny, epochs=2))
    assert "finished: 2 epochs" in capsys.readouterr().out
    succeed("train.py", *words(run, tiny, epochs=1))
    assert contents(run) == before


@pytest.fixture(scope="session")
def three_epochs(tmp_path_factory, tiny):
    run = tmp_path_factory.mktemp("three") / "run"
    succeed("train.py", *words(run, tiny, epochs=3))
    return run


def test_more_epochs_train_the_rest(run, tiny, three_epochs, monkeypatch, capsys):
    (run / data.LOG).write_bytes(b"damaged, and no part of the truth")
    succeed("train.py", *words(run, tiny, epochs=3))
    assert "epochs 3 to 3" in capsys.readouterr().out
    assert_same_training(run, three_epochs)
    assert json.loads((run / data.CONFIG).read_text(encoding="utf-8"))["epochs"] == 3


class Killed(BaseException):
    """Raised in place of a kill: nothing in the code catches it."""


# The renames of an epoch are those of the state, the settings, the weights and the log.
@pytest.mark.parametrize("renames", [0, 1, 2, 3, 4, 5, 7, 8])
def test_killed_between_two_files(renames, tiny, three_epochs, tmp_path, monkeypatch):
    run, left, replace = tmp_path / "run", renames, os.replace

    def rename(*paths):
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        replace(*paths)

    monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(Killed):
        call("train.py", *words(run, tiny, epochs=3))
    monkeypatch.undo()
    if renames % 4:  # the files of two epochs are not shown as one run
        assert str(run) in fail("classify.py", *words(run, tiny))
    succeed("train.py", *words(run, tiny, epochs=3))
    assert_same_training(run, three_epochs)
    assert contents(run).keys() == contents(three_epochs).keys()


@pytest.mark.parametrize("sent", ["SIGKILL", "SIGINT"])
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_interrupted_within_an_epoch(sent, tiny, tmp_path):
    run, slow = tmp_path / "run", {"batch-size": 8, "latent-dim": 4, "epochs": 3}
    line = [sys.executable, HERE / "train.py", *words(run, tiny, **slow)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, **pipes) as process:
        while "Epoch 1:" not in process.stdout.readline():
            assert process.poll() is None
        assert "another train.py" in fail("train.py", *words(run, tiny, **slow))
        process.send_signal(getattr(signal, sent))
        _, errors = process.communicate()
    if sent == "SIGINT":
        assert process.returncode == 130
        assert errors.count("\n") == 1 and "the same command goes on" in errors
    else:
        assert process.returncode == -signal.SIGKILL
    assert len(data.read(run / data.STATE)["log"]) < 3
    succeed("train.py", *words(run, tiny, **slow))
    succeed("train.py", *words(tmp_path / "at once", tiny, **slow))
    assert_same_training(run, tmp_path / "at once")


def test_a_second_writer_is_refused(tiny, tmp_path):
    run = tmp_path / "run"
    with train.only_writer(run, {}):
        before = contents(run)
        for others in ({}, {"lr": 0.1}):
            message = fail("train.py", *words(run, tiny, epochs=1, **others))
            assert "another train.py" in message and str(run) in message
        assert contents(run) == before
    succeed("train.py", *words(run, tiny, epochs=1))


@pytest.mark.parametrize("damage", [None, b"", b"damaged", "half"])
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_restored(view, damage, run, tiny):
    before = contents(run)
    if damage is None:
        (run / view).unlink()
    else:
        (run / view).write_bytes(
            before[view][: len(before[view]) // 2] if damage == "half" else damage
        )
    for script in ("classify.py", "plots.py"):
        message = fail(script, *words(run, tiny))
        assert view in message and "restores" in message
    succeed("train.py", *words(run, tiny, epochs=2))
    assert contents(run) == before


@pytest.mark.parametrize("files", [*([name] for name in VIEWS), [data.CLASSIFICATION], VIEWS])
def test_a_run_without_a_state_is_left_alone(files, published, tiny):
    for name in contents(published).keys() - {*files}:
        (published / name).unlink()
    before = contents(published)
    message = fail("train.py", *words(published, tiny, epochs=3))
    assert data.STATE in message and "another --run" in message
    assert contents(published) == before


def test_published_runs_are_left_alone(tiny):
    run = HERE / "results" / "latent32" / "seed0"
    before = contents(run)
    assert data.STATE in fail("train.py", "--run", run, "--data", tiny)
    assert contents(run) == before


@pytest.mark.parametrize(
    "option, value, there",
    [
        *[("latent-dim", 16, 8), ("batch-size", 64, 32), ("lr", 0.1, 0.0005), ("seed", 1, 0)],
        ("model", "fc", "conv"),
    ],
)
def test_other_settings_are_refused_by_name(option, value, there, run, tiny):
    (run / "train.lock").unlink()
    before = contents(run)
    message = fail("train.py", *words(run, tiny, epochs=3, **{option: value}))
    assert f"has {option.replace('-', '_')} {there}, not {value}:" in message
    assert contents(run) == before


def test_a_setting_that_is_new_has_its_default(run, tiny, three_epochs, monkeypatch):
    readme_table = plots.results_table(HERE / "results")
    option = {"type": data.between(float, 0, 9), "default": 1.0, "help": "new"}
    monkeypatch.setitem(data.SETTINGS, "weight", option)
    assert plots.results_table(HERE / "results") == readme_table
    assert "weight 1.0, not 2.0" in fail("train.py", *words(run, tiny, epochs=3, weight=2))
    succeed("train.py", *words(run, tiny, epochs=3))
    assert_same_training(run, three_epochs)
    assert data.read_run(run).settings["weight"] == 1.0


def test_a_loss_that_is_not_finite_stops_the_run(run, tiny, tmp_path):
    """The last good epoch stays. An overflow is provoked by weights, as no setting may change."""
    state = torch.load(run / data.STATE, weights_only=True)
    state["model"]["fc_log.bias"].fill_(1000.0)
    torch.save(state, run / data.STATE)
    message = fail("train.py", *words(run, tiny, epochs=3))
    assert "not finite in epoch 3" in message and "another --run" in message
    assert [row["epoch"] for row in data.read_run(run).log] == [1, 2]
    new = tmp_path / "new"
    assert "not finite in epoch 1" in fail("train.py", *words(new, tiny, epochs=1, lr=1000))
    succeed("train.py", *words(new, tiny, epochs=1, lr=0.001))


def test_a_full_disk_keeps_the_last_epoch(run, tiny, three_epochs):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    before = contents(run)
    (run / f"{data.STATE}.tmp").symlink_to("/dev/full")
    message = fail("train.py", *words(run, tiny, epochs=3))
    assert "No space left" in message and data.STATE in message
    assert contents(run) == before
    succeed("train.py", *words(run, tiny, epochs=3))
    assert_same_training(run, three_epochs)


# ------------------------------------------------------------------------------------------
# Bad input: one line, an exit code, and nothing overwritten


class Bomb:
    """Pickled, it would make a file where it is loaded."""

    def __reduce__(self):
        return (open, ("exploded", "w"))


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def half(content):
    return content[: len(content) // 2]


TENSORS = [half, b"", bytes(range(255, 0, -1)) * 20, pickle.dumps(Bomb()), saved(torch.zeros(3))]
OTHERS = [saved({"weight": torch.zeros(3)}), saved({"weight": "x"}), saved({})]
SPOILED = [
    *[(data.STATE, "train.py", damage) for damage in TENSORS + OTHERS],
    *[(data.WEIGHTS, "classify.py", damage) for damage in TENSORS + OTHERS],
    *[(data.WEIGHTS, "plots.py", damage) for damage in (half, OTHERS[0])],
    *[(data.LOG, "classify.py", damage) for damage in (half, b"", b"\xff\x00", b"a,b\n1,2\n")],
    (data.LOG, "plots.py", lambda content: content.replace(b"0.0005", b"nan")),
    (data.LOG, "plots.py", lambda content: content.replace(b"\n2,", b"\n3,")),
    *[(data.CONFIG, "classify.py", damage) for damage in (half, b"[]", b"{}", b"\xff")],
    (data.CONFIG, "plots.py", lambda content: content.replace(b": 2,", b': "two",')),
    (data.CONFIG, "classify.py", lambda content: content.replace(b": 8,", b': "8",')),
    (data.CONFIG, "plots.py", lambda content: content.replace(b'"conv"', b'"gan"')),
    (data.CONFIG, "plots.py", lambda content: content.replace(b": 8,", b": 9,")),
    (data.CONFIG, "classify.py", lambda content: content.replace(b'"conv"', b'"fc"')),
    *[(data.CLASSIFICATION, "classify.py", damage) for damage in (half, b"{}", b"[]")],
    (data.CLASSIFICATION, "plots.py", half),
]


@pytest.mark.parametrize("name, script, damage", SPOILED)
def test_spoiled_run(name, script, damage, run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name != data.STATE:
        (run / data.STATE).unlink()
    content = (run / name).read_bytes()
    (run / name).write_bytes(damage(content) if callable(damage) else damage)
    before = contents(run)
    epochs = {"epochs": 3} if script == "train.py" else {}
    assert name in fail(script, *words(run, tiny, **epochs))
    assert contents(run) == before and not Path("exploded").exists()


@pytest.mark.parametrize("script", ["classify.py", "plots.py"])
def test_files_of_another_run_are_noticed(script, run, tiny, tmp_path):
    other = tmp_path / "other"
    succeed("train.py", *words(other, tiny, epochs=2, seed=1))
    for name in VIEWS:
        right = (run / name).read_bytes()
        shutil.copy(other / name, run / name)
        assert f"differ from its {data.STATE}" in fail(script, *words(run, tiny))
        (run / name).write_bytes(right)
    succeed(script, *words(run, tiny))


BAD_OPTIONS = [
    *[(name, bad) for name in ("epochs", "batch-size", "latent-dim") for bad in ("0", "1.5")],
    *[("lr", bad) for bad in ("0", "-1", "nan", "inf", "fast")],
    *[("latent-dim", "100000000"), ("seed", "-1"), ("device", "tpu"), ("model", "gan")],
]


@pytest.mark.parametrize("option, value", BAD_OPTIONS)
def test_bad_options(option, value, tiny, tmp_path, capsys):
    code, _ = call("train.py", *words(tmp_path / "run", tiny, **{"epochs": 1, option: value}))
    errors = capsys.readouterr().err
    assert code and errors.count("\n") == 1 and f"--{option}" in errors and value in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["classify.py", "plots.py"])
def test_runs_that_are_not_there(script, published, tiny, tmp_path):
    (published / data.WEIGHTS).unlink()
    for folder in (tmp_path / "absent", published):
        message = fail(script, "--run", folder, "--data", tiny)
        assert str(folder) in message and "train.py" in message


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_cannot_be_written(script, run, tiny, tmp_path):
    """Where a folder stands in a file's place not even root can write the file."""
    names = {"train.py": data.STATE, "classify.py": data.CLASSIFICATION, "plots.py": "samples.png"}
    (run / f"{names[script]}.tmp").mkdir()
    epochs = {"epochs": 3} if script == "train.py" else {}
    assert names[script] in fail(script, *words(run, tiny, **epochs))
    (tmp_path / "file").touch()
    assert "file" in fail("train.py", *words(tmp_path / "file" / "run", tiny, epochs=1))


@pytest.mark.parametrize("script, promise", [("classify", "starts over"), ("plots", "starts over")])
def test_ctrl_c_ends_in_one_line(script, promise, capsys):
    def main():
        raise KeyboardInterrupt

    told = re.search(r"run_script\(main, \"(.*)\"\)", (HERE / f"{script}.py").read_text("utf-8"))[1]
    with pytest.raises(SystemExit) as end:
        data.run_script(main, told)
    errors = capsys.readouterr().err
    assert end.value.code == 130 and errors == f"Interrupted: {told}.\n" and promise in told


# ------------------------------------------------------------------------------------------
# Classification and figures of merit


def test_classification_by_hand(finished):
    """Everything in classification.json, computed again with the report's layers."""
    found = json.loads((finished / data.CLASSIFICATION).read_text(encoding="utf-8"))
    model = ReportVAE(8).double()
    model.load_state_dict(torch.load(finished / data.WEIGHTS, weights_only=True))
    (train_x, train_y), (test_x, test_y) = ((x[:, None] / 255, y) for x, y in (TRAIN, TEST))
    with torch.no_grad():
        codes = [model(x.double(), torch.zeros(8))[1].float() for x in (train_x, test_x)]

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
    assert found["active_dimensions"] == (codes[1].var(dim=0) > 0.01).sum()
    assert found["epoch"] == 2


def test_latent_means_are_computed_in_double_precision():
    torch.manual_seed(0)
    model, images = ConvVAE(6), torch.rand(200, 1, 28, 28)
    mu = classify.latent_means(model, images)
    with torch.no_grad():
        exact = model.double().encode(images.double())[0]
    assert mu.dtype == torch.float32 and torch.equal(mu, exact.float())


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
    merit = classify.figures_of_merit(model, images)
    assert merit["excess_bce"] == merit["mse"] == 0
    assert merit["sharpness_reconstructions"] == 1
    assert merit["kld"] == pytest.approx(16.0)  # ½ μ² in each of 32 dimensions
    entropy = -(images * images.log() + (1 - images) * (1 - images).log()).sum() / 3000
    assert merit["bce_floor"] == pytest.approx(entropy.item(), rel=1e-4)
    # 28 × 27 steps of height z², whose square has a mean of 3 where z ~ N(0, I); those of
    # uniform noise have a mean square of 1/6, in two directions.
    assert merit["sharpness_samples"] == pytest.approx(3 / (2 / 6), rel=0.15)

    model.picture = lambda x: torch.full_like(x, 0.5)
    merit = classify.figures_of_merit(model, images)
    assert merit["sharpness_reconstructions"] == 0
    assert merit["mse"] == pytest.approx(1 / 12, rel=0.02)  # the variance of uniform noise
    assert merit["bce"] == pytest.approx(784 * math.log(2), rel=1e-5)
    assert merit["excess_bce"] == pytest.approx(merit["bce"] - entropy.item(), rel=1e-4)
    step = torch.zeros(1, 1, 28, 28)
    step[..., :14] = 0.5
    assert classify.gradient_energy(step) == classify.gradient_energy(step.mT) == 28 * 0.25


def test_baselines(run, tiny, tmp_path):
    before = contents(run)
    succeed("classify.py", *words(run, tiny))
    assert contents(run) == before  # those of before are kept
    wide = tmp_path / "wide"
    succeed("train.py", *words(wide, tiny, epochs=1, **{"latent-dim": 601, "model": "fc"}))
    assert "600" in fail("classify.py", *words(wide, tiny), "--baselines")
    succeed("classify.py", *words(wide, tiny))
    assert json.loads((wide / data.CLASSIFICATION).read_bytes())["baselines"] is None


# ------------------------------------------------------------------------------------------
# Figures and the results table


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


def test_figures_show_the_run(run, tiny, figures, tmp_path):
    other = tmp_path / "other"
    succeed("train.py", *words(other, tiny, epochs=1, model="fc"))
    succeed("plots.py", *words(run, tiny), "--compare", other)
    log = data.read_run(run).log
    for axis, loss in zip(figures["loss_curves.png"].axes, ("loss", "bce", "kld"), strict=True):
        for line, split, color in zip(axis.lines, ("train", "test"), ("blue", "orange")):
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
        samples = models[0].decode(torch.randn(100, 8))[:, 0]
        mu = models[0].encode(TEST[0][:, None] / 255)[0]
    grid = figures["reconstructions.png"]
    torch.testing.assert_close(shown(grid), torch.cat(rows))
    assert [axis.get_title() for axis in grid.axes[:10]] == data.CLASSES
    names = [axis.get_ylabel() for axis in grid.axes[::10]]
    assert names == ["original", "ConvVAE", "Fully\nconnected\nVAE"]
    torch.testing.assert_close(shown(figures["samples.png"]), samples)
    assert {image.get_clim() for axis in grid.axes for image in axis.images} == {(0, 1)}
    for axis, name in zip(figures["latent_space.png"].axes, ("PCA", "t-SNE"), strict=True):
        points = axis.collections[0]
        assert axis.get_title() == f"{name} of μ, 225 test images"
        assert points.get_array().tolist() == TEST[1].tolist()
    pca = figures["latent_space.png"].axes[0].collections[0].get_offsets()
    assert np.allclose(np.abs(pca), np.abs(PCA(2).fit_transform(mu)), atol=1e-3)
    matrix = figures["confusion_matrix.png"].axes[0]
    found = json.loads((run / data.CLASSIFICATION).read_bytes())
    counts = [int(text.get_text()) for text in matrix.texts]
    assert counts == np.ravel(found["confusion_matrix"]).tolist()
    assert f"epoch 2: {found['accuracy'] * 100:.2f} %" in matrix.get_title()
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("Predicted label", "True label")


def test_one_latent_dimension_can_be_drawn(tiny, tmp_path, figures):
    run = tmp_path / "run"
    succeed("train.py", *words(run, tiny, epochs=1, **{"latent-dim": 1}))
    succeed("classify.py", *words(run, tiny))
    succeed("plots.py", *words(run, tiny))
    assert len(figures) == 5


def test_the_classification_of_other_weights_is_not_shown(run, tiny, figures, capsys):
    def drawn():
        figures.clear()
        succeed("plots.py", *words(run, tiny))
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
    without_digest = json.loads((run / data.CLASSIFICATION).read_bytes())
    del without_digest["sha256"]
    (run / data.CLASSIFICATION).write_text(json.dumps(without_digest), encoding="utf-8")
    assert drawn() == (True, "")
    edit_json(run / data.CLASSIFICATION, epoch=1)
    assert drawn()[0] is False
    (run / data.CLASSIFICATION).unlink()
    assert "is missing" in drawn()[1]


def test_results_table(run, tmp_path, capsys):
    assert "no classified runs" in fail("plots.py", "--table", tmp_path)
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
        edit_json(path / data.CONFIG, epochs=100, lr=lr)
        edit_json(path / data.CLASSIFICATION, epoch=epoch, baselines=baselines)
    capsys.readouterr()
    succeed("plots.py", "--table", tmp_path / "table")
    output = capsys.readouterr()
    assert "outdated" in output.err and f"{path} is at epoch 2 of 100" in output.err
    table = [[cell.strip() for cell in row.split("|")[1:-1]] for row in output.out.splitlines()]
    (first, last), head = data.read_run(run).log, table[0]
    other, two = (dict(zip(head, row)) for row in table[2:4])
    assert (two["Codes"], two["Dimensions"], two["n"]) == ("ConvVAE, epochs 2", "8", "2")
    assert other["Codes"] == "ConvVAE, batch size 32, lr 0.1, epochs 2" and other["n"] == "1"
    assert two["Accuracy, %"] == "55.00 ± 7.07" and two["MSE × 1000"] == "10.00 ± 0.00"
    found = json.loads((run / data.CLASSIFICATION).read_bytes())
    values = [first["train_loss"], last["train_loss"], last["test_loss"]]
    values += [last["test_loss"] - last["train_loss"], found["excess_bce"], found["kld"]]
    values += [found["mse"] * 1000, found["sharpness_reconstructions"], found["sharpness_samples"]]
    values += [found["active_dimensions"], found["accuracy"] * 100]
    digits = [len(other[name].partition(".")[2]) for name in head[3:]]
    assert [other[name] for name in head[3:]] == [f"{v:.{d}f}" for v, d in zip(values, digits)]
    assert table[4][:2] == ["PCA", "8"] and table[4][-1] == "25.00"
    assert table[5][:2] == ["raw pixels", "784"] and table[5][-1] == "75.00" and len(table) == 6


def test_the_readme_s_table_is_that_of_the_results():
    table = plots.results_table(HERE / "results")
    assert table.count("\n") >= 5
    assert table in (HERE / "README.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------
# The three scripts, as a user runs them


def test_the_scripts_as_a_user_runs_them(tiny, tmp_path):
    """With an encoding, as on Windows, that has no μ and no −."""
    run, output = tmp_path / "table" / "any" / "seed0", []
    settings = ["--epochs", 3, "--batch-size", 32]
    scripts = [("train.py", *settings), ("plots.py",), ("classify.py",), ("plots.py",)]
    for script, *options in [*scripts, ("plots.py", "--table", tmp_path / "table")]:
        line = [sys.executable, HERE / script, *words(run, tiny), *map(str, options)]
        environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
        done = subprocess.run(line, check=False, capture_output=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        output.append((done.stdout.decode("utf-8"), done.stderr.decode("utf-8")))
    assert f"classify.py --run {run}" in output[1][1]
    assert [errors for _, errors in (output[0], *output[2:])] == [""] * 4
    figures = ("loss_curves", "reconstructions", "samples", "latent_space", "confusion_matrix")
    assert output[3][0].splitlines() == [str(run / f"{name}.png") for name in figures]
    for name in figures:
        picture = torch.from_numpy(plots.plt.imread(run / f"{name}.png"))
        assert min(picture.shape[:2]) > 250 and picture[..., :3].std() > 0.05
    found = json.loads((run / data.CLASSIFICATION).read_bytes())
    assert f"Classification accuracy: {found['accuracy'] * 100:.2f}%\n" in output[2][0]
    for name, counts in zip(data.CLASSES, found["confusion_matrix"]):
        row = f"{name} {' '.join(map(str, counts))} {found['recall'][name] * 100:.1f}% right"
        assert row.split() in [line.split() for line in output[2][0].splitlines()]
    for name in ("bce", "kld", "mse", "sharpness_reconstructions", "active_dimensions"):
        assert f"{name}: {found[name]:.4g}\n" in output[2][0]
    assert "Test − train" in output[4][0]
