"""Evaluate a run: fit a Random Forest on its latent means, and measure its images and samples."""

import sys

import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import confusion_matrix

import data
from data import BASELINES, CLASSIFICATION, UserError
from model import (
    EVALUATION_BATCH_SIZE,
    active_dimensions,
    kl_divergence,
    latent_means,
    load_network,
    reconstruction_bce,
    sample_mixture,
)

DESCRIPTION = """Evaluate a run: fit a Random Forest on its latent means, print its accuracy and
confusion matrix, and measure the quality of reconstructions and samples. Everything is written to
classification.json in the folder of the run.
"""


def main():
    parser, _ = data.command_line(DESCRIPTION)
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also fit the Random Forest on raw pixels and on principal components, measure "
        "training images as if they were samples, and write this to baselines.json",
    )
    args = parser.parse_args()
    run = data.read_run(args.run)
    print(run)
    model = load_network(run)
    train, test = data.load_run_data(run, args.data)
    train_images, train_labels = train
    test_images, test_labels = test

    # The Random Forest on latent means.
    forest = fit_forest(latent_means(model, train_images), train_labels)
    predicted = forest.predict(latent_means(model, test_images))
    matrix = confusion_matrix(test_labels, predicted, labels=range(len(data.CLASSES)))
    accuracy = matrix.trace() / matrix.sum()
    recall = share_correct_by_class(matrix)
    print_classification(matrix, accuracy, recall)

    # Reconstructions and samples.
    metrics = evaluate(model, train_images, test_images)
    for name, value in metrics.items():
        print(f"{name}: {value:.4g}")
    if metrics["active_dimensions"] == 0:
        print(
            "Warning: all latent dimensions have collapsed (the variance of mu is at most 0.01). "
            "More epochs or a smaller --beta may help.",
            file=sys.stderr,
        )

    # accuracy, recall and confusion_matrix are those of the Random Forest on latent means. The
    # recall of a class is the share of its images that are classified correctly.
    classification = {
        "epoch": len(run.log),
        "accuracy": accuracy,
        "recall": recall,
        "confusion_matrix": matrix.tolist(),
        **metrics,
    }
    check_same_run(run)
    data.write_bytes(run.path / CLASSIFICATION, data.json_bytes(classification))

    if args.baselines:
        baselines = measure_baselines(train, test, run.config["latent_dim"])
        check_same_run(run)
        data.write_bytes(run.path / BASELINES, data.json_bytes(baselines))


def check_same_run(run):
    """Raise UserError if the folder of a Run has another run by now.

    Someone may have moved a link, or have trained the run anew. If training goes on meanwhile, it
    adds rows to the log, and may change the number of epochs and the machine in the config.
    """
    current = data.read_run(run.path)
    names = run.config.keys() - {"epochs", "torch", "device"}
    has_same_options = all(current.config.get(name) == run.config[name] for name in names)
    if not has_same_options or current.log[: len(run.log)] != run.log:
        raise UserError(
            f"{run.path} has another run than before, so the results were not written. Run the "
            "same command again."
        )


# --- Classification -----------------------------------------------------------------------


def fit_forest(features, labels, random_state=42):
    """Return the report's Random Forest, fitted to features [N, D] and labels [N]."""
    forest = RandomForestClassifier(n_estimators=100, random_state=random_state, n_jobs=-1)
    return forest.fit(features, labels)


def share_correct_by_class(matrix):
    """Return the share of the images of each class that are classified correctly (the recall).

    `matrix` is the confusion matrix, [10, 10]. The result is {class: share}. For a class without
    images, the share is None.
    """
    shares = {}
    for label, name in enumerate(data.CLASSES):
        count = matrix[label].sum()
        shares[name] = matrix[label, label] / count if count > 0 else None
    return shares


def print_classification(matrix, accuracy, shares):
    """Print a confusion matrix [10, 10], the share correct of each class, and the accuracy."""
    print("Confusion matrix (rows: true class, columns: predicted class, in the same order)")
    for counts, (name, share) in zip(matrix, shares.items()):
        line = f"{name:11} " + " ".join(f"{count:4}" for count in counts)
        if share is not None:
            line += f" {share * 100:6.1f}% correct"
        print(line)
    print(f"Classification accuracy: {accuracy * 100:.2f}%")


