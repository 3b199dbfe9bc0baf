"""Print tables of the runs in a folder: losses, codes, samples. Draw the figures that compare them.

python results/summary.py shows results/; another folder, such as results/search, can be named.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import torch
from sklearn.metrics import ConfusionMatrixDisplay

import data
import plots
from classify import fit_forest
from model import load_model, sample_mixture
from plots import Figure, matplotlib  # which it imports whatever a notebook's settings are

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
LIKENESS = {"Fréchet": "frechet", "Precision": "precision", "Recall": "recall"}
SAMPLES = {title: (f"{name}_samples", 1, 2) for title, name in LIKENESS.items()}
SAMPLES |= {f"{title}, mixture": (f"{LIKENESS[title]}_mixture_samples", 1, 2) for title in LIKENESS}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE, help="of <setting>/seed<n>")
    parser.add_argument("--data", type=Path, default=HERE.parent / "data" / "fashion-mnist")
    pixels_help = "measure ten forests on the raw pixels first, in some ten minutes"
    parser.add_argument("--pixels", action="store_true", help=pixels_help)
    parser.add_argument("--figures", action="store_true", help="draw those of results/ first")
    args = parser.parse_args()
    if args.pixels:
        measure_pixels(args.data)
    if args.figures:
        draw_figures(args.data)
    print(tables(args.folder), end="")


def tables(folder):
    """Return the tables of the runs in folder/*/seed*, in Markdown. Runs of a row differ in seed
    alone; those without a classification of their present weights are left out, with a remark. What
    `--baselines` measured has rows of its own. UserError if there is no run."""
    groups, baselines = {}, {}
    for known in read_known(folder.glob("*/seed*")):
        run, found = known["run"], known.get("baselines") or {}
        latent_dim, held = run.settings["latent_dim"], run.settings["hold_out"]
        groups.setdefault((run.describe(skip=["latent_dim"]), latent_dim), []).append(known)
        held = f", {held} held out" if held else ""
        for name, codes in {"pca": ("PCA", latent_dim), "pixels": ("Pixels", 784)}.items():
            if name in found:
                baselines[codes[0] + held, codes[1]] = [{"accuracy": found[name]}]
        if "training_images" in found:
            samples = {f"{name}_samples": x for name, x in found["training_images"].items()}
            baselines["Training images" + held, 784] = [samples]
    if not groups:
        raise data.UserError(f"{folder} holds no classified runs <setting>/seed<n>")
    forests = data.read(folder / "pixels.json", json.loads)
    if forests:
        forests = [{"accuracy": accuracy} for accuracy in forests.values()]
        baselines["Pixels, random states 0 to 9", 784] = forests
    rows = [*sorted(groups.items()), *sorted(baselines.items())]
    return "\n".join(filter(None, (table(rows, part) for part in (LOSSES, CODES, SAMPLES))))


