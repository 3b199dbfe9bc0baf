"""Train a VAE on Fashion-MNIST, and save the run in a folder after each epoch."""

import argparse
import math
import os
import sys
import tempfile
import time
from datetime import timedelta

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

import data
from data import (
    BASELINES,
    CLASSIFICATION,
    CONFIG,
    LOG,
    STATE,
    WEIGHTS,
    UserError,
    positive_int,
)
from model import MODELS, load_network, loss_function

DESCRIPTION = """Train a VAE on Fashion-MNIST. Without options, this is the network and the training
of the report. Run the same command again to resume after an interruption. Give more --epochs to
train a finished run further (not with a cosine schedule, whose learning rates depend on --epochs).
"""


def main():
    args = parse_arguments()
    config = vars(args).copy()
    for name in ("run", "data", "device"):
        del config[name]
    splits, config["data_sha256"] = data.load_splits(args.data, args.hold_out)
    (train_images, _), (test_images, _) = splits

    device = choose_device(args.device)
    use_fast_kernels()
    torch.manual_seed(args.seed)
    model = MODELS[args.model](args.latent_dim)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.lr, device)
    feature_model = None
    if args.feature_run:
        feature_model = load_network(data.read_run(args.feature_run))
        feature_model.requires_grad_(False).to(device)

    # Before each epoch is saved, state.pth is compared with state_bytes, its content as this
    # process knows it. So a second train.py in the same folder is noticed.
    log, state_bytes = resume(args.run, config, model, optimizer)
    if len(log) >= args.epochs:
        advice = ""
        if args.lr_scheduler != "cosine":
            advice = " To train it further, give more --epochs."
        print(f"{args.run} is finished: {len(log)} epochs.{advice}")
        return
    train_images = train_images.to(device)
    test_images = test_images.to(device)

    def uncaptured_step(images):
        return train_step(model, optimizer, images, args.beta, feature_model, args.feature_weight)

    if device == "cuda":
        # The step is recorded once and then replayed, which is faster. Numbers such as args.beta
        # are recorded, too. If beta changed during training, it would have to be a tensor, as the
        # learning rate is.
        step = CapturedStep(uncaptured_step, args.batch_size)
    else:
        step = uncaptured_step

    # A run may be resumed on another machine, so these two are no part of the config that `resume`
    # compares. The version is not a plain string, and torch.load would refuse it in state.pth.
    config["torch"] = str(torch.__version__)
    config["device"] = describe_device(device)
    name = type(model).__name__
    print(f"{name} on {config['device']}, epochs {len(log) + 1} to {args.epochs}", flush=True)

    for epoch in range(len(log) + 1, args.epochs + 1):
        start = time.perf_counter()
        # Each epoch has a seed of its own, so a resumed run needs no saved random state.
        torch.manual_seed((args.seed * 1_000_003 + epoch) % 2**32)
        lr = learning_rate(args, log)
        set_learning_rate(optimizer, lr)
        row = {"epoch": epoch}
        model.train()
        row.update(train_epoch(step, train_images, args.batch_size))
        model.eval()
        row.update(test_epoch(model, test_images))
        row["lr"] = lr
        row["seconds"] = time.perf_counter() - start
        stop_unless_finite(row)
        log.append(row)
        state_bytes = save(args.run, state_bytes, config, model, optimizer, log)

        left = timedelta(seconds=round(row["seconds"] * (args.epochs - epoch)))
        print(
            f"Epoch {epoch}: Train loss {row['train_loss']:.2f}, "
            f"Test loss {row['test_loss']:.2f}, {row['seconds']:.2f} s, {left} left",
            flush=True,
        )


# --- One epoch, one step ------------------------------------------------------------------


