"""Train a VAE on Fashion-MNIST with the report's settings, and keep the run in a folder.

The same command goes on after an interruption, and with more --epochs after a finished run. Only
a cosine must have all its epochs from the start, since its rates depend on them.
"""

import copy
import math
import sys
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

import data
from model import BATCH, MODELS, kl_divergence, load_model, loss_function, reconstruction_bce


def parse_arguments():
    """Return the command line's settings; the defaults are the report's."""
    parser = data.command_line(__doc__)
    device = {"choices": ["auto", "cpu", "cuda", "mps"], "default": "auto"}
    parser.add_argument("--device", **device, help="auto: first of cuda, mps, cpu that works")
    for name, option in data.SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **option)
    args = parser.parse_args()
    if bool(args.feature_weight) != bool(args.feature_run):
        parser.error("--feature-weight and --feature-run go together")
    return args


def main():
    args = parse_arguments()
    settings = {name: getattr(args, name) for name in data.SETTINGS}
    encoder, settings["feature_sha256"] = load_encoder(args.feature_run)
    writer = Writer(args.run, settings)
    log = writer.run.log if writer.run else []
    if len(log) >= args.epochs:
        more = "" if args.lr_scheduler == "cosine" else " To go on, give more --epochs."
        print(f"{args.run} is finished: {len(log)} epochs.{more}")
        return

    (train_images, _), (test_images, _) = data.load_splits(args.data, args.hold_out)
    tune()
    torch.manual_seed(args.seed)
    model = writer.model or MODELS[args.model](args.latent_dim)
    device = choose_device(args.device, model, train_images[:BATCH])
    model.to(device, memory_format=memory_format(device))
    lr = torch.zeros((), device=device)  # where a captured step reads the rate at each replay
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True, capturable=device == "cuda")
    if writer.run:
        load_moments(optimizer, writer.run)
    encoder = encoder and encoder.to(device)
    step = partial(update, model, optimizer, args.beta, encoder, args.feature_weight)
    if device == "cuda":
        step = CapturedStep(step, args.batch_size)
    train_images, test_images = train_images.to(device), test_images.to(device)
    where = f"cuda ({torch.cuda.get_device_name()})" if device == "cuda" else device
    config = {**settings, "torch": str(torch.__version__), "device": where}
    epochs = range(len(log) + 1, args.epochs + 1)
    print(f"{type(model).__name__} on {where}, epochs {epochs[0]} to {epochs[-1]}", flush=True)

    for epoch in epochs:
        start = time.perf_counter()
        # An epoch has a seed of its own, so that a run goes on without a random state.
        torch.manual_seed((args.seed * 1_000_003 + epoch) % 2**32)
        rate = learning_rate(args, log)
        optimizer.param_groups[0]["lr"] = lr.fill_(rate) if device == "cuda" else rate
        model.train()
        batches = torch.randperm(len(train_images), device=device).split(args.batch_size)
        row = {"epoch": epoch, **run_epoch("train", step, train_images, batches)}
        model.eval()
        batches = torch.arange(len(test_images), device=device).split(500)
        with torch.no_grad():
            row |= run_epoch("test", lambda x: loss_terms(model, x)[0], test_images, batches)
        row |= {"lr": rate, "seconds": time.perf_counter() - start}
        if not math.isfinite(row["train_loss"] + row["test_loss"]):
            advice = "try a smaller --lr, in another --run; finished epochs are kept"
            raise data.UserError(f"the loss is not finite in epoch {epoch}: {advice}")
        log.append(row)
        writer.save(config, model, optimizer, log)
        losses = f"Train loss {row['train_loss']:.2f}, Test loss {row['test_loss']:.2f}"
        left = timedelta(seconds=round(row["seconds"] * (args.epochs - epoch)))
        print(f"Epoch {epoch}: {losses}, {row['seconds']:.2f} s, {left} left", flush=True)


def run_epoch(split, step, images, batches):
    """Call `step` on batches of indices into images; return its mean losses in nats per image."""
    # Wipes the counter, which only a terminal has.
    clear = f"\r{'':40}\r" if sys.stdout and sys.stdout.isatty() else ""
    sums, done, shown = [], 0, time.perf_counter()
    for batch in batches:
        sums.append(step(images[batch]))
        done += len(batch)
        if clear and time.perf_counter() - shown > 0.5:
            shown = time.perf_counter()
            print(f"{clear}{split}: {done:,} of {len(images):,}", end="", flush=True)
    print(clear, end="", flush=True)
    # Read here once, not at each step: the device need not wait for this program.
    bce, kld = (torch.stack(sums).cpu().double().sum(0) / len(images)).tolist()
    return {f"{split}_loss": bce + kld, f"{split}_bce": bce, f"{split}_kld": kld}


