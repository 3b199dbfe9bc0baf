"""Print the tables of results/README.md, and draw the figures that compare runs.

python results/summary.py                  # the tables of all runs in results/
python results/summary.py results/search   # the tables of the search
python results/summary.py --figures        # draws the figures first
python results/summary.py --pixels         # first fits ten Random Forests on pixels (10 minutes)
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path.insert(0, str(ROOT))
import matplotlib.style
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

import data
import plots
from classify import fit_forest
from data import UserError
from model import (
    BASELINES,
    CLASSIFICATION,
    Run,
    current_classification,
    load_network,
    read,
    read_run,
    sample_mixture,
)


class Column(NamedTuple):
    """A column of a table. Its cells are values of a metric, multiplied by `factor`."""

    title: str
    factor: float
    digits: int  # after the decimal point


# The columns by their metric.
COLUMNS = {
    "first_train_loss": Column("Train loss, epoch 1", 1, 1),
    "train_loss": Column("Train loss", 1, 2),
    "test_loss": Column("Test loss", 1, 2),
    "gap": Column("Test − train", 1, 2),
    "bce": Column("BCE", 1, 2),
    "excess_bce": Column("BCE − minimum", 1, 2),
    "kld": Column("KLD", 1, 2),
    "mse": Column("MSE × 1000", 1000, 2),
    "sharpness_reconstructions": Column("Sharpness", 1, 3),
    "active_dimensions": Column("Active dimensions", 1, 1),
    "accuracy": Column("Accuracy, %", 100, 2),
    "frechet_samples": Column("Fréchet", 1, 2),
    "precision_samples": Column("Precision", 1, 2),
    "recall_samples": Column("Recall", 1, 2),
    "frechet_mixture_samples": Column("Fréchet, mixture", 1, 2),
    "precision_mixture_samples": Column("Precision, mixture", 1, 2),
    "recall_mixture_samples": Column("Recall, mixture", 1, 2),
}
# The columns of each table.
LOSSES = ["first_train_loss", "train_loss", "test_loss", "gap", "excess_bce", "kld"]
RECONSTRUCTIONS = ["mse", "sharpness_reconstructions", "active_dimensions", "accuracy"]
SAMPLES = [name for name in COLUMNS if name.endswith("_samples")]
COMPARED = ["test_loss", "bce", "kld", *RECONSTRUCTIONS]

# The rows of the tables, in their order: folders of runs, and what they are called.
TITLES = {
    "latent32": "ConvVAE, as in the report",
    "latent2": "2 latent dimensions",
    "latent8": "8 latent dimensions",
    "latent16": "16 latent dimensions",
    "latent64": "64 latent dimensions",
    "latent128": "128 latent dimensions",
    "epochs200": "200 epochs",
    "cosine": "cosine schedule",
    "plateau": "plateau schedule",
    "feature": "feature matching",
    "beta0.1": "β = 0.1",
    "beta0.5": "β = 0.5",
    "beta2": "β = 2",
    "beta4": "β = 4",
    "deep": "deeper network",
    "deep-cosine": "deeper network, cosine schedule",
    "fc-latent16": "fully connected VAE",
    "fc-latent32": "fully connected VAE",
    "best32": "options from the search",
    "best64": "options from the search",
}
SEARCH_TITLES = {
    "latent32-beta0.05": "β = 0.05, 15 epochs",
    "latent32-beta0.1": "β = 0.1, 15 epochs",
    "latent32-beta0.2": "β = 0.2, 15 epochs",
    "latent32-beta0.05-epochs30": "β = 0.05, 30 epochs",
    "latent32-beta0.2-epochs30": "β = 0.2, 30 epochs",
    "latent64-beta0.05": "β = 0.05, 15 epochs",
    "latent64-beta0.1": "β = 0.1, 15 epochs",
    "latent64-beta0.2": "β = 0.2, 15 epochs",
    "latent64-beta0.05-epochs30": "β = 0.05, 30 epochs",
    "latent32-beta0.1-epochs100": "β = 0.1, 100 epochs, as in the report otherwise",
}
REFERENCE = "latent32"  # the report's network, with which the variants are compared
# Runs with options from the search differ from the reference in several ways.
NOT_COMPARED = [REFERENCE, "fc-latent16", "best32", "best64"]


def main():
    args = parse_arguments()
    if args.pixels or args.figures:
        if args.folder.resolve() != RESULTS:
            raise UserError("--pixels and --figures belong to the published results. Omit FOLDER.")
        splits = load_fashion_mnist(args.data)
        if args.pixels:
            measure_pixels(splits)
        if args.figures:
            draw_figures(splits)
    print(tables(args.folder))
    if args.folder.resolve() == RESULTS:
        print(differences(COMPARED))
        print(differences(SAMPLES))
        print(page_tables())
        print(page_numbers())


def parse_arguments():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] [FOLDER]",
        description="Print the tables of results/README.md. With --figures, draw the figures that "
        "compare runs.",
    )
    parser.add_argument(
        "folder",
        type=data.folder,
        metavar="FOLDER",
        nargs="?",
        default=RESULTS,
        help="folder with runs in <name>/seed<n> (default: the folder of this script)",
    )
    parser.add_argument(
        "--data",
        type=data.folder,
        metavar="DIR",
        default=data.DEFAULT_ROOT,
        help="folder of Fashion-MNIST (default: %(default)s)",
    )
    parser.add_argument(
        "--pixels",
        action="store_true",
        help="first fit ten Random Forests on the raw pixels, which takes about ten minutes",
    )
    parser.add_argument(
        "--figures", action="store_true", help="first draw the figures that compare runs"
    )
    return parser.parse_args()


def load_fashion_mnist(root):
    """Return the splits of Fashion-MNIST. Raises UserError if `root` has another data set."""
    splits, sha256 = data.load_splits(root)
    if sha256 != data.FASHION_MNIST_SHA256:
        raise UserError(f"{root} is not Fashion-MNIST, on which the published runs were trained.")
    return splits


# --- Reading results ----------------------------------------------------------------------


class Result(NamedTuple):
    """A run, and everything that was measured of it."""

    run: Run | None  # None for a baseline, which is no run
    # For a run: the last row of the loss log, classification.json, first_train_loss and gap. For a
    # baseline: only what was measured of it.
    metrics: dict


def load_results(folder):
    """Return the Result of each evaluated run in `folder`/seed<n>, in the order of the seeds.

    Runs that were trained further after their evaluation are left out, with a warning. Raises
    UserError if the runs differ in more than their seeds.
    """
    results = []
    for path in folder.glob(f"seed*/{CLASSIFICATION}"):
        run = read_run(path.parent)
        classification = current_classification(run)
        if classification:
            metrics = {**run.log[-1], **classification}
            metrics["gap"] = metrics["test_loss"] - metrics["train_loss"]
            metrics["first_train_loss"] = run.log[0]["train_loss"]
            results.append(Result(run, metrics))
    results.sort(key=seed_of)
    for result, next_result in zip(results, results[1:]):
        check_only_seeds_differ(result.run, next_result.run)
    return results


def seed_of(result):
    """Return the random seed of a result's run."""
    return result.run.config["seed"]


