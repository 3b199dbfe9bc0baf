"""Train a VAE on Fashion-MNIST, and save the run in a folder after each epoch."""

import copy
import io
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
from data import UserError
from model import (
    CONFIG,
    LOG,
    LOG_COLUMNS,
    LR_SCHEDULERS,
    MODELS,
    OPTIONS,
    RESTORE,
    RUN_FILES,
    STATE,
    WEIGHTS,
    check_options,
    dashed,
    digest,
    load_run,
    loss_function,
    read_config,
    train_command,
)

DESCRIPTION = """Train a VAE on Fashion-MNIST. Without options, this is the network and the training
of the report. Run the same command again to resume after an interruption. Give more --epochs to
train a finished run further (not with a cosine schedule, whose learning rates depend on --epochs).
"""


def parse_arguments():
    """Return the options of the command line."""
    parser, run_and_data = data.command_line(DESCRIPTION)
    run_and_data.add_argument(
        "--hold-out",
        type=int,
        metavar="N",
        help="hold out the last N training images and test on them instead of the test set "
        "(default: %(default)s)",
    )
    run_and_data.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="where to train; auto takes the first of cuda, mps and cpu that works. To choose one "
        "of several GPUs, set CUDA_VISIBLE_DEVICES. (default: %(default)s)",
    )

    training = parser.add_argument_group("network and training")
    training.add_argument(
        "--model",
        choices=list(MODELS),
        help="conv: the report's network; fc: fully connected; deep: a deeper convolutional "
        "network with BatchNorm (default: %(default)s)",
    )
    training.add_argument(
        "--latent-dim",
        type=int,
        metavar="N",
        help="number of latent dimensions (default: %(default)s)",
    )
    training.add_argument(
        "--epochs", type=int, metavar="N", help="number of epochs (default: %(default)s)"
    )
    training.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="images per training step (default: %(default)s)",
    )
    training.add_argument(
        "--lr", type=float, metavar="LR", help="learning rate of Adam (default: %(default)s)"
    )
    training.add_argument(
        "--seed", type=int, metavar="N", help="random seed (default: %(default)s)"
    )

    proposals = parser.add_argument_group("the report's proposals")
    proposals.add_argument(
        "--beta",
        type=float,
        metavar="WEIGHT",
        help="weight of the KL divergence (default: %(default)s)",
    )
    proposals.add_argument(
        "--lr-scheduler",
        choices=LR_SCHEDULERS,
        help="plateau: divide the learning rate by 10 after more than ten epochs in a row without "
        "progress; cosine: let it fall from --lr to 0 (default: %(default)s)",
    )
    proposals.add_argument(
        "--feature-run",
        metavar="DIR",
        help="also match the encoder features of this run; needs --feature-weight",
    )
    proposals.add_argument(
        "--feature-weight",
        type=float,
        metavar="WEIGHT",
        help="weight of the feature-matching loss (default: %(default)s)",
    )

    # The defaults have one place, since a run saved before an option was added needs them too.
    parser.set_defaults(**OPTIONS)
    args = parser.parse_args()
    args.feature_run = os.path.expanduser(args.feature_run)
    try:
        check_options(vars(args))
    except ValueError as error:
        parser.error(str(error))
    return args


