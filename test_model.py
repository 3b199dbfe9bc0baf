"""Tests of the whole project. They need neither the network nor the data set."""

import csv
import gzip
import json
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl
from torchvision.datasets import FashionMNIST

import classify
import data
import plots
import train
from model import (
    MODELS,
    ConvVAE,
    FullyConnectedVAE,
    kl_divergence,
    load_model,
    loss_function,
    reconstruction_bce,
)

HERE = Path(__file__).parent
SCRIPTS = {"train.py": train, "classify.py": classify, "plots.py": plots}


# ------------------------------------------------------------------------------------------
# A tiny data set in the real format, and scripts as functions


def idx(array):
    """Return a uint8 tensor in the IDX format of the MNIST family."""
    header = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    return header + array.to(torch.uint8).numpy().tobytes()


def easy_images(count, seed):
    """Return noisy grey images, uint8, in which a bright square's place tells the class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (count, 28, 28), generator=generator)
    labels = torch.arange(count) % 10
    for image, label in zip(images, labels):
        row, column = divmod(label.item(), 4)
        image[2 + 8 * row :, 2 + 6 * column :][:7, :6] += 180
    return images.to(torch.uint8), labels


def raw_files(train_count=600, test_count=200):
    """Return {file name: content} of a data set of easy images."""
    files = {}
    for prefix, count in (("train", train_count), ("t10k", test_count)):
        images, labels = easy_images(count, seed=count)
        files[f"{prefix}-images-idx3-ubyte"] = idx(images)
        files[f"{prefix}-labels-idx1-ubyte"] = idx(labels)
    return files


def write_data(root, files):
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return root


@pytest.fixture(scope="session")
def easy_data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("easy"), raw_files())


def command(script, *options):
    """Return the command line that a user would type."""
    return [sys.executable, str(HERE / script), *map(str, options)]


def call(script, *options):
    """Run a script in this process; return its exit code and, if it failed, its last word."""
    argv, sys.argv = sys.argv, [script, *map(str, options)]
    try:
        data.run_script(SCRIPTS[script].main)
    except SystemExit as end:
        return (1, end.code + "\n") if isinstance(end.code, str) else (end.code, "")
    finally:
        sys.argv = argv
    return 0, ""


def train_options(run, root, **others):
    """Return the options of a short training run."""
    options = {
        "run": run,
        "data": root,
        "device": "cpu",
        "epochs": 2,
        "batch-size": 32,
        **others,
    }
    return [word for name, value in options.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, easy_data):
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert call("train.py", *train_options(run, easy_data)) == (0, "")
    assert call(
        "classify.py", "--run", run, "--data", easy_data, "--device", "cpu"
    ) == (0, "")
    return run


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a finished run, to spoil."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def contents(folder):
    """Return {file name: content}, so that a change anywhere shows."""
    return (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        if folder.exists()
        else {}
    )


def without_seconds(run):
    """Return the loss log as the text it is, but for the one column that may differ."""
    with open(run / data.LOSSES) as file:
        return [{**row, "seconds": None} for row in csv.DictReader(file)]


def assert_same_training(run, other):
    assert without_seconds(run) == without_seconds(other)
    weights, others = (
        torch.load(r / data.WEIGHTS, weights_only=True) for r in (run, other)
    )
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
        self.dec2, self.dec3 = (
            nn.ConvTranspose2d(64, 32, 4, 2, 1),
            nn.ConvTranspose2d(32, 1, 4, 2, 1),
        )

    def forward(self, x, noise):
        h = (
            self.enc3(self.enc2(self.enc1(x).relu()).relu())
            .relu()
            .reshape(len(x), 1152)
        )
        mu, logvar = self.fc_mu(h), self.fc_log(h)
        h = self.fc_dec(mu + (logvar / 2).exp() * noise).relu().reshape(-1, 128, 3, 3)
        return self.dec3(self.dec2(self.dec1(h).relu()).relu()).sigmoid(), mu, logvar


def test_layer_sizes_and_parameters():
    model, sizes = ConvVAE(), {}
    for name, layer in model.named_children():
        layer.register_forward_hook(
            lambda _, __, out, name=name: sizes.update({name: out.shape[1:]})
        )
    model(torch.rand(2, 1, 28, 28))
    assert {name: tuple(size) for name, size in sizes.items()} == {
        "enc1": (32, 14, 14),
        "enc2": (64, 7, 7),
        "enc3": (128, 3, 3),
        "fc_mu": (32,),
        "fc_log": (32,),
        "fc_dec": (1152,),
        "dec1": (64, 7, 7),
        "dec2": (32, 14, 14),
        "dec3": (1, 28, 28),
    }
    assert sum(parameter.numel() for parameter in model.parameters()) == 440_833


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
        for mine, reports in zip(outputs, other(x, noise)):
            torch.testing.assert_close(mine, reports, rtol=1e-5, atol=1e-6)


def test_fully_connected_layers():
    sizes = [tuple(p.shape) for p in FullyConnectedVAE(7).parameters() if p.dim() == 2]
    assert sizes == [(400, 784), (7, 400), (7, 400), (400, 7), (784, 400)]


def test_loss_by_hand():
    x = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    recon_x = torch.tensor([[0.5, 0.5], [0.5, 0.75]])
    mu, logvar = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.0]])
    # log 2 for three of the pixels; −(¼ log ¾ + ¾ log ¼) for the last; ½ μ² for the KLD.
    bce = 3 * 0.6931472 + 0.25 * 0.2876821 + 0.75 * 1.3862944
    assert reconstruction_bce(recon_x, x).item() == pytest.approx(bce, rel=1e-6)
    assert loss_function(recon_x, x, mu, logvar).item() == pytest.approx(
        bce + 2.0, rel=1e-6
    )


def test_kl_divergence_against_torch_distributions():
    mu, logvar = torch.randn(6, 5), torch.randn(6, 5)
    exact = exact_kl(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(kl_divergence(mu, logvar), exact)


def test_reconstruction_of_nan_costs_nan():
    assert reconstruction_bce(
        torch.tensor([0.5, torch.nan]), torch.tensor([0.5, 0.5])
    ).isnan()


def test_reparameterize_samples_the_right_normal():
    torch.manual_seed(0)
    mu, logvar = torch.tensor([-1.0, 0.0, 3.0]), torch.tensor([-2.0, 0.0, 1.0])
    z = ConvVAE(3).reparameterize(mu.expand(100_000, 3), logvar.expand(100_000, 3))
    torch.testing.assert_close(z.mean(0), mu, rtol=0, atol=0.03)
    torch.testing.assert_close(z.std(0), (logvar / 2).exp(), rtol=0.02, atol=0)
    assert torch.corrcoef(z.T).fill_diagonal_(0).abs().max() < 0.02


@pytest.mark.parametrize("kind", MODELS.values())
def test_gradients_reach_every_parameter(kind):
    model, x = kind(8), torch.rand(16, 1, 28, 28)
    reconstruction, mu, logvar = model(x)
    loss_function(reconstruction, x, mu, logvar).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("kind", MODELS.values())
def test_decode_stays_in_the_unit_interval(kind):
    pictures = kind(8).decode(1000 * torch.randn(50, 8))
    assert pictures.shape == (50, 1, 28, 28)
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert pictures.std() > 0.1  # that far out, pixels are black or white


@pytest.mark.parametrize("kind", MODELS.values())
def test_load_model_finds_class_and_latent_dimension(kind, tmp_path):
    model = kind(5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = load_model(tmp_path / "weights.pth", "cpu")
    assert type(loaded) is kind
    x = torch.rand(3, 1, 28, 28)
    assert torch.equal(loaded.encode(x)[0], model.encode(x)[0])


# ------------------------------------------------------------------------------------------
# The data


def check_easy_split(root):
    images, labels = data.load_split(root, train=False)
    expected, expected_labels = easy_images(200, seed=200)
    assert images.shape == (200, 1, 28, 28) and images.dtype == torch.float32
    assert images.min() == 0 and 0.9 < images.max() <= 1
    assert torch.equal(images[:, 0], expected / 255)
    assert labels.dtype == torch.int64 and torch.equal(labels, expected_labels)
    assert len(data.load_split(root, train=True)[0]) == 600


def test_data_from_raw_files(easy_data):
    check_easy_split(easy_data)


@pytest.mark.parametrize("where", ["the Debian package", "the data folder"])
def test_data_from_compressed_files(where, tmp_path, monkeypatch):
    root, folder = tmp_path / "data", tmp_path / "package"
    if where == "the data folder":
        folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in raw_files().items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(data, "DEBIAN_PACKAGE", folder)
    check_easy_split(root)


def test_no_data_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN_PACKAGE", tmp_path / "absent")
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    code, message = call(
        "train.py", *train_options(tmp_path / "run", tmp_path / "data")
    )
    assert code and message.count("\n") == 1
    for clue in ("127.0.0.1", "dataset-fashion-mnist", str(tmp_path / "data")):
        assert clue in message
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------
# Training


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


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
    reconstruction, mu, logvar = plain(x, torch.randn(128, 32))
    bce = F.binary_cross_entropy(reconstruction, x, reduction="sum")
    kld = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()
    (bce + kld).backward()
    torch.testing.assert_close(
        terms, torch.stack((bce, kld)).detach(), rtol=1e-4, atol=0
    )
    references = dict(plain.named_parameters())
    for name, mine in fast.named_parameters():
        reference = references[name]
        assert relative_error(mine.grad, reference.grad) < 1e-4
        # In Adam's first step the corrected moments are the gradient and its square.
        gradient = reference.grad
        updated = reference - 5e-4 * gradient / (gradient.square().sqrt() + 1e-8)
        assert relative_error(mine, updated) < 1e-4
        assert (
            relative_error(mine, reference) > 1e-4
        )  # the update itself is not below that


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_step_is_the_step_itself():
    torch.backends.cudnn.allow_tf32 = False
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
        losses.append(
            torch.stack([step(x) for _ in range(3) for x in images.split(32)]).cpu()
        )
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)


def test_training_lowers_the_loss_and_repeats_itself(
    finished_run, easy_data, tmp_path, capsys
):
    log = data.read_losses(finished_run / data.LOSSES)
    assert log[1]["train_loss"] < 0.95 * log[0]["train_loss"]
    assert log[1]["test_loss"] < log[0]["test_loss"]
    for row in log:
        for split in ("train", "test"):
            assert row[f"{split}_loss"] == row[f"{split}_bce"] + row[f"{split}_kld"]

    assert call("train.py", *train_options(tmp_path / "again", easy_data))[0] == 0
    assert_same_training(tmp_path / "again", finished_run)
    lines = capsys.readouterr().out.splitlines()
    number = r"\d+\.\d\d"
    pattern = rf"Epoch 1: Train loss {number}, Test loss {number}, {number} s, \d:\d\d:\d\d left"
    assert sum(bool(re.fullmatch(pattern, line)) for line in lines) == 1
    assert "images/s" in lines[-1]
    assert (
        call("train.py", *train_options(tmp_path / "other", easy_data, seed=1))[0] == 0
    )
    assert without_seconds(tmp_path / "other") != without_seconds(finished_run)


def test_the_report_s_class_loads_a_run(finished_run):
    weights = torch.load(finished_run / data.WEIGHTS, map_location="cpu")
    ReportVAE(32).load_state_dict(weights)


def test_a_finished_run_is_left_alone(run, easy_data, capsys):
    before = contents(run)
    assert call("train.py", *train_options(run, easy_data))[0] == 0
    assert "finished" in capsys.readouterr().out
    assert contents(run) == before


def test_more_epochs_train_the_rest(run, easy_data, tmp_path):
    assert call("train.py", *train_options(run, easy_data, epochs=3))[0] == 0
    assert (
        call("train.py", *train_options(tmp_path / "at once", easy_data, epochs=3))[0]
        == 0
    )
    assert_same_training(run, tmp_path / "at once")


@pytest.mark.parametrize(
    "option, value",
    {"latent-dim": 16, "batch-size": 64, "lr": 0.1, "seed": 1, "model": "fc"}.items(),
)
def test_other_settings_are_refused_by_name(option, value, run, easy_data):
    before = contents(run)
    code, message = call("train.py", *train_options(run, easy_data, **{option: value}))
    assert code and message.count("\n") == 1
    assert option.replace("-", "_") in message and str(value) in message
    assert contents(run) == before


def test_fresh_starts_over(run, easy_data, tmp_path):
    options = train_options(run, easy_data, **{"latent-dim": 4, "epochs": 1})
    assert call("train.py", *options, "--fresh")[0] == 0
    assert load_model(run / data.WEIGHTS, "cpu").fc_mu.out_features == 4
    assert not (
        run / data.CLASSIFICATION
    ).exists()  # it was of the weights that are gone


def test_a_loss_that_is_not_finite_stops_the_run(run, easy_data):
    """The last good epoch stays. An overflow is provoked by weights, as no setting may change."""
    state = torch.load(run / data.STATE, weights_only=True)
    state["model"]["fc_log.bias"].fill_(1000.0)
    torch.save(state, run / data.STATE)
    before = contents(run)
    del before[data.CONFIG]  # more epochs are asked for, and it says so
    code, message = call("train.py", *train_options(run, easy_data, epochs=3))
    assert code and message.count("\n") == 1 and "not finite in epoch 3" in message
    assert {**contents(run), **before} == contents(run)


# ------------------------------------------------------------------------------------------
# Interrupted runs

SLOW = {"batch-size": 8, "epochs": 3}  # an epoch lasts long enough to be interrupted


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, easy_data):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    subprocess.run(
        command("train.py", *train_options(run, easy_data, **SLOW)), check=True
    )
    return run


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_within_an_epoch(sent, uninterrupted, easy_data, tmp_path):
    run = tmp_path / "run"
    words = command("train.py", *train_options(run, easy_data, **SLOW))
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as process:
        while "Epoch 1:" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.2)
        process.send_signal(sent)
        _, errors = process.communicate()
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert errors.count("\n") == 1 and "the same command" in errors
    else:
        assert process.returncode == -signal.SIGKILL
    assert 1 <= len(data.read_losses(run / data.LOSSES)) < 3
    subprocess.run(words, check=True)
    assert_same_training(run, uninterrupted)


KILL_AT_RENAME = """
import os, signal, sys
rename, left = os.replace, int(sys.argv.pop(1))
def replace(*paths):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*paths)
os.replace = replace
import data, train
data.run_script(train.main)
"""


# The renames are: config; state, weights and log of epoch 1; those of epoch 2; those of epoch 3.
@pytest.mark.parametrize("count", [1, 6, 7])
def test_killed_between_the_writes_of_an_epoch(
    count, uninterrupted, easy_data, tmp_path
):
    run = tmp_path / "run"
    options = train_options(run, easy_data, **SLOW)
    words = [sys.executable, "-c", KILL_AT_RENAME, str(count), *map(str, options)]
    assert subprocess.run(words, check=False, cwd=HERE).returncode == -signal.SIGKILL
    assert call("train.py", *options)[0] == 0
    assert_same_training(run, uninterrupted)
    for path in (run, uninterrupted):
        assert (
            call("classify.py", "--run", path, "--data", easy_data, "--device", "cpu")[
                0
            ]
            == 0
        )
    assert (
        contents(run)[data.CLASSIFICATION]
        == contents(uninterrupted)[data.CLASSIFICATION]
    )


def test_a_full_disk_keeps_the_last_epoch(run, easy_data):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    before = contents(run)
    del before[data.CONFIG]
    (run / f"{data.WEIGHTS}.tmp").symlink_to("/dev/full")
    code, message = call("train.py", *train_options(run, easy_data, epochs=3))
    assert code and "No space left" in message and message.count("\n") == 1
    after = contents(run)
    del after[data.CONFIG]
    assert after == before


# ------------------------------------------------------------------------------------------
# Bad input: one line, an exit code, and nothing overwritten


class Bomb:
    """Pickled, it would make a file where it is loaded."""

    def __reduce__(self):
        return (open, ("exploded", "w"))


DAMAGE = {
    "cut short": lambda content: content[: len(content) // 2],
    "random bytes": lambda content: bytes(range(255, 0, -1)) * 20,
    "empty": lambda content: b"",
}
DAMAGE_TO_TENSORS = {
    **DAMAGE,
    "code": lambda content: pickle.dumps(Bomb()),
    "another model": lambda content: data.to_bytes({"weight": torch.zeros(3)}),
    "no dict": lambda content: data.to_bytes(torch.zeros(3)),
}
SPOILED = [
    *((data.STATE, "train.py", damage) for damage in DAMAGE_TO_TENSORS.values()),
    *((data.WEIGHTS, "classify.py", damage) for damage in DAMAGE_TO_TENSORS.values()),
    (data.WEIGHTS, "plots.py", DAMAGE["cut short"]),
    *(
        (name, script, damage)
        for name in (data.CONFIG, data.LOSSES)
        for script in SCRIPTS
        for damage in (DAMAGE["random bytes"], lambda content: content[:-40])
    ),
    (data.LOSSES, "plots.py", lambda content: content.replace(b"0.0005", b"nan")),
    (data.CONFIG, "plots.py", lambda content: b"[]"),
    (data.CONFIG, "train.py", lambda content: b"{}"),
    (data.CLASSIFICATION, "classify.py", DAMAGE["cut short"]),
    (data.CLASSIFICATION, "plots.py", lambda content: b"{}"),
]


@pytest.mark.parametrize("name, script, damage", SPOILED)
def test_spoiled_run(name, script, damage, run, easy_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run / name).write_bytes(damage((run / name).read_bytes()))
    before = contents(run)
    options = train_options(run, easy_data, epochs=3)
    code, message = call(script, *(options if script == "train.py" else options[:6]))
    assert code and message.count("\n") == 1 and name in message
    if script == "plots.py":  # the figures before the one that failed may be there
        assert {**contents(run), **before} == contents(run)
    else:
        assert contents(run) == before
    assert not Path("exploded").exists()


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
    files = raw_files(600, 600)
    if images:
        files[f"{split}-images-idx3-ubyte"] = images(
            files[f"{split}-images-idx3-ubyte"]
        )
    if labels is not None:
        files[f"{split}-labels-idx1-ubyte"] = labels
    root = write_data(tmp_path / "data", files)
    code, message = call("train.py", *train_options(tmp_path / "run", root))
    assert code and message.count("\n") == 1 and f"{split}-*" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option, value",
    [
        *(
            (name, bad)
            for name in ("epochs", "batch-size", "latent-dim")
            for bad in ("0", "-3", "1.5")
        ),
        *(("lr", bad) for bad in ("0", "-1", "nan", "inf", "fast")),
        ("seed", "-1"),
        ("device", "tpu"),
        pytest.param(
            "device",
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it is there"),
        ),
        ("model", "gan"),
    ],
)
def test_bad_options(option, value, easy_data, tmp_path, capsys):
    options = train_options(tmp_path / "run", easy_data, **{option: value})
    code, _ = call("train.py", *options)
    errors = capsys.readouterr().err
    assert code and errors.count("\n") == 1 and f"--{option}" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["classify.py", "plots.py"])
def test_runs_that_are_not_there(script, run, easy_data, tmp_path):
    (run / data.WEIGHTS).unlink()
    (tmp_path / "begun").mkdir()
    shutil.copy(run / data.CONFIG, tmp_path / "begun")
    for folder in (tmp_path / "absent", tmp_path / "begun", run):
        code, message = call(script, "--run", folder, "--data", easy_data)
        assert code and message.count("\n") == 1
        assert str(folder) in message and "train.py" in message


def test_an_unfinished_run_is_measured_with_a_remark(run, easy_data, capsys):
    config = json.loads((run / data.CONFIG).read_text())
    (run / data.CONFIG).write_text(json.dumps({**config, "epochs": 50}))
    assert call("classify.py", "--run", run, "--data", easy_data)[0] == 0
    assert "unfinished, at epoch 2 of 50" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_cannot_be_written(script, run, easy_data, tmp_path):
    """Where a folder stands in a file's place not even root can write the file."""
    name = {
        "train.py": data.STATE,
        "classify.py": data.METRICS,
        "plots.py": data.SAMPLES,
    }[script]
    (run / f"{name}.tmp").mkdir()
    options = train_options(run, easy_data, epochs=3)
    code, message = call(script, *(options if script == "train.py" else options[:6]))
    assert code and message.count("\n") == 1 and name in message
    (tmp_path / "file").touch()
    code, message = call(
        "train.py", *train_options(tmp_path / "file" / "run", easy_data)
    )
    assert code and message.count("\n") == 1 and "file" in message


