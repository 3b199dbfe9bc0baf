"""Print the tables of results/README.md, and the numbers in the text of both pages.

python results/summary.py                  # the tables of all runs in results/
python results/summary.py results/search   # the tables of the search
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
import data
from data import BASELINES, CLASSIFICATION, Run, UserError


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
    parser = argparse.ArgumentParser(
        usage="%(prog)s [FOLDER]", description="Print the tables of results/README.md."
    )
    parser.add_argument(
        "folder",
        type=data.folder,
        metavar="FOLDER",
        nargs="?",
        default=RESULTS,
        help="folder with runs in <name>/seed<n> (default: the folder of this script)",
    )
    folder = parser.parse_args().folder
    results = load_results(folder)
    print(tables(folder, results))
    if folder.resolve() == RESULTS:
        print(differences(results, COMPARED))
        print(differences(results, SAMPLES))
        print(page_tables(results))
        print(page_numbers(results))


# --- Reading results ----------------------------------------------------------------------


class Result(NamedTuple):
    """A run with all that was measured of it, or a baseline, which is no run."""

    run: Run | None
    # The metrics by their name. For a run: the last row of the loss log, classification.json,
    # first_train_loss and gap. For a baseline: only what was measured of it.
    metrics: dict


def load_results(folder):
    """Return the Results of all evaluated runs in `folder`/<name>/seed<n>, as {name: [Result]}.

    The names are in the order of the tables, and the results of a name in the order of the seeds.
    Raises UserError if there are none, or if runs cannot be compared.
    """
    names = {path.parent.parent.name for path in folder.glob(f"*/seed*/{CLASSIFICATION}")}
    titles = titles_of(folder)
    in_order = [name for name in titles if name in names] + sorted(names - titles.keys())
    results = {}
    for name in in_order:
        seeds = load_seeds(folder / name)
        if seeds:
            results[name] = seeds
    if not results:
        raise UserError(
            f"{folder} has no evaluated runs in <name>/seed<n>. Evaluate runs with classify.py "
            "first."
        )
    check_same_data([seeds[0].run for seeds in results.values()])
    return results


def titles_of(folder):
    """Return the titles of the rows, {name: title}. Only published folders have titles."""
    if folder.resolve() == RESULTS:
        return TITLES
    if folder.resolve() == RESULTS / "search":
        return SEARCH_TITLES
    return {}


def load_seeds(folder):
    """Return the Result of each evaluated run in `folder`/seed<n>, in the order of the seeds.

    Runs that were trained further after their evaluation are left out, with a warning. Raises
    UserError if the runs differ in more than their seeds.
    """
    results = []
    for path in folder.glob(f"seed*/{CLASSIFICATION}"):
        run = data.read_run(path.parent)
        classification = data.current_classification(run)
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
    for name in {**run.config, **other.config}:  # also options that only one of them has
        # The seeds differ on purpose, and the runs of a row may come from different machines.
        if name in ("seed", "torch", "device"):
            continue
        if run.config.get(name) != other.config.get(name):
            differences.append(f"different values of {name} in their configs")
    if len(run.log) != len(other.log):
        differences.append("different numbers of epochs in their logs")
    if differences:
        raise UserError(
            f"{run.path} and {other.path} have {differences[0]}, so they cannot be in the same row "
            "of a table. Move one of them elsewhere."
        )


def check_same_data(runs):
    """Raise UserError unless all runs were trained and tested on the same images."""
    for run in runs:
        for name in ("data_sha256", "hold_out"):
            if run.config[name] != runs[0].config[name]:
                raise UserError(
                    f"{runs[0].path} and {run.path} were trained on different data ({name} in "
                    "their configs), so they cannot be in the same table. Move one of them "
                    "elsewhere."
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


def tables(folder, results):
    """Return the tables of the results {name: [Result]} of a folder, in Markdown."""
    titles = titles_of(folder)
    rows = []
    for name, seeds in results.items():
        rows.append(Row(titles.get(name, name), seeds[0].run.config["latent_dim"], seeds))
    rows += baseline_rows(folder, results)
    all_tables = [table(rows, columns) for columns in (LOSSES, RECONSTRUCTIONS, SAMPLES)]
    return "\n".join(text for text in all_tables if text)


def baseline_rows(folder, results):
    """Return the rows of the baselines, which do not depend on a network, in alphabetical order."""
    rows = {}
    for seeds in results.values():
        for result in seeds:
            # Those of one run stand for all.
            for row in baselines_of(result.run):
                rows[row.title, row.dimensions] = row
    if (folder / "pixels.json").exists():
        accuracies = data.read(folder / "pixels.json", json.loads).values()
        forests = [Result(None, {"accuracy": accuracy}) for accuracy in accuracies]
        row = Row("pixels, random states 0 to 9", 784, forests)
        rows[row.title, row.dimensions] = row
    return [rows[key] for key in sorted(rows)]


def baselines_of(run):
    """Return the rows of the baselines that were measured with classify.py --baselines."""
    path = run.path / BASELINES
    if not path.exists():
        return []
    baselines = data.read(path, json.loads)
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


def table(rows, columns):
    """Return a table in Markdown, or "" if no row has any of the columns.

    A cell is the mean ± the standard deviation over the n results that have been measured.
    """
    lines = []
    for row in rows:
        n = number_measured(row.results, columns)
        cells = [cell(row.results, column) for column in columns]
        if n > 0:
            lines.append([row.title, str(row.dimensions), str(n), *cells])
    if not lines:
        return ""
    return markdown(["Runs", "Dimensions", "n"], columns, lines)


def markdown(first_titles, columns, lines):
    """Return a table in Markdown: its first columns by their titles, the others by their metric."""
    titles = [*first_titles, *(COLUMNS[column].title for column in columns)]
    all_lines = [titles, ["---"] * len(titles), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in all_lines)


def number_measured(results, columns):
    """Return how many results have any of the columns. The metrics of samples are often missing."""
    return max(len(values_of(results, column)) for column in columns)


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


def differences(results, columns):
    """Return a table in Markdown of how the variants differ from the report's network.

    A difference counts only if the ranges of the seeds do not overlap.
    """
    reference = results[REFERENCE]
    lines = []
    for name, title in TITLES.items():
        if name in NOT_COMPARED:
            continue
        cells = []
        for column in columns:
            cells.append(difference(values_of(results[name], column), values_of(reference, column)))
        lines.append([title, str(number_measured(results[name], columns)), *cells])
    return markdown(["Variant", "n"], columns, lines)


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


def page_tables(results):
    """Return the numbers in the two tables of README.md, a line "first cell: numbers" for each row.

    The numbers are separated by semicolons.
    """
    runs32 = results[REFERENCE]
    runs16 = results["latent16"]
    connected = results["fc-latent32"]
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


def page_numbers(results):
    """Return the numbers in the text of README.md and results/README.md that are in no table."""
    lines = []
    runs32 = results[REFERENCE]
    runs16 = results["latent16"]
    for epochs, loss in [(10, "train_loss"), (10, "test_loss"), (50, "test_loss")]:
        lines.append(
            f"{REFERENCE}: {loss} falls in the last {epochs} epochs by {fall(runs32, loss, epochs)}"
        )
    for name, runs in [(REFERENCE, runs32), ("latent16", runs16)]:
        for label in ("Shirt", "Sandal"):
            lines.append(f"{name}: {share_correct(runs, label)} % of class {label} are correct")
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
        f"{fall(results['epochs200'], 'test_loss', 100)}"
    )
    # The first seed of β = 0.1 was evaluated on the test set before the others were trained.
    accuracies = values_of(results["beta0.1"], "accuracy")
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


if __name__ == "__main__":
    data.run_script(main, when_interrupted="Run the same command again.")