def update(model, optimizer, beta, encoder, feature_weight, x):
    """Update the model on a batch [B, 1, 28, 28]; return its BCE and KLD as `loss_terms` does.
    BCE + β·KLD is minimised; with an `encoder` also the weighted squared distance, summed, of what
    its hidden layers make of image and reconstruction (Hou et al., 2017, there with VGG)."""
    optimizer.zero_grad()
    terms, reconstruction = loss_terms(model, x)
    loss = terms[0] + beta * terms[1]
    if encoder:
        pairs = zip(encoder.features(reconstruction), encoder.features(x))
        loss += feature_weight * sum(F.mse_loss(*pair, reduction="sum") for pair in pairs)
    loss.backward()
    optimizer.step()
    return terms.detach()


def loss_terms(model, x):
    """Return [BCE, KLD] of a batch, in nats summed over it, on the device; the reconstruction."""
    reconstruction, mu, logvar = model(x)
    terms = torch.stack((reconstruction_bce(reconstruction, x), kl_divergence(mu, logvar)))
    return terms, reconstruction


# --- What the report proposes -------------------------------------------------------------


def learning_rate(args, log):
    """Return the rate of the epoch after those in `log`, by torch's own scheduler. It is stepped
    through the log each time, so nothing of it needs to be saved. "cosine" falls from --lr to 0
    over --epochs; "plateau" (torch's defaults: to a tenth after more than ten epochs without
    progress) watches BCE + β·KLD in training."""
    if args.lr_scheduler == "constant":
        return args.lr
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr)  # a stand-in, stepped lest torch warn
    cosine, plateau = CosineAnnealingLR(optimizer, args.epochs), ReduceLROnPlateau(optimizer)
    for row in log:
        optimizer.step()
        if args.lr_scheduler == "cosine":
            cosine.step()
        else:
            plateau.step(row["train_bce"] + args.beta * row["train_kld"])
    return optimizer.param_groups[0]["lr"]


def load_encoder(path):
    """Return the network of the run at `path` for feature matching, and its weights' digest, which
    is a setting, for that run might be trained on in between. Two None without a path."""
    if not path:
        return None, None
    run = data.read_run(Path(path))
    return load_model(run).requires_grad_(False), data.digest(run.weights)


# --- Resuming -----------------------------------------------------------------------------


class Writer:
    """What opens a folder for a run with these settings, and then keeps it there. `run` is the
    data.Run to go on from and `model` its network, or both are None. UserError if the folder has a
    run with other settings, or files of one without (or with a damaged) state.pth. Another train.py
    may choose the same folder, and locks fail on many file systems: so before state.pth is replaced
    it must, by its digest, be the one that was last read or written here."""

    def __init__(self, path, settings):
        self.path, self.run, self.model, self.remarks = path, None, None, set()
        self.seen = data.read(path / data.STATE, data.sha256)
        if self.seen:
            self.run = data.read_run(path)
            check_settings(self.run, settings)
            self.model = load_model(self.run)  # before views are replaced by what fails here
            self.write_views(self.run.settings, self.run.weights, self.run.log)
        elif any((path / name).exists() for name in data.RUN_FILES):
            there = data.read(path / data.CONFIG, data.parse_config)
            command = data.train_command(there or settings, "runs/anew")
            raise data.UserError(f"{path} has no {data.STATE} to go on from; elsewhere: {command}")
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # where one cannot write, it fails at once

    def save(self, config, model, optimizer, log):
        """Write the run as it is after an epoch; UserError if another train.py wrote there."""
        weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        moments = optimizer.state_dict()["state"]
        state = {"config": config, "model": weights, "optimizer": moments, "log": log}
        if data.read(self.path / data.STATE, data.sha256) != self.seen:
            raise data.UserError(f"{self.path} was changed: another train.py is at work in it")
        self.seen = data.write(self.path / data.STATE, state)
        self.write_views(config, weights, log)

    def write_views(self, *views):
        """Write what shows the state; one that a spreadsheet holds, say, is worth a remark."""
        for name, view in zip((data.CONFIG, data.WEIGHTS, data.LOG), views):
            try:
                data.write(self.path / name, view)
            except data.UserError as error:
                if name not in self.remarks:
                    print(f"Remark: {error}; {data.STATE} has it.", file=sys.stderr)
                self.remarks.add(name)