def check_only_seeds_differ(run, other):
    """Raise UserError, naming the first difference, unless two runs differ in their seeds only."""
    differences = []
    if run.config["seed"] == other.config["seed"]:
        differences.append("the same seed")
    for name, value in run.config.items():
        # The seeds differ on purpose, and the runs of a row may come from different machines.
        is_compared = name in other.config and name not in ("seed", "torch", "device")
        if is_compared and value != other.config[name]:
            differences.append(f"different values of {name} in their configs")
    if len(run.log) != len(other.log):
        differences.append("different numbers of epochs in their logs")
    if differences:
        raise UserError(
            f"{run.path} and {other.path} have {differences[0]}, so they cannot be in the same row "
            "of a table. Move one of them elsewhere."
        )


def values_of(results, metric):
    """Return the values of a metric as in its column, from those results that have it."""
    values = []
    for result in results:
        if metric in result.metrics:
            values.append(COLUMNS[metric].factor * result.metrics[metric])
    return values


# --- Tables -------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of a table: a folder of runs, or a baseline."""

    title: str
    dimensions: int
    results: list


def tables(folder):
    """Return the tables of all evaluated runs in `folder`/<name>/seed<n>, in Markdown."""
    rows = load_rows(folder)
    all_tables = [table(rows, metrics) for metrics in (LOSSES, RECONSTRUCTIONS, SAMPLES)]
    return "\n".join(text for text in all_tables if text)


