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

RESULTS = Path(__file__).parent
ROOT = RESULTS.parent
sys.path.insert(0, str(ROOT))
import data
import plots  # before matplotlib, because it lets matplotlib be imported whatever MPLBACKEND says

# isort: split
import matplotlib.style
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

from classify import fit_forest
from data import UserError
from model import Run, current_classification, load_run, read_run, sample_mixture


class Column(NamedTuple):
    """A column of a table. Cells are values of `key`, multiplied by `factor`."""

    title: str
    key: str
    factor: float
    digits: int  # after the decimal point


LOSSES = [
    Column("Train loss, epoch 1", "first_train_loss", 1, 1),
    Column("Train loss", "train_loss", 1, 2),
    Column("Test loss", "test_loss", 1, 2),
    Column("Test − train", "gap", 1, 2),
    Column("BCE − minimum", "excess_bce", 1, 2),
    Column("KLD", "kld", 1, 2),
]
RECONSTRUCTIONS = [
    Column("MSE × 1000", "mse", 1000, 2),
    Column("Sharpness", "sharpness_reconstructions", 1, 3),
    Column("Active dimensions", "active_dimensions", 1, 1),
    Column("Accuracy, %", "accuracy", 100, 2),
]
SAMPLES = [
    Column("Fréchet", "frechet_samples", 1, 2),
    Column("Precision", "precision_samples", 1, 2),
    Column("Recall", "recall_samples", 1, 2),
    Column("Fréchet, mixture", "frechet_mixture_samples", 1, 2),
    Column("Precision, mixture", "precision_mixture_samples", 1, 2),
    Column("Recall, mixture", "recall_mixture_samples", 1, 2),
]
COMPARED = [
    Column("Test loss", "test_loss", 1, 2),
    Column("BCE", "bce", 1, 2),
    Column("KLD", "kld", 1, 2),
    Column("MSE × 1000", "mse", 1000, 2),
    Column("Sharpness", "sharpness_reconstructions", 1, 3),
    Column("Active dimensions", "active_dimensions", 1, 1),
    Column("Accuracy, %", "accuracy", 100, 2),
    Column("Fréchet", "frechet_samples", 1, 2),
]

REFERENCE = "latent32"  # the report's network, with which the variants are compared

# The report's proposals and other variants, by the folder of their runs.
VARIANTS = {
    "deep": "Deep ConvVAE",
    "deep-cosine": "Deep ConvVAE, cosine schedule",
    "epochs200": "200 epochs",
    "cosine": "cosine schedule",
    "plateau": "plateau schedule",
    "feature": "feature matching",
    "latent2": "2 latent dimensions",
    "latent8": "8 latent dimensions",
    "latent16": "16 latent dimensions",
    "latent64": "64 latent dimensions",
    "latent128": "128 latent dimensions",
    "beta0.1": "β = 0.1",
    "beta0.5": "β = 0.5",
    "beta2": "β = 2",
    "beta4": "β = 4",
    "fc-latent32": "fully connected VAE",
}


def main():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] [folder]",
        description="Print the tables of results/README.md. With --figures, draw the figures that "
        "compare runs.",
    )
    parser.add_argument(
        "folder",
        type=data.folder,
        nargs="?",
        default=RESULTS,
        help="folder with runs in <name>/seed<n> (default: the folder of this script)",
    )
    parser.add_argument(
        "--data",
        type=data.folder,
        metavar="DIR",
        default=data.DEFAULT_ROOT,
        help="folder with the four files of Fashion-MNIST (default: %(default)s)",
    )
    parser.add_argument(
        "--pixels",
        action="store_true",
        help="first fit ten Random Forests on the raw pixels, which takes about ten minutes",
    )
    parser.add_argument(
        "--figures", action="store_true", help="first draw the figures that compare runs"
    )
    args = parser.parse_args()
    if args.pixels:
        measure_pixels(args.data)
    if args.figures:
        draw_figures(args.data)
    print(tables(args.folder))
    if args.folder.resolve() == RESULTS.resolve():
        print(differences_table())
        print(page_numbers())


# --- Reading results ----------------------------------------------------------------------


class Result(NamedTuple):
    """A run, and everything that was measured of it."""

    run: Run | None  # None for the accuracies in pixels.json, which belong to no run
    # For a run: the last row of the loss log, classification.json, first_train_loss and gap. For a
    # baseline: only what was measured of it.
    metrics: dict