def check_settings(run, settings):
    """Raise UserError, naming the first that differs, unless a run has these settings."""
    # An encoder is known by its digest, wherever it lies; a cosine's rates depend on the epochs.
    free = ["feature_run"] if settings["lr_scheduler"] == "cosine" else ["feature_run", "epochs"]
    for name, value in settings.items():
        if name not in free and run.settings.get(name) != value:
            differs = f"{name} {run.settings.get(name)}, not {value}"
            raise data.UserError(f"{run.path} has {differs}: choose another --run")


def load_moments(optimizer, run):
    """Give Adam the moments of a run; UserError if they are not of this network. They are laid out
    in memory as the weights are, for fused Adam heeds no strides, and the run may have begun on a
    device with another order."""
    parameters = optimizer.param_groups[0]["params"]
    try:
        for number, parameter in enumerate(parameters):
            moments = run.moments[number]
            float(moments["step"])
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != parameter.shape:
                    raise ValueError
                moments[name] = torch.empty_like(parameter).copy_(moments[name])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": run.moments})
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        problem = "has Adam's moments of another network: choose another --run"
        raise data.UserError(f"{run.path / data.STATE} {problem}") from error


# --- Devices and speed --------------------------------------------------------------------


def choose_device(asked, model, x):
    """Return `asked`, or for "auto" the first of cuda, mps and cpu that is there and computes what
    the CPU computes: loss of images x and gradient for each layer, by a copy of `model` with z = μ,
    within 10 % of the norm (rounding alone makes 1.7 % in DeepConvVAE). UserError if one that was
    asked for does not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for name in [name for name, is_there in there.items() if asked in (name, is_there and "auto")]:
        try:
            expected = loss_and_gradients(model, x, "cpu")
            for value, right in zip(loss_and_gradients(model, x, name), expected, strict=True):
                if not (value - right).norm() <= 0.1 * right.norm():
                    raise ArithmeticError("it computes other gradients than the CPU")
            return name
        except Exception as error:  # a driver, a card, its memory, a kernel: all fail differently
            reason = f"{name} cannot be used: {data.reason(error)}"
            if asked != "auto":
                raise data.UserError(f"--device {reason}; --device cpu can") from error
            print(f"Remark: {reason}", file=sys.stderr)
    return "cpu"


def loss_and_gradients(model, x, device):
    """Return the loss of images x and its gradient for each layer, without noise, on the CPU. Of a
    layer's parameters together, for those of a bias before BatchNorm are 0 but for rounding."""
    model = copy.deepcopy(model).to(device, memory_format=memory_format(device)).train()
    x = x.to(device)
    mu, logvar = model.encode(x)
    loss = loss_function(model.decode(mu), x, mu, logvar)
    loss.backward()
    layers = [list(module.parameters(recurse=False)) for module in model.modules()]
    gradients = [torch.cat([p.grad.flatten() for p in layer]).cpu() for layer in layers if layer]
    return [loss.detach().cpu(), *gradients]


def memory_format(device):
    """Return the order of a network's values: channels last is faster, but was wrong on mps.
    PyTorch's issues 107214 and 175189: silently other gradients."""
    return torch.contiguous_format if device == "mps" else torch.channels_last


class CapturedStep:
    """A training step recorded once as a CUDA graph and then replayed. Otherwise a GPU waits for
    the launch of each small kernel. The first batches run as they are, for cuDNN chooses its
    algorithms and Adam makes its state; so does a batch of another size."""

    def __init__(self, step, batch_size):
        self.step, self.batch_size = step, batch_size
        self.warm_up, self.graph = 3, None

    def __call__(self, x):
        if len(x) != self.batch_size or self.warm_up:
            self.warm_up = max(self.warm_up - 1, 0)
            return self.step(x)
        if self.graph is None:
            self.graph, self.x = torch.cuda.CUDAGraph(), x.clone()
            with torch.cuda.graph(self.graph):
                self.terms = self.step(self.x)
        self.x.copy_(x)
        self.graph.replay()
        return self.terms.clone()


def tune():
    """Set what makes PyTorch faster, and keep products in float32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    # glibc gives the memory of each step back to the system and pays to have it again.
    # Freeing a block of nearly 32 MiB, the most it heeds, ends that (see mallopt(3)).
    torch.empty(31 * 2**20, dtype=torch.uint8)


if __name__ == "__main__":
    data.run_script(main, "the same command goes on after the last finished epoch")