def load_rows(folder):
    """Return the rows of the tables. The baselines have rows of their own, at the end.

    Raises UserError if there are no evaluated runs, or if two folders have runs on different data.
    """
    titles = {}
    if folder.resolve() == RESULTS:
        titles = TITLES
    elif folder.resolve() == RESULTS / "search":
        titles = SEARCH_TITLES
    names = {path.parent.parent.name for path in folder.glob(f"*/seed*/{CLASSIFICATION}")}
    in_order = [name for name in titles if name in names] + sorted(names - titles.keys())
    rows = []
    baselines = {}
    for name in in_order:
        results = load_results(folder / name)
        if results:
            config = results[0].run.config
            rows.append(Row(titles.get(name, name), config["latent_dim"], results))
            for result in results:
                # Baselines do not depend on the network, so those of one run stand for all.
                for row in baseline_rows(result.run):
                    baselines[row.title, row.dimensions] = row
    if not rows:
        raise UserError(
            f"{folder} has no evaluated runs in <name>/seed<n>. Evaluate runs with classify.py "
            "first."
        )
    first_run = rows[0].results[0].run
    for row in rows:
        run = row.results[0].run
        if run.config["data_sha256"] != first_run.config["data_sha256"]:
            raise UserError(f"{first_run.path} and {run.path} were trained on different data.")
    if (folder / "pixels.json").exists():
        accuracies = read(folder / "pixels.json", json.loads).values()
        results = [Result(None, {"accuracy": accuracy}) for accuracy in accuracies]
        row = Row("pixels, random states 0 to 9", 784, results)
        baselines[row.title, row.dimensions] = row
    return rows + [baselines[key] for key in sorted(baselines)]


def baseline_rows(run):
    """Return the rows of the baselines that were measured with classify.py --baselines."""
    path = run.path / BASELINES
    if not path.exists():
        return []
    baselines = read(path, json.loads)
    hold_out = run.config["hold_out"]
    suffix = f", validation split of {hold_out}" if hold_out else ""
    latent_dim = run.config["latent_dim"]
    rows = [
        Row(f"PCA{suffix}", latent_dim, [Result(None, {"accuracy": baselines["pca"]})]),
        Row(f"pixels{suffix}", 784, [Result(None, {"accuracy": baselines["pixels"]})]),
    ]
    if "training_images" in baselines:
        metrics = {}
        for name, value in baselines["training_images"].items():
            metrics[f"{name}_samples"] = value
        rows.append(Row(f"training images{suffix}", 784, [Result(None, metrics)]))
    return rows


def table(rows, metrics):
    """Return a table in Markdown, or "" if no row has any of the metrics.

    A cell is the mean ± the standard deviation over the n results that have been measured.
    """
    lines = []
    for row in rows:
        n = number_measured(row.results, metrics)
        cells = [cell(row.results, metric) for metric in metrics]
        if n > 0:
            lines.append([row.title, str(row.dimensions), str(n), *cells])
    if not lines:
        return ""
    return markdown(["Runs", "Dimensions", "n"], metrics, lines)


def markdown(first_titles, metrics, lines):
    """Return a table in Markdown, with the titles of its first columns, and a column per metric."""
    titles = [*first_titles, *(COLUMNS[metric].title for metric in metrics)]
    all_lines = [titles, ["---"] * len(titles), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in all_lines)


def number_measured(results, metrics):
    """Return how many results have any of the metrics. Those of samples are often missing."""
    return max(len(values_of(results, metric)) for metric in metrics)


