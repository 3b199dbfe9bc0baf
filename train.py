"""Train a VAE on Fashion-MNIST with the report's settings, and keep the run in a folder.

The same command goes on after an interruption, from the last finished epoch; with more
--epochs it trains the rest of a finished run.
"""

import sys
import time
from datetime import timedelta

import torch

import data
from model import MODELS, kl_divergence, reconstruction_bce

TEST_BATCH = 500
# What wipes the counter within an epoch; there is one on a terminal only.
CLEAR = "\r\033[K" if sys.stdout.isatty() else ""


def main():
    args = parse_arguments()
    run, device = args.run, args.device

    torch.manual_seed(args.seed)
    model = MODELS[args.model](args.latent_dim)
    model.to(device, memory_format=torch.channels_last)
    on_cuda = device.type == "cuda"
    optimizer = torch.optim.Adam(
        model.parameters(), lr=args.lr, fused=True, capturable=on_cuda
    )
    settings = {name: getattr(args, name) for name in data.SETTINGS}
    log = [] if args.fresh else resume(run, settings, args.epochs, model, optimizer)
    if len(log) >= args.epochs:
        print(f"{run} is finished: {len(log)} epochs. To go on, give more --epochs.")
        return
    train_images = data.load_split(args.data, train=True)[0].to(device)
    test_images = data.load_split(args.data, train=False)[0].to(device)
    if args.fresh:
        for name in data.RUN_FILES:
            (run / name).unlink(missing_ok=True)
    begin(run, {**settings, "epochs": args.epochs}, model, device, len(log) + 1)

    def train_step(x):
        return update(model, optimizer, x)

    def test_step(x):
        with torch.no_grad():
            return loss_terms(model, x)

    if on_cuda:
        torch.backends.cudnn.allow_tf32 = False  # float32, as everywhere else
        torch.backends.cudnn.benchmark = True
        train_step = CapturedStep(train_step, args.batch_size)
    # glibc gives the memory of each step back to the system and pays to have it again.
    # Freeing a block of nearly 32 MiB, the most it heeds, ends that (see mallopt(3)).
    torch.empty(31 * 2**20, dtype=torch.uint8)

    for epoch in range(len(log) + 1, args.epochs + 1):
        start = time.perf_counter()
        # An epoch has a seed of its own, so that a run goes on without a random state.
        torch.manual_seed((args.seed * 1_000_003 + epoch) % 2**32)
        shuffled = torch.randperm(len(train_images), device=device)
        batches = shuffled.split(args.batch_size)
        train = mean_losses(train_step, train_images, batches, epoch)
        batches = torch.arange(len(test_images), device=device).split(TEST_BATCH)
        test = mean_losses(test_step, test_images, batches, epoch)
        seconds = time.perf_counter() - start

        row = (epoch, sum(train), *train, sum(test), *test, args.lr, seconds)
        log.append(dict(zip(data.LOSS_COLUMNS, row)))
        save(run, model, optimizer, log)
        left = timedelta(seconds=round(seconds * (args.epochs - epoch)))
        print(
            f"{CLEAR}Epoch {epoch}: Train loss {sum(train):.2f}, "
            f"Test loss {sum(test):.2f}, {seconds:.2f} s, {left} left",
            flush=True,
        )
    speed = len(train_images) * len(log) / sum(row["seconds"] for row in log)
    print(f"Mean of the run: {speed:,.0f} training images/s, test passes included")


def parse_arguments():
    """Return the command line's settings; the defaults are the report's."""
    parser = data.command_line(__doc__)
    count = data.number(int)
    for name, kind, default, meaning in (
        ("--epochs", count, 100, "epochs in all"),
        ("--batch-size", count, 128, "images in an update"),
        ("--lr", data.number(float), 5e-4, "learning rate of Adam"),
        ("--latent-dim", count, 32, "dimensions of the latent code"),
        ("--seed", data.number(int, zero=True), 0, "of weights, order and noise"),
    ):
        parser.add_argument(name, type=kind, default=default, help=meaning)
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="conv",
        help="convolutional or fully connected",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over, discarding the run"
    )
    return parser.parse_args()