# A notebook may have switched gradients off.
@torch.enable_grad()
def main():
    args = parse_arguments()
    config = {}
    for name in OPTIONS:
        config[name] = getattr(args, name)
    feature_model = None
    config["feature_sha256"] = None
    if args.feature_run:
        feature_run = load_run(args.feature_run)
        feature_model = feature_run.model.requires_grad_(False)
        # Resuming is refused if the folder of --feature-run holds other weights by then.
        config["feature_sha256"] = digest(feature_run.weights)
    dataset = data.read_dataset(args.data)
    config["data_sha256"] = dataset.sha256

    writer = RunWriter(args.run)
    run = writer.resume(config)
    log = run.log if run else []
    if len(log) >= args.epochs:
        print(f"{args.run} is finished: {len(log)} epochs.")
        if args.lr_scheduler != "cosine":
            print("To train it further, give more --epochs.")
        return

    (train_images, _), (test_images, _) = data.make_splits(dataset, args.hold_out)
    use_fast_kernels()
    torch.manual_seed(args.seed)
    model = run.model if run else MODELS[args.model](args.latent_dim)
    device = choose_device(args.device, model, train_images[:128])
    model.to(device, memory_format=memory_format(device))
    optimizer = make_optimizer(model, args.lr, device)
    if run:
        load_optimizer_state(optimizer, run)
    if feature_model:
        feature_model.to(device)
    train_images = train_images.to(device)
    test_images = test_images.to(device)

    def step(images):
        return train_step(model, optimizer, images, args.beta, feature_model, args.feature_weight)

    if device == "cuda":
        # The step is recorded once and then replayed, which is faster. Numbers such as args.beta
        # are recorded, too. If beta changed during training, it would have to be a tensor, as the
        # learning rate is.
        step = CapturedStep(step, args.batch_size)
    # torch.__version__ is not a plain string, and torch.load would refuse it in state.pth.
    config["torch"] = str(torch.__version__)
    config["device"] = describe_device(device)
    print(f"{model.name} on {config['device']}, epochs {len(log) + 1} to {args.epochs}", flush=True)

    previous_end = time.perf_counter()
    for epoch in range(len(log) + 1, args.epochs + 1):
        start = time.perf_counter()
        # Each epoch has a seed of its own, so a resumed run needs no saved random state.
        torch.manual_seed((args.seed * 1_000_003 + epoch) % 2**32)
        lr = learning_rate(args, log)
        set_learning_rate(optimizer, lr)
        row = {"epoch": epoch}
        try:
            model.train()
            row.update(train_epoch(step, train_images, args.batch_size))
            model.eval()
            row.update(test_epoch(model, test_images))
        except (MemoryError, RuntimeError) as error:
            stop_if_out_of_memory(error, args.batch_size)
            raise
        row["lr"] = lr
        row["seconds"] = time.perf_counter() - start
        stop_unless_finite(row)
        log.append(row)
        writer.save(config, model, optimizer, log)

        end = time.perf_counter()
        left = timedelta(seconds=round((end - previous_end) * (args.epochs - epoch)))
        previous_end = end
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
    for batch in images.split(500):
        reconstruction, mu, logvar = model(batch)
        _, bce, kld = loss_function(reconstruction, batch, mu, logvar, with_terms=True)
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
    loss, bce, kld = loss_function(reconstruction, images, mu, logvar, beta, with_terms=True)
    if feature_model:
        loss = loss + feature_weight * feature_matching_loss(feature_model, reconstruction, images)
    loss.backward()
    optimizer.step()
    return torch.stack((bce, kld)).detach()


def feature_matching_loss(feature_model, reconstruction, images):
    """Return the feature-matching loss of a batch: the squared distance of features.

    It compares reconstructions with images, and is summed over the hidden layers of the encoder of
    a trained VAE, `feature_model`. This is the perceptual loss of Hou et al. (2017), who use the
    VGG network instead.
    """
    distance = 0
    reconstruction_features = feature_model.features(reconstruction)
    image_features = feature_model.features(images)
    for found, wanted in zip(reconstruction_features, image_features):
        distance = distance + F.mse_loss(found, wanted, reduction="sum")
    return distance


def show_progress(text):
    """Show how far the epoch is, in one line of a terminal that the next call overwrites."""
    if sys.stdout and sys.stdout.isatty():
        print(f"\r{text:40}\r", end="", flush=True)


def stop_unless_finite(row):
    """Raise UserError if a loss of this epoch is NaN or infinite."""
    if not math.isfinite(row["train_loss"] + row["test_loss"]):
        raise UserError(
            f"The loss is not finite in epoch {row['epoch']}. Try a smaller --lr and another "
            "folder with --run. Earlier epochs are kept."
        )


def stop_if_out_of_memory(error, batch_size):
    """Raise UserError if memory ran out."""
    if data.is_out_of_memory(error):
        raise UserError(
            f"Not enough memory for batches of {batch_size} images. Try a smaller --batch-size and "
            "another folder with --run."
        ) from error


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
    more than ten epochs in a row without progress, as is PyTorch's default. It watches BCE +
    beta * KLD on the training images, without the feature-matching loss, which the log does not
    have. The scheduler is replayed from the log, so its state need not be saved.
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