def train_epoch(step, images, batch_size):
    """Train for one epoch on images [N, 1, 28, 28], and return its mean losses in nats per image.

    `step` trains on a batch and returns its [BCE, KLD], summed over the images. The order of the
    images is random.
    """
    order = torch.randperm(len(images), device=images.device)
    sums = []
    for number, indices in enumerate(order.split(batch_size)):
        sums.append(step(images[indices]))
        if number % 50 == 49:
            show_progress(f"{number * batch_size + len(indices):,} of {len(images):,} images")
    show_progress("")
    return mean_losses("train", sums, len(images))


@torch.no_grad()
def test_epoch(model, images):
    """Return the mean losses of test images [N, 1, 28, 28], in nats per image."""
    sums = []
    # The random numbers of z are drawn batch by batch, so another batch size would give other
    # losses. The published runs were trained with this one.
    for batch in images.split(500):
        reconstruction, mu, logvar = model(batch)
        _, bce, kld = loss_function(reconstruction, batch, mu, logvar)
        sums.append(torch.stack((bce, kld)))
    return mean_losses("test", sums, len(images))


def mean_losses(split, sums, count):
    """Return the columns of the loss log for one split.

    `sums` are tensors [BCE, KLD] of all batches, summed over the images. `count` is the number of
    images. The loss is BCE + KLD without beta and feature matching, so runs can be compared.
    """
    # The losses are read once per epoch. Reading them in each step would make the program wait for
    # the GPU each time.
    totals = torch.stack(sums).cpu().double().sum(dim=0)
    bce, kld = (totals / count).tolist()
    return {f"{split}_loss": bce + kld, f"{split}_bce": bce, f"{split}_kld": kld}


def train_step(model, optimizer, images, beta, feature_model, feature_weight):
    """Update the model on a batch [B, 1, 28, 28]. Return [BCE, KLD] in nats, summed over the batch.

    BCE + beta * KLD is minimized. If a feature_model is given, the feature-matching loss is added.
    """
    optimizer.zero_grad()
    reconstruction, mu, logvar = model(images)
    loss, bce, kld = loss_function(reconstruction, images, mu, logvar, beta)
    if feature_model:
        loss = loss + feature_weight * feature_matching_loss(feature_model, reconstruction, images)
    loss.backward()
    optimizer.step()
    return torch.stack((bce, kld)).detach()


def feature_matching_loss(feature_model, reconstruction, images):
    """Return the feature-matching loss of a batch: the squared distance of features.

    It compares reconstructions with images, and is summed over the hidden layers of the encoder of
    a trained VAE, `feature_model`. This is like the perceptual loss of Hou et al. (2017), with a
    VAE's encoder in place of the VGG network.
    """
    distance = 0
    reconstruction_features = feature_model.features(reconstruction)
    image_features = feature_model.features(images)
    for reconstructed, original in zip(reconstruction_features, image_features):
        distance = distance + F.mse_loss(reconstructed, original, reduction="sum")
    return distance


def show_progress(text):
    """Show how far the epoch is, in one line of a terminal that the next call overwrites."""
    if sys.stdout.isatty():
        print(f"\r{text:40}\r", end="", flush=True)


def stop_unless_finite(row):
    """Raise UserError if a loss of this epoch is NaN or infinite."""
    if math.isfinite(row["train_loss"] + row["test_loss"]):
        return
    advice = "Try a smaller --lr."
    if row["epoch"] > 1:
        advice = "Earlier epochs are kept. Try a smaller --lr in another folder (--run)."
    raise UserError(f"The loss is not finite in epoch {row['epoch']}. {advice}")


# --- Optimizer and learning rate ----------------------------------------------------------


def make_optimizer(model, lr, device):
    """Return Adam for the parameters of a model, as one fused kernel."""
    if device == "cuda":
        # A captured step reads the learning rate from this tensor each time it is replayed.
        lr = torch.tensor(lr, device=device)
        return torch.optim.Adam(model.parameters(), lr=lr, fused=True, capturable=True)
    return torch.optim.Adam(model.parameters(), lr=lr, fused=True)