def cell(results, metric):
    """Return a cell of a table: the mean ± the standard deviation of the results."""
    return mean_and_sd(values_of(results, metric), COLUMNS[metric].digits)


def mean_and_sd(values, digits):
    """Return "mean ± standard deviation", a single value as it is, or "" for no values."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    # With non-breaking spaces, so that a cell stays on one line.
    return f"{mean(values):.{digits}f}\u00a0±\u00a0{stdev(values):.{digits}f}"


def differences(metrics):
    """Return a table in Markdown of how the variants differ from the report's network.

    A difference counts only if the ranges of the seeds do not overlap.
    """
    reference = load_results(RESULTS / REFERENCE)
    lines = []
    for name, title in TITLES.items():
        if name in NOT_COMPARED:
            continue
        results = load_results(RESULTS / name)
        cells = []
        for metric in metrics:
            cells.append(difference(values_of(results, metric), values_of(reference, metric)))
        lines.append([title, str(number_measured(results, metrics)), *cells])
    return markdown(["Variant", "n"], metrics, lines)


def difference(values, reference):
    """Return "lower" or "higher" if all values lie below or above all of the reference, else "–".

    Return "" if one of them has fewer than three values, because two often lie apart by chance.
    """
    if min(len(values), len(reference)) < 3:
        return ""
    if max(values) < min(reference):
        return "lower"
    if min(values) > max(reference):
        return "higher"
    return "–"


# --- Numbers on the pages -----------------------------------------------------------------


def page_tables():
    """Return the numbers in the two tables of README.md, a line "first cell: numbers" for each row.

    The numbers are separated by semicolons.
    """
    runs32 = load_results(RESULTS / REFERENCE)
    runs16 = load_results(RESULTS / "latent16")
    connected = load_results(RESULTS / "fc-latent32")
    n32 = f"n = {len(runs32)}"
    n16 = f"n = {len(runs16)}"
    n_connected = f"n = {len(connected)}"
    sharpness32 = cell(runs32, "sharpness_reconstructions")
    sharpness_connected = cell(connected, "sharpness_reconstructions")
    accuracy16 = cell(runs16, "accuracy")
    accuracy32 = cell(runs32, "accuracy")
    shirts = [share_correct(runs16, "Shirt"), n16, share_correct(runs32, "Shirt"), n32]
    rows = {
        "test loss after 100 epochs": [cell(runs32, "test_loss"), n32],
        "accuracy, 16 latent dimensions": [accuracy16, n16],
        "accuracy, 32 latent dimensions": [accuracy32, n32],
        "sharper than a fully connected VAE": [sharpness32, n32, sharpness_connected, n_connected],
        "hardest class": shirts,
        "loss in the first epoch": [cell(runs32, "first_train_loss")],
        "loss in later epochs": [cell(runs32, "test_loss"), cell(runs32, "train_loss")],
        "plateau by epoch 100": [fall(runs32, "test_loss", 10)],
        "training and test loss are close": [cell(runs32, "gap")],
        "reconstructions: clear edges, blur largely gone": [sharpness32],
        "accuracy with 16 latent dimensions": [accuracy16],
        "accuracy with 32 is similar or higher": [accuracy32, accuracy16],
        "much sharper than a fully connected VAE": [sharpness32, sharpness_connected],
    }
    return "".join(f"{label}: {'; '.join(numbers)}\n" for label, numbers in rows.items())


def page_numbers():
    """Return the numbers in the text of README.md and results/README.md that are in no table."""
    lines = []
    runs32 = load_results(RESULTS / REFERENCE)
    runs16 = load_results(RESULTS / "latent16")
    for epochs, loss in [(10, "train_loss"), (10, "test_loss"), (50, "test_loss")]:
        lines.append(
            f"{REFERENCE}: {loss} falls in the last {epochs} epochs by {fall(runs32, loss, epochs)}"
        )
    for name, results in [(REFERENCE, runs32), ("latent16", runs16)]:
        for label in ("Shirt", "Sandal"):
            lines.append(f"{name}: {share_correct(results, label)} % of class {label} are correct")
    first_losses = values_of(runs32 + runs16, "first_train_loss")
    lines.append(
        f"{len(first_losses)} runs with 16 or 32 latent dimensions: the train loss of epoch 1 is "
        f"{min(first_losses):.1f} to {max(first_losses):.1f}"
    )
    for metric in COMPARED + SAMPLES:
        title, _, digits = COLUMNS[metric]
        values = values_of(runs32, metric)
        low = f"{min(values):.{digits}f}"
        high = f"{max(values):.{digits}f}"
        lines.append(f"{REFERENCE}: {title} is {low} to {high} (n = {len(values)})")
    lines.append(
        "epochs200: the test loss falls in the last 100 epochs by "
        f"{fall(load_results(RESULTS / 'epochs200'), 'test_loss', 100)}"
    )
    # The first seed of β = 0.1 was evaluated on the test set before the others were trained.
    accuracies = values_of(load_results(RESULTS / "beta0.1"), "accuracy")
    lines.append(f"beta0.1: accuracies {', '.join(f'{accuracy:.2f}' for accuracy in accuracies)} %")
    lines.append(f"beta0.1 without its first seed: {mean_and_sd(accuracies[1:], 2)} %")
    metrics = runs32[0].metrics
    lines.append(
        f"minimum BCE: {metrics['train_bce_floor']:.2f} nats per training image, "
        f"{metrics['bce_floor']:.2f} nats per test image, a difference of "
        f"{metrics['bce_floor'] - metrics['train_bce_floor']:.2f}"
    )
    return "\n".join(lines)


def fall(results, loss, epochs):
    """Return by how much a loss falls in the last epochs, mean ± standard deviation."""
    falls = [result.run.log[-1 - epochs][loss] - result.run.log[-1][loss] for result in results]
    return mean_and_sd(falls, 2)


def share_correct(results, label):
    """Return the percentage of the images of a class that are classified correctly."""
    return mean_and_sd([100 * result.metrics["recall"][label] for result in results], 1)


def measure_pixels(splits):
    """Fit the report's Random Forest on the 784 pixels with random states 0 to 9.

    The accuracies on the test set are written to pixels.json.
    """
    (train_images, train_labels), (test_images, test_labels) = splits
    train_pixels = train_images.flatten(1)
    test_pixels = test_images.flatten(1)
    accuracies = {}
    for random_state in range(10):
        forest = fit_forest(train_pixels, train_labels, random_state)
        accuracies[random_state] = forest.score(test_pixels, test_labels)
    data.write_bytes(RESULTS / "pixels.json", data.json_bytes(accuracies))


# --- Figures ------------------------------------------------------------------------------

# A font that can still be read when a figure is shown at half the width of a page.
STYLE = ["default", {"font.size": 14, "axes.titlesize": 15}]


@torch.no_grad()
@matplotlib.style.context(STYLE)
def draw_figures(splits):
    """Draw the figures that compare runs, and write them to the folder of this script."""
    (train_images, _), (test_images, test_labels) = splits
    firsts = plots.first_images(test_images, test_labels)
    figures = {
        "hero.png": draw_hero(firsts),
        "samples.png": draw_samples(train_images),
        "matrices.png": draw_matrices(),
        "losses.png": draw_losses(),
        "beta.png": draw_beta(),
        "proposals.png": draw_proposals(),
        "accuracy.png": draw_accuracy(),
    }
    for name, figure in figures.items():
        data.write_bytes(RESULTS / name, plots.png_bytes(figure))


def metrics_of_seed_0(name):
    """Return the metrics of seed 0 of a variant, as a dict."""
    for result in load_results(RESULTS / name):
        if seed_of(result) == 0:
            return result.metrics
    raise UserError(
        f"{RESULTS / name}/seed0 is missing. Train it and evaluate it with classify.py."
    )


def draw_hero(firsts):
    """Draw the first test image of each class, and three networks' reconstructions of them."""
    rows = [firsts]
    row_names = ["original"]
    titles = {
        "fc-latent32": "fully\nconnected,",
        "latent32": "ConvVAE,",
        "beta0.1": "ConvVAE,\nβ = 0.1,",
    }
    for name, title in titles.items():
        model = load_network(read_run(RESULTS / name / "seed0"))
        torch.manual_seed(0)
        reconstructions, _, _ = model(firsts)
        rows.append(reconstructions)
        row_names.append(f"{title}\nMSE {1000 * metrics_of_seed_0(name)['mse']:.1f}")
    classes = [name.replace("/", "/\n").replace(" ", "\n") for name in data.CLASSES]
    return enlarge_labels(plots.draw_grid(rows, row_names, classes))


