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
    parser.add_argument("--figures", action="store_true", help="draw those of results/ first")
    args = parser.parse_args()
    if args.pixels:
        measure_pixels(args.data)
    if args.figures:
        draw_figures(args.data)
    print(tables(args.folder), end="")


def tables(folder):
    """Return the tables of the runs in folder/*/seed*, in Markdown: losses, codes and samples."""
    groups = read_groups(folder)
    printed = [markdown_table(groups, columns) for columns in (LOSSES, CODES, SAMPLES)]
    return "\n".join(filter(None, printed))


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
    for path in sorted(folder.glob("*/seed*")):
        run, known = read_known(path)
        if not known:
            continue
        latent_dim, held = run.settings["latent_dim"], run.settings["hold_out"]
        groups.setdefault((run.describe(skip=("latent_dim",)), latent_dim), []).append(known)
        measured, held = known.get("baselines") or {}, f", {held} held out" if held else ""
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


def read_known(path):
    """Return a run and what is known of it by name, None without a classification."""
    run = data.read_run(path)
    result, last = data.read_classification(run), run.log[-1]
    gap, first_loss = last["test_loss"] - last["train_loss"], run.log[0]["train_loss"]
    return run, result and {**last, **result, "gap": gap, "first_loss": first_loss}


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
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) if len(rows) > 2 else ""


def spread(values, digits):
    """Return "mean ± standard deviation" of the values, or a single value as it is."""
    deviation = f"\u00a0±\u00a0{stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}" if values else ""


# ------------------------------------------------------------------------------------------
# Figures, in a font that can be read at half the width of a page

REPORT_MATRIX = """
841   1   1   2   2   4   1   2   1   3
  1 927   0   5   0   1   3   2   5   2
  5   1 794   7   6   4   8   8  19   3
  5  10   9 843   6  16   5   4  18   6
  2   3   1   3 838   4   4   5  18   4
  8   1   1  16   2 684  11  33  10  22
  7   3   7   1   7   4 850   1   5   2
  0   3   4   2   4  19   0 893   2   2
  1  13   6  11  17  11   5   5 812  20
  4   5   0   3   0  19   1   3   9 913
"""
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
    names = ("fc-latent32", "latent32", "beta0.1", "latent2")
    models = {name: load_model(data.read_run(HERE / name / "seed0")) for name in names}
    figures = {
        "hero": draw_hero(models, images, labels),
        "samples": draw_samples(models, train_images),
        "plane": draw_plane(models["latent2"]),
        "matrices": draw_matrices(),
        "losses": draw_losses(),
        "beta": draw_beta(),
        "proposals": draw_proposals(),
        "accuracy": draw_accuracy(),
    }
    for name, figure in figures.items():
        data.write(HERE / f"{name}.png", figure)


def seeds(name):
    """Return what is known of each seed of a setting."""
    return [read_known(path)[1] for path in sorted((HERE / name).iterdir())]


def draw_hero(models, images, labels):
    """Return the first test image of each class, and three networks' reconstructions."""
    rows = [images[[(labels == k).nonzero()[0].item() for k in range(10)]]]
    names = ["original"]
    titles = {"fc-latent32": "fully connected", "latent32": "ConvVAE", "beta0.1": "β = 0.1"}
    for name, title in titles.items():
        torch.manual_seed(0)
        rows.append(models[name](rows[0])[0])
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
            frechet = seeds(name)[0][f"frechet_{measure}"]
            names.append(f"{beta}, {source}, Fréchet {frechet:.2f}")
    return enlarge(plots.draw_grid(rows, names))


def enlarge(grid):
    """Return a grid of images with its labels upright and larger."""
    for axis in grid.axes:
        axis.yaxis.label.set(rotation=0, ha="right", va="center", fontsize=16)
        axis.title.set_fontsize(15)
    return grid


def draw_plane(model):
    """Return what codes of two numbers decode to, at quantiles of N(0, 1) from 5 to 95 %."""
    pictures = model.decode(plots.sample_codes(model, 2, None)[0]).view(10, 10, 28, 28)
    figure = Figure(figsize=(4, 4))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(pictures.transpose(1, 2).reshape(280, 280), cmap="gray", vmin=0, vmax=1)
    axis.set_axis_off()
    return figure


