"""Train a VAE on Fashion-MNIST with the report's settings, and keep the run in a folder.

The same command goes on after an interruption, and with more --epochs after a finished run,
but for a cosine, whose rates depend on them.
"""

import contextlib
import math
import sqlite3
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

import data
from model import MODELS, kl_divergence, load_model, reconstruction_bce

TEST_BATCH = 500
# Wipes the counter within an epoch, which is shown on a terminal only.
CLEAR = f"\r{'':40}\r" if sys.stdout.isatty() else ""


def parse_arguments():
    """Return the command line's settings; the defaults are the report's."""
    parser = data.command_line(__doc__)
    for name, option in data.SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **option)
    args = parser.parse_args()
    if bool(args.feature_weight) != bool(args.feature_run):
        parser.error("--feature-weight and --feature-run go together")
    return args


def main():
    args = parse_arguments()
    run, device = args.run, args.device
    settings = {name: getattr(args, name) for name in data.SETTINGS}
    encoder_run = data.read_run(Path(args.feature_run)) if args.feature_run else None
    if encoder_run:
        settings["feature_sha256"] = encoder_run.sha256  # it might be trained on in between
    state = find_state(run, settings)  # first: a refused folder does not even get a lock file
    features = load_features(encoder_run, args.feature_weight, device) if encoder_run else None
    tune()

    with only_writer(run):
        torch.manual_seed(args.seed)
        model = MODELS[args.model](args.latent_dim).to(device, memory_format=torch.channels_last)
        on_cuda = device == "cuda"
        lr = args.lr
        if on_cuda and args.lr_scheduler != "constant":
            lr = torch.tensor(lr, device=device)  # a captured step reads it at each replay
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True, capturable=on_cuda)
        log = go_on(run, state, model, optimizer) if state else []
        if len(log) >= args.epochs:
            more = "" if args.lr_scheduler == "cosine" else " To go on, give more --epochs."
            print(f"{run} is finished: {len(log)} epochs.{more}")
            return
        train_images = data.load_split(args.data, True, args.hold_out)[0].to(device)
        test_images = data.load_split(args.data, False, args.hold_out)[0].to(device)
        train_step = partial(update, model, optimizer, args.beta, features)
        if on_cuda:
            train_step = CapturedStep(train_step, args.batch_size)
        where = f"cuda ({torch.cuda.get_device_name()})" if on_cuda else device
        config = {**settings, "torch": str(torch.__version__), "device": where}
        epochs = f"epochs {len(log) + 1} to {args.epochs}"
        print(f"{type(model).__name__} on {where}, {epochs}", flush=True)

        for epoch in range(len(log) + 1, args.epochs + 1):
            start = time.perf_counter()
            # An epoch has a seed of its own, so that a run goes on without a random state.
            torch.manual_seed((args.seed * 1_000_003 + epoch) % 2**32)
            rate = learning_rate(args, log)
            group = optimizer.param_groups[0]
            group["lr"] = group["lr"].fill_(rate) if torch.is_tensor(group["lr"]) else rate
            model.train()
            batches = torch.randperm(len(train_images), device=device).split(args.batch_size)
            row = {"epoch": epoch, **mean_losses("train", train_step, train_images, batches)}
            model.eval()
            batches = torch.arange(len(test_images), device=device).split(TEST_BATCH)
            with torch.no_grad():
                row |= mean_losses("test", lambda x: loss_terms(model, x)[0], test_images, batches)
            row |= {"lr": rate, "seconds": time.perf_counter() - start}
            if not math.isfinite(row["train_loss"] + row["test_loss"]):
                advice = "try a smaller --lr, in another --run; finished epochs are kept"
                raise data.UserError(f"the loss is not finite in epoch {epoch}: {advice}")
            log.append(row)
            save(run, config, model, optimizer, log)
            losses = f"Train loss {row['train_loss']:.2f}, Test loss {row['test_loss']:.2f}"
            left = timedelta(seconds=round(row["seconds"] * (args.epochs - epoch)))
            print(f"Epoch {epoch}: {losses}, {row['seconds']:.2f} s, {left} left", flush=True)
        speed = len(train_images) * len(log) / sum(row["seconds"] for row in log)
        print(f"Mean of the run: {speed:,.0f} training images/s, test passes included")


def mean_losses(split, step, images, batches):
    """Return means of `step` over `batches` of indices into images, in nats per image, by name."""
    sums, done, shown = [], 0, time.perf_counter()
    for batch in batches:
        sums.append(step(images[batch]))
        done += len(batch)
        if CLEAR and time.perf_counter() - shown > 0.5:
            shown = time.perf_counter()
            print(f"{CLEAR}{split}: {done:,} of {len(images):,}", end="", flush=True)
    print(CLEAR, end="", flush=True)
    # Read here once, not at each step: the device need not wait for this program.
    bce, kld = (torch.stack(sums).cpu().double().sum(0) / len(images)).tolist()
    return {f"{split}_loss": bce + kld, f"{split}_bce": bce, f"{split}_kld": kld}


