"""Draw the figures of both pages that compare runs, and write them to the folder of this script.

python results/figures.py
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import matplotlib.style
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

import data
import plots
from data import UserError
from model import load_network, sample_mixture
from results import summary
from results.summary import RESULTS, values_of

# A font that can still be read when a figure is shown at half the width of a page.
STYLE = ["default", {"font.size": 14, "axes.titlesize": 15}]


@torch.no_grad()
@matplotlib.style.context(STYLE)
def main():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Draw the figures that compare runs, and write them to results/.",
    )
    parser.add_argument(
        "--data",
        type=data.folder,
        metavar="DIR",
        default=data.DEFAULT_ROOT,
        help="folder of Fashion-MNIST (default: %(default)s)",
    )
    args = parser.parse_args()
    ((train_images, _), (test_images, test_labels)), sha256 = data.load_splits(args.data)
    if sha256 != data.FASHION_MNIST_SHA256:
        raise UserError(f"{args.data} is not Fashion-MNIST, on which the runs were trained.")
    results = summary.load_results(RESULTS)
    firsts = plots.first_images(test_images, test_labels)
    figures = {
        "hero.png": draw_hero(results, firsts),
        "samples.png": draw_prior_and_mixture(results, train_images),
        "matrices.png": draw_matrices(results),
        "beta.png": draw_beta(results),
        "accuracy.png": draw_accuracy(results),
    }
    for name, figure in figures.items():
        data.write_bytes(RESULTS / name, plots.png_bytes(figure))


def draw_hero(results, firsts):
    """Draw the first test image of each class, and its reconstructions by three networks.

    The networks are those of seed 0, which comes first in `results`.
    """
    rows = [firsts]
    row_names = ["original"]
    titles = {
        "fc-latent32": "fully\nconnected,",
        "latent32": "ConvVAE,",
        "beta0.1": "ConvVAE,\nβ = 0.1,",
    }
    for name, title in titles.items():
        seed0 = results[name][0]
        model = load_network(seed0.run)
        torch.manual_seed(0)
        reconstructions, _, _ = model(firsts)
        rows.append(reconstructions)
        row_names.append(f"{title}\nMSE × 1000 = {1000 * seed0.metrics['mse']:.1f}")
    classes = [name.replace("/", "/\n").replace(" ", "\n") for name in data.CLASSES]
    figure = enlarge_labels(plots.draw_grid(rows, row_names, classes))
    figure.supxlabel("MSE: mean squared error per pixel over the test set, lower is better")
    return figure


def draw_prior_and_mixture(results, train_images):
    """Draw ten samples from N(0, I) and ten from a mixture of Gaussians, for β = 1 and β = 0.1."""
    rows = []
    row_names = []
    for name, beta in [("latent32", "β = 1"), ("beta0.1", "β = 0.1")]:
        seed0 = results[name][0]
        model = load_network(seed0.run)
        metrics = seed0.metrics
        torch.manual_seed(0)
        rows.append(model.decode(torch.randn(10, 32)))
        row_names.append(f"{beta}, N(0, I),\nFréchet {metrics['frechet_samples']:.2f}")
        rows.append(model.decode(sample_mixture(model, train_images, 10)))
        row_names.append(f"{beta}, mixture,\nFréchet {metrics['frechet_mixture_samples']:.2f}")
    figure = enlarge_labels(plots.draw_grid(rows, row_names))
    figure.supxlabel("Fréchet distance of 10,000 samples to the test images, lower is better")
    return figure


def enlarge_labels(grid):
    """Enlarge the labels of a grid of images, do not rotate them, and return the grid."""
    for axis in grid.axes:
        axis.yaxis.label.set(rotation=0, ha="right", va="center", fontsize=16)
        axis.title.set_fontsize(15)
    return grid


def draw_matrices(results):
    """Draw the report's confusion matrix and one of ours, in percent of each true class."""
    report_matrix = json.loads((RESULTS / "report_matrix.json").read_bytes())
    matrices = {
        "The report": torch.tensor(report_matrix),
        "Ours, 16 latent dimensions": torch.tensor(
            results["latent16"][0].metrics["confusion_matrix"]
        ),
    }
    figure = Figure(figsize=(8.8, 5.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (title, matrix) in zip(axes, matrices.items()):
        shares = (100 * matrix / matrix.sum(dim=1, keepdim=True)).numpy()
        display = ConfusionMatrixDisplay(shares, display_labels=data.CLASSES)
        display.plot(
            ax=axis,
            cmap="Blues",
            colorbar=False,
            xticks_rotation=90,
            values_format=".0f",
            im_kw={"norm": PowerNorm(0.5)},  # so that small shares can be told apart
        )
        for text, share in zip(display.text_.flat, shares.flat):
            text.set_visible(share >= 1.5)
        accuracy = 100 * matrix.trace() / matrix.sum()
        axis.set(
            title=f"{title}:\n{accuracy:.1f} % of {matrix.sum():,} correct",
            xlabel="predicted class, percent",
            ylabel="",
        )
    axes[0].set_ylabel("true class (each row adds up to 100 %)")
    return figure


def draw_beta(results):
    """Draw how the weight of the KL divergence changes both terms of the loss, and the metrics.

    Each dot is a seed. Lines join the means.
    """
    folders = {0.1: "beta0.1", 0.5: "beta0.5", 1: "latent32", 2: "beta2", 4: "beta4"}
    rows = {beta: results[name] for beta, name in folders.items()}
    figure = Figure(figsize=(8.8, 5), layout="constrained")
    axes = figure.subplot_mosaic([["terms", "accuracy"], ["terms", "active"]], width_ratios=[1, 1])
    terms = axes["terms"]
    bce_means = []
    kld_means = []
    for beta, seeds in rows.items():
        bce = values_of(seeds, "excess_bce")
        kld = values_of(seeds, "kld")
        terms.plot(bce, kld, "o", color="C0", alpha=0.5)
        bce_means.append(mean(bce))
        kld_means.append(mean(kld))
        label = "β = 1 (the report)" if beta == 1 else f"β = {beta}"
        terms.annotate(label, (mean(bce), mean(kld)), (8, 5), textcoords="offset points")
    terms.plot(bce_means, kld_means, color="C0")
    terms.text(2, 2, "lower left is better", color="0.4")
    terms.set(
        xlabel="BCE − minimum, nats per image",
        ylabel="KLD, nats per image",
        xlim=(0, 62),
        ylim=(0, 65),
    )

    for axis, metric in [(axes["accuracy"], "accuracy"), (axes["active"], "active_dimensions")]:
        means = []
        for beta, seeds in rows.items():
            values = values_of(seeds, metric)
            axis.semilogx([beta] * len(values), values, "o", color="C0", alpha=0.5)
            means.append(mean(values))
        axis.semilogx(list(rows), means, color="C0")
        axis.minorticks_off()
        axis.set_xticks(list(rows), list(rows))
        axis.set_xlabel("β (log scale)")
        axis.grid(alpha=0.3)
    axes["accuracy"].set(title="accuracy, % (higher is better)", ylim=(84, 88.5))
    axes["active"].set(title="active dimensions (of 32)", yticks=(0, 16, 32))
    return figure


def draw_accuracy(results):
    """Draw the test accuracy of the Random Forest on several features.

    Each dot is a training run of a network. On PCA and pixels, which need no network, each dot is a
    Random Forest.
    """
    folders = {
        "fully connected, 32": "fc-latent32",
        "ConvVAE, 16": "latent16",
        "ConvVAE, 32": "latent32",
        "β = 0.1, 32": "beta0.1",
        "from the search, 32": "best32",
        "from the search, 64": "best64",
    }
    networks = {}
    for title, name in folders.items():
        networks[title] = values_of(results[name], "accuracy")
    forests = {}
    for row in summary.baseline_rows(RESULTS, results):
        if row.title.startswith("PCA"):
            forests[row.title] = values_of(row.results, "accuracy")
        if row.title == summary.PIXELS_TITLE:
            forests["784 pixels"] = values_of(row.results, "accuracy")
    rows = {**networks, **forests}
    figure = Figure(figsize=(8.8, 4.6), layout="constrained")
    axis = figure.subplots()
    draw_dots(axis, rows, colors=["C0"] * len(networks) + ["C1"] * len(forests))
    axis.axvline(84.01, color="0.4", linestyle="--")
    axis.set_title("  the report, 16 dimensions: 84.01 %", loc="left", fontsize=14, color="0.4")
    axis.set_xlabel("accuracy, %   (blue: networks, orange: Random Forests without a network)")
    return figure


def draw_dots(axis, rows, colors):
    """Draw {title: values} as rows of dots in these colors, the first row at the top.

    The dots of a row are a little above each other, so that equal values can be seen.
    """
    for y, values in enumerate(rows.values()):
        spread = 0.04 * min(len(values) - 1, 8)
        heights = torch.linspace(y - spread, y + spread, len(values)).tolist()
        axis.plot(list(values), heights, "o", color=colors[y], alpha=0.6, markersize=5)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    data.run_script(main, when_interrupted="Run the same command again.")