def measure_baselines(train, test, latent_dim):
    """Return what the metrics are without a VAE, as a dict.

    pixels, pca: accuracy of the Random Forest on the 784 pixels, and on `latent_dim` principal
    components. training_images: sample quality of as many training images as there are test images.
    """
    train_images, train_labels = train
    test_images, test_labels = test
    # In float64, so that PCA gives the same result on every machine.
    train_pixels = train_images.flatten(1).double()
    test_pixels = test_images.flatten(1).double()
    forest = fit_forest(train_pixels, train_labels)
    pixels_accuracy = forest.score(test_pixels, test_labels)
    print(f"Random Forest on pixels: {pixels_accuracy * 100:.2f}%")

    pixel_pca = fit_pca(train_images, latent_dim)
    forest = fit_forest(pixel_pca.transform(train_pixels), train_labels)
    pca_accuracy = forest.score(pixel_pca.transform(test_pixels), test_labels)
    print(f"Random Forest on {latent_dim} principal components: {pca_accuracy * 100:.2f}%")

    return {
        "pixels": pixels_accuracy,
        "pca": pca_accuracy,
        "training_images": sample_quality(
            train_images[: len(test_images)],
            test_images,
            fit_pca(train_images, PRINCIPAL_COMPONENTS),
        ),
    }


# --- Reconstructions ----------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, train_images, test_images):
    """Return all metrics but those of the Random Forest, as a dict.

    They compare reconstructions and samples with the N test images. Both splits are
    [N, 1, 28, 28] in [0, 1]. A reconstruction is the output of the model with z sampled, as in the
    test loss.

    - bce, kld: the two terms of the loss, in nats per image.
    - bce_floor: the minimum BCE, that of a perfect reconstruction, in nats per image.
    - excess_bce: bce - bce_floor.
    - mse: mean squared error per pixel, for pixels in [0, 1].
    - sharpness_reconstructions: gradient energy of the reconstructions divided by that of images.
    - frechet_samples, precision_samples, recall_samples: `sample_quality` of N decoded latent codes
      from N(0, I).
    - frechet_mixture_samples, precision_mixture_samples, recall_mixture_samples: the same for N
      latent codes from a mixture of Gaussians fitted to the training images (`sample_mixture`).
    - train_bce_floor: the minimum BCE of the training images. It is lower than that of the test
      images, which explains most of the gap between the test and the training loss.
    - active_dimensions: the number of active latent dimensions, for the test images.
    """
    torch.manual_seed(0)
    reconstructions = []
    means = []
    log_variances = []
    for batch in test_images.split(EVALUATION_BATCH_SIZE):
        reconstruction, mu, logvar = model(batch)
        reconstructions.append(reconstruction)
        means.append(mu)
        log_variances.append(logvar)
    reconstructions = torch.cat(reconstructions)
    mu = torch.cat(means)
    logvar = torch.cat(log_variances)

    prior_z = torch.randn_like(mu)
    mixture_z = sample_mixture(model, train_images, len(test_images))

    bce = reconstruction_bce(reconstructions, test_images).item() / len(test_images)
    bce_floor = minimum_bce(test_images)
    sharpness = gradient_energy(reconstructions) / gradient_energy(test_images)
    metrics = {
        "bce": bce,
        "kld": kl_divergence(mu, logvar).item() / len(test_images),
        "bce_floor": bce_floor,
        "excess_bce": bce - bce_floor,
        "mse": F.mse_loss(reconstructions, test_images).item(),
        "sharpness_reconstructions": sharpness,
    }
    pca = fit_pca(train_images, PRINCIPAL_COMPONENTS)
    for name, z in [("samples", prior_z), ("mixture_samples", mixture_z)]:
        samples = torch.cat([model.decode(batch) for batch in z.split(EVALUATION_BATCH_SIZE)])
        for metric, value in sample_quality(samples, test_images, pca).items():
            metrics[f"{metric}_{name}"] = value
    metrics["train_bce_floor"] = minimum_bce(train_images)
    metrics["active_dimensions"] = active_dimensions(latent_means(model, test_images))
    return metrics


