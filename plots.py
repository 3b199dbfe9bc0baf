"""Draw a run: its loss curves, reconstructions, samples, confusion matrix and latent space."""

from pathlib import Path
from statistics import mean, stdev
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


@torch.no_grad()
def main():
    parser = data.command_line(__doc__)
    compare = {"nargs": "+", "default": [], "help": "show their reconstructions too"}
    parser.add_argument("--compare", type=Path, metavar="RUN", **compare)
    parser.add_argument("--table", type=Path, metavar="DIR", help="print a table of DIR/*/seed*")
    args = parser.parse_args()
    if args.table:
        print(results_table(args.table))
        return
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
    mixture_z = sample_mixture(latent_means(model, train_images), 50)
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


COLUMNS = {  # of the results table: what is shown of a run, times what, and how many decimals
    "Train loss, epoch 1": ("first_loss", 1, 1),
    "Train loss": ("train_loss", 1, 2),
    "Test loss": ("test_loss", 1, 2),
    "Test − train": ("gap", 1, 2),
    "BCE − floor": ("excess_bce", 1, 2),
    "KLD": ("kld", 1, 2),
    "MSE × 1000": ("mse", 1000, 2),
    "Sharpness, reconstructions": ("sharpness_reconstructions", 1, 3),
    "Sharpness, samples": ("sharpness_samples", 1, 3),
    "Sharpness, mixture": ("sharpness_mixture_samples", 1, 3),
    "Active dimensions": ("active_dimensions", 1, 1),
    "Accuracy, %": ("accuracy", 100, 2),
}


def results_table(folder):
    """Return a Markdown table of the runs in folder/*/seed*, a row for equal settings and epochs.

    Cells are mean ± standard deviation over n seeds; runs without a classification of their
    present weights are left out, with a remark. The encoder of a feature run is not looked at.
    Baselines, which have no seed, stand below.
    """
    groups, baselines = {}, {}
    for path in sorted(folder.glob(f"*/seed*/{data.CONFIG}")):
        run = data.read_run(path.parent)
        found = data.read_classification(run)
        if found is None:
            continue
        first, last = run.log[0], run.log[-1]
        gap = last["test_loss"] - last["train_loss"]
        shown = {**last, **found, "first_loss": first["train_loss"], "gap": gap}
        latent_dim, held = run.settings["latent_dim"], run.settings["hold_out"]
        groups.setdefault((describe(run, ("latent_dim",)), latent_dim), []).append(shown)
        if found.get("baselines"):
            held = f", hold out {held}" if held else ""
            baselines[f"raw pixels{held}", 28 * 28] = found["baselines"]["pixels"]
            baselines[f"PCA{held}", latent_dim] = found["baselines"]["pca"]
    if not groups:
        raise data.UserError(f"{folder} holds no classified runs <setting>/seed<n>")
    rows = [["Codes", "Dimensions", "n", *COLUMNS], ["---"] * (3 + len(COLUMNS))]
    for (setting, latent_dim), runs in sorted(groups.items()):
        rows.append([setting, str(latent_dim), str(len(runs))])
        for name, factor, digits in COLUMNS.values():
            rows[-1].append(spread([run[name] * factor for run in runs if name in run], digits))
    for (name, dimensions), accuracy in sorted(baselines.items()):
        rows.append([name, str(dimensions), *[""] * len(COLUMNS), f"{accuracy * 100:.2f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def describe(run, but=()):
    """Return a run's network and what else, `but` these, differs from the report's settings."""
    words = [NETWORKS[run.settings["model"]]]
    for name, option in data.SETTINGS.items():
        value = run.settings[name]
        if name == "epochs" and len(run.log) < value:
            value = f"{len(run.log)} of {value}"
        if name not in ("model", "seed", "feature_run", *but) and value != option["default"]:
            words.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(words)


def spread(values, digits):
    """Return "mean ± standard deviation" of the values, or a single value as it is."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}" if values else ""


if __name__ == "__main__":
    data.run_script(main, "the figures that were named are whole; the same command starts over")