def draw_samples(train_images):
    """Draw ten samples from N(0, I) and ten from a mixture of Gaussians, for β = 1 and β = 0.1."""
    rows = []
    row_names = []
    for name, beta in [("latent32", "β = 1"), ("beta0.1", "β = 0.1")]:
        model = load_network(read_run(RESULTS / name / "seed0"))
        metrics = metrics_of_seed_0(name)
        torch.manual_seed(0)
        rows.append(model.decode(torch.randn(10, 32)))
        row_names.append(f"{beta}, N(0, I),\nFréchet {metrics['frechet_samples']:.2f}")
        rows.append(model.decode(sample_mixture(model, train_images, 10)))
        row_names.append(f"{beta}, mixture,\nFréchet {metrics['frechet_mixture_samples']:.2f}")
    return enlarge_labels(plots.draw_grid(rows, row_names))


def enlarge_labels(grid):
    """Return a grid of images with larger labels, which are not rotated."""
    for axis in grid.axes:
        axis.yaxis.label.set(rotation=0, ha="right", va="center", fontsize=16)
        axis.title.set_fontsize(15)
    return grid


def draw_matrices():
    """Draw the report's confusion matrix and one of ours, in percent of each true class."""
    report_matrix = json.loads((RESULTS / "report_matrix.json").read_bytes())
    matrices = {
        "The report": torch.tensor(report_matrix),
        "Ours, 16 latent dimensions": torch.tensor(
            metrics_of_seed_0("latent16")["confusion_matrix"]
        ),
    }
    figure = Figure(figsize=(8.8, 5), layout="constrained")
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
            xlabel="predicted class",
            ylabel="",
        )
    axes[0].set_ylabel("true class")
    return figure


