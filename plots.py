"""Draw a run: its loss curves, reconstructions, samples, confusion matrix and latent space."""

import os
import sys
from pathlib import Path
from textwrap import fill

try:
    import matplotlib.style
except ValueError:  # at a MPLBACKEND that is inherited from a notebook and not installed here
    os.environ.pop("MPLBACKEND", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        del sys.modules[name]  # half imported
    import matplotlib.style
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import ConfusionMatrixDisplay

import data
from model import active_dimensions, latent_means, load_model, sample_mixture


@torch.no_grad()
@matplotlib.style.context("default")  # whatever a user's matplotlibrc says
def main():
    parser = data.command_line(__doc__)
    compare = {"nargs": "+", "default": [], "help": "show their reconstructions too"}
    parser.add_argument("--compare", type=Path, metavar="RUN", **compare)
    args = parser.parse_args()
    runs = [data.read_run(path) for path in (args.run, *args.compare)]
    print(*runs, sep="\n")
    models, run = [load_model(one) for one in runs], runs[0]
    classification = data.read_classification(run)
    splits = data.load_splits(args.data, run.settings["hold_out"])
    (train_images, _), (images, labels) = splits

    save(run, "loss_curves.png", draw_losses(run.log))
    classes = labels.unique()
    firsts = images[[(labels == k).nonzero()[0].item() for k in classes]]
    rows, names = [firsts], ["original", *(one.describe() for one in runs)]
    for model in models:
        torch.manual_seed(0)
        rows.append(model(firsts)[0])
    save(run, "reconstructions.png", draw_grid(rows, names, [data.CLASSES[k] for k in classes]))
    z, names = sample_codes(models[0], run.settings["latent_dim"], train_images)
    save(run, "samples.png", draw_grid(models[0].decode(z).split(10), names))
    mu = latent_means(models[0], images[:5000])  # t-SNE takes its time
    if active_dimensions(mu):
        save(run, "latent_space.png", draw_latent_space(mu, labels[: len(mu)]))
    else:
        print("Remark: no latent_space.png, for no dimension is active.", file=sys.stderr)
    if classification:
        save(run, "confusion_matrix.png", draw_confusion_matrix(classification))


def save(run, name, figure):
    """Write a figure into the run's folder, and say so."""
    data.write(run.path / name, figure)
    print(run.path / name)


def draw_losses(log):
    """Return a figure of the loss and of its two terms, in nats per image, over the epochs."""
    if len(log) > 2:
        log = log[1:]  # the first epoch, far above the others, would flatten them
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    titles = {"loss": "Loss = BCE + KLD", "bce": "BCE, reconstruction", "kld": "KLD, latent code"}
    for axis, (loss, title) in zip(figure.subplots(1, 3), titles.items()):
        for split in ("train", "test"):
            points = zip(*((row["epoch"], row[f"{split}_{loss}"]) for row in log))
            axis.plot(*points, label=split, marker="." if len(log) < 10 else "")
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("nats per image")
    figure.axes[0].legend()
    return figure


def sample_codes(model, latent_dim, train_images):
    """Return codes [100, latent_dim] to decode, and names for their rows of ten. Half are from N(0,
    I), half from a mixture fitted to codes of images (Ghosh et al., 2020); if there are two
    dimensions, a grid of normal quantiles (Kingma & Welling, 2014, figure 4)."""
    if latent_dim == 2:
        quantiles = torch.special.ndtri(torch.linspace(0.05, 0.95, 10))
        return torch.cartesian_prod(quantiles, quantiles), ()
    torch.manual_seed(0)
    mixture_z = sample_mixture(model, train_images, 50)
    names = ["N(0, I)", *[""] * 4, "mixture"]
    return torch.cat((torch.randn(50, latent_dim), mixture_z)), names


def draw_grid(rows, names=(), titles=()):
    """Return a figure of rows of images [C, 1, 28, 28], with names at the left, titles above."""
    figure = Figure(figsize=(1.1 * len(rows[0]), 1.15 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    no_ticks = {"xticks": [], "yticks": []}
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False, subplot_kw=no_ticks)
    for axis, picture in zip(axes.flat, torch.cat([*rows])):
        axis.imshow(picture[0].numpy(), cmap="gray", vmin=0, vmax=1)
    for axis, name in zip(axes[:, 0], names):
        axis.set_ylabel(fill(name, 12), fontsize=11)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=11)
    return figure


def draw_latent_space(mu, labels):
    """Return a figure of μ [N, latent_dim] in two dimensions, by PCA and by t-SNE."""
    if mu.shape[1] == 1:
        mu = torch.cat((mu, torch.zeros_like(mu)), dim=1)  # both want two columns
    # The default perplexity, 30, must be below the number of points.
    tsne = TSNE(perplexity=min(30, len(mu) / 4), random_state=0, n_jobs=-1)
    methods = {"PCA": PCA(2, random_state=0), "t-SNE": tsne}
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axis, (name, method) in zip(figure.subplots(1, 2), methods.items()):
        axis.scatter(*method.fit_transform(mu).T, c=[f"C{k}" for k in labels], s=2)
        axis.set(title=f"{name} of μ, {len(mu):,} test images", xticks=[], yticks=[])
    points = [Line2D([], [], marker="o", linestyle="", color=f"C{k}") for k in range(10)]
    figure.legend(points, data.CLASSES, loc="outside right center")
    return figure


def draw_confusion_matrix(result):
    """Return a figure of the counts that classify.py found, rows true, columns predicted."""
    figure = Figure(figsize=(6.5, 6.5), layout="constrained")
    axis, matrix = figure.subplots(), torch.tensor(result["confusion_matrix"]).numpy()
    display = ConfusionMatrixDisplay(matrix, display_labels=data.CLASSES)
    display.plot(ax=axis, cmap="Blues", colorbar=False, xticks_rotation=60, values_format="d")
    right = f"{result['accuracy'] * 100:.2f} % right"
    axis.set_title(f"Random Forest on μ, epoch {result['epoch']}: {right}")
    return figure


if __name__ == "__main__":
    data.run_script(main, "the figures that were named are whole; the same command starts over")
