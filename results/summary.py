"""Print the tables of both pages and the numbers in their text, or the tables of a folder.

python results/summary.py        # the pages
python results/summary.py runs   # the tables of all evaluated runs in runs/<name>/seed<n>
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
from sklearn.feature_selection import f_classif

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
LOSSES = ["first_train_loss", "train_loss", "test_loss", "excess_bce", "kld"]
RECONSTRUCTIONS = ["mse", "sharpness_reconstructions", "active_dimensions", "accuracy"]
SAMPLES = [name for name in COLUMNS if name.endswith("_samples")]

# The rows of the tables of results/, in their order: folders of runs, and what they are called.
# The first one is the report's network, with which the others are compared.
REFERENCE = "latent32"
TITLES = {
    REFERENCE: "ConvVAE, as in the report",
    "latent2": "2 dimensions",
    "latent8": "8 dimensions",
    "latent16": "16 dimensions",
    "latent64": "64 dimensions",
    "latent128": "128 dimensions",
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
    "fc-latent16": "fully connected VAE, 16 dimensions",
    "fc-latent32": "fully connected VAE",
    "best32": "options from the search",
    "best64": "options from the search, 64 dimensions",
}
# The rows of the table on the front page: what they are called, and their options of train.py.
FRONT_PAGE = {
    REFERENCE: ("the report's network", ""),
    "beta0.1": ("β = 0.1", "--beta 0.1"),
    "beta0.5": ("β = 0.5", "--beta 0.5"),
    "beta2": ("β = 2", "--beta 2"),
    "beta4": ("β = 4", "--beta 4"),
    "deep-cosine": ("deeper, cosine schedule", "--model deep --lr-scheduler cosine"),
    "epochs200": ("200 epochs", "--epochs 200"),
    "feature": (
        "feature matching",
        "--feature-run results/latent32/seed0 --feature-weight 0.25",
    ),
    "latent64": ("64 dimensions", "--latent-dim 64"),
    "fc-latent32": ("fully connected", "--model fc"),
}
FRONT_PAGE_COLUMNS = ["test_loss", "mse", "accuracy", "frechet_samples"]
# The Random Forests of pixels.json.
PIXELS_TITLE = "pixels, random states 0 to 9"


def main():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [FOLDER]",
        description="Print the tables of both pages and the numbers in their text. With FOLDER, "
        "print the tables of all evaluated runs in FOLDER/<name>/seed<n>.",
    )
    parser.add_argument("folder", type=data.folder, metavar="FOLDER", nargs="?", default=RESULTS)
    folder = parser.parse_args().folder
    results = load_results(folder)
    rows = rows_of(folder, results)
    print(tables(rows))
    if folder.resolve() == RESULTS:
        print(front_page_table(results))
        print(deviations_table(results, rows))
        print(search_table(load_results(RESULTS / "search")))
        print(claims(results))
        print(page_numbers(results, rows))


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
    in_order = [name for name in TITLES if name in names] + sorted(names - TITLES.keys())
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
        # Commit a07dceb also wrote the checksum of the feature network.
        if name in ("seed", "torch", "device", "feature_sha256"):
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
    results: list


def rows_of(folder, results):
    """Return the rows of the results {name: [Result]} of a folder, and of its baselines."""
    rows = [Row(TITLES.get(name, name), seeds) for name, seeds in results.items()]
    return rows + baseline_rows(folder, results)


def tables(rows):
    """Return the three tables of these rows, in Markdown."""
    all_tables = [table(rows, columns) for columns in (LOSSES, RECONSTRUCTIONS, SAMPLES)]
    return "\n".join(text for text in all_tables if text)


def baseline_rows(folder, results):
    """Return the rows of the baselines, which do not depend on a network, in alphabetical order."""
    rows = {}
    for seeds in results.values():
        for result in seeds:
            # They do not depend on the seed, so those of one run are enough.
            for row in baselines_of(result.run):
                rows[row.title] = row
    if (folder / "pixels.json").exists():
        accuracies = data.read(folder / "pixels.json", json.loads).values()
        forests = [Result(None, {"accuracy": accuracy}) for accuracy in accuracies]
        rows[PIXELS_TITLE] = Row(PIXELS_TITLE, forests)
    return [rows[title] for title in sorted(rows)]


def baselines_of(run):
    """Return the rows of the baselines that were measured with classify.py --baselines."""
    path = run.path / BASELINES
    if not path.exists():
        return []
    baselines = data.read(path, json.loads)
    pca_title = f"PCA, {run.config['latent_dim']} components"
    rows = [
        Row(pca_title, [Result(None, {"accuracy": baselines["pca"]})]),
        Row("pixels", [Result(None, {"accuracy": baselines["pixels"]})]),
    ]
    if "training_images" in baselines:
        metrics = {}
        for name, value in baselines["training_images"].items():
            metrics[f"{name}_samples"] = value
        rows.append(Row("training images", [Result(None, metrics)]))
    return rows


def table(rows, columns):
    """Return a table in Markdown, or "" if no row has any of the columns.

    A cell is the mean ± the standard deviation over the n results that have been measured. It is
    bold if it differs from that of the first row.
    """
    lines = []
    for row in rows:
        n = number_measured(row.results, columns)
        cells = [cell(row.results, column, rows[0].results) for column in columns]
        if n > 0:
            lines.append([row.title, str(n), *cells])
    if not lines:
        return ""
    return markdown(["Runs", "n", *titles_of(columns)], lines)


def titles_of(columns):
    """Return the titles of columns."""
    return [COLUMNS[column].title for column in columns]


def markdown(titles, lines):
    """Return a table in Markdown."""
    text = f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}\n"
    for line in lines:
        text += f"| {' | '.join(line)} |\n"
    return text


def number_measured(results, columns):
    """Return how many results have any of the columns. The metrics of samples are often missing."""
    return max(len(values_of(results, column)) for column in columns)


def cell(results, metric, reference=()):
    """Return a cell of a table: the mean ± the standard deviation of the results.

    It is bold if it differs from that of the results in `reference`.
    """
    values = values_of(results, metric)
    text = mean_and_sd(values, COLUMNS[metric].digits)
    if differs(values, values_of(reference, metric)):
        return f"**{text}**"
    return text


def mean_and_sd(values, digits):
    """Return "mean±standard deviation", a single value as it is, or "" for no values."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f}±{stdev(values):.{digits}f}"