class RunWriter:
    """Creates or resumes a run in a folder, and saves it after each epoch."""

    def __init__(self, path):
        self.path = path
        # The hash of state.pth as this process last read or wrote it, None if there was none.
        self.last_sha256 = self.state_sha256()
        self.warned = set()  # names of exported files for which a warning was printed

    def state_sha256(self):
        """Return the hash of state.pth, or None if there is no such file."""
        content = data.read_bytes(self.path / STATE)
        return None if content is None else data.sha256(content)

    def resume(self, config):
        """Prepare the folder, and return the run to be resumed, or None for a new run.

        Raises UserError if the run has other options or was trained on other data, or if the folder
        has files of a run but no state.pth. Raises OSError if nothing can be written to the folder.
        """
        run = None
        if self.last_sha256:
            run = load_run(self.path)
            check_same_config(run, config)
        elif any((self.path / name).exists() for name in RUN_FILES):
            command = train_command(read_config(self.path / CONFIG) or config, "runs/new")
            raise UserError(
                f"{self.path} has no {STATE}, so training cannot be resumed. "
                f"To train the same network again: {command}"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.path).close()  # fails now if the folder is read-only
        if run:
            # An interruption may have left the exported files one epoch behind.
            self.export(run.config, run.weights, run.log)
        return run

    def save(self, config, model, optimizer, log):
        """Write the checkpoint and the exported files.

        Raises UserError if another train.py has written into the same folder.
        """
        weights = {}
        for name, tensor in model.state_dict().items():
            weights[name] = tensor.cpu().contiguous()
        state = {
            "config": config,
            "model": weights,
            "optimizer": optimizer.state_dict()["state"],
            "log": log,
        }
        content = tensor_bytes(state)
        # Two train.py processes may use the same folder, and file locks do not work on many file
        # systems. So we check that state.pth is still the file this process last read or wrote.
        if self.state_sha256() != self.last_sha256:
            raise UserError(f"Another train.py has written to {self.path}, so this one stops.")
        data.write_bytes(self.path / STATE, content)
        self.last_sha256 = data.sha256(content)
        self.export(config, weights, log)

    def export(self, config, weights, log):
        """Write config.json, the weights and losses.csv.

        A failure only prints a warning, because state.pth has their content, too. For example, a
        spreadsheet program that shows losses.csv may keep it from being replaced.
        """
        contents = {
            CONFIG: data.json_bytes(config),
            WEIGHTS: tensor_bytes(weights),
            LOG: log_bytes(log),
        }
        for name, content in contents.items():
            try:
                data.write_bytes(self.path / name, content)
            except UserError as error:
                if name not in self.warned:
                    print(f"Warning: {error}. {STATE} has its content, too.", file=sys.stderr)
                self.warned.add(name)


