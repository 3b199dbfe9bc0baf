"""The networks and their loss, trained runs of them, and latent means."""

import contextlib
import copy
import csv
import hashlib
import io
import json
import math
import pickle
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from data import UserError

# --- Networks -----------------------------------------------------------------------------


class VAE(nn.Module):
    """A variational autoencoder (Kingma & Welling, 2014). Base class of the networks in MODELS.

    Images x are [N, 1, 28, 28] float32 in [0, 1]. Latent means mu, log variances logvar and latent
    codes z are [N, latent_dim].

    A subclass takes `latent_dim`. It defines the layers `fc_mu` and `fc_log`, and the methods
    `features` (the outputs of the hidden layers of the encoder) and `decode`. It needs a `name` of
    its own, because runs of networks with the same name are put into one row of a table. All of its
    parameters must be trained, otherwise a run cannot be resumed.
    """

    def encode(self, x):
        """Return mu(x) and log sigma²(x), both [N, latent_dim]."""
        h = self.features(x)[-1].flatten(1)
        return self.fc_mu(h), self.fc_log(h)

    def reparameterize(self, mu, logvar):
        """Draw z = mu + exp(logvar / 2) * epsilon, epsilon ~ N(0, I). All are [N, latent_dim]."""
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)

    def forward(self, x):
        """Return the reconstruction [N, 1, 28, 28] in [0, 1], mu and logvar."""
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


class ConvVAE(VAE):
    """The network of the report. It has 440,833 parameters with 32 latent dimensions.

    The layers have the names of the report, so a state_dict of the report's class can be loaded
    into this one, and the other way around.
    """

    name = "ConvVAE"

    def __init__(self, latent_dim=32):
        super().__init__()
        self.enc1 = nn.Conv2d(1, 32, kernel_size=4, stride=2, padding=1)  # 32×14×14
        self.enc2 = nn.Conv2d(32, 64, kernel_size=4, stride=2, padding=1)  # 64×7×7
        self.enc3 = nn.Conv2d(64, 128, kernel_size=4, stride=2, padding=1)  # 128×3×3
        self.fc_mu = nn.Linear(128 * 3 * 3, latent_dim)
        self.fc_log = nn.Linear(128 * 3 * 3, latent_dim)
        self.fc_dec = nn.Linear(latent_dim, 128 * 3 * 3)
        # TransposedConv2d is nn.ConvTranspose2d, but faster on a CPU. See the end of this file.
        self.dec1 = TransposedConv2d(
            128, 64, kernel_size=4, stride=2, padding=1, output_padding=1
        )  # 64×7×7
        self.dec2 = TransposedConv2d(64, 32, kernel_size=4, stride=2, padding=1)  # 32×14×14
        self.dec3 = TransposedConv2d(32, 1, kernel_size=4, stride=2, padding=1)  # 1×28×28

    def features(self, x):
        """Return the outputs of the three convolutions.

        They are [N, 32, 14, 14], [N, 64, 7, 7] and [N, 128, 3, 3].
        """
        # The in-place ReLU makes a training step 3 % faster, and overwrites the output of the
        # convolution. A forward hook on enc1, enc2 or enc3 must clone that output to keep it.
        h1 = F.relu_(self.enc1(x))
        h2 = F.relu_(self.enc2(h1))
        h3 = F.relu_(self.enc3(h2))
        return h1, h2, h3

    def decode(self, z):
        """Return images [N, 1, 28, 28] in [0, 1] for latent codes z [N, latent_dim]."""
        h = F.relu_(self.fc_dec(z)).view(-1, 128, 3, 3)
        h = F.relu_(self.dec1(h))
        h = F.relu_(self.dec2(h))
        return torch.sigmoid(self.dec3(h))


class FullyConnectedVAE(VAE):
    """784-400-latent_dim-400-784 with ReLU, after Kingma & Welling (2014).

    It has 667,248 parameters with 32 latent dimensions. The report compares its network with "a
    fully connected VAE", which it does not describe.
    """

    name = "Fully connected VAE"

    def __init__(self, latent_dim=32):
        super().__init__()
        self.fc_enc = nn.Linear(28 * 28, 400)
        self.fc_mu = nn.Linear(400, latent_dim)
        self.fc_log = nn.Linear(400, latent_dim)
        self.fc_dec = nn.Linear(latent_dim, 400)
        self.fc_out = nn.Linear(400, 28 * 28)

    def features(self, x):
        """Return a tuple with the output of the only hidden layer, [N, 400]."""
        return (F.relu_(self.fc_enc(x.flatten(1))),)

    def decode(self, z):
        """Return images [N, 1, 28, 28] in [0, 1] for latent codes z [N, latent_dim]."""
        h = F.relu_(self.fc_dec(z))
        return torch.sigmoid(self.fc_out(h)).view(-1, 1, 28, 28)