def differs(values, reference):
    """Return whether the means of two lists of values differ, with p < 0.01 in `t_test`."""
    return can_be_compared(values, reference) and t_test(values, reference) < 0.01


def can_be_compared(values, reference):
    """Return whether there are enough values for a t-test: at least two on each side."""
    return min(len(values), len(reference)) >= 2


def t_test(values, reference):
    """Return the two-sided p-value of a two-sample t-test that both lists have the same mean."""
    if len(set(values)) == 1 and len(set(reference)) == 1:  # the test would divide by 0
        return float(values[0] == reference[0])
    # With two groups, this analysis of variance is the t-test with equal variances.
    features = [[value] for value in [*values, *reference]]
    groups = [0] * len(values) + [1] * len(reference)
    _, p_values = f_classif(features, groups)
    return p_values[0].item()


def front_page_table(results):
    """Return the table of README.md that compares the report's network with its variants."""
    reference = results[REFERENCE]
    lines = []
    for name, (title, options) in FRONT_PAGE.items():
        seeds = results[name]
        cells = [cell(seeds, column, reference) for column in FRONT_PAGE_COLUMNS]
        lines.append([title, str(len(seeds)), *cells, f"`{options}`" if options else ""])
    return markdown(["Variant", "n", *titles_of(FRONT_PAGE_COLUMNS), "Options"], lines)


def deviations_table(results, rows):
    """Return the table of what could explain 84.01 %: accuracies with 16 latent dimensions."""
    deviations = data.read(RESULTS / "deviations.json", json.loads)
    lines = [[name, f"{100 * accuracy:.2f}"] for name, accuracy in deviations.items()]
    for row in rows:
        if row.title == "PCA, 16 components":
            title = "16 principal components of the pixels, no network"
            lines.append([title, cell(row.results, "accuracy")])
    latent8 = results["latent8"]
    lines.append([f"8 dimensions (n = {len(latent8)})", cell(latent8, "accuracy")])
    return markdown(["variant", COLUMNS["accuracy"].title], lines)


def search_table(results):
    """Return the table of the search. Each of its runs has one seed, and baselines come last."""
    runs = []
    for seeds in results.values():
        config = seeds[0].run.config
        options = [config["latent_dim"], config["beta"], config["epochs"]]
        runs.append([*options, cell(seeds, "mse"), cell(seeds, "accuracy")])
    runs.sort()
    lines = [[str(value) for value in run] for run in runs]
    for row in baseline_rows(RESULTS / "search", results):
        accuracy = cell(row.results, "accuracy")
        if accuracy:
            lines.append([row.title, "", "", "", accuracy])
    return markdown(["Dimensions", "β", "Epochs", *titles_of(["mse", "accuracy"])], lines)