def minimum_bce(images):
    """Return the BCE of perfect reconstructions, in nats per image: the entropy of gray pixels."""
    return reconstruction_bce(images, images).item() / len(images)


def gradient_energy(images):
    """Return the mean over images of Σ (∂x)² + (∂y)², from differences of neighboring pixels.

    Blur lowers it, so it measures sharpness (Subbarao, Choi & Nikzad, 1993).
    """
    dy = images.diff(dim=2)
    dx = images.diff(dim=3)
    return (dy.square().sum() + dx.square().sum()).item() / len(images)


# --- Samples ------------------------------------------------------------------------------

# The number of principal components in which samples are compared with images.
PRINCIPAL_COMPONENTS = 50


def sample_quality(samples, images, pca):
    """Compare samples [M, 1, 28, 28] with images [N, 1, 28, 28]. Return three metrics as a dict.

    Both are compared as points in the principal components `pca` of the pixels. There is no
    Inception network, so the values cannot be compared with an FID in the literature.

    - frechet: the Fréchet distance of the two Gaussians fitted to the points (Heusel et al., 2017).
      It is 0 if means and covariances agree. Lower is better.
    - precision: the share of samples that lie on the manifold of the images. recall: the share of
      images that lie on the manifold of the samples (Kynkäänniemi et al., 2019). Both are from 0 to
      1, and higher is better, but blurred samples have a higher precision than real images.
    """
    sample_points = torch.tensor(pca.transform(samples.flatten(1).double()))
    image_points = torch.tensor(pca.transform(images.flatten(1).double()))
    return {
        "frechet": frechet_distance(sample_points, image_points),
        "precision": share_within_manifold(sample_points, image_points),
        "recall": share_within_manifold(image_points, sample_points),
    }


def fit_pca(images, components):
    """Return a PCA of the pixels, fitted to images [N, 1, 28, 28]."""
    # In float64, so that the result is the same on every machine.
    return PCA(components, random_state=42).fit(images.flatten(1).double())


def frechet_distance(points, reference):
    """Return the Fréchet distance of the Gaussians fitted to points [M, D] and reference [N, D].

    It is ||m₁ - m₂||² + tr(C₁ + C₂ - 2 (C₁ C₂)^½) for means m and covariances C.
    """
    # Let R be that of the QR decomposition of the centered points, divided by √(n-1). Then C = RᵀR,
    # tr C is the sum of the squares of R, and tr (C₁ C₂)^½ is the nuclear norm of R₁ R₂ᵀ.
    mean = points.mean(dim=0)
    reference_mean = reference.mean(dim=0)
    r = torch.linalg.qr(points - mean).R / (len(points) - 1) ** 0.5
    reference_r = torch.linalg.qr(reference - reference_mean).R / (len(reference) - 1) ** 0.5
    distance = (mean - reference_mean).square().sum()
    distance += r.square().sum() + reference_r.square().sum()
    distance -= 2 * torch.linalg.matrix_norm(r @ reference_r.T, "nuc")
    return distance.item()


def share_within_manifold(points, reference):
    """Return the share of points [M, D] that lie on the manifold of the reference points [N, D].

    A point lies on the manifold if its distance to some reference point is at most the distance
    from that reference point to its third-nearest neighbor (Kynkäänniemi et al., 2019, k = 3).
    """
    # The distance of a point to itself must be 0, which it is not if matrix products are used.
    mode = "donot_use_mm_for_euclid_dist"
    radii = []
    for chunk in reference.split(500):
        distances = torch.cdist(chunk, reference, compute_mode=mode)
        # The smallest distance is that of the point to itself, so the third neighbor is the fourth.
        radii.append(distances.kthvalue(4, dim=1).values)
    radii = torch.cat(radii)
    inside = []
    for chunk in points.split(500):
        distances = torch.cdist(chunk, reference, compute_mode=mode)
        inside.append((distances <= radii).any(dim=1))
    return torch.cat(inside).double().mean().item()


if __name__ == "__main__":
    data.run_script(main, when_interrupted="Nothing was written. Run the same command again.")