def test_weights_without_a_config_are_not_overwritten(run, easy_data):
    (run / data.CONFIG).unlink()
    before = contents(run)
    code, message = call("train.py", *train_options(run, easy_data))
    assert code and "--fresh" in message
    assert contents(run) == before


# ------------------------------------------------------------------------------------------
# The three scripts, as a user runs them


def test_the_scripts_as_a_user_runs_them(easy_data, tmp_path):
    shared = ["--run", tmp_path / "run", "--data", easy_data, "--device", "cpu"]
    output = []
    for words in (
        command("train.py", *shared, "--epochs", 3, "--batch-size", 32),
        command("plots.py", *shared),
        command("classify.py", *shared, "--baselines"),
        command("plots.py", *shared),
    ):
        done = subprocess.run(
            words, check=False, capture_output=True, text=True, cwd=tmp_path
        )
        assert (done.returncode, done.stderr) == (0, "")
        output.append(done.stdout)
    assert set(contents(tmp_path / "run")) == set(data.RUN_FILES)
    remark = f"first python classify.py --run {tmp_path / 'run'}"
    assert remark in output[1] and remark not in output[3]

    result = data.read_json(
        tmp_path / "run" / data.CLASSIFICATION, ["accuracy", "baselines"]
    )
    matrix = torch.tensor(result["confusion_matrix"])
    assert (
        matrix.shape == (10, 10) and (matrix.sum(1) == 20).all()
    )  # rows are the true classes
    assert result["accuracy"] == matrix.trace().item() / 200 > 0.8
    assert f"Classification accuracy: {result['accuracy'] * 100:.2f}%\n" in output[2]
    assert set(result["recall"]) == set(data.CLASSES)
    assert result["baselines"].keys() == {"pixels", "pca"}
    assert min(result["baselines"].values()) > 0.8
    for name in data.FIGURES:
        picture = torch.from_numpy(plots.plt.imread(tmp_path / "run" / name))
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.05