# --- Numbers on the pages -----------------------------------------------------------------


def claims(results):
    """Return the numbers in README.md's table of claims, a line "first cell: numbers" for each row.

    The numbers are separated by semicolons.
    """
    runs32 = results[REFERENCE]
    runs16 = results["latent16"]
    sharpness32 = cell(runs32, "sharpness_reconstructions")
    sharpness_connected = cell(results["fc-latent32"], "sharpness_reconstructions")
    accuracy16 = cell(runs16, "accuracy")
    accuracy32 = cell(runs32, "accuracy")
    rows = {
        "loss in the first epoch": [cell(runs32, "first_train_loss")],
        "loss in later epochs": [cell(runs32, "test_loss"), cell(runs32, "train_loss")],
        "plateau by epoch 100": [fall(runs32, "test_loss", 10)],
        "training and test loss are close": [cell(runs32, "gap")],
        "reconstructions: clear edges, blur largely gone": [sharpness32],
        "accuracy with 16 dimensions": [accuracy16],
        "accuracy with 32 is similar or higher": [accuracy32, accuracy16],
        "confusion matrix of the test set": [share_correct(runs16, "Shirt")],
        "much sharper than a fully connected VAE": [sharpness32, sharpness_connected],
    }
    return "".join(f"{label}: {'; '.join(numbers)}\n" for label, numbers in rows.items())


def page_numbers(results, rows):
    """Return the numbers in the text of README.md and results/README.md that are in no table."""
    lines = []
    runs32 = results[REFERENCE]
    runs16 = results["latent16"]

    # In their first epoch, all runs of a group are the report's network and training.
    groups = {
        "2 dimensions": ["latent2"],
        "8 dimensions": ["latent8"],
        "16 dimensions": ["latent16"],
        "32 dimensions": [REFERENCE, "plateau", "cosine", "epochs200"],
        "64 dimensions": ["latent64"],
        "128 dimensions": ["latent128"],
    }
    for title, names in groups.items():
        losses = []
        for name in names:
            losses += values_of(results[name], "first_train_loss")
        lines.append(
            f"{title}: the train loss of epoch 1 is {min(losses):.1f} to {max(losses):.1f} in "
            f"{len(losses)} runs"
        )
    losses = values_of(runs32, "test_loss")
    lines.append(f"{REFERENCE}: the test loss is {min(losses):.2f} to {max(losses):.2f}")
    for name, epochs in [(REFERENCE, 10), ("epochs200", 100)]:
        text = fall(results[name], "test_loss", epochs)
        lines.append(f"{name}: the test loss falls by {text} in the last {epochs} epochs")
    for name, label in [("latent16", "Shirt"), (REFERENCE, "Shirt"), ("latent16", "Sandal")]:
        lines.append(f"{name}: {share_correct(results[name], label)} % of {label} are correct")

    losses16 = values_of(runs16, "test_loss")
    higher = mean(losses16) - mean(losses)
    lines.append(
        f"latent16: the test loss is {higher:.2f} nats higher than that of {REFERENCE}, "
        f"p = {t_test(losses16, losses):.2g}"
    )
    distances = values_of(results["beta2"], "frechet_samples")
    distances32 = values_of(runs32, "frechet_samples")
    lines.append(f"beta2: Fréchet distance, p = {t_test(distances, distances32):.2g}")
    # The plateau schedule never lowered the learning rate, so its runs are the same training.
    same_training = distances32 + values_of(results["plateau"], "frechet_samples")
    lines.append(f"beta2: with the runs of plateau, p = {t_test(distances, same_training):.2g}")

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
    counts = []
    for name, (title, _) in FRONT_PAGE.items():
        counts.append(f"{title} {number_measured(results[name], ['frechet_samples'])}")
    lines.append(f"seeds with samples: {', '.join(counts)}")

    compared = 0
    bold = 0
    for row in rows[1:]:
        for column in LOSSES + RECONSTRUCTIONS + SAMPLES:
            values = values_of(row.results, column)
            reference = values_of(rows[0].results, column)
            compared += can_be_compared(values, reference)
            bold += differs(values, reference)
    lines.append(f"{compared} comparisons, {bold} of them bold")
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