def update(model, optimizer, beta, features, x):
    """Update the model on a batch [B, 1, 28, 28]; return its BCE and KLD as `loss_terms` does.

    BCE + β·KLD is minimised, plus what `features` makes of reconstruction and image, if given.
    """
    optimizer.zero_grad()
    terms, reconstruction = loss_terms(model, x)
    loss = terms[0] + beta * terms[1]
    if features:
        loss += features(reconstruction, x)
    loss.backward()
    optimizer.step()
    return terms.detach()


def loss_terms(model, x):
    """Return [BCE, KLD] of a batch, in nats summed over it, on the device; the reconstruction."""
    reconstruction, mu, logvar = model(x)
    terms = torch.stack((reconstruction_bce(reconstruction, x), kl_divergence(mu, logvar)))
    return terms, reconstruction


# ------------------------------------------------------------------------------------------
# What the report proposes


def learning_rate(args, log):
    """Return the rate of the epoch after those in `log`, by torch's own scheduler.

    It is stepped through the log each time, so nothing of it needs to be saved. "cosine" falls
    from --lr to 0 over --epochs; "plateau" (torch's defaults: to a tenth after more than ten
    epochs without progress) watches BCE + β·KLD in training.
    """
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


def load_features(run, weight, device):
    """Return what feature matching adds to the loss, a function of reconstruction and image.

    It is `weight` times the squared distance, summed, between what the hidden layers of the
    encoder of `run` make of the two (Hou et al., 2017, there with VGG).
    """
    encoder = load_model(run, device).requires_grad_(False)

    def distance(reconstruction, x):
        pairs = zip(encoder.features(reconstruction), encoder.features(x))
        return weight * sum(F.mse_loss(*pair, reduction="sum") for pair in pairs)

    return distance


# ------------------------------------------------------------------------------------------
# Going on


def find_state(run, settings):
    """Return the state that a run goes on from, or None where a new one can begin.

    Raises UserError if the folder holds a run with other settings, or files of a run without
    (or with a damaged) state.pth, such as a published one.
    """
    if not any((run / name).exists() for name in data.RUN_FILES):
        return None
    state = data.read(run / data.STATE)
    there = {**state["config"], **data.settings_of(state["config"])}
    # An encoder is known by its digest, wherever it lies; a cosine's rates depend on the epochs.
    free = ["feature_run"] if settings["lr_scheduler"] == "cosine" else ["feature_run", "epochs"]
    for name, value in settings.items():
        if name not in free and there.get(name) != value:
            differs = f"{name} {there.get(name)}, not {value}"
            raise data.UserError(f"{run} has {differs}: {data.ANOTHER_RUN}")
    return state


def go_on(run, state, model, optimizer):
    """Put a run's last state into model and optimizer, write its views anew, return its log."""
    try:
        model.load_state_dict(state["model"])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise data.UserError(f"{run / data.STATE} is damaged: {data.ANOTHER_RUN}") from error
    write_views(run, state)
    return state["log"]


def save(run, config, model, optimizer, log):
    """Write the run as it is after an epoch."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    moments = optimizer.state_dict()["state"]
    state = {"config": config, "model": weights, "optimizer": moments, "log": log}
    data.write(run / data.STATE, state)
    write_views(run, state)


def write_views(run, state):
    """Write the files that show what is in state.pth."""
    data.write(run / data.CONFIG, state["config"])
    data.write(run / data.WEIGHTS, state["model"])
    data.write(run / data.LOG, state["log"])


@contextlib.contextmanager
def only_writer(run):
    """Make the folder `run` if it is new, and keep any other train.py out of it.

    SQLite's lock of a file is the same everywhere, Windows included: the system drops it when
    the process ends, however it ends. Raises UserError if another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    (run / "train.lock").touch()
    with contextlib.closing(sqlite3.connect(run / "train.lock", timeout=0)) as file:
        try:
            file.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise data.UserError(f"another train.py is at work in {run}") from error
        yield


# ------------------------------------------------------------------------------------------
# Speed


class CapturedStep:
    """A training step recorded once as a CUDA graph and then replayed.

    Otherwise a GPU waits for the launch of each small kernel. The first batches run as they are,
    for cuDNN chooses its algorithms and Adam makes its state; so does a batch of another size.
    """

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