def set_learning_rate(optimizer, lr):
    """Set the learning rate, which is a number or, on CUDA, a tensor."""
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def learning_rate(args, log):
    """Return the learning rate of the next epoch.

    "cosine" falls from --lr to 0 over --epochs. "plateau" divides the learning rate by 10 after
    more than ten epochs in a row in which the loss was not 0.01 % below its minimum, as are
    PyTorch's defaults. It watches BCE + beta * KLD on the training images, without the
    feature-matching loss, which the log does not have. The scheduler is replayed from the log, so
    its state need not be saved.
    """
    if args.lr_scheduler == "constant":
        return args.lr
    # PyTorch's schedulers act on an optimizer. This one trains nothing.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr)
    if args.lr_scheduler == "cosine":
        scheduler = CosineAnnealingLR(optimizer, T_max=args.epochs)
    else:
        scheduler = ReduceLROnPlateau(optimizer)
    for row in log:
        optimizer.step()  # PyTorch warns if the scheduler steps first
        if args.lr_scheduler == "cosine":
            scheduler.step()
        else:
            scheduler.step(row["train_bce"] + args.beta * row["train_kld"])
    return optimizer.param_groups[0]["lr"]


# --- Resuming and saving ------------------------------------------------------------------


def resume(path, config, model, optimizer):
    """Load the state of the run in the folder `path` into a model and its optimizer.

    Return its loss log, and the content of its state.pth. For a new run, create the folder, and
    return an empty log and None. Raises UserError if the run was trained with other options or on
    other data, if state.pth is damaged, or if the folder has a published run, which has no
    state.pth. Raises OSError if nothing can be written to the folder.
    """
    is_new = not (path / STATE).exists()
    published_files = (CONFIG, LOG, WEIGHTS, CLASSIFICATION, BASELINES)
    if is_new and any((path / name).exists() for name in published_files):
        raise UserError(
            f"{path} has a run but no {STATE}, so training cannot be resumed. Choose another "
            "folder with --run."
        )
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()  # fails now if the folder cannot be written
    if is_new:
        return [], None

    def load_state(content):
        state = data.parse_tensors(content)
        check_same_config(path, state["config"], config)
        model.load_state_dict(state["model"])
        load_optimizer_state(optimizer, state["optimizer"])
        return state, content

    state, content = data.read(path / STATE, load_state)
    # train.py may have been killed after it wrote state.pth and before it wrote the other files.
    export(path, state["config"], state["model"], state["log"])
    return state["log"], content


def check_same_config(path, before, config):
    """Raise UserError, naming the first difference, unless a run was trained with this config.

    `before` is the config of the run. An option that only one of the two has is a difference, too.
    Another number of epochs is allowed, except with a cosine schedule, whose learning rates depend
    on it.
    """
    for name in {**config, **before}:
        # Only the run has these. It may be resumed on another machine, and commit a07dceb also
        # wrote the checksum of the feature network.
        if name in ("torch", "device", "feature_sha256"):
            continue
        if before.get(name) == config.get(name):
            continue
        if name == "epochs" and before.get("lr_scheduler") != "cosine":
            continue
        if name == "data_sha256":
            difference = "on other data"
        else:
            option = f"--{name.replace('_', '-')}"
            difference = f"with {option} {before.get(name)}, not {config.get(name)}"
        raise UserError(f"{path} was trained {difference}. Choose another folder with --run.")