class DeepConvVAE(VAE):
    """The deeper network that the report proposes: up to 256 filters, BatchNorm and LeakyReLU.

    It has 1,144,193 parameters with 32 latent dimensions.
    """

    name = "Deep ConvVAE"

    def __init__(self, latent_dim=32):
        super().__init__()

        def block(layer):
            return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.LeakyReLU(0.2))

        self.enc = nn.Sequential(
            block(nn.Conv2d(1, 32, kernel_size=4, stride=2, padding=1)),  # 32×14×14
            block(nn.Conv2d(32, 64, kernel_size=4, stride=2, padding=1)),  # 64×7×7
            block(nn.Conv2d(64, 128, kernel_size=4, stride=2, padding=1)),  # 128×3×3
            block(nn.Conv2d(128, 256, kernel_size=3, stride=1, padding=1)),  # 256×3×3
        )
        self.fc_mu = nn.Linear(256 * 3 * 3, latent_dim)
        self.fc_log = nn.Linear(256 * 3 * 3, latent_dim)
        self.fc_dec = nn.Linear(latent_dim, 256 * 3 * 3)
        self.dec = nn.Sequential(
            block(nn.Conv2d(256, 128, kernel_size=3, stride=1, padding=1)),  # 128×3×3
            block(
                TransposedConv2d(128, 64, kernel_size=4, stride=2, padding=1, output_padding=1)
            ),  # 64×7×7
            block(TransposedConv2d(64, 32, kernel_size=4, stride=2, padding=1)),  # 32×14×14
            TransposedConv2d(32, 1, kernel_size=4, stride=2, padding=1),  # 1×28×28
        )

    def features(self, x):
        """Return the outputs of the four blocks, from [N, 32, 14, 14] to [N, 256, 3, 3]."""
        outputs = []
        for block in self.enc:
            x = block(x)
            outputs.append(x)
        return outputs

    def decode(self, z):
        """Return images [N, 1, 28, 28] in [0, 1] for latent codes z [N, latent_dim]."""
        h = F.leaky_relu(self.fc_dec(z), 0.2).view(-1, 256, 3, 3)
        return torch.sigmoid(self.dec(h))


# The networks by the value of train.py's option --model.
MODELS = {"conv": ConvVAE, "fc": FullyConnectedVAE, "deep": DeepConvVAE}


# --- Loss ---------------------------------------------------------------------------------


def loss_function(recon_x, x, mu, logvar, beta=1.0, with_terms=False):
    """Return the loss of a batch, BCE + beta * KLD, in nats summed over the batch.

    With beta = 1, this is the loss of the report; other values give a beta-VAE (Higgins et al.,
    2017). With `with_terms`, return (loss, BCE, KLD), because training logs both terms. The
    feature-matching loss is not part of it; train_step in train.py adds it.

    A further term that is added here is minimized, but it is neither logged nor seen by the plateau
    schedule and classify.py, which use BCE and KLD alone.
    """
    bce = reconstruction_bce(recon_x, x)
    kld = kl_divergence(mu, logvar)
    loss = bce + beta * kld
    if with_terms:
        return loss, bce, kld
    return loss


def reconstruction_bce(recon_x, x):
    """Return the binary cross-entropy -Σ [x log x̂ + (1-x) log(1-x̂)] in nats.

    x and recon_x (x̂) are [N, 1, 28, 28] in [0, 1]. The sum runs over all pixels and images.
    """
    # For a NaN in recon_x, PyTorch's function ends with an error, after which a CUDA device cannot
    # be used any more. So we replace NaN by 0 and return NaN.
    is_nan = recon_x.isnan()
    bce = F.binary_cross_entropy(recon_x.masked_fill(is_nan, 0), x, reduction="sum")
    return bce.masked_fill(is_nan.any(), torch.nan)


def kl_divergence(mu, logvar):
    """Return KL(N(mu, sigma²) || N(0, I)) = -½ Σ (1 + log sigma² - mu² - sigma²) in nats.

    mu and logvar are [N, latent_dim]. The sum runs over all latent dimensions and images.
    """
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


# --- A trained run: its options -----------------------------------------------------------

