"""Draw a run: its loss curves, reconstructions, samples, confusion matrix and latent space."""

import io
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import torch
from matplotlib import pyplot as plt
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import ConfusionMatrixDisplay

import data
from model import load_model

matplotlib.use("Agg")  # files only, also where there is no screen
BATCH = 128
NETWORKS = {"conv": "ConvVAE", "fc": "Fully connected VAE"}


@torch.no_grad()
def main():
    parser = data.command_line(__doc__)
    parser.add_argument(
        "--compare", type=Path, metavar="RUN", help="add another run's reconstructions"
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="DIR",
        help="draw nothing, print a Markdown table of all runs in DIR/*/seed*",
    )
    args = parser.parse_args()
    if args.table:
        print(results_table(args.table))
        return
    run, device = args.run, args.device
    settings, log = data.read_run(run)
    model = load_model(run / data.WEIGHTS, device)
    models = [(NETWORKS[settings["model"]], model)]
    if args.compare:
        other = data.read_run(args.compare)[0]["model"]
        models.append(
            (NETWORKS[other], load_model(args.compare / data.WEIGHTS, device))
        )
    images, labels = data.load_split(args.data, train=False)

    save(run / data.LOSS_CURVES, draw_losses(log))
    save(
        run / data.RECONSTRUCTIONS, draw_reconstructions(models, images, labels, device)
    )
    torch.manual_seed(0)
    z = torch.randn(100, settings["latent_dim"]).to(device)
    save(run / data.SAMPLES, draw_samples(model.decode(z).cpu()))
    shown = images[:5000].split(BATCH)  # t-SNE takes half its time for half the points
    mu = torch.cat([model.encode(x.to(device))[0].cpu() for x in shown])
    save(run / data.LATENT_SPACE, draw_latent_space(mu, labels[: len(mu)]))
    matrix = current_confusion_matrix(run, settings)
    if matrix is None:
        print(f"No {data.CONFUSION_MATRIX} yet: first python classify.py --run {run}")
    else:
        save(run / data.CONFUSION_MATRIX, draw_confusion_matrix(matrix))


def save(path, figure):
    """Write a figure as PNG, and say so."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    data.write_files({path: buffer.getvalue()})
    print(path)


def draw_losses(log):
    """Return curves of the loss and of its two terms, in nats per image, over the epochs."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    epochs = [row["epoch"] for row in log]
    terms = {
        "loss": "Loss = BCE + KLD",
        "bce": "BCE, reconstruction",
        "kld": "KLD, latent code",
    }
    for axis, (term, title) in zip(axes, terms.items()):
        for split, color in (("train", "tab:blue"), ("test", "tab:orange")):
            values = [row[f"{split}_{term}"] for row in log]
            axis.plot(
                epochs,
                values,
                color=color,
                label=split,
                marker="." if len(log) < 10 else "",
            )
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats per image")
    axes[0].legend()
    return figure