def load_optimizer_state(optimizer, adam_state):
    """Load the state of Adam, {number of the parameter: its state}, as state.pth has it.

    Fused Adam ignores strides, and the run may have begun on another device. So the state is
    copied into the memory layout of the weights.
    """
    parameters = optimizer.param_groups[0]["params"]
    state = {}
    for number, values in adam_state.items():
        state[number] = {"step": values["step"]}
        for name in ("exp_avg", "exp_avg_sq"):
            state[number][name] = torch.empty_like(parameters[number]).copy_(values[name])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def save(path, previous, config, model, optimizer, log):
    """Write the files of a run, and return the content of state.pth.

    `previous` is its content as this process last read or wrote it, or None. Raises UserError if
    another train.py has written it since. (File locks do not work on many file systems.)
    """
    current = (path / STATE).read_bytes() if (path / STATE).exists() else None
    if current != previous:
        raise UserError(
            f"{path / STATE} was removed, or written by another train.py, so this one stops."
        )
    weights = {}
    for name, tensor in model.state_dict().items():
        weights[name] = tensor.cpu().contiguous()
    state = {
        "config": config,
        "model": weights,
        "optimizer": optimizer.state_dict()["state"],
        "log": log,
    }
    content = data.tensor_bytes(state)
    data.write_bytes(path / STATE, content)
    export(path, config, weights, log)
    return content


def export(path, config, weights, log):
    """Write the files that the other scripts read: the weights, losses.csv and config.json."""
    # The weights come before the log, because classification.json is compared with the log. So if
    # this is interrupted, classify.py never measures older weights than the log says.
    data.write_bytes(path / WEIGHTS, data.tensor_bytes(weights))
    data.write_bytes(path / LOG, data.log_bytes(log))
    data.write_bytes(path / CONFIG, data.json_bytes(config))


# --- Devices and speed --------------------------------------------------------------------


def choose_device(asked):
    """Return the device to train on, "cpu" or "cuda". `asked` is the option --device.

    Raises UserError if it is a GPU that cannot compute a small convolution.
    """
    device = asked
    if asked == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        try:
            image = torch.ones(1, 1, 28, 28, device=device)
            weight = torch.ones(1, 1, 4, 4, device=device)
            F.conv2d(image, weight).cpu()
        except Exception as error:  # a driver, a card or its memory can fail in almost any way
            raise UserError(
                f"The GPU cannot be used ({data.reason(error)}). Use --device cpu. If that fails, "
                "too, hide the GPU: CUDA_VISIBLE_DEVICES= python train.py …"
            ) from error
    return device


def describe_device(device):
    """Return the device with what its rounding depends on: the GPU, or instructions and threads."""
    if device == "cuda":
        return f"cuda ({torch.cuda.get_device_name()})"
    threads = torch.get_num_threads()
    unit = "thread" if threads == 1 else "threads"
    return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {threads} {unit})"


class CapturedStep:
    """A training step that is recorded once as a CUDA graph and then replayed.

    Otherwise a GPU waits for the CPU to launch each of its small kernels. The first three batches
    are not captured, because during them cuDNN chooses its algorithms and Adam creates its state.
    Batches of another size, such as the last one of an epoch, are never captured.

    A replay repeats the recorded kernels only. Python code in the step does not run again, and a
    Python number keeps its value. This is why the learning rate is a tensor (see `make_optimizer`).
    """

    def __init__(self, step, batch_size):
        self.step = step
        self.batch_size = batch_size
        self.batches_before_capture = 3
        self.graph = None

    def __call__(self, images):
        """Train on a batch [B, 1, 28, 28], and return [BCE, KLD] in nats, summed over the batch.

        Raises UserError if the step cannot be captured.
        """
        if len(images) != self.batch_size:
            return self.step(images)
        if self.batches_before_capture > 0:
            self.batches_before_capture -= 1
            return self.step(images)
        if self.graph is None:
            self.capture(images)
        self.images.copy_(images)
        self.graph.replay()
        return self.sums.clone()

    def capture(self, images):
        """Record the kernels of a step. This does not run them."""
        graph = torch.cuda.CUDAGraph()
        self.images = images.clone()
        try:
            with torch.cuda.graph(graph):
                self.sums = self.step(self.images)
        except RuntimeError as error:
            # PyTorch's random generator may stay in capture mode, so training cannot go on.
            raise UserError(
                f"The training step cannot be captured as a CUDA graph ({data.reason(error)}). It "
                "must not read a value, as print and .item() do. Change that, or use --device cpu."
            ) from error
        self.graph = graph