def load_results(folder):
    """Return the Result of each run in a folder of seeds, in the order of the seeds.

    Runs without a classification of their weights are left out, with a warning.
    """
    results = []
    for path in folder.glob("seed*"):
        run = read_run(path)
        classification = current_classification(run)
        if classification:
            last = run.log[-1]
            metrics = {**last, **classification}
            metrics["gap"] = last["test_loss"] - last["train_loss"]
            metrics["first_train_loss"] = run.log[0]["train_loss"]
            results.append(Result(run, metrics))
    return sorted(results, key=seed_of)


def seed_of(result):
    """Return the random seed of a result's run."""
    return result.run.config["seed"]


def values_of(results, key):
    """Return the values of one metric, from those results that have it."""
    return [result.metrics[key] for result in results if key in result.metrics]


# --- Tables -------------------------------------------------------------------------------


def tables(folder):
    """Return the tables of all runs in `folder`/<name>/seed<n>, in Markdown.

    The runs of a row differ only in their seeds. The baselines that classify.py --baselines has
    measured have rows of their own. Raises UserError if there is no run, or if two runs of a row
    have the same seed, different data or different networks for feature matching.
    """
    rows = {}  # {(network and options, latent dimensions): results}
    baselines = {}
    for path in sorted(folder.iterdir()):
        for result in load_results(path):
            label = result.run.describe(leave_out=["latent_dim"])
            row = rows.setdefault((label, result.run.config["latent_dim"]), [])
            check_only_seeds_differ(result, row)
            row.append(result)
            # Baselines do not depend on the network, so those of one run stand for all.
            baselines.update(baseline_rows(result))
    if not rows:
        raise UserError(
            f"{folder} has no evaluated runs in <name>/seed<n>. "
            "Evaluate runs with classify.py first."
        )
    content = data.read_bytes(folder / "pixels.json")
    if content:
        accuracies = json.loads(content).values()
        results = [Result(None, {"accuracy": accuracy}) for accuracy in accuracies]
        baselines["Pixels, random states 0 to 9", 784] = results
    all_rows = sorted(rows.items()) + sorted(baselines.items())
    return "\n".join(table(all_rows, columns) for columns in (LOSSES, RECONSTRUCTIONS, SAMPLES))


def check_only_seeds_differ(result, row):
    """Raise UserError if a result cannot be in the same row as the results in `row`.

    All of them have the same options, apart from the seed. Their data and their network for feature
    matching must be the same, too, by checksum. Two runs with the same seed would be copies.
    """
    for other in row:
        for name in ("data_sha256", "feature_sha256"):
            if other.run.config[name] != result.run.config[name]:
                raise UserError(
                    f"{other.run.path} and {result.run.path} have the same options, but different "
                    f"{name} in config.json. Move one of them out of this folder."
                )
        if seed_of(other) == seed_of(result):
            raise UserError(
                f"{other.run.path} and {result.run.path} have the same options and the same seed, "
                f"{seed_of(result)}. Move one of them out of this folder."
            )


def baseline_rows(result):
    """Return the rows of the baselines that were measured together with this result."""
    baselines = result.metrics.get("baselines") or {}
    latent_dim = result.run.config["latent_dim"]
    hold_out = result.run.config["hold_out"]
    suffix = f", validation split of {hold_out}" if hold_out else ""
    rows = {}
    if "pca" in baselines:
        rows["PCA" + suffix, latent_dim] = [Result(result.run, {"accuracy": baselines["pca"]})]
    if "pixels" in baselines:
        rows["Pixels" + suffix, 784] = [Result(result.run, {"accuracy": baselines["pixels"]})]
    if "training_images" in baselines:
        metrics = {}
        for name, value in baselines["training_images"].items():
            metrics[f"{name}_samples"] = value
        rows["Training images" + suffix, 784] = [Result(result.run, metrics)]
    return rows