def test_the_fully_connected_vae_runs_like_the_other(run, easy_data, tmp_path):
    other = tmp_path / "fc"
    assert call("train.py", *train_options(other, easy_data, model="fc"))[0] == 0
    shared = ["--data", easy_data, "--device", "cpu"]
    assert call("classify.py", "--run", other, *shared)[0] == 0
    assert call("plots.py", "--run", run, *shared)[0] == 0
    height = plots.plt.imread(run / data.RECONSTRUCTIONS).shape[0]
    assert call("plots.py", "--run", run, *shared, "--compare", other)[0] == 0
    assert plots.plt.imread(run / data.RECONSTRUCTIONS).shape[0] > 1.3 * height


def test_baselines_survive_a_second_classification(run, easy_data):
    shared = ["--run", run, "--data", easy_data, "--device", "cpu"]
    assert call("classify.py", *shared, "--baselines")[0] == 0
    before = contents(run)
    assert call("classify.py", *shared)[0] == 0
    assert contents(run) == before


def test_an_outdated_confusion_matrix_is_not_drawn(run, easy_data, capsys):
    assert call("train.py", *train_options(run, easy_data, epochs=3))[0] == 0
    assert call("plots.py", "--run", run, "--data", easy_data)[0] == 0
    assert f"No {data.CONFUSION_MATRIX} yet" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------
