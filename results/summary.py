"""Print tables of the runs in a folder: their losses, codes and samples.

python results/summary.py shows results/; another folder, such as results/search, can be named.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import data
from classify import fit_forest

# The columns of each table: what is shown of a run, times what, and with how many decimals.
LOSSES = {
    "Train loss, epoch 1": ("first_loss", 1, 1),
    "Train loss": ("train_loss", 1, 2),
    "Test loss": ("test_loss", 1, 2),
    "Test − train": ("gap", 1, 2),
    "BCE − floor": ("excess_bce", 1, 2),
    "KLD": ("kld", 1, 2),
}
CODES = {
    "MSE × 1000": ("mse", 1000, 2),
    "Sharpness": ("sharpness_reconstructions", 1, 3),
    "Active dimensions": ("active_dimensions", 1, 1),
    "Accuracy, %": ("accuracy", 100, 2),
}
SAMPLES = {
    "Fréchet": ("frechet_samples", 1, 2),
    "Precision": ("precision_samples", 1, 2),
    "Recall": ("recall_samples", 1, 2),
    "Fréchet, mixture": ("frechet_mixture_samples", 1, 2),
    "Precision, mixture": ("precision_mixture_samples", 1, 2),
    "Recall, mixture": ("recall_mixture_samples", 1, 2),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE, help="of <setting>/seed<n>")
    parser.add_argument("--data", type=Path, default=HERE.parent / "data" / "fashion-mnist")
    pixels_help = "measure ten forests on the raw pixels first, in some ten minutes"
    parser.add_argument("--pixels", action="store_true", help=pixels_help)
    args = parser.parse_args()
    if args.pixels:
        measure_pixels(args.data)
    print(tables(args.folder), end="")


def tables(folder):
    """Return the tables of the runs in folder/*/seed*, in Markdown: losses, codes and samples."""
    groups = read_groups(folder)
    return "\n".join(markdown_table(groups, columns) for columns in (LOSSES, CODES, SAMPLES))


def spreads():
    """Return what the pages say of the losses' course, over the baseline's seeds."""
    logs = [data.read_run(path).log for path in sorted((HERE / "latent32").iterdir())]
    lines = []
    for epochs, loss in ((10, "train_loss"), (10, "test_loss"), (50, "test_loss")):
        falls = spread([log[-1 - epochs][loss] - log[-1][loss] for log in logs], 2)
        lines.append(f"{loss} falls in the last {epochs} epochs by {falls}")
    return "\n".join(lines)


def measure_pixels(root):
    """Write the test accuracies of the report's forest on 784 pixels, by its random state."""
    (train_x, train_y), (test_x, test_y) = data.load_splits(root)
    accuracies = {}
    for state in range(10):
        forest = fit_forest(train_x.flatten(1).double(), train_y, random_state=state)
        accuracies[state] = forest.score(test_x.flatten(1).double(), test_y)
    data.write(HERE / "pixels.json", accuracies)


def read_groups(folder):
    """Return {(codes, dimensions): [what is known of a run]} of the runs in folder/*/seed*.

    Runs of one key differ in the seed alone. Those without a classification of their present
    weights are left out, with a remark. What `--baselines` measured has keys of its own.
    Raises UserError if there is no run.
    """
    groups, baselines = {}, {}
    for path in sorted(folder.glob(f"*/seed*/{data.CONFIG}")):
        run = data.read_run(path.parent)
        result = data.read_classification(run)
        if result is None:
            continue
        last, latent_dim, held = run.log[-1], run.settings["latent_dim"], run.settings["hold_out"]
        known = {**last, **result, "first_loss": run.log[0]["train_loss"]}
        known["gap"] = last["test_loss"] - last["train_loss"]
        groups.setdefault((run.describe(skip=("latent_dim",)), latent_dim), []).append(known)
        measured, held = result.get("baselines") or {}, f", {held} held out" if held else ""
        for name, codes, size in (("pca", "PCA", latent_dim), ("pixels", "Pixels", 28 * 28)):
            if name in measured:
                baselines[codes + held, size] = [{"accuracy": measured[name]}]
        if "training_images" in measured:
            likeness = {f"{name}_samples": x for name, x in measured["training_images"].items()}
            baselines["Training images" + held, 28 * 28] = [likeness]
    if not groups:
        raise data.UserError(f"{folder} holds no classified runs <setting>/seed<n>")
    forests = data.read(folder / "pixels.json", json.loads)
    if forests:
        baselines["Pixels, random states 0 to 9", 28 * 28] = [
            {"accuracy": accuracy} for accuracy in forests.values()
        ]
    return dict(sorted(groups.items())) | dict(sorted(baselines.items()))


def markdown_table(groups, columns):
    """Return a table with a row for each group of which something in `columns` is known.

    Cells are mean ± standard deviation over the n seeds, or over fewer where they say so.
    """
    head = ["Codes", "Dimensions", "n", *columns]
    rows = [head, ["---"] * len(head)]
    for (codes, dimensions), runs in groups.items():
        cells = []
        for name, factor, digits in columns.values():
            values = [run[name] * factor for run in runs if name in run]
            fewer = f" (n = {len(values)})" if 0 < len(values) < len(runs) else ""
            cells.append(spread(values, digits) + fewer)
        if any(cells):
            rows.append([codes, str(dimensions), str(len(runs)), *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def spread(values, digits):
    """Return "mean ± standard deviation" of the values, or a single value as it is."""
    deviation = f"\u00a0±\u00a0{stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}" if values else ""


if __name__ == "__main__":
    data.run_script(main, "nothing is written; the same command starts over")