def draw_losses():
    """Draw the losses of all seeds of the report's network from the second epoch on."""
    figure = Figure(figsize=(8.8, 4), layout="constrained")
    axis = figure.subplots()
    for result in load_results(RESULTS / REFERENCE):
        log = result.run.log[1:]
        epochs = [row["epoch"] for row in log]
        for split, color in [("train", "C0"), ("test", "C1")]:
            losses = [row[f"{split}_loss"] for row in log]
            axis.plot(epochs, losses, color=color, linewidth=0.8)
    axis.axhline(236, color="0.4", linestyle="--")
    axis.text(32, 240, "test", color="C1", fontsize=16)
    axis.text(32, 233, "train", color="C0", fontsize=16)
    axis.text(1, 233.8, "the report: 236", color="0.4", fontsize=16)
    axis.set(xlabel="epoch", ylabel="loss, nats per image", ylim=(232, 262))
    return figure


def draw_beta():
    """Draw how the weight of the KL divergence changes both terms of the loss, and the metrics.

    Each dot is a seed. Lines join the means.
    """
    folders = {0.1: "beta0.1", 0.5: "beta0.5", 1: "latent32", 2: "beta2", 4: "beta4"}
    results = {beta: load_results(RESULTS / name) for beta, name in folders.items()}
    figure = Figure(figsize=(8.8, 5), layout="constrained")
    axes = figure.subplot_mosaic([["terms", "accuracy"], ["terms", "active"]], width_ratios=[1, 1])
    terms = axes["terms"]
    bce_means = []
    kld_means = []
    for beta, seeds in results.items():
        bce = values_of(seeds, "excess_bce")
        kld = values_of(seeds, "kld")
        terms.plot(bce, kld, "o", color="C0", alpha=0.5)
        bce_means.append(mean(bce))
        kld_means.append(mean(kld))
        terms.annotate(f"β = {beta}", (mean(bce), mean(kld)), (8, 5), textcoords="offset points")
    terms.plot(bce_means, kld_means, color="C0")
    terms.set(
        xlabel="BCE − minimum, nats per image",
        ylabel="KLD, nats per image",
        xlim=(0, 62),
        ylim=(0, 65),
    )

    for axis, metric in [(axes["accuracy"], "accuracy"), (axes["active"], "active_dimensions")]:
        means = []
        for beta, seeds in results.items():
            values = values_of(seeds, metric)
            axis.semilogx([beta] * len(values), values, "o", color="C0", alpha=0.5)
            means.append(mean(values))
        axis.semilogx(list(results), means, color="C0")
        axis.minorticks_off()
        axis.set_xticks(list(results), list(results))
        axis.set_xlabel("β (log scale)")
        axis.grid(alpha=0.3)
    axes["accuracy"].set(title="accuracy, %", ylim=(84, 88.5))
    axes["active"].set(title="active dimensions (of 32)", yticks=(0, 16, 32))
    return figure