# Figures of merit and the README


def test_figures_of_merit_of_a_perfect_and_of_a_grey_model():
    images = torch.rand(300, 1, 28, 28)

    class Fixed(ConvVAE):
        def forward(self, x):
            mu = torch.ones(len(x), 32)
            return self.picture(x), mu, torch.zeros(len(x), 32)

    model = Fixed()
    model.picture = lambda x: x
    merit = classify.figures_of_merit(model, images)
    assert merit["excess_bce"] == merit["mse"] == 0
    assert merit["sharpness_reconstructions"] == 1
    assert merit["kld"] == pytest.approx(16.0)  # ½ μ² in each of 32 dimensions
    entropy = -(images * images.log() + (1 - images) * (1 - images).log()).sum() / 300
    assert merit["bce_floor"] == pytest.approx(entropy.item(), rel=1e-4)
    assert 0 < merit["sharpness_samples"] < 0.1  # an untrained decoder's grey

    model.picture = lambda x: torch.full_like(x, 0.5)
    merit = classify.figures_of_merit(model, images)
    assert merit["sharpness_reconstructions"] == 0
    assert merit["mse"] == pytest.approx(
        1 / 12, rel=0.02
    )  # the variance of uniform noise
    assert merit["bce"] == pytest.approx(784 * 0.6931472, rel=1e-5)