# The options of train.py that decide what is trained, with their defaults. These are the values of
# the report. What the report only proposes is off by default. A new option also needs its range in
# check_options, a label in Run.describe (otherwise its runs are put into one row of a table with
# others), and an argument in train.py. It must take a value: train_command cannot write an option
# such as --warmup, which stands alone.
OPTIONS = {
    "model": "conv",
    "latent_dim": 32,
    "batch_size": 128,
    "lr": 5e-4,
    "seed": 0,
    "beta": 1.0,
    "lr_scheduler": "constant",
    "hold_out": 0,
    "feature_weight": 0.0,
    "feature_run": "",
    "epochs": 100,
}
LR_SCHEDULERS = ["constant", "plateau", "cosine"]


def check_options(options):
    """Raise ValueError, naming the option, if an option of a run has an impossible value."""
    choices = {"model": list(MODELS), "lr_scheduler": LR_SCHEDULERS}
    for name, allowed in choices.items():
        if options[name] not in allowed:
            raise ValueError(f"--{dashed(name)} must be one of {allowed}, not {options[name]!r}")
    ranges = {
        "latent_dim": (int, 1, 4096),
        "batch_size": (int, 1, 2**31 - 1),
        "lr": (float, 1e-12, 1e3),
        "seed": (int, 0, 2**31 - 1),
        "beta": (float, 0, 1e6),
        "hold_out": (int, 0, 2**31 - 1),
        "feature_weight": (float, 0, 1e6),
        "epochs": (int, 1, 2**31 - 1),
    }
    for name, (kind, low, high) in ranges.items():
        value = options[name]
        # An integer is allowed where a float is expected. True is not, so isinstance would not do.
        is_number = type(value) is int or type(value) is kind
        if not is_number or not low <= value <= high:  # NaN is in no range
            number = "an integer" if kind is int else "a number"
            raise ValueError(
                f"--{dashed(name)} must be {number} between {low} and {high}, not {value!r}"
            )
    if bool(options["feature_weight"]) != bool(options["feature_run"]):
        raise ValueError("--feature-weight and --feature-run must be given together")


def dashed(name):
    """Return an option's name as it is typed: latent-dim for latent_dim."""
    return name.replace("_", "-")


def train_command(options, path):
    """Return the command that trains a run with these options in the folder `path`."""
    words = ["python", "train.py", "--run", str(path)]
    for name, default in OPTIONS.items():
        value = options.get(name, default)
        if value != default:
            words += [f"--{dashed(name)}", str(value)]
    if options.get("data_sha256", data.FASHION_MNIST_SHA256) != data.FASHION_MNIST_SHA256:
        words += ["--data", "FOLDER"]  # a run does not know the folder of its data
    return data.shell_command(words)


# --- A trained run: its files -------------------------------------------------------------

STATE = "state.pth"  # the checkpoint. The next three files are exported from it.
CONFIG = "config.json"
WEIGHTS = "convvae_fashionmnist.pth"
LOG = "losses.csv"
CLASSIFICATION = "classification.json"  # written by classify.py
RUN_FILES = [STATE, CONFIG, WEIGHTS, LOG, CLASSIFICATION]

# All losses are in nats per image. A loss is always bce + kld, without the weight --beta and
# without the feature-matching loss, so that all runs can be compared. Runs that were saved before a
# column was added do not have it, so a new column needs a default in check_log.
LOG_COLUMNS = [
    "epoch",
    "train_loss",
    "train_bce",
    "train_kld",
    "test_loss",
    "test_bce",
    "test_kld",
    "lr",
    "seconds",
]
RESTORE = "Restore it, or train in another folder with --run."


@dataclass
class Run:
    """A run, as train.py has saved it in a folder."""

    path: Path
    config: dict  # the OPTIONS, checksums of data and feature run, version of torch, device
    log: list  # a dict of LOG_COLUMNS for each finished epoch
    weights: dict | None  # a state_dict; None for a run published without weights
    optimizer_state: dict | None  # Adam's state; None without state.pth
    model: VAE | None = None  # the trained network, if the run comes from load_run

    def __str__(self):
        epochs = f"epoch {len(self.log)} of {self.config['epochs']}"
        return f"{self.path}: {self.describe(leave_out=['epochs'])}, {epochs}"

    def describe(self, leave_out=()):
        """Return the name of the network, and the options that differ from the report's.

        The seed and the run for feature matching are left out.
        """
        labels = {
            "latent_dim": "{} latent dimensions",
            "batch_size": "batch size {}",
            "lr": "learning rate {:g}",
            "beta": "β = {:g}",
            "lr_scheduler": "{} schedule",
            "hold_out": "validation split of {}",
            "feature_weight": "feature weight {:g}",
            "epochs": "{} epochs",
        }
        parts = [MODELS[self.config["model"]].name]
        for name, label in labels.items():
            value = self.config[name]
            if name == "epochs" and len(self.log) < value:
                # This differs from every default, so an unfinished run is always labeled.
                value = f"{len(self.log)} of {value}"
            if name not in leave_out and value != OPTIONS[name]:
                parts.append(label.format(value))
        return ", ".join(parts)