def draw_proposals():
    """Draw four metrics of each proposal of the report, a dot for each seed.

    The gray band is the range of the report's network.
    """
    folders = {
        "the report's network": REFERENCE,
        "deeper": "deep",
        "deeper, cosine": "deep-cosine",
        "200 epochs": "epochs200",
        "feature matching": "feature",
        "cosine": "cosine",
        "64 dimensions": "latent64",
        "128 dimensions": "latent128",
    }
    rows = {title: load_results(RESULTS / name) for title, name in folders.items()}
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    columns = [
        ("test loss,\nnats per image", "test_loss", (235, 236)),
        ("MSE × 1000", "mse", (12, 13)),
        ("sharpness", "sharpness_reconstructions", (0.53, 0.56)),
        ("accuracy, %", "accuracy", (86, 87)),
    ]
    for axis, (title, metric, ticks) in zip(axes, columns):
        values = {label: values_of(results, metric) for label, results in rows.items()}
        reference = values["the report's network"]
        axis.axvspan(min(reference), max(reference), color="0.87")
        draw_dots(axis, values)
        axis.set_title(title, fontsize=14)
        axis.set_xticks(ticks)
        axis.margins(x=0.15)
        axis.tick_params(axis="y", length=0)
    return figure


def draw_accuracy():
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
        networks[title] = values_of(load_results(RESULTS / name), "accuracy")
    forests = {}
    for row in load_rows(RESULTS):
        if row.title == "PCA":
            forests[f"PCA, {row.dimensions}"] = values_of(row.results, "accuracy")
        if row.title == "pixels, random states 0 to 9":
            forests["784 pixels"] = values_of(row.results, "accuracy")
    rows = {**networks, **forests}
    figure = Figure(figsize=(8.8, 4.6), layout="constrained")
    axis = figure.subplots()
    draw_dots(axis, rows, colors=["C0"] * len(networks) + ["C1"] * len(forests))
    axis.axvline(84.01, color="0.4", linestyle="--")
    axis.set_title("  the report, 16 dimensions: 84.01 %", loc="left", fontsize=14, color="0.4")
    axis.set_xlabel("accuracy, %   (blue: networks, orange: Random Forests without a network)")
    return figure


def draw_dots(axis, rows, colors=None):
    """Draw {title: values} as rows of dots, the first row at the top.

    The dots of a row are a little above each other, so that equal values can be seen.
    """
    for y, values in enumerate(rows.values()):
        spread = 0.04 * min(len(values) - 1, 8)
        heights = torch.linspace(y - spread, y + spread, len(values)).tolist()
        color = colors[y] if colors else "C0"
        axis.plot(list(values), heights, "o", color=color, alpha=0.6, markersize=5)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    data.run_script(main, when_interrupted="Run the same command again.")