def loss_terms(model, x):
    """Return [BCE, KLD] of a batch, in nats summed over it, still on the device."""
    reconstruction, mu, logvar = model(x)
    return torch.stack(
        (reconstruction_bce(reconstruction, x), kl_divergence(mu, logvar))
    )


def update(model, optimizer, x):
    """Update the model on a batch [B, 1, 28, 28]; return its `loss_terms` from before."""
    optimizer.zero_grad()
    terms = loss_terms(model, x)
    terms.sum().backward()
    optimizer.step()
    return terms.detach()


class CapturedStep:
    """A training step recorded once as a CUDA graph and then replayed.

    At batch 128 a GPU otherwise waits for the launch of each small kernel. The first batches
    run as they are, for cuDNN chooses its algorithms in them and Adam makes its state; so does
    any batch of another size, such as an epoch's last.
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


def mean_losses(step, images, batches, epoch):
    """Return mean BCE and KLD, in nats per image, of `step` over `batches` of indices.

    Raises UserError if they are not finite.
    """
    terms, done, looked = [], 0, time.perf_counter()
    for batch in batches:
        terms.append(step(images[batch]))
        done += len(batch)
        if time.perf_counter() - looked > 0.5:
            looked = time.perf_counter()
            if not terms[-1].isfinite().all():
                break
            if CLEAR:
                print(
                    f"{CLEAR}Epoch {epoch}: {done:,} of {len(images):,}",
                    end="",
                    flush=True,
                )
    # Read here once, not at each step: the device need not wait for this program.
    means = torch.stack(terms).cpu().double().sum(0) / len(images)
    if not means.isfinite().all():
        raise data.UserError(
            f"the loss is not finite in epoch {epoch}: try a smaller --lr"
            f" ({epoch - 1} finished epochs are kept)"
        )
    return means.tolist()


def begin(run, settings, model, device, epoch):
    """Write the settings of the run and where it is made; say so on the terminal."""
    where = device.type
    if where == "cuda":
        where += f" ({torch.cuda.get_device_name(device)})"
    config = {
        **settings,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "torch": torch.__version__,
        "device": where,
    }
    data.write_files({run / data.CONFIG: data.json_bytes(config)})
    print(f"{type(model).__name__}, {config['parameters']:,} parameters, on {where}")
    print(f"Epochs {epoch} to {settings['epochs']}, in {run}", flush=True)


def save(run, model, optimizer, log):
    """Write the run as it is after an epoch; state.pth alone is enough to restore the rest."""
    weights = {
        name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    state = {"model": weights, "optimizer": optimizer.state_dict()["state"], "log": log}
    data.write_files(
        {
            run / data.STATE: data.to_bytes(state),
            run / data.WEIGHTS: data.to_bytes(weights),
            run / data.LOSSES: data.losses_bytes(log),
        }
    )


def resume(run, settings, epochs, model, optimizer):
    """Return the loss log of what `run` holds, its last state put into model and optimizer.

    Raises UserError if the run has other settings, or cannot go on to `epochs`.
    """
    if not (run / data.CONFIG).exists():
        if (run / data.WEIGHTS).exists():
            raise data.UserError(
                f"{run} has weights but no {data.CONFIG}: choose another --run, or --fresh"
            )
        return []
    config = data.read_json(run / data.CONFIG, settings)
    for name, value in settings.items():
        if config[name] != value:
            raise data.UserError(
                f"{run} has {name} {config[name]}, not {value}: choose another --run,"
                " or start over with --fresh"
            )
    log = data.read_losses(run / data.LOSSES)
    path = run / data.STATE
    if not path.exists():
        if 0 < len(log) < epochs:
            raise data.UserError(
                f"{path} is missing, so the {len(log)} epochs of this run cannot go on:"
                " choose another --run, or start over with --fresh"
            )
        return log
    state = data.read_tensors(path, "start over with --fresh")
    try:
        model.load_state_dict(state["model"])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        state_log = list(state["log"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise data.UserError(
            f"{path} is the state of another model: start over with --fresh"
        ) from error
    if log != state_log or not (run / data.WEIGHTS).exists():
        save(run, model, optimizer, state_log)  # `save` was killed between two renames
    return state_log


if __name__ == "__main__":
    data.run_script(main)