def tensor_bytes(value):
    """Return what torch.save writes into a file."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def log_bytes(log):
    """Return a loss log as the content of a CSV file."""
    lines = [",".join(LOG_COLUMNS)]
    for row in log:
        lines.append(",".join(str(row[column]) for column in LOG_COLUMNS))
    return ("\n".join(lines) + "\n").encode()


def check_same_config(run, config):
    """Raise UserError, naming the first difference, unless the run has this config.

    Another number of epochs is allowed, except with a cosine schedule, whose learning rates depend
    on it. The run for feature matching may lie in another folder if its weights are the same.
    """
    for name, value in config.items():
        before = run.config[name]
        if before == value or name == "feature_run":
            continue
        if name == "epochs" and config["lr_scheduler"] != "cosine":
            continue
        if name == "data_sha256":
            difference = "on different data"
        elif name == "feature_sha256":
            difference = "with a different network as --feature-run"
        else:
            difference = f"with --{dashed(name)} {before}, not {value}"
        raise UserError(f"{run.path} was trained {difference}. Choose another folder with --run.")


def load_optimizer_state(optimizer, run):
    """Give Adam the optimizer state of a run. Raises UserError if it does not fit the network.

    Fused Adam ignores strides, and the run may have begun on another device. So the state is
    copied into the memory layout of the weights.
    """
    state = {}
    try:
        for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
            saved = run.optimizer_state[number]
            if saved["step"].numel() != 1:
                raise ValueError("step is not a single number")
            state[number] = {"step": saved["step"]}
            for name in ("exp_avg", "exp_avg_sq"):
                if saved[name].shape != parameter.shape:
                    raise ValueError(f"{name} has another shape than its parameter")
                state[number][name] = torch.empty_like(parameter).copy_(saved[name])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{run.path / STATE} has no optimizer state that fits the network. {RESTORE}"
        ) from error
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


# --- Devices and speed --------------------------------------------------------------------


def choose_device(asked, model, images):
    """Return the device to train on: `asked`, or for "auto" the first of cuda, mps, cpu that works.

    A device works if it computes what the CPU computes for `images` [B, 1, 28, 28] (see
    `check_device`). Raises UserError if a device that was asked for by name does not work.
    """
    if asked in ("cuda", "mps"):
        candidates = [asked]
    elif asked == "auto":
        candidates = []
        if torch.cuda.is_available():
            candidates.append("cuda")
        if torch.backends.mps.is_available():
            candidates.append("mps")
    else:
        candidates = []
    for device in candidates:
        try:
            check_device(device, model, images)
            return device
        except Exception as error:  # a driver, a card or its memory can fail in almost any way
            if asked != "auto":
                raise UserError(
                    f"--device {device} cannot be used: {data.reason(error)}. "
                    "Use --device cpu instead."
                ) from error
            print(f"Warning: {data.reason(error)}, so {device} is not used.", file=sys.stderr)
    check_adam_on_cpu()
    return "cpu"


def check_device(device, model, images):
    """Raise an error unless a device computes the loss and the gradients that the CPU computes.

    Both are computed without noise (z = mu). For each layer, the difference may be 10 % of the
    norm, because rounding alone causes up to 1.7 % in DeepConvVAE.

    If two passes on the CPU differ, the network has random layers such as dropout, and devices
    cannot be compared. Then we print a warning instead.
    """
    expected = loss_and_gradients(model, images, "cpu")
    if not agree(loss_and_gradients(model, images, "cpu"), expected, tolerance=0.001):
        # This raises an error if the device cannot compute them at all.
        loss_and_gradients(model, images, device)
        print(
            f"Warning: the network has random layers, so we cannot check whether {device} computes "
            f"the same as the CPU. {device} is used without this check.",
            file=sys.stderr,
        )
        return
    if not agree(loss_and_gradients(model, images, device), expected, tolerance=0.1):
        raise ArithmeticError(f"loss or gradients on {device} differ from those on the CPU")


def agree(values, expected, tolerance):
    """Return whether the tensors differ from those expected by at most `tolerance` of the norm."""
    for value, right in zip(values, expected, strict=True):
        if not (value - right).norm() <= tolerance * right.norm():  # NaN does not agree
            return False
    return True


def loss_and_gradients(model, images, device):
    """Return, on the CPU, the loss of images with z = mu, and its gradient for each layer.

    The gradients of a layer's parameters are joined, because the gradient of a bias before
    BatchNorm is only a rounding error and could not be compared alone.
    """
    model = copy.deepcopy(model).to(device, memory_format=memory_format(device)).train()
    images = images.to(device)
    mu, logvar = model.encode(images)
    loss = loss_function(model.decode(mu), images, mu, logvar)
    loss.backward()
    results = [loss.detach().cpu()]
    for module in model.modules():
        gradients = []
        for parameter in module.parameters(recurse=False):
            if parameter.grad is not None:  # the parameter is used, and not frozen
                gradients.append(parameter.grad.flatten())
        if gradients:
            results.append(torch.cat(gradients).cpu())
    return results


def check_adam_on_cpu():
    """Raise UserError if Adam fails on the CPU because of a GPU that cannot be initialized.

    Recent versions of PyTorch let Adam ask the GPU for its state even if all parameters are on the
    CPU.
    """
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.zeros(1)
    try:
        torch.optim.Adam([parameter]).step()
    except Exception as error:
        raise UserError(
            f"PyTorch finds a GPU that it cannot use ({data.reason(error)}), and this makes Adam "
            "fail even on the CPU. To hide the GPU, run: CUDA_VISIBLE_DEVICES= python train.py …"
        ) from error


def describe_device(device):
    """Return the device, on CUDA with the name of the GPU."""
    if device == "cuda":
        return f"cuda ({torch.cuda.get_device_name()})"
    return device


def memory_format(device):
    """Return the memory format of images and weights on a device.

    channels_last is faster, but on mps it has given wrong gradients without an error (PyTorch
    issues 107214 and 175189).
    """
    return torch.contiguous_format if device == "mps" else torch.channels_last


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
        self.can_capture = True
        self.graph = None

    def __call__(self, images):
        """Train on a batch [B, 1, 28, 28], and return [BCE, KLD] in nats, summed over the batch."""
        if not self.can_capture or len(images) != self.batch_size:
            return self.step(images)
        if self.batches_before_capture > 0:
            self.batches_before_capture -= 1
            return self.step(images)
        if self.graph is None:
            try:
                self.capture(images)
            except RuntimeError as error:
                print(
                    "Warning: the training step cannot be captured as a CUDA graph "
                    f"({data.reason(error)}). Training continues without it, at a lower speed.",
                    file=sys.stderr,
                )
                self.can_capture = False
                return self.step(images)
        self.images.copy_(images)
        self.graph.replay()
        return self.sums.clone()

    def capture(self, images):
        """Record the kernels of a step. This does not run them."""
        graph = torch.cuda.CUDAGraph()
        self.images = images.clone()
        with torch.cuda.graph(graph):
            self.sums = self.step(self.images)
        self.graph = graph


def use_fast_kernels():
    """Set what makes PyTorch faster, and keep convolutions in float32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    # By default, glibc returns the memory of each step to the system and has to request it again.
    # It stops doing so for blocks up to 32 MiB once a block of nearly that size has been freed
    # (see mallopt(3)). So we allocate such a block, which is freed at once.
    torch.empty(31 * 2**20, dtype=torch.uint8)


if __name__ == "__main__":
    data.run_script(
        main, when_interrupted="Run the same command again to resume after the last finished epoch."
    )
