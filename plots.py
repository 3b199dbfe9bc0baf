"""Draw a run: its loss curves, reconstructions, samples, confusion matrix and latent space."""

from pathlib import Path
from textwrap import fill

import matplotlib
import torch
from matplotlib import pyplot as plt
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import ConfusionMatrixDisplay

import data
from model import latent_means, load_model, sample_mixture

matplotlib.use("Agg")  # files only, also where there is no screen
NETWORKS = {"conv": "ConvVAE", "fc": "Fully connected VAE", "deep": "Deep ConvVAE"}
LABELS = {"beta": "β {}", "lr_scheduler": "{}", "epochs": "{} epochs", "hold_out": "{} held out"}


@torch.no_grad()
def main():
    parser = data.command_line(__doc__)
    compare = {"nargs": "+", "default": [], "help": "show their reconstructions too"}
    parser.add_argument("--compare", type=Path, metavar="RUN", **compare)
    args = parser.parse_args()
    run = data.read_run(args.run)
    runs = [run, *map(data.read_run, args.compare)]
    models = [load_model(one, args.device) for one in runs]
    classification = data.read_classification(run)
    train_images, _ = data.load_split(args.data, True, run.settings["hold_out"])
    images, labels = data.load_split(args.data, False, run.settings["hold_out"])

    save(run, "loss_curves.png", draw_losses(run.log))
    classes = labels.unique()
    firsts = images[[(labels == k).nonzero()[0].item() for k in classes]].to(args.device)
    rows, names = [firsts], ["original", *(describe(one) for one in runs)]
    for model in models:
        torch.manual_seed(0)
        rows.append(model(firsts)[0])
    save(run, "reconstructions.png", draw_grid(rows, names, [data.CLASSES[k] for k in classes]))
    z, names = sample_codes(models[0], run.settings["latent_dim"], train_images)
    save(run, "samples.png", draw_grid(models[0].decode(z.to(args.device)).split(10), names))
    mu = latent_means(models[0], images[:5000])  # t-SNE takes its time
    save(run, "latent_space.png", draw_latent_space(mu, labels[: len(mu)]))
    if classification:
        save(run, "confusion_matrix.png", draw_confusion_matrix(classification))


def save(run, name, figure):
    """Write a figure into the run's folder, and say so."""
    data.write(run.path / name, figure)
    plt.close(figure)
    print(run.path / name)


def draw_losses(log):
    """Return a figure of the loss and of its two terms, in nats per image, over the epochs."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    epochs = [row["epoch"] for row in log]
    titles = ("Loss = BCE + KLD", "BCE, reconstruction", "KLD, latent code")
    for axis, loss, title in zip(axes, ("loss", "bce", "kld"), titles):
        for split, color in (("train", "tab:blue"), ("test", "tab:orange")):
            values = [row[f"{split}_{loss}"] for row in log]
            axis.plot(epochs, values, color=color, label=split, marker="." if len(log) < 10 else "")
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats per image")
    axes[0].legend()
    return figure


def sample_codes(model, latent_dim, train_images):
    """Return codes [100, latent_dim] to decode, and names for their rows of ten.

    Half are from N(0, I), half from a mixture fitted to codes of images (Ghosh et al., 2020);
    if there are two dimensions, a grid of normal quantiles (Kingma & Welling, 2014, figure 4).
    """
    if latent_dim == 2:
        quantiles = torch.special.ndtri(torch.linspace(0.05, 0.95, 10))
        return torch.cartesian_prod(quantiles, quantiles), ()
    torch.manual_seed(0)
    mixture_z = sample_mixture(model, train_images, 50)
    return torch.cat((torch.randn(50, latent_dim), mixture_z)), ["N(0, I)"] * 5 + ["mixture"] * 5


def draw_grid(rows, names=(), titles=()):
    """Return a figure of rows of images [C, 1, 28, 28], with names at the left, titles above."""
    size = (1.1 * len(rows[0]), 1.15 * len(rows))
    grid = {"squeeze": False, "layout": "constrained", "subplot_kw": {"xticks": [], "yticks": []}}
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=size, **grid)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for axis, picture in zip(axes.flat, torch.cat(rows).cpu()):
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
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for axis, (name, method) in zip(axes, methods.items()):
        x, y = method.fit_transform(mu).T
        points = axis.scatter(x, y, c=labels.numpy(), cmap="tab10", s=2, vmin=0, vmax=9)
        axis.set(title=f"{name} of μ, {len(mu):,} test images", xticks=[], yticks=[])
    # Its own legend_elements leave out classes beyond those that are there.
    colors = [points.to_rgba(k) for k in range(len(data.CLASSES))]
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=color) for color in colors]
    figure.legend(handles, data.CLASSES, loc="outside right center")
    return figure


def draw_confusion_matrix(found):
    """Return a figure of the counts that classify.py found, rows true, columns predicted."""
    figure, axis = plt.subplots(figsize=(6.5, 6.5), layout="constrained")
    matrix = torch.tensor(found["confusion_matrix"]).numpy()
    display = ConfusionMatrixDisplay(matrix, display_labels=data.CLASSES)
    display.plot(ax=axis, cmap="Blues", colorbar=False, xticks_rotation=60)
    right = f"{found['accuracy'] * 100:.2f} % right"
    axis.set(title=f"Random Forest on μ, epoch {found['epoch']}: {right}")
    return figure


def describe(run, skip=()):
    """Return a run's network and what else, `skip` apart, differs from the report's settings."""
    parts = [NETWORKS[run.settings["model"]]]
    for name, option in data.SETTINGS.items():
        value = run.settings[name]
        if name == "epochs" and len(run.log) < value:
            value = f"{len(run.log)} of {value}"
        if name not in ("model", "seed", "feature_run", *skip) and value != option["default"]:
            value = f"{value:g}" if isinstance(value, float) else value
            parts.append(LABELS.get(name, f"{name.replace('_', ' ')} {{}}").format(value))
    return ", ".join(parts)


if __name__ == "__main__":
    data.run_script(main, "the figures that were named are whole; the same command starts over")