def draw_matrices():
    """Return the report's confusion matrix and a real one, each row in per cent of its sum."""
    report = [[*map(int, line.split())] for line in REPORT_MATRIX.strip().split("\n")]
    here = seeds("latent16")[0]["confusion_matrix"]
    matrices = {"The report's": report, "Here, from 16 numbers": here}
    figure = Figure(figsize=(8.8, 5), layout="constrained")
    for axis, (title, matrix) in zip(figure.subplots(1, 2, sharey=True), matrices.items()):
        matrix = torch.tensor(matrix)
        shares = 100 * matrix / matrix.sum(1, keepdim=True)
        axis.imshow(shares.sqrt(), cmap="Blues", vmin=0, vmax=10)  # the root, to tell small ones
        for y, x in (shares >= 1.5).nonzero().tolist():
            color = "white" if shares[y, x] > 40 else "black"
            axis.text(x, y, f"{shares[y, x]:.0f}", ha="center", va="center", color=color)
        axis.set_xticks(range(10), data.CLASSES, rotation=90)
        axis.set_yticks(range(10), data.CLASSES)
        right = 100 * matrix.trace() / matrix.sum()
        axis.set_title(f"{title}:\n{right:.1f} % of {matrix.sum():,} right")
        axis.set_xlabel("predicted")
    figure.axes[0].set_ylabel("true")
    return figure


def draw_losses():
    """Return the losses of the baseline's seeds from the second epoch on."""
    figure = Figure(figsize=(8.8, 4), layout="constrained")
    axis = figure.subplots()
    for path in sorted((HERE / "latent32").iterdir()):
        log = data.read_run(path).log[1:]
        for split, color in (("train", "tab:blue"), ("test", "tab:orange")):
            losses = [row[f"{split}_loss"] for row in log]
            axis.plot([row["epoch"] for row in log], losses, color=color, linewidth=0.8)
    axis.axhline(236, color="0.4", linestyle="--")
    axis.text(32, 240, "test", color="tab:orange", fontsize=16)
    axis.text(32, 233, "train", color="tab:blue", fontsize=16)
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
    axes = figure.subplot_mosaic([["terms", "accuracy"], ["terms", "active"]])
    axes["terms"].plot(bce, kld, "o-")
    for beta, *point in zip(names, bce, kld):
        axes["terms"].annotate(f"β = {beta}", point, (8, 5), textcoords="offset points")
    limits = {"xlim": (0, 62), "ylim": (0, 65)}
    axes["terms"].set(xlabel="BCE above its floor, nats", ylabel="KLD, nats", **limits)
    axes["accuracy"].semilogx([*names], [100 * share for share in accuracy], "o-")
    axes["accuracy"].set(title="accuracy, %", ylim=(84, 88.5))
    axes["active"].semilogx([*names], active, "o-")
    axes["active"].set(title="active dimensions, of 32", yticks=(0, 16, 32), xlabel="β")
    for axis in (axes["accuracy"], axes["active"]):
        axis.minorticks_off()
        axis.set_xticks([*names], [*names])
        axis.grid(alpha=0.3)
    return figure


def draw_proposals():
    """Return four measures of each proposal, a dot a seed, over the range of the baseline."""
    measures = {"Test loss ↓": LOSSES["Test loss"], "MSE × 1000 ↓": CODES["MSE × 1000"]}
    measures |= {"Sharpness ↑": CODES["Sharpness"], "Accuracy ↑": CODES["Accuracy, %"]}
    rows = {title: seeds(name) for title, name in PROPOSALS.items()}
    rows["baseline"] += seeds("plateau")  # which never lowered the rate: the baseline on a CPU
    figure = Figure(figsize=(8.8, 4), layout="constrained")
    axes = figure.subplots(1, len(measures), sharey=True)
    for axis, (title, (name, factor, _)) in zip(axes, measures.items()):
        values = [[factor * run[name] for run in runs] for runs in rows.values()]
        axis.axvspan(min(values[0]), max(values[0]), color="0.87")
        draw_dots(axis, rows, values)
        axis.set_title(title, fontsize=14)
        axis.locator_params(axis="x", nbins=3)
        axis.margins(x=0.15)
        axis.tick_params(axis="y", length=0)
    return figure


def draw_accuracy():
    """Return the forest's test accuracy on each kind of code, a dot a seed or random state."""
    rows = {f"PCA, {n}": [seeds(f"latent{n}")[0]["baselines"]["pca"]] for n in (16, 32)}
    rows |= {title: [run["accuracy"] for run in seeds(name)] for title, name in FORESTS.items()}
    rows["784 pixels"] = data.read(HERE / "pixels.json", json.loads).values()
    figure = Figure(figsize=(8.8, 4.2), layout="constrained")
    axis = figure.subplots()
    draw_dots(axis, rows, [[100 * accuracy for accuracy in row] for row in rows.values()])
    axis.axvline(84.01, color="0.4", linestyle="--")
    axis.text(84.06, len(rows) - 1, "the report, 16 numbers", color="0.4", va="center")
    axis.set_xlabel("accuracy, %")
    return figure


def draw_dots(axis, names, values):
    """Draw a row of dots for each name."""
    for y, row in enumerate(values):
        axis.plot([*row], [y] * len(row), "o", color="tab:blue", alpha=0.6)
    axis.set_yticks(range(len(values)), names)
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    data.run_script(main, "nothing is written; the same command starts over")
