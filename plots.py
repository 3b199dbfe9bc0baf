"""Draw the figures of a run: losses, reconstructions, samples, latent space, confusion matrix."""

import io
import sys

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import ConfusionMatrixDisplay

import data
from model import active_dimensions, latent_means, load_network, sample_mixture

# t-SNE of all 10,000 test images would take minutes.
LATENT_SPACE_IMAGES = 5000

DESCRIPTION = """Draw the figures of a run, as PNG files in its folder: loss curves,
reconstructions, samples, interpolations, the latent space and, once classify.py has measured the
run, the confusion matrix.
"""


@torch.no_grad()
def main():
    parser, _ = data.command_line(DESCRIPTION)
    args = parser.parse_args()
    run = data.read_run(args.run)
    print(run)
    model = load_network(run)
    classification = data.current_classification(run)
    (train_images, _), (test_images, test_labels) = data.load_run_data(run, args.data)
    classes = test_labels.unique().tolist()
    firsts = first_images(test_images, test_labels)
    latent_dim = run.config["latent_dim"]

    save(run, "loss_curves.png", draw_losses(run.log))
    save(run, "reconstructions.png", draw_reconstructions(model, firsts, classes))
    save(run, "samples.png", draw_samples(model, latent_dim, train_images))
    if len(classes) > 1:  # otherwise there is nothing to interpolate between
        save(run, "interpolations.png", draw_interpolations(model, firsts))
    mu = latent_means(model, test_images[:LATENT_SPACE_IMAGES])
    if active_dimensions(mu) == 0:
        print(
            "Warning: all latent dimensions have collapsed, so latent_space.png is not drawn.",
            file=sys.stderr,
        )
    elif latent_dim > 1:  # a single dimension cannot be drawn in two
        save(run, "latent_space.png", draw_latent_space(mu, test_labels[:LATENT_SPACE_IMAGES]))
    if classification:
        save(run, "confusion_matrix.png", draw_confusion_matrix(classification))


def save(run, name, figure):
    """Write a figure to the folder of a run, and print its path."""
    data.write_bytes(run.path / name, png_bytes(figure))
    print(run.path / name)


def png_bytes(figure):
    """Return a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    return buffer.getvalue()


def first_images(images, labels):
    """Return the first image of each class that occurs, [C, 1, 28, 28]."""
    indices = []
    for label in labels.unique():
        indices.append((labels == label).nonzero()[0].item())
    return images[indices]


# --- One function per figure --------------------------------------------------------------


def draw_losses(log):
    """Draw the loss and its two terms over the epochs, in nats per image."""
    if len(log) > 2:
        log = log[1:]  # the loss of the first epoch is so high that it would flatten the curves
    epochs = [row["epoch"] for row in log]
    marker = "." if len(log) < 10 else ""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = {
        "loss": "Loss = BCE + KLD",
        "bce": "BCE (reconstruction)",
        "kld": "KLD (latent codes)",
    }
    for axis, (loss, title) in zip(axes, titles.items()):
        for split, color in [("train", "C0"), ("test", "C1")]:
            values = [row[f"{split}_{loss}"] for row in log]
            axis.plot(epochs, values, color=color, label=split, marker=marker)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats per image")
    axes[0].legend()
    return figure


def draw_reconstructions(model, images, classes):
    """Draw images [C, 1, 28, 28] of these classes, and below them their reconstructions."""
    torch.manual_seed(0)
    reconstructions, _, _ = model(images)
    titles = [data.CLASSES[label] for label in classes]
    return draw_grid([images, reconstructions], ["original", "reconstruction"], titles)


def draw_samples(model, latent_dim, train_images):
    """Draw 100 decoded latent codes, ten in a row.

    The first 50 are drawn from N(0, I), the others from a mixture of Gaussians fitted to the latent
    means of training images (Ghosh et al., 2020). With two latent dimensions, the codes are a grid
    of quantiles of the normal distribution instead (Kingma & Welling, 2014, figure 4).
    """
    if latent_dim == 2:
        quantiles = torch.special.ndtri(torch.linspace(0.05, 0.95, 10))
        z = torch.cartesian_prod(quantiles, quantiles)
        row_names = [f"z₁ = {quantile:.1f}" for quantile in quantiles]
        titles = [f"z₂ = {quantile:.1f}" for quantile in quantiles]
    else:
        torch.manual_seed(0)
        mixture_z = sample_mixture(model, train_images, 50)
        z = torch.cat((torch.randn(50, latent_dim), mixture_z))
        row_names = ["N(0, I)", "", "", "", "", "mixture"]
        titles = []
    return draw_grid(model.decode(z).split(10), row_names, titles)


def draw_interpolations(model, images):
    """Draw the way from one image to another, in a row for each pair of images [C, 1, 28, 28].

    Each row has an image, ten decoded points at equal distances on the straight line between the
    latent means of the two images, and the other image. The pairs are the first and second image,
    the third and fourth, and so on.
    """
    mu = latent_means(model, images)
    steps = torch.linspace(0, 1, 10).unsqueeze(1)
    rows = []
    for first in range(0, len(images) - 1, 2):
        second = first + 1
        z = (1 - steps) * mu[first] + steps * mu[second]
        rows.append(torch.cat((images[[first]], model.decode(z), images[[second]])))
    titles = ["original", *[""] * 10, "original"]
    return draw_grid(rows, titles=titles)


def draw_latent_space(mu, labels):
    """Draw latent means [N, latent_dim] in two dimensions, by PCA and by t-SNE."""
    methods = {"PCA": PCA(2, random_state=0), "t-SNE": TSNE(random_state=0, n_jobs=-1)}
    point_colors = [f"C{label}" for label in labels.tolist()]
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axis, (name, method) in zip(figure.subplots(1, 2), methods.items()):
        points = method.fit_transform(mu)
        axis.scatter(points[:, 0], points[:, 1], c=point_colors, s=2)
        axis.set(title=f"{name} of μ, {len(mu):,} test images", xticks=[], yticks=[])
    handles = []
    for label in range(len(data.CLASSES)):
        handles.append(Line2D([], [], marker="o", linestyle="", color=f"C{label}"))
    figure.legend(handles, data.CLASSES, loc="outside right center")
    return figure


def draw_confusion_matrix(classification):
    """Draw the confusion matrix in the content of classification.json."""
    names = list(classification["recall"])  # CLASSES may have been edited since
    matrix = torch.tensor(classification["confusion_matrix"]).numpy()
    accuracy = f"{classification['accuracy'] * 100:.2f} % correct"
    figure = Figure(figsize=(6.5, 6.5), layout="constrained")
    axis = figure.subplots()
    ConfusionMatrixDisplay(matrix, display_labels=names).plot(
        ax=axis,
        cmap="Blues",
        colorbar=False,
        xticks_rotation=60,
        values_format="d",
        im_kw={"origin": "upper"},
    )
    axis.set_title(f"Random Forest on μ, epoch {classification['epoch']}: {accuracy}")
    return figure


def draw_grid(rows, row_names=(), titles=()):
    """Draw rows of images [C, 1, 28, 28], with names at their left and titles above the columns."""
    columns = len(rows[0])
    figure = Figure(figsize=(1.1 * columns, 1.15 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, row_axes in zip(rows, axes):
        for image, axis in zip(row, row_axes):
            # A matplotlibrc may have another origin, which would turn the images over.
            axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1, origin="upper")
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], row_names):
        axis.set_ylabel(name, fontsize=11)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=11)
    return figure


if __name__ == "__main__":
    data.run_script(
        main, when_interrupted="Run the same command again. The figures listed above are complete."
    )