def use_fast_kernels():
    """Set what makes PyTorch faster, and keep convolutions in float32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    # By default, glibc returns the memory of each step to the system and has to request it again.
    # It stops doing so for blocks up to 32 MiB once a block of nearly that size has been freed
    # (see mallopt(3)). So we allocate such a block, which is freed at once.
    torch.empty(31 * 2**20, dtype=torch.uint8)


# --- Options ------------------------------------------------------------------------------


def parse_arguments():
    """Return the options of the command line."""
    parser, run_and_data = data.command_line(DESCRIPTION)
    run_and_data.add_argument(
        "--hold-out",
        type=nonnegative_int,
        default=0,
        metavar="N",
        help="hold out the last N training images and test on them instead of the test set "
        "(default: %(default)s)",
    )
    run_and_data.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where to train; auto is cuda if PyTorch finds a GPU, and otherwise cpu. To choose "
        "one of several GPUs, set CUDA_VISIBLE_DEVICES. (default: %(default)s)",
    )

    training = parser.add_argument_group("network and training")
    training.add_argument(
        "--model",
        choices=list(MODELS),
        default="conv",
        help="conv: the report's network; fc: fully connected; deep: a deeper convolutional "
        "network with BatchNorm (default: %(default)s)",
    )
    training.add_argument(
        "--latent-dim",
        type=positive_int,
        default=32,
        metavar="N",
        help="number of latent dimensions (default: %(default)s)",
    )
    training.add_argument(
        "--epochs",
        type=positive_int,
        default=100,
        metavar="N",
        help="number of epochs (default: %(default)s)",
    )
    training.add_argument(
        "--batch-size",
        type=positive_int,
        default=128,
        metavar="N",
        help="images per training step (default: %(default)s)",
    )
    training.add_argument(
        "--lr",
        type=positive_float,
        default=5e-4,
        metavar="LR",
        help="learning rate of Adam (default: %(default)s)",
    )
    training.add_argument(
        "--seed",
        type=nonnegative_int,
        default=0,
        metavar="N",
        help="random seed (default: %(default)s)",
    )

    proposals = parser.add_argument_group("the report's proposals")
    proposals.add_argument(
        "--beta",
        type=nonnegative_float,
        default=1.0,
        metavar="WEIGHT",
        help="weight of the KL divergence (default: %(default)s)",
    )
    proposals.add_argument(
        "--lr-scheduler",
        choices=["constant", "plateau", "cosine"],
        default="constant",
        help="plateau: divide the learning rate by 10 after more than ten epochs in a row without "
        "progress; cosine: let it fall from --lr to 0 (default: %(default)s)",
    )
    proposals.add_argument(
        "--feature-run",
        type=os.path.expanduser,
        default="",
        metavar="DIR",
        help="also match the encoder features of this run; needs --feature-weight",
    )
    proposals.add_argument(
        "--feature-weight",
        type=nonnegative_float,
        default=0.0,
        metavar="WEIGHT",
        help="weight of the feature-matching loss (default: %(default)s)",
    )

    args = parser.parse_args()
    if args.feature_run and args.feature_weight == 0:
        parser.error("--feature-run needs a positive --feature-weight")
    if args.feature_weight > 0 and not args.feature_run:
        parser.error("--feature-weight needs a --feature-run")
    return args


def nonnegative_int(text):
    """Return the integer of an option, which may be 0. argparse prints the errors."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be from 0 to {2**31 - 1}")
    return value


def positive_float(text):
    """Return the positive number of an option."""
    value = float(text)
    if not 0 < value < math.inf:  # NaN is in no range
        raise argparse.ArgumentTypeError("must be a positive number")
    return value


def nonnegative_float(text):
    """Return the number of an option, which may be 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError("must be a number that is not negative")
    return value


if __name__ == "__main__":
    data.run_script(
        main, when_interrupted="Run the same command again to resume after the last finished epoch."
    )