def draw_reconstructions(models, images, labels, device):
    """Return the first test image of each class with, below it, each model's reconstruction."""
    firsts = [(labels == label).nonzero()[0] for label in labels.unique()]
    x = images[torch.cat(firsts)]
    rows = [("original", x)]
    for name, model in models:
        torch.manual_seed(0)
        rows.append((name, model(x.to(device))[0].cpu()))
    figure, axes = plt.subplots(
        len(rows),
        len(x),
        figsize=(11, 1.15 * len(rows) + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for row, (name, pictures) in zip(axes, rows):
        for axis, picture in zip(row, pictures):
            show(axis, picture)
        row[0].set_ylabel(name.replace(" ", "\n"), fontsize=9)
    for axis, label in zip(axes[0], labels.unique()):
        axis.set_title(data.CLASSES[label], fontsize=9)
    return figure


def draw_samples(pictures):
    """Return decoded samples of the prior, ten in a row."""
    figure, axes = plt.subplots(
        len(pictures) // 10, 10, figsize=(7.5, 0.75 * len(pictures) / 10)
    )
    for axis, picture in zip(axes.flat, pictures):
        show(axis, picture)
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    return figure


def show(axis, picture):
    """Show one image [1, 28, 28], black 0 and white 1, without ticks."""
    axis.imshow(picture[0].numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])


def draw_latent_space(mu, labels):
    """Return μ [N, latent_dim] of the test images in two dimensions, by PCA and by t-SNE."""
    methods = {
        "PCA": PCA(2, random_state=0),
        # Its default perplexity, 30, must be below the number of points.
        "t-SNE": TSNE(perplexity=min(30, len(mu) / 4), random_state=0, n_jobs=-1),
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for axis, (name, method) in zip(axes, methods.items()):
        points = axis.scatter(
            *method.fit_transform(mu).T,
            c=labels.numpy(),
            cmap="tab10",
            s=2,
            vmin=0,
            vmax=9,
        )
        axis.set(title=f"{name} of μ, {len(mu):,} test images", xticks=[], yticks=[])
    handles = points.legend_elements(num=list(range(len(data.CLASSES))))[0]
    figure.legend(handles, data.CLASSES, loc="outside right center")
    return figure


def current_confusion_matrix(run, settings):
    """Return the run's confusion matrix (rows true), or None if it is not of these weights."""
    if not (run / data.CLASSIFICATION).exists():
        return None
    result = data.read_json(run / data.CLASSIFICATION, ("settings", "confusion_matrix"))
    return result["confusion_matrix"] if result["settings"] == settings else None


def draw_confusion_matrix(matrix):
    """Return the counts [10, 10], rows true and columns predicted, by class name."""
    figure, axis = plt.subplots(figsize=(8, 8), layout="constrained")
    display = ConfusionMatrixDisplay(
        torch.tensor(matrix).numpy(), display_labels=data.CLASSES
    )
    display.plot(ax=axis, cmap="Blues", colorbar=False, text_kw={"fontsize": 14})
    axis.tick_params(labelsize=13)
    axis.tick_params(axis="x", rotation=60)
    axis.set_xlabel("predicted", fontsize=14)
    axis.set_ylabel("true", fontsize=14)
    return figure


COLUMNS = {  # of the results table: how to have it from a run, and how many decimals
    "Loss, epoch 1": (lambda run: run["log"][0]["train_loss"], 1),
    "Train loss": (lambda run: run["log"][-1]["train_loss"], 2),
    "Test loss": (lambda run: run["log"][-1]["test_loss"], 2),
    "Test − train": (lambda run: gap(run["log"][-1]), 2),
    "BCE − floor": (lambda run: run["excess_bce"], 2),
    "KLD": (lambda run: run["kld"], 2),
    "MSE × 1000": (lambda run: run["mse"] * 1000, 2),
    "Sharpness, reconstructions": (lambda run: run["sharpness_reconstructions"], 3),
    "Sharpness, samples": (lambda run: run["sharpness_samples"], 3),
    "Active dimensions": (lambda run: run["active_dimensions"], 1),
    "Accuracy, %": (lambda run: run["accuracy"] * 100, 2),
}


def results_table(folder):
    """Return a Markdown table of the runs in folder/*/seed*, a row a setting.

    Cells are mean ± standard deviation over the n seeds. Below stand the baselines of the
    classification, which depend on no seed. Raises UserError if there are no runs.
    """
    settings, baselines = {}, {}
    for path in sorted(folder.glob("*/seed*")):
        config, log = data.read_run(path)
        metrics = data.read_json(path / data.METRICS, ["mse"])
        result = data.read_json(path / data.CLASSIFICATION, ["accuracy", "baselines"])
        network, latent_dim = NETWORKS[config["model"]], config["latent_dim"]
        settings.setdefault((network, latent_dim), []).append(
            {"log": log, **metrics, **result}
        )
        if result["baselines"]:
            baselines["raw pixels", 28 * 28] = result["baselines"]["pixels"]
            baselines["PCA", latent_dim] = result["baselines"]["pca"]
    if not settings:
        raise data.UserError(f"{folder} holds no runs <setting>/seed<n>")
    rows = [["Codes", "Dimensions", "n", *COLUMNS], ["---"] * (3 + len(COLUMNS))]
    for (network, latent_dim), runs in sorted(settings.items()):
        cells = [
            spread([get(run) for run in runs], digits)
            for get, digits in COLUMNS.values()
        ]
        rows.append([network, str(latent_dim), str(len(runs)), *cells])
    for (name, dimensions), accuracy in sorted(baselines.items()):
        empty = [""] * (len(COLUMNS) - 1)
        rows.append([name, str(dimensions), "", *empty, f"{accuracy * 100:.2f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def gap(row):
    """Return test loss less train loss of an epoch, in nats per image."""
    return row["test_loss"] - row["train_loss"]


def spread(values, digits):
    """Return "mean ± standard deviation" of the values, or a single value as it is."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    data.run_script(main)