def read_run(path):
    """Read the files of a run: state.pth if it exists, otherwise the exported files.

    Raises UserError if there is no run, or if a file is damaged.
    """
    path = Path(path).expanduser()
    run = read_checkpoint(path)
    if run:
        return run
    config = read_config(path / CONFIG)
    log = read_log(path / LOG)
    weights = read_weights(path / WEIGHTS)
    if config is None or log is None:
        # A folder with files of a run must not be suggested for a new one.
        has_files = any((path / name).exists() for name in RUN_FILES)
        command = train_command({}, "runs/new" if has_files else path)
        raise UserError(
            f"There is no run in {path} ({CONFIG} or {LOG} is missing). To train one: {command}"
        )
    return Run(path, config, log, weights, optimizer_state=None)


def read_checkpoint(path):
    """Return the Run in `path`/state.pth, or None if there is no such file.

    Raises UserError if the file is damaged.
    """
    content = data.read_bytes(path / STATE)
    if content is None:
        return None
    with data.report_damage(path / STATE, RESTORE):
        state = load_tensors(content)
        if not isinstance(state, dict):
            raise TypeError("it is not a checkpoint")
        return Run(
            path=path,
            config=complete_config(state["config"]),
            log=check_log(state["log"]),
            weights=check_state_dict(state["model"]),
            optimizer_state=state.get("optimizer"),
        )


def read_weights(path):
    """Return the state_dict in a file that torch.save wrote, or None if there is no such file.

    Raises UserError if the file is damaged or holds something else.
    """
    content = data.read_bytes(path)
    if content is None:
        return None
    with data.report_damage(path, RESTORE):
        try:
            return check_state_dict(load_tensors(content))
        except (pickle.UnpicklingError, TypeError) as error:
            raise UserError(
                f"{path} is not a plain state_dict ({data.reason(error)}). "
                "Save the weights with torch.save(model.state_dict(), path)."
            ) from error


def load_tensors(content):
    """Return what torch.save wrote, from the bytes of the file. Code in it is not run."""
    file = io.BytesIO(content)
    is_pickle = content.startswith(b"\x80")  # which old versions of torch.save wrote
    if zipfile.is_zipfile(file):
        # torch.load does not check the checksums.
        damaged = zipfile.ZipFile(file).testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
    elif not is_pickle:
        raise ValueError("it is incomplete, or torch.save did not write it")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def check_state_dict(weights):
    """Return a state_dict as a plain dict of tensors. Raises TypeError if it is something else."""
    if not isinstance(weights, dict):
        raise TypeError(f"its content is of type {type(weights).__name__}, not a dict of tensors")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"the entry {name!r} is not a named tensor")
    return dict(weights)


def read_config(path):
    """Return the content of config.json, or None if there is no such file.

    Raises UserError if the file is damaged or an option in it has an impossible value.
    """
    content = data.read_bytes(path)
    if content is None:
        return None
    with data.report_damage(path, RESTORE):
        return complete_config(json.loads(content))


def complete_config(config):
    """Return a config in which options that were added after the run was saved have their default.

    Raises ValueError if an option has an impossible value, or if "epochs" is missing.
    """
    # Every run was saved with its number of epochs. If it is missing, the file is damaged, and the
    # default must not hide this.
    if "epochs" not in config:
        raise ValueError("epochs is missing")
    # Runs saved before checksums were added were trained on Fashion-MNIST.
    completed = {
        **OPTIONS,
        "feature_sha256": None,
        "data_sha256": data.FASHION_MNIST_SHA256,
        **config,
    }
    check_options(completed)
    return completed


def read_log(path):
    """Return the rows of losses.csv, or None if there is no such file.

    Raises UserError if the file is damaged.
    """
    content = data.read_bytes(path)
    if content is None:
        return None
    with data.report_damage(path, RESTORE):
        # Spreadsheets may put a byte order mark at the start, which utf-8-sig skips.
        lines = content.decode("utf-8-sig").splitlines()
        return check_log(csv.DictReader(lines))