def table(rows, columns):
    """Return a table in Markdown. Rows without any value are left out.

    `rows` are ((network and options, dimensions), results). A cell is the mean ± the standard
    deviation over the n results. If fewer than n have the value, the cell says how many.
    """
    lines = [["Network", "Dimensions", "n"] + [column.title for column in columns]]
    lines.append(["---"] * len(lines[0]))
    for (label, dimensions), results in rows:
        cells = []
        for column in columns:
            values = [value * column.factor for value in values_of(results, column.key)]
            cell = mean_and_sd(values, column.digits)
            if 0 < len(values) < len(results):
                cell += f" (n = {len(values)})"
            cells.append(cell)
        if any(cells):
            lines.append([label, str(dimensions), str(len(results))] + cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean_and_sd(values, digits):
    """Return "mean ± standard deviation", a single value as it is, or "" for no values."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    # With non-breaking spaces, so that a cell stays on one line.
    return f"{mean(values):.{digits}f}\u00a0±\u00a0{stdev(values):.{digits}f}"


def differences_table():
    """Return a table in Markdown of how the variants differ from the report's network.

    A difference counts only if the ranges of the seeds do not overlap.
    """
    reference = load_results(RESULTS / REFERENCE)
    lines = [["Variant", "n"] + [column.title for column in COMPARED]]
    lines.append(["---"] * len(lines[0]))
    for name, title in VARIANTS.items():
        results = load_results(RESULTS / name)
        cells = []
        for column in COMPARED:
            values = values_of(results, column.key)
            cells.append(difference(values, values_of(reference, column.key)))
        lines.append([title, str(len(results))] + cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def difference(values, reference):
    """Return "lower" or "higher" if all values lie below or above all of the reference, else "–".

    Return "" if nothing was measured of one of them.
    """
    if not values or not reference:
        return ""
    if max(values) < min(reference):
        return "lower"
    if min(values) > max(reference):
        return "higher"
    return "–"


def page_numbers():
    """Return the measurements in README.md and results/README.md that are in no table."""
    lines = []
    reference = load_results(RESULTS / REFERENCE)
    for epochs, loss in [(10, "train_loss"), (10, "test_loss"), (50, "test_loss")]:
        falls = []
        for result in reference:
            log = result.run.log
            falls.append(log[-1 - epochs][loss] - log[-1][loss])
        lines.append(
            f"{REFERENCE}: {loss} falls in the last {epochs} epochs by {mean_and_sd(falls, 2)}"
        )
    for name in (REFERENCE, "latent16"):
        results = load_results(RESULTS / name)
        for label in ("Shirt", "Sandal"):
            shares = [100 * result.metrics["recall"][label] for result in results]
            lines.append(f"{name}: {mean_and_sd(shares, 1)} % of class {label} are correct")
    first_losses = values_of(reference, "first_train_loss")
    first_losses += values_of(load_results(RESULTS / "latent16"), "first_train_loss")
    lines.append(
        f"{len(first_losses)} runs with 16 or 32 latent dimensions: the train loss of epoch 1 is "
        f"{min(first_losses):.1f} to {max(first_losses):.1f}"
    )
    for column in COMPARED:
        values = [value * column.factor for value in values_of(reference, column.key)]
        low = f"{min(values):.{column.digits}f}"
        high = f"{max(values):.{column.digits}f}"
        lines.append(f"{REFERENCE}: {column.title} is {low} to {high} (n = {len(values)})")
    return "\n".join(lines)


def measure_pixels(root):
    """Fit the report's Random Forest on the 784 pixels with random states 0 to 9.

    The accuracies on the test set are written to pixels.json.
    """
    (train_images, train_labels), (test_images, test_labels) = data.load_splits(root)
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
def draw_figures(root):
    """Draw the figures that compare runs, and write them to the folder of this script."""
    (train_images, _), (test_images, test_labels) = data.load_splits(root)
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
    titles = {"fc-latent32": "fully connected", "latent32": "ConvVAE", "beta0.1": "β = 0.1"}
    for name, title in titles.items():
        model = load_run(RESULTS / name / "seed0").model
        torch.manual_seed(0)
        reconstructions, _, _ = model(firsts)
        rows.append(reconstructions)
        row_names.append(f"{title} ({1000 * metrics_of_seed_0(name)['mse']:.1f})")
    classes = [name.replace("/", "/\n").replace(" ", "\n") for name in data.CLASSES]
    return enlarge_labels(plots.draw_grid(rows, row_names, classes))


def draw_samples(train_images):
    """Draw ten samples from N(0, I) and ten from a mixture of Gaussians, for β = 1 and β = 0.1."""
    rows = []
    row_names = []
    for name, beta in [("latent32", "β = 1"), ("beta0.1", "β = 0.1")]:
        model = load_run(RESULTS / name / "seed0").model
        metrics = metrics_of_seed_0(name)
        torch.manual_seed(0)
        rows.append(model.decode(torch.randn(10, 32)))
        row_names.append(f"{beta}, N(0,\u00a0I), Fréchet {metrics['frechet_samples']:.2f}")
        rows.append(model.decode(sample_mixture(model, train_images, 10)))
        row_names.append(f"{beta}, mixture, Fréchet {metrics['frechet_mixture_samples']:.2f}")
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
    figure = Figure(figsize=(8.8, 4.4), layout="constrained")
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
    terms.set(xlabel="BCE above its minimum, nats", ylabel="KLD, nats", xlim=(0, 62), ylim=(0, 65))

    for axis, key, factor in [
        (axes["accuracy"], "accuracy", 100),
        (axes["active"], "active_dimensions", 1),
    ]:
        means = []
        for beta, seeds in results.items():
            values = [factor * value for value in values_of(seeds, key)]
            axis.semilogx([beta] * len(values), values, "o", color="C0", alpha=0.5)
            means.append(mean(values))
        axis.semilogx(list(results), means, color="C0")
        axis.minorticks_off()
        axis.set_xticks(list(results), list(results))
        axis.grid(alpha=0.3)
    axes["accuracy"].set(title="accuracy, %", ylim=(84, 88.5))
    axes["active"].set(title="active dimensions (of 32)", yticks=(0, 16, 32), xlabel="β")
    return figure


def draw_proposals():
    """Draw four metrics of each proposal of the report, a dot for each seed.

    The gray band is the range of the report's network.
    """
    folders = {
        "the report's network": REFERENCE,
        "deep": "deep",
        "deep, cosine": "deep-cosine",
        "200 epochs": "epochs200",
        "feature matching": "feature",
        "cosine": "cosine",
        "64 dimensions": "latent64",
        "128 dimensions": "latent128",
    }
    rows = {title: load_results(RESULTS / name) for title, name in folders.items()}
    figure = Figure(figsize=(9.6, 4), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    columns = [
        ("Test loss ↓", "test_loss", 1),
        ("MSE × 1000 ↓", "mse", 1000),
        ("Sharpness ↑", "sharpness_reconstructions", 1),
        ("Accuracy, % ↑", "accuracy", 100),
    ]
    for axis, (title, key, factor) in zip(axes, columns):
        values = {}
        for label, results in rows.items():
            values[label] = [factor * value for value in values_of(results, key)]
        reference = values["the report's network"]
        axis.axvspan(min(reference), max(reference), color="0.87")
        draw_dots(axis, values)
        axis.set_title(title, fontsize=14)
        axis.locator_params(axis="x", nbins=2)
        axis.margins(x=0.15)
        axis.tick_params(axis="y", length=0)
    return figure


def draw_accuracy():
    """Draw the test accuracy of the Random Forest on several features.

    Each dot is a training run. For PCA, it is a single Random Forest; for pixels, it is a random
    state of the Random Forest.
    """
    rows = {}
    for latent_dim in (16, 32):
        accuracy = metrics_of_seed_0(f"latent{latent_dim}")["baselines"]["pca"]
        rows[f"PCA, {latent_dim}"] = [accuracy]
    folders = {
        "fully connected, 32": "fc-latent32",
        "ConvVAE, 16": "latent16",
        "ConvVAE, 32": "latent32",
        "β = 0.1, 32": "beta0.1",
        "from a search, 32": "best32",
        "from a search, 64": "best64",
    }
    for title, name in folders.items():
        rows[title] = values_of(load_results(RESULTS / name), "accuracy")
    rows["784 pixels"] = json.loads((RESULTS / "pixels.json").read_bytes()).values()
    figure = Figure(figsize=(8.8, 4.2), layout="constrained")
    axis = figure.subplots()
    percentages = {}
    for title, accuracies in rows.items():
        percentages[title] = [100 * accuracy for accuracy in accuracies]
    draw_dots(axis, percentages)
    axis.axvline(84.01, color="0.4", linestyle="--")
    axis.text(84.06, len(rows) - 1, "the report, 16 dimensions", color="0.4", va="center")
    axis.set_xlabel("accuracy, %")
    return figure


def draw_dots(axis, rows):
    """Draw {title: values} as rows of dots, the first row at the top."""
    for y, values in enumerate(rows.values()):
        axis.plot(values, [y] * len(values), "o", color="C0", alpha=0.6)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    data.run_script(main, when_interrupted="Run the same command again.")