def table(rows, columns):
    """Return a table of those `rows` (((codes, dimensions), runs), …) of which something is known.
    Cells are mean ± standard deviation over the n seeds, or over fewer where they say so."""
    lines = [["Codes", "Dimensions", "n", *columns], ["---"] * (3 + len(columns))]
    for (codes, dimensions), runs in rows:
        cells = []
        for name, factor, digits in columns.values():
            values = [run[name] * factor for run in runs if name in run]
            fewer = f" (n = {len(values)})" if 0 < len(values) < len(runs) else ""
            cells.append(spread(values, digits) + fewer)
        if any(cells):
            lines.append([codes, str(dimensions), str(len(runs)), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) if len(lines) > 2 else ""


def spread(values, digits):
    """Return "mean ± standard deviation" of the values, or a single value as it is."""
    deviation = f"\u00a0±\u00a0{stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}" if values else ""


def read_known(paths):
    """Return what is known by name of each run at `paths` that has a classification."""
    known = []
    for run in map(data.read_run, sorted(paths)):
        last, result = run.log[-1], data.read_classification(run)
        gap, first_loss = last["test_loss"] - last["train_loss"], run.log[0]["train_loss"]
        if result:
            known.append({**last, **result, "gap": gap, "first_loss": first_loss, "run": run})
    return known


def seeds(name):
    """Return what is known of each seed of a setting."""
    return read_known((HERE / name).iterdir())


def spreads():
    """Return what the pages say of the losses' course, over the baseline's seeds."""
    lines, logs = [], [known["run"].log for known in seeds("latent32")]
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


# --- Figures, in a font that can be read at half the width of a page ------------------------

PROPOSALS = {"baseline": "latent32", "deep": "deep", "deep, cosine": "deep-cosine"}
PROPOSALS |= {"200 epochs": "epochs200", "feature matching": "feature", "cosine": "cosine"}
PROPOSALS |= {"64 numbers": "latent64", "128 numbers": "latent128"}
FORESTS = {"fully connected, 32": "fc-latent32", "ConvVAE, 16": "latent16"}
FORESTS |= {"ConvVAE, 32": "latent32", "β = 0.1, 32": "beta0.1"}
FORESTS |= {"searched, 32": "best32", "searched, 64": "best64"}


@torch.no_grad()
@matplotlib.style.context(["default", {"font.size": 14, "axes.titlesize": 15}])
def draw_figures(root):
    """Write the figures that compare runs beside them."""
    (train_images, _), (images, labels) = data.load_splits(root)
    firsts = images[[(labels == k).nonzero()[0].item() for k in range(10)]]
    names = ("fc-latent32", "latent32", "beta0.1")
    models = {name: load_model(data.read_run(HERE / name / "seed0")) for name in names}
    figures = {"hero": draw_hero(models, firsts), "samples": draw_samples(models, train_images)}
    for draw in (draw_matrices, draw_losses, draw_beta, draw_proposals, draw_accuracy):
        figures[draw.__name__.removeprefix("draw_")] = draw()
    for name, figure in figures.items():
        data.write(HERE / f"{name}.png", figure)


def draw_hero(models, firsts):
    """Return the first test image of each class, and three networks' reconstructions."""
    rows, names = [firsts], ["original"]
    titles = {"fc-latent32": "fully connected", "latent32": "ConvVAE", "beta0.1": "β = 0.1"}
    for name, title in titles.items():
        torch.manual_seed(0)
        rows.append(models[name](firsts)[0])
        names.append(f"{title} ({1000 * seeds(name)[0]['mse']:.1f})")
    classes = [name.replace("/", "/\n").replace(" ", "\n") for name in data.CLASSES]
    return enlarge(plots.draw_grid(rows, names, classes))


def draw_samples(models, train_images):
    """Return ten samples from N(0, I) and from a mixture, for two weights of the KLD."""
    rows, names = [], []
    for name, beta in (("latent32", "β = 1"), ("beta0.1", "β = 0.1")):
        torch.manual_seed(0)
        codes = torch.randn(10, 32), sample_mixture(models[name], train_images, 10)
        rows += [models[name].decode(z) for z in codes]
        for source, measure in (("N(0,\u00a0I)", "samples"), ("mixture", "mixture_samples")):
            names.append(f"{beta}, {source}, Fréchet {seeds(name)[0][f'frechet_{measure}']:.2f}")
    return enlarge(plots.draw_grid(rows, names))


def enlarge(grid):
    """Return a grid of images with its labels upright and larger."""
    for axis in grid.axes:
        axis.yaxis.label.set(rotation=0, ha="right", va="center", fontsize=16)
        axis.title.set_fontsize(15)
    return grid


def draw_matrices():
    """Return the report's confusion matrix and a real one, each row in per cent of its sum."""
    matrices = {"The report's": json.loads((HERE / "report_matrix.json").read_bytes())}
    matrices["Here, from 16 numbers"] = seeds("latent16")[0]["confusion_matrix"]
    figure = Figure(figsize=(8.8, 5), layout="constrained")
    for axis, (title, matrix) in zip(figure.subplots(1, 2, sharey=True), matrices.items()):
        matrix = torch.tensor(matrix)
        shares = (100 * matrix / matrix.sum(1, keepdim=True)).numpy()
        display = ConfusionMatrixDisplay(shares, display_labels=data.CLASSES)
        root = {"norm": matplotlib.colors.PowerNorm(0.5)}  # to tell small ones
        style = {"cmap": "Blues", "colorbar": False, "im_kw": root, "xticks_rotation": 90}
        display.plot(ax=axis, values_format=".0f", **style)
        for text, share in zip(display.text_.flat, shares.flat):
            text.set_visible(share >= 1.5)
        right = f"{100 * matrix.trace() / matrix.sum():.1f} % of {matrix.sum():,} right"
        axis.set(title=f"{title}:\n{right}", xlabel="predicted", ylabel="")
    figure.axes[0].set_ylabel("true")
    return figure


def draw_losses():
    """Return the losses of the baseline's seeds from the second epoch on."""
    figure = Figure(figsize=(8.8, 4), layout="constrained")
    axis = figure.subplots()
    for known in seeds("latent32"):
        for split, color in (("train", "C0"), ("test", "C1")):
            points = zip(*((row["epoch"], row[f"{split}_loss"]) for row in known["run"].log[1:]))
            axis.plot(*points, color=color, linewidth=0.8)
    axis.axhline(236, color="0.4", linestyle="--")
    axis.text(32, 240, "test", color="C1", fontsize=16)
    axis.text(32, 233, "train", color="C0", fontsize=16)
    axis.text(1, 233.8, "the report: 236", color="0.4", fontsize=16)
    axis.set(xlabel="epoch", ylabel="loss, nats per image", ylim=(232, 262))
    return figure


def draw_beta():
    """Return what the weight of the KLD does to the loss's two terms and to the codes."""
    names = {0.1: "beta0.1", 0.5: "beta0.5", 1: "latent32", 2: "beta2", 4: "beta4"}
    runs = [seeds(name) for name in names.values()]
    measures = ("excess_bce", "kld", "accuracy", "active_dimensions")
    bce, kld, accuracy, active = ([mean(r[name] for r in row) for row in runs] for name in measures)
    figure = Figure(figsize=(8.8, 4.4), layout="constrained")
    terms, upper, lower = figure.subplot_mosaic("ab;ac").values()
    terms.plot(bce, kld, "o-")
    for beta, *point in zip(names, bce, kld):
        terms.annotate(f"β = {beta}", point, (8, 5), textcoords="offset points")
    terms.set(xlabel="BCE above its floor, nats", ylabel="KLD, nats", xlim=(0, 62), ylim=(0, 65))
    for axis, values in ((upper, [100 * share for share in accuracy]), (lower, active)):
        axis.semilogx([*names], values, "o-")
        axis.minorticks_off()
        axis.set_xticks([*names], [*names])
        axis.grid(alpha=0.3)
    upper.set(title="accuracy, %", ylim=(84, 88.5))
    lower.set(title="active dimensions, of 32", yticks=(0, 16, 32), xlabel="β")
    return figure


def draw_proposals():
    """Return four measures of each proposal, a dot a seed, over the range of the baseline."""
    rows = {title: seeds(name) for title, name in PROPOSALS.items()}
    rows["baseline"] += seeds("plateau")  # which never lowered the rate: the baseline on a CPU
    titles = ("Test loss ↓", "MSE × 1000 ↓", "Sharpness ↑", "Accuracy, % ↑")
    figure = Figure(figsize=(8.8, 4), layout="constrained")
    for axis, title in zip(figure.subplots(1, len(titles), sharey=True), titles):
        name, factor, _ = {**LOSSES, **CODES}[title[:-2]]
        values = {row: [factor * run[name] for run in runs] for row, runs in rows.items()}
        axis.axvspan(min(values["baseline"]), max(values["baseline"]), color="0.87")
        draw_dots(axis, values)
        axis.set_title(title, fontsize=14)
        axis.locator_params(axis="x", nbins=3)
        axis.margins(x=0.15)
        axis.tick_params(axis="y", length=0)
    return figure


def draw_accuracy():
    """Return the forest's test accuracy on each kind of code, a dot a seed or random state."""
    rows = {f"PCA, {n}": [seeds(f"latent{n}")[0]["baselines"]["pca"]] for n in (16, 32)}
    rows |= {title: [run["accuracy"] for run in seeds(name)] for title, name in FORESTS.items()}
    rows["784 pixels"] = json.loads((HERE / "pixels.json").read_bytes()).values()
    figure = Figure(figsize=(8.8, 4.2), layout="constrained")
    axis = figure.subplots()
    draw_dots(axis, {row: [100 * accuracy for accuracy in runs] for row, runs in rows.items()})
    axis.axvline(84.01, color="0.4", linestyle="--")
    axis.text(84.06, len(rows) - 1, "the report, 16 numbers", color="0.4", va="center")
    axis.set_xlabel("accuracy, %")
    return figure


def draw_dots(axis, rows):
    """Draw a row of dots for each name in `rows`."""
    for y, row in enumerate(rows.values()):
        axis.plot(row, [y] * len(row), "o", color="C0", alpha=0.6)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    data.run_script(main, "nothing is written; the same command starts over")