def check_log(rows):
    """Return a loss log as numbers.

    Raises KeyError or TypeError if a number is missing, and ValueError if one is not finite or the
    epochs are out of order.
    """
    log = []
    for number, row in enumerate(rows, start=1):
        values = {column: float(row[column]) for column in LOG_COLUMNS}
        if values["epoch"] != number:
            raise ValueError("epochs out of order")
        if not all(math.isfinite(value) for value in values.values()):
            raise ValueError(f"a number in epoch {number} is not finite")
        values["epoch"] = number
        log.append(values)
    if not log:
        raise ValueError("no epochs")
    return log


def read_classification(path):
    """Return the content of classification.json, or None if it is missing or damaged.

    A damaged file is not an error, because classify.py can compute its content again.
    """
    content = data.read_bytes(path)
    if content is None:
        return None
    # Damage can cause any of these: another type, another shape, a number too large, deep nesting.
    damage = (KeyError, TypeError, ValueError, OverflowError, RuntimeError)
    with contextlib.suppress(*damage):
        result = json.loads(content)
        matrix = torch.tensor(result["confusion_matrix"])
        classes = len(data.CLASSES)
        is_matrix = matrix.shape == (classes, classes) and matrix.dtype == torch.int64
        numbers = torch.tensor([result["epoch"], result["accuracy"]])
        # Files that were written before hashes were added have none.
        hash_is_valid = isinstance(result.get("sha256"), str | None)
        if is_matrix and numbers.isfinite().all() and hash_is_valid:
            return result
    return None


def current_classification(run):
    """Return the content of classification.json if it belongs to the weights of `run`.

    Otherwise return None and print a warning. Weights are compared by their number of epochs, and
    by their hash if the run has weights and the file has a hash.
    """
    path = run.path / CLASSIFICATION
    result = read_classification(path)
    if result is None:
        problem = "is missing or damaged"
    elif result["epoch"] != len(run.log):
        problem = f"belongs to epoch {result['epoch']}, but the run has {len(run.log)} epochs"
    elif run.weights and result.get("sha256") not in (None, digest(run.weights)):
        problem = "belongs to other weights"
    else:
        return result
    command = data.shell_command(["python", "classify.py", "--run", str(run.path)])
    print(f"Warning: {path} {problem}. To evaluate the run: {command}", file=sys.stderr)
    return None