def test_active_dimensions():
    mu = torch.randn(1000, 4) * torch.tensor([1.0, 0.2, 0.05, 0.0]) + 3
    assert classify.active_dimensions(mu) == 2


def test_latent_means_are_the_encoder_s():
    model, images = ConvVAE(6), torch.rand(200, 1, 28, 28)
    mu = classify.latent_means(model, images)
    assert mu.dtype == torch.float32
    torch.testing.assert_close(
        mu, model.encode(images)[0].detach(), rtol=1e-4, atol=1e-5
    )


def test_results_table_over_seeds(finished_run, tmp_path):
    assert call("plots.py", "--table", tmp_path)[0] != 0  # nothing there yet
    for seed in range(2):
        shutil.copytree(finished_run, tmp_path / "setting" / f"seed{seed}")
    path = tmp_path / "setting" / "seed1" / data.CLASSIFICATION
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "accuracy": result["accuracy"] - 0.5}))
    rows = plots.results_table(tmp_path).splitlines()
    assert len(rows) == 3 and rows[2].startswith("| ConvVAE | 32 | 2 |")
    middle = result["accuracy"] * 100 - 25
    assert rows[2].endswith(f"| {middle:.2f} ± {50 / 2**0.5:.2f} |")


def test_the_readme_s_table_is_that_of_the_results():
    table = plots.results_table(HERE / "results")
    assert table.count("\n") >= 5
    assert table in (HERE / "README.md").read_text()