def digest(weights):
    """Return the SHA-256 of the tensors in a state_dict. It does not depend on the file format."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


# --- A trained run: loading it ------------------------------------------------------------


def load_run(path):
    """Load a run and its trained network (Run.model, on the CPU, in evaluation mode).

    `path` is the run's folder, a string or a Path. Raises UserError if there is no run, if it has
    no weights, if a file is damaged, or if the weights do not fit the options.
    """
    run = read_run(path)
    if run.weights is None:
        raise UserError(
            f"{run.path} has no {WEIGHTS}. "
            f"To train the same network again: {train_command(run.config, 'runs/new')}"
        )
    model = MODELS[run.config["model"]](run.config["latent_dim"])
    check_weights(run, model.state_dict())
    model.load_state_dict(run.weights)
    run.model = model.eval()
    return run


def check_weights(run, expected):
    """Raise UserError, naming the first tensor that does not fit the network, if there is one."""
    for name in [*run.weights, *expected]:
        problem = None
        if name not in expected:
            problem = f"{name} is not in this network"
        elif name not in run.weights:
            problem = f"{name} is missing"
        elif run.weights[name].shape != expected[name].shape:
            found = list(run.weights[name].shape)
            problem = f"{name} has shape {found}, not {list(expected[name].shape)}"
        if problem:
            raise UserError(
                f"The weights in {run.path} ({STATE} or {WEIGHTS}) do not fit its options "
                f"({STATE} or {CONFIG}): {problem}. Restore the files of this run."
            )


def load_run_data(run, root):
    """Return the training and the test split of a run, as `data.make_splits` does.

    Raises UserError if the data in `root` are not those on which the run was trained.
    """
    dataset = data.read_dataset(root)
    if dataset.sha256 != run.config["data_sha256"]:
        raise UserError(
            f"{run.path} was not trained on the data in {dataset.folder}. "
            "Give the folder of its data with --data."
        )
    return data.make_splits(dataset, run.config["hold_out"])


# --- Latent means and samples -------------------------------------------------------------

# For latent means and the metrics of classify.py. The test loss in train.py has its own.
EVALUATION_BATCH_SIZE = 128


@torch.no_grad()
def latent_means(model, images):
    """Return the latent means mu(x), [N, latent_dim] float32, of images on the CPU.

    Images are [N, 1, 28, 28] floating-point numbers in [0, 1]. Raises ValueError otherwise. The
    model must be on the CPU and in evaluation mode, as load_run returns it.
    """
    expected = (
        "images must be a tensor [N, 1, 28, 28] of floating-point numbers in [0, 1] "
        "(gray values divided by 255, bright on black)"
    )
    if images.shape[1:] != (1, 28, 28) or len(images) == 0 or not images.is_floating_point():
        raise ValueError(f"{expected}, not {list(images.shape)} of {images.dtype}")
    if not (images.min() >= 0 and images.max() <= 1):  # NaN is in no range
        raise ValueError(f"{expected}, not from {images.min()} to {images.max()}")
    # We compute in float64 so that rounding differences between machines do not reach the Random
    # Forest.
    model = copy.deepcopy(model).double()
    means = []
    for batch in images.split(EVALUATION_BATCH_SIZE):
        mu, _ = model.encode(batch.double())
        means.append(mu.float())
    return torch.cat(means)


def active_dimensions(mu):
    """Return how many latent dimensions are active: those whose mean mu has a variance above 0.01.

    mu is [N, latent_dim]. The definition is that of Burda et al. (2016).
    """
    return (mu.var(dim=0) > 0.01).sum().item()


def sample_mixture(model, images, n):
    """Draw n latent codes [n, latent_dim] from a mixture of Gaussians fitted to mu of images.

    This estimates where the latent codes of images lie (Ghosh et al., 2020). The mixture has at
    most 50 Gaussians with full covariances, fitted to the first 10,000 images, as chosen in
    results/mixture.txt. Each Gaussian needs 6 * latent_dim different latent means, so there are
    fewer Gaussians with more than 33 latent dimensions or with few images. With more than 128
    latent dimensions, the covariances are diagonal, and 6 latent means per Gaussian are enough.

    The codes are in the order of the Gaussians, so the first ones alone are not a fair sample.
    """
    # Imported here because train.py does not need scikit-learn, which takes a second to import.
    from sklearn.mixture import GaussianMixture

    mu = latent_means(model, images[:10_000]).double()
    latent_dim = mu.shape[1]
    different_means = len(mu.unique(dim=0))
    if latent_dim <= 128:
        covariance_type = "full"
        max_gaussians = different_means // (6 * latent_dim)
    else:
        # The time for full covariances grows with the cube of the dimensions.
        covariance_type = "diag"
        max_gaussians = different_means // 6
    mixture = GaussianMixture(
        n_components=min(50, max(1, max_gaussians)),
        covariance_type=covariance_type,
        tol=0.03,
        random_state=42,
    )
    z, _ = mixture.fit(mu).sample(n)
    return torch.tensor(z).float()


# --- A faster transposed convolution ------------------------------------------------------


class TransposedConv2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d, computed in the way that is fastest on a CPU.

    The result is the same up to rounding, so a network may also use nn.ConvTranspose2d. On a CPU,
    PyTorch leaves convolutions to the library oneDNN, which is slow in two cases. One is a bias,
    which is therefore added separately. The other is a single output channel, for which PyTorch has
    a faster kernel of its own.
    """

    def forward(self, x):
        """Return [N, out_channels, H', W'] for x [N, in_channels, H, W]."""
        if torch.jit.is_scripting():
            exporting = False  # TorchScript cannot compile the call below
        else:
            exporting = torch.onnx.is_in_onnx_export()  # ONNX does not know PyTorch's own kernel
        if self.out_channels == 1 and x.device.type == "cpu" and not exporting:
            y = torch.ops.aten.slow_conv_transpose2d(
                x,
                self.weight,
                self.kernel_size,
                None,
                self.stride,
                self.padding,
                self.output_padding,
                self.dilation,
            )
        else:
            y = F.conv_transpose2d(
                x,
                self.weight,
                None,
                self.stride,
                self.padding,
                self.output_padding,
                self.groups,
                self.dilation,
            )
        bias = self.bias  # TorchScript needs a variable to see that it is not None
        if bias is not None:
            y.add_(bias.view(-1, 1, 1))
        return y
